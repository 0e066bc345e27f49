"""The Lightning module: loss, optimiser, schedule, and what is logged."""

import math
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eurosat.config import AugmentConfig, OptimConfig
from eurosat.errors import NonFiniteLoss
from eurosat.models import cpu_convolutions
from eurosat.models.network import Network
from eurosat.training.augment import augment
from eurosat.training.optimizers import make_optimizer, one_cycle

LOG_EVERY_STEPS = 10


class Classifier(lightning.LightningModule):
    """Trains a `Network` on batches of `eurosat.data.loaders`.

    Targets that are wider than the classes hold a teacher's features after them: what the head is
    given must tell those too, by one linear layer, at a weight of ``features`` in the loss.
    """

    def __init__(
        self,
        network: Network,
        optim: OptimConfig,
        augmentation: AugmentConfig,
        axes: int = 0,
        features: float = 0.0,
    ) -> None:
        """``axes`` is how many features of a teacher the targets hold."""
        super().__init__()
        self.network = network
        self._optim, self._augmentation, self._features = optim, augmentation, features
        self.retold = nn.Linear(network.head_width, axes) if axes else None

    def on_train_epoch_start(self) -> None:
        batches: Any = self.trainer.train_dataloader
        batches.epoch = self.current_epoch

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        tiles_NCHW, labels_or_targets = batch
        targets, classes = labels_or_targets, len(self.network.spec.classes)
        if labels_or_targets.ndim == 1:
            targets = functional.one_hot(labels_or_targets, classes).float()
        tiles_NCHW, targets = augment(tiles_NCHW, targets, self._augmentation)
        targets_NK, features_ND = targets[:, :classes], targets[:, classes:]
        with cpu_convolutions.fast():
            if self.retold is None:
                logits = self.network(tiles_NCHW)
            else:
                seen_NF, logits = self.network.forward_with_features(tiles_NCHW)
                retold_ND = self.retold(seen_NF)
        loss = functional.cross_entropy(
            logits.float(), targets_NK, label_smoothing=self._optim.label_smoothing
        )
        losses = {"train_loss": loss.detach()}
        if self.retold is not None:
            of_features = functional.mse_loss(retold_ND.float(), features_ND)
            losses["train_features_loss"] = of_features.detach()
            loss = loss + self._features * of_features
        if self.global_rank == 0:  # the others learn it next step
            self._check(loss.detach())
        self.log_dict(
            losses,
            on_step=True,
            on_epoch=True,
            batch_size=len(targets_NK),
            sync_dist=self.trainer.world_size > 1,
        )
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the norm of all; Lightning's own refuses fused optimisers where it mixes precision."""
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def _check(self, loss: Tensor) -> None:
        """Stop at a loss that is not finite. Asking a GPU means waiting for it: now and then."""
        if loss.is_cuda and self.global_step % LOG_EVERY_STEPS:
            return
        if not math.isfinite(value := float(loss)):
            raise NonFiniteLoss(
                f"the loss is {value} at step {self.global_step} with optim.lr={self._optim.lr:g}: "
                "lower it, or set optim.clip_norm=1"
            )

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        tiles_NCHW, labels = batch
        with cpu_convolutions.fast():
            logits = self.network(tiles_NCHW).float()
        right = (logits.argmax(dim=1) == labels).float().mean()
        loss = functional.cross_entropy(logits, labels)
        pairs = labels * self._confusion.shape[0] + logits.argmax(dim=1)
        self._confusion += torch.bincount(pairs, minlength=self._confusion.numel()).view_as(
            self._confusion
        )
        merits = {"val_loss": loss, "val_accuracy": right}
        self.log_dict(merits, batch_size=len(labels), sync_dist=self.trainer.world_size > 1)

    def on_validation_epoch_start(self) -> None:
        classes = len(self.network.spec.classes)
        self._confusion = torch.zeros(classes, classes, dtype=torch.long, device=self.device)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self._confusion)
        counts = self._confusion.double()
        true, guessed = counts.sum(dim=1), counts.sum(dim=0)
        f1 = 2 * counts.diagonal() / (true + guessed).clamp(min=1)
        self.log("val_macro_f1", f1[true > 0].mean(), sync_dist=self.trainer.world_size > 1)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.network, self._optim)
        if self.retold is not None:
            optimizer.add_param_group(
                {"params": list(self.retold.parameters()), "weight_decay": 0.0}
            )
        total = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(
            optimizer, lambda step: one_cycle(step, total=total, warmup=self._optim.warmup)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
