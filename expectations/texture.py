"""Facts about tiles that the scan does not record: texture, and the dtype of undecoded files."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eurosat.config import DataConfig
from eurosat.data.decode import decode
from eurosat.data.pack import Pack
from eurosat.data.sources import Source
from eurosat.errors import DataError
from eurosat.runtime.progress import track

if TYPE_CHECKING:
    import pandas as pd

CHUNK_SIZE = 256
CANDIDATE_DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "float32", "float64")


def texture(tiles_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return (N,) standard deviations of each tile's most varied band, in grey levels.

    It is 0 for a tile of one colour. The std over all bands together, which the scan records, is
    not: it also measures the differences between the bands.
    """
    flat_NPC = tiles_NHWC.reshape(len(tiles_NHWC), -1, tiles_NHWC.shape[-1])
    bands_NCP = np.ascontiguousarray(flat_NPC.transpose(0, 2, 1), dtype=np.float32)
    largest_std: npt.NDArray[np.float32] = bands_NCP.std(axis=2).max(axis=1)
    return largest_std


def pack_textures(pack: Pack) -> npt.NDArray[np.float32]:
    """Return the (N,) texture of each tile of a pack; 2 s for 27,000."""
    starts = range(0, len(pack.table), CHUNK_SIZE)
    chunks = (texture(pack.tiles_NHWC[start : start + CHUNK_SIZE]) for start in starts)
    unit = f"x {CHUNK_SIZE} tiles"
    return np.concatenate(list(track(chunks, len(starts), "measuring texture", unit)))


def source_textures(
    scan_table: "pd.DataFrame", data: DataConfig, source: Source
) -> npt.NDArray[np.float32]:
    """Return the (N,) texture of each tile where faults prevented a pack; NaN for faulty tiles."""

    def measure() -> Iterator[float]:
        for path, fault in zip(scan_table["path"], scan_table["fault"], strict=True):
            if fault is not None:
                yield float("nan")
                continue
            pixels_HWC = decode(source.read(path), path, **data.decode_options)
            yield float(texture(pixels_HWC[None])[0])

    total = len(scan_table)
    return np.fromiter(track(measure(), total, "measuring texture", "tiles"), np.float32, total)


def detect_dtype(source: Source, path: str) -> str | None:
    """Return the data type of the pixels in a file, or None if it cannot be decoded at all."""
    for dtype in CANDIDATE_DTYPES:
        try:
            decode(source.read(path), path, dtype=dtype, reflectance_max=1.0)
        except DataError:
            continue
        return dtype
    return None
