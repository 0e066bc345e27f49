"""Decode image files into uint8 pixels."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from eurosat.data.bands import NAMES, RGB, RGB_FULL_SCALE, band_full_scales, rgb_indices
from eurosat.errors import DataError

MAX_TILE_SIDE = 1024
"""Pixels. A tile is small (EuroSAT: 64); a larger image is a scene or a decompression bomb."""

MAX_BANDS = 512
MAX_VALUES = 16 * MAX_TILE_SIDE**2
"""Pixels times bands: thirteen bands of the largest tile, and some."""
MAX_JPEG_SCANS = 50
"""A progressive JPEG usually has 10 scans; each takes as long to decode as a whole image."""
FORMATS = ("JPEG", "PNG")
"""Formats that Pillow reads; TIFF files are read by GDAL. Others may start programs."""
JPEG_MAGIC, JPEG_SCAN_MARKER = b"\xff\xd8\xff", b"\xff\xda"
PNG_MAGIC, PNG_BIT_DEPTH_OFFSET = b"\x89PNG\r\n\x1a\n", 24
"""First bytes of a PNG, and the offset of its bits per channel (PNG specification, IHDR)."""
TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
EIGHT_BIT_MODES = {"L": None, "RGB": None, "RGBA": None, "P": "RGB", "1": "L", "CMYK": "RGB"}
"""Pillow modes of 8 bits, and the mode that each is converted to (None: no conversion)."""


def decode(
    data: bytes, path: str, *, dtype: str, reflectance_max: float | None, bands: str = "all"
) -> npt.NDArray[np.uint8]:
    """Return (H, W, C) pixels; ``uint16`` values become ``clip(value / full scale) * 255``.

    The full scale is ``reflectance_max``; where that is None, each band has its own
    (`eurosat.data.bands`). ``bands='rgb'`` selects red, green and blue from thirteen bands.

    Raises:
        DataError: the file is unreadable, truncated, too large, or not of data type ``dtype``.
    """
    try:
        pixels: Any = (
            _read_geotiff(data, path, dtype) if data[:4] in TIFF_MAGIC else _read_image(data, path)
        )
    except DataError:
        raise
    except Exception as error:  # decoders raise anything on foreign bytes
        raise DataError(
            f"{path} is unreadable or truncated ({' '.join(str(error).split())[:120]}): "
            "replace or remove the file"
        ) from error
    _check_dtype(str(pixels.dtype), dtype, path)
    if dtype == "uint16":
        scale = 255 / full_scales(pixels.shape[2], reflectance_max)
        pixels = np.rint(np.clip(pixels * scale, 0, 255))
    if bands == "rgb" and pixels.shape[2] != len(RGB):
        if pixels.shape[2] != len(NAMES):
            raise DataError(
                f"{path} has {pixels.shape[2]} bands, but data.bands=rgb needs {len(RGB)} or "
                f"{len(NAMES)}: set data.bands=all"
            )
        pixels = pixels[:, :, rgb_indices()]
    return np.asarray(pixels, dtype=np.uint8)


def full_scales(bands: int, reflectance_max: float | None) -> npt.NDArray[np.float32]:
    """Return the (bands,) values that become 255."""
    if reflectance_max is None and bands == len(NAMES):
        return band_full_scales()
    return np.full(bands, reflectance_max or RGB_FULL_SCALE, np.float32)


def _read_image(data: bytes, path: str) -> Any:
    from PIL import Image

    if not data.startswith((JPEG_MAGIC, PNG_MAGIC)):
        raise DataError(f"{path} is no JPEG, PNG or TIFF file: convert it, or remove it")
    if data.startswith(JPEG_MAGIC) and data.count(JPEG_SCAN_MARKER) > MAX_JPEG_SCANS:
        raise DataError(f"{path} is a JPEG of over {MAX_JPEG_SCANS} scans: save it again")
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path} has far more pixels than a tile, which has at most {MAX_TILE_SIDE} per side: "
            "cut it into tiles"
        ) from error
    with opened as image:
        _check_size(image.height, image.width, path)
        if getattr(image, "is_animated", False):
            raise DataError(f"{path} holds several images: save one of them")
        is_16_bit_png = data.startswith(PNG_MAGIC) and data[PNG_BIT_DEPTH_OFFSET] == 16
        if is_16_bit_png and image.mode in EIGHT_BIT_MODES:
            raise DataError(  # Pillow would drop the lower bytes silently
                f"{path} is a colour PNG with 16 bits per channel, which would lose its lower "
                "8 bits: convert it to 8 bits or to a GeoTIFF"
            )
        if image.mode not in EIGHT_BIT_MODES:
            pixels = np.asarray(image)  # such as "I;16"; the caller checks the dtype
            pixels = pixels.astype(np.uint16) if image.mode.startswith("I") else pixels
        else:
            target_mode = EIGHT_BIT_MODES[image.mode]
            pixels = np.asarray(image.convert(target_mode) if target_mode else image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _read_geotiff(data: bytes, path: str, dtype: str) -> npt.NDArray[Any]:
    import rasterio
    from rasterio.io import MemoryFile

    with rasterio.Env(CPL_LOG="/dev/null"), MemoryFile(data) as file, file.open() as tiff:
        _check_size(tiff.height, tiff.width, path)
        _check_bands(tiff.count, tiff.height * tiff.width, path)
        for height, width in tiff.block_shapes:
            if max(height, width) > MAX_TILE_SIDE:
                raise DataError(
                    f"{path} is stored in internal tiles of {height}x{width} pixels, over "
                    f"{MAX_TILE_SIDE} per side: save it again in smaller ones"
                )
        for stored in tiff.dtypes:
            _check_dtype(stored, dtype, path)
        bands_CHW: npt.NDArray[Any] = tiff.read()
    return np.moveaxis(bands_CHW, 0, -1)


def _check_dtype(stored: str, expected: str, path: str) -> None:
    if stored != expected:
        raise DataError(
            f"{path} holds {stored} pixels, but data.dtype is {expected}: convert this file, "
            f"or set data.dtype={stored} if all files are like it"
        )


def _check_bands(bands: int, pixels: int, path: str) -> None:
    if bands > MAX_BANDS:
        raise DataError(
            f"{path} has {bands} bands, at most {MAX_BANDS} bands are read: select some"
        )
    if bands * pixels > MAX_VALUES:
        raise DataError(
            f"{path} has {bands} bands of {pixels:,} pixels; a tile has at most {MAX_VALUES:,} "
            "values: cut it into smaller tiles"
        )


def _check_size(height: int, width: int, path: str) -> None:
    if max(height, width) > MAX_TILE_SIDE:
        raise DataError(
            f"{path} is {height}x{width} pixels; a tile has at most {MAX_TILE_SIDE} per side: "
            "cut it into tiles"
        )
