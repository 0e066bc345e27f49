"""Objects in a bucket of Google Cloud Storage: sent in chunks, retried, resumed."""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from eurosat.errors import StorageError
from eurosat.runtime.progress import moving
from eurosat.storage.checksums import ChecksumWriter, stream_crc32c
from eurosat.storage.folder import FolderStore, disk_errors
from eurosat.storage.gcs_errors import translate_errors
from eurosat.storage.object_store import (
    CHUNK_BYTES,
    PATIENCE_S,
    WORKERS,
    ObjectInfo,
    ObjectStore,
    T,
)
from eurosat.storage.partial import UNFINISHED, PartialDownload, ProgressFile

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Bucket, Client

SCHEME = "gs://"
GOOGLE = "https://storage.googleapis.com"
CONNECTION_TIMEOUT_S = 60.0
"""Silence after which a connection counts as lost: the default of Google's library."""
UPLOAD_LOST = (400, 410)
"""Statuses of a server that has forgotten an interrupted upload: it starts anew."""


@dataclass(frozen=True)
class GcsStore:
    """The objects of a bucket below a prefix. STORAGE_EMULATOR_HOST names an emulator."""

    bucket: str
    prefix: str = ""
    """Empty, or with a slash at its end."""
    patience_s: float = PATIENCE_S
    """How long a failing request is retried, in seconds."""
    chunk_bytes: int = CHUNK_BYTES
    """Bytes in one request; a multiple of 256 KiB."""
    credentials: Path | None = None
    """JSON file of a service account, for Google's own servers; None: the environment says which
    account and which servers."""

    @property
    def url(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}".rstrip("/")

    def check_access(self) -> None:
        """Raise StorageError unless the bucket exists and its objects may be listed.

        An account that may use objects is not always allowed to ask about the bucket itself.
        """
        with self._errors():
            next(iter(self._bucket.list_blobs(max_results=1, **self._request_options)), None)

    def list_objects(self) -> list[ObjectInfo]:
        with self._errors():
            blobs = self._bucket.list_blobs(
                prefix=self.prefix,
                fields="items(name,size,crc32c,generation),nextPageToken",
                **self._request_options,
            )
            # A name that ends with a slash is the console's way to show a folder.
            infos = [self._info(blob) for blob in blobs if not blob.name.endswith("/")]
        return sorted(infos, key=lambda info: info.key)

    def find(self, key: str) -> ObjectInfo | None:
        with self._errors(key):
            blob = self._bucket.get_blob(self.prefix + key, **self._request_options)
            if blob is None:
                self._check_bucket()
        return self._info(blob) if blob else None

    def checksum(self, info: ObjectInfo) -> str:
        return info.crc32c or ""

    def read(self, info: ObjectInfo, into: IO[bytes]) -> None:
        with self._errors(info.key):  # raw: the size is that of the stored bytes
            self._blob(info).download_to_file(
                into, raw_download=True, checksum="crc32c", **self._request_options
            )

    @contextmanager
    def open(self, info: ObjectInfo) -> Iterator[BinaryIO]:
        with self._errors(info.key):
            reader = self._blob(info).open(
                "rb", chunk_size=self.chunk_bytes, **self._request_options
            )
            with reader as stream:
                yield cast("BinaryIO", stream)

    def write(self, key: str, content: BinaryIO) -> None:
        with self._errors(key):
            self._put(key, content)

    def create(self, key: str, write: Callable[[BinaryIO], T]) -> T:
        blob = self._bucket.blob(self.prefix + key)
        with self._errors(key):
            # An upload that is not closed never becomes an object.
            writer = blob.open(
                "wb",
                chunk_size=self.chunk_bytes,
                if_generation_match=0,
                checksum="crc32c",
                **self._request_options,
            )
            with writer as out:
                checked = ChecksumWriter(out)
                result = write(cast("BinaryIO", checked))
            blob.reload(**self._request_options)
            if (blob.size, blob.crc32c) != (checked.size, checked.crc32c):
                blob.delete(**self._request_options)
                raise StorageError(
                    f"{self.url}/{key} arrived damaged and was deleted: run the command again"
                )
        return result

    def copy(self, key: str, to: ObjectStore) -> None:
        assert isinstance(to, GcsStore)
        source, target = self._bucket.blob(self.prefix + key), to._bucket.blob(to.prefix + key)
        token: str | None = None
        with to._errors(key):
            while True:  # a large object is copied in several requests
                token, _, _ = target.rewrite(source, token=token, **self._request_options)
                if token is None:
                    return

    def delete(self, key: str) -> None:
        from google.api_core.exceptions import NotFound

        with self._errors(key):
            try:
                self._bucket.delete_blob(self.prefix + key, **self._request_options)
            except NotFound:
                self._check_bucket()

    def sibling(self, suffix: str) -> "GcsStore":
        return replace(self, prefix=f"{self.prefix.rstrip('/')}{suffix}/")

    def download(self, objects: Sequence[ObjectInfo], folder: Path) -> None:
        """Download, resuming what was interrupted if the generation is the same."""
        total = sum(info.size for info in objects)
        with moving(f"downloading {self.url}", total) as advance, _pool() as pool:
            downloads = []
            for info in objects:
                download = PartialDownload(folder, info, self.chunk_bytes)
                chunks = [
                    pool.submit(self._fetch_chunk, info, offset, download, advance)
                    for offset in download.missing()
                ]
                downloads.append((info, download, chunks))
            for info, download, chunks in downloads:
                _wait(chunks)
                with disk_errors(folder):
                    download.finish(f"{self.url}/{info.key}")
        with contextlib.suppress(OSError):  # there is none, or it holds other downloads
            (folder / UNFINISHED).rmdir()

    def upload(self, folder: Path, keys: Sequence[str], *, new: bool = False) -> None:
        files = {key: FolderStore(folder).file(key) for key in keys}
        with disk_errors(folder):
            total = sum(file.stat().st_size for file in files.values())
        with moving(f"uploading to {self.url}", total) as advance, _pool() as pool:
            _wait([pool.submit(self._send, *item, new, advance) for item in files.items()])

    @cached_property
    def _bucket(self) -> "Bucket":
        with self._errors():
            client = self._client()
        weakref.finalize(self, client.close)  # its connections
        return client.bucket(self.bucket)

    def _client(self) -> "Client":
        from google.cloud.storage import Client

        if self.credentials is None:
            return Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT"))
        endpoint = os.environ.get("API_ENDPOINT_OVERRIDE", GOOGLE)  # the library's own variable
        return Client.from_service_account_json(
            self.credentials, client_options={"api_endpoint": endpoint}
        )

    @cached_property
    def _request_options(self) -> dict[str, Any]:
        from google.cloud.storage.retry import DEFAULT_RETRY

        timeout_s = min(CONNECTION_TIMEOUT_S, self.patience_s)
        return {"retry": DEFAULT_RETRY.with_timeout(self.patience_s), "timeout": timeout_s}

    def _blob(self, info: ObjectInfo) -> "Blob":
        """Return a handle of the listed generation, and no other."""
        return self._bucket.blob(
            self.prefix + info.key, generation=int(info.generation) if info.generation else None
        )

    def _info(self, blob: "Blob") -> ObjectInfo:
        return ObjectInfo(
            key=blob.name.removeprefix(self.prefix),
            size=int(blob.size or 0),
            generation=str(blob.generation or ""),
            crc32c=blob.crc32c or "",
        )

    def _fetch_chunk(
        self,
        info: ObjectInfo,
        offset: int,
        download: PartialDownload,
        advance: Callable[[int], None],
    ) -> None:
        """Download one chunk. Where the connection breaks, the library asks for the rest of it."""
        end = min(offset + self.chunk_bytes, info.size)
        if offset == end:
            return
        with self._errors(info.key), download.open(advance) as stream:
            stream.seek(offset)
            self._blob(info).download_to_file(
                stream,
                start=offset,
                end=end - 1,
                raw_download=True,
                checksum=None,
                **self._request_options,
            )
        download.mark_complete(offset)

    def _send(self, key: str, file: Path, new: bool, advance: Callable[[int], None]) -> None:
        with self._errors(key), ProgressFile(file, "r", advance) as stream:
            self._put(key, cast("BinaryIO", stream), new=new)

    def _put(self, key: str, content: BinaryIO, *, new: bool = False) -> None:
        """Upload a seekable stream; with ``new``, never over an existing object."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self.prefix + key, chunk_size=self.chunk_bytes)
        options = self._request_options | {"if_generation_match": 0 if new else None}
        try:
            _upload(blob, content, options)
        except PreconditionFailed:
            existing = self.find(key)
            content.seek(0)
            # The same content means that it was ours, and the server's answer was lost.
            if not existing or existing.crc32c != stream_crc32c(content):
                raise

    def _check_bucket(self) -> None:
        if not self._bucket.exists(**self._request_options):
            address = f"{SCHEME}{self.bucket}"
            raise StorageError(
                f"there is no bucket {address}: make it "
                f"(gcloud storage buckets create {address}) or name another"
            )

    def _errors(self, key: str = "") -> AbstractContextManager[None]:
        return translate_errors(f"{self.url}/{key}".rstrip("/"), self._check_bucket)


def _upload(blob: "Blob", content: BinaryIO, options: Mapping[str, Any]) -> None:
    """Upload a whole stream; start anew, once, if the server has lost the interrupted upload."""
    from google.api_core.exceptions import ClientError

    size = content.seek(0, os.SEEK_END)
    upload = partial(
        blob.upload_from_file, content, rewind=True, size=size, checksum="crc32c", **options
    )
    try:
        upload()
    except ClientError as error:
        if error.code not in UPLOAD_LOST:
            raise
        upload()


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Yield worker threads that start nothing new after a failure."""
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _wait(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()
