"""Fit one network to the train fold, in this process or as one of several."""

import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from eurosat import tracking
from eurosat.config import TrainConfig
from eurosat.data.loaders import TileDataModule, band_statistics
from eurosat.data.prepare import PreparedData
from eurosat.errors import NonFiniteLoss
from eurosat.models import network, pretrained
from eurosat.models.compute import Compute, choose_compute
from eurosat.runtime import exit_codes, hardware, logs
from eurosat.runtime.distributed import SINGLE_PROCESS, DistributedContext
from eurosat.training import callbacks, distillation
from eurosat.training.callbacks import EpochHook
from eurosat.training.checkpoints import CheckpointSlot
from eurosat.training.module import LOG_EVERY_STEPS, Classifier
from eurosat.training.resume import CheckpointCallback


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    network: network.Network
    """With the weights of the best epoch."""
    history: list[dict[str, float]]
    """Per epoch: train_loss, val_loss, val_accuracy, images_per_s."""
    seconds: float

    @property
    def best(self) -> dict[str, float]:
        """The epoch of the highest validation accuracy; the later one of equals."""
        return max(reversed(self.history), key=lambda row: row["val_accuracy"])


def fit(
    config: TrainConfig,
    data: PreparedData,
    run: tracking.Run,
    on_epoch: EpochHook | None = None,
    saved: CheckpointSlot | None = None,
    ranks: DistributedContext = SINGLE_PROCESS,
    further: Sequence[lightning.Callback] = (),
) -> FitResult:
    """Train on the train fold, choosing by the val fold alone; logs metrics as they come.

    With ``saved`` the state is kept there after each epoch, and taken up from there. As one of
    several ``ranks`` it trains on its share of every batch; only the first logs and saves.
    ``further`` callbacks watch it. A teacher is named by its run: see
    `eurosat.training.distillation.resolve_teacher`.

    Raises:
        NonFiniteLoss: training diverged.
        ModelError: the network, its weights or its teacher cannot be had.
    """
    logs.quiet_libraries()
    hardware.disable_malloc_trim()
    torch.set_num_threads(
        config.trainer.threads or max(1, hardware.cores() // ranks.local_world_size)
    )
    lightning.seed_everything(config.seed, verbose=False)
    pack, size = data.pack, data.pack.tiles_NHWC.shape[1:3]
    mean, std = band_statistics(pack, data.split.indices("train"))
    net = pretrained.create(
        config.model,
        config.weights,
        classes=pack.classes,
        bands=pack.bands,
        tile_size=(int(size[0]), int(size[1])),
        mean=mean,
        std=std,
    )
    state = saved.load() if saved else None
    compute = choose_compute(net.spec, config.trainer.precision, probe=ranks.world_size == 1)
    if state and state["compute"]["device"] == compute.device:
        compute = Compute(**state["compute"])  # another probe may choose otherwise
    net.to(memory_format=compute.memory_format)  # type: ignore[call-overload]
    run.set_tags(
        {
            "compute.device": compute.device,
            "compute.precision": "bf16" if compute.bf16 else "fp32",
            "compute.channels_last": compute.channels_last,
            "compute.hardware": hardware.describe_hardware(),
        }
    )
    targets = distillation.targets(config, data, compute)
    loaders = TileDataModule(
        pack,
        data.split,
        batch_size=config.optim.batch_size,
        seed=config.seed,
        distributed=ranks,
        soft_targets=targets,
        repeats_per_epoch=config.trainer.repeats_per_epoch,
    )
    watch = callbacks.ProgressLogger(f"train {config.recipe}", on_epoch)
    kept = callbacks.BestWeights()
    extra: list[lightning.Callback] = [kept]  # before the average, which swaps its weights out
    if config.optim.freeze_epochs:
        extra.append(callbacks.FreezeBackbone(config.optim.freeze_epochs))
    if config.optim.ema:
        extra.append(callbacks.MovingAverage(config.optim.ema, compute.device))
    if config.trainer.patience:
        extra.append(EarlyStopping("val_accuracy", mode="max", patience=config.trainer.patience))
    if config.profile and ranks.is_first:
        extra.append(callbacks.Profile(run))
    interrupt = callbacks.GracefulInterrupt()
    resume = [CheckpointCallback(saved if ranks.is_first else None, run, compute, state)]
    trainer = lightning.Trainer(
        accelerator="gpu" if compute.device == "cuda" else "cpu",
        devices=ranks.local_world_size,
        num_nodes=ranks.world_size // ranks.local_world_size,
        strategy=_strategy(config, compute, ranks),
        precision="bf16-mixed" if compute.bf16 else "32-true",
        max_epochs=config.trainer.epochs,
        callbacks=[*extra, watch, interrupt, *further, *(resume if saved else [])],
        logger=callbacks.RunLogger(run) if ranks.is_first else False,
        log_every_n_steps=min(LOG_EVERY_STEPS, len(loaders.train_dataloader())),
        gradient_clip_val=config.optim.clip_norm or None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    axes = targets.shape[1] - len(pack.classes) if targets is not None else 0
    # the network, the probe and perhaps a teacher drew from it; each rank augments in its own way
    lightning.seed_everything(config.seed + ranks.rank, verbose=False)
    module = Classifier(net, config.optim, config.augment, axes, config.distill.features)
    started = time.monotonic()
    with interrupt, net.single_view(), warnings.catch_warnings():
        # Lightning 2.6 calls what torch 2.13 deprecated
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        try:
            trainer.fit(module, datamodule=loaders)
        except NonFiniteLoss:
            if kept.found:
                kept.restore(net)
                _keep_last_good(net, run)
            raise
        except SIGTERMException as stopped:
            raise SystemExit(exit_codes.TERMINATED) from stopped
        except SystemExit as stopped:
            if stopped.code == exit_codes.TERMINATED:
                raise
            raise KeyboardInterrupt from stopped  # what Lightning makes of Ctrl-C
        finally:
            if torch.distributed.is_initialized() and ranks.owns_process_group:
                torch.distributed.destroy_process_group()
    kept.restore(net)
    seconds = watch.seconds + time.monotonic() - started
    fitted = FitResult(network=net.cpu(), history=watch.history, seconds=seconds)
    run.log_metrics({f"best_{key}": value for key, value in fitted.best.items()})
    run.log_metrics({"train_seconds": fitted.seconds, "epochs": len(fitted.history)})
    return fitted


def _keep_last_good(net: network.Network, run: tracking.Run) -> None:
    """Leave the best weights in a run that failed."""
    with tempfile.TemporaryDirectory() as folder:
        network.save(net, Path(folder) / "weights.safetensors")
        run.log_file(Path(folder) / "weights.safetensors", "last_good")


def _strategy(config: TrainConfig, compute: Compute, ranks: DistributedContext) -> Strategy | str:
    if ranks.world_size == 1:
        return "auto"
    return DDPStrategy(
        process_group_backend="nccl" if compute.device == "cuda" else "gloo",
        cluster_environment=TorchElasticEnvironment(),
        find_unused_parameters=config.optim.freeze_epochs > 0,
    )
