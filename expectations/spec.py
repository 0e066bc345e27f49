"""What a data set is held to: its classes, the shape of its tiles and the range of their values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat.config import DataConfig
from eurosat.data.split import FOLDS
from eurosat.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

EUROSAT_REFERENCE = Path(__file__).parent / "reference" / "eurosat.json"
TOLERANCE = 2.0
"""A class may hold half to twice its share in the reference. EuroSAT's own classes lie within 0.74
and 1.11 of an even deal."""
MIN_TILES = 10
"""Tiles of a class: ten leave two for validation and two for the test under 60/20/20."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The class counts that a data set's own are compared with."""

    classes: Mapping[str, float]
    """Tiles, or any other weight, per class."""
    about: str
    exact: bool = False
    """Whether the counts themselves are expected, and not only the shares."""

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or not all(count > 0 for count in self.classes.values()):
            raise ConfigError(
                f"a reference needs 2 or more classes, each of a count above 0; got "
                f"{dict(self.classes)}"
            )

    def share(self, name: str) -> float:
        """Expected share of a class in all tiles; NaN for a class it does not know."""
        return self.classes.get(name, float("nan")) / sum(self.classes.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelRanges:
    """Lowest and highest value a tile may show, in grey levels of 0..255; saturation a share."""

    mean: tuple[float, float]
    std: tuple[float, float]
    saturation: tuple[float, float]
    texture: float
    """Lowest only."""


# Measured over the 27,000 genuine RGB tiles: mean 41.3 (SeaLake) to 215.9 (Industrial), std
# 1.94 (SeaLake) to 75.6 (Industrial), saturation up to 0.399 (Industrial), texture from 0.74
# (SeaLake_481, calm water); a JPEG of one colour has a texture of 0. The ranges leave the extremes
# a margin.
EUROSAT_RANGES = PixelRanges(
    mean=(30.0, 230.0), std=(1.0, 90.0), saturation=(0.0, 0.5), texture=0.25
)
# Any sensor, any bands: a tile that is black, burnt out or of one colour is of no use to anyone.
# 127.5 is the largest std that values of 0..255 can have. Near-infrared bands, scaled for the look
# of RGB, saturate over vegetation by design, hence the wide range of the share.
ANY_RANGES = PixelRanges(mean=(1.0, 254.0), std=(0.25, 127.5), saturation=(0.0, 0.9), texture=0.25)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """Everything that decides a suite."""

    reference: Reference
    height: int
    """Pixels."""
    width: int
    bands: int
    dtype: str
    """Of the pixels in the files."""
    ranges: PixelRanges
    tolerance: float = TOLERANCE
    """Factor by which a class's share may lie over or under the reference's."""
    near_duplicates: bool = True
    """Whether they were looked for; a survey that met a fault looks for equal pixels alone."""
    folds: tuple[str, ...] = FOLDS

    def __post_init__(self) -> None:
        if not self.tolerance >= 1:
            raise ConfigError(
                f"tolerance is a factor of 1 or more (2 is half to twice); got {self.tolerance}"
            )

    def count_limits(self, name: str) -> tuple[int, int | None]:
        """Fewest and most tiles of a class; None is no limit."""
        if self.reference.exact:
            count = int(self.reference.classes[name])
            return count, count
        return MIN_TILES, None


def build_spec(
    data: DataConfig,
    scan_table: "pd.DataFrame",
    *,
    reference: Path | None = None,
    tolerance: float = TOLERANCE,
) -> DatasetSpec:
    """What the configured source is held to.

    EuroSAT: the counts of its publication. Others: the classes of ``reference``, else an even
    deal over the synthetic classes or over those found in a folder.
    """
    if reference is None and data.source == "eurosat":
        reference = EUROSAT_REFERENCE
    match data.source:
        case "eurosat":
            size, bands = (64, 64), 3
        case "synthetic":
            size, bands = (data.synthetic.size, data.synthetic.size), 3
        case "folder":
            size, bands = _most_common_shape(scan_table)
    return DatasetSpec(
        reference=read_reference(reference) if reference else _even_reference(data, scan_table),
        height=size[0],
        width=size[1],
        bands=bands,
        dtype=data.dtype,
        ranges=ANY_RANGES if data.source == "folder" else EUROSAT_RANGES,
        tolerance=tolerance,
        near_duplicates="group" in scan_table,
    )


def read_reference(file: Path) -> Reference:
    """Read ``{"classes": {name: count}, "about": text, "exact": false}``.

    Raises:
        ConfigError: the file is not there or is none.
    """
    try:
        values = json.loads(file.read_text())
        return Reference(
            classes={str(name): float(count) for name, count in values["classes"].items()},
            about=str(values.get("about", file.name)),
            exact=values.get("exact", False) is True,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{file} is no reference ({type(error).__name__}: {error}): it is JSON of the form "
            '{"classes": {"Forest": 3000, ...}, "about": "where from"}'
        ) from error


def _even_reference(data: DataConfig, table: "pd.DataFrame") -> Reference:
    from eurosat.data.synthetic import CLASSES

    names = CLASSES if data.source == "synthetic" else sorted(table["class"].unique())
    return Reference(
        classes=dict.fromkeys(names, 1.0), about=f"an even deal over {len(names)} classes"
    )


def _most_common_shape(table: "pd.DataFrame") -> tuple[tuple[int, int], int]:
    """The most common height, width and bands among the tiles that could be read."""
    read = table[table["bands"] > 0]
    height, width, bands = read[["height", "width", "bands"]].value_counts().index[0]
    return (int(height), int(width)), int(bands)
