"""Files in a folder or in a bucket of Google Cloud Storage, behind one small protocol."""

import base64
import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from eurosat.errors import StorageError
from eurosat.runtime import atomic
from eurosat.runtime.progress import moving

SCHEME = "gs://"
PIECE = 8 << 20
"""Bytes of a file that travel in one request: Google wants multiples of 256 KiB and advises 8 MiB
or more (cloud.google.com/storage/docs/performing-resumable-uploads)."""
WORKERS = 8
"""Requests under way at once: as many as `google.cloud.storage.transfer_manager` has."""
PATIENCE_S = 120.0
"""How long a request is tried again while the network or the server fails: the library's own."""
UNFINISHED = ".unfinished"
"""The folder, in the one that is downloaded to, of what is not whole yet."""

MAKE_ROOM = "make room there, set its rights, or name another folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file in a store."""

    path: str
    """Below the store's root, with slashes."""
    size: int
    """Bytes."""
    crc32c: str
    """Base64 of its four bytes, the highest first, as Google's API tells it."""
    generation: int = 0
    """Changes whenever an object is written; 0 in a folder."""


class Store(Protocol):
    """Files below one root. Every method raises `StorageError` for what goes wrong there."""

    @property
    def url(self) -> str: ...

    def entries(self) -> list[Entry]:
        """Every file, sorted by path."""
        ...

    def entry(self, path: str) -> Entry | None:
        """None where there is no such file."""
        ...

    def download(self, entries: Sequence[Entry], folder: Path) -> None:
        """To the same paths below ``folder``: each by one rename, once its checksum holds."""
        ...

    def upload(self, folder: Path, paths: Sequence[str], *, new: bool = False) -> None:
        """From the same paths below ``folder``; with ``new``, what is there is not replaced."""
        ...

    def remove(self, paths: Iterable[str]) -> None:
        """What is gone already is no error."""
        ...


def is_bucket(place: str | None) -> bool:
    return (place or "").startswith(SCHEME)


def open_store(root: str, *, patience_s: float = PATIENCE_S) -> Store:
    """A folder; or ``gs://BUCKET/PREFIX``, a bucket or what lies below a prefix of it."""
    if not is_bucket(root):
        return Folder(Path(root).expanduser())
    from eurosat.storage.gcs import Bucket

    name, _, prefix = root.removeprefix(SCHEME).partition("/")
    if not name:
        raise StorageError(f"{root} names no bucket: say gs://BUCKET or gs://BUCKET/PREFIX")
    prefix = prefix.strip("/")
    return Bucket(name, f"{prefix}/" if prefix else "", patience_s)


def mirror(store: Store, folder: Path, suffixes: tuple[str, ...] = ()) -> int:
    """Make ``folder`` hold the files of ``store`` (those with ``suffixes``), and no others.

    Returns the number of files that came: what has the right checksum is left as it is.
    """
    with _alone(folder):
        entries = [
            entry
            for entry in store.entries()
            if not suffixes or PurePosixPath(entry.path).suffix.lower() in suffixes
        ]
        here = Folder(folder)
        here.remove({one.path for one in here.entries()} - {one.path for one in entries})
        came = _fetch(store, entries, folder)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # of objects written anew since
    return came


def bring(store: Store, entries: Sequence[Entry], folder: Path) -> int:
    """Download those that are not in ``folder`` with the right checksum; returns their number."""
    with _alone(folder):
        return _fetch(store, entries, folder)


def _fetch(store: Store, entries: Sequence[Entry], folder: Path) -> int:
    here = Folder(folder)
    with ThreadPoolExecutor(WORKERS) as pool:
        pairs = pool.map(lambda entry: (entry, here.entry(entry.path)), entries)
        changed = [one for one, had in pairs if had is None or had.crc32c != one.crc32c]
    store.download(changed, folder)
    return len(changed)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder, and let one process at a time fill it: the others find it done."""
    from filelock import FileLock

    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        yield


def checksum(file: Path) -> str:
    """crc32c of a file, as an `Entry` has it."""
    from google_crc32c import Checksum

    made = Checksum()
    with file.open("rb") as opened:
        for piece in iter(lambda: opened.read(1 << 20), b""):
            made.update(piece)
    return base64.b64encode(made.digest()).decode()


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder as a store. Names that begin with a dot are not seen."""

    root: Path

    @property
    def url(self) -> str:
        return str(self.root)

    def entries(self) -> list[Entry]:
        if not self.root.is_dir():
            raise StorageError(f"no folder {self.root}: make it, or name another")
        paths = []
        for at, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name[0] != "."]
            inner = Path(at).relative_to(self.root)
            paths += [(inner / name).as_posix() for name in names if name[0] != "."]
        with ThreadPoolExecutor(WORKERS) as pool:
            return [found for found in pool.map(self.entry, sorted(paths)) if found]

    def entry(self, path: str) -> Entry | None:
        file = self.file(path)
        with on_disk(file):
            if not file.is_file():
                return None
            return Entry(path=path, size=file.stat().st_size, crc32c=checksum(file))

    def download(self, entries: Sequence[Entry], folder: Path) -> None:
        total = sum(entry.size for entry in entries)
        with moving(f"copying from {self.root}", total) as advance:
            for entry in entries:
                self._copy(self.file(entry.path), Folder(folder).file(entry.path), advance)

    def upload(self, folder: Path, paths: Sequence[str], *, new: bool = False) -> None:
        for path in paths if new else ():
            if self.file(path).exists():
                raise StorageError(f"{self.file(path)} is there already: give it another name")
        given = [Folder(folder).file(path) for path in paths]
        with on_disk(folder):
            total = sum(file.stat().st_size for file in given)
        with moving(f"copying to {self.root}", total) as advance:
            for path, file in zip(paths, given, strict=True):
                self._copy(file, self.file(path), advance)

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            file = self.file(path)
            with on_disk(file):
                file.unlink(missing_ok=True)
            for above in [one for one in file.parents if self.root in one.parents]:
                with contextlib.suppress(OSError):  # it holds others
                    above.rmdir()

    def file(self, path: str) -> Path:
        inner = PurePosixPath(path)
        if inner.is_absolute() or ".." in inner.parts or not inner.parts:
            raise StorageError(f"{path!r} leads out of {self.root}: rename it")
        return self.root / inner

    @staticmethod
    def _copy(source: Path, target: Path, advance: Callable[[int], None]) -> None:
        with on_disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as opened:

                def write(file: Any) -> None:
                    for piece in iter(lambda: opened.read(PIECE), b""):
                        file.write(piece)
                        advance(len(piece))

                atomic.atomic_write(target, write)


@contextmanager
def on_disk(place: Path) -> Iterator[None]:
    """What this machine's file system refuses, in one line."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or place}: {error.strerror or error}; {MAKE_ROOM}"
        ) from error
