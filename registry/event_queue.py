"""Deliveries that were taken in and are worked off: a queue on disk that outlives its process."""

import sqlite3
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path

from eurosat.errors import ConfigError

WAITING, DONE, DEAD = "waiting", "done", "dead"
MOST_TRIES = 5
FIRST_PAUSE_S = 1.0
"""Before the second try; doubled before each further one."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    id: str
    event: str
    """Such as model_version.created."""
    model: str
    version: str
    told: str
    """Alias, or tag and its value; empty where an event has none."""
    tries: int = 0
    said: str = ""
    """Why the last try failed."""


FIELDS = tuple(field.name for field in fields(Job))


class Inbox:
    """One file; several threads and processes may share it, one of them working on it."""

    def __init__(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._store = sqlite3.connect(file, timeout=30, check_same_thread=False)
            self._store.execute("PRAGMA journal_mode=WAL")
            self._store.execute("PRAGMA synchronous=FULL")  # what was acknowledged is not lost
            self._store.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the inbox {file} cannot be opened ({error}): give --inbox a file in a folder "
                "that can be written"
            ) from error
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)

    def accept(self, job: Job) -> bool:
        """Keep it, on disk when this returns; False where that delivery is known already."""
        now = time.time()
        with self._more, self._store:
            done = self._store.execute(
                "INSERT OR IGNORE INTO deliveries VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?, '')",
                (job.id, now, job.event, job.model, job.version, job.told, WAITING, now),
            )
            self._more.notify()
            return done.rowcount == 1

    @property
    def since(self) -> float:
        """When this inbox was made, in seconds since 1970."""
        with self._lock:
            return float(self._store.execute("SELECT since FROM about").fetchone()[0])

    def next(self, model: str, wait_s: float) -> Job | None:
        """The job that has waited longest of those that are due, or None after ``wait_s``."""
        with self._more:
            if not (due := self._due(model)):
                self._more.wait(wait_s)
                due = self._due(model)
            return due[0] if due else None

    def _due(self, model: str) -> list[Job]:
        return self._jobs(
            "state = ? AND due <= ? AND model = ? ORDER BY received, rowid LIMIT 1",
            WAITING,
            time.time(),
            model,
        )

    def _jobs(self, where: str, *values: str | float) -> list[Job]:
        rows = self._store.execute(
            f"SELECT {', '.join(FIELDS)} FROM deliveries WHERE {where}",  # noqa: S608 - ours alone
            values,
        )
        return [Job(**dict(zip(FIELDS, row, strict=True))) for row in rows]

    def finish(self, job: Job, said: str) -> None:
        with self._lock, self._store:
            self._store.execute(
                "UPDATE deliveries SET state = ?, said = ? WHERE id = ?", (DONE, said, job.id)
            )

    def fail(self, job: Job, why: str) -> bool:
        """Try it again later, or after MOST_TRIES never; whether it will be tried again."""
        tries = job.tries + 1
        state = DEAD if tries >= MOST_TRIES else WAITING
        due = time.time() + FIRST_PAUSE_S * 2 ** (tries - 1)
        with self._lock, self._store:
            self._store.execute(
                "UPDATE deliveries SET state = ?, tries = ?, due = ?, said = ? WHERE id = ?",
                (state, tries, due, why, job.id),
            )
        return state == WAITING

    def revive(self) -> int:
        """Let what is dead be tried again; how many."""
        with self._more, self._store:
            revived = self._store.execute(
                "UPDATE deliveries SET state = ?, tries = 0, due = ? WHERE state = ?",
                (WAITING, time.time(), DEAD),
            )
            self._more.notify()
            return revived.rowcount

    def counts(self) -> dict[str, int]:
        with self._lock:
            rows = self._store.execute(
                "SELECT state, COUNT(*) FROM deliveries GROUP BY state"
            ).fetchall()
        return {WAITING: 0, DONE: 0, DEAD: 0} | dict(rows)

    def dead(self) -> list[Job]:
        with self._lock:
            return self._jobs("state = ? ORDER BY received", DEAD)

    def forget(self, days: float, *events: str) -> None:
        """Drop what was done so long ago; a delivery of that age is too old to be replayed."""
        marks = ", ".join("?" * len(events))
        with self._lock, self._store:
            self._store.execute(
                f"DELETE FROM deliveries WHERE state = ? AND received < ? AND event IN ({marks})",  # noqa: S608 - marks alone
                (DONE, time.time() - days * 86400, *events),
            )

    def close(self) -> None:
        with self._lock:
            self._store.close()
