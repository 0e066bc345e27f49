"""What a journal still has to send: entries, files and the final status, in order."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eurosat.tracking.journal_database import JournalDatabase, scalar, translate_errors

Kind = Literal["metric", "param", "tag"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A logged point of a metric, a param or a tag."""

    seq: int
    """Position in the journal, from 1."""
    kind: Kind
    name: str
    value: Any
    """A float for a metric, a string for a param or a tag."""
    time: int
    """Milliseconds since 1970."""
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingFile:
    """A file that the server does not have yet."""

    seq: int
    path: str
    """Path among the run's artifacts."""
    sha256: str
    size: int
    """Bytes."""
    local_path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Backlog:
    """How much the server does not have yet; false if it has everything."""

    entries: int
    files: int
    bytes: int
    """Total size of the files."""
    status: bool
    """Whether the final status is still to be sent."""

    def __bool__(self) -> bool:
        return bool(self.entries or self.files or self.status)

    def __str__(self) -> str:
        parts = [f"{self.entries} entries"] if self.entries else []
        parts += [f"{self.files} files ({self.bytes / 1e6:.1f} MB)"] if self.files else []
        parts += ["its status"] if self.status else []
        return ", ".join(parts) or "nothing"


class Outbox:
    """The queue of one journal.

    Entries up to the metadata key ``sent`` were delivered; an entry or file with a text in
    ``refused`` was refused by the server for that reason, and is not sent unless it is queued
    again.
    """

    def __init__(self, database: JournalDatabase) -> None:
        self._database = database

    def entries(self, limit: int) -> list[Entry]:
        """Return the next entries to send, in order, at most ``limit``."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT seq, kind, name, value, time, step FROM entries "
                "WHERE seq > ? AND refused IS NULL ORDER BY seq LIMIT ?",
                (_last_delivered(connection), limit),
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
        """Record that the server has all entries up to this one."""
        self._database.set_meta(sent=str(seq))

    def mark_entry_refused(self, seq: int, reason: str) -> None:
        """Record that the server will never accept this entry."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE entries SET refused = ? WHERE seq = ?", (reason, seq))

    def next_file(self) -> PendingFile | None:
        """Return the next file to send, or None if all were sent or refused."""
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT seq, path, folder, sha256, size FROM files "
                "WHERE sent = 0 AND refused IS NULL ORDER BY seq LIMIT 1"
            ).fetchone()
        if row is None:
            return None
        seq, path, folder, sha256, size = row
        local_path = self._database.file_path(folder, path)
        return PendingFile(seq=seq, path=path, sha256=sha256, size=size, local_path=local_path)

    def mark_file_sent(self, seq: int) -> None:
        with self._database.transaction() as connection:
            connection.execute("UPDATE files SET sent = 1 WHERE seq = ?", (seq,))

    def mark_file_refused(self, seq: int, reason: str) -> None:
        """Record that the server will never accept this file."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE files SET refused = ? WHERE seq = ?", (reason, seq))

    def backlog(self) -> Backlog:
        with self._database.transaction() as connection:
            entries = scalar(
                connection,
                "SELECT count(*) FROM entries WHERE seq > ? AND refused IS NULL",
                _last_delivered(connection),
            )
            files, size = connection.execute(
                "SELECT count(*), coalesce(sum(size), 0) FROM files "
                "WHERE sent = 0 AND refused IS NULL"
            ).fetchone()
        get_meta = self._database.get_meta
        status_unsent = get_meta("status") is not None and get_meta("status_sent") is None
        return Backlog(entries=entries, files=files, bytes=size, status=status_unsent)

    def refusals(self) -> list[str]:
        """Return what the server refused, each with the reason, such as "tag x: too long"."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT kind, name, refused FROM entries WHERE refused IS NOT NULL "
                "UNION ALL SELECT 'artifact', path, refused FROM files WHERE refused IS NOT NULL"
            ).fetchall()
        return [f"{kind} {name}: {reason}" for kind, name, reason in rows]

    def requeue_all(self) -> None:
        """Queue everything again, for a server that has lost the run."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE files SET sent = 0")
        self._database.set_meta(run_id=None, opened=None, sent=None, status_sent=None)

    def requeue_refused(self) -> None:
        """Queue again what the server refused: its limits may have changed.

        A refused tag that was set again later is dropped.
        """
        database = self._database
        with translate_errors(database.directory), database.transaction() as connection:
            connection.execute("UPDATE files SET refused = NULL")
            connection.execute(
                "INSERT INTO entries (kind, name, value, time, step) "
                "SELECT kind, name, value, time, step FROM entries AS old "
                "WHERE refused IS NOT NULL AND NOT (kind = 'tag' AND EXISTS (SELECT 1 FROM entries "
                "WHERE kind = 'tag' AND name = old.name AND seq > old.seq)) ORDER BY seq"
            )
            connection.execute("DELETE FROM entries WHERE refused IS NOT NULL")


def _last_delivered(connection: Any) -> int:
    return int(scalar(connection, "SELECT value FROM about WHERE name = 'sent'") or 0)
