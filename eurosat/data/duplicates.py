"""Find exact and near duplicates, which must not be split across folds."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from eurosat.errors import DataError
from eurosat.runtime.progress import track

MAX_HASH_DISTANCE = 16
"""Bits of 64 by which the perceptual hashes (pHash, Zauner 2010) of two candidates may differ."""
MAX_COLOUR_DIFFERENCE = 8.0
"""Grey levels by which the mean colours of two candidates may differ in any band; a larger
difference is another place or season."""
MAX_SHIFT = 6
"""Pixels. EuroSAT has tiles of one place, shifted by a few pixels (River_492, River_597)."""
MIN_CORRELATION = 0.98
"""Correlation of two tiles under the best shift. On EuroSAT tiles of the same place reach 0.99 or
more; the most similar different places, two fields with one edge, reach 0.96 (`python -m
eurosat.data describe` draws them)."""
BLOCK_SIZE = 1024
"""Tiles that are compared with all others in one matrix product: 110 MB for 27,000 tiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicateGroups:
    """Groups of tiles that show the same place; a group's number is its first tile's row."""

    group: npt.NDArray[np.int64]
    """(N,) group of each tile; a tile without duplicates forms its own group."""
    num_exact: int
    """Tiles whose pixels equal those of an earlier tile."""
    num_near: int
    """Further tiles that joined a group because they look alike."""


def perceptual_hash(tiles_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return (N,) 64-bit hashes: signs of the lowest 8x8 cosine coefficients about their median."""
    grey = tiles_NHWC.astype(np.float32).mean(axis=-1)
    rows, columns = _cosines(grey.shape[1]), _cosines(grey.shape[2])
    low = np.einsum("ih,nhw,jw->nij", rows, grey, columns, optimize=True).reshape(len(grey), 64)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def find_duplicates(
    tiles_NHWC: npt.NDArray[np.uint8],
    pixels_sha256: npt.NDArray[np.object_],
    hashes: npt.NDArray[np.uint64],
) -> DuplicateGroups:
    """Group tiles with equal pixels, then near duplicates among the remaining tiles."""
    _, first, inverse = np.unique(pixels_sha256, return_index=True, return_inverse=True)
    group = first[inverse].astype(np.int64)
    originals = np.flatnonzero(group == np.arange(len(group)))
    colour = _mean_colour(tiles_NHWC)[originals]
    starts = range(0, len(originals), BLOCK_SIZE)
    num_near = 0
    for start in track(starts, len(starts), "finding duplicates", f"x {BLOCK_SIZE} tiles"):
        for i, j in _candidate_pairs(hashes[originals], colour, start):
            a, b = originals[i], originals[j]
            if group[a] != group[b] and _show_same_place(tiles_NHWC[a], tiles_NHWC[b]):
                low, high = sorted((group[a], group[b]))
                group[group == high] = low
                num_near += 1
    return DuplicateGroups(group=group, num_exact=len(group) - len(originals), num_near=num_near)


def check_no_leak(group: npt.NDArray[np.int64], fold: npt.NDArray[np.object_]) -> None:
    """Raise DataError if the tiles of one group are in two folds."""
    order = np.argsort(group, kind="stable")
    same_group = group[order][1:] == group[order][:-1]
    leaks = np.flatnonzero(same_group & (fold[order][1:] != fold[order][:-1]))
    if len(leaks):
        raise DataError(
            f"{len(leaks)} duplicate tiles are in two folds, 0 are allowed: "
            "make the split with eurosat.data.split"
        )


def _mean_colour(tiles_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    pixels = tiles_NHWC.reshape(len(tiles_NHWC), -1, tiles_NHWC.shape[-1])
    return np.stack([tile.sum(axis=0, dtype=np.float32) / len(tile) for tile in pixels])


def _candidate_pairs(
    hashes: npt.NDArray[np.uint64], colour: npt.NDArray[np.float32], start: int
) -> Iterator[tuple[int, int]]:
    """Yield pairs i < j of similar hash and colour, with i in the block that begins at ``start``.

    Bits are written as +1 and -1, so that a matrix product counts the equal ones.
    """
    bits = np.unpackbits(hashes[start:].view(np.uint8).reshape(-1, 8), axis=1)
    signs = bits.astype(np.float32) * 2 - 1
    similar = signs[:BLOCK_SIZE] @ signs.T >= 64 - 2 * MAX_HASH_DISTANCE
    i, j = (start + index for index in np.nonzero(np.triu(similar, 1)))
    near = np.abs(colour[i] - colour[j]).max(axis=1) <= MAX_COLOUR_DIFFERENCE
    yield from zip(i[near].tolist(), j[near].tolist(), strict=True)


def _show_same_place(first_HWC: npt.NDArray[np.uint8], second_HWC: npt.NDArray[np.uint8]) -> bool:
    """Return whether the middle of one tile matches the other at a shift of up to MAX_SHIFT."""
    shift = min(MAX_SHIFT, min(first_HWC.shape[:2]) // 4)
    middle = first_HWC[shift:-shift, shift:-shift].astype(np.float32).mean(axis=-1)
    middle -= middle.mean()
    windows = sliding_window_view(second_HWC.astype(np.float32).mean(axis=-1), middle.shape)
    product = np.einsum("ij,klij->kl", middle, windows)
    sums, squares = windows.sum(axis=(2, 3)), np.einsum("klij,klij->kl", windows, windows)
    spread = np.sqrt(np.maximum((middle**2).sum() * (squares - sums**2 / middle.size), 1e-6))
    return bool((product / spread).max() >= MIN_CORRELATION)


def _cosines(length: int) -> npt.NDArray[np.float32]:
    """Return the (8, length) lowest basis functions of the discrete cosine transform."""
    k, x = np.arange(8)[:, None], np.arange(length)[None, :]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * length)).astype(np.float32)
