"""Object stores: a folder, or a bucket of Google Cloud Storage, behind one protocol."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from eurosat.errors import StorageError
from eurosat.storage.folder import FolderStore, disk_errors
from eurosat.storage.gcs import SCHEME, GcsStore
from eurosat.storage.local_copy import fetch, mirror
from eurosat.storage.object_store import PATIENCE_S, ObjectChanged, ObjectInfo, ObjectStore

__all__ = [
    "SCHEME",
    "FolderStore",
    "GcsStore",
    "ObjectChanged",
    "ObjectInfo",
    "ObjectStore",
    "disk_errors",
    "fetch",
    "is_bucket",
    "mirror",
    "open_store",
]


def is_bucket(url: str | None) -> bool:
    return (url or "").startswith(SCHEME)


def open_store(
    url: str,
    *,
    patience_s: float = PATIENCE_S,
    must_exist: bool = True,
    include_hidden: bool = False,
) -> ObjectStore:
    """Open a folder (``path`` or ``file:///path``) or ``gs://BUCKET/PREFIX`` as a store.

    ``must_exist`` and ``include_hidden`` are for folders; whether a bucket exists is seen at its
    first use.

    Raises:
        StorageError: ``url`` is neither, or the folder does not exist.
    """
    if is_bucket(url):
        bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
        if not bucket:
            raise StorageError(f"{url} names no bucket: give gs://BUCKET or gs://BUCKET/PREFIX")
        prefix = prefix.strip("/")
        return GcsStore(bucket, f"{prefix}/" if prefix else "", patience_s)
    if url.startswith("file://"):
        url = unquote(urlsplit(url).path)
    elif "://" in url:
        raise StorageError(f"{url} is neither a folder nor gs://bucket/prefix")
    root = Path(url).expanduser().absolute()
    if must_exist and not root.is_dir():
        raise StorageError(f"no folder {root}: make it, or name another")
    return FolderStore(root, include_hidden)
