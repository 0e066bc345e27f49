"""Where tiles come from: EuroSAT, procedural tiles, or any class-per-folder directory or zip."""

import hashlib
import io
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
from eurosat.data import bands, synthetic
from eurosat.errors import DataError
from eurosat.storage import SCHEME, fetch, is_bucket, mirror, open_store

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
EUROSAT_NAMES = ("EuroSAT_RGB.zip", "EuroSAT.zip", "EuroSAT_RGB", "2750", "eurosat/2750")
"""Names under EUROSAT_ROOT: the archives of zenodo.org/records/7711810 and the upstream one,
unpacked or not; the last is where torchvision's downloader leaves them."""


class Source(Protocol):
    """Tiles by path. A path is ``Class/file``, whatever prefix the archive has."""

    @property
    def name(self) -> str: ...
    @property
    def paths(self) -> tuple[str, ...]:
        """Sorted."""
        ...

    @property
    def identity(self) -> str:
        """Cheap digest that changes when the content may have changed: sizes and times."""
        ...

    def read(self, path: str) -> bytes: ...


def open_source(config: DataConfig) -> Source:
    """The source that the configuration names, and no other.

    Raises:
        DataError: nothing is there, or a class has no images.
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
    """``root`` as a folder or zip of this machine: what is in a bucket is mirrored in the cache.

    Only what changed there since is fetched. Tiles and zips are; other files are left alone.

    Raises:
        StorageError: the bucket cannot be read, or something did not arrive whole.
    """
    if not is_bucket(root):
        return Path(root).expanduser()
    place = cache / "buckets" / quote(root.removeprefix(SCHEME).strip("/"), safe="")
    if not root.endswith(".zip"):
        mirror(open_store(root), place, (*SUFFIXES, ".zip"))
        if not any(place.iterdir()):
            raise DataError(f"no tiles at {root}: lay them out there as Class/file")
        return place
    folder, _, name = root.rpartition("/")
    store = open_store(folder)
    if (info := store.find(name)) is None:
        raise DataError(f"no zip of tiles at {root}: set data.root to one, or to a folder of them")
    fetch(store, [info], place)
    return place / name


def open_path(path: Path, name: str) -> Source:
    """A folder or a zip of class folders."""
    try:
        if path.is_dir():
            return FolderSource(path, name)
        if path.is_file():
            return ZipSource(path, name)
    except OSError as error:
        raise DataError(
            f"{error.filename or path} cannot be read: {error.strerror}; restore it or its rights"
        ) from error
    raise DataError(f"no folder or zip of tiles at {path}: set data.root to one (or EUROSAT_ROOT)")


def find_eurosat(root: Path) -> Path:
    """EuroSAT's archive or class folders at or under ``root``."""
    if root.is_file() or (root / "SeaLake").is_dir():
        return root
    for place in EUROSAT_NAMES:
        if (root / place).exists():
            return root / place
    raise DataError(
        f"no EuroSAT tiles under {root}: looked for {', '.join(EUROSAT_NAMES)}; "
        "set EUROSAT_ROOT to the folder or zip that holds them, or unset it to download them"
    )


def download_eurosat(target: Path) -> Path:
    """Download through torchvision, which checks the archive's md5; about 90 MB, once."""
    folder = target / "eurosat" / "2750"
    if not folder.is_dir():
        from torchvision.datasets import EuroSAT

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
                EuroSAT(unfinished, download=True)
                Path(unfinished, "eurosat").rename(_make_folder(target) / "eurosat")
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"EuroSAT could not be downloaded to {target} ({type(error).__name__}: {error}); "
                "set EUROSAT_ROOT to a folder or zip that holds it, or take data=synthetic"
            ) from error
    return folder


def _make_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


class FolderSource:
    """``root/Class/file``; images that lie directly in ``root`` belong to no class."""

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
        self.paths = _check_classes(files, folders, root)
        stats = ((path, files[path].stat()) for path in self.paths)
        self.identity = _digest(
            [str(root.resolve())] + [f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in stats]
        )

    def read(self, path: str) -> bytes:
        file = self._root / path
        try:
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}; restore it") from error


class ZipSource:
    """Tiles inside a zip, read without unpacking; reads may come from several threads."""

    def __init__(self, file: Path, name: str) -> None:
        self.name = name
        self._file = file
        try:
            self._zip = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise DataError(f"{file} is not a whole zip ({error}): download it again") from error
        self._members: dict[str, str] = {}
        for member in self._zip.namelist():
            inner = PurePosixPath(member)
            if inner.suffix.lower() in SUFFIXES and len(inner.parts) > 1 and inner.name[0] != ".":
                path = f"{inner.parts[-2]}/{inner.name}"
                if path in self._members:
                    raise DataError(f"{file} holds {path} twice ({self._members[path]}, {member})")
                self._members[path] = member
        self.paths = _check_classes(self._members, (), file)
        stat = file.stat()
        self.identity = _digest([str(file.resolve()), f"{stat.st_size} {stat.st_mtime_ns}"])

    def read(self, path: str) -> bytes:
        try:
            return self._zip.read(self._members[path])
        except (
            OSError,
            zipfile.BadZipFile,
            EOFError,
            ValueError,
            zlib.error,
            RuntimeError,
        ) as error:
            raise DataError(
                f"{self._members[path]} in {self._file} cannot be read ({error}): "
                "download the archive again"
            ) from error


class SyntheticSource:
    """Procedural tiles as files that are made when read: JPEG, or GeoTIFF of thirteen bands."""

    JPEG_QUALITY = 90
    """EuroSAT's own JPEGs average 3.4 kB; so do these."""

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
        modules = (Path(str(module.__file__)).read_bytes() for module in (synthetic, bands))
        generator = b"".join(modules)  # another generator, other tiles
        self.identity = _digest([repr(config), hashlib.sha256(generator).hexdigest()])

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


def _check_classes(paths: Iterable[str], folders: Iterable[str], root: Path) -> tuple[str, ...]:
    counts: dict[str, int] = defaultdict(int, dict.fromkeys(folders, 0))
    kept = tuple(sorted(paths))
    for path in kept:
        counts[path.split("/")[0]] += 1
    if empty := sorted(name for name, count in counts.items() if not count):
        raise DataError(
            f"no images ({', '.join(SUFFIXES)}) in class folder {root / empty[0]}: "
            "add some or remove the folder"
        )
    if len(counts) < 2:
        raise DataError(
            f"{root} holds {len(counts)} class folders with images, at least 2 are needed: "
            "lay tiles out as Class/file"
        )
    return kept


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
