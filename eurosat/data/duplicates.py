"""Exact and near duplicates: what must not stand on both sides of a split."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from eurosat.errors import DataError
from eurosat.runtime.progress import track

HASH_BITS = 16
"""Perceptual hashes (pHash, Zauner 2010) at most this many of 64 bits apart are candidates."""
LEVEL_GAP = 8.0
"""Grey levels: a candidate whose mean colour differs more shows another place or season."""
SHIFT = 6
"""Pixels: EuroSAT holds tiles of one place cut up to a few pixels apart (River_492, River_597)."""
CORRELATION = 0.98
"""Least correlation under the best shift. On EuroSAT the same place gives 0.99 and more, and
the likest different places, two fields with one edge, 0.96 (`eurosat.data describe` draws them)."""
BLOCK = 1024
"""Tiles compared with all others at a time: 110 MB of products for 27,000."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicates:
    """Tiles by number; a group is named by its smallest tile."""

    group: npt.NDArray[np.int64]
    """(N,) the group of each tile; a tile without duplicates is its own."""
    exact: int
    """Tiles whose pixels equal an earlier tile's."""
    near: int
    """Further tiles joined to a group by likeness alone."""


def perceptual_hash(tiles_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """(N,) 64-bit hash: signs of the lowest 8x8 cosine coefficients about their median."""
    grey = tiles_NHWC.astype(np.float32).mean(axis=-1)
    rows, columns = _cosines(grey.shape[1]), _cosines(grey.shape[2])
    low = np.einsum("ih,nhw,jw->nij", rows, grey, columns, optimize=True).reshape(len(grey), 64)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def find_duplicates(
    tiles_NHWC: npt.NDArray[np.uint8],
    pixels_sha256: npt.NDArray[np.object_],
    hashes: npt.NDArray[np.uint64],
) -> Duplicates:
    """Group equal pixels, then near duplicates among what is left."""
    _, first, inverse = np.unique(pixels_sha256, return_index=True, return_inverse=True)
    group = first[inverse].astype(np.int64)
    originals = np.flatnonzero(group == np.arange(len(group)))
    colour = _mean_colour(tiles_NHWC)[originals]
    blocks = range(0, len(originals), BLOCK)
    joined = 0
    for start in track(blocks, len(blocks), "looking for duplicates", f"x {BLOCK} tiles"):
        for one, other in _likely_pairs(hashes[originals], colour, start):
            a, b = originals[one], originals[other]
            if group[a] != group[b] and _same_place(tiles_NHWC[a], tiles_NHWC[b]):
                low, high = sorted((group[a], group[b]))
                group[group == high] = low
                joined += 1
    return Duplicates(group=group, exact=len(group) - len(originals), near=joined)


def check_split(group: npt.NDArray[np.int64], fold: npt.NDArray[np.object_]) -> None:
    """Raise DataError where one group stands in two folds: the leak that a split must not have."""
    order = np.argsort(group, kind="stable")
    same = group[order][1:] == group[order][:-1]
    leaks = np.flatnonzero(same & (fold[order][1:] != fold[order][:-1]))
    if len(leaks):
        raise DataError(
            f"{len(leaks)} duplicate tiles stand in two folds, 0 are allowed: "
            "make the split with eurosat.data.split"
        )


def _mean_colour(tiles_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    pixels = tiles_NHWC.reshape(len(tiles_NHWC), -1, tiles_NHWC.shape[-1])
    return np.stack([tile.sum(axis=0, dtype=np.float32) / len(tile) for tile in pixels])


def _likely_pairs(
    hashes: npt.NDArray[np.uint64], colour: npt.NDArray[np.float32], start: int
) -> Iterator[tuple[int, int]]:
    """Pairs i < j of like hash and colour, i in the block that begins at ``start``.

    The bits are taken as +-1, so that a matrix product counts the equal ones.
    """
    bits = np.unpackbits(hashes[start:].view(np.uint8).reshape(-1, 8), axis=1)
    signs = bits.astype(np.float32) * 2 - 1
    alike = signs[:BLOCK] @ signs.T >= 64 - 2 * HASH_BITS
    ones, others = np.nonzero(np.triu(alike, 1))
    near = np.abs(colour[start + ones] - colour[start + others]).max(axis=1) <= LEVEL_GAP
    yield from zip((start + ones[near]).tolist(), (start + others[near]).tolist(), strict=True)


def _same_place(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    """Whether the middle of one tile is found in the other, up to SHIFT pixels away."""
    shift = min(SHIFT, min(one.shape[:2]) // 4)
    middle = one[shift:-shift, shift:-shift].astype(np.float32).mean(axis=-1)
    middle -= middle.mean()
    windows = sliding_window_view(other.astype(np.float32).mean(axis=-1), middle.shape)
    product = np.einsum("ij,klij->kl", middle, windows)
    sums, squares = windows.sum(axis=(2, 3)), np.einsum("klij,klij->kl", windows, windows)
    spread = np.sqrt(np.maximum((middle**2).sum() * (squares - sums**2 / middle.size), 1e-6))
    return bool((product / spread).max() >= CORRELATION)


def _cosines(length: int) -> npt.NDArray[np.float32]:
    k, x = np.arange(8)[:, None], np.arange(length)[None, :]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * length)).astype(np.float32)
