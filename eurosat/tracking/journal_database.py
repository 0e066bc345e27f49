"""The SQLite database of one journal: schema, connection and metadata."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eurosat.errors import TrackingError

DATABASE, FILES = "journal.db", "files"
"""Name of the database, and of the folder of the files to send, in a journal's folder."""

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
"""Statements that turn the schema before this one into it.

That schema had no column ``folder``: each file was in a folder named by its number, and a row
without a sha256 belonged to a file that was never copied in full.
"""


class JournalDatabase:
    """A connection to the database of a journal, which several threads may share.

    A second connection to the same journal blocks this one only while it writes a row.
    """

    def __init__(self, directory: Path) -> None:
        """Open the database, and migrate it from an earlier schema.

        Raises:
            TrackingError: the database is missing or cannot be written.
        """
        self.directory = directory
        self._lock = threading.Lock()
        with translate_errors(directory):
            self._connection = sqlite3.connect(
                f"file:{directory / DATABASE}?mode=rw",
                uri=True,
                timeout=30,
                check_same_thread=False,
            )
            _migrate(self._connection)
            self._connection.execute("PRAGMA synchronous=NORMAL")
            # checkpoints call fsync: `checkpoint_wal` makes them at moments of our choice
            self._connection.execute("PRAGMA wal_autocheckpoint=0")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread; commit at the end, or roll back after an error."""
        with self._lock, self._connection:
            yield self._connection

    def get_meta(self, name: str) -> str | None:
        with self.transaction() as connection:
            value = scalar(connection, "SELECT value FROM about WHERE name = ?", name)
        return None if value is None else str(value)

    def set_meta(self, **values: str | None) -> None:
        """Replace the metadata of these names; None removes them.

        Raises:
            TrackingError: the database cannot be written.
        """
        with translate_errors(self.directory), self.transaction() as connection:
            for name, value in values.items():
                connection.execute("DELETE FROM about WHERE name = ?", (name,))
                if value is not None:
                    connection.execute("INSERT INTO about VALUES (?, ?)", (name, value))

    def file_path(self, folder: str, artifact_path: str) -> Path:
        """Return where the copy of an artifact is; each has a ``folder`` of its own."""
        return self.directory / FILES / folder / Path(artifact_path).name

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def create_database(directory: Path) -> None:
    connection = sqlite3.connect(directory / DATABASE)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(SCHEMA)
    finally:
        connection.close()


def scalar(connection: sqlite3.Connection, query: str, *values: Any) -> Any:
    """Return the first column of the first row, or None if there is no row."""
    row = connection.execute(query, values).fetchone()
    return None if row is None else row[0]


@contextmanager
def translate_errors(directory: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the disk into one line that names the journal."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise TrackingError(
            f"cannot use the journal {directory} ({error}): free space on its disk, or set "
            "EUROSAT_CACHE to another folder"
        ) from error


def _migrate(connection: sqlite3.Connection) -> None:
    """Apply MIGRATION to a database that needs it."""

    def is_old() -> bool:
        columns = connection.execute("PRAGMA table_info(files)").fetchall()
        return "folder" not in {name for _, name, *_ in columns}

    if is_old():
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if is_old():  # another process may have migrated it meanwhile
                for statement in MIGRATION:
                    connection.execute(statement)
