"""An archive put in the place of what is there: beside it first, swapped in at the end."""

import io
import json
import logging
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from deploy import archive, databases, schema
from deploy.databases import Database
from deploy.transfer import delete_all, for_each, spooled
from eurosat.errors import ConfigError
from eurosat.storage import GcsStore, ObjectStore
from eurosat.storage.object_store import WORKERS

if TYPE_CHECKING:
    from psycopg2.extensions import connection

log = logging.getLogger(__name__)

MARKER = "restore.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """What a restore leaves beside the artifacts until it is over, for the next if it is killed."""

    seal: str
    """Of the archive."""
    stamp: str
    """When, and the ending of what it keeps."""
    blank: bool
    """The place of the artifacts was empty: what lies there is of this restore."""

    @property
    def mark(self) -> str:
        """The comment of the databases that were swapped in."""
        return f"restored {self.stamp} from the backup {self.seal}"


def restore(
    stream: BinaryIO, size: int, found: Sequence[Database], artifacts: ObjectStore, *, replace: bool
) -> tuple[archive.Manifest, list[str]]:
    """Returns what was in the archive, and the names of what was kept of before.

    Nothing is touched before all of the archive is verified. Databases and artifacts are restored
    beside the present ones and swapped in at the end; whenever it is killed, the same restore said
    again completes it.

    Raises:
        ArchiveError: the archive is not whole.
        ConfigError: it does not fit the target, or the target holds something and not ``replace``.
    """
    manifest = archive.verify(stream, size)
    if isinstance(artifacts, GcsStore) and not artifacts.prefix:
        raise ConfigError(
            f"EUROSAT_ARTIFACTS={artifacts.url} names a whole bucket: give it a prefix"
        )
    _refuse_others(manifest, found)
    with databases.maintained(found[0]) as opened:
        begun = _begun(artifacts)
        swapped = begun and databases.marked(opened, found[0].name) == begun.mark
        if begun and swapped and begun.seal == manifest.seal:
            log.warning(
                "the restore of %s was killed after its swap: that one is completed; to restore "
                "the archive anew, say it again",
                begun.stamp,
            )
        else:
            begun = _prepare(opened, manifest, found, artifacts, begun, replace=replace)
            moves = [(_fresh(one), one.name, _kept(one, begun.stamp)) for one in found]
            into = artifacts if begun.blank else artifacts.sibling(".restoring")
            delete_all(into)
            _unpack(stream, size, manifest, opened, found, into)
            if not begun.blank:
                _lay_over(artifacts, into, artifacts.sibling(f".before-{begun.stamp}"), manifest)
            for database in found:
                databases.refuse_busy(opened, database.name)
            databases.swap(opened, [(a.name, b, c.name) for a, b, c in moves], begun.mark)
        return manifest, _clean_up(opened, manifest, found, artifacts, begun)


def _refuse_others(manifest: archive.Manifest, found: Sequence[Database]) -> None:
    """Raises ConfigError unless the archive is of the databases that are ``found``."""
    has, wanted = set(manifest.told["databases"]), {database.kind.name for database in found}
    for kind in databases.KINDS:
        if kind.name in has - wanted:
            raise ConfigError(f"the archive holds the database {kind.name}: set {kind.variable}")
        if kind.name in wanted - has:
            raise ConfigError(f"the archive lacks the database {kind.name}: unset {kind.variable}")
    if len({database.server for database in found}) > 1:
        raise ConfigError("the databases are on two servers, and are swapped in at once: use one")


def _prepare(
    opened: "connection",
    manifest: archive.Manifest,
    found: Sequence[Database],
    artifacts: ObjectStore,
    before: Begun | None,
    *,
    replace: bool,
) -> Begun:
    """Refuse what is to be refused; then leave the marker."""
    held: list[str] = []
    for database in found:
        kind, wanted = database.kind, manifest.told["databases"][database.kind.name]["schema"]
        newest = None
        if databases.exists(opened, database.name):
            databases.refuse_busy(opened, database.name)
            with database.connected() as looked:
                newest = databases.revision(looked, kind)
                held += databases.held(looked)
        if not schema.reaches(kind, newest, wanted):
            raise ConfigError(
                f"the archive's schema {wanted} of {kind.name} is not one that "
                f"{f'the server of schema {newest}' if newest else 'the MLflow installed here'} "
                "knows: restore with the MLflow that it was saved from, or a newer one"
            )
    empty = not artifacts.list_objects()
    ours = before is not None and before.blank and before.seal == manifest.seal and not held
    if not (empty or ours):
        held.append(f"artifacts in {artifacts.url}")
    if held and not replace:
        raise ConfigError(
            f"the target holds {', '.join(held)}: give --replace to put the archive in its "
            "place, or name an empty database and place"
        )
    begun = Begun(seal=manifest.seal, stamp=archive.stamp(), blank=empty or ours)
    artifacts.sibling(".restore").write(MARKER, io.BytesIO(json.dumps(asdict(begun)).encode()))
    return begun


def _unpack(
    stream: BinaryIO,
    size: int,
    manifest: archive.Manifest,
    opened: "connection",
    found: Sequence[Database],
    into: ObjectStore,
) -> None:
    """Databases into fresh ones, artifacts into ``into``."""
    by_member = {archive.dump_of(database.kind.name): database for database in found}
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        read = archive.read(stream, size, "restoring")
        for member, (_, _, content) in zip([*manifest.members, None], read, strict=True):
            if member is None:
                continue  # the manifest's own
            if database := by_member.get(member.name):
                with tempfile.TemporaryFile() as dumped:
                    archive.copy(content, member, dumped)
                    dumped.flush()
                    dumped.seek(0)
                    told = manifest.told["databases"][database.kind.name]
                    databases.restore(opened, _fresh(database), dumped, told)
                continue
            spool = spooled(partial(archive.copy, content, member))
            key = member.name.removeprefix(archive.ARTIFACTS)
            waiting.append(pool.submit(_put, into, key, spool))
            if len(waiting) > WORKERS:
                waiting.popleft().result()
        for put in waiting:
            put.result()


def _put(into: ObjectStore, key: str, content: BinaryIO) -> None:
    with content:
        into.write(key, content)


def _lay_over(
    artifacts: ObjectStore, fresh: ObjectStore, kept: ObjectStore, manifest: archive.Manifest
) -> None:
    """Nothing that the present databases name is missing at any time.

    What has the name of something in the archive is written over, after it was copied.
    """
    for_each(
        lambda key: artifacts.copy(key, kept),
        [stored.key for stored in artifacts.list_objects()],
        "keeping the artifacts of before",
    )
    for_each(lambda key: fresh.copy(key, artifacts), _keys(manifest), "moving artifacts into place")


def _clean_up(
    opened: "connection",
    manifest: archive.Manifest,
    found: Sequence[Database],
    artifacts: ObjectStore,
    begun: Begun,
) -> list[str]:
    """Remove what the swap made superfluous, the marker last."""
    left: list[str] = []
    for database in found:
        kept = _kept(database, begun.stamp)
        if databases.exists(opened, kept.name):
            with kept.connected() as looked:
                held = databases.held(looked)
            if held:
                left.append(f"database {kept.name}")
            else:
                databases.execute(opened, "DROP DATABASE {}", kept.name)
    kept_artifacts = artifacts.sibling(f".before-{begun.stamp}")
    before = {stored.key for stored in kept_artifacts.list_objects()}
    surplus = sorted(before - {*_keys(manifest)})
    for_each(artifacts.delete, surplus, "removing the artifacts of before")
    if before:
        left.append(kept_artifacts.url)
    for ending in (".restoring", ".restore"):
        delete_all(artifacts.sibling(ending))
    return left


def _keys(manifest: archive.Manifest) -> list[str]:
    below = manifest.below(archive.ARTIFACTS)
    return [member.name.removeprefix(archive.ARTIFACTS) for member in below]


def _fresh(database: Database) -> Database:
    return database.called(f"{database.name}_restoring")


def _kept(database: Database, stamp: str) -> Database:
    return database.called(f"{database.name}_before_{stamp.lower()}")


def _begun(artifacts: ObjectStore) -> Begun | None:
    """What a restore that was killed has left."""
    place = artifacts.sibling(".restore")
    if (stored := place.find(MARKER)) is None:
        return None
    with place.open(stored) as opened:
        return Begun(**json.loads(opened.read()))
