"""The durable local record of one run: written first, and delivered to the server from here.

One folder a run: an SQLite file in WAL mode, the files to be sent, and a lock that its process
holds. What a method has returned from survives the death of the process.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eurosat.errors import TrackingError
from eurosat.runtime.cache import cache_root

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger(__name__)

FULL_DISK_RETRY_S = 1.0
"""Between two attempts to write to a disk that is full."""
DATABASE, FILES, LOCK = "journal.db", "files", "lock"
END_REASON_TAGS = ("killed.why", "failed.why")
"""Tags that tell why a run has ended, until it goes on."""
PREFIX = "journal:"
"""Before a journal's id, where a run has no id of a server yet."""

Status = Literal["FINISHED", "FAILED", "KILLED"]
Kind = Literal["metric", "param", "tag"]

SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE entries (seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL,
    name TEXT NOT NULL, value, time INTEGER, step INTEGER, refused TEXT);
CREATE INDEX named ON entries (name) WHERE kind <> 'metric';
CREATE TABLE files (seq INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT UNIQUE NOT NULL,
    folder TEXT NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL,
    sent INTEGER NOT NULL DEFAULT 0, refused TEXT);
"""
MIGRATION = (
    "ALTER TABLE files ADD COLUMN folder TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE files ADD COLUMN refused TEXT",
    "UPDATE files SET folder = CAST(seq AS TEXT)",
    "DELETE FROM files WHERE sha256 = ''",
)
"""What makes that schema of the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    seq: int
    kind: Kind
    name: str
    value: Any
    """A float or, of params and tags, a string."""
    time: int
    """Milliseconds since 1970."""
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingFile:
    seq: int
    path: str
    """Where it belongs among the run's artifacts."""
    sha256: str
    size: int
    local_path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Backlog:
    """What the server does not have yet."""

    entries: int
    files: int
    bytes: int
    """Of the files."""
    status: bool

    def __bool__(self) -> bool:
        return bool(self.entries or self.files or self.status)

    def __str__(self) -> str:
        parts = [f"{self.entries} entries"] if self.entries else []
        parts += [f"{self.files} files ({self.bytes / 1e6:.1f} MB)"] if self.files else []
        return ", ".join(parts + (["its status"] if self.status else [])) or "nothing"


def root() -> Path:
    """Where this machine's journals are."""
    return cache_root() / "journals"


class Journal:
    """A connection to one journal; its methods may be called from several threads.

    A second connection to the same folder, as the sender has, does not block this one for longer
    than a row takes to write.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.id = directory.name
        self._lock = threading.Lock()
        self._file_lock: FileLock | None = None
        self._unwritten: list[tuple[Any, ...]] = []
        self._logged_before: dict[tuple[str, int], set[Any]] = {}
        """Values by name and step of a run that goes on: what is repeated is not logged again."""
        self._retry_at = 0.0
        """Time before which a disk that was full is not tried again."""
        with _translate_errors(directory):
            self._connection = sqlite3.connect(
                f"file:{directory / DATABASE}?mode=rw",
                uri=True,
                timeout=30,
                check_same_thread=False,
            )
            self._migrate()
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute("PRAGMA wal_autocheckpoint=0")  # an fsync, left to `settle`

    @classmethod
    def create(cls, identity: str | None = None, **about: str | None) -> "Journal":
        """A new one, held; ``about`` says which run, of which experiment, on which server.

        Raises:
            TrackingError: the folder cannot be written.
        """
        identity = identity or uuid.uuid4().hex
        directory, making = root() / identity, root() / f".{identity}-{uuid.uuid4().hex}"
        with _translate_errors(directory):
            making.mkdir(parents=True, mode=0o700)
            connection = sqlite3.connect(making / DATABASE)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(SCHEMA)
            finally:
                connection.close()
            lock = _lock(making)
            lock.acquire()
            making.rename(directory)  # so that there is no journal but a whole one, and held
        made = cls(directory)
        made._file_lock = lock
        made.set_meta(**{"start_ms": str(now_ms()), **about})
        return made

    def acquire(self, wait_s: float = 0) -> bool:
        """Take its lock until `close`, or until this process ends; False if another has it.

        Its holder is the one that writes the run, or delivers what a dead one left.
        """
        from filelock import Timeout

        if self._file_lock is None:
            lock = _lock(self.directory)
            try:
                lock.acquire(timeout=wait_s)
            except Timeout:
                return False
            self._file_lock = lock
        return True

    def close(self) -> None:
        with self._lock:
            self._connection.close()
        if self._file_lock:
            self._file_lock.release()
            self._file_lock = None

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.close()

    # What the run is told

    def log_metrics(
        self, metrics: Mapping[str, float], time_ms: int, step: int, *, once: bool = False
    ) -> None:
        """Where the disk is full they wait in memory for a later call, and one line says so.

        Of a run that goes on, a point is left out that it had: with ``once`` whatever its value.
        """
        with self._lock:
            self._unwritten += [
                ("metric", name, _storable(value), time_ms, step)
                for name, value in metrics.items()
                if not (had := self._logged_before.get((name, step)))
                or not (once or _storable(value) in had)
            ]
            if time.monotonic() < self._retry_at:
                return
            try:
                with self._connection:
                    self._insert(self._unwritten)
            except sqlite3.OperationalError as error:
                if not self._retry_at:
                    log.warning(
                        "metrics wait in memory: %s cannot be written (%s); make room there",
                        self.directory,
                        error,
                    )
                self._retry_at = time.monotonic() + FULL_DISK_RETRY_S
            else:
                self._unwritten, self._retry_at = [], 0

    def log_params(self, params: Mapping[str, str]) -> None:
        """Those that are here already are left.

        Raises:
            TrackingError: one is here with another value: params of a run do not change.
        """
        held = self._latest_values("param")
        for name, value in params.items():
            if held.get(name, value) != value:
                raise TrackingError(
                    f"param {name} of this run is {held[name]}, and cannot become {value}: params "
                    "do not change; log a tag or a metric"
                )
        self._append("param", {k: v for k, v in params.items() if k not in held})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append("tag", tags)

    def tag(self, name: str) -> str | None:
        return self._latest_values("tag").get(name)

    def add_file(self, source: Path | bytes, path: str) -> None:
        """Copy a file, or write its content, to be sent as the artifact ``path``."""
        folder = uuid.uuid4().hex
        local = self._local_path(folder, path)
        with _translate_errors(self.directory):
            local.parent.mkdir(parents=True)
            digest, size = _copy_durably(source, local)
            with self._lock, self._connection:
                replaced = self._scalar("SELECT folder FROM files WHERE path = ?", path)
                self._connection.execute("DELETE FROM files WHERE path = ?", (path,))
                self._connection.execute(
                    "INSERT INTO files (path, folder, sha256, size) VALUES (?, ?, ?, ?)",
                    (path, folder, digest, size),
                )
            if replaced is not None:
                shutil.rmtree(self.directory / FILES / replaced, ignore_errors=True)

    def end(self, status: Status) -> None:
        """The last word of the run: FAILED where metrics still wait for room on the disk.

        Raises:
            TrackingError: there is no such room.
        """
        self._retry_at = min(self._retry_at, 1e-9)
        self.log_metrics({}, 0, 0)
        full = bool(self._unwritten)
        self.set_meta(status="FAILED" if full else status, end_ms=str(now_ms()), status_sent=None)
        if full:
            raise TrackingError(
                f"{len(self._unwritten)} metrics were lost: {self.directory} cannot be written; "
                "make room there"
            )

    def reopen(self) -> None:
        """The run goes on, in another process than the one it began in."""
        self._load_logged_points()
        for name in END_REASON_TAGS:
            if why := self.tag(name):
                self.set_tags({name: f"{why}; then continued"})
        self.set_meta(status=None, end_ms=None, status_sent=None, opened=None)

    def import_history(
        self,
        points: Iterable[tuple[str, float, int, int]],
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> None:
        """Begin with what the server has of a run that another machine wrote: see `store.written`.

        These are delivered, and not logged again.
        """
        self._append("param", params)
        self._append("tag", tags)
        with _translate_errors(self.directory), self._lock, self._connection:
            self._insert(
                ("metric", name, _storable(value), time_ms, step)
                for name, value, time_ms, step in points
            )
            last = self._scalar("SELECT coalesce(max(seq), 0) FROM entries")
        self.mark_delivered(last)

    def checkpoint_wal(self, mode: Literal["FULL", "PASSIVE"] = "FULL") -> None:
        """Force what is written onto the disk: it survives a power cut as well.

        FULL takes all and makes writers wait for it; PASSIVE takes what it can get beside them.
        """
        with self._lock, contextlib.suppress(sqlite3.OperationalError):  # a full disk: told above
            self._connection.execute(f"PRAGMA wal_checkpoint({mode})")

    # What was noted about it

    def get_meta(self, name: str) -> str | None:
        with self._lock:
            found = self._scalar("SELECT value FROM about WHERE name = ?", name)
        return None if found is None else str(found)

    def set_meta(self, **values: str | None) -> None:
        """Replace what is noted under these names; None removes it."""
        with _translate_errors(self.directory), self._lock, self._connection:
            for name, value in values.items():
                self._connection.execute("DELETE FROM about WHERE name = ?", (name,))
                if value is not None:
                    self._connection.execute("INSERT INTO about VALUES (?, ?)", (name, value))

    @property
    def run_id(self) -> str | None:
        """Of the server, once it has the run."""
        return self.get_meta("run_id")

    @property
    def reference(self) -> str:
        return self.run_id or PREFIX + self.id

    # What the server gets

    def pending_entries(self, limit: int) -> list[Entry]:
        """The next ones that were not delivered, in order; up to ``most``."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT seq, kind, name, value, time, step FROM entries "
                "WHERE seq > ? AND refused IS NULL ORDER BY seq LIMIT ?",
                (self._last_delivered(), limit),
            ).fetchall()
        return [
            Entry(
                seq=seq,
                kind=kind,
                name=name,
                time=time_ms,
                step=step,
                value=float(value) if kind == "metric" else str(value),
            )
            for seq, kind, name, value, time_ms, step in rows
        ]

    def mark_delivered(self, seq: int) -> None:
        """The server has all entries up to this one."""
        self.set_meta(sent=str(seq))

    def mark_entry_refused(self, seq: int, why: str) -> None:
        """The server will never take this entry; it is kept here with the reason."""
        with self._lock, self._connection:
            self._connection.execute("UPDATE entries SET refused = ? WHERE seq = ?", (why, seq))

    def next_pending_file(self) -> PendingFile | None:
        with self._lock:
            row = self._connection.execute(
                "SELECT seq, path, folder, sha256, size FROM files "
                "WHERE sent = 0 AND refused IS NULL ORDER BY seq LIMIT 1"
            ).fetchone()
        if row is None:
            return None
        seq, path, folder, sha256, size = row
        return PendingFile(
            seq=seq, path=path, sha256=sha256, size=size, local_path=self._local_path(folder, path)
        )

    def mark_file_sent(self, seq: int) -> None:
        with self._lock, self._connection:
            self._connection.execute("UPDATE files SET sent = 1 WHERE seq = ?", (seq,))

    def mark_file_refused(self, seq: int, why: str) -> None:
        """The server will never take this file; it is kept here with the reason."""
        with self._lock, self._connection:
            self._connection.execute("UPDATE files SET refused = ? WHERE seq = ?", (why, seq))

    def requeue_all(self) -> None:
        """The server has lost the run: all of it waits again."""
        with self._lock, self._connection:
            self._connection.execute("UPDATE files SET sent = 0")
        self.set_meta(run_id=None, opened=None, sent=None, status_sent=None)

    def backlog(self) -> Backlog:
        with self._lock:
            count = "SELECT count(*) FROM entries WHERE seq > ? AND refused IS NULL"
            entries = self._connection.execute(count, (self._last_delivered(),)).fetchone()[0]
            files, size = self._connection.execute(
                "SELECT count(*), coalesce(sum(size), 0) FROM files "
                "WHERE sent = 0 AND refused IS NULL"
            ).fetchone()
        ended = self.get_meta("status") is not None and self.get_meta("status_sent") is None
        return Backlog(entries=entries, files=files, bytes=size, status=ended)

    def refusals(self) -> list[str]:
        with self._lock:
            rows = self._connection.execute(
                "SELECT kind, name, refused FROM entries WHERE refused IS NOT NULL "
                "UNION ALL SELECT 'artifact', path, refused FROM files WHERE refused IS NOT NULL"
            ).fetchall()
        return [f"{kind} {name}: {why}" for kind, name, why in rows]

    def requeue_rejected(self) -> None:
        """What the server has refused waits again: it may have been mended, or made larger."""
        with _translate_errors(self.directory), self._lock, self._connection:
            self._connection.execute("UPDATE files SET refused = NULL")
            self._connection.execute(
                "INSERT INTO entries (kind, name, value, time, step) "
                "SELECT kind, name, value, time, step FROM entries AS old "
                "WHERE refused IS NOT NULL AND NOT (kind = 'tag' AND EXISTS (SELECT 1 FROM entries "
                "WHERE kind = 'tag' AND name = old.name AND seq > old.seq)) ORDER BY seq"
            )
            self._connection.execute("DELETE FROM entries WHERE refused IS NOT NULL")

    def _migrate(self) -> None:
        """A journal from before files had folders by chance: each was in one named by its number.

        One without a sha256 was never copied in full.
        """

        def is_old() -> bool:
            columns = self._connection.execute("PRAGMA table_info(files)").fetchall()
            return "folder" not in {name for _, name, *_ in columns}

        if is_old():
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                if is_old():  # no other process was quicker
                    for change in MIGRATION:
                        self._connection.execute(change)

    def _load_logged_points(self) -> None:
        with self._lock:
            rows = self._connection.execute(
                "SELECT name, step, value FROM entries WHERE kind = 'metric'"
            ).fetchall()
        for name, step, value in rows:
            self._logged_before.setdefault((name, step), set()).add(value)

    def _append(self, kind: Kind, values: Mapping[str, str]) -> None:
        if values:
            now = now_ms()
            with _translate_errors(self.directory), self._lock, self._connection:
                self._insert((kind, name, value, now, 0) for name, value in values.items())

    def _insert(self, rows: Iterable[Sequence[Any]]) -> None:
        self._connection.executemany(
            "INSERT INTO entries (kind, name, value, time, step) VALUES (?, ?, ?, ?, ?)", rows
        )

    def _latest_values(self, kind: Kind) -> dict[str, str]:
        """The latest value of each."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT name, value FROM entries WHERE kind = ? AND kind <> 'metric' ORDER BY seq",
                (kind,),
            ).fetchall()
        return dict(rows)

    def _scalar(self, query: str, *values: Any) -> Any:
        row = self._connection.execute(query, values).fetchone()
        return None if row is None else row[0]

    def _last_delivered(self) -> int:
        return int(self._scalar("SELECT value FROM about WHERE name = 'sent'") or 0)

    def _local_path(self, folder: str, path: str) -> Path:
        return self.directory / FILES / folder / Path(path).name


def _storable(value: float) -> float | str:
    """SQLite makes NULL of what is not a number."""
    return value if value == value else "nan"


def now_ms() -> int:
    return int(time.time() * 1000)


def _lock(directory: Path) -> "FileLock":
    from filelock import FileLock

    return FileLock(directory / LOCK, timeout=0)


def _copy_durably(source: Path | bytes, target: Path) -> tuple[str, int]:
    """Write and force to the disk; returns sha256 and size."""
    with target.open("wb") as out:
        if isinstance(source, bytes):
            out.write(source)
        else:
            with source.open("rb") as opened:
                shutil.copyfileobj(opened, out)
        out.flush()
        os.fsync(out.fileno())
    return sha256_of(target), target.stat().st_size


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _translate_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise TrackingError(
            f"the journal {directory} cannot be used ({error}): make room there, or let "
            "EUROSAT_CACHE name another folder"
        ) from error
