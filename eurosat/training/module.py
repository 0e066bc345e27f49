"""The Lightning module: loss, optimiser, learning-rate schedule and logged metrics."""

import math
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassF1Score

from eurosat.config import AugmentConfig, OptimConfig
from eurosat.errors import NonFiniteLoss
from eurosat.models import cpu_convolutions
from eurosat.models.network import Network
from eurosat.training.augment import augment
from eurosat.training.optimizers import make_optimizer, one_cycle

LOG_EVERY_STEPS = 10


class MacroF1(MulticlassF1Score):
    """Mean F1 over the classes that have tiles.

    torchmetrics' own macro average also counts a class that was only predicted, with an F1 of 0.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none", validate_args=False)

    def compute(self) -> Tensor:
        tiles_per_class: Any = self.tp + self.fn  # type: ignore[operator]
        return super().compute()[tiles_per_class > 0].mean()


class Classifier(lightning.LightningModule):
    """Trains a `Network` on batches of `eurosat.data.loaders`.

    If the targets are wider than the number of classes, the further columns are features of a
    teacher. One linear layer then predicts them from the input of the network's head, and their
    mean squared error is added to the loss with the weight ``features_weight``.
    """

    def __init__(
        self,
        network: Network,
        optim: OptimConfig,
        augmentation: AugmentConfig,
        teacher_axes: int = 0,
        features_weight: float = 0.0,
    ) -> None:
        """``teacher_axes`` is the number of teacher features in each target."""
        super().__init__()
        self.network = network
        self._optim, self._augmentation = optim, augmentation
        self._features_weight = features_weight
        self.feature_projection = (
            nn.Linear(network.head_width, teacher_axes) if teacher_axes else None
        )
        self._macro_f1 = MacroF1(len(network.spec.classes))

    def on_train_epoch_start(self) -> None:
        loader: Any = self.trainer.train_dataloader
        loader.epoch = self.current_epoch

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        tiles_NCHW, targets = batch
        classes = len(self.network.spec.classes)
        if targets.ndim == 1:  # labels
            targets = functional.one_hot(targets, classes).float()
        tiles_NCHW, targets = augment(tiles_NCHW, targets, self._augmentation)
        targets_NK, teacher_ND = targets[:, :classes], targets[:, classes:]
        with cpu_convolutions.fast():
            if self.feature_projection is None:
                logits = self.network(tiles_NCHW)
            else:
                features_NF, logits = self.network.forward_with_features(tiles_NCHW)
                projected_ND = self.feature_projection(features_NF)
        loss = functional.cross_entropy(
            logits.float(), targets_NK, label_smoothing=self._optim.label_smoothing
        )
        losses = {"train_loss": loss.detach()}
        if self.feature_projection is not None:
            features_loss = functional.mse_loss(projected_ND.float(), teacher_ND)
            losses["train_features_loss"] = features_loss.detach()
            loss = loss + self._features_weight * features_loss
        if self.global_rank == 0:  # the other ranks end with the first one's next step
            self._raise_if_not_finite(loss.detach())
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
        """Clip by the norm over all gradients.

        Lightning's own clipping refuses fused optimisers in mixed precision.
        """
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def _raise_if_not_finite(self, loss: Tensor) -> None:
        """Check the loss; on a GPU only every `LOG_EVERY_STEPS`, since reading it waits."""
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
        predicted = logits.argmax(dim=1)
        self._macro_f1.update(predicted, labels)
        metrics = {
            "val_loss": functional.cross_entropy(logits, labels),
            "val_accuracy": (predicted == labels).float().mean(),
        }
        self.log_dict(metrics, batch_size=len(labels), sync_dist=self.trainer.world_size > 1)
        self.log("val_macro_f1", self._macro_f1, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.network, self._optim)
        if self.feature_projection is not None:
            projection = list(self.feature_projection.parameters())
            optimizer.add_param_group({"params": projection, "weight_decay": 0.0})
        total = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(
            optimizer, lambda step: one_cycle(step, total=total, warmup=self._optim.warmup)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
