"""Restore an archive: beside what is there first, and swapped in at the end."""

import io
import json
import logging
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

from deploy import archive, databases, dumps, schema
from deploy.databases import Database
from deploy.transfer import delete_all, for_each, spooled
from eurosat.errors import ConfigError
from eurosat.storage import GcsStore, ObjectStore
from eurosat.storage.object_store import WORKERS

if TYPE_CHECKING:
    from psycopg2 import extensions

log = logging.getLogger(__name__)

MARKER = "restore.json"
MARKER_STORE, RESTORING_STORE = ".restore", ".restoring"
"""Suffixes of the artifacts' siblings that hold the marker and the artifacts being restored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreMarker:
    """Record of an unfinished restore, kept beside the artifacts until the restore has ended."""

    seal: str
    """Seal of the archive."""
    timestamp: str
    """Start of the restore; part of the names of what it keeps of before."""
    target_was_empty: bool
    """Whether there were no artifacts before, so that all of them are of this restore."""

    @property
    def comment(self) -> str:
        """Comment that the restored databases carry after the swap."""
        return f"restored {self.timestamp} from the backup {self.seal}"

    @classmethod
    def load(cls, artifacts: ObjectStore) -> "RestoreMarker | None":
        """Return the marker of a restore that was killed."""
        store = artifacts.sibling(MARKER_STORE)
        if (info := store.find(MARKER)) is None:
            return None
        with store.open(info) as stream:
            stored = json.loads(stream.read())
        return cls(
            seal=stored["seal"],
            timestamp=stored["stamp"],
            target_was_empty=stored["blank"],
        )

    def save(self, artifacts: ObjectStore) -> None:
        content = {
            "seal": self.seal,
            "stamp": self.timestamp,
            "blank": self.target_was_empty,
        }
        stream = io.BytesIO(json.dumps(content).encode())
        artifacts.sibling(MARKER_STORE).write(MARKER, stream)


@dataclass(frozen=True, kw_only=True)
class Restore:
    """A verified archive and the databases and artifacts that it is to replace."""

    stream: BinaryIO
    size: int
    """Bytes of the archive."""
    key: bytes | None
    """Key of the archive's seal; None for an archive of the first format."""
    manifest: archive.Manifest
    targets: Sequence[Database]
    artifacts: ObjectStore
    server: "extensions.connection"
    """Connection of `databases.maintenance_connection`."""

    def replace_all(self, previous: RestoreMarker | None, *, replace: bool) -> RestoreMarker:
        """Restore databases and artifacts beside the present ones, and swap them in.

        Raises:
            ConfigError: the target holds data and not ``replace``, is in use, or is too old.
        """
        marker = self._prepare(previous, replace=replace)
        moves = [
            (_restoring(database).name, database.name, _previous(database, marker.timestamp).name)
            for database in self.targets
        ]
        in_place = marker.target_was_empty
        fresh = self.artifacts if in_place else self.artifacts.sibling(RESTORING_STORE)
        delete_all(fresh)
        self._unpack(fresh)
        if not in_place:
            self._swap_artifacts(fresh, self._previous_artifacts(marker))
        for database in self.targets:
            databases.refuse_busy(self.server, database.name)
        databases.swap(self.server, moves, marker.comment)
        return marker

    def clean_up(self, marker: RestoreMarker) -> list[str]:
        """Delete what the swap made superfluous, the marker last; return what was kept."""
        kept: list[str] = []
        for database in self.targets:
            previous = _previous(database, marker.timestamp)
            if databases.exists(self.server, previous.name):
                with previous.connected() as connection:
                    user_data = databases.user_data(connection)
                if user_data:
                    kept.append(f"database {previous.name}")
                else:
                    databases.execute(self.server, "DROP DATABASE {}", previous.name)
        previous_artifacts = self._previous_artifacts(marker)
        keys = {info.key for info in previous_artifacts.list_objects()}
        obsolete = sorted(keys - {*self._artifact_keys()})
        for_each(self.artifacts.delete, obsolete, "deleting the artifacts of before")
        if keys:
            kept.append(previous_artifacts.url)
        for suffix in (RESTORING_STORE, MARKER_STORE):
            delete_all(self.artifacts.sibling(suffix))
        return kept

    def _prepare(self, previous: RestoreMarker | None, *, replace: bool) -> RestoreMarker:
        """Refuse what cannot be restored, and write the marker."""
        user_data = [text for database in self.targets for text in self._user_data(database)]
        is_empty = not self.artifacts.list_objects()
        is_ours = (
            previous is not None
            and previous.target_was_empty
            and previous.seal == self.manifest.seal
            and not user_data
        )
        if not (is_empty or is_ours):
            user_data.append(f"artifacts in {self.artifacts.url}")
        if user_data and not replace:
            raise ConfigError(
                f"the target holds {', '.join(user_data)}: give --replace to put the archive in "
                "its place, or name an empty database and an empty folder or bucket"
            )
        marker = RestoreMarker(
            seal=self.manifest.seal,
            timestamp=archive.timestamp(),
            target_was_empty=is_empty or is_ours,
        )
        marker.save(self.artifacts)
        return marker

    def _user_data(self, database: Database) -> list[str]:
        """Return the user data of a database that the archive is to replace.

        Raises:
            ConfigError: the database is in use, or its server is too old for the archive.
        """
        spec, user_data, newest = database.spec, list[str](), None
        archived_schema = self._metadata(database)["schema"]
        if databases.exists(self.server, database.name):
            databases.refuse_busy(self.server, database.name)
            with database.connected() as connection:
                newest = databases.schema_revision(connection, spec)
                user_data = databases.user_data(connection)
        if not schema.can_upgrade(spec, newest, archived_schema):
            server = f"the server of schema {newest}" if newest else "the MLflow installed here"
            raise ConfigError(
                f"{server} does not know the archive's schema {archived_schema} of {spec.name}: "
                "restore with the MLflow that it was saved from, or a newer one"
            )
        return user_data

    def _unpack(self, fresh: ObjectStore) -> None:
        """Restore the databases under temporary names, and the artifacts into ``fresh``."""
        by_member = {archive.dump_name(database.spec.name): database for database in self.targets}
        pending: deque[Future[None]] = deque()
        contents = archive.read(self.stream, self.size, "restoring", self.key)
        with ThreadPoolExecutor(WORKERS) as pool:
            for member, (_, _, content) in zip(
                [*self.manifest.members, None], contents, strict=True
            ):
                if member is None:
                    continue  # the manifest itself
                if database := by_member.get(member.name):
                    with tempfile.TemporaryFile() as dump:
                        archive.copy(content, member, dump)
                        dump.flush()
                        dump.seek(0)
                        metadata = self._metadata(database)
                        dumps.restore(self.server, _restoring(database), dump, metadata)
                    continue
                spool = spooled(partial(archive.copy, content, member))
                key = member.name.removeprefix(archive.ARTIFACTS)
                pending.append(pool.submit(_write_and_close, fresh, key, spool))
                if len(pending) > WORKERS:
                    pending.popleft().result()
            for future in pending:
                future.result()

    def _swap_artifacts(self, fresh: ObjectStore, previous: ObjectStore) -> None:
        """Copy the present artifacts to ``previous``, and ``fresh`` over the present ones.

        No artifact that the present databases refer to is missing at any time.
        """
        keys = [info.key for info in self.artifacts.list_objects()]
        for_each(
            lambda key: self.artifacts.copy(key, previous), keys, "keeping the artifacts of before"
        )
        for_each(
            lambda key: fresh.copy(key, self.artifacts),
            self._artifact_keys(),
            "moving artifacts into place",
        )

    def _previous_artifacts(self, marker: RestoreMarker) -> ObjectStore:
        return self.artifacts.sibling(f".before-{marker.timestamp}")

    def _artifact_keys(self) -> list[str]:
        members = self.manifest.below(archive.ARTIFACTS)
        return [member.name.removeprefix(archive.ARTIFACTS) for member in members]

    def _metadata(self, database: Database) -> Mapping[str, Any]:
        metadata: Mapping[str, Any] = self.manifest.metadata["databases"][database.spec.name]
        return metadata


def restore(
    stream: BinaryIO,
    size: int,
    targets: Sequence[Database],
    artifacts: ObjectStore,
    *,
    key: bytes | None,
    replace: bool,
) -> tuple[archive.Manifest, list[str]]:
    """Restore an archive; return its manifest and the names of what was kept of before.

    ``key`` is that of the seal; without it only archives of the first format are accepted.

    Nothing is touched before the whole archive is verified. If the restore is killed, at any
    moment, the same command completes it.

    Raises:
        ArchiveError: the archive is incomplete or damaged.
        ConfigError: the archive does not fit the target, or the target holds data and not
            ``replace``.
    """
    manifest = archive.verify(stream, size, key)
    if isinstance(artifacts, GcsStore) and not artifacts.prefix:
        raise ConfigError(
            f"EUROSAT_ARTIFACTS={artifacts.url} names a whole bucket: give it a prefix"
        )
    _check_databases(manifest, targets)
    with databases.maintenance_connection(targets[0]) as server:
        job = Restore(
            stream=stream,
            size=size,
            key=key,
            manifest=manifest,
            targets=targets,
            artifacts=artifacts,
            server=server,
        )
        marker = RestoreMarker.load(artifacts)
        if marker and _is_swapped(server, targets[0], marker) and marker.seal == manifest.seal:
            log.warning(
                "the restore of %s was killed after its swap, and is completed now; to restore "
                "the archive once more, run the command again",
                marker.timestamp,
            )
        else:
            marker = job.replace_all(marker, replace=replace)
        return manifest, job.clean_up(marker)


def _check_databases(manifest: archive.Manifest, targets: Sequence[Database]) -> None:
    """Raise ConfigError unless the archive holds exactly the databases that are configured."""
    archived = set(manifest.metadata["databases"])
    configured = {database.spec.name for database in targets}
    for spec in databases.DATABASE_SPECS:
        if spec.name in archived - configured:
            raise ConfigError(f"the archive holds the database {spec.name}: set {spec.variable}")
        if spec.name in configured - archived:
            raise ConfigError(f"the archive lacks the database {spec.name}: unset {spec.variable}")
    if len({database.server for database in targets}) > 1:
        raise ConfigError(
            "the databases are on two servers and cannot be swapped in one transaction: "
            "name two databases of one server"
        )


def _is_swapped(server: "extensions.connection", database: Database, marker: RestoreMarker) -> bool:
    return databases.swap_comment(server, database.name) == marker.comment


def _write_and_close(store: ObjectStore, key: str, content: BinaryIO) -> None:
    with content:
        store.write(key, content)


def _restoring(database: Database) -> Database:
    return database.renamed(f"{database.name}_restoring")


def _previous(database: Database, timestamp: str) -> Database:
    return database.renamed(f"{database.name}_before_{timestamp.lower()}")
