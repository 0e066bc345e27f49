"""Folds: stratified, seeded, and never the same pixels on two sides."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eurosat.config import PROTOCOLS
from eurosat.data.duplicates import check_split
from eurosat.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

FOLDS = ("train", "val", "test")
UNUSED = "unused"
"""The fold of training tiles that ``per_class`` leaves out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    protocol: str
    seed: int
    folds: npt.NDArray[np.object_]
    """(N,) 'train', 'val' or 'test', in the order of the pack's table."""
    fingerprint: str
    grouped: int
    """Tiles that stand where they do because a duplicate stands there."""

    def indices(self, fold: str) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.folds == fold)


def make_split(
    table: "pd.DataFrame", protocol: str = "60/20/20", seed: int = 0, per_class: int | None = None
) -> Split:
    """Deal groups of duplicates to folds, class by class.

    A class of n tiles gives each fold its share to within one group. A group takes the class
    of its first tile. With ``per_class`` that many training tiles of each class are kept, and
    fewer are always among more; validation and test folds stay as they are.

    Raises:
        DataError: a class has too few groups to stand in every fold, or too few for per_class.
    """
    group, labels = table["group"].to_numpy(np.int64), table["class"].to_numpy()
    folds = np.empty(len(table), dtype=object)
    for number, name in enumerate(sorted(set(labels))):
        rng = np.random.default_rng([seed, number])
        members = np.unique(group[labels == name])
        members = members[labels[members] == name]  # a group is dealt with its first tile's class
        if len(members) < len(FOLDS):
            raise DataError(
                f"class {name} has {len(members)} different tiles, at least {len(FOLDS)} are "
                "needed to split it: add tiles"
            )
        dealt = _deal(rng.permutation(members), PROTOCOLS[protocol])
        for fold, groups in zip(FOLDS, dealt, strict=True):
            folds[np.isin(group, groups)] = fold
    check_split(group, folds)
    if per_class is not None:
        _leave_out(folds, labels, per_class, seed)
    return Split(
        protocol=protocol,
        seed=seed,
        folds=folds,
        fingerprint=split_fingerprint(list(table["path"]), list(folds)),
        grouped=int((group != np.arange(len(group))).sum()),
    )


def _leave_out(
    folds: npt.NDArray[np.object_], labels: npt.NDArray[Any], per_class: int, seed: int
) -> None:
    for number, name in enumerate(sorted(set(labels))):
        rows = np.flatnonzero((labels == name) & (folds == "train"))
        if len(rows) < per_class:
            raise DataError(
                f"class {name} has {len(rows)} training tiles, fewer than "
                f"data.per_class={per_class}: ask for fewer"
            )
        order = np.random.default_rng([seed, number, 1]).permutation(rows)
        folds[order[per_class:]] = UNUSED


def split_fingerprint(paths: Sequence[str], folds: Sequence[str]) -> str:
    """sha256 over sorted (Class/file, fold)."""
    lines = sorted(f"{path} {fold}" for path, fold in zip(paths, folds, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def split_csv(table: "pd.DataFrame", split: Split) -> str:
    """One line a tile: tile, sha256, class, fold."""
    told = table[["path", "sha256", "class"]].rename(columns={"path": "tile"})
    return told.assign(fold=split.folds).to_csv(index=False)


def _deal(groups: npt.NDArray[np.int64], shares: tuple[float, ...]) -> list[npt.NDArray[np.int64]]:
    """Cut ``groups`` by ``shares``; every part gets at least one."""
    cuts = np.rint(np.cumsum(shares[:-1]) * len(groups)).astype(int)
    cuts[0] = min(max(cuts[0], 1), len(groups) - 2)
    cuts[1] = min(max(cuts[1], cuts[0] + 1), len(groups) - 1)
    return np.split(groups, cuts)
