"""TIFF files whose headers promise far more pixels than the file has bytes."""

import io
import struct
import zlib
from typing import Any

import numpy as np

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR = 256, 257, 258, 259, 262, 277, 284
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 322, 323, 324, 325
DEFLATE = 8
ENTRY_BYTES, HEADER_BYTES = 12, 14


def tiff_with_large_block(side: int, block_side: int) -> bytes:
    """Return a grey image of ``side`` pixels, in one internal tile of ``block_side`` pixels.

    A decoder allocates the whole internal tile, however small the image is.
    """
    block = zlib.compress(bytes(block_side * block_side))
    tags = {WIDTH: side, HEIGHT: side, BITS: 8, COMPRESSION: DEFLATE, PHOTOMETRIC: 1, SAMPLES: 1}
    tags |= {PLANAR: 1, TILE_WIDTH: block_side, TILE_HEIGHT: block_side, TILE_BYTES: len(block)}
    tags[TILE_OFFSETS] = HEADER_BYTES + ENTRY_BYTES * (len(tags) + 1)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + block


def sparse_tiff(bands: int, side: int, dtype: str = "uint16", **layout: object) -> bytes:
    """Return a GeoTIFF in which no pixel was written: all read as 0.

    ``layout`` are options of GDAL, such as ``tiled`` and ``blockxsize``.
    """
    from rasterio import Affine
    from rasterio.io import MemoryFile

    options: dict[str, Any] = {"height": side, "width": side, "count": bands, "dtype": dtype}
    options |= {"SPARSE_OK": True, "transform": Affine(10, 0, 0, 0, -10, 0), **layout}
    with MemoryFile() as memory:
        memory.open(driver="GTiff", compress="deflate", **options).close()
        return bytes(memory.read())


def eps() -> bytes:
    """Return an EPS picture, which Pillow renders with Ghostscript."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def image(kind: str, side: int = 16) -> bytes:
    """Return a picture of noise in a format of Pillow."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
