"""Objects of Google Cloud Storage as a store: in pieces, tried again, taken up where they broke."""

import contextlib
import hashlib
import io
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat.errors import StorageError
from eurosat.runtime.progress import moving
from eurosat.storage.store import (
    MAKE_ROOM,
    PATIENCE_S,
    PIECE,
    SCHEME,
    UNFINISHED,
    WORKERS,
    Entry,
    Folder,
    checksum,
    on_disk,
)

if TYPE_CHECKING:
    from google.cloud import storage

SILENCE_S = 60.0
"""After which a connection counts as lost: the library's own."""
LOST = (400, 410)
"""What a server answers that lost count of an upload after a broken connection: it begins anew."""


@dataclass(frozen=True)
class Bucket:
    """What lies below a prefix of a bucket; STORAGE_EMULATOR_HOST names another server."""

    name: str
    prefix: str = ""
    """With a slash at its end."""
    patience_s: float = PATIENCE_S

    @property
    def url(self) -> str:
        return f"{SCHEME}{self.name}/{self.prefix}".rstrip("/")

    @cached_property
    def _bucket(self) -> "storage.Bucket":
        from google.cloud.storage import Client

        client = Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT"))
        weakref.finalize(self, client.close)  # its connections
        return client.bucket(self.name)

    @cached_property
    def _patience(self) -> dict[str, Any]:
        from google.cloud.storage.retry import DEFAULT_RETRY

        return {
            "retry": DEFAULT_RETRY.with_timeout(self.patience_s),
            "timeout": min(SILENCE_S, self.patience_s),
        }

    def entries(self) -> list[Entry]:
        with self._explained():
            listed = self._bucket.list_blobs(
                prefix=self.prefix,
                fields="items(name,size,crc32c,generation),nextPageToken",
                **self._patience,
            )
            found = [self._entry(blob) for blob in listed if blob.name[-1] != "/"]
        return sorted(found, key=lambda entry: entry.path)

    def entry(self, path: str) -> Entry | None:
        with self._explained(path):
            blob = self._bucket.get_blob(self.prefix + path, **self._patience)
            if blob is None:
                self._check_it_is_there()
        return None if blob is None else self._entry(blob)

    def download(self, entries: Sequence[Entry], folder: Path) -> None:
        """Also goes on where a download of the same generation was cut short."""
        total = sum(entry.size for entry in entries)
        with moving(f"downloading {self.url}", total) as advance, _pool() as pool:
            coming = [
                (
                    entry,
                    part := Part(folder, entry),
                    [pool.submit(self._piece, entry, at, part, advance) for at in part.pieces()],
                )
                for entry in entries
            ]
            for entry, part, pieces in coming:
                _wait(pieces)
                with on_disk(folder):
                    part.finish(f"{self.url}/{entry.path}")
        with contextlib.suppress(OSError):  # none there, or others'
            (folder / UNFINISHED).rmdir()

    def upload(self, folder: Path, paths: Sequence[str], *, new: bool = False) -> None:
        files = {path: Folder(folder).file(path) for path in paths}
        with on_disk(folder):
            total = sum(file.stat().st_size for file in files.values())
        with moving(f"uploading to {self.url}", total) as advance, _pool() as pool:
            _wait(
                [pool.submit(self._send, path, file, new, advance) for path, file in files.items()]
            )

    def remove(self, paths: Iterable[str]) -> None:
        from google.api_core.exceptions import NotFound

        for path in paths:
            with self._explained(path):
                try:
                    self._bucket.delete_blob(self.prefix + path, **self._patience)
                except NotFound:
                    self._check_it_is_there()

    def _entry(self, blob: "storage.Blob") -> Entry:
        return Entry(
            path=blob.name.removeprefix(self.prefix),
            size=int(blob.size or 0),
            crc32c=blob.crc32c or "",
            generation=int(blob.generation or 0),
        )

    def _piece(self, entry: Entry, at: int, part: "Part", advance: Callable[[int], None]) -> None:
        """Fetch one piece; where the connection breaks, the library asks for the rest of it."""
        end = min(at + PIECE, entry.size)
        if at == end:
            return
        blob = self._bucket.blob(self.prefix + entry.path, generation=entry.generation or None)
        with self._explained(entry.path), part.open(advance) as stream:
            stream.seek(at)
            blob.download_to_file(
                stream, start=at, end=end - 1, raw_download=True, checksum=None, **self._patience
            )
        part.done(at)

    def _send(self, path: str, file: Path, new: bool, advance: Callable[[int], None]) -> None:
        from google.api_core.exceptions import ClientError, PreconditionFailed

        blob = self._bucket.blob(self.prefix + path, chunk_size=PIECE)

        def put() -> None:
            blob.upload_from_file(
                stream,
                rewind=True,
                size=file.stat().st_size,
                checksum="crc32c",
                if_generation_match=0 if new else None,
                **self._patience,
            )

        with self._explained(path), Counted(file, "r", advance) as stream:
            try:
                try:
                    put()
                except ClientError as error:
                    if error.code not in LOST:
                        raise
                    put()
            except PreconditionFailed as error:
                there = self.entry(path)
                if not there or there.crc32c != checksum(file):  # else an answer to us was lost
                    raise StorageError(
                        f"{self.url}/{path} is there already: give it another name"
                    ) from error

    def _check_it_is_there(self) -> None:
        if not self._bucket.exists(**self._patience):
            raise StorageError(
                f"no bucket {SCHEME}{self.name}: make it "
                f"(gcloud storage buckets create {SCHEME}{self.name}) or name another"
            )

    @contextmanager
    def _explained(self, path: str = "") -> Iterator[None]:
        """What Google's library raises, in one line that names the object and the remedy."""
        import requests
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

        try:
            yield
        except (
            GoogleAPIError,
            GoogleAuthError,
            InvalidResponse,
            DataCorruption,
            requests.RequestException,
            OSError,
        ) as error:
            if (reply := getattr(error, "response", None)) is not None:
                reply.close()  # nobody reads the rest of it
            raise StorageError(self._why(f"{self.url}/{path}".rstrip("/"), error)) from error

    def _why(self, what: str, error: Exception) -> str:
        import requests
        from google.api_core import exceptions as api
        from google.auth.exceptions import GoogleAuthError, TransportError
        from google.cloud.storage.exceptions import DataCorruption

        cause = getattr(error, "cause", None) or error
        said = " ".join((getattr(cause, "message", None) or str(cause)).split())[:200]
        match error:
            case api.NotFound():
                with contextlib.suppress(api.GoogleAPIError):  # it may not be asked for
                    self._check_it_is_there()
                return f"{what} is not there: it was removed or written anew; run the command again"
            case (
                api.RetryError()
                | TransportError()
                | requests.RequestException()
                | ConnectionError()
                | TimeoutError()
            ):
                server = os.environ.get("STORAGE_EMULATOR_HOST", "storage.googleapis.com")
                return f"{what} cannot be reached at {server} ({said}): check the network"
            case api.Unauthorized() | api.Forbidden() | GoogleAuthError():
                return (
                    f"{what}: the credentials are refused or missing ({said}); `gcloud auth "
                    "application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, "
                    "with roles/storage.objectUser on the bucket"
                )
            case DataCorruption():
                return f"{what} did not arrive as it was sent ({said}): run the command again"
            case OSError():
                place = error.filename or "this machine"
                return f"{what}: {place}: {error.strerror or error}; {MAKE_ROOM}"
            case _:
                return f"{what}: the server says {said}; try again"


class Part:
    """An object that comes in pieces, and which of them are here: files that outlive a process."""

    def __init__(self, folder: Path, entry: Entry) -> None:
        name = hashlib.sha256(f"{entry.path} {entry.generation}".encode()).hexdigest()[:32]
        self._held = folder / UNFINISHED / name
        self._marks = self._held.with_suffix(".pieces")
        self._entry, self._target = entry, Folder(folder).file(entry.path)

    def pieces(self) -> list[int]:
        """The first bytes of those that are not here."""
        here: set[str] = set()
        if self._entry.generation and self._held.exists() and self._marks.exists():
            here = set(self._marks.read_text().split())
        return [at for at in range(0, self._entry.size or 1, PIECE) if str(at) not in here]

    def open(self, advance: Callable[[int], None]) -> "Counted":
        self._held.parent.mkdir(parents=True, exist_ok=True)
        return Counted(self._held, "r+", advance)

    def done(self, at: int) -> None:
        if self._entry.size > PIECE:
            with self._marks.open("a") as marks:
                marks.write(f"{at}\n")

    def finish(self, url: str) -> None:
        """Put it in its place, if its checksum holds."""
        self.open(lambda _: None).close()  # an empty object has no pieces
        found = checksum(self._held)
        self._marks.unlink(missing_ok=True)
        if found != self._entry.crc32c:
            self._held.unlink()
            raise StorageError(
                f"{url} came with crc32c {found}, and the bucket says {self._entry.crc32c}: "
                "run the command again; if it stays so, upload the file anew"
            )
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._held.replace(self._target)


class Counted(io.FileIO):
    """A file that tells how many bytes pass; made where it is not there."""

    def __init__(self, file: Path, mode: str, advance: Callable[[int], None]) -> None:
        made = os.O_CREAT if "+" in mode else 0
        super().__init__(file, mode, opener=lambda name, flags: os.open(name, flags | made, 0o666))
        self._advance = advance

    def read(self, size: int | None = -1, /) -> bytes:
        read = super().read(-1 if size is None else size)
        self._advance(len(read or b""))
        return read or b""

    def write(self, piece: Any, /) -> int:
        left = memoryview(piece)
        while left:
            left = left[super().write(left) or 0 :]
        self._advance(len(piece))
        return len(piece)


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing new once something has failed."""
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _wait(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()
