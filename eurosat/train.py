"""Train one network and leave everything that judges and serves it in an MLflow run."""

import json
import logging
import signal
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat import cli, logs, receipt, tracking
from eurosat.config import TrainConfig, compose
from eurosat.errors import ModelError, NonFiniteLoss
from eurosat.pack import Pack, open_pack
from eurosat.split import Split, make_split
from eurosat.unfinished import Unfinished, claim

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from eurosat.callbacks import EpochHook
    from eurosat.metrics import Floats, Labels
    from eurosat.network import Network

log = logging.getLogger(__name__)

USAGE = """
usage: python -m eurosat.train [key=value ...]

  data=synthetic|eurosat|folder   recipe=NAME (eurosat/conf/recipe)   seed=0
  weights=none|imagenet|efficientnet-lite|FILE|models:/NAME@ALIAS     trainer.epochs=N
  log_level=info
  and any key of the recipe, such as optim.lr=0.05 model.name=resnet50 data.protocol=80/20
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Data that is packed, split, and validated or knowingly not."""

    pack: Pack
    split: Split
    validation: str
    """'passed', 'failed' or 'missing'."""

    @property
    def fingerprints(self) -> dict[str, str]:
        return {
            "data.fingerprint": self.pack.fingerprint,
            "split.fingerprint": self.split.fingerprint,
        }

    @property
    def tags(self) -> dict[str, str]:
        return self.fingerprints | {"data.validation": self.validation}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    network: "Network"
    """With the weights of the best epoch."""
    history: list[dict[str, float]]
    """Per epoch: train_loss, val_loss, val_accuracy, images_per_s."""
    seconds: float

    @property
    def best(self) -> dict[str, float]:
        """The epoch of the highest validation accuracy; the later one of equals."""
        return max(reversed(self.history), key=lambda row: row["val_accuracy"])


def prepare(config: TrainConfig) -> Prepared:
    """Open or build the pack, ask for its receipt, and make the split.

    Raises:
        DataError: the tiles cannot be used, or were not validated.
    """
    pack = open_pack(config.data)
    validation = receipt.require(pack.fingerprint, config.data)
    split = make_split(pack.table, config.data.protocol, config.data.split_seed)
    log.info(
        "%d tiles, %d classes, %d bands, data %s; %s split %s; %d exact, %d near duplicates kept "
        "together; validation %s",
        len(pack.table), len(pack.classes), pack.bands, pack.fingerprint[:12], split.protocol,
        split.fingerprint[:12], pack.exact, pack.near, validation,
    )  # fmt: skip
    return Prepared(pack=pack, split=split, validation=validation)


def fit(
    config: TrainConfig,
    data: Prepared,
    run: tracking.Run,
    on_epoch: "EpochHook | None" = None,
    saved: Unfinished | None = None,
) -> Fitted:
    """Train on the train fold, choosing by the val fold alone; logs metrics as they come.

    With ``saved`` the state is kept there after each epoch, and taken up from there.

    Raises:
        NonFiniteLoss: training diverged.
        ModelError: the network or its weights cannot be had.
    """
    import lightning
    import torch
    from lightning.pytorch.callbacks import EarlyStopping
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from eurosat import callbacks, machine, weights
    from eurosat.batches import TileData, band_statistics
    from eurosat.module import LOG_EVERY_STEPS, Classifier

    logs.quiet_libraries()
    torch.set_num_threads(config.trainer.threads or machine.cores())
    lightning.seed_everything(config.seed, verbose=False)
    pack, size = data.pack, data.pack.tiles_NHWC.shape[1:3]
    mean, std = band_statistics(pack, data.split.indices("train"))
    net = weights.create(
        config.model, config.weights, classes=pack.classes, bands=pack.bands,
        tile_size=(int(size[0]), int(size[1])), mean=mean, std=std,
    )  # fmt: skip
    state = saved.load() if saved else None
    compute = machine.choose_compute(net.spec, config.trainer.precision)
    if state and state["compute"]["device"] == compute.device:
        compute = machine.Compute(**state["compute"])  # another probe may choose otherwise
    net.to(memory_format=compute.memory_format)  # type: ignore[call-overload]
    run.set_tags(
        {
            "compute.device": compute.device,
            "compute.precision": "bf16" if compute.bf16 else "fp32",
            "compute.channels_last": compute.channels_last,
            "compute.hardware": machine.hardware(),
        }
    )
    loaders = TileData(pack, data.split, batch_size=config.optim.batch_size, seed=config.seed)
    watch = callbacks.Watch(f"train {config.recipe}", on_epoch)
    kept = callbacks.KeepBest()
    extra: list[lightning.Callback] = [kept]  # before the average, which swaps its weights out
    if config.trainer.small_size:
        epochs = round(config.trainer.small_share * config.trainer.epochs)
        extra.append(callbacks.SmallFirst(config.trainer.small_size, epochs))
    if config.optim.freeze_epochs:
        extra.append(callbacks.HeadFirst(config.optim.freeze_epochs))
    if config.optim.ema:
        extra.append(callbacks.MovingAverage(config.optim.ema))
    if config.trainer.patience:
        extra.append(EarlyStopping("val_accuracy", mode="max", patience=config.trainer.patience))
    last = [callbacks.Resume(saved, run, compute, state)] if saved else []
    trainer = lightning.Trainer(
        accelerator="gpu" if compute.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if compute.bf16 else "32-true",
        max_epochs=config.trainer.epochs,
        callbacks=[*extra, watch, *last],
        logger=callbacks.RunLogger(run),
        log_every_n_steps=min(LOG_EVERY_STEPS, len(loaders.train_dataloader())),
        gradient_clip_val=config.optim.clip_norm or None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(net, config.optim, config.augment)
    lightning.seed_everything(config.seed, verbose=False)  # the network and the probe drew from it
    started = time.monotonic()
    with warnings.catch_warnings():  # Lightning 2.6 calls what torch 2.13 deprecated
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        try:
            trainer.fit(module, datamodule=loaders)
        except NonFiniteLoss:
            if watch.history:
                kept.restore(net)
                keep_last_good(net, run)
            raise
        except SIGTERMException as stopped:
            raise SystemExit(cli.TERMINATED) from stopped
        except SystemExit as stopped:
            if stopped.code == cli.TERMINATED:
                raise
            # what Lightning makes of Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from stopped
    kept.restore(net)
    seconds = watch.seconds + time.monotonic() - started
    fitted = Fitted(network=net.cpu(), history=watch.history, seconds=seconds)
    run.log_metrics({f"best_{key}": value for key, value in fitted.best.items()})
    run.log_metrics({"train_seconds": fitted.seconds, "epochs": len(fitted.history)})
    return fitted


def keep_last_good(network: "Network", run: tracking.Run) -> None:
    """Leave the best weights in a run that failed."""
    from eurosat.network import save

    with tempfile.TemporaryDirectory() as folder:
        save(network, Path(folder) / "weights.safetensors")
        run.log_file(Path(folder) / "weights.safetensors", "last_good")


def conclude(
    config: TrainConfig, data: Prepared, fitted: Fitted, run: tracking.Run
) -> dict[str, float]:
    """Calibrate on the val fold, judge on the test fold, once, and leave the files in the run."""
    import numpy as np

    from eurosat import calibration, export, figures, metrics, module, network
    from eurosat.batches import TileData

    net, classes = fitted.network.float(), data.pack.classes
    loaders = TileData(data.pack, data.split, batch_size=2, seed=0)
    calibrated = calibration.fit(*module.logits(net, loaders.val_dataloader()))
    net.temperature.fill_(calibrated.temperature)
    log.info("judging on the %d tiles of the test fold", len(data.split.indices("test")))
    logits, labels = module.logits(net, loaders.test_dataloader())
    probabilities = calibration.softmax(logits / calibrated.temperature)
    raw = metrics.evaluate(labels, calibration.softmax(logits), classes)
    merits = metrics.evaluate(labels, probabilities, classes)
    merits |= calibration.judge(calibrated, logits, labels)
    merits |= {f"uncalibrated_{name}": raw[name] for name in ("ece", "nll")}
    if config.trainer.tta:
        views = module.averaged(net, loaders.test_dataloader())
        merits["tta_accuracy"] = float((views.argmax(axis=1) == labels).mean())
    tested = {f"test_{name}": value for name, value in merits.items()}
    run.log_metrics(tested)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        drawn = folder / "figures"
        drawn.mkdir()
        counts = metrics.confusion(labels, probabilities.argmax(axis=1), len(classes))
        title = f"{config.recipe}, test fold: accuracy {tested['test_accuracy']:.4f}"
        figures.confusion_matrix(counts, classes, title, drawn / "confusion.png")
        figures.training_curves(fitted.history, config.recipe, drawn / "curves.png")
        figures.reliability(labels, probabilities, title, drawn / "reliability.png")
        _draw_gallery(data, net, labels, probabilities, drawn / "explained.png")
        predictions(data, labels, probabilities.astype(np.float32)).to_parquet(
            folder / "predictions.parquet", index=False
        )
        (folder / "calibration.json").write_text(json.dumps(calibrated.as_dict(), indent=1))
        network.save(net, folder / "weights.safetensors")
        run.log_folder(folder)  # before the export: a backbone may refuse it
        lineage = {**data.tags, "config.digest": config.digest, "run_id": run.run_id}
        log.info("exporting to ONNX")
        parity = export.export_onnx(net, folder / "model.onnx", lineage)
        run.log_metrics({"onnx_difference": parity})
        run.log_file(folder / "model.onnx")
    return tested


def _draw_gallery(
    data: Prepared, network: "Network", labels: "Labels", probabilities: "Floats", file: Path
) -> None:
    """The hardest and the surest test tiles, and where the network looked."""
    from eurosat import explain

    rows = data.split.indices("test")
    tiles_NHWC, names = data.pack.tiles_NHWC[rows], list(data.pack.table["path"].iloc[rows])
    try:
        explained = explain.gallery(network, tiles_NHWC, names, labels, probabilities)
    except ModelError as error:
        log.warning("no gallery: %s", error)
        return
    explain.draw(explained, "Test fold: the hardest tiles, then the surest", file)


def predictions(
    data: Prepared, labels: "npt.NDArray[np.int64]", probabilities: "npt.NDArray[np.float32]"
) -> "pd.DataFrame":
    """One row a test tile: tile, sha256, label, and ``p/Class`` for each class."""
    rows = data.split.indices("test")
    classes = data.pack.classes
    table = data.pack.table.iloc[rows][["path", "sha256"]].rename(columns={"path": "tile"})
    table["label"] = [classes[label] for label in labels]
    for number, name in enumerate(classes):
        table[f"p/{name}"] = probabilities[:, number]
    return table


def describe(config: TrainConfig, data: Prepared, run: tracking.Run) -> None:
    """Log what the run is about to compute: its configuration and its data's fingerprints."""
    import yaml

    run.log_params(config.as_dict())
    run.set_tags({**data.tags, "config.digest": config.digest})
    run.log_text(yaml.safe_dump(config.as_dict(), sort_keys=False), "config.yaml")


def split_csv(data: Prepared) -> str:
    """One line a tile: tile, sha256, class, fold."""
    table = data.pack.table[["path", "sha256", "class"]].rename(columns={"path": "tile"})
    return table.assign(fold=data.split.folds).to_csv(index=False)


def train(
    config: TrainConfig,
    data: Prepared,
    run: tracking.Run,
    on_epoch: "EpochHook | None" = None,
    saved: Unfinished | None = None,
) -> dict[str, float]:
    """Fit and conclude in ``run``; returns the test metrics."""
    with (
        tempfile.TemporaryDirectory() as folder,
        logs.copied_to(Path(folder) / "train.log") as file,
    ):
        try:
            describe(config, data, run)
            run.log_text(split_csv(data), "split.csv")
            return conclude(config, data, fit(config, data, run, on_epoch, saved), run)
        finally:
            run.log_file(file, "logs")


def summary(tested: dict[str, float]) -> str:
    names = ("accuracy", "macro_f1", "macro_auprc", "nll", "ece", "tta_accuracy")
    told: list[Any] = [
        f"{name} {tested[f'test_{name}']:.4f}" for name in names if f"test_{name}" in tested
    ]
    return "test fold: " + ", ".join(told)


def main(argv: Sequence[str]) -> int:
    config = compose(cli.overrides(argv, USAGE))
    data = prepare(config)
    name = f"{config.recipe} seed {config.seed}"
    with (
        claim(config, data.fingerprints) as saved,
        tracking.run(config.experiment, name, resume=saved.run_id, tags={"kind": "train"}) as run,
    ):
        saved.begin(run.run_id)
        tested = train(config, data, run, saved=saved)
    print(summary(tested))
    print(f"run {run.run_id}")
    return cli.OK


if __name__ == "__main__":
    cli.finish(main)
