"""Where artifacts and archives lie: a folder, or a bucket below a prefix.

All of what `deploy` asks of an object store stands here.
"""

import base64
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar, cast
from urllib.parse import unquote, urlsplit

from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import atomic, progress

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Bucket

T = TypeVar("T")
PART = 8 << 20
"""Bytes of an upload or a download that are held in memory."""
PATIENCE_S = 60.0
PARALLEL = 8
"""Objects on their way at once: most are small, and each waits for an answer."""


class Changed(Exception):
    """An object is no longer the one that was listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    key: str
    """Below the place, with slashes."""
    size: int
    """Bytes."""
    generation: str | None
    """Tells this content from what is written there later."""


class Place(Protocol):
    @property
    def uri(self) -> str: ...

    def listed(self) -> Iterator[Stored]: ...

    def find(self, key: str) -> Stored | None: ...

    def read(self, stored: Stored, into: IO[bytes]) -> None:
        """All of one content. Raises Changed, after which ``into`` may hold anything."""

    def write(self, key: str, content: BinaryIO) -> None:
        """Whole or not at all, whatever stood there."""

    def create(self, key: str, write: Callable[[BinaryIO], T]) -> T:
        """The same, for what is streamed: what ``write`` raises leaves nothing under the key."""

    def open(self, stored: Stored) -> BinaryIO:
        """One content, from anywhere in it."""

    def copy(self, key: str, to: "Place") -> None:
        """Into a place that stands beside."""

    def delete(self, key: str) -> None: ...

    def beside(self, ending: str) -> "Place":
        """A place of its own whose name has ``ending`` appended."""


def place(uri: str, named: str) -> Place:
    """``uri`` is a folder, or ``gs://bucket/prefix``; ``named`` says where it is set.

    Raises:
        ConfigError: it is neither, or the bucket is not there.
    """
    scheme, _, rest = uri.partition("://")
    if not rest:
        return Folder(Path(uri).absolute())
    if scheme == "file":
        return Folder(Path(unquote(urlsplit(uri).path)))
    if scheme != "gs":
        raise ConfigError(f"{named}={uri} is neither a folder nor gs://bucket/prefix")
    name, _, prefix = rest.partition("/")
    with explained(uri):
        from google.api_core.exceptions import NotFound
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud.storage import Client

        try:
            bucket = Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT")).bucket(name)
        except DefaultCredentialsError as error:
            raise ConfigError(
                f"{named}={uri} needs a key of Google Cloud: run `gcloud auth application-default "
                "login`, or set STORAGE_EMULATOR_HOST for an emulator"
            ) from error
        try:  # whoever may use objects alone may not ask whether there is the bucket
            next(iter(bucket.list_blobs(max_results=1, timeout=PATIENCE_S)), None)
        except NotFound as error:
            raise ConfigError(f"{named}={uri}: there is no bucket {name}: make it first") from error
    return Prefix(bucket, prefix.strip("/"))


def spooled(fill: Callable[[IO[bytes]], object]) -> IO[bytes]:
    """What ``fill`` writes, to be read: in memory while it is small, else in a nameless file."""
    spool = tempfile.SpooledTemporaryFile(max_size=PART)  # noqa: SIM115 - the reader closes it
    try:
        fill(spool)
    except BaseException:
        spool.close()
        raise
    spool.seek(0)
    return spool


def each(work: Callable[[str], None], keys: Sequence[str], label: str) -> None:
    """A few at once, with progress."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in progress.track(pool.map(work, keys), len(keys), label, "artifacts"):
            pass


def empty(place: Place) -> None:
    each(place.delete, [stored.key for stored in place.listed()], f"emptying {place.uri}")


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Raises TrackingError in place of what Google's client and its connections raise."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
    from requests import RequestException

    try:
        yield
    except (
        GoogleAPIError,
        GoogleAuthError,
        InvalidResponse,
        DataCorruption,
        RequestException,
    ) as error:
        raise TrackingError(f"{uri} cannot be used: {error}") from error


def _raise(error: OSError) -> None:
    """Of a folder that cannot be read: left out, it would be missing from a backup."""
    if not isinstance(error, FileNotFoundError):
        raise TrackingError(f"{error.filename} cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of this machine's."""

    root: Path

    @property
    def uri(self) -> str:
        return str(self.root)

    def listed(self) -> Iterator[Stored]:
        for at, _, names in os.walk(self.root, onerror=_raise):
            for name in names:
                if found := self.find((Path(at) / name).relative_to(self.root).as_posix()):
                    yield found

    def find(self, key: str) -> Stored | None:
        try:
            status = (self.root / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Stored(key=key, size=status.st_size, generation=_generation(status))

    def read(self, stored: Stored, into: IO[bytes]) -> None:
        try:
            with (self.root / stored.key).open("rb") as content:
                shutil.copyfileobj(content, into, PART)
        except FileNotFoundError as error:
            raise Changed(stored.key) from error
        if self.find(stored.key) != stored:  # written to, or replaced, meanwhile
            raise Changed(stored.key)

    def write(self, key: str, content: BinaryIO) -> None:
        self.create(key, lambda out: shutil.copyfileobj(content, out, PART))

    def create(self, key: str, write: Callable[[BinaryIO], T]) -> T:
        file = self.root / key
        file.parent.mkdir(parents=True, exist_ok=True)
        kept: list[T] = []
        atomic.atomic_write(file, lambda out: kept.append(write(out)))
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name too is on the disk
        finally:
            os.close(folder)
        return kept[0]

    def open(self, stored: Stored) -> BinaryIO:
        return (self.root / stored.key).open("rb")

    def copy(self, key: str, to: Place) -> None:
        with (self.root / key).open("rb") as content:
            to.write(key, content)

    def delete(self, key: str) -> None:
        file = self.root / key
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another file stands there
            for folder in file.relative_to(self.root).parents:
                (self.root / folder).rmdir()

    def beside(self, ending: str) -> "Folder":
        return Folder(self.root.with_name(self.root.name + ending))


def _generation(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_mtime_ns}"


@dataclass(frozen=True, slots=True)
class Prefix:
    """The objects of a bucket of Google's whose names begin with ``prefix`` and a slash."""

    bucket: "Bucket"
    prefix: str
    """Empty for the whole bucket."""

    @property
    def uri(self) -> str:
        return f"gs://{self.bucket.name}/{self.prefix}".rstrip("/")

    def listed(self) -> Iterator[Stored]:
        with explained(self.uri):
            for blob in self.bucket.list_blobs(prefix=self._name(""), timeout=PATIENCE_S):
                if not blob.name.endswith("/"):  # a console's idea of a folder
                    yield self._stored(blob)

    def find(self, key: str) -> Stored | None:
        with explained(self.uri):
            blob = self.bucket.get_blob(self._name(key), timeout=PATIENCE_S)
        return self._stored(blob) if blob else None

    def read(self, stored: Stored, into: IO[bytes]) -> None:
        from google.api_core.exceptions import NotFound

        with explained(f"{self.uri}/{stored.key}"):
            try:  # as it is stored, which is what its size is of; its CRC32C is checked
                self._blob(stored).download_to_file(
                    into, raw_download=True, checksum="crc32c", timeout=PATIENCE_S
                )
            except NotFound as error:
                raise Changed(stored.key) from error

    def write(self, key: str, content: BinaryIO) -> None:
        with explained(f"{self.uri}/{key}"):  # a retry writes the same bytes
            self.bucket.blob(self._name(key), chunk_size=PART).upload_from_file(
                content, checksum="crc32c", timeout=PATIENCE_S
            )

    def create(self, key: str, write: Callable[[BinaryIO], T]) -> T:
        blob = self.bucket.blob(self._name(key))
        with explained(f"{self.uri}/{key}"):
            # An upload that is not closed never becomes an object.
            opened = blob.open(
                "wb", chunk_size=PART, if_generation_match=0, checksum="crc32c", timeout=PATIENCE_S
            )
            with opened as out:
                summed = _Summed(out)
                made = write(cast("BinaryIO", summed))
            blob.reload(timeout=PATIENCE_S)
            if (blob.size, blob.crc32c) != (summed.size, summed.crc32c):
                blob.delete(timeout=PATIENCE_S)
                raise TrackingError(
                    f"{self.uri}/{key} arrived altered and was removed: say it again"
                )
        return made

    def open(self, stored: Stored) -> BinaryIO:
        return cast("BinaryIO", self._blob(stored).open("rb", chunk_size=PART))

    def copy(self, key: str, to: Place) -> None:
        assert isinstance(to, Prefix)
        source, target = self.bucket.blob(self._name(key)), to.bucket.blob(to._name(key))
        token: str | None = None
        with explained(f"{to.uri}/{key}"):
            while True:  # a large one is copied in parts
                token, _, _ = target.rewrite(source, token=token, timeout=PATIENCE_S)
                if token is None:
                    return

    def delete(self, key: str) -> None:
        from google.api_core.exceptions import NotFound

        with explained(f"{self.uri}/{key}"), contextlib.suppress(NotFound):
            self.bucket.blob(self._name(key)).delete(timeout=PATIENCE_S)

    def beside(self, ending: str) -> "Prefix":
        return Prefix(self.bucket, self.prefix + ending)

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _blob(self, stored: Stored) -> "Blob":
        return self.bucket.blob(self._name(stored.key), generation=int(stored.generation or 0))

    def _stored(self, blob: "Blob") -> Stored:
        key = str(blob.name)[len(self._name("")) :]
        return Stored(key=key, size=int(blob.size), generation=str(blob.generation))


class _Summed:
    """Passes on what is written, and keeps its size and CRC32C as Google tells it."""

    def __init__(self, out: Any) -> None:
        import google_crc32c

        self._out, self._sum, self.size = out, google_crc32c.Checksum(), 0

    def write(self, data: bytes) -> int:
        self._out.write(data)
        self._sum.update(data)
        self.size += len(data)
        return len(data)

    @property
    def crc32c(self) -> str:
        return base64.b64encode(self._sum.digest()).decode()
