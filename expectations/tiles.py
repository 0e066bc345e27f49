"""The per-tile table that a suite is run on: a survey's facts, the fold, and what tiles share."""

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
"""The facts of a tile. A size of 0 and an empty cell stand for what could not be read."""
SHARING_COLUMNS = ("content_folds", "content_classes", "place_folds")
DERIVED_COLUMNS = ("texture", "pixels_sha256", "fault", "group", "balance", *SHARING_COLUMNS)
"""What the suite needs beside them: see `reread` and `describe_sharing`."""
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
    """The table of `COLUMNS`, one row a tile, in the survey's order.

    ``dtypes``: what the files that could not be decoded hold, by path; see `reread`.
    """
    table = scan_table.copy()
    table["texture"] = texture.astype(np.float64)
    table[PIXEL_STATISTICS] = table[PIXEL_STATISTICS].astype(np.float64)
    # The survey measured the gap that a faulty tile leaves in the pack.
    table.loc[table["fault"].notna(), PIXEL_STATISTICS] = np.nan
    table[["sha256", "pixels_sha256"]] = table[["sha256", "pixels_sha256"]].replace("", None)
    undecoded = table["bands"] == 0
    table.loc[undecoded, "dtype"] = table.loc[undecoded, "path"].map(dtypes)
    table["fold"], table["group"] = assign_folds(table, data)
    return add_sharing_columns(table, reference)[list(COLUMNS)]


def assign_folds(
    table: "pd.DataFrame", data: DataConfig
) -> tuple["pd.Series[str]", "pd.Series[int]"]:
    """(N,) fold and group of each tile as training would deal them; neither for a faulty tile.

    A survey that met a fault has looked for no near duplicates: groups are then equal pixels
    alone. Where the good tiles cannot be split, no tile has a fold.
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
        log.warning("no folds: %s", error)
    return folds, good["group"].reindex(table.index)


def add_sharing_columns(table: "pd.DataFrame", reference: Reference) -> "pd.DataFrame":
    """Add the columns that say of a tile what only the whole table shows.

    ``balance``: share of the tile's class over its share in the reference. ``content_folds`` and
    ``content_classes``: in how many folds, and under how many classes, its very pixels stand.
    ``place_folds``: in how many folds the tiles of its group, near duplicates included, stand.
    """
    made = table.copy()
    shares = made["class"].value_counts(normalize=True)
    made["balance"] = made["class"].map(
        {n: shares[n] / reference.share(str(n)) for n in shares.index}
    )
    by_content, by_place = made.groupby("pixels_sha256"), made.groupby("group")
    made["content_folds"] = by_content["fold"].transform("nunique")
    made["content_classes"] = by_content["class"].transform("nunique")
    made["place_folds"] = by_place["fold"].transform("nunique")
    return made
