"""Trainings that were cut short: where they left their state, and how one is taken up again."""

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

ORPHAN_S = 600
"""What is trained once alone waits so long for a process whose parent was killed: it ends after
the batch at hand, with its last words to a server that may be slow."""
STATE, ABOUT, DESCRIBED, CONCLUDED = "state.pt", "run.json", "described", "concluded.json"
DAMAGED = (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError)
"""What reading a state raises that was torn or tampered with."""


class CheckpointSlot:
    """The state of one training on this machine; held by one process at a time."""

    def __init__(self, directory: Path, about: Mapping[str, str]) -> None:
        self._directory = directory
        self._about = dict(about)
        self.journal: str | None
        """Of the run that stopped here, if it can go on."""
        self.concluded: dict[str, Any] | None
        """What `conclude` was told, where the process died after it."""
        held = self._held()
        self._take_up(held, held if tracking.can_continue(held) else None)

    def _take_up(self, held: str | None, journal: str | None) -> None:
        self.journal, self.concluded = journal, None
        if held:
            with contextlib.suppress(OSError, ValueError):  # it died before that
                self.concluded = json.loads((self._directory / CONCLUDED).read_text())

    def _held(self) -> str | None:
        """Journal of the run that stopped here, if it was of the same data."""
        try:
            held = json.loads((self._directory / ABOUT).read_text())
        except (OSError, ValueError):
            return None
        journal = held.pop("journal", None)
        return str(journal) if held == self._about else None

    @property
    def directory(self) -> Path:
        """What `adopt` takes over on another machine."""
        return self._directory

    def import_from(self, folder: Path) -> None:
        """Take over what the same training left on another machine, where it got further there."""
        if not (folder / ABOUT).exists():
            return
        if self.journal is None or _epochs(folder) > _epochs(self._directory):
            copied = self._directory.with_name(f"{self._directory.name}.adopted")
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(folder, copied)
            shutil.rmtree(self._directory, ignore_errors=True)
            copied.rename(self._directory)
            held = str(json.loads((self._directory / ABOUT).read_text())["journal"])
            self._take_up(held, held)

    def start_or_resume(self, name: str | None = None) -> str:
        """The journal of the run: the one that goes on, or a new one, by the name that is given.

        A run of that name that was begun, and whose state is lost, goes on from its first epoch.

        It is written here before there is a run, so that a process that is killed at any moment
        leaves one run; what another run left here is dropped.
        """
        if self.journal:
            log.info("continuing the run of %s, which was cut short", self.journal)
            for torn in self._directory.glob(".*"):  # what a killed process was writing
                torn.unlink()
            return self.journal
        known = tracking.journal_state(name) if name else "over"
        if name is None or known == "over":
            name = tracking.new_journal()
        self.journal = name if known == "open" else None
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        about = json.dumps(self._about | {"journal": name})
        atomic.atomic_write_text(self._directory / ABOUT, about)
        return name

    def record_outcome(self, told: Mapping[str, Any]) -> None:
        """Keep what came of it, before its run is ended: it is not trained again for that."""
        atomic.atomic_write_text(self._directory / CONCLUDED, json.dumps(dict(told)))

    @property
    def described(self) -> bool:
        """Whether the run already holds its configuration and split: params cannot change."""
        return (self._directory / DESCRIBED).exists()

    def mark_described(self) -> None:
        (self._directory / DESCRIBED).touch()

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state by this one, or keep the last good one where that fails."""
        import torch

        try:
            atomic.atomic_write(
                self._directory / STATE, lambda opened: torch.save(dict(state), opened)
            )
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says
            reason = str(error).splitlines()[0]
            log.warning(
                "the state of epoch %s could not be written to %s (%s): training goes on, and the "
                "state before is kept; make room there",
                state["epoch"],
                self._directory,
                reason,
            )

    def load(self) -> dict[str, Any] | None:
        """The state of the last whole epoch, or None where none was reached."""
        try:
            return _state(self._directory)
        except DAMAGED as error:
            file, kind = self._directory / STATE, type(error).__name__
            log.warning("%s cannot be read (%s): training starts anew", file, kind)
            return None

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


@contextmanager
def acquire(
    config: TrainConfig, fingerprints: Mapping[str, str], *, alone: bool = False
) -> Iterator[CheckpointSlot]:
    """The state that a dead process left of the same training, or a place for a new one.

    A process holds its place by a lock that ends with it, however it ends: a second training of
    the same configuration beside a living one gets a place of its own. The place is removed when
    the block ends without an exception. ``alone`` says that nobody else may train this: a process
    that still does is waited for.
    """
    from filelock import FileLock, Timeout

    root = config.data.cache_dir / "unfinished"
    root.mkdir(parents=True, exist_ok=True)
    cache.prune_expired(root)
    about = {**fingerprints, "tracking": tracking.tracking_uri()}
    name = hashlib.sha256(json.dumps([config.digest, about], sort_keys=True).encode()).hexdigest()
    for number in itertools.count():
        directory = root / f"{name[:16]}-{number}"
        lock = FileLock(f"{directory}.lock", timeout=ORPHAN_S if alone else 0)
        with contextlib.suppress(Timeout):
            lock.acquire()
            break
    try:
        place = CheckpointSlot(directory, about)
        yield place
        place.remove()
    finally:
        lock.release()


def _state(directory: Path) -> dict[str, Any] | None:
    import torch

    file = directory / STATE
    if not file.exists():
        return None
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _epochs(directory: Path) -> int:
    """Whole epochs that were trained there, and can be taken up."""
    with contextlib.suppress(*DAMAGED):
        if state := _state(directory):
            return int(state["epoch"])
    return 0
