"""The pack: every tile decoded once into a memory-mapped uint8 array that all workers share."""

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
from eurosat.errors import DataError
from eurosat.runtime.hardware import cores
from eurosat.runtime.progress import track

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised whenever the files of a pack change their meaning; an older pack is built anew."""
CHUNK = 256
"""Tiles decoded at a time: 3 MB of pixels, small enough for the cache, large enough for numpy."""
TILES, TABLE, META = "tiles.npy", "tiles.parquet", "meta.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """Tiles in the order of their sorted paths."""

    directory: Path
    tiles_NHWC: npt.NDArray[np.uint8]
    """Memory-mapped, read-only."""
    table: "pd.DataFrame"
    """One row per tile: the columns of `DatasetScan.table`, and ``group``: its duplicates."""
    classes: tuple[str, ...]
    fingerprint: str
    num_exact_duplicates: int
    """Tiles whose pixels equal an earlier tile's."""
    num_near_duplicates: int
    """Further tiles that look like another one."""

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
    """What reading every tile of a source has shown."""

    table: "pd.DataFrame"
    """path, class, height, width, bands, dtype, mean, std, min, max, saturation, sha256 (file),
    pixels_sha256, phash, fault: why a tile cannot be used, or None."""
    fingerprint: str
    pack: Pack | None
    """None where a tile has a fault."""


def dataset_fingerprint(paths: list[str], sha256: list[str]) -> str:
    """sha256 over sorted (Class/file, sha256 of the file)."""
    lines = sorted(f"{path} {digest}" for path, digest in zip(paths, sha256, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_pack(config: DataConfig, *, verify: bool = True) -> Pack:
    """The pack of the configured source, built first where there is none.

    ``verify`` reads the pixels once (0.3 s a GB) against their checksum.

    Raises:
        DataError: a tile has a fault, the pack is corrupt, or the disk is full.
    """
    survey = scan_source(config, verify=verify)
    if survey.pack is None:
        faults = survey.table["fault"].dropna()
        raise DataError(
            f"{faults.iloc[0]} ({len(faults)} of {len(survey.table)} tiles have a fault; "
            "`python -m expectations.validate` lists them)"
        )
    return survey.pack


def scan_source(config: DataConfig, *, verify: bool = True) -> DatasetScan:
    """Read every tile of the configured source, or the pack that an earlier survey left."""
    from filelock import FileLock

    source = open_source(config)
    reading = f"{FORMAT} {config.decode_options} {source.identity}"
    name = f"{source.name}-{hashlib.sha256(reading.encode()).hexdigest()[:16]}"
    directory = config.cache_dir / "packs" / name
    if not directory.exists():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(directory.with_suffix(".lock"))  # one builder; the others wait here
            with lock, warnings.catch_warnings():
                # Set here for all reading threads: tiles need not know their place on Earth.
                warnings.filterwarnings("ignore", "Dataset has no geotransform")
                if not directory.exists():
                    return _build(source, config, directory)
        except OSError as error:
            raise DataError(
                f"cannot write the pack {directory}: {error.strerror or error}; make room there "
                "or set EUROSAT_CACHE to another folder"
            ) from error
    pack = load(directory, verify=verify)
    return DatasetScan(table=pack.table, fingerprint=pack.fingerprint, pack=pack)


def load(directory: Path, *, verify: bool = True) -> Pack:
    """Open a pack that was built.

    Raises:
        DataError: a file is missing, cut short, or differs from its checksum.
    """
    import pandas as pd

    remedy = f"remove {directory} and run the command again to rebuild it"
    try:
        meta = json.loads((directory / META).read_text())
        for file in (TABLE, TILES):
            if (size := (directory / file).stat().st_size) != meta["bytes"][file]:
                raise DataError(
                    f"corrupt pack: {directory / file} has {size} bytes, "
                    f"not {meta['bytes'][file]}; {remedy}"
                )
            if verify and _sha256(directory / file) != meta["sha256"][file]:
                raise DataError(
                    f"corrupt pack: {directory / file} differs from its checksum; {remedy}"
                )
        table = pd.read_parquet(directory / TABLE)
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


def _build(source: Source, config: DataConfig, directory: Path) -> DatasetScan:
    """Scan ``source``; where no tile has a fault, publish the pack by one rename."""
    import pandas as pd

    for left in directory.parent.glob(f".{directory.name}.*"):  # a killed build's
        shutil.rmtree(left, ignore_errors=True)
    building = directory.with_name(f".{directory.name}.{os.getpid()}")
    shape = _usual_shape(source, config)
    _check_room(directory.parent, len(source.paths) * int(np.prod(shape)))
    building.mkdir()
    try:
        with (building / TILES).open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(source.paths), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            rows = [
                row for chunk in _read_all(source, config, shape, file) for row in chunk
            ]  # not through a memory map: there a full disk is a SIGBUS, here an OSError
            file.flush()
            os.fsync(file.fileno())
        table = pd.DataFrame(rows)
        fingerprint = dataset_fingerprint(list(table["path"]), list(table["sha256"]))
        if table["fault"].notna().any():
            return DatasetScan(table=table, fingerprint=fingerprint, pack=None)
        tiles_NHWC = np.load(building / TILES, mmap_mode="r")
        found = find_duplicates(
            tiles_NHWC, table["pixels_sha256"].to_numpy(), table["phash"].to_numpy(np.uint64)
        )
        table["group"] = found.group
        table.to_parquet(building / TABLE, index=False)
        meta = {
            "format": FORMAT,
            "source": source.name,
            "classes": sorted(table["class"].unique()),
            "fingerprint": fingerprint,
            "exact": found.exact,
            "near": found.near,
            "bytes": {name: (building / name).stat().st_size for name in (TILES, TABLE)},
            "sha256": {name: _sha256(building / name) for name in (TILES, TABLE)},
        }
        (building / META).write_text(json.dumps(meta, indent=1))
        for name in (TABLE, META):
            with (building / name).open("rb") as file:
                os.fsync(file.fileno())
        building.rename(directory)
        log.info("packed %d tiles %s into %s", len(table), shape, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    pack = load(directory, verify=False)
    return DatasetScan(table=pack.table, fingerprint=fingerprint, pack=pack)


def _read_all(
    source: Source, config: DataConfig, shape: tuple[int, int, int], file: Any
) -> Iterator[list[dict[str, Any]]]:
    """Write the pixels of every tile and yield their rows, a chunk at a time, in order."""
    paths = source.paths
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]

    def read(chunk: tuple[str, ...]) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
        return _read_chunk(source, config, shape, chunk)

    with ThreadPoolExecutor(cores()) as pool:
        for pixels_NHWC, rows in track(
            pool.map(read, chunks), len(chunks), "reading tiles", f"x {CHUNK} tiles"
        ):
            file.write(pixels_NHWC.tobytes())
            yield rows


def _read_chunk(
    source: Source, config: DataConfig, shape: tuple[int, int, int], paths: tuple[str, ...]
) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
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
                    f"{path} is {_by(pixels.shape)} where the other tiles are {_by(shape)} "
                    "(height x width x bands): cut or remove it"
                )
            pixels_NHWC[number] = pixels
        except DataError as error:
            row["fault"] = str(error)
        rows.append(row)
    for row, facts in zip(rows, _pixel_facts(pixels_NHWC), strict=True):
        row |= facts
    return pixels_NHWC, rows


def _pixel_facts(pixels_NHWC: npt.NDArray[np.uint8]) -> list[dict[str, Any]]:
    flat = pixels_NHWC.reshape(len(pixels_NHWC), -1)
    columns: dict[str, list[Any]] = {
        "mean": flat.mean(axis=1).tolist(),
        "std": flat.std(axis=1).tolist(),
        "min": flat.min(axis=1).tolist(),
        "max": flat.max(axis=1).tolist(),
        "saturation": (flat == 255).mean(axis=1).tolist(),
        "phash": perceptual_hash(pixels_NHWC).tolist(),
    }
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _usual_shape(source: Source, config: DataConfig) -> tuple[int, int, int]:
    """The most common (height, width, bands) among up to 64 tiles spread over the source."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    first_fault: DataError | None = None
    for path in source.paths[:: max(1, len(source.paths) // 64)]:
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


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.1:
        raise DataError(
            f"the pack needs {needed / 1e6:,.0f} MB and {folder} has {free / 1e6:,.0f} MB free: "
            "make room there or set EUROSAT_CACHE to another folder"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
