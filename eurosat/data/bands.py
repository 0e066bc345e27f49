"""Sentinel-2's thirteen bands, as EuroSAT's multispectral tiles hold them."""

from typing import Any

import numpy as np
import numpy.typing as npt

NAMES = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
"""In the order of the files: B8A last."""
RGB = ("B04", "B03", "B02")
"""Red, green and blue."""
COLOUR_MAX = 2750.0
"""The value that EuroSAT's own JPEGs show as 255."""
MEAN = (
    1354.4,
    1118.2,
    1042.9,
    947.6,
    1199.5,
    2000.0,
    2369.2,
    2296.8,
    732.1,
    12.1,
    1819.0,
    1118.9,
    2594.1,
)
STD = (245.7, 333.0, 395.1, 593.8, 566.4, 861.2, 1086.6, 1118.0, 404.9, 4.8, 1002.6, 761.3, 1231.6)
"""Of EuroSAT's training tiles, reflectance x 10,000: torchgeo 0.8.1, datamodules/eurosat.py."""
CIRRUS = "B10"
"""Sees the upper air, not the ground: 12 +- 5 on EuroSAT's clear tiles."""


def full_scale() -> npt.NDArray[np.float32]:
    """(13,) the value of each band that becomes 255.

    Colours as in EuroSAT's JPEGs; the others mean and three standard deviations, since the near
    infrared would burn out at the colours' scale. Cirrus keeps the colours' scale: at its own it
    would be noise from black to white.
    """
    wide = np.ceil((np.array(MEAN) + 3 * np.array(STD)) / 50) * 50
    common = [name in (*RGB, CIRRUS) for name in NAMES]
    return np.where(common, COLOUR_MAX, wide).astype(np.float32)


def rgb_indices() -> list[int]:
    """Positions of red, green and blue."""
    return [NAMES.index(name) for name in RGB]


def from_colours(
    pixels_HWC: npt.NDArray[np.uint8], rng: np.random.Generator
) -> npt.NDArray[np.uint16]:
    """(H, W, 13) plausible reflectance x 10,000 for a picture in red, green and blue.

    Greener ground is bright in the near infrared, bluer is water and dark there, redder is dry and
    bright in the short-wave infrared: enough for a training on bands to have something to learn.
    """
    red, green, blue = np.moveaxis(pixels_HWC.astype(np.float64) / 255 * COLOUR_MAX, -1, 0)
    plants = np.clip(4 * (green - red) / (green + red + 1) + 0.3, 0, 1)
    water = np.clip(3 * (blue - red) / (blue + red + 1), 0, 1) * (red < 600)
    near = (700 + 0.5 * red + 3800 * plants) * (1 - 0.9 * water)
    edge = 0.6 * red + 0.2 * near + 250
    short = (500 + 1.5 * red) * (1 - 0.3 * plants) * (1 - 0.9 * water)
    made = {
        "B01": 1.05 * blue + 200,
        "B02": blue,
        "B03": green,
        "B04": red,
        "B05": edge,
        "B06": 0.2 * edge + 0.75 * near,
        "B07": 0.97 * near,
        "B08": near,
        "B09": 0.3 * near + 100,
        "B10": np.full_like(red, 12.0),
        "B11": short,
        "B12": 0.65 * short,
        "B8A": 1.08 * near,
    }
    stacked = np.stack([made[name] for name in NAMES], axis=-1)
    noise = rng.normal(0, 0.03, (1, 1, len(NAMES))) + rng.normal(0, 0.02, stacked.shape)
    told: npt.NDArray[np.uint16] = np.clip(stacked * (1 + noise), 0, 65535).astype(np.uint16)
    told[..., rgb_indices()] = np.rint(np.stack([red, green, blue], axis=-1))
    return told


def geotiff(pixels_HWC: npt.NDArray[np.uint16]) -> bytes:
    """A GeoTIFF file of the bands, at an invented place, 10 m a pixel."""
    from rasterio import Affine
    from rasterio.io import MemoryFile

    height, width, bands = pixels_HWC.shape
    form: dict[str, Any] = {"driver": "GTiff", "dtype": "uint16", "compress": "deflate"}
    form["transform"] = Affine(10, 0, 0, 0, -10, 0)
    with MemoryFile() as memory:
        with memory.open(height=height, width=width, count=bands, **form) as tiff:
            tiff.write(np.moveaxis(pixels_HWC, -1, 0))
        return bytes(memory.read())
