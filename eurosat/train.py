"""Train one network, evaluate it, and log all that is needed to compare and serve it in a run."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.config import TrainConfig, compose
from eurosat.data.prepare import PreparedData, prepare
from eurosat.data.split import split_csv
from eurosat.runtime import cli, exit_codes, hardware, logs
from eurosat.training.checkpoints import CheckpointSlot, acquire

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from eurosat.data.arrays import Floats, Labels
    from eurosat.evaluation.calibration import Calibration
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TestFoldResult:
    """A calibrated network on the test fold of N tiles and K classes."""

    labels: "Labels"
    """(N,) class numbers."""
    probabilities: "Floats"
    """(N, K), calibrated, over all views of the network."""
    calibration: "Calibration"
    metrics: dict[str, float]
    """Names begin with ``test_``."""


def evaluate_and_log(
    config: TrainConfig, data: PreparedData, fitted: "FitResult", run: tracking.Run
) -> dict[str, float]:
    """Calibrate on the val fold, evaluate once on the test fold, and log the files of the run.

    Weights and predictions are logged first: figures and exports may fail for some backbones.
    Returns the test metrics.

    Raises:
        ModelError: the network cannot be exported to ONNX.
    """
    net = fitted.network.float()
    result = evaluate_on_test(net, data)
    run.log_metrics(result.metrics)
    _log_weights_and_predictions(net, data, result, run)
    _log_figures(config, net, data, fitted, result, run)
    _log_onnx(config, net, data, result, run)
    return result.metrics


def evaluate_on_test(net: "Network", data: PreparedData) -> TestFoldResult:
    """Set the temperature of ``net`` on the val fold and evaluate it on the test fold."""
    from eurosat.data.loaders import TileDataModule
    from eurosat.evaluation import calibration, metrics
    from eurosat.models import predict

    classes = data.pack.classes
    loaders = TileDataModule(data.pack, data.split, batch_size=2, seed=0)
    calibrated = calibration.fit(*predict.logits(net, loaders.val_dataloader()))
    net.temperature.fill_(calibrated.temperature)
    log.info("evaluating on the %d tiles of the test fold", len(data.split.indices("test")))
    logits, first_view, labels = predict.logits_and_first_view(net, loaders.test_dataloader())
    probabilities = calibration.softmax(logits / calibrated.temperature)
    uncalibrated = metrics.evaluate(labels, calibration.softmax(logits), classes)
    values = metrics.evaluate(labels, probabilities, classes)
    values |= calibration.evaluate(calibrated, logits, labels)
    values |= {f"uncalibrated_{name}": uncalibrated[name] for name in ("ece", "nll")}
    if net.spec.tta_views > 1:
        values["one_view_accuracy"] = float((first_view.argmax(axis=1) == labels).mean())
    return TestFoldResult(
        labels=labels,
        probabilities=probabilities,
        calibration=calibrated,
        metrics={f"test_{name}": value for name, value in values.items()},
    )


def _log_weights_and_predictions(
    net: "Network", data: PreparedData, result: TestFoldResult, run: tracking.Run
) -> None:
    import numpy as np

    from eurosat.models import network

    table = predictions_table(data, result.labels, result.probabilities.astype(np.float32))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        network.save(net, folder / "weights.safetensors")
        table.to_parquet(folder / "predictions.parquet", index=False)
        calibration = json.dumps(result.calibration.as_dict(), indent=1)
        (folder / "calibration.json").write_text(calibration)
        run.log_folder(folder)


def _log_figures(
    config: TrainConfig,
    net: "Network",
    data: PreparedData,
    fitted: "FitResult",
    result: TestFoldResult,
    run: tracking.Run,
) -> None:
    from eurosat.evaluation import metrics, plots

    labels, classes = result.labels, data.pack.classes
    counts = metrics.confusion(labels, result.probabilities.argmax(axis=1), len(classes))
    title = f"{config.recipe}, test fold: accuracy {result.metrics['test_accuracy']:.4f}"
    with tempfile.TemporaryDirectory() as temporary:
        figures = Path(temporary) / "figures"
        figures.mkdir()
        plots.confusion_matrix(counts, classes, title, figures / "confusion.png")
        plots.training_curves(fitted.history, config.recipe, figures / "curves.png")
        plots.reliability(labels, result.probabilities, title, figures / "reliability.png")
        _draw_gallery(net, data, result, figures / "explained.png")
        run.log_folder(Path(temporary))


def _draw_gallery(net: "Network", data: PreparedData, result: TestFoldResult, file: Path) -> None:
    """Draw the hardest test tiles and the most confident ones with their Grad-CAM maps."""
    from eurosat.evaluation import gradcam

    rows = data.split.indices("test")
    tiles_NHWC, names = data.pack.tiles_NHWC[rows], list(data.pack.table["path"].iloc[rows])
    title = "Test fold: the hardest tiles, then the most confident of each class"
    try:
        tiles = gradcam.gallery(net, tiles_NHWC, names, result.labels, result.probabilities)
        gradcam.draw_page(tiles, title, file)
    except Exception as error:  # noqa: BLE001 - some backbones have no maps; the training is done
        log.warning(
            "no figures/explained.png, all else is complete: Grad-CAM fails for %s (%s: %s)",
            net.spec.name,
            type(error).__name__,
            error,
        )


def _log_onnx(
    config: TrainConfig,
    net: "Network",
    data: PreparedData,
    result: TestFoldResult,
    run: tracking.Run,
) -> None:
    """Export the network to ONNX, and in INT8 too if that is accurate enough."""
    from eurosat.data.decode import full_scales
    from eurosat.models import export

    metadata = {**data.tags, "config.digest": config.digest, "run_id": run.run_id}
    metadata["calibration"] = json.dumps(result.calibration.as_dict())
    if config.data.dtype == "uint16":
        scales = full_scales(data.pack.bands, config.data.reflectance_max)
        metadata["full_scale"] = json.dumps(scales.tolist())
    log.info("exporting to ONNX")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        core = export.export_core(net)
        run.log_metrics({"onnx_difference": export.export_onnx(net, file, metadata, core)})
        run.log_file(file)
    _log_int8(net, data, result, metadata, core, run)


def _log_int8(
    net: "Network",
    data: PreparedData,
    result: TestFoldResult,
    metadata: Mapping[str, str],
    core: bytes,
    run: tracking.Run,
) -> None:
    """Quantise the network to INT8, and log it if it is as accurate on the test fold."""
    import numpy as np

    from eurosat.models import onnx_session, quantise

    log.info("quantising to INT8")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.int8.onnx"
        try:
            tiles_NHWC = quantise.calibration_tiles(data)
            quantise.export_int8(net, tiles_NHWC, file, metadata, core)
        except Exception as error:  # noqa: BLE001 - the quantiser raises many kinds for backbones
            # that it does not know; the training is done
            reason = " ".join(str(error).split())[:200]
            log.warning("no INT8 model of %s, FP32 is served: %s", net.spec.name, reason)
            return
        probabilities = onnx_session.probabilities(
            file, data.pack.tiles_NHWC[data.split.indices("test")]
        )
        right = result.probabilities.argmax(axis=1) == result.labels
        int8_right = probabilities.argmax(axis=1) == result.labels
        accuracy = float(int8_right.mean())
        difference = float(np.abs(probabilities - result.probabilities).mean())
        run.log_metrics({"int8_accuracy": accuracy, "int8_mean_difference": difference})
        if refusal := int8_refusal(int(right.sum() - int8_right.sum()), len(right)):
            log.warning("%s", refusal)
        else:
            run.log_file(file)


def int8_refusal(lost: int, tiles: int) -> str | None:
    """Return why an INT8 model is not logged, or None if it is accurate enough.

    ``lost`` is how many more of the test ``tiles`` are wrong than in FP32.
    """
    from eurosat.models.quantise import MAX_ACCURACY_LOSS

    accepted = int(MAX_ACCURACY_LOSS * tiles + 1e-6)  # 0.002 * 1500 is 3, not 2.9999999
    if lost <= accepted:
        return None
    return (
        f"no INT8 model: {lost} more of the {tiles:,} test tiles are wrong than in FP32, and at "
        f"most {accepted} ({MAX_ACCURACY_LOSS:.1%}) may be; nothing to do: FP32 is served, which "
        "is slower"
    )


def predictions_table(
    data: PreparedData, labels: "npt.NDArray[np.int64]", probabilities: "npt.NDArray[np.float32]"
) -> "pd.DataFrame":
    """Return one row per test tile: tile, sha256, label, and ``p/Class`` for each class."""
    rows = data.split.indices("test")
    classes = data.pack.classes
    table = data.pack.table.iloc[rows][["path", "sha256"]].rename(columns={"path": "tile"})
    table["label"] = [classes[label] for label in labels]
    for number, name in enumerate(classes):
        table[f"p/{name}"] = probabilities[:, number]
    return table


def describe(config: TrainConfig, data: PreparedData, run: tracking.Run) -> None:
    """Log the configuration and the data's fingerprints at the start of a run."""
    import yaml

    run.log_params(config.as_dict())
    tags = {**data.tags, "data.name": config.data.label, "config.digest": config.digest}
    run.set_tags(tags)
    run.log_text(yaml.safe_dump(config.as_dict(), sort_keys=False), "config.yaml")


def train(
    config: TrainConfig,
    data: PreparedData,
    run: tracking.Run,
    on_epoch: "EpochHook | None" = None,
    slot: CheckpointSlot | None = None,
) -> dict[str, float]:
    """Train, evaluate and log to ``run``; return the test metrics.

    With a ``slot``, a resumed training also continues the log file of the earlier process.
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


def summary(metrics: Mapping[str, float]) -> str:
    """Return one line with the most important test metrics."""
    names = ("accuracy", "macro_f1", "macro_auprc", "nll", "ece", "one_view_accuracy")
    logged = [name for name in names if f"test_{name}" in metrics]
    return "test fold: " + ", ".join(f"{name} {metrics[f'test_{name}']:.4f}" for name in logged)


def main(argv: Sequence[str]) -> int:
    config = compose(cli.overrides(argv, USAGE))
    hardware.warn_if_busy()
    data = prepare(config)
    name = f"{config.recipe} on {config.data.label}, seed {config.seed}"
    with (
        acquire(config, data.fingerprints) as slot,
        tracking.run(
            config.experiment,
            name,
            journal=slot.start_or_resume(),
            resume=slot.journal,
            tags={"kind": "train"},
        ) as run,
    ):
        metrics = train(config, data, run, slot=slot)
    print(summary(metrics))
    print("curves, confusion matrix and hardest tiles: figures/ in the artifacts of the run")
    print(run.summary())
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
