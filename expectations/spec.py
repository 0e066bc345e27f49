"""The specification of a data set: its classes, tile shape and ranges of pixel values."""

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
"""Factor: a class may have half to twice its share in the reference. EuroSAT's own classes have
0.74 to 1.11 times an equal share."""
MIN_TILES = 10
"""Tiles per class: of ten, the protocol 60/20/20 gives two to validation and two to the test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The expected class counts, or shares, of a data set."""

    classes: Mapping[str, float]
    """Number of tiles per class, or any other weight."""
    about: str
    """Origin of the counts, for people."""
    exact: bool = False
    """Whether the counts must match exactly, and not only the shares."""

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or not all(count > 0 for count in self.classes.values()):
            raise ConfigError(
                f"a reference needs 2 or more classes, each with a count above 0; got "
                f"{dict(self.classes)}"
            )

    def share(self, name: str) -> float:
        """Return the expected share of a class in all tiles; NaN for an unknown class."""
        return self.classes.get(name, float("nan")) / sum(self.classes.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelRanges:
    """Lowest and highest allowed value per tile: grey levels in 0..255; saturation is a share."""

    mean: tuple[float, float]
    std: tuple[float, float]
    saturation: tuple[float, float]
    texture: float
    """Lowest value; there is no highest."""


# Measured over the 27,000 genuine RGB tiles: mean 41.3 (SeaLake) to 215.9 (Industrial), std
# 1.94 (SeaLake) to 75.6 (Industrial), saturation up to 0.399 (Industrial), texture from 0.74
# (SeaLake_481, calm water); a JPEG of one colour has a texture of 0. The ranges leave a margin
# around these extremes.
EUROSAT_RANGES = PixelRanges(
    mean=(30.0, 230.0), std=(1.0, 90.0), saturation=(0.0, 0.5), texture=0.25
)
# For any sensor and bands: a tile that is black, overexposed or of one colour is useless. 127.5 is
# the largest std that values of 0..255 can have. Near-infrared bands with a scale made for RGB
# saturate over vegetation, hence the wide range of saturation.
ANY_RANGES = PixelRanges(mean=(1.0, 254.0), std=(0.25, 127.5), saturation=(0.0, 0.9), texture=0.25)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """All values from which a suite is built."""

    reference: Reference
    height: int
    """Pixels."""
    width: int
    bands: int
    dtype: str
    """Data type of the pixels in the files."""
    ranges: PixelRanges
    tolerance: float = TOLERANCE
    """Factor by which the share of a class may exceed or fall below the reference."""
    near_duplicates: bool = True
    """Whether near duplicates were searched; a scan that found a fault compares pixels only."""
    folds: tuple[str, ...] = FOLDS

    def __post_init__(self) -> None:
        if not self.tolerance >= 1:
            raise ConfigError(
                f"tolerance must be a factor of 1 or more, such as 2; got {self.tolerance}"
            )

    def count_limits(self, name: str) -> tuple[int, int | None]:
        """Return the smallest and largest allowed number of tiles of a class; None is no limit."""
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
    """Return the specification of the configured source.

    Expected classes are those of ``reference``. Without it: the published counts for EuroSAT,
    else equal shares of the synthetic classes, or of the classes in the folder.
    """
    if reference is None and data.source == "eurosat":
        reference = EUROSAT_REFERENCE
    match data.source:
        case "eurosat":
            size, bands = (64, 64), 3
        case "synthetic":
            size = (data.synthetic.size, data.synthetic.size)
            bands = 3 if data.bands == "rgb" else data.synthetic.bands
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
        ConfigError: the file is missing or has another form.
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
            f"{file} is not a reference ({type(error).__name__}: {error}): write it as JSON, "
            '{"classes": {"Forest": 3000, ...}, "about": "where from"}'
        ) from error


def _even_reference(data: DataConfig, table: "pd.DataFrame") -> Reference:
    from eurosat.data.synthetic import CLASSES

    names = CLASSES if data.source == "synthetic" else sorted(table["class"].unique())
    return Reference(
        classes=dict.fromkeys(names, 1.0), about=f"equal shares of {len(names)} classes"
    )


def _most_common_shape(table: "pd.DataFrame") -> tuple[tuple[int, int], int]:
    """Return ((height, width), bands) of most of the tiles that could be read."""
    readable = table[table["bands"] > 0]
    height, width, bands = readable[["height", "width", "bands"]].value_counts().index[0]
    return (int(height), int(width)), int(bands)
