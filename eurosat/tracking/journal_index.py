"""Find the journals on this machine, and remove old ones."""

import contextlib
import logging
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from eurosat.errors import TrackingError
from eurosat.runtime.cache import MAX_AGE_DAYS
from eurosat.tracking.journal import PREFIX, Journal, root
from eurosat.tracking.journal_database import DATABASE

log = logging.getLogger(__name__)


def all_journals() -> Iterator[Path]:
    """Yield the folders of all journals, oldest run first."""
    if root().is_dir():
        directories = [path.parent for path in root().glob(f"[!.]*/{DATABASE}")]
        yield from sorted(directories, key=lambda folder: (_start_ms(folder), folder.name))


def find_journal(reference: str) -> Path | None:
    """Return the journal of a run, given its id on the server or ``journal:ID``."""
    if reference.startswith(PREFIX):
        directory = root() / reference.removeprefix(PREFIX)
        return directory if (directory / DATABASE).is_file() else None
    for directory in all_journals():
        if _read_meta(directory).get("run_id") == reference:
            return directory
    return None


def prune_old() -> None:
    """Remove journals that are older than MAX_AGE_DAYS and have nothing left to send.

    Old folders that a process left when it was killed while it created a journal go as well.
    """
    for unfinished in root().glob(f".*/{DATABASE}"):
        if _is_old(unfinished.parent):
            shutil.rmtree(unfinished.parent, ignore_errors=True)
    for directory in list(all_journals()):
        if not _is_old(directory):
            continue
        if (journal := try_open(directory)) is None:
            continue
        has_ended = journal.get_meta("status") is not None
        has_ended = has_ended or journal.get_meta("attached") is not None
        outbox = journal.outbox
        if journal.acquire() and has_ended and not outbox.backlog() and not outbox.refusals():
            journal.remove()
        else:
            journal.close()


def try_open(directory: Path) -> Journal | None:
    """Open a journal; None if it was removed meanwhile or cannot be read (logged)."""
    try:
        journal = Journal(directory)
        journal.get_meta("server")
    except (TrackingError, sqlite3.Error) as error:
        if directory.exists():
            log.warning("cannot read the journal %s: %s", directory, error)
        return None
    return journal


def _is_old(directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # another process may have removed it
        return time.time() - directory.stat().st_mtime > MAX_AGE_DAYS * 86400
    return False


def _start_ms(directory: Path) -> int:
    return int(_read_meta(directory).get("start_ms") or 0)


def _read_meta(directory: Path) -> dict[str, str]:
    """Return a journal's metadata, or an empty dict if it cannot be read."""
    with (
        contextlib.suppress(sqlite3.Error, TrackingError),
        contextlib.closing(
            sqlite3.connect(f"file:{directory / DATABASE}?mode=rw", uri=True)
        ) as connection,
    ):
        return dict(connection.execute("SELECT name, value FROM about").fetchall())
    return {}
