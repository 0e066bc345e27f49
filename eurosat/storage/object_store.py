"""The protocol of an object store: files below one root, in a folder or in a bucket."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Protocol, TypeVar

from eurosat.errors import StorageError

T = TypeVar("T")
CHUNK_BYTES = 8 << 20
"""Bytes of an object in one request: Google wants multiples of 256 KiB and advises 8 MiB or more
(cloud.google.com/storage/docs/performing-resumable-uploads)."""
WORKERS = 8
"""Objects transferred in parallel: as many as `google.cloud.storage.transfer_manager` has."""
PATIENCE_S = 120.0
"""How long a failing request is retried: the default of Google's library."""


class ObjectChanged(StorageError):
    """An object was deleted or overwritten after it was listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """What a store lists about one object."""

    key: str
    """Path below the store's root, with slashes."""
    size: int
    """Bytes."""
    generation: str
    """Differs for every content that is written under the key."""
    crc32c: str | None = None
    """Base64 of the checksum's four bytes, big-endian, as Google's API gives it. None in a folder,
    where it is computed on request: see `ObjectStore.checksum`."""


class ObjectStore(Protocol):
    """Objects below one root. Every method raises StorageError if the store refuses or fails."""

    @property
    def url(self) -> str: ...

    def list_objects(self) -> list[ObjectInfo]:
        """Return every object, sorted by key."""
        ...

    def find(self, key: str) -> ObjectInfo | None: ...

    def checksum(self, info: ObjectInfo) -> str:
        """Return the object's crc32c in Base64. A folder reads the whole file for it."""
        ...

    def read(self, info: ObjectInfo, into: IO[bytes]) -> None:
        """Write the listed content to ``into``.

        Raises:
            ObjectChanged: the object is not the listed one any more; ``into`` may hold anything.
        """
        ...

    def open(self, info: ObjectInfo) -> AbstractContextManager[BinaryIO]:
        """Open the listed content as a seekable stream."""
        ...

    def write(self, key: str, content: BinaryIO) -> None:
        """Write or replace an object atomically, from the start of a seekable stream."""
        ...

    def create(self, key: str, write: Callable[[BinaryIO], T]) -> T:
        """Stream a new object through ``write`` and return its result.

        If ``write`` raises or the process is killed, no object exists under the key. An existing
        object is never replaced.
        """
        ...

    def copy(self, key: str, to: "ObjectStore") -> None:
        """Copy an object to the same key of another store of the same kind."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object. A missing one is no error."""
        ...

    def sibling(self, suffix: str) -> "ObjectStore":
        """Return the store whose root has ``suffix`` appended to its name."""
        ...

    def download(self, objects: Sequence[ObjectInfo], folder: Path) -> None:
        """Download objects to the same paths below ``folder``.

        Each file appears by one rename, after its checksum was verified.
        """
        ...

    def upload(self, folder: Path, keys: Sequence[str], *, new: bool = False) -> None:
        """Upload files from the same paths below ``folder``.

        With ``new``, an object that exists already is an error and stays as it is.
        """
        ...
