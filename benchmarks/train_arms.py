"""The arms of bench-train, each a process: `python -m benchmarks.train_arms ARM FOLDER`.

All train the same ResNet18 (timm, from scratch) with SGD on the same 16,200 tiles of 64 px, with
equal batches and threads.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.interleave import Interleaver, InterleaverCallback

BATCHES = {"cpu": 64, "gpu": 1024}
"""Tiles per step. With 64, every arm would only measure how long a GPU waits for Python."""
WORKERS = 2
EPOCHS = 1000
"""More than any benchmark trains: the arms are stopped."""
REPEATS_PER_EPOCH = 100
"""An epoch of this project ends with a validation, which the other arms do not have."""
SIZE, CLASSES = 64, 10


def plain(folder: Path, *, fast: bool) -> None:
    """Train as a newcomer writes it: Lightning, ImageFolder, transforms of each image.

    ``fast`` adds bf16 and channels_last.
    """
    import lightning
    import timm
    import torch

    class Plain(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = timm.create_model("resnet18", num_classes=CLASSES)
            if fast:
                self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            images, labels = batch
            if fast:
                images = images.contiguous(memory_format=torch.channels_last)
            loss = torch.nn.functional.cross_entropy(self.network(images), labels)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(
                self.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
            )

    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        precision="bf16-mixed" if fast else "32-true",
        logger=False,
        enable_checkpointing=False,
        callbacks=[InterleaverCallback()],
        accelerator=accelerator(),
    )
    trainer.fit(Plain(), plain_loader(folder))


def plain_loader(folder: Path) -> Any:
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.344, 0.380, 0.408], [0.203, 0.137, 0.115]),
        ]
    )
    return DataLoader(
        ImageFolder(str(folder / "jpeg"), transform),
        batch_size(),
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )


def torchgeo(folder: Path) -> None:
    """Train with torchgeo's task and data module on the same tiles as GeoTIFF.

    Its reader expects 13 bands; the files here hold only the three that are used, which spares it
    reading ten others.
    """
    import lightning
    from torchgeo.datamodules import EuroSATDataModule
    from torchgeo.datasets import EuroSAT
    from torchgeo.trainers import ClassificationTask

    bands = ("B04", "B03", "B02")
    EuroSAT.all_band_names = bands
    data = EuroSATDataModule(
        batch_size=batch_size(), num_workers=WORKERS, root=str(folder / "geotiff"), bands=bands
    )
    task = ClassificationTask(model="resnet18", weights=None, in_channels=3, num_classes=CLASSES)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        callbacks=[InterleaverCallback()],
        accelerator=accelerator(),
    )
    trainer.fit(task, datamodule=data)


def ours(_: Path) -> None:
    """Train with this project: augmentation, moving average, tracking and progress included."""
    from eurosat import tracking
    from eurosat.config import compose
    from eurosat.data.prepare import prepare
    from eurosat.training.fit import fit

    config = compose(
        [
            "data=eurosat",
            "recipe=resnet18-quick",
            "model.name=resnet18",
            "distill.teacher=none",
            f"trainer.epochs={EPOCHS}",
            f"trainer.repeats_per_epoch={REPEATS_PER_EPOCH}",
            f"optim.batch_size={batch_size()}",
            "data.allow_unvalidated=true",
        ]
    )
    with tempfile.TemporaryDirectory() as store:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}/mlflow.db"
        with tracking.run("bench", "ours") as run:
            fit(config, prepare(config), run, extra_callbacks=[InterleaverCallback()])


def ceiling(_: Path) -> None:
    """Repeat the training step alone, in this project's mode, on one random batch."""
    import torch

    from eurosat.config import compose
    from eurosat.models import cpu_convolutions, network
    from eurosat.models.compute import choose_compute
    from eurosat.runtime import hardware
    from eurosat.training.optimizers import make_optimizer

    hardware.disable_malloc_trim()
    torch.set_num_threads(hardware.cores())
    spec = network.NetworkSpec(
        name="resnet18",
        classes=tuple("abcdefghij"),
        bands=3,
        tile_size=(SIZE, SIZE),
        input_size=None,
        norm="batch",
        drop_rate=0.0,
        mean=(100.0,) * 3,
        std=(50.0,) * 3,
    )
    compute = choose_compute(spec, "auto", probe=False)
    net = network.build_untrained(spec).train().to(compute.device)
    net.to(memory_format=compute.memory_format)  # type: ignore[call-overload]
    optimizer = make_optimizer(net, compose(["recipe=resnet18-quick"]).optim)
    tiles = torch.rand(batch_size(), 3, SIZE, SIZE, device=compute.device) * 255
    tiles = tiles.contiguous(memory_format=compute.memory_format)
    labels = torch.randint(0, CLASSES, (batch_size(),), device=compute.device)
    interleaver = Interleaver()
    while True:
        with compute.autocast(), cpu_convolutions.fast():
            loss = torch.nn.functional.cross_entropy(net(tiles).float(), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        interleaver.step(len(labels))


def accelerator() -> str:
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def batch_size() -> int:
    return BATCHES[accelerator()]


ARMS = {
    "plain": lambda folder: plain(folder, fast=False),
    "plain-bf16": lambda folder: plain(folder, fast=True),
    "torchgeo": torchgeo,
    "ours": ours,
    "ceiling": ceiling,
}

if __name__ == "__main__":
    ARMS[sys.argv[1]](Path(sys.argv[2]))
