"""What a backup needs besides the object store: an early check, spools, parallel loops."""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from eurosat.errors import ConfigError, StorageError
from eurosat.runtime import progress
from eurosat.storage import GcsStore, ObjectStore, open_store
from eurosat.storage.object_store import CHUNK_BYTES, WORKERS


def open_checked(url: str, setting: str, credentials: Path | None = None) -> ObjectStore:
    """Open the folder or bucket that ``setting`` names; a missing folder is an empty store.

    ``credentials`` is the JSON file of the service account that may use the bucket, where it is not
    the one of the environment.

    Raises:
        ConfigError: ``url`` is neither a folder nor gs://bucket/prefix, or the bucket is missing
            or refuses access.
    """
    try:
        store = open_store(url, must_exist=False, include_hidden=True)
        if isinstance(store, GcsStore):
            store = replace(store, credentials=credentials)
            store.check_access()
    except StorageError as error:
        raise ConfigError(f"{setting}={url}: {error}") from error
    return store


def spooled(fill: Callable[[BinaryIO], object]) -> BinaryIO:
    """Return what ``fill`` writes as a stream: small content in memory, large in a nameless file.

    The caller closes it.
    """
    spool = cast("BinaryIO", tempfile.SpooledTemporaryFile(max_size=CHUNK_BYTES))  # noqa: SIM115
    try:
        fill(spool)
    except BaseException:
        spool.close()
        raise
    spool.seek(0)
    return spool


def for_each(work: Callable[[str], None], keys: Sequence[str], label: str) -> None:
    """Call ``work`` with every key, several at once, and show the progress."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in progress.track(pool.map(work, keys), len(keys), label, "artifacts"):
            pass


def delete_all(store: ObjectStore) -> None:
    for_each(store.delete, [info.key for info in store.list_objects()], f"emptying {store.url}")
