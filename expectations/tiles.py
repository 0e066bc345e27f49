"""Build the table that a suite checks: the scan's facts, the fold, and what tiles share."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eurosat.config import DataConfig
from eurosat.data.split import make_split
from eurosat.errors import DataError
from expectations.spec import Reference

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

COLUMN_TYPES = {
    "path": "str",
    "class": "str",
    "height": "int64",
    "width": "int64",
    "bands": "int64",
    "dtype": "str",
    "mean": "float64",
    "std": "float64",
    "min": "float64",
    "max": "float64",
    "saturation": "float64",
    "sha256": "str",
    "fold": "str",
}
"""Columns with the facts of a tile, and their types. Of a tile that could not be read, sizes are 0
and other cells are empty."""
SHARING_COLUMNS = ("content_folds", "content_classes", "place_folds")
DERIVED_COLUMNS = ("texture", "pixels_sha256", "fault", "group", "balance", *SHARING_COLUMNS)
"""Further columns that the suite checks; see `texture` and `add_sharing_columns`."""
COLUMNS = (*COLUMN_TYPES, *DERIVED_COLUMNS)
PIXEL_STATISTICS = ["mean", "std", "texture", "min", "max", "saturation"]


def tile_table(
    scan_table: "pd.DataFrame",
    data: DataConfig,
    reference: Reference,
    *,
    texture: npt.NDArray[np.float32],
    dtypes: Mapping[str, str | None],
) -> "pd.DataFrame":
    """Return the table of `COLUMNS`, a row per tile, in the order of the scan.

    ``texture`` has shape (N,). ``dtypes``: data type of the files that could not be decoded, by
    path; see `texture.detect_dtype`.
    """
    table = scan_table.copy()
    table["texture"] = texture.astype(np.float64)
    table[PIXEL_STATISTICS] = table[PIXEL_STATISTICS].astype(np.float64)
    # The scan measured the black pixels that stand in for a faulty tile.
    table.loc[table["fault"].notna(), PIXEL_STATISTICS] = np.nan
    table[["sha256", "pixels_sha256"]] = table[["sha256", "pixels_sha256"]].replace("", None)
    undecoded = table["bands"] == 0
    table.loc[undecoded, "dtype"] = table.loc[undecoded, "path"].map(dtypes)
    table["fold"], table["group"] = assign_folds(table, data)
    return add_sharing_columns(table, reference)[list(COLUMNS)]


def assign_folds(
    table: "pd.DataFrame", data: DataConfig
) -> tuple["pd.Series[str]", "pd.Series[int]"]:
    """Return (N,) fold and (N,) group of each tile, as in training; empty for faulty tiles.

    A scan that found a fault has not searched near duplicates: a group is then a set of tiles
    with equal pixels. If the good tiles cannot be split, no tile has a fold.
    """
    import pandas as pd

    good = table[table["fault"].isna()].copy()
    if "group" not in good:
        _, first, inverse = np.unique(
            good["pixels_sha256"].to_numpy(str), return_index=True, return_inverse=True
        )
        good["group"] = first[inverse]
    folds = pd.Series(None, index=table.index, dtype=object)
    try:
        folds[good.index] = make_split(good, data.protocol, data.split_seed).folds
    except DataError as error:
        log.warning("the tiles cannot be split into folds: %s", error)
    return folds, good["group"].reindex(table.index)


def add_sharing_columns(table: "pd.DataFrame", reference: Reference) -> "pd.DataFrame":
    """Return the table with columns that compare a tile with the others.

    ``balance``: share of the tile's class divided by its share in the reference.
    ``content_folds`` and ``content_classes``: number of folds, and of classes, among the tiles
    with equal pixels. ``place_folds``: number of folds in its group, near duplicates included.
    """
    table = table.copy()
    shares = table["class"].value_counts(normalize=True)
    table["balance"] = table["class"].map(
        {name: shares[name] / reference.share(str(name)) for name in shares.index}
    )
    by_content, by_place = table.groupby("pixels_sha256"), table.groupby("group")
    table["content_folds"] = by_content["fold"].transform("nunique")
    table["content_classes"] = by_content["class"].transform("nunique")
    table["place_folds"] = by_place["fold"].transform("nunique")
    return table
