"""Assign tiles to folds: stratified by class, seeded, and never the same place in two folds."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eurosat.config import PROTOCOLS
from eurosat.data.duplicates import check_no_leak
from eurosat.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

FOLDS = ("train", "val", "test")
UNUSED = "unused"
"""The fold of training tiles that ``per_class`` leaves out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The fold of every tile of a pack."""

    protocol: str
    seed: int
    folds: npt.NDArray[np.object_]
    """(N,) 'train', 'val', 'test' or 'unused', in the order of the pack's table."""
    fingerprint: str
    num_duplicates: int
    """Tiles that were placed in the fold of their duplicate."""

    def indices(self, fold: str) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.folds == fold)


def make_split(
    table: "pd.DataFrame", protocol: str = "60/20/20", seed: int = 0, per_class: int | None = None
) -> Split:
    """Distribute groups of duplicates over the folds, class by class.

    Each fold gets its share of every class, to within one group. A group counts as the class of
    its first tile. ``per_class`` limits the training tiles of each class; a smaller limit selects
    a subset of a larger one, and the validation and test folds do not change.

    Raises:
        DataError: a class has too few groups for every fold, or too few tiles for ``per_class``.
    """
    group, labels = table["group"].to_numpy(np.int64), table["class"].to_numpy()
    folds = np.empty(len(table), dtype=object)
    for number, name in enumerate(sorted(set(labels))):
        rng = np.random.default_rng([seed, number])
        members = np.unique(group[labels == name])
        members = members[labels[members] == name]  # a group counts as its first tile's class
        if len(members) < len(FOLDS):
            raise DataError(
                f"class {name} has {len(members)} different tiles, at least {len(FOLDS)} are "
                "needed to split it: add tiles"
            )
        parts = _cut_by_shares(rng.permutation(members), PROTOCOLS[protocol])
        for fold, groups in zip(FOLDS, parts, strict=True):
            folds[np.isin(group, groups)] = fold
    check_no_leak(group, folds)
    if per_class is not None:
        _limit_training_tiles(folds, labels, per_class, seed)
    return Split(
        protocol=protocol,
        seed=seed,
        folds=folds,
        fingerprint=split_fingerprint(list(table["path"]), list(folds)),
        num_duplicates=int((group != np.arange(len(group))).sum()),
    )


def _limit_training_tiles(
    folds: npt.NDArray[np.object_], labels: npt.NDArray[Any], per_class: int, seed: int
) -> None:
    for number, name in enumerate(sorted(set(labels))):
        rows = np.flatnonzero((labels == name) & (folds == "train"))
        if len(rows) < per_class:
            raise DataError(
                f"class {name} has {len(rows)} training tiles, fewer than "
                f"data.per_class={per_class}: set it to {len(rows)} or less"
            )
        order = np.random.default_rng([seed, number, 1]).permutation(rows)
        folds[order[per_class:]] = UNUSED


def split_fingerprint(paths: Sequence[str], folds: Sequence[str]) -> str:
    """Return the sha256 over the sorted pairs of Class/file and fold."""
    lines = sorted(f"{path} {fold}" for path, fold in zip(paths, folds, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def split_csv(table: "pd.DataFrame", split: Split) -> str:
    """Return the split as CSV, a line per tile: tile, sha256, class, fold."""
    tiles = table[["path", "sha256", "class"]].rename(columns={"path": "tile"})
    return tiles.assign(fold=split.folds).to_csv(index=False)


def _cut_by_shares(
    groups: npt.NDArray[np.int64], shares: tuple[float, ...]
) -> list[npt.NDArray[np.int64]]:
    """Cut ``groups`` into a part for each share; every part gets at least one group."""
    cuts = np.rint(np.cumsum(shares[:-1]) * len(groups)).astype(int)
    cuts[0] = min(max(cuts[0], 1), len(groups) - 2)
    cuts[1] = min(max(cuts[1], cuts[0] + 1), len(groups) - 1)
    return np.split(groups, cuts)
