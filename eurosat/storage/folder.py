"""A folder of this machine as an object store."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from eurosat.errors import StorageError
from eurosat.runtime import atomic
from eurosat.runtime.progress import moving
from eurosat.storage.checksums import file_crc32c
from eurosat.storage.object_store import CHUNK_BYTES, ObjectChanged, ObjectInfo, ObjectStore, T

REMEDY = "make room there, set its permissions, or name another folder"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise StorageError, in one line that names the file and a remedy, for every OSError."""
    try:
        yield
    except OSError as error:
        name, reason = error.filename or path, error.strerror or error
        raise StorageError(f"{name}: {reason}; {REMEDY}") from error


@dataclass(frozen=True, slots=True)
class FolderStore:
    """The files below a folder. A missing folder is an empty store."""

    root: Path
    include_hidden: bool = False
    """Whether files and folders whose names begin with a dot are listed."""

    @property
    def url(self) -> str:
        return str(self.root)

    def list_objects(self) -> list[ObjectInfo]:
        keys = []
        for path, folders, names in os.walk(self.root, onerror=_refuse_unreadable):
            folders[:] = [name for name in folders if self._is_listed(name)]
            inner = Path(path).relative_to(self.root)
            keys += [(inner / name).as_posix() for name in names if self._is_listed(name)]
        return [info for key in sorted(keys) if (info := self.find(key))]

    def find(self, key: str) -> ObjectInfo | None:
        file = self.file(key)
        with disk_errors(file):
            if not file.is_file():
                return None
            try:
                status = file.stat()
            except FileNotFoundError:  # deleted since
                return None
        generation = f"{status.st_ino}-{status.st_mtime_ns}"
        return ObjectInfo(key=key, size=status.st_size, generation=generation)

    def checksum(self, info: ObjectInfo) -> str:
        file = self.file(info.key)
        with disk_errors(file):
            return file_crc32c(file)

    def read(self, info: ObjectInfo, into: IO[bytes]) -> None:
        with self.open(info) as stream:
            shutil.copyfileobj(stream, into, CHUNK_BYTES)
        if self.find(info.key) != info:
            raise _changed(self.file(info.key))

    @contextmanager
    def open(self, info: ObjectInfo) -> Iterator[BinaryIO]:
        file = self.file(info.key)
        try:
            with disk_errors(file):
                stream = file.open("rb")
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _changed(file) from error
            raise
        with stream:
            yield stream

    def write(self, key: str, content: BinaryIO) -> None:
        content.seek(0)
        self._replace(key, lambda out: shutil.copyfileobj(content, out, CHUNK_BYTES))

    def create(self, key: str, write: Callable[[BinaryIO], T]) -> T:
        self._refuse_existing(key)
        return self._replace(key, write)

    def copy(self, key: str, to: ObjectStore) -> None:
        file = self.file(key)
        with disk_errors(file):
            stream = file.open("rb")
        with stream:
            to.write(key, stream)

    def delete(self, key: str) -> None:
        """Delete a file, and the folders that it leaves empty, the root too."""
        file = self.file(key)
        with disk_errors(file):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds other files
            for folder in file.relative_to(self.root).parents:
                (self.root / folder).rmdir()

    def sibling(self, suffix: str) -> "FolderStore":
        return replace(self, root=self.root.with_name(self.root.name + suffix))

    def download(self, objects: Sequence[ObjectInfo], folder: Path) -> None:
        target = FolderStore(folder)
        total = sum(info.size for info in objects)
        with moving(f"copying from {self.root}", total) as advance:
            for info in objects:
                target._copy_in(info.key, self.file(info.key), advance)

    def upload(self, folder: Path, keys: Sequence[str], *, new: bool = False) -> None:
        for key in keys if new else ():
            self._refuse_existing(key)
        files = {key: FolderStore(folder).file(key) for key in keys}
        with disk_errors(folder):
            total = sum(file.stat().st_size for file in files.values())
        with moving(f"copying to {self.root}", total) as advance:
            for key, file in files.items():
                self._copy_in(key, file, advance)

    def file(self, key: str) -> Path:
        """Return the path of a key.

        Raises:
            StorageError: the key leads out of the folder.
        """
        path = PurePosixPath(key)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise StorageError(f"{key!r} leads out of {self.root}: rename it")
        return self.root / path

    def _is_listed(self, name: str) -> bool:
        return self.include_hidden or not name.startswith(".")

    def _refuse_existing(self, key: str) -> None:
        if self.file(key).exists():
            raise StorageError(f"{self.file(key)} exists already: give it another name")

    def _copy_in(self, key: str, source: Path, advance: Callable[[int], None]) -> None:
        def write(out: BinaryIO) -> None:
            with source.open("rb") as stream:
                for chunk in iter(lambda: stream.read(CHUNK_BYTES), b""):
                    out.write(chunk)
                    advance(len(chunk))

        self._replace(key, write)

    def _replace(self, key: str, write: Callable[[BinaryIO], T]) -> T:
        """Write a file atomically, and force its name to the disk as well."""
        file = self.file(key)
        results: list[T] = []
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic.atomic_write(file, lambda out: results.append(write(out)))
            folder = os.open(file.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return results[0]


def _changed(file: Path) -> ObjectChanged:
    return ObjectChanged(f"{file} was deleted or overwritten meanwhile: run the command again")


def _refuse_unreadable(error: OSError) -> None:
    """Raise StorageError for a folder that cannot be listed: its files must not go missing."""
    if not isinstance(error, FileNotFoundError):
        reason = error.strerror or error
        raise StorageError(f"{error.filename} cannot be read: {reason}") from error
