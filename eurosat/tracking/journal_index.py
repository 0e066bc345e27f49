"""The journals of this machine: which there are, and which of them belongs to a run."""

import contextlib
import logging
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from eurosat.errors import TrackingError
from eurosat.runtime.cache import MAX_AGE_DAYS
from eurosat.tracking.journal import DATABASE, PREFIX, Journal, root

log = logging.getLogger(__name__)


def all_journals() -> Iterator[Path]:
    """The folders of the journals here, the oldest first."""
    if root().is_dir():
        found = [path.parent for path in root().glob(f"[!.]*/{DATABASE}")]
        yield from sorted(found, key=lambda folder: (_start_ms(folder), folder.name))


def find_journal(reference: str) -> Path | None:
    """The journal of a run, by its id on the server or by ``journal:ID``."""
    if reference.startswith(PREFIX):
        directory = root() / reference.removeprefix(PREFIX)
        return directory if (directory / DATABASE).is_file() else None
    for directory in all_journals():
        if _read_meta(directory).get("run_id") == reference:
            return directory
    return None


def prune_old() -> None:
    """Remove the journals that wait for nothing and that nobody came back for.

    And what a process left that was killed while it made one.
    """
    for unmade in root().glob(f".*/{DATABASE}"):
        if _is_old(unmade.parent):
            shutil.rmtree(unmade.parent, ignore_errors=True)
    for directory in list(all_journals()):
        if not _is_old(directory):
            continue
        if (old := try_open(directory)) is None:
            continue
        told = old.get_meta("status") is not None or old.get_meta("attached") is not None
        if old.acquire() and told and not old.backlog() and not old.refusals():
            old.remove()
        else:
            old.close()


def try_open(directory: Path) -> Journal | None:
    """The journal there, or None where it was removed meanwhile or cannot be read."""
    try:
        journal = Journal(directory)
        journal.get_meta("server")
    except (TrackingError, sqlite3.Error) as error:
        if directory.exists():
            log.warning("the journal %s cannot be read: %s", directory, error)
        return None
    return journal


def _is_old(directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # another process was quicker
        return time.time() - directory.stat().st_mtime > MAX_AGE_DAYS * 86400
    return False


def _start_ms(directory: Path) -> int:
    return int(_read_meta(directory).get("start_ms") or 0)


def _read_meta(directory: Path) -> dict[str, str]:
    """What is noted in a journal, or nothing where it cannot be read."""
    with (
        contextlib.suppress(sqlite3.Error, TrackingError),
        contextlib.closing(
            sqlite3.connect(f"file:{directory / DATABASE}?mode=rw", uri=True)
        ) as connection,
    ):
        return dict(connection.execute("SELECT name, value FROM about").fetchall())
    return {}
