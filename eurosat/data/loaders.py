"""Load batches from the pack: no decoding, no worker processes, no copies between processes."""

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

EVAL_BATCH_SIZE = {"cpu": 32, "cuda": 1024}
"""Tiles per batch without gradients. With 256, the activations of EfficientNet-Lite0 no longer fit
a CPU's caches, and throughput halves."""
UPLOAD_CHUNK = 4096
"""Tiles copied to a device in one piece."""
MAX_GPU_MEMORY_SHARE = 0.5
"""Share of a GPU's free memory that tiles may use; the rest is for training."""

SoftTargets = npt.NDArray[np.float32]
"""(N, K) class probabilities, a row for each tile of the pack."""


class LabelledTiles(Protocol):
    """Tiles and their classes, such as a `Pack`."""

    @property
    def tiles_NHWC(self) -> npt.NDArray[np.uint8]: ...  # noqa: N802 - axes are in its name
    @property
    def labels(self) -> npt.NDArray[np.int64]: ...


class TileLoader:
    """Iterate over batches: (N, C, H, W) uint8 tiles in channels-last memory, and (N,) labels.

    With ``soft_targets`` it yields their (N, K) rows instead of labels. Without ``batch_size``
    batches have the size that suits evaluation on this machine.

    With ``seed``, tiles are shuffled differently in each ``epoch``, reproducibly, and an
    incomplete last batch is dropped. Without it, tiles come in order and none is dropped.
    ``repeats_per_epoch`` copies of the tiles are shuffled together. Each process of
    ``distributed`` gets its share of every batch.
    """

    def __init__(
        self,
        tiles: LabelledTiles,
        indices: npt.NDArray[np.int64],
        batch_size: int | None = None,
        seed: int | None = None,
        distributed: DistributedContext = SINGLE_PROCESS,
        soft_targets: SoftTargets | None = None,
        repeats_per_epoch: int = 1,
    ) -> None:
        self._tiles_NHWC = tiles.tiles_NHWC
        self._labels = tiles.labels if soft_targets is None else soft_targets
        self._indices = indices
        device = "cuda" if torch.cuda.is_available() else "cpu"
        num_tiles = repeats_per_epoch * len(indices)
        self.batch_size = min(batch_size or EVAL_BATCH_SIZE[device], num_tiles)
        self._seed, self._distributed, self._repeats = seed, distributed, repeats_per_epoch
        self._preloaded: tuple[Tensor, Tensor] | None = None
        self.epoch = 0

    @property
    def nbytes(self) -> int:
        """Size of these tiles in memory."""
        return len(self._indices) * int(np.prod(self._tiles_NHWC.shape[1:]))

    def preload(self, device: torch.device) -> None:
        """Copy these tiles and labels to ``device``, and gather batches there from now on."""
        shape = (len(self._indices), *self._tiles_NHWC.shape[1:])
        tiles_NHWC = torch.empty(shape, dtype=torch.uint8, device=device)
        for start in range(0, len(self._indices), UPLOAD_CHUNK):
            rows = self._indices[start : start + UPLOAD_CHUNK]
            tiles_NHWC[start : start + UPLOAD_CHUNK] = torch.from_numpy(self._tiles_NHWC[rows])
        self._preloaded = tiles_NHWC, torch.from_numpy(self._labels[self._indices]).to(device)
        self._preloaded_row = np.empty(len(self._labels), np.int64)
        self._preloaded_row[self._indices] = np.arange(len(self._indices))

    def __len__(self) -> int:
        full, rest = divmod(self._repeats * len(self._indices), self.batch_size)
        return full + (rest > 0 and self._seed is None)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.tile(self._indices, self._repeats)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, self.epoch]).permutation(order)
            order = order[: len(self) * self.batch_size]
        if self._distributed.world_size > 1:
            batches = np.array_split(order, len(self))  # even sizes: every process gets a tile
        else:
            batches = np.split(order, np.arange(1, len(self)) * self.batch_size)
        for batch in batches:
            rows = batch[self._distributed.rank :: self._distributed.world_size]
            tiles_NHWC, labels = self._gather(rows)
            yield tiles_NHWC.permute(0, 3, 1, 2), labels

    def _gather(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        if self._preloaded is None:
            return torch.from_numpy(self._tiles_NHWC[rows]), torch.from_numpy(self._labels[rows])
        tiles_NHWC, labels = self._preloaded
        device_rows = torch.from_numpy(self._preloaded_row[rows]).to(labels.device)
        return tiles_NHWC[device_rows], labels[device_rows]


class TileDataModule(lightning.LightningDataModule):
    """Loaders for the folds of one split of one pack."""

    def __init__(
        self,
        pack: Pack,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        distributed: DistributedContext = SINGLE_PROCESS,
        soft_targets: SoftTargets | None = None,
        repeats_per_epoch: int = 1,
    ) -> None:
        super().__init__()
        self._pack, self._split, self._distributed = pack, split, distributed
        self._batch_size, self._seed = batch_size, seed
        self._soft_targets, self._repeats = soft_targets, repeats_per_epoch

    def train_dataloader(self) -> TileLoader:
        loader = TileLoader(
            self._pack,
            self._split.indices("train"),
            self._batch_size,
            self._seed,
            self._distributed,
            self._soft_targets,
            self._repeats,
        )
        return self._preload_if_it_fits(loader)

    def val_dataloader(self) -> TileLoader:
        rows = self._split.indices("val")
        return self._preload_if_it_fits(TileLoader(self._pack, rows, distributed=self._distributed))

    def test_dataloader(self) -> TileLoader:
        return TileLoader(self._pack, self._split.indices("test"))

    def _preload_if_it_fits(self, loader: TileLoader) -> TileLoader:
        """Preload the tiles to the training GPU, if there is one with enough free memory."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            if loader.nbytes < MAX_GPU_MEMORY_SHARE * free_bytes:
                loader.preload(device)
        return loader


def band_statistics(
    pack: Pack, indices: npt.NDArray[np.int64], max_tiles: int = 2000
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each band on 0 to 255, over about ``max_tiles`` tiles.

    2,000 tiles of 64x64 are 8 million pixels: more would not change the third digit.
    """
    step = max(1, len(indices) // max_tiles)
    sample = np.sort(indices[::step])
    pixels = pack.tiles_NHWC[sample].reshape(-1, pack.bands)
    mean = pixels.mean(axis=0, dtype=np.float64)
    std = np.maximum(pixels.std(axis=0, dtype=np.float64), 1.0)
    return tuple(np.round(mean, 3).tolist()), tuple(np.round(std, 3).tolist())
