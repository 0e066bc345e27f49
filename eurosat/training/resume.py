"""A Lightning callback that saves a training after each epoch and restores a killed one."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor

from eurosat.models.compute import Compute
from eurosat.tracking import Run
from eurosat.training.callbacks import has_finite_loss
from eurosat.training.checkpoints import CheckpointSlot

EARLIER_CALLBACK_NAMES = {"Watch": "ProgressLogger", "KeepBest": "BestWeights"}
"""Callbacks whose state was saved under an earlier class name."""


class CheckpointCallback(lightning.Callback):
    """Saves after each epoch everything that the rest of a training depends on.

    Lightning's own checkpoints also store the bookkeeping of its loops, and resuming from them
    repeats or skips hooks. Between two epochs little state is needed, so it is saved there: when
    the next epoch starts or training ends, after Lightning has logged the epoch's last metrics.
    """

    def __init__(
        self,
        slot: CheckpointSlot | None,
        run: Run,
        compute: Compute,
        state: Mapping[str, Any] | None,
    ) -> None:
        """``slot`` is None on every rank but the first, which writes for all.

        ``state`` is what `CheckpointSlot.load` returned; None starts from the beginning.
        """
        self._slot, self._run, self._compute = slot, run, compute
        self._state = state and with_current_names(state)
        self._saved_epoch = state["epoch"] if state else 0
        """Completed epochs in the state that was saved last."""

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Restore the state: optimiser and callbacks exist now, and no training hook has run."""
        if self._state is None:
            return
        state, loop = self._state, trainer.fit_loop
        module.load_state_dict(state["module"])
        trainer.optimizers[0].load_state_dict(state["optimizer"])
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(state["schedule"])
        for callback in self._stateful_callbacks(trainer):
            callback.load_state_dict(state["callbacks"][type(callback).__name__])
        epochs: Any = loop.epoch_progress.current
        epochs.processed = epochs.completed = state["epoch"]
        steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        steps.completed = state["step"]
        # the step that Lightning hands to the logger
        loop.epoch_loop.on_load_checkpoint({"_batches_that_stepped": state["step"]})
        if state["stopped"]:  # stopped early, then killed before the evaluation
            loop.max_epochs = state["epoch"]
        random = state["random"][trainer.global_rank]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
        self._state = None

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        self._save(trainer, module)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._save(trainer, module)

    def _save(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.current_epoch == self._saved_epoch or not has_finite_loss(trainer):
            return
        self._saved_epoch = trainer.current_epoch
        random = _random_states(trainer)
        if self._slot is None:
            return
        self._run.checkpoint()  # metrics of completed epochs are not logged a second time
        callbacks = {type(c).__name__: c.state_dict() for c in self._stateful_callbacks(trainer)}
        self._slot.save(
            {
                "epoch": self._saved_epoch,
                "step": trainer.global_step,
                "stopped": trainer.should_stop,
                "module": module.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
                "callbacks": callbacks,
                "random": random,
                "compute": dataclasses.asdict(self._compute),
            }
        )

    def _stateful_callbacks(self, trainer: lightning.Trainer) -> Iterator[lightning.Callback]:
        """Yield the callbacks that have state; Lightning allows one of each class."""
        return (c for c in trainer.callbacks if c is not self and c.state_dict())  # type: ignore[attr-defined]


def with_current_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` with the names that this version uses, also if an earlier one saved it."""

    def rename(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name.replace("retold.", "feature_projection."): v for name, v in tensors.items()}

    callbacks = {EARLIER_CALLBACK_NAMES.get(k, k): v for k, v in state["callbacks"].items()}
    if average := callbacks.get("MovingAverage"):
        callbacks["MovingAverage"] = average | {"average": rename(average["average"])}
    return {**state, "module": rename(state["module"]), "callbacks": callbacks}


def _random_states(trainer: lightning.Trainer) -> list[dict[str, Tensor]]:
    """Return the random states of all ranks: each augments with its own."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    if trainer.world_size == 1:
        return [own]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, own)
    return states
