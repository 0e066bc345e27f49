"""File bytes to uint8 pixels."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from eurosat.data.bands import COLOUR_MAX, NAMES, RGB, rgb_indices
from eurosat.data.bands import full_scale as of_thirteen_bands
from eurosat.errors import DataError

MAX_SIDE = 1024
"""Pixels. A tile is small (EuroSAT: 64); anything larger is a scene or a decompression bomb."""

PNG_MAGIC, PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24
"""The byte that tells the bits per channel (PNG specification, IHDR)."""
TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
EIGHT_BIT_MODES = {"L": None, "RGB": None, "RGBA": None, "P": "RGB", "1": "L", "CMYK": "RGB"}
"""Pillow modes read as they are (None) or converted; all others hold more than 8 bits."""


def decode(
    data: bytes, path: str, *, dtype: str, reflectance_max: float | None, bands: str = "all"
) -> npt.NDArray[np.uint8]:
    """(H, W, C) pixels; ``uint16`` values become ``clip(value / full scale) * 255``.

    The full scale is ``reflectance_max``, or where that is None each band's own
    (`eurosat.data.bands`). ``bands='rgb'`` takes the colours of thirteen bands.

    Raises:
        DataError: unreadable, truncated, too large, or of another data type than was said.
    """
    try:
        pixels: Any = _geotiff(data, path) if data[:4] in TIFF_MAGIC else _picture(data, path)
    except DataError:
        raise
    except Exception as error:  # decoders raise anything on foreign bytes
        raise DataError(
            f"{path} is unreadable or truncated ({' '.join(str(error).split())[:120]}): "
            "replace or remove the file"
        ) from error
    if pixels.dtype != np.dtype(dtype):
        raise DataError(
            f"{path} holds {pixels.dtype} pixels where {dtype} was said: "
            f"set data.dtype={pixels.dtype} or convert the file"
        )
    if dtype == "uint16":
        scale = 255 / full_scale(pixels.shape[2], reflectance_max)
        pixels = np.rint(np.clip(pixels * scale, 0, 255))
    if bands == "rgb" and pixels.shape[2] != len(RGB):
        if pixels.shape[2] != len(NAMES):
            raise DataError(
                f"{path} has {pixels.shape[2]} bands, its colours are known among "
                f"{len(NAMES)} alone: say data.bands=all"
            )
        pixels = pixels[:, :, rgb_indices()]
    return np.asarray(pixels, dtype=np.uint8)


def full_scale(bands: int, reflectance_max: float | None) -> npt.NDArray[np.float32]:
    """(bands,) the value of each that becomes 255."""
    if reflectance_max is None and bands == len(NAMES):
        return of_thirteen_bands()
    return np.full(bands, reflectance_max or COLOUR_MAX, np.float32)


def _picture(data: bytes, path: str) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        _check_size(image.height, image.width, path)
        if data.startswith(PNG_MAGIC) and data[PNG_DEPTH] == 16 and image.mode in EIGHT_BIT_MODES:
            raise DataError(  # Pillow cuts the lower bytes off without a word
                f"{path} is a PNG of 16 bits a channel, which cannot be read whole: "
                "convert it to 8 bits or to a GeoTIFF"
            )
        if image.mode not in EIGHT_BIT_MODES:
            pixels = np.asarray(image)  # "I;16" and the like: the caller names the dtype
            pixels = pixels.astype(np.uint16) if image.mode.startswith("I") else pixels
        else:
            target = EIGHT_BIT_MODES[image.mode]
            pixels = np.asarray(image.convert(target) if target else image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _geotiff(data: bytes, path: str) -> npt.NDArray[Any]:
    import rasterio
    from rasterio.io import MemoryFile

    with rasterio.Env(CPL_LOG="/dev/null"), MemoryFile(data) as file, file.open() as tiff:
        _check_size(tiff.height, tiff.width, path)
        bands_CHW: npt.NDArray[Any] = tiff.read()
    return np.moveaxis(bands_CHW, 0, -1)


def _check_size(height: int, width: int, path: str) -> None:
    if max(height, width) > MAX_SIDE:
        raise DataError(
            f"{path} is {height}x{width} pixels, over the {MAX_SIDE} of a tile: cut it into tiles"
        )
