"""A killed training goes on: after each epoch it leaves all that the rest of it depends on."""

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


class CheckpointCallback(lightning.Callback):
    """Saves after each epoch all that the rest of a training depends on, and restores it.

    Between two epochs there is little of it; Lightning's own checkpoints restart inside its
    loops' bookkeeping instead, which repeats or skips hooks. An epoch is over when the next one
    starts or training ends: only then has Lightning logged the last of its metrics.
    """

    def __init__(
        self,
        saved: CheckpointSlot | None,
        run: Run,
        compute: Compute,
        state: Mapping[str, Any] | None,
    ) -> None:
        """``saved`` is None for all of several processes but the first, which writes for all."""
        self._saved, self._run, self._compute, self._state = saved, run, compute, state
        self._kept = state["epoch"] if state else 0
        """Epochs in the state that is saved."""

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Optimiser and callbacks are set up, and no hook of training has run."""
        if self._state is None:
            return
        state, loop = self._state, trainer.fit_loop
        module.load_state_dict(state["module"])
        trainer.optimizers[0].load_state_dict(state["optimizer"])
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(state["schedule"])
        for callback in self._stateful(trainer):
            callback.load_state_dict(state["callbacks"][type(callback).__name__])
        epochs: Any = loop.epoch_progress.current
        epochs.processed = epochs.completed = state["epoch"]
        steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        steps.completed = loop.epoch_loop._batches_that_stepped = state["step"]
        if state["stopped"]:  # early, and killed before the test fold was judged
            loop.max_epochs = state["epoch"]
        own = state["random"][trainer.global_rank]
        torch.set_rng_state(own["cpu"])
        if "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"])
        self._state = None

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        self._keep(trainer, module)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._keep(trainer, module)

    def _keep(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.current_epoch == self._kept or not has_finite_loss(trainer):
            return
        self._kept = trainer.current_epoch
        random = _random_states(trainer)
        if self._saved is None:
            return
        self._run.checkpoint()  # what is not trained again is not logged again
        self._saved.save(
            {
                "epoch": self._kept,
                "step": trainer.global_step,
                "stopped": trainer.should_stop,
                "module": module.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
                "callbacks": {type(c).__name__: c.state_dict() for c in self._stateful(trainer)},
                "random": random,
                "compute": dataclasses.asdict(self._compute),
            }
        )

    def _stateful(self, trainer: lightning.Trainer) -> Iterator[lightning.Callback]:
        """The callbacks that remember something; Lightning holds one of a kind."""
        return (c for c in trainer.callbacks if c is not self and c.state_dict())  # type: ignore[attr-defined]


def _random_states(trainer: lightning.Trainer) -> list[dict[str, Tensor]]:
    """Of each rank: every one augments in its own way."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    if trainer.world_size == 1:
        return [own]
    each: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(each, own)
    return each
