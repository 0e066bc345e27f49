"""Batches gathered from the pack: no decoding, no worker processes, no copies between them."""

from collections.abc import Iterator
from typing import Protocol

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eurosat.data.pack import Pack
from eurosat.data.split import Split
from eurosat.runtime.distributed import SINGLE_PROCESS, DistributedContext

EVAL_BATCH = {"cpu": 32, "cuda": 1024}
"""Tiles a batch without gradients. In 256, what flows through EfficientNet-Lite0 no longer fits a
CPU's caches, and half as many a second go through it."""
UPLOAD = 4096
"""Tiles that are copied to a device at once."""
GPU_SHARE = 0.5
"""Of a GPU's free memory that tiles may take; the rest is for training."""

Targets = npt.NDArray[np.float32]


class Labelled(Protocol):
    """Tiles and their classes, such as a `Pack`."""

    @property
    def tiles_NHWC(self) -> npt.NDArray[np.uint8]: ...  # noqa: N802 - axes are in its name
    @property
    def labels(self) -> npt.NDArray[np.int64]: ...


class TileLoader:
    """(N, C, H, W) uint8 tiles in channels-last memory, and (N,) labels.

    Given soft ``targets``, a row for each of the ``tiles``, it yields (N, K) of them for labels.

    Without ``batch_size`` they are as large as suits an evaluation on this machine.

    With ``seed`` each ``epoch`` is a permutation of its own, the same for the same seed, and a
    last batch that is not full is left out; without it tiles come in order and none is left out.
    Of several ``passes`` in an epoch, none is over before the next one begins.
    Each of several ``ranks`` gets its share of every batch.
    """

    def __init__(
        self,
        tiles: Labelled,
        indices: npt.NDArray[np.int64],
        batch_size: int | None = None,
        seed: int | None = None,
        ranks: DistributedContext = SINGLE_PROCESS,
        targets: Targets | None = None,
        passes: int = 1,
    ) -> None:
        self._tiles_NHWC = tiles.tiles_NHWC
        self._labels = tiles.labels if targets is None else targets
        self._indices = indices
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch_size = min(batch_size or EVAL_BATCH[device], passes * len(indices))
        self._seed, self._ranks, self._passes = seed, ranks, passes
        self._held: tuple[Tensor, Tensor] | None = None
        self.epoch = 0

    @property
    def nbytes(self) -> int:
        """Of these tiles, uncompressed."""
        return len(self._indices) * int(np.prod(self._tiles_NHWC.shape[1:]))

    def preload(self, device: torch.device) -> None:
        """Keep these tiles and labels on ``device``: batches are gathered there from now on."""
        shape = (len(self._indices), *self._tiles_NHWC.shape[1:])
        tiles_NHWC = torch.empty(shape, dtype=torch.uint8, device=device)
        for start in range(0, len(self._indices), UPLOAD):
            rows = self._indices[start : start + UPLOAD]
            tiles_NHWC[start : start + UPLOAD] = torch.from_numpy(self._tiles_NHWC[rows])
        self._held = tiles_NHWC, torch.from_numpy(self._labels[self._indices]).to(device)
        self._place = np.empty(len(self._labels), np.int64)
        self._place[self._indices] = np.arange(len(self._indices))

    def __len__(self) -> int:
        full, rest = divmod(self._passes * len(self._indices), self.batch_size)
        return full + (rest > 0 and self._seed is None)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.tile(self._indices, self._passes)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, self.epoch]).permutation(order)
            order = order[: len(self) * self.batch_size]
        if self._ranks.world_size > 1:
            parts = np.array_split(order, len(self))  # no rank is left without a tile
        else:
            parts = np.split(order, np.arange(1, len(self)) * self.batch_size)
        for part in parts:
            tiles_NHWC, labels = self._gather(part[self._ranks.rank :: self._ranks.world_size])
            yield tiles_NHWC.permute(0, 3, 1, 2), labels

    def _gather(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        if self._held is None:
            return torch.from_numpy(self._tiles_NHWC[rows]), torch.from_numpy(self._labels[rows])
        tiles_NHWC, labels = self._held
        places = torch.from_numpy(self._place[rows]).to(labels.device)
        return tiles_NHWC[places], labels[places]


class TileDataModule(lightning.LightningDataModule):
    """The folds of one split over one pack."""

    def __init__(
        self,
        pack: Pack,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        ranks: DistributedContext = SINGLE_PROCESS,
        targets: Targets | None = None,
        passes: int = 1,
    ) -> None:
        super().__init__()
        self._targets, self._passes = targets, passes
        self._pack, self._split, self._ranks = pack, split, ranks
        self._batch_size, self._seed = batch_size, seed

    def train_dataloader(self) -> TileLoader:
        rows = self._split.indices("train")
        return self._near(
            TileLoader(
                self._pack,
                rows,
                self._batch_size,
                self._seed,
                self._ranks,
                self._targets,
                self._passes,
            )
        )

    def val_dataloader(self) -> TileLoader:
        rows = self._split.indices("val")
        return self._near(TileLoader(self._pack, rows, ranks=self._ranks))

    def test_dataloader(self) -> TileLoader:
        return TileLoader(self._pack, self._split.indices("test"))

    def _near(self, batches: TileLoader) -> TileLoader:
        """On the GPU that trains, if there is one and it has the room."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if batches.nbytes < GPU_SHARE * free:
                batches.preload(device)
        return batches


def band_statistics(
    pack: Pack, indices: npt.NDArray[np.int64], most: int = 2000
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each band on 0 to 255, over at most ``most`` tiles.

    2,000 tiles of 64x64 are 8 million pixels: the third digit no longer moves.
    """
    chosen = np.sort(indices[:: max(1, len(indices) // most)])
    pixels = pack.tiles_NHWC[chosen].reshape(-1, pack.bands)
    mean = pixels.mean(axis=0, dtype=np.float64)
    std = np.maximum(pixels.std(axis=0, dtype=np.float64), 1.0)
    return tuple(np.round(mean, 3).tolist()), tuple(np.round(std, 3).tolist())
