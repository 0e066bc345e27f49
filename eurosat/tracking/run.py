"""Runs that this machine writes: into a journal, and from there to the server.

Written on ``MlflowClient`` with explicit run ids: MLflow's fluent API keeps global state, which
parallel trials would share.
"""

import contextlib
import logging
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eurosat.errors import TrackingError
from eurosat.tracking import journal_index, mlflow_client
from eurosat.tracking.journal import PREFIX, Backlog, Journal, Status, now_ms
from eurosat.tracking.system_metrics import SystemMetrics
from eurosat.tracking.uploader import BackgroundUploader

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SYNC_WAIT_S = 60.0
"""A run that is to go on waits so long for a `sync` that sends its journal at this moment."""
FORBIDDEN_IN_NAMES = re.compile(r"[^/\w.\- :]")
"""What MLflow refuses in the name of a metric."""


class Run:
    """One run that this process writes. Methods may be called from several threads.

    What a method has returned from survives this process, and arrives at the server when it can.
    """

    def __init__(self, journal: Journal, client: "MlflowClient") -> None:
        self._journal, self._uploader = journal, BackgroundUploader(journal, client)
        self._last_id: str | None = None

    @property
    def run_id(self) -> str:
        """The server's id; ``journal:ID`` as long as the server has not been reached."""
        return self._last_id or self._journal.reference

    @property
    def journal(self) -> str:
        """By which `run` continues it, and readers find it on any server: ``journal:ID``."""
        return PREFIX + self._journal.id

    @property
    def age_s(self) -> float:
        """Since it was begun, by whichever process."""
        return (now_ms() - int(self._journal.get_meta("start_ms") or now_ms())) / 1000

    def log_metrics(
        self, metrics: Mapping[str, float], step: int = 0, *, once: bool = False
    ) -> None:
        """Log metrics with the present time; ``once`` leaves a step's point that is there already.

        Characters that MLflow does not allow in a name become underscores.
        """
        named = {FORBIDDEN_IN_NAMES.sub("_", key): float(value) for key, value in metrics.items()}
        self._journal.log_metrics(named, now_ms(), step, once=once)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested mappings become dotted names.

        Raises:
            TrackingError: a param was logged with another value before.
        """
        self._journal.log_params({key: str(value) for key, value in flatten(params).items()})

    def set_tags(self, tags: Mapping[str, object]) -> None:
        self._journal.set_tags({key: str(value) for key, value in tags.items()})

    def tag(self, name: str) -> str | None:
        """What this run was tagged with."""
        return self._journal.tag(name)

    def log_file(self, file: Path, folder: str | None = None) -> None:
        self._journal.add_file(file, f"{folder}/{file.name}" if folder else file.name)

    def log_folder(self, folder: Path, into: str | None = None) -> None:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            inside = file.relative_to(folder).as_posix()
            self._journal.add_file(file, f"{into}/{inside}" if into else inside)

    def log_text(self, text: str, path: str) -> None:
        self._journal.add_file(text.encode(), path)

    def wait_for_start(self) -> None:
        """Until the server has the run, was seen to be away, or has let it wait for seconds."""
        self._uploader.wait_for_start()

    def backlog(self) -> Backlog:
        """What the server does not have yet."""
        return self._journal.backlog()

    def checkpoint(self) -> None:
        """Force what was logged onto the disk: a power cut spares it too."""
        self._journal.checkpoint_wal()

    def finish(self, status: Status | None) -> None:
        """Send what is left, and the status; what cannot be sent is told in one line and kept.

        Raises:
            TrackingError: the disk had no room for metrics.
        """
        try:
            if status:
                self._journal.end(status)
        except TrackingError:  # no room
            self._uploader.report_failed()
            raise
        finally:
            delivered, journal = self._uploader.finish(), self._journal
            self._last_id = journal.reference
            self._log_undelivered(delivered)
            ended_well = status is None or (
                status == "FINISHED" and journal.get_meta("status_sent")
            )
            if delivered and not journal.refusals() and ended_well:
                journal.remove()
            else:  # not sent, or to be continued
                journal.close()

    def _log_undelivered(self, delivered: bool) -> None:
        journal = self._journal
        if not delivered:
            log.warning(
                "run %s: the tracking server does not have %s yet (%s); it is kept in %s, and "
                "`python -m eurosat.tracking sync` sends it",
                self.run_id,
                journal.backlog(),
                self._uploader.last_error or "it does not answer",
                journal.directory,
            )
        elif refused := journal.refusals():
            log.warning(
                "run %s: the tracking server refused %d entries, kept in %s, the first: %s",
                self.run_id,
                len(refused),
                journal.directory,
                refused[0],
            )


class NullRun(Run):
    """A run that keeps nothing: of the processes beside the one that logs."""

    def __init__(self) -> None: ...
    @property
    def run_id(self) -> str:
        return ""

    @property
    def journal(self) -> str:
        return ""

    def log_metrics(
        self, metrics: Mapping[str, float], step: int = 0, *, once: bool = False
    ) -> None: ...
    def log_params(self, params: Mapping[str, Any]) -> None: ...
    def set_tags(self, tags: Mapping[str, object]) -> None: ...
    def tag(self, name: str) -> str | None: ...
    def log_file(self, file: Path, folder: str | None = None) -> None: ...
    def log_folder(self, folder: Path, into: str | None = None) -> None: ...
    def log_text(self, text: str, path: str) -> None: ...
    def backlog(self) -> Backlog:
        return Backlog(entries=0, files=0, bytes=0, status=False)

    def checkpoint(self) -> None: ...
    def finish(self, status: Status | None) -> None: ...


@contextmanager
def run(
    experiment: str,
    name: str,
    *,
    parent: str | None = None,
    journal: str | None = None,
    resume: str | None = None,
    tags: Mapping[str, object] | None = None,
    system_metrics: bool = True,
    killed_by: tuple[type[BaseException], ...] = (),
) -> Iterator[Run]:
    """Open a run and end it with its true status.

    That is FINISHED, FAILED by an exception, or KILLED by an interrupt or one of ``killed_by``;
    exceptions go on to the caller. With ``parent`` the run stands below it, in its experiment.
    Where the server is away, the run goes on without it.

    ``journal`` names the journal of a new run (`new_journal`), so that the caller can keep its
    name first. ``resume`` opens the run of that journal again (`can_continue`), in a new journal
    where it is another machine's. Without it and without
    ``parent``, the run that ``mlflow run`` made for this process (MLFLOW_RUN_ID) is joined rather
    than a second one opened; beside a resumed one it gets the tag ``continued.run_id``.

    Raises:
        TrackingError: the server's address is not one that MLflow knows, or the journal cannot
            be written.
    """
    with mlflow_client.translate_errors():
        client = mlflow_client.client()
    journal_index.prune_old()
    opened = Run(_open_journal(experiment, name, parent, journal, resume), client)
    status: Status = "FAILED"
    sampler: SystemMetrics | None = None
    try:
        opened.wait_for_start()
        own = {
            "code.commit": code_commit(),
            "mlflow.user": user(),
            "mlflow.source.name": _command_name(),
        }
        opened.set_tags(own | dict(tags or {}))
        sampler = SystemMetrics(opened.log_metrics, opened.age_s) if system_metrics else None
        yield opened
        status = "FINISHED"
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, *killed_by)):
            status = "KILLED"
        raise
    finally:
        if sampler:
            sampler.stop()
        opened.finish(status)


@contextmanager
def append_to(reference: str) -> Iterator[Run]:
    """Add to a run that another process has opened and ends, or has ended.

    Raises:
        TrackingError: the server's address is not one that MLflow knows, or the journal cannot
            be written.
    """
    with mlflow_client.translate_errors():
        client = mlflow_client.client()
    opened = Run(Journal.create(server=mlflow_client.tracking_uri(), attached=reference), client)
    try:
        yield opened
    finally:
        opened.finish(None)


def fail(reference: str, why: str) -> None:
    """End a run whose process can no longer do it: FAILED, with the tag ``failed.why``."""
    end(reference, "FAILED", {"failed.why": why})


def end(reference: str, status: Status, tags: Mapping[str, object] | None = None) -> None:
    """End a run whose process can no longer do it."""
    with mlflow_client.translate_errors():
        client = mlflow_client.client()
    directory = journal_index.find_journal(reference)
    journal = journal_index.try_open(directory) if directory else None
    if journal is None or not journal.acquire():
        journal = Journal.create(server=mlflow_client.tracking_uri(), attached=reference)
    over = Run(journal, client)
    over.set_tags(tags or {})
    over.finish(status)


def new_journal() -> str:
    """A name for the journal of a run that is not there yet."""
    return PREFIX + uuid.uuid4().hex


def can_continue(reference: str | None) -> bool:
    """Whether this run's journal is here, it did not end well, and nobody deleted it since."""
    from mlflow.exceptions import MlflowException

    directory = journal_index.find_journal(reference) if reference else None
    journal = journal_index.try_open(directory) if directory else None
    if journal is None:
        return False
    try:
        run_id, status = journal.run_id, journal.get_meta("status")
    finally:
        journal.close()
    if run_id is None or status == "FINISHED":
        return status != "FINISHED"
    try:
        return bool(mlflow_client.client().get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        return error.error_code not in mlflow_client.NOT_FOUND_CODES  # away: it may well have it


def journal_state(journal: str) -> Literal["new", "open", "over"]:
    """Whether a run of that journal was begun, here or on another machine, and whether it ended
    well; "new" where the server, which alone may know, is away.
    """
    if can_continue(journal):
        return "open"
    if journal_index.find_journal(journal):
        return "over"
    with contextlib.suppress(TrackingError):
        return "over" if mlflow_client.get(journal).status == "FINISHED" else "open"
    return "new"


def code_commit() -> str:
    """The commit of the working directory, with ``-dirty`` where files differ from it.

    Reports and docs aside: a benchmark that has written its own measures the same code again. Where
    there is no repository, as in an image of the code, EUROSAT_COMMIT says it.
    """
    try:
        differ = ["diff", "--name-only", "HEAD", "--", ":/", ":(top,exclude)reports"]
        differ += [":(top,exclude)docs", ":(top,exclude)*.md"]
        commit, changed = (
            subprocess.run(
                ["git", *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], differ)
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("EUROSAT_COMMIT", "unknown")
    return f"{commit}-dirty" if changed else commit


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in some containers
        return "unknown"


def _open_journal(
    experiment: str, name: str, parent: str | None, journal: str | None, resume: str | None
) -> Journal:
    made_by_mlflow_run = None if parent else os.environ.get("MLFLOW_RUN_ID")
    if resume:
        if (directory := journal_index.find_journal(resume)) is None:
            with mlflow_client.translate_errors():
                run_id = mlflow_client.to_run_id(resume)
                held = mlflow_client.snapshot(run_id)
            made = Journal.create(  # by the same name: runs below it know it by that
                resume.removeprefix(PREFIX),
                server=mlflow_client.tracking_uri(),
                experiment=experiment,
                run_name=name,
                run_id=run_id,
                parent=held.parent,
                start_ms=str(held.start_ms),
            )
            made.import_history(held.points, held.params, held.tags)
            made.reopen()
            return made
        continued = Journal(directory)
        if not continued.acquire(SYNC_WAIT_S):
            continued.close()
            raise TrackingError(f"another process writes the journal {directory}")
        continued.reopen()
        if made_by_mlflow_run:
            with append_to(made_by_mlflow_run) as beside:
                beside.set_tags({"continued.run_id": continued.reference})
        return continued
    return Journal.create(
        journal.removeprefix(PREFIX) if journal else None,
        server=mlflow_client.tracking_uri(),
        experiment=experiment,
        run_name=name,
        parent=parent,
        run_id=made_by_mlflow_run,
    )


def _command_name() -> str:
    main = sys.modules["__main__"].__spec__
    return f"python -m {main.name}" if main else Path(sys.argv[0]).name
