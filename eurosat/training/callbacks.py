"""Lightning callbacks: moving average, freezing, logging, progress, best weights and profile."""

import contextlib
import logging
import math
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from eurosat.errors import NonFiniteLoss
from eurosat.runtime.progress import bar
from eurosat.tracking import Run

log = logging.getLogger(__name__)

EMA_EVERY_STEPS = 8
"""Optimiser steps between two updates of the moving average. An update is limited by memory: at
every step it would take 10 % of a ResNet18 step on 2 cores."""

BAR_INTERVAL_S = 0.2

EpochHook = Callable[[int, Mapping[str, float]], None]
"""Called after each validation with the epoch (from 0) and its metrics; may raise to stop."""


class MovingAverage(WeightAveraging):
    """Exponential moving average of weights and batch statistics, used for validation.

    After n updates the decay is at most (1 + n) / (10 + n), as in TensorFlow's
    ExponentialMovingAverage: the first steps do not dominate the average of a short training.
    """

    def __init__(self, decay_per_step: float, device: str) -> None:
        """``device`` is the training device; Lightning would leave the average on the CPU."""
        self._update_every = EMA_EVERY_STEPS
        self._decay_per_step = decay_per_step
        super().__init__(device=device, multi_avg_fn=self._average)

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._update_every = min(EMA_EVERY_STEPS, int(trainer.num_training_batches))

    def state_dict(self) -> dict[str, Any]:
        assert self._average_model is not None
        return super().state_dict() | {"average": self._average_model.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self._average_model is not None
        super().load_state_dict(state_dict)
        self._average_model.load_state_dict(state_dict["average"])

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self._update_every == 0

    def _average(self, averages: Any, currents: Any, updates: Tensor | int) -> None:
        """Update all tensors of one type; on a GPU, one call for all of them."""
        if not averages[0].is_floating_point():  # numbers of batches
            for average, current in zip(averages, currents, strict=True):
                average.copy_(current)
            return
        warmup = (1 + int(updates)) / (10 + int(updates))
        decay = min(self._decay_per_step**self._update_every, warmup)
        update: Any = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update(averages, currents, updates)


class FreezeBackbone(lightning.Callback):
    """Trains the head alone for the first epochs; the backbone and its statistics stay fixed."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        frozen = trainer.current_epoch < self._epochs
        backbone: Any = module.get_submodule("network.backbone")
        backbone.requires_grad_(not frozen)
        backbone.train(not frozen)
        backbone.get_classifier().requires_grad_(True).train()


class RunLogger(Logger):
    """Logs Lightning's metrics to the run: ``*_step`` by optimiser step, others by epoch.

    An epoch that is trained again after its process was lost keeps the points that it has.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    @property
    def name(self) -> str:
        return "run"

    @property
    def version(self) -> str:
        return self._run.run_id

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: `eurosat.train` logs the configuration."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        epoch = int(metrics.get("epoch", 0))
        by_step = {k: v for k, v in metrics.items() if k.endswith("_step")}
        by_epoch = {k.removesuffix("_epoch"): v for k, v in metrics.items() if k not in by_step}
        by_epoch.pop("epoch", None)
        if by_step:
            self._run.log_metrics(by_step, step or 0, once=True)
        if by_epoch:
            self._run.log_metrics(by_epoch, epoch, once=True)


class GracefulInterrupt(lightning.Callback):
    """Context manager: Ctrl-C ends training after the current batch, a second one immediately.

    An interrupt during a request to the tracking store would leave that store locked.
    """

    def __init__(self) -> None:
        self._requested = False

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._request)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._previous_handler)
        if kind is None:  # requested after the last batch
            self._raise_if_requested()

    def _request(self, *_: object) -> None:
        self._raise_if_requested()
        self._requested = True

    def _raise_if_requested(self) -> None:
        if self._requested:
            raise KeyboardInterrupt

    def on_train_batch_end(self, *_: Any) -> None:
        self._raise_if_requested()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._raise_if_requested()


class ProgressLogger(lightning.Callback):
    """Shows a progress bar, logs one line per epoch, and keeps the history of metrics."""

    def __init__(self, label: str, on_epoch: EpochHook | None = None) -> None:
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        """Training time of earlier processes, before this one resumed."""
        self._label, self._on_epoch = label, on_epoch
        self._bar = bar()
        self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "seconds": self._elapsed_s()}

    def _elapsed_s(self) -> float:
        return self.seconds + time.monotonic() - self._started

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.seconds = list(state_dict["history"]), state_dict["seconds"]

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._bar.start()
        self._task = self._bar.add_task(
            self._label, total=int(trainer.estimated_stepping_batches), note=""
        )
        self._started = self._last_update = time.monotonic()

    def on_train_epoch_start(self, *_: Any) -> None:
        self._epoch_started, self._epoch_images = time.monotonic(), 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, _module: Any, _out: Any, batch: Any, _index: int
    ) -> None:
        self._epoch_images += len(batch[0])
        now = time.monotonic()
        if now - self._last_update > BAR_INTERVAL_S:
            self._last_update = now
            images = self._epoch_images * trainer.world_size
            rate = images / max(now - self._epoch_started, 1e-9)
            self._bar.update(
                self._task,
                completed=trainer.global_step,
                note=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} {rate:,.0f} images/s",
            )

    def on_validation_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._train_s = time.monotonic() - self._epoch_started

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        epoch = trainer.current_epoch
        row = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        images = self._epoch_images * trainer.world_size
        row["images_per_s"] = images / max(self._train_s, 1e-9)
        self.history.append(row)
        remaining_s = self._elapsed_s() / (epoch + 1) * ((trainer.max_epochs or 0) - epoch - 1)
        left = f", {remaining_s:.0f} s left" if epoch + 1 < (trainer.max_epochs or 0) else ""
        log.info(
            "%s: epoch %d/%d val_accuracy %.4f val_loss %.4f, %.0f images/s%s",
            self._label,
            epoch + 1,
            trainer.max_epochs,
            row["val_accuracy"],
            row["val_loss"],
            row["images_per_s"],
            left,
        )
        if self._on_epoch:
            self._on_epoch(epoch, row)

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self.history and "train_loss_epoch" in trainer.callback_metrics:
            self.history[-1]["train_loss"] = float(trainer.callback_metrics["train_loss_epoch"])

    def on_train_end(self, *_: Any) -> None:
        self._bar.stop()

    def on_exception(self, *_: Any) -> None:
        self._bar.stop()


class BestWeights(lightning.Callback):
    """Keeps the weights of the epoch with the highest validation accuracy, the later one of equals.

    Must come before `MovingAverage` in the list of callbacks: at the end of a validation the
    module still holds the averaged weights, and `MovingAverage` then swaps them out.
    """

    def __init__(self) -> None:
        self._accuracy = -1.0
        self._weights: dict[str, Tensor] = {}

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        if accuracy >= self._accuracy and has_finite_loss(trainer):
            self._accuracy = accuracy
            state = module.get_submodule("network").state_dict()
            self._weights = {name: value.detach().clone() for name, value in state.items()}

    @property
    def has_weights(self) -> bool:
        return bool(self._weights)

    def restore(self, network: nn.Module) -> None:
        """Load the best weights into ``network``.

        Raises:
            NonFiniteLoss: no validation had a finite loss.
        """
        if not self.has_weights:
            raise NonFiniteLoss(
                "no epoch ended with a finite validation loss: lower optim.lr, or set "
                "optim.clip_norm=1"
            )
        network.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self._accuracy, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._accuracy, self._weights = state_dict["accuracy"], state_dict["weights"]


def has_finite_loss(trainer: lightning.Trainer) -> bool:
    """Return whether the last validation loss is finite; accuracy alone would hide NaN weights."""
    return math.isfinite(float(trainer.callback_metrics["val_loss"]))


class ProfileCallback(lightning.Callback):
    """Profiles a few early steps and logs ``profile/trace.json`` and ``profile/operators.txt``.

    Lightning's PyTorchProfiler also counts validation steps, and loses its trace where a validation
    starts before all steps are recorded, as in short epochs.
    """

    WAIT, WARMUP, ACTIVE = 3, 2, 5
    """Steps: the first ones build caches, and each recorded one takes 2 MB."""
    TOP_OPERATORS = 10

    def __init__(self, run: Run) -> None:
        schedule = torch.profiler.schedule(
            wait=self.WAIT, warmup=self.WARMUP, active=self.ACTIVE, repeat=1
        )
        self._run = run
        self._profiler = torch.profiler.profile(
            schedule=schedule, on_trace_ready=self._log_trace, acc_events=True
        )
        self._running = contextlib.ExitStack()  # may be closed twice, unlike the profiler

    def on_train_start(self, *_: Any) -> None:
        self._running.enter_context(self._profiler)

    def on_train_batch_end(self, *_: Any) -> None:
        self._profiler.step()

    def on_train_end(self, *_: Any) -> None:
        self._running.close()

    def on_exception(self, *_: Any) -> None:
        self._running.close()

    def _log_trace(self, profiler: torch.profiler.profile) -> None:
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=self.TOP_OPERATORS)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            self._run.log_file(trace, "profile")
        self._run.log_text(str(table), "profile/operators.txt")
        log.info("profiled %d steps: see profile/ in the run", self.ACTIVE)
