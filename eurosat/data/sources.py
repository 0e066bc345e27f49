"""Sources of tiles: EuroSAT, synthetic tiles, or any folder or zip with a folder per class."""

import hashlib
import io
import stat
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import quote

import numpy as np

from eurosat.config import DataConfig, SyntheticConfig
from eurosat.data import bands, synthetic, terrain
from eurosat.errors import DataError
from eurosat.storage import SCHEME, fetch, is_bucket, mirror, open_store

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
EUROSAT_NAMES = ("EuroSAT_RGB.zip", "EuroSAT.zip", "EuroSAT_RGB", "2750", "eurosat/2750")
"""Names to look for under EUROSAT_ROOT: the archives of zenodo.org/records/7711810 and of the
authors, packed or unpacked; the last is the folder that torchvision's downloader makes."""

MAX_FILE_BYTES = 64_000_000
"""Size of one tile's file, packed or not; the largest tile has 27 MB."""
MAX_ARCHIVE_FILES = 5_000_000
MAX_COMPRESSION_RATIO, UNCHECKED_BYTES = 200, 1_000_000_000
"""A larger archive may unpack to so many times its size; images compress by a few times."""
CONTROL_CHARACTERS = {chr(code) for code in (*range(32), 127)}
ZIP_ERRORS = (OSError, zipfile.BadZipFile, EOFError, ValueError, zlib.error, RuntimeError)
"""Errors that `zipfile` raises when it reads a damaged or encrypted member."""


class Source(Protocol):
    """Tiles by path. A path is ``Class/file``, without any prefix that the archive has."""

    @property
    def name(self) -> str: ...
    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all tiles, sorted."""
        ...

    @property
    def identity(self) -> str:
        """Digest of sizes and times; it changes when the content may have changed."""
        ...

    def read(self, path: str) -> bytes: ...


def open_source(config: DataConfig) -> Source:
    """Open the configured source; it never falls back to another one.

    Raises:
        DataError: there are no tiles, or a class has no images.
    """
    match config.source:
        case "synthetic":
            return SyntheticSource(config.synthetic)
        case "folder":
            return open_path(localise(config.root or "", config.cache_dir), "folder")
        case "eurosat":
            if not config.root:
                return open_path(download_eurosat(config.cache_dir / "download"), "eurosat")
            return open_path(find_eurosat(localise(config.root, config.cache_dir)), "eurosat")


def localise(root: str, cache: Path) -> Path:
    """Return ``root`` as a local folder or zip; one in a bucket is mirrored into the cache.

    Only tiles and zips are fetched, and only those that changed since the last time.

    Raises:
        StorageError: the bucket cannot be read, or a download is incomplete.
    """
    if not is_bucket(root):
        return Path(root).expanduser()
    local = cache / "buckets" / quote(root.removeprefix(SCHEME).strip("/"), safe="")
    if not root.endswith(".zip"):
        mirror(open_store(root), local, (*SUFFIXES, ".zip"))
        if not any(local.iterdir()):
            raise DataError(f"no tiles at {root}: upload them there as Class/file")
        return local
    folder, _, name = root.rpartition("/")
    store = open_store(folder)
    if (info := store.find(name)) is None:
        raise DataError(f"no zip of tiles at {root}: set data.root to a zip or a folder of tiles")
    fetch(store, [info], local)
    return local / name


def open_path(path: Path, name: str) -> Source:
    """Open a folder or a zip of class folders.

    Raises:
        DataError: ``path`` is neither, cannot be read, or a class has no images.
    """
    try:
        if path.is_dir():
            return FolderSource(path, name)
        if path.is_file():
            return ZipSource(path, name)
    except OSError as error:
        raise DataError(
            f"{error.filename or path} cannot be read: {error.strerror}; restore it, or make it "
            "readable"
        ) from error
    raise DataError(f"no folder or zip of tiles at {path}: set data.root (or EUROSAT_ROOT) to one")


def find_eurosat(root: Path) -> Path:
    """Return EuroSAT's archive or the parent of its class folders, at or under ``root``.

    Raises:
        DataError: there is none.
    """
    if root.is_file() or (root / "SeaLake").is_dir():
        return root
    for name in EUROSAT_NAMES:
        if (root / name).exists():
            return root / name
    raise DataError(
        f"no EuroSAT tiles under {root}; searched {', '.join(EUROSAT_NAMES)}; "
        "set EUROSAT_ROOT to the folder or zip that contains them, or unset it to download them"
    )


def download_eurosat(target: Path) -> Path:
    """Return the folder of EuroSAT's tiles; download them (90 MB) if it does not exist yet.

    torchvision downloads the archive and checks its md5.

    Raises:
        DataError: the download failed.
    """
    folder = target / "eurosat" / "2750"
    if not folder.is_dir():
        from torchvision.datasets import EuroSAT

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as partial:
                EuroSAT(partial, download=True)
                target.mkdir(exist_ok=True)
                Path(partial, "eurosat").rename(target / "eurosat")
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"EuroSAT could not be downloaded to {target} ({type(error).__name__}: {error}); "
                "set EUROSAT_ROOT to a folder or zip that contains it, or use data=synthetic"
            ) from error
    return folder


class FolderSource:
    """Tiles in a folder, ``root/Class/file``; images directly in ``root`` are ignored."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self._root = root
        files = {
            f"{folder.name}/{file.name}": file
            for folder in sorted(root.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
            for file in sorted(folder.iterdir())
            if file.suffix.lower() in SUFFIXES and file.name[0] != "."
        }
        folders = (f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
        for path in files:
            _check_name(path, root)
        self.paths = _check_classes(files, folders, root)
        stats = ((path, files[path].stat()) for path in self.paths)
        self.identity = _digest(
            [str(root.resolve())] + [f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in stats]
        )

    def read(self, path: str) -> bytes:
        return read_file(self._root / path)


class ZipSource:
    """Tiles in a zip, read without unpacking it. Reading is thread-safe."""

    def __init__(self, file: Path, name: str) -> None:
        self.name = name
        self._file = file
        try:
            self._zip = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise DataError(f"{file} is not a complete zip ({error}): download it again") from error
        self._check_content(file)
        self._members: dict[str, str] = {}
        for member in self._zip.namelist():
            _check_name(member, file)
            inner = PurePosixPath(member)
            if inner.suffix.lower() in SUFFIXES and len(inner.parts) > 1 and inner.name[0] != ".":
                path = f"{inner.parts[-2]}/{inner.name}"
                if path in self._members:
                    raise DataError(
                        f"{file} contains {path} twice ({self._members[path]}, {member}): "
                        "remove one of them"
                    )
                self._members[path] = member
        self.paths = _check_classes(self._members, (), file)
        status = file.stat()
        self.identity = _digest([str(file.resolve()), f"{status.st_size} {status.st_mtime_ns}"])

    def _check_content(self, file: Path) -> None:
        """Raise DataError if the archive holds too many files, or unpacks to far more bytes."""
        members = self._zip.infolist()
        if len(members) > MAX_ARCHIVE_FILES:
            raise DataError(
                f"{file} has {len(members):,} files, at most {MAX_ARCHIVE_FILES:,} are read: split "
                "it"
            )
        unpacked, size = sum(member.file_size for member in members), file.stat().st_size
        if unpacked > UNCHECKED_BYTES and unpacked > MAX_COMPRESSION_RATIO * size:
            raise DataError(
                f"{file} of {size:,} bytes would unpack to {unpacked:,}; an archive of tiles grows "
                f"at most {MAX_COMPRESSION_RATIO} times: download it again, or unpack it yourself"
            )

    def read(self, path: str) -> bytes:
        member = self._zip.getinfo(self._members[path])
        name = f"{member.filename} in {self._file}"
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{name} is packed by another method than deflate: pack it again")
        _check_file_size(member.file_size, name)
        try:
            with self._zip.open(member) as stream:
                return stream.read(member.file_size + 1)
        except ZIP_ERRORS as error:
            raise DataError(
                f"{self._members[path]} in {self._file} cannot be read ({error}): "
                "download the archive again"
            ) from error


class SyntheticSource:
    """Synthetic tiles, drawn when they are read: JPEG files, or GeoTIFF files with 13 bands."""

    JPEG_QUALITY = 90
    """With this quality the files average 3.4 kB, as EuroSAT's own JPEGs do."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.name = "synthetic"
        self._config = config
        classes = synthetic.CLASSES
        self._tiles: dict[str, tuple[int, int]] = {}
        for number in range(config.tiles):
            index, label = divmod(number, len(classes))
            name = f"{classes[label]}_{index + 1}.{'jpg' if config.bands == 3 else 'tif'}"
            self._tiles[f"{classes[label]}/{name}"] = (label, index)
        self.paths = tuple(sorted(self._tiles))
        # Other code may draw other tiles, so the code is part of the identity.
        files = [Path(str(module.__file__)) for module in (synthetic, terrain, bands)]
        code = b"".join(file.read_bytes() for file in files)
        self.identity = _digest([repr(config), hashlib.sha256(code).hexdigest()])

    def read(self, path: str) -> bytes:
        from PIL import Image

        label, index = self._tiles[path]
        config = self._config
        pixels = synthetic.render(
            label, index, seed=config.seed, size=config.size, difficulty=config.difficulty
        )
        if config.bands != pixels.shape[2]:
            rng = np.random.default_rng([config.seed, label, index])
            return bands.encode_geotiff(bands.bands_from_rgb(pixels, rng))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=self.JPEG_QUALITY)
        return file.getvalue()


def read_file(file: Path) -> bytes:
    """Return the content of a tile's file.

    Raises:
        DataError: it cannot be read, is no regular file, or is larger than a tile's.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{file} is not a regular file: remove it")
        _check_file_size(status.st_size, str(file))
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; restore the file") from error


def _check_name(name: str, source: Path) -> None:
    """Raise DataError for a name that leaves its folder, or breaks a line or a terminal."""
    parts = name.replace("\\", "/").split("/")
    is_outside = ".." in parts or parts[0] == "" or parts[0].endswith(":")
    if is_outside or CONTROL_CHARACTERS & {*name}:
        raise DataError(
            f"{source} holds {name!r}, which leads out of the folder or has control characters: "
            "rename it"
        )


def _check_file_size(size: int, name: str) -> None:
    if size > MAX_FILE_BYTES:
        raise DataError(
            f"{name} has {size:,} bytes; the file of a tile has at most {MAX_FILE_BYTES:,}: cut it "
            "into tiles"
        )


def _check_classes(paths: Iterable[str], folders: Iterable[str], root: Path) -> tuple[str, ...]:
    counts: dict[str, int] = defaultdict(int, dict.fromkeys(folders, 0))
    sorted_paths = tuple(sorted(paths))
    for path in sorted_paths:
        counts[path.split("/")[0]] += 1
    if empty := sorted(name for name, count in counts.items() if not count):
        raise DataError(
            f"no images ({', '.join(SUFFIXES)}) in class folder {root / empty[0]}: "
            "add some or remove the folder"
        )
    if len(counts) < 2:
        raise DataError(
            f"{root} has {len(counts)} class folders with images, at least 2 are needed: "
            "store the tiles as Class/file"
        )
    return sorted_paths


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
