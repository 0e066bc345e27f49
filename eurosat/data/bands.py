"""The thirteen bands of Sentinel-2, as in EuroSAT's multispectral tiles."""

from typing import Any

import numpy as np
import numpy.typing as npt

NAMES = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
"""Band names in the order of the files: B8A is last."""
RGB = ("B04", "B03", "B02")
"""Red, green and blue."""
RGB_FULL_SCALE = 2750.0
"""The value (reflectance x 10,000) that EuroSAT's own JPEGs show as 255."""
MEANS = (
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
"""Mean of each band over EuroSAT's training tiles, reflectance x 10,000; source: torchgeo 0.8.1,
datamodules/eurosat.py."""
STDS = (245.7, 333.0, 395.1, 593.8, 566.4, 861.2, 1086.6, 1118.0, 404.9, 4.8, 1002.6, 761.3, 1231.6)
"""Standard deviation of each band, from the same source."""
CIRRUS = "B10"
"""This band sees the upper air, not the ground: 12 +- 5 on EuroSAT's clear tiles."""


def band_full_scales() -> npt.NDArray[np.float32]:
    """Return the (13,) values that become 255, one for each band.

    Red, green and blue use the scale of EuroSAT's JPEGs. The other bands use mean plus three
    standard deviations, because near infrared would saturate at the scale of the colours. Cirrus
    keeps the scale of the colours: at its own scale it would be noise from black to white.
    """
    wide = np.ceil((np.array(MEANS) + 3 * np.array(STDS)) / 50) * 50
    uses_rgb_scale = [name in (*RGB, CIRRUS) for name in NAMES]
    return np.where(uses_rgb_scale, RGB_FULL_SCALE, wide).astype(np.float32)


def rgb_indices() -> list[int]:
    """Return the positions of red, green and blue in `NAMES`."""
    return [NAMES.index(name) for name in RGB]


def bands_from_rgb(
    pixels_HWC: npt.NDArray[np.uint8], rng: np.random.Generator
) -> npt.NDArray[np.uint16]:
    """Return (H, W, 13) plausible reflectance x 10,000 for an RGB image.

    Greener ground is bright in the near infrared; bluer ground is water and dark there; redder
    ground is dry and bright in the short-wave infrared. That is enough for a training on thirteen
    bands to learn from.
    """
    red, green, blue = np.moveaxis(pixels_HWC.astype(np.float64) / 255 * RGB_FULL_SCALE, -1, 0)
    plants = np.clip(4 * (green - red) / (green + red + 1) + 0.3, 0, 1)
    water = np.clip(3 * (blue - red) / (blue + red + 1), 0, 1) * (red < 600)
    near_infrared = (700 + 0.5 * red + 3800 * plants) * (1 - 0.9 * water)
    red_edge = 0.6 * red + 0.2 * near_infrared + 250
    short_wave = (500 + 1.5 * red) * (1 - 0.3 * plants) * (1 - 0.9 * water)
    reflectance = {
        "B01": 1.05 * blue + 200,
        "B02": blue,
        "B03": green,
        "B04": red,
        "B05": red_edge,
        "B06": 0.2 * red_edge + 0.75 * near_infrared,
        "B07": 0.97 * near_infrared,
        "B08": near_infrared,
        "B09": 0.3 * near_infrared + 100,
        "B10": np.full_like(red, 12.0),
        "B11": short_wave,
        "B12": 0.65 * short_wave,
        "B8A": 1.08 * near_infrared,
    }
    stacked = np.stack([reflectance[name] for name in NAMES], axis=-1)
    noise = rng.normal(0, 0.03, (1, 1, len(NAMES))) + rng.normal(0, 0.02, stacked.shape)
    values: npt.NDArray[np.uint16] = np.clip(stacked * (1 + noise), 0, 65535).astype(np.uint16)
    values[..., rgb_indices()] = np.rint(np.stack([red, green, blue], axis=-1))
    return values


def encode_geotiff(pixels_HWC: npt.NDArray[np.uint16]) -> bytes:
    """Return the bands as a GeoTIFF file, at an invented place, 10 m per pixel."""
    from rasterio import Affine
    from rasterio.io import MemoryFile

    height, width, bands = pixels_HWC.shape
    profile: dict[str, Any] = {"driver": "GTiff", "dtype": "uint16", "compress": "deflate"}
    profile["transform"] = Affine(10, 0, 0, 0, -10, 0)
    with MemoryFile() as memory:
        with memory.open(height=height, width=width, count=bands, **profile) as tiff:
            tiff.write(np.moveaxis(pixels_HWC, -1, 0))
        return bytes(memory.read())
