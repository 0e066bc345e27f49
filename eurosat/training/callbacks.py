"""What happens around the training steps: progress, the run's metrics, the moving average."""

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

from eurosat.errors import NonFiniteLoss
from eurosat.runtime.progress import bar
from eurosat.tracking import Run

log = logging.getLogger(__name__)

EMA_EVERY_STEPS = 8
"""The average is memory-bound: at every step it would cost 10 % of a ResNet18 step on 2 cores."""

EpochHook = Callable[[int, Mapping[str, float]], None]
"""Called after each validation with the epoch and its metrics; may raise to stop training."""


class MovingAverage(WeightAveraging):
    """Exponential moving average of weights and batch statistics; validation sees the average.

    The decay warms up as (1 + n) / (10 + n) over the first n updates (as in TensorFlow's), so
    that a short training is not judged on its first steps.
    """

    def __init__(self, decay_per_step: float, device: str) -> None:
        """``device`` is where training computes: Lightning would leave the average on the CPU."""
        self._every = EMA_EVERY_STEPS
        self._decay_per_step = decay_per_step
        super().__init__(device=device, multi_avg_fn=self._average)

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._every = min(EMA_EVERY_STEPS, int(trainer.num_training_batches))

    def state_dict(self) -> dict[str, Any]:
        assert self._average_model is not None
        return super().state_dict() | {"average": self._average_model.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self._average_model is not None
        super().load_state_dict(state_dict)
        self._average_model.load_state_dict(state_dict["average"])

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self._every == 0

    def _average(self, averages: Any, currents: Any, updates: Tensor | int) -> None:
        """Of all tensors of one type at once: each by itself would wait for a GPU each time."""
        if not averages[0].is_floating_point():  # counts of batches
            torch._foreach_copy_(averages, currents)
            return
        warm = (1 + int(updates)) / (10 + int(updates))
        decay = min(self._decay_per_step**self._every, warm)
        torch._foreach_lerp_(averages, currents, 1 - decay)


class FreezeBackbone(lightning.Callback):
    """For some epochs only the head learns: the backbone's weights and statistics stand still."""

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
    """Lightning's metrics into our run. Metrics of a step carry the step, all others the epoch.

    One that is trained again, after its process was lost, keeps the point that it has.
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
        """Nothing: the configuration is logged once, by `eurosat.train`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        epoch = int(metrics.get("epoch", 0))
        of_step = {k: v for k, v in metrics.items() if k.endswith("_step")}
        of_epoch = {k.removesuffix("_epoch"): v for k, v in metrics.items() if k not in of_step}
        of_epoch.pop("epoch", None)
        if of_step:
            self._run.log_metrics(of_step, step or 0, once=True)
        if of_epoch:
            self._run.log_metrics(of_epoch, epoch, once=True)


class GracefulInterrupt(lightning.Callback):
    """While it is entered, Ctrl-C ends training after the batch at hand; a second one, at once.

    An interrupt in the middle of a request to the tracking store would leave that store locked.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._request)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)
        if kind is None:  # asked after the last batch
            self._raise_if_requested()

    def _request(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def _raise_if_requested(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def on_train_batch_end(self, *_: Any) -> None:
        self._raise_if_requested()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._raise_if_requested()


class ProgressLogger(lightning.Callback):
    """A progress bar with images/s and time left, one log line an epoch, and the history."""

    def __init__(self, label: str, on_epoch: EpochHook | None = None) -> None:
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        """Spent on training by the processes before this one."""
        self._label, self._on_epoch = label, on_epoch
        self._bar = bar()
        self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        spent = self.seconds + time.monotonic() - self._started
        return {"history": self.history, "seconds": spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.seconds = list(state_dict["history"]), state_dict["seconds"]

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._bar.start()
        self._task = self._bar.add_task(
            self._label, total=int(trainer.estimated_stepping_batches), note=""
        )
        self._started = self._told = time.monotonic()

    def on_train_epoch_start(self, *_: Any) -> None:
        self._epoch_started, self._epoch_images = time.monotonic(), 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, _module: Any, _out: Any, batch: Any, _index: int
    ) -> None:
        self._epoch_images += len(batch[0])
        now = time.monotonic()
        if now - self._told > 0.2:
            self._told = now
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
        spent = self.seconds + time.monotonic() - self._started
        left = spent / (epoch + 1) * ((trainer.max_epochs or 0) - epoch - 1)
        log.info(
            "%s: epoch %d/%d val_accuracy %.4f val_loss %.4f, %.0f images/s, %.0f s left",
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
    """Holds the weights of the best validated epoch, the later one of equals.

    Stands before the moving average among the callbacks: at the end of a validation the
    averaged weights are still in the module, and go out right after.
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
    def found(self) -> bool:
        return bool(self._weights)

    def restore(self, network: nn.Module) -> None:
        """Put the best weights into ``network``.

        Raises:
            NonFiniteLoss: no validation had a finite loss.
        """
        if not self.found:
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
    """Whether the last validation had a loss: weights that are not finite may guess a class."""
    return math.isfinite(float(trainer.callback_metrics["val_loss"]))


class Profile(lightning.Callback):
    """Traces some early steps: profile/trace.json for chrome://tracing, and a table."""

    WAIT, WARM, ACTIVE = 3, 2, 5
    """Steps: the first ones build caches, and each traced one takes 2 MB."""
    DEAREST = 10

    def __init__(self, run: Run) -> None:
        self._run = run
        self._profiler: torch.profiler.profile | None = None

    def on_train_start(self, *_: Any) -> None:
        steps = torch.profiler.schedule(
            wait=self.WAIT, warmup=self.WARM, active=self.ACTIVE, repeat=1
        )
        self._profiler = torch.profiler.profile(
            schedule=steps, on_trace_ready=self._keep, acc_events=True
        )
        self._profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        if self._profiler:
            self._profiler.step()

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._profiler:
            self._profiler.stop()
            self._profiler = None

    def _keep(self, profiler: torch.profiler.profile) -> None:
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=self.DEAREST)
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            self._run.log_file(Path(folder) / "trace.json", "profile")
        self._run.log_text(str(table), "profile/operators.txt")
        log.info("profiled %d steps: profile/ in the run", self.ACTIVE)
