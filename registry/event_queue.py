"""A queue of registry events on disk, so that a restart loses none."""

import sqlite3
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path

from eurosat.errors import ConfigError

WAITING, DONE, DEAD = "waiting", "done", "dead"
"""States of an event; dead is one that failed MAX_TRIES times."""
MAX_TRIES = 20
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 3600.0
"""Delay before the second try, and the cap up to which it doubles: 20 tries take nine hours."""
NOT_ENDED = "its process ended before it did: it was killed, or ran out of memory"
"""Message of an event whose try has begun and not ended."""
SECONDS_PER_DAY = 86_400
SCHEMA = """
CREATE TABLE IF NOT EXISTS deliveries (
    id TEXT PRIMARY KEY, received REAL NOT NULL, event TEXT NOT NULL, model TEXT NOT NULL,
    version TEXT NOT NULL, told TEXT NOT NULL, state TEXT NOT NULL, tries INTEGER NOT NULL,
    due REAL NOT NULL, said TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS about (since REAL NOT NULL);
INSERT INTO about SELECT strftime('%s', 'now') WHERE NOT EXISTS (SELECT * FROM about);
CREATE INDEX IF NOT EXISTS waiting ON deliveries (state, due);
"""
"""Existing files have these columns: `told` holds an event's detail, `said` its message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedEvent:
    id: str
    """Id of MLflow's delivery, or one of the worker's own; an id is accepted once."""
    event: str
    """Such as model_version.created."""
    model: str
    version: str
    detail: str
    """The alias, the tag or the address to notify; empty if the event has none."""
    tries: int = 0
    """Tries that have begun before this one."""
    message: str = ""
    """Why the last try failed."""


COLUMNS = {"detail": "told", "message": "said"}
SELECTED = ", ".join(COLUMNS.get(field.name, field.name) for field in fields(QueuedEvent))


class EventQueue:
    """An SQLite file that threads and processes may share; one of them processes the events."""

    def __init__(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(file, timeout=30, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")  # an acknowledged event is not lost
            self._database.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the event queue {file} cannot be opened ({error}): name a file in a writable "
                "folder with --queue"
            ) from error
        self._lock = threading.Lock()
        self._added = threading.Condition(self._lock)

    def accept(self, event: QueuedEvent) -> bool:
        """Store the event on disk; return False if its id is known already."""
        now = time.time()
        row = (event.id, now, event.event, event.model, event.version, event.detail, WAITING, now)
        with self._added, self._database:
            cursor = self._database.execute(
                "INSERT OR IGNORE INTO deliveries VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?, '')", row
            )
            self._added.notify()
            return cursor.rowcount == 1

    @property
    def created_at(self) -> float:
        """Return when this queue's file was made, in seconds since 1970."""
        with self._lock:
            return float(self._database.execute("SELECT since FROM about").fetchone()[0])

    def next(self, model: str, wait_s: float) -> QueuedEvent | None:
        """Return the oldest event that is due, or None after ``wait_s``."""
        with self._added:
            if not (events := self._due(model)):
                self._added.wait(wait_s)
                events = self._due(model)
            return events[0] if events else None

    def _due(self, model: str) -> list[QueuedEvent]:
        return self._select(
            "state = ? AND due <= ? AND model = ? ORDER BY received, rowid LIMIT 1",
            WAITING,
            time.time(),
            model,
        )

    def _select(self, where: str, *values: str | float) -> list[QueuedEvent]:
        rows = self._database.execute(
            f"SELECT {SELECTED} FROM deliveries WHERE {where}",  # noqa: S608 - no user input
            values,
        )
        names = [field.name for field in fields(QueuedEvent)]
        return [QueuedEvent(**dict(zip(names, row, strict=True))) for row in rows]

    def begin(self, event: QueuedEvent) -> None:
        """Count a try before it is made: an event that kills its process is not tried for ever."""
        self._record_try(event, NOT_ENDED)

    def finish(self, event: QueuedEvent, message: str) -> None:
        """Mark the event as done, with its result."""
        with self._lock, self._database:
            self._database.execute(
                "UPDATE deliveries SET state = ?, said = ? WHERE id = ?", (DONE, message, event.id)
            )

    def fail(self, event: QueuedEvent, message: str) -> bool:
        """Schedule another try, or none after MAX_TRIES; return whether there will be one."""
        return self._record_try(event, message)

    def _record_try(self, event: QueuedEvent, message: str) -> bool:
        tries = event.tries + 1
        state = DEAD if tries >= MAX_TRIES else WAITING
        due = time.time() + min(FIRST_BACKOFF_S * 2.0 ** (tries - 1), MAX_BACKOFF_S)
        with self._lock, self._database:
            self._database.execute(
                "UPDATE deliveries SET state = ?, tries = ?, due = ?, said = ? WHERE id = ?",
                (state, tries, due, message, event.id),
            )
        return state == WAITING

    def retry_dead(self) -> int:
        """Schedule the dead events again; return how many there are."""
        with self._added, self._database:
            cursor = self._database.execute(
                "UPDATE deliveries SET state = ?, tries = 0, due = ? WHERE state = ?",
                (WAITING, time.time(), DEAD),
            )
            self._added.notify()
            return cursor.rowcount

    def counts(self) -> dict[str, int]:
        """Return the number of events in each state."""
        with self._lock:
            rows = self._database.execute(
                "SELECT state, COUNT(*) FROM deliveries GROUP BY state"
            ).fetchall()
        return {WAITING: 0, DONE: 0, DEAD: 0} | dict(rows)

    def dead(self) -> list[QueuedEvent]:
        """Return the events that failed MAX_TRIES times, the oldest first."""
        with self._lock:
            return self._select("state = ? ORDER BY received", DEAD)

    def prune(self, days: float, *events: str) -> None:
        """Delete done events of these kinds that are older; MLflow does not send them again."""
        marks = ", ".join("?" * len(events))
        with self._lock, self._database:
            self._database.execute(
                f"DELETE FROM deliveries WHERE state = ? AND received < ? AND event IN ({marks})",  # noqa: S608 - marks only
                (DONE, time.time() - days * SECONDS_PER_DAY, *events),
            )

    def close(self) -> None:
        with self._lock:
            self._database.close()
