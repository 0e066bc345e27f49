"""Databases and artifacts into one archive, while runs go on.

The databases are dumped in one snapshot first and the artifacts copied then: whatever the snapshot
names was there before it, and so is in the archive.
"""

import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO

import eurosat
from deploy import archive, databases
from deploy.databases import Database
from deploy.transfer import spooled
from eurosat.errors import ConfigError, StorageError
from eurosat.runtime import progress
from eurosat.storage import FolderStore, ObjectChanged, ObjectInfo, ObjectStore
from eurosat.storage.object_store import WORKERS

log = logging.getLogger(__name__)

TRIES = 10
"""How often an artifact that is overwritten while it is read is read anew."""
ABANDONED_S = 86_400.0
"""After so long without a byte, what a killed backup left in a folder is removed by the next."""


def save(
    found: Sequence[Database], artifacts: ObjectStore, to: ObjectStore
) -> tuple[str, archive.Manifest]:
    """Returns the archive's address too.

    Raises:
        ConfigError, StorageError: something of it cannot be read or written; no archive is left.
    """
    if f"{to.url}/".startswith(f"{artifacts.url}/"):
        raise ConfigError(f"{to.url} lies within the artifacts: each backup would hold the last")
    if isinstance(to, FolderStore):
        _remove_abandoned(to.root)
    key = f"eurosat-{archive.stamp()}.tar"
    if to.find(key):
        raise ConfigError(f"{to.url}/{key} exists: say it again")
    manifest = to.create(key, lambda out: _write(out, found, artifacts))
    return f"{to.url}/{key}", manifest


def _write(out: BinaryIO, found: Sequence[Database], artifacts: ObjectStore) -> archive.Manifest:
    if hasattr(out, "fileno"):
        os.fchmod(out.fileno(), 0o600)  # it holds the hashes of passwords
    writer = archive.Writer(out)
    told: dict[str, object] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "eurosat": eurosat.__version__,
        "databases": (of := {}),
    }
    for database in found:
        with tempfile.TemporaryFile() as spool:
            of[database.kind.name] = databases.dump(database, spool)
            size = spool.seek(0, os.SEEK_END)
            spool.seek(0)
            writer.add(archive.dump_of(database.kind.name), spool, size)
    if away := databases.elsewhere(found[0], artifacts.url):
        log.warning(
            "the artifacts of %d runs and models are not in %s and so not in the backup",
            away,
            artifacts.url,
        )
    listed = list(artifacts.list_objects())
    gone = 0
    for stored, content in progress.track(
        _fetched(artifacts, listed), len(listed), "copying artifacts", "artifacts"
    ):
        if content is None:
            gone += 1
            continue
        with content:
            name = archive.ARTIFACTS + stored.key
            writer.add(name, content, stored.size, stored.generation)
    if gone:
        log.warning("%d artifacts were deleted while the backup was made: it lacks them", gone)
    told["artifacts"] = {"from": artifacts.url, "deleted_meanwhile": gone}
    return writer.finish(told)


def _fetched(
    place: ObjectStore, listed: Iterable[ObjectInfo]
) -> Iterator[tuple[ObjectInfo, IO[bytes] | None]]:
    """In the order of ``listed``, a few ahead."""
    waiting: deque[Future[tuple[ObjectInfo, IO[bytes] | None]]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for stored in listed:
            waiting.append(pool.submit(_fetch, place, stored))
            if len(waiting) > WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _fetch(place: ObjectStore, stored: ObjectInfo) -> tuple[ObjectInfo, IO[bytes] | None]:
    """One content of an artifact, whole; None if it was deleted."""
    for _ in range(TRIES):
        try:
            return stored, spooled(partial(place.read, stored))
        except ObjectChanged:
            if (now := place.find(stored.key)) is None:
                return stored, None
            stored = now
    raise StorageError(
        f"{place.url}/{stored.key} was overwritten {TRIES} times while it was read: say it again"
    )


def _remove_abandoned(folder: Path) -> None:
    for unfinished in folder.glob(".eurosat-*.tar.*"):
        if time.time() - unfinished.stat().st_mtime > ABANDONED_S:
            unfinished.unlink(missing_ok=True)
