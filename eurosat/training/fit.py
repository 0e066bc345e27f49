"""Train one network on the train fold, in this process or as one of several."""

import hashlib
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from eurosat import tracking
from eurosat.config import TrainConfig
from eurosat.data.loaders import SoftTargets, TileDataModule, band_statistics
from eurosat.data.prepare import PreparedData
from eurosat.errors import NonFiniteLoss
from eurosat.models import network, pretrained
from eurosat.models.compute import Compute, choose_compute, choose_once
from eurosat.runtime import exit_codes, hardware, logs
from eurosat.runtime.distributed import SINGLE_PROCESS, DistributedContext
from eurosat.training import callbacks, distillation
from eurosat.training.callbacks import EpochHook
from eurosat.training.checkpoints import CheckpointSlot
from eurosat.training.module import LOG_EVERY_STEPS, Classifier
from eurosat.training.resume import CheckpointCallback

COMPUTE_FOLDER = "compute"
"""Folder in the cache with the mode that the trainings of each study share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    network: network.Network
    """With the weights of the best epoch."""
    history: list[dict[str, float]]
    """Metrics of each epoch: train_loss, val_loss, val_accuracy, val_macro_f1, images_per_s."""
    seconds: float
    """Training time, that of earlier processes included."""

    @property
    def best(self) -> dict[str, float]:
        """Metrics of the epoch with the highest validation accuracy; the later one of equals."""
        return max(reversed(self.history), key=lambda row: row["val_accuracy"])


def fit(
    config: TrainConfig,
    data: PreparedData,
    run: tracking.Run,
    on_epoch: EpochHook | None = None,
    slot: CheckpointSlot | None = None,
    ranks: DistributedContext = SINGLE_PROCESS,
    extra_callbacks: Sequence[lightning.Callback] = (),
) -> FitResult:
    """Train on the train fold, select the epoch on the val fold, and log metrics to ``run``.

    With a ``slot`` the state is saved there after each epoch and resumed from there. As one of
    several ``ranks`` it trains on its share of every batch; only the first rank logs and saves.
    ``config`` must name the teacher by its run (`eurosat.training.distillation.resolve_teacher`).

    Raises:
        NonFiniteLoss: training diverged.
        ModelError: the network, its weights or its teacher cannot be loaded.
    """
    logs.quiet_libraries()
    hardware.disable_malloc_trim()
    threads = config.trainer.threads or max(1, hardware.cores() // ranks.local_world_size)
    torch.set_num_threads(threads)
    lightning.seed_everything(config.seed, verbose=False)
    net = _create_network(config, data)
    state = slot.load() if slot else None
    compute = _resume_or_choose_compute(config, net, state, ranks, run.tag("study"))
    net.to(memory_format=compute.memory_format)  # type: ignore[call-overload]
    _tag_compute(run, compute)
    targets = distillation.targets(config, data, compute)
    loaders = _create_loaders(config, data, ranks, targets)
    best_weights, interrupt = callbacks.BestWeights(), callbacks.GracefulInterrupt()
    progress = callbacks.ProgressLogger(_label(config, run), on_epoch)
    configured = _configured_callbacks(config, compute, run, ranks)
    # best_weights comes before the moving average, which swaps its weights out
    in_order = [best_weights, *configured, progress, interrupt, *extra_callbacks]
    if slot:
        own_slot = slot if ranks.is_first else None
        in_order.append(CheckpointCallback(own_slot, run, compute, state))
    steps_per_epoch = len(loaders.train_dataloader())
    trainer = _create_trainer(config, compute, run, ranks, steps_per_epoch, in_order)
    teacher_axes = targets.shape[1] - len(data.pack.classes) if targets is not None else 0
    # Seeded again: the network, the probe and the teacher have drawn, and each rank augments in
    # its own way.
    lightning.seed_everything(config.seed + ranks.rank, verbose=False)
    module = Classifier(net, config.optim, config.augment, teacher_axes, config.distill.features)
    started = time.monotonic()
    with interrupt, net.single_view(), _last_good_logged(best_weights, net, run):
        _run_trainer(trainer, module, loaders, ranks)
    best_weights.restore(net)
    seconds = progress.seconds + time.monotonic() - started
    fitted = FitResult(network=net.cpu(), history=progress.history, seconds=seconds)
    run.log_metrics({f"best_{key}": value for key, value in fitted.best.items()})
    run.log_metrics({"train_seconds": fitted.seconds, "epochs": len(fitted.history)})
    return fitted


def _label(config: TrainConfig, run: tracking.Run) -> str:
    """Return what log lines call this training: a trial of a sweep is named by its number."""
    if run.tag("kind") == "trial":
        return f"trial {run.tag('trial.number')}"
    return f"train {config.recipe}"


def _create_network(config: TrainConfig, data: PreparedData) -> network.Network:
    height, width = data.pack.tiles_NHWC.shape[1:3]
    mean, std = band_statistics(data.pack, data.split.indices("train"))
    return pretrained.create(
        config.model,
        config.weights,
        classes=data.pack.classes,
        bands=data.pack.bands,
        tile_size=(int(height), int(width)),
        mean=mean,
        std=std,
    )


def _create_loaders(
    config: TrainConfig,
    data: PreparedData,
    ranks: DistributedContext,
    targets: SoftTargets | None,
) -> TileDataModule:
    return TileDataModule(
        data.pack,
        data.split,
        batch_size=config.optim.batch_size,
        seed=config.seed,
        distributed=ranks,
        soft_targets=targets,
        repeats_per_epoch=config.trainer.repeats_per_epoch,
    )


def _resume_or_choose_compute(
    config: TrainConfig,
    net: network.Network,
    state: Mapping[str, Any] | None,
    ranks: DistributedContext,
    study: str | None,
) -> Compute:
    """Return the mode of the saved state, since a second probe may choose another one.

    For the same reason all trainings of a ``study`` on this machine share one probe.
    """
    precision, probe = config.trainer.precision, ranks.world_size == 1
    if study and not torch.cuda.is_available():
        name = hashlib.sha256(study.encode()).hexdigest()[:16]
        file = config.data.cache_dir / COMPUTE_FOLDER / f"{name}.json"
        compute = choose_once(net.spec, precision, file, probe=probe)
    else:
        compute = choose_compute(net.spec, precision, probe=probe)
    if state and state["compute"]["device"] == compute.device:
        return Compute(**state["compute"])
    return compute


def _tag_compute(run: tracking.Run, compute: Compute) -> None:
    run.set_tags(
        {
            "compute.device": compute.device,
            "compute.precision": "bf16" if compute.bf16 else "fp32",
            "compute.channels_last": compute.channels_last,
            "compute.hardware": hardware.describe_hardware(),
        }
    )


def _configured_callbacks(
    config: TrainConfig, compute: Compute, run: tracking.Run, ranks: DistributedContext
) -> list[lightning.Callback]:
    """Return the callbacks that the configuration switches on."""
    enabled: list[lightning.Callback] = []
    if config.optim.freeze_epochs:
        enabled.append(callbacks.FreezeBackbone(config.optim.freeze_epochs))
    if config.optim.ema:
        enabled.append(callbacks.MovingAverage(config.optim.ema, compute.device))
    if config.trainer.patience:
        enabled.append(EarlyStopping("val_accuracy", mode="max", patience=config.trainer.patience))
    if config.profile and ranks.is_first:
        enabled.append(callbacks.ProfileCallback(run))
    return enabled


def _create_trainer(
    config: TrainConfig,
    compute: Compute,
    run: tracking.Run,
    ranks: DistributedContext,
    steps_per_epoch: int,
    trainer_callbacks: list[lightning.Callback],
) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="gpu" if compute.device == "cuda" else "cpu",
        devices=ranks.local_world_size,
        num_nodes=ranks.world_size // ranks.local_world_size,
        strategy=_strategy(config, compute, ranks),
        precision="bf16-mixed" if compute.bf16 else "32-true",
        max_epochs=config.trainer.epochs,
        callbacks=trainer_callbacks,
        logger=callbacks.RunLogger(run) if ranks.is_first else False,
        log_every_n_steps=min(LOG_EVERY_STEPS, steps_per_epoch),
        gradient_clip_val=config.optim.clip_norm or None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _strategy(config: TrainConfig, compute: Compute, ranks: DistributedContext) -> Strategy | str:
    if ranks.world_size == 1:
        return "auto"
    return DDPStrategy(
        process_group_backend="nccl" if compute.device == "cuda" else "gloo",
        cluster_environment=TorchElasticEnvironment(),
        find_unused_parameters=config.optim.freeze_epochs > 0,
    )


def _run_trainer(
    trainer: lightning.Trainer,
    module: Classifier,
    loaders: TileDataModule,
    ranks: DistributedContext,
) -> None:
    """Train, and turn Lightning's reactions to signals into those of this project.

    Raises:
        SystemExit: with `exit_codes.TERMINATED`, after SIGTERM.
        KeyboardInterrupt: after Ctrl-C, which Lightning turns into another SystemExit.
    """
    with warnings.catch_warnings():
        # Lightning 2.6 calls what torch 2.13 deprecated
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        try:
            trainer.fit(module, datamodule=loaders)
        except SIGTERMException as error:
            raise SystemExit(exit_codes.TERMINATED) from error
        except SystemExit as error:
            if error.code == exit_codes.TERMINATED:
                raise
            raise KeyboardInterrupt from error
        finally:
            if torch.distributed.is_initialized() and ranks.owns_process_group:
                torch.distributed.destroy_process_group()


@contextmanager
def _last_good_logged(
    best_weights: callbacks.BestWeights, net: network.Network, run: tracking.Run
) -> Iterator[None]:
    """Log the best weights so far to ``last_good/`` if training diverges."""
    try:
        yield
    except NonFiniteLoss:
        if best_weights.has_weights:
            best_weights.restore(net)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "weights.safetensors"
                network.save(net, file)
                run.log_file(file, "last_good")
        raise
