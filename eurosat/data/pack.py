"""Decode every tile once into a pack: a memory-mapped uint8 array that all workers share."""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eurosat.config import DataConfig
from eurosat.data.decode import decode
from eurosat.data.duplicates import find_duplicates, perceptual_hash
from eurosat.data.sources import Source, open_source
from eurosat.data.validation_record import validate_command
from eurosat.errors import DataError
from eurosat.runtime.digests import sha256_of
from eurosat.runtime.hardware import cores
from eurosat.runtime.progress import track

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

PACK_FORMAT = 2
"""Increased when the files of a pack change their meaning; older packs are then rebuilt."""
CHUNK_SIZE = 256
"""Tiles decoded at a time: 3 MB of pixels, small enough for the cache, large enough for numpy."""
SHAPE_SAMPLE = 64
"""Tiles that are read to find the most common shape."""
TILES, TABLE, META = "tiles.npy", "tiles.parquet", "meta.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """Decoded tiles, in the order of their sorted paths."""

    directory: Path
    tiles_NHWC: npt.NDArray[np.uint8]
    """Memory-mapped, read-only."""
    table: "pd.DataFrame"
    """One row per tile: the columns of `DatasetScan.table`, and ``group``, its duplicate group."""
    classes: tuple[str, ...]
    fingerprint: str
    num_exact_duplicates: int
    """Tiles whose pixels equal those of an earlier tile."""
    num_near_duplicates: int
    """Further tiles that look like another tile."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(N,) index into ``classes``."""
        index = {name: number for number, name in enumerate(self.classes)}
        return np.asarray(self.table["class"].map(index), dtype=np.int64)

    @property
    def bands(self) -> int:
        return int(self.tiles_NHWC.shape[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetScan:
    """The result of reading every tile of a source."""

    table: "pd.DataFrame"
    """One row per tile: path, class, height, width, bands, dtype, mean, std, min, max, saturation,
    sha256 (of the file), pixels_sha256, phash, and fault: why the tile cannot be used, or None."""
    fingerprint: str
    pack: Pack | None
    """None if a tile has a fault."""


def dataset_fingerprint(paths: list[str], sha256: list[str]) -> str:
    """Return the sha256 over the sorted pairs of Class/file and the file's sha256."""
    lines = sorted(f"{path} {digest}" for path, digest in zip(paths, sha256, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_pack(config: DataConfig, *, verify: bool = True) -> Pack:
    """Open the pack of the configured source; build it first if there is none.

    ``verify`` compares the pixels with their checksum, which takes 0.3 s per GB.

    Raises:
        DataError: a tile has a fault, the pack is corrupt, or the disk is full.
    """
    scan = scan_source(config, verify=verify)
    if scan.pack is None:
        faults = scan.table["fault"].dropna()
        raise DataError(
            f"{faults.iloc[0]} ({len(faults)} of {len(scan.table)} tiles have a fault; "
            f"`{validate_command(config)}` lists them)"
        )
    return scan.pack


def scan_source(config: DataConfig, *, verify: bool = True) -> DatasetScan:
    """Read every tile of the configured source, or open the pack that an earlier scan built."""
    from filelock import FileLock

    source = open_source(config)
    cache_key = f"{PACK_FORMAT} {config.decode_options} {source.identity}"
    name = f"{source.name}-{hashlib.sha256(cache_key.encode()).hexdigest()[:16]}"
    directory = config.cache_dir / "packs" / name
    if not directory.exists():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(directory.with_suffix(".lock"))  # one builder; the others wait here
            with lock, warnings.catch_warnings():
                # Set here for all decoding threads: tiles need no geographic coordinates.
                warnings.filterwarnings("ignore", "Dataset has no geotransform")
                if not directory.exists():
                    return _build_pack(source, config, directory)
        except OSError as error:
            raise DataError(
                f"cannot write the pack {directory}: {error.strerror or error}; free some disk "
                "space or set EUROSAT_CACHE to another folder"
            ) from error
    pack = load_pack(directory, verify=verify)
    return DatasetScan(table=pack.table, fingerprint=pack.fingerprint, pack=pack)


def load_pack(directory: Path, *, verify: bool = True) -> Pack:
    """Open an existing pack.

    Raises:
        DataError: a file is missing, truncated, or differs from its checksum.
    """
    from pyarrow import parquet

    remedy = f"remove {directory} and run the command again to rebuild it"
    try:
        meta = json.loads((directory / META).read_text())
        for name in (TABLE, TILES):
            file = directory / name
            if (size := file.stat().st_size) != meta["bytes"][name]:
                raise DataError(
                    f"corrupt pack: {file} has {size} bytes, not {meta['bytes'][name]}; {remedy}"
                )
            if verify and sha256_of(file) != meta["sha256"][name]:
                raise DataError(f"corrupt pack: {file} differs from its checksum; {remedy}")
        table = parquet.read_table(directory / TABLE).to_pandas()
        tiles_NHWC = np.load(directory / TILES, mmap_mode="r", allow_pickle=False)
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"corrupt pack: {directory} ({error}); {remedy}") from error
    return Pack(
        directory=directory,
        tiles_NHWC=tiles_NHWC,
        table=table,
        classes=tuple(meta["classes"]),
        fingerprint=meta["fingerprint"],
        num_exact_duplicates=meta["exact"],
        num_near_duplicates=meta["near"],
    )


def _build_pack(source: Source, config: DataConfig, directory: Path) -> DatasetScan:
    """Scan ``source``; if no tile has a fault, publish the pack by renaming its folder."""
    for leftover in directory.parent.glob(f".{directory.name}.*"):  # of a build that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    building = directory.with_name(f".{directory.name}.{os.getpid()}")
    shape = _most_common_shape(source, config)
    _check_disk_space(directory.parent, len(source.paths) * int(np.prod(shape)))
    building.mkdir()
    try:
        table = _write_tiles(source, config, shape, building / TILES)
        fingerprint = dataset_fingerprint(list(table["path"]), list(table["sha256"]))
        if table["fault"].notna().any():
            return DatasetScan(table=table, fingerprint=fingerprint, pack=None)
        _write_table_and_meta(table, fingerprint, source.name, building)
        building.rename(directory)
        log.info("packed %d tiles %s into %s", len(table), shape, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    pack = load_pack(directory, verify=False)
    return DatasetScan(table=pack.table, fingerprint=fingerprint, pack=pack)


def _write_tiles(
    source: Source, config: DataConfig, shape: tuple[int, int, int], file: Path
) -> "pd.DataFrame":
    """Write the pixels of all tiles to an ``.npy`` file; return the table of the tiles.

    The file is written as a stream: on a full disk a memory map would end the process with
    SIGBUS, a stream raises OSError.
    """
    import pandas as pd

    with file.open("wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(source.paths), *shape)}
        np.lib.format.write_array_header_1_0(stream, header)
        rows: list[dict[str, Any]] = []
        for pixels_NHWC, chunk_rows in _decode_tiles(source, config, shape):
            stream.write(pixels_NHWC.tobytes())
            rows += chunk_rows
        stream.flush()
        os.fsync(stream.fileno())
    return pd.DataFrame(rows)


def _write_table_and_meta(
    table: "pd.DataFrame", fingerprint: str, source_name: str, building: Path
) -> None:
    """Add the duplicate groups to the table; write it and the metadata beside the tiles."""
    tiles_NHWC = np.load(building / TILES, mmap_mode="r", allow_pickle=False)
    duplicates = find_duplicates(
        tiles_NHWC, table["pixels_sha256"].to_numpy(), table["phash"].to_numpy(np.uint64)
    )
    table["group"] = duplicates.group
    table.to_parquet(building / TABLE, index=False)
    meta = {
        "format": PACK_FORMAT,
        "source": source_name,
        "classes": sorted(table["class"].unique()),
        "fingerprint": fingerprint,
        "exact": duplicates.num_exact,
        "near": duplicates.num_near,
        "bytes": {name: (building / name).stat().st_size for name in (TILES, TABLE)},
        "sha256": {name: sha256_of(building / name) for name in (TILES, TABLE)},
    }
    (building / META).write_text(json.dumps(meta, indent=1))
    for name in (TABLE, META):
        with (building / name).open("rb") as file:
            os.fsync(file.fileno())


DecodedChunk = tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]
"""(n, H, W, C) pixels, and a row of the table for each tile."""


def _decode_tiles(
    source: Source, config: DataConfig, shape: tuple[int, int, int]
) -> Iterator[DecodedChunk]:
    """Decode all tiles in threads; yield them in order, a chunk at a time."""
    paths = source.paths
    chunks = [paths[start : start + CHUNK_SIZE] for start in range(0, len(paths), CHUNK_SIZE)]

    def decode_chunk(chunk: tuple[str, ...]) -> DecodedChunk:
        return _decode_chunk(source, config, shape, chunk)

    with ThreadPoolExecutor(cores()) as pool:
        decoded = pool.map(decode_chunk, chunks)
        yield from track(decoded, len(chunks), "reading tiles", f"x {CHUNK_SIZE} tiles")


def _decode_chunk(
    source: Source, config: DataConfig, shape: tuple[int, int, int], paths: tuple[str, ...]
) -> DecodedChunk:
    """Decode ``paths``; a tile that cannot be used stays black and has its ``fault`` set."""
    pixels_NHWC = np.zeros((len(paths), *shape), np.uint8)
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        row: dict[str, Any] = {
            "path": path,
            "class": path.split("/")[0],
            "height": 0,
            "width": 0,
            "bands": 0,
            "dtype": config.dtype,
            "sha256": "",
            "pixels_sha256": "",
            "fault": None,
        }
        try:
            data = source.read(path)
            row["sha256"] = hashlib.sha256(data).hexdigest()
            pixels = decode(data, path, **config.decode_options)
            row["height"], row["width"], row["bands"] = pixels.shape
            row["pixels_sha256"] = hashlib.sha256(pixels.tobytes()).hexdigest()
            if pixels.shape != shape:
                raise DataError(
                    f"{path} is {_format_shape(pixels.shape)}, but most tiles are "
                    f"{_format_shape(shape)} (height x width x bands): resize or remove it"
                )
            pixels_NHWC[number] = pixels
        except DataError as error:
            row["fault"] = str(error)
        rows.append(row)
    for row, statistics in zip(rows, _pixel_statistics(pixels_NHWC), strict=True):
        row |= statistics
    return pixels_NHWC, rows


def _pixel_statistics(pixels_NHWC: npt.NDArray[np.uint8]) -> list[dict[str, Any]]:
    flat = pixels_NHWC.reshape(len(pixels_NHWC), -1)
    columns: dict[str, list[Any]] = {
        "mean": flat.mean(axis=1).tolist(),
        "std": flat.std(axis=1).tolist(),
        "min": flat.min(axis=1).tolist(),
        "max": flat.max(axis=1).tolist(),
        "saturation": (flat == 255).mean(axis=1).tolist(),
        "phash": perceptual_hash(pixels_NHWC).tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in rows]


def _most_common_shape(source: Source, config: DataConfig) -> tuple[int, int, int]:
    """Return the most common (height, width, bands) of a sample spread over the source."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    first_fault: DataError | None = None
    for path in source.paths[:: max(1, len(source.paths) // SHAPE_SAMPLE)]:
        try:
            pixels = decode(source.read(path), path, **config.decode_options)
            height, width, bands = pixels.shape
            shapes[height, width, bands] += 1
        except DataError as error:
            first_fault = first_fault or error
    if not shapes:
        assert first_fault is not None
        raise first_fault
    return shapes.most_common(1)[0][0]


def _check_disk_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes * 1.1:
        raise DataError(
            f"the pack needs {needed_bytes / 1e6:,.0f} MB, and {folder} has only "
            f"{free_bytes / 1e6:,.0f} MB free: free some disk space or set EUROSAT_CACHE to "
            "another folder"
        )


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
