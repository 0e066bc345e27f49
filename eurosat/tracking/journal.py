"""The durable local record of one run: everything is written here first, and sent from here.

A journal is a folder with an SQLite database in WAL mode, copies of the files to send, and a lock
that the process of the run keeps. What a method has written survives the death of the process.
"""

import contextlib
import logging
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eurosat.errors import TrackingError
from eurosat.runtime.cache import cache_root
from eurosat.runtime.digests import sha256_of
from eurosat.tracking.journal_database import (
    FILES,
    JournalDatabase,
    create_database,
    scalar,
    translate_errors,
)
from eurosat.tracking.outbox import Kind, Outbox

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger(__name__)

FULL_DISK_RETRY_S = 1.0
"""Wait between two attempts to write to a full disk."""
LOCK = "lock"
END_REASON_TAGS = ("killed.why", "failed.why")
"""Tags with the reason for a run's end."""
PREFIX = "journal:"
"""Prefix of a journal's id in a reference to a run."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


def root() -> Path:
    """Return the folder of this machine's journals."""
    return cache_root() / "journals"


class Journal:
    """A connection to one journal; its methods may be called from several threads."""

    def __init__(self, directory: Path) -> None:
        """Open an existing journal.

        Raises:
            TrackingError: there is no journal in this folder, or it cannot be written.
        """
        self.directory = directory
        self.id = directory.name
        self._database = JournalDatabase(directory)
        self.outbox = Outbox(self._database)
        self._file_lock: FileLock | None = None
        self._unwritten: list[tuple[Any, ...]] = []
        self._logged_before: dict[tuple[str, int], set[Any]] = {}
        """Values by name and step that a continued run had already: they are not logged again."""
        self._retry_at = 0.0
        """Time before which a full disk is not tried again; 0 if the disk is not full."""

    @classmethod
    def create(cls, identity: str | None = None, **meta: str | None) -> "Journal":
        """Create a journal and acquire it.

        ``meta`` names the run, its experiment and its server: ``run_name``, ``experiment``,
        ``server``, ``parent``, ``run_id``, ``start_ms``, ``user``; or ``attached``, the reference
        of a run that another process starts and ends.

        Raises:
            TrackingError: the folder cannot be written.
        """
        identity = identity or uuid.uuid4().hex
        directory, unfinished = root() / identity, root() / f".{identity}-{uuid.uuid4().hex}"
        with translate_errors(directory):
            unfinished.mkdir(parents=True, mode=0o700)
            create_database(unfinished)
            lock = _lock(unfinished)
            lock.acquire()
            unfinished.rename(directory)  # other processes see only complete, locked journals
        journal = cls(directory)
        journal._file_lock = lock
        journal.set_meta(**{"start_ms": str(now_ms()), "user": user(), **meta})
        return journal

    def acquire(self, wait_s: float = 0) -> bool:
        """Lock the journal until `close` or the end of this process; False if it is locked.

        Who has the lock writes the run, or sends what a dead process left.
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
        """Close the database and release the lock."""
        self._database.close()
        if self._file_lock:
            self._file_lock.release()
            self._file_lock = None

    def remove(self) -> None:
        """Delete the journal from the disk, and close it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.close()

    def get_meta(self, name: str) -> str | None:
        return self._database.get_meta(name)

    def set_meta(self, **values: str | None) -> None:
        """Replace the metadata of these names; None removes them."""
        self._database.set_meta(**values)

    @property
    def run_id(self) -> str | None:
        """Id of the run on the server, or None until the server has it."""
        return self.get_meta("run_id")

    @property
    def reference(self) -> str:
        """The run's id on the server or, before it has one, ``journal:ID``."""
        return self.run_id or PREFIX + self.id

    def log_metrics(
        self, metrics: Mapping[str, float], time_ms: int, step: int, *, once: bool = False
    ) -> None:
        """Write a point of each metric.

        On a full disk the points wait in memory for a later call, and one warning is logged. In a
        continued run, points that it has already are left out; with ``once``, whatever their value.
        """
        with self._database.transaction() as connection:
            for name, value in metrics.items():
                existing = self._logged_before.get((name, step), set())
                is_repeated = bool(existing) if once else _storable(value) in existing
                if not is_repeated:
                    self._unwritten.append(("metric", name, _storable(value), time_ms, step))
            if time.monotonic() < self._retry_at:
                return
            try:
                with connection:
                    _insert(connection, self._unwritten)
            except sqlite3.OperationalError as error:
                if not self._retry_at:
                    log.warning(
                        "metrics wait in memory: cannot write %s (%s); free space on its disk",
                        self.directory,
                        error,
                    )
                self._retry_at = time.monotonic() + FULL_DISK_RETRY_S
            else:
                self._unwritten, self._retry_at = [], 0

    def log_params(self, params: Mapping[str, str]) -> None:
        """Write the params that are not in the journal yet.

        Raises:
            TrackingError: the journal has a param with another value.
        """
        existing = self._latest_values("param")
        for name, value in params.items():
            if existing.get(name, value) != value:
                raise TrackingError(
                    f"param {name} of this run is {existing[name]} and cannot become {value}: "
                    "params never change; log a tag or a metric instead"
                )
        self._append("param", {k: v for k, v in params.items() if k not in existing})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append("tag", tags)

    def tag(self, name: str) -> str | None:
        return self._latest_values("tag").get(name)

    def add_file(self, source: Path | bytes, path: str) -> None:
        """Copy a file or some content into the journal, to be sent as the artifact ``path``.

        Raises:
            TrackingError: the journal cannot be written.
        """
        folder = uuid.uuid4().hex
        copy = self._database.file_path(folder, path)
        with translate_errors(self.directory):
            copy.parent.mkdir(parents=True)
            sha256, size = _copy_durably(source, copy)
            with self._database.transaction() as connection:
                replaced = scalar(connection, "SELECT folder FROM files WHERE path = ?", path)
                connection.execute("DELETE FROM files WHERE path = ?", (path,))
                connection.execute(
                    "INSERT INTO files (path, folder, sha256, size) VALUES (?, ?, ?, ?)",
                    (path, folder, sha256, size),
                )
            if replaced is not None:
                shutil.rmtree(self.directory / FILES / replaced, ignore_errors=True)

    def end(self, status: Status) -> None:
        """Record the final status; FAILED if metrics still wait for space on the disk.

        Raises:
            TrackingError: there is no space for them.
        """
        self._retry_at = min(self._retry_at, 1e-9)  # try once more, without a second warning
        self.log_metrics({}, 0, 0)
        disk_is_full = bool(self._unwritten)
        self.set_meta(
            status="FAILED" if disk_is_full else status, end_ms=str(now_ms()), status_sent=None
        )
        if disk_is_full:
            raise TrackingError(
                f"{len(self._unwritten)} metrics were lost: cannot write {self.directory}; "
                "free space on its disk"
            )

    def reopen(self) -> None:
        """Continue a run that ended, or whose process died."""
        self._load_logged_points()
        for name in END_REASON_TAGS:
            if reason := self.tag(name):
                self.set_tags({name: f"{reason}; then continued"})
        self.set_meta(status=None, end_ms=None, status_sent=None, opened=None)

    def import_history(
        self,
        points: Iterable[tuple[str, float, int, int]],
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> None:
        """Begin with what the server has of a run that another machine wrote.

        All of it counts as delivered. `mlflow_client.snapshot` describes the arguments.
        """
        self._append("param", params)
        self._append("tag", tags)
        rows = (
            ("metric", name, _storable(value), time_ms, step)
            for name, value, time_ms, step in points
        )
        with translate_errors(self.directory), self._database.transaction() as connection:
            _insert(connection, rows)
            last = scalar(connection, "SELECT coalesce(max(seq), 0) FROM entries")
        self.outbox.mark_delivered(last)

    def checkpoint_wal(self, mode: Literal["FULL", "PASSIVE"] = "FULL") -> None:
        """Force what was written to the disk, so that it survives a power cut.

        FULL includes everything, and other writers wait for it; PASSIVE does what is possible
        beside them. On a full disk nothing happens: `log_metrics` has warned.
        """
        with (
            contextlib.suppress(sqlite3.OperationalError),
            self._database.transaction() as connection,
        ):
            connection.execute(f"PRAGMA wal_checkpoint({mode})")

    def _load_logged_points(self) -> None:
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT name, step, value FROM entries WHERE kind = 'metric'"
            ).fetchall()
        for name, step, value in rows:
            self._logged_before.setdefault((name, step), set()).add(value)

    def _append(self, kind: Kind, values: Mapping[str, str]) -> None:
        if values:
            time_ms = now_ms()
            rows = [(kind, name, value, time_ms, 0) for name, value in values.items()]
            with translate_errors(self.directory), self._database.transaction() as connection:
                _insert(connection, rows)

    def _latest_values(self, kind: Literal["param", "tag"]) -> dict[str, str]:
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT name, value FROM entries WHERE kind = ? AND kind <> 'metric' ORDER BY seq",
                (kind,),
            ).fetchall()
        return dict(rows)


def now_ms() -> int:
    """Return the milliseconds since 1970."""
    return int(time.time() * 1000)


def user() -> str:
    """Return the user's name, or "unknown"."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # some containers have no name for the user id
        return "unknown"


def _insert(connection: sqlite3.Connection, rows: Iterable[Sequence[Any]]) -> None:
    connection.executemany(
        "INSERT INTO entries (kind, name, value, time, step) VALUES (?, ?, ?, ?, ?)", rows
    )


def _storable(value: float) -> float | str:
    """Return the value as SQLite can store it: it would turn NaN into NULL."""
    return value if value == value else "nan"


def _lock(directory: Path) -> "FileLock":
    from filelock import FileLock

    return FileLock(directory / LOCK, timeout=0, thread_local=False)


def _copy_durably(source: Path | bytes, target: Path) -> tuple[str, int]:
    """Write a file and force it to the disk; return its sha256 and its size in bytes."""
    with target.open("wb") as output:
        if isinstance(source, bytes):
            output.write(source)
        else:
            with source.open("rb") as stream:
                shutil.copyfileobj(stream, output)
        output.flush()
        os.fsync(output.fileno())
    return sha256_of(target), target.stat().st_size
