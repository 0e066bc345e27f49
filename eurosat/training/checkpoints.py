"""Where the state of an unfinished training is stored, and how the next process finds it."""

import contextlib
import hashlib
import itertools
import json
import logging
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eurosat import tracking
from eurosat.config import TrainConfig
from eurosat.runtime import atomic, cache

log = logging.getLogger(__name__)

ORPHAN_TIMEOUT_S = 600
"""How long `acquire` waits, if exclusive, for a process whose parent was killed: it stops after the
current batch and sends its last metrics to a server that may be slow."""
STATE_FILE, IDENTITY_FILE = "state.pt", "run.json"
DESCRIBED_FILE, OUTCOME_FILE = "described", "concluded.json"
DAMAGED_STATE_ERRORS = (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError)
"""Raised on reading a state that is incomplete or was tampered with."""


class CheckpointSlot:
    """Folder with the state of one training on this machine; one process uses it at a time."""

    def __init__(self, directory: Path, identity: Mapping[str, str]) -> None:
        """``identity`` says what the state belongs to: fingerprints and tracking server."""
        self._directory = directory
        self._identity = dict(identity)
        self.journal: str | None
        """Journal of the unfinished run, if it can be resumed."""
        self.outcome: dict[str, Any] | None
        """What `record_outcome` stored before the process died."""
        stored = self._stored_journal()
        self._load_run(stored, stored if tracking.can_continue(stored) else None)

    def _load_run(self, stored: str | None, journal: str | None) -> None:
        self.journal, self.outcome = journal, None
        if stored:
            with contextlib.suppress(OSError, ValueError):  # the process died before writing it
                self.outcome = json.loads((self._directory / OUTCOME_FILE).read_text())

    def _stored_journal(self) -> str | None:
        """Return the journal of the run that stopped here, if its identity is this one."""
        try:
            identity = json.loads((self._directory / IDENTITY_FILE).read_text())
        except (OSError, ValueError):
            return None
        journal = identity.pop("journal", None)
        return str(journal) if identity == self._identity else None

    @property
    def directory(self) -> Path:
        """Folder that `import_from` can copy on another machine."""
        return self._directory

    def import_from(self, folder: Path) -> None:
        """Copy the state of the same training on another machine, if it has more epochs."""
        if not (folder / IDENTITY_FILE).exists():
            return
        if self.journal is None or _completed_epochs(folder) > _completed_epochs(self._directory):
            copied = self._directory.with_name(f"{self._directory.name}.adopted")
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(folder, copied)
            shutil.rmtree(self._directory, ignore_errors=True)
            copied.rename(self._directory)
            stored = str(json.loads((self._directory / IDENTITY_FILE).read_text())["journal"])
            self._load_run(stored, stored)

    def start_or_resume(self, name: str | None = None) -> str:
        """Return the journal of the run: that of the unfinished run, or a new one.

        ``name`` is the new journal's name. If a run of that name is open but its state is lost, it
        is trained again from the first epoch.

        The journal is stored here before the run exists, so that a process killed at any moment
        leaves one run. State of any other run is removed.
        """
        if self.journal:
            log.info("continuing the run of %s, which was cut short", self.journal)
            for incomplete in self._directory.glob(".*"):  # written by the killed process
                incomplete.unlink()
            return self.journal
        status = tracking.journal_state(name) if name else "over"
        if name is None or status == "over":
            name = tracking.new_journal()
        self.journal = name if status == "open" else None
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        identity = json.dumps(self._identity | {"journal": name})
        atomic.atomic_write_text(self._directory / IDENTITY_FILE, identity)
        return name

    def record_outcome(self, outcome: Mapping[str, Any]) -> None:
        """Store the result before the run is ended, so that it need not be trained again."""
        atomic.atomic_write_text(self._directory / OUTCOME_FILE, json.dumps(dict(outcome)))

    @property
    def is_described(self) -> bool:
        """Whether the run already holds its configuration and split, which are logged once."""
        return (self._directory / DESCRIBED_FILE).exists()

    def mark_described(self) -> None:
        (self._directory / DESCRIBED_FILE).touch()

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the stored state; if writing fails, keep the earlier one and log a warning."""
        import torch

        try:
            atomic.atomic_write(
                self._directory / STATE_FILE, lambda opened: torch.save(dict(state), opened)
            )
        except (OSError, RuntimeError) as error:  # torch wraps the OSError
            reason = str(error).splitlines()[0]
            log.warning(
                "the state of epoch %s could not be written to %s (%s): training goes on and the "
                "earlier state is kept; free some disk space there",
                state["epoch"],
                self._directory,
                reason,
            )

    def load(self) -> dict[str, Any] | None:
        """Return the state of the last completed epoch, or None if there is none."""
        try:
            return _read_state(self._directory)
        except DAMAGED_STATE_ERRORS as error:
            file, kind = self._directory / STATE_FILE, type(error).__name__
            log.warning("%s cannot be read (%s): training starts from the first epoch", file, kind)
            return None

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


@contextmanager
def acquire(
    config: TrainConfig, fingerprints: Mapping[str, str], *, exclusive: bool = False
) -> Iterator[CheckpointSlot]:
    """Yield the slot of this training: with the state that a dead process left, or empty.

    A lock, which ends with its process, reserves the slot. While another process trains the same
    configuration, this one gets the next slot; if ``exclusive``, it first waits up to
    `ORPHAN_TIMEOUT_S` for the other one. The slot is removed if the block ends without an
    exception.
    """
    from filelock import FileLock, Timeout

    root = config.data.cache_dir / "unfinished"
    root.mkdir(parents=True, exist_ok=True)
    cache.prune_expired(root)
    identity = {**fingerprints, "tracking": tracking.tracking_uri()}
    key = json.dumps([config.digest, identity], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()
    for number in itertools.count():
        directory = root / f"{name[:16]}-{number}"
        lock = FileLock(f"{directory}.lock", timeout=ORPHAN_TIMEOUT_S if exclusive else 0)
        with contextlib.suppress(Timeout):
            lock.acquire()
            break
    try:
        slot = CheckpointSlot(directory, identity)
        yield slot
        slot.remove()
    finally:
        lock.release()


def _read_state(directory: Path) -> dict[str, Any] | None:
    import torch

    file = directory / STATE_FILE
    if not file.exists():
        return None
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _completed_epochs(directory: Path) -> int:
    """Return the number of completed epochs in a folder's state; 0 if it cannot be read."""
    with contextlib.suppress(*DAMAGED_STATE_ERRORS):
        if state := _read_state(directory):
            return int(state["epoch"])
    return 0
