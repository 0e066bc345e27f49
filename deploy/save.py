"""Save the databases and the artifacts into one archive while runs are being written.

The databases are dumped in one snapshot first, and the artifacts are copied afterwards: whatever
the snapshot refers to existed before, and so is in the archive.
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
from typing import Any, BinaryIO

import eurosat
from deploy import archive, databases, dumps
from deploy.databases import Database
from deploy.transfer import spooled
from eurosat.errors import ConfigError, StorageError
from eurosat.runtime import progress
from eurosat.storage import FolderStore, GcsStore, ObjectChanged, ObjectInfo, ObjectStore
from eurosat.storage.object_store import WORKERS

log = logging.getLogger(__name__)

Artifact = tuple[ObjectInfo, BinaryIO | None]
"""An artifact and its content; None if it was deleted meanwhile."""
MAX_READ_ATTEMPTS = 10
"""How often an artifact that is overwritten while it is read is read again."""
ABANDONED_S = 86_400.0
"""Age after which the next backup deletes the unfinished file of a killed one."""


def save(
    sources: Sequence[Database], artifacts: ObjectStore, target: ObjectStore, key: bytes
) -> tuple[str, archive.Manifest]:
    """Write an archive to ``target``, sealed with ``key``; return its address and manifest.

    Raises:
        ConfigError, StorageError, TrackingError: something cannot be read or written. No archive
            is left then.
    """
    if f"{target.url}/".startswith(f"{artifacts.url}/"):
        raise ConfigError(
            f"{target.url} lies within the artifacts, so each backup would hold the last one: "
            "name another folder"
        )
    if (
        isinstance(target, GcsStore)
        and isinstance(artifacts, GcsStore)
        and target.bucket == artifacts.bucket
    ):
        raise ConfigError(
            f"{target.url} is in the bucket of the artifacts, where MLflow can read and delete it: "
            "name another bucket"
        )
    if isinstance(target, FolderStore):
        _delete_abandoned(target.root)
    name = f"eurosat-{archive.timestamp()}.tar"
    if target.find(name):
        raise ConfigError(f"{target.url}/{name} exists already: run the command again")
    manifest = target.create(name, lambda out: _write(out, sources, artifacts, key))
    return f"{target.url}/{name}", manifest


def _write(
    out: BinaryIO, sources: Sequence[Database], artifacts: ObjectStore, key: bytes
) -> archive.Manifest:
    if hasattr(out, "fileno"):
        os.fchmod(out.fileno(), 0o600)  # it holds hashes of passwords
    writer = archive.Writer(out, key)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    dumps = {database.spec.name: _add_database(writer, database) for database in sources}
    if count := databases.count_external(sources[0], artifacts.url):
        log.warning(
            "%d runs and models have their artifacts outside %s: these are not in the backup",
            count,
            artifacts.url,
        )
    deleted = _add_artifacts(writer, artifacts)
    if deleted:
        log.warning("%d artifacts were deleted during the backup and are not in it", deleted)
    return writer.finish(
        {
            "created": created,
            "eurosat": eurosat.__version__,
            "databases": dumps,
            "artifacts": {"from": artifacts.url, "deleted_meanwhile": deleted},
        }
    )


def _add_database(writer: archive.Writer, database: Database) -> dict[str, Any]:
    with tempfile.TemporaryFile() as spool:
        metadata = dumps.dump(database, spool)
        size = spool.seek(0, os.SEEK_END)
        spool.seek(0)
        writer.add(archive.dump_name(database.spec.name), spool, size)
    return metadata


def _add_artifacts(writer: archive.Writer, artifacts: ObjectStore) -> int:
    """Add every artifact, and return how many were deleted meanwhile."""
    objects, deleted = artifacts.list_objects(), 0
    for info, content in progress.track(
        _read_all(artifacts, objects), len(objects), "copying artifacts", "artifacts"
    ):
        if content is None:
            deleted += 1
            continue
        with content:
            writer.add(archive.ARTIFACTS + info.key, content, info.size, info.generation)
    return deleted


def _read_all(store: ObjectStore, objects: Iterable[ObjectInfo]) -> Iterator[Artifact]:
    """Yield the content of the objects in their order, and read a few ahead."""
    pending: deque[Future[Artifact]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for info in objects:
            pending.append(pool.submit(_read_whole, store, info))
            if len(pending) > WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read_whole(store: ObjectStore, info: ObjectInfo) -> Artifact:
    """Return the content of one generation of an object, the newest if it has changed."""
    for _ in range(MAX_READ_ATTEMPTS):
        try:
            return info, spooled(partial(store.read, info))
        except ObjectChanged:
            if (newest := store.find(info.key)) is None:
                return info, None
            info = newest
    raise StorageError(
        f"{store.url}/{info.key} was overwritten {MAX_READ_ATTEMPTS} times while it was read: "
        "run the command again"
    )


def _delete_abandoned(folder: Path) -> None:
    for unfinished in folder.glob(".eurosat-*.tar.*"):
        if time.time() - unfinished.stat().st_mtime > ABANDONED_S:
            unfinished.unlink(missing_ok=True)
