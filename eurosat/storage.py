"""Files in a folder or in a bucket of Google Cloud Storage, behind one small protocol."""

import base64
import contextlib
import hashlib
import io
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from eurosat import durable
from eurosat.errors import StorageError
from eurosat.progress import moving

if TYPE_CHECKING:
    from google.cloud import storage

SCHEME = "gs://"
PIECE = 8 << 20
"""Bytes of a file that travel in one request: Google wants multiples of 256 KiB and advises 8 MiB
or more (cloud.google.com/storage/docs/performing-resumable-uploads)."""
WORKERS = 8
"""Requests under way at once: as many as `google.cloud.storage.transfer_manager` has."""
PATIENCE_S = 120.0
"""How long a request is tried again while the network or the server fails: the library's own."""
SILENCE_S = 60.0
"""After which a connection counts as lost: the library's own."""
LOST = (400, 410)
"""What a server answers that lost count of an upload after a broken connection: it begins anew."""
UNFINISHED = ".unfinished"
"""The folder, in the one that is downloaded to, of what is not whole yet."""


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
    name, _, prefix = root.removeprefix(SCHEME).partition("/")
    if not name:
        raise StorageError(f"{root} names no bucket: say gs://BUCKET or gs://BUCKET/PREFIX")
    prefix = prefix.strip("/")
    return Bucket(name, f"{prefix}/" if prefix else "", patience_s)


def mirror(store: Store, folder: Path, suffixes: tuple[str, ...] = ()) -> int:
    """Make ``folder`` hold the files of ``store`` (those with ``suffixes``), and no others.

    Returns the number of files that came: what has the right checksum is left as it is.
    """
    from filelock import FileLock

    with _local(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    with lock:  # the others wait, and find it done
        entries = [
            entry
            for entry in store.entries()
            if not suffixes or PurePosixPath(entry.path).suffix.lower() in suffixes
        ]
        here = Folder(folder)
        here.remove({one.path for one in here.entries()} - {one.path for one in entries})
        came = bring(store, entries, folder)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # of objects written anew since
    return came


def bring(store: Store, entries: Iterable[Entry], folder: Path) -> int:
    """Download those that are not in ``folder`` with the right checksum; returns their number."""
    here = Folder(folder)
    with ThreadPoolExecutor(WORKERS) as pool:
        pairs = pool.map(lambda entry: (entry, here.entry(entry.path)), entries)
        changed = [one for one, had in pairs if had is None or had.crc32c != one.crc32c]
    store.download(changed, folder)
    return len(changed)


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
        file = self._file(path)
        with _local(file):
            if not file.is_file():
                return None
            return Entry(path=path, size=file.stat().st_size, crc32c=checksum(file))

    def download(self, entries: Sequence[Entry], folder: Path) -> None:
        total = sum(entry.size for entry in entries)
        with moving(f"copying from {self.root}", total) as advance:
            for entry in entries:
                self._copy(self._file(entry.path), Folder(folder)._file(entry.path), advance)

    def upload(self, folder: Path, paths: Sequence[str], *, new: bool = False) -> None:
        for path in paths if new else ():
            if self._file(path).exists():
                raise StorageError(f"{self._file(path)} is there already: give it another name")
        given = [Folder(folder)._file(path) for path in paths]
        with _local(folder):
            total = sum(file.stat().st_size for file in given)
        with moving(f"copying to {self.root}", total) as advance:
            for path, file in zip(paths, given, strict=True):
                self._copy(file, self._file(path), advance)

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            file = self._file(path)
            with _local(file):
                file.unlink(missing_ok=True)
            for above in [one for one in file.parents if self.root in one.parents]:
                with contextlib.suppress(OSError):  # it holds others
                    above.rmdir()

    def _file(self, path: str) -> Path:
        inner = PurePosixPath(path)
        if inner.is_absolute() or ".." in inner.parts or not inner.parts:
            raise StorageError(f"{path!r} leads out of {self.root}: rename it")
        return self.root / inner

    @staticmethod
    def _copy(source: Path, target: Path, advance: Callable[[int], None]) -> None:
        with _local(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as opened:

                def write(file: Any) -> None:
                    for piece in iter(lambda: opened.read(PIECE), b""):
                        file.write(piece)
                        advance(len(piece))

                durable.replace(target, write)


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
                (entry, part := _Part(folder, entry),
                 [pool.submit(self._piece, entry, at, part, advance) for at in part.pieces()])
                for entry in entries
            ]  # fmt: skip
            for entry, part, pieces in coming:
                _wait(pieces)
                with _local(folder):
                    part.finish(f"{self.url}/{entry.path}")
        with contextlib.suppress(OSError):  # none there, or others'
            (folder / UNFINISHED).rmdir()

    def upload(self, folder: Path, paths: Sequence[str], *, new: bool = False) -> None:
        files = {path: Folder(folder)._file(path) for path in paths}
        with _local(folder):
            total = sum(file.stat().st_size for file in files.values())
        with moving(f"uploading to {self.url}", total) as advance, _pool() as pool:
            _wait([pool.submit(self._send, path, file, new, advance)
                   for path, file in files.items()])  # fmt: skip

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

    def _piece(self, entry: Entry, at: int, part: "_Part", advance: Callable[[int], None]) -> None:
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

        with self._explained(path), _Counted(file, "r", advance) as stream:
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
        from google.api_core import exceptions as api
        from google.auth.exceptions import GoogleAuthError, TransportError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

        what = f"{self.url}/{path}" if path else self.url
        try:
            yield
        except api.NotFound as error:
            with contextlib.suppress(api.GoogleAPICallError):  # it may not be asked for
                self._check_it_is_there()
            raise StorageError(
                f"{what} is not there: it was removed or written anew; run the command again"
            ) from error
        except (api.Unauthorized, api.Forbidden, GoogleAuthError) as error:
            if isinstance(error, TransportError):
                raise StorageError(_unreachable(what, error)) from error
            raise StorageError(
                f"{what}: the credentials are refused or missing ({_words(error)}); "
                "`gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, "
                "with roles/storage.objectUser on the bucket"
            ) from error
        except DataCorruption as error:
            raise StorageError(
                f"{what} did not arrive as it was sent ({_words(error)}): run the command again"
            ) from error
        except (api.RetryError, requests.RequestException, ConnectionError) as error:
            raise StorageError(_unreachable(what, error)) from error
        except (api.GoogleAPICallError, InvalidResponse) as error:
            raise StorageError(f"{what}: the server says {_words(error)}; try again") from error
        except OSError as error:
            raise StorageError(
                f"{what}: {error.filename or 'this machine'}: {error.strerror or error}; "
                "make room there, or name another folder"
            ) from error


class _Part:
    """An object that comes in pieces, and which of them are here: files that outlive a process."""

    def __init__(self, folder: Path, entry: Entry) -> None:
        name = hashlib.sha256(f"{entry.path} {entry.generation}".encode()).hexdigest()[:32]
        self._file = folder / UNFINISHED / name
        self._marks = self._file.with_suffix(".pieces")
        self._entry, self._target = entry, Folder(folder)._file(entry.path)

    def pieces(self) -> list[int]:
        """The first bytes of those that are not here."""
        here: set[str] = set()
        if self._entry.generation and self._file.exists() and self._marks.exists():
            here = set(self._marks.read_text().split())
        return [at for at in range(0, self._entry.size or 1, PIECE) if str(at) not in here]

    def open(self, advance: Callable[[int], None]) -> "_Counted":
        self._file.parent.mkdir(parents=True, exist_ok=True)
        return _Counted(self._file, "r+", advance)

    def done(self, at: int) -> None:
        if self._entry.size > PIECE:
            with self._marks.open("a") as marks:
                marks.write(f"{at}\n")

    def finish(self, url: str) -> None:
        """Put it in its place, if its checksum holds."""
        self.open(lambda _: None).close()  # an empty object has no pieces
        found = checksum(self._file)
        self._marks.unlink(missing_ok=True)
        if found != self._entry.crc32c:
            self._file.unlink()
            raise StorageError(
                f"{url} came with crc32c {found}, and the bucket says {self._entry.crc32c}: "
                "run the command again; if it stays so, upload the file anew"
            )
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file.replace(self._target)


class _Counted(io.FileIO):
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


@contextmanager
def _local(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or place}: {error.strerror or error}; make room there, set its "
            "rights, or name another folder"
        ) from error


def _unreachable(what: str, error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    server = os.environ.get("STORAGE_EMULATOR_HOST", "storage.googleapis.com")
    return f"{what} cannot be reached at {server} ({_words(cause)}): check the network, try again"


def _words(error: BaseException) -> str:
    """The first line of what an error says, without the reply's body."""
    said = getattr(error, "message", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())[:200]
