"""Train one network and leave everything that judges and serves it in an MLflow run."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat import tracking
from eurosat.config import TrainConfig, compose
from eurosat.data.prepare import PreparedData, prepare
from eurosat.data.split import split_csv
from eurosat.errors import ModelError
from eurosat.runtime import cli, exit_codes, logs
from eurosat.training.checkpoints import CheckpointSlot, acquire

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from eurosat.data.arrays import Floats, Labels
    from eurosat.models.network import Network
    from eurosat.training.callbacks import EpochHook
    from eurosat.training.fit import FitResult

log = logging.getLogger(__name__)

USAGE = """
usage: python -m eurosat.train [key=value ...]

  data=synthetic|eurosat|folder   recipe=NAME (eurosat/conf/recipe)   seed=0
  weights=none|imagenet|efficientnet-lite|FILE|models:/NAME@ALIAS     trainer.epochs=N
  log_level=info
  and any key of the recipe, such as optim.lr=0.05 model.name=resnet50 data.protocol=80/20
"""


def evaluate_and_log(
    config: TrainConfig, data: PreparedData, fitted: "FitResult", run: tracking.Run
) -> dict[str, float]:
    """Calibrate on the val fold, judge on the test fold, once, and leave the files in the run."""
    import numpy as np

    from eurosat.data.decode import full_scales
    from eurosat.data.loaders import TileDataModule
    from eurosat.evaluation import calibration, metrics, plots
    from eurosat.models import export, network, predict

    net, classes = fitted.network.float(), data.pack.classes
    loaders = TileDataModule(data.pack, data.split, batch_size=2, seed=0)
    calibrated = calibration.fit(*predict.logits(net, loaders.val_dataloader()))
    net.temperature.fill_(calibrated.temperature)
    log.info("judging on the %d tiles of the test fold", len(data.split.indices("test")))
    logits, once, labels = predict.logits_and_first_view(net, loaders.test_dataloader())
    probabilities = calibration.softmax(logits / calibrated.temperature)
    raw = metrics.evaluate(labels, calibration.softmax(logits), classes)
    merits = metrics.evaluate(labels, probabilities, classes)
    merits |= calibration.evaluate(calibrated, logits, labels)
    merits |= {f"uncalibrated_{name}": raw[name] for name in ("ece", "nll")}
    if net.spec.tta_views > 1:
        merits["one_view_accuracy"] = float((once.argmax(axis=1) == labels).mean())
    tested = {f"test_{name}": value for name, value in merits.items()}
    run.log_metrics(tested)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        drawn = folder / "figures"
        drawn.mkdir()
        counts = metrics.confusion(labels, probabilities.argmax(axis=1), len(classes))
        title = f"{config.recipe}, test fold: accuracy {tested['test_accuracy']:.4f}"
        plots.confusion_matrix(counts, classes, title, drawn / "confusion.png")
        plots.training_curves(fitted.history, config.recipe, drawn / "curves.png")
        plots.reliability(labels, probabilities, title, drawn / "reliability.png")
        _log_gallery(data, net, labels, probabilities, drawn / "explained.png")
        predictions_table(data, labels, probabilities.astype(np.float32)).to_parquet(
            folder / "predictions.parquet", index=False
        )
        (folder / "calibration.json").write_text(json.dumps(calibrated.as_dict(), indent=1))
        network.save(net, folder / "weights.safetensors")
        run.log_folder(folder)  # before the export: a backbone may refuse it
        told = {**data.tags, "config.digest": config.digest, "run_id": run.run_id}
        told["calibration"] = json.dumps(calibrated.as_dict())
        if config.data.dtype == "uint16":
            scale = full_scales(data.pack.bands, config.data.reflectance_max)
            told["full_scale"] = json.dumps(scale.tolist())
        log.info("exporting to ONNX")
        alone = export.export_core(net)
        parity = export.export_onnx(net, folder / "model.onnx", told, alone)
        run.log_metrics({"onnx_difference": parity})
        run.log_file(folder / "model.onnx")
        _log_int8(data, net, labels, probabilities, told, alone, run)
    return tested


def _log_int8(
    data: PreparedData,
    net: "Network",
    labels: "Labels",
    probabilities: "Floats",
    told: Mapping[str, str],
    alone: bytes,
    run: tracking.Run,
) -> None:
    """Leave the network in whole numbers in the run, if it is as accurate on the test fold."""
    import numpy as np

    from eurosat.models import onnx_session, quantise

    log.info("quantising to INT8")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.int8.onnx"
        try:
            tiles_NHWC = quantise.calibration_tiles(data)
            quantise.export_int8(net, tiles_NHWC, file, told, alone)
        except Exception as error:  # noqa: BLE001 - the quantiser raises anything on a backbone that
            # it does not know, after hours of training; FP32 is served
            log.warning("no INT8 form of %s: %s", net.spec.name, " ".join(str(error).split())[:200])
            return
        answered = onnx_session.probabilities(
            file, data.pack.tiles_NHWC[data.split.indices("test")]
        )
        accuracy = float((answered.argmax(axis=1) == labels).mean())
        lost = float((probabilities.argmax(axis=1) == labels).mean()) - accuracy
        difference = float(np.abs(answered - probabilities).mean())
        run.log_metrics({"int8_accuracy": accuracy, "int8_mean_difference": difference})
        if lost > quantise.MAX_ACCURACY_LOSS:
            log.warning(
                "the INT8 form is not kept: its accuracy is %.4f lower, over the %.4f allowed",
                lost,
                quantise.MAX_ACCURACY_LOSS,
            )
            return
        run.log_file(file)


def _log_gallery(
    data: PreparedData, network: "Network", labels: "Labels", probabilities: "Floats", file: Path
) -> None:
    """The hardest test tiles, the surest of each class, and where the network looked."""
    from eurosat.evaluation import gradcam

    rows = data.split.indices("test")
    tiles_NHWC, names = data.pack.tiles_NHWC[rows], list(data.pack.table["path"].iloc[rows])
    try:
        explained = gradcam.gallery(network, tiles_NHWC, names, labels, probabilities)
    except ModelError as error:
        log.warning("no gallery: %s", error)
        return
    gradcam.draw_page(
        explained, "Test fold: the hardest tiles, then the surest of each class", file
    )


def predictions_table(
    data: PreparedData, labels: "npt.NDArray[np.int64]", probabilities: "npt.NDArray[np.float32]"
) -> "pd.DataFrame":
    """One row a test tile: tile, sha256, label, and ``p/Class`` for each class."""
    rows = data.split.indices("test")
    classes = data.pack.classes
    table = data.pack.table.iloc[rows][["path", "sha256"]].rename(columns={"path": "tile"})
    table["label"] = [classes[label] for label in labels]
    for number, name in enumerate(classes):
        table[f"p/{name}"] = probabilities[:, number]
    return table


def describe(config: TrainConfig, data: PreparedData, run: tracking.Run) -> None:
    """Log what the run is about to compute: its configuration and its data's fingerprints."""
    import yaml

    run.log_params(config.as_dict())
    run.set_tags({**data.tags, "config.digest": config.digest})
    run.log_text(yaml.safe_dump(config.as_dict(), sort_keys=False), "config.yaml")


def train(
    config: TrainConfig,
    data: PreparedData,
    run: tracking.Run,
    on_epoch: "EpochHook | None" = None,
    slot: CheckpointSlot | None = None,
) -> dict[str, float]:
    """Fit and conclude in ``run``; returns the test metrics.

    A training that is continued goes on with the log of the process that was cut short.
    """
    from eurosat.training import launch

    with (
        tempfile.TemporaryDirectory() as folder,
        logs.copied_to((slot.directory if slot else Path(folder)) / "train.log") as file,
    ):
        try:
            if slot is None or not slot.is_described:
                describe(config, data, run)
                run.log_text(split_csv(data.pack.table, data.split), "split.csv")
            if slot:
                slot.mark_described()
            fitted = launch.fit(config, data, run, on_epoch, slot)
            return evaluate_and_log(config, data, fitted, run)
        finally:
            run.log_file(file, "logs")


def summary(tested: dict[str, float]) -> str:
    names = ("accuracy", "macro_f1", "macro_auprc", "nll", "ece", "one_view_accuracy")
    told: list[Any] = [
        f"{name} {tested[f'test_{name}']:.4f}" for name in names if f"test_{name}" in tested
    ]
    return "test fold: " + ", ".join(told)


def main(argv: Sequence[str]) -> int:
    config = compose(cli.overrides(argv, USAGE))
    data = prepare(config)
    name = f"{config.recipe} seed {config.seed}"
    with (
        acquire(config, data.fingerprints) as saved,
        tracking.run(
            config.experiment,
            name,
            journal=saved.start_or_resume(),
            resume=saved.journal,
            tags={"kind": "train"},
        ) as run,
    ):
        tested = train(config, data, run, slot=saved)
    print(summary(tested))
    print(f"run {run.run_id}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
