"""Write runs: into a journal on this machine, and from there to the server.

All calls use ``MlflowClient`` with explicit run ids: MLflow's fluent API keeps global state, which
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
from eurosat.tracking import journal_index, journal_runs, mlflow_client
from eurosat.tracking.journal import PREFIX, Journal, Status, now_ms, user
from eurosat.tracking.outbox import Backlog
from eurosat.tracking.system_metrics import SystemMetrics
from eurosat.tracking.uploader import BackgroundUploader

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SYNC_WAIT_S = 60.0
"""Longest wait of a continued run for a `sync` that is sending its journal."""
FORBIDDEN_IN_NAMES = re.compile(r"[^/\w.\- :]")
"""Characters that MLflow does not allow in the name of a metric."""


class Run:
    """A run that this process writes. Methods may be called from several threads.

    Once a method has returned, its data survive this process and reach the server when possible.
    """

    def __init__(self, journal: Journal, client: "MlflowClient") -> None:
        self._journal, self._uploader = journal, BackgroundUploader(journal, client)
        self._last_id: str | None = None
        self.failed = False
        """Set it where the result is negative, as of a failed validation: the run ends FAILED."""
        self.is_delivered = False
        """Whether the server had everything when the run ended."""

    @property
    def run_id(self) -> str:
        """The id on the server; ``journal:ID`` until the server has the run."""
        return self._last_id or self._journal.reference

    @property
    def journal(self) -> str:
        """``journal:ID``, with which `run` continues it and readers find it on any server."""
        return PREFIX + self._journal.id

    @property
    def age_s(self) -> float:
        """Seconds since the run began, in this process or an earlier one."""
        return (now_ms() - int(self._journal.get_meta("start_ms") or now_ms())) / 1000

    def log_metrics(
        self, metrics: Mapping[str, float], step: int = 0, *, once: bool = False
    ) -> None:
        """Log metrics with the current time; characters that MLflow forbids become underscores.

        With ``once``, a continued run leaves out a step that it has logged already.
        """
        allowed = {FORBIDDEN_IN_NAMES.sub("_", key): float(value) for key, value in metrics.items()}
        self._journal.log_metrics(allowed, now_ms(), step, once=once)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log params; nested mappings become dotted names.

        Raises:
            TrackingError: a param was logged with another value before.
        """
        self._journal.log_params({key: str(value) for key, value in flatten(params).items()})

    def set_tags(self, tags: Mapping[str, object]) -> None:
        self._journal.set_tags({key: str(value) for key, value in tags.items()})

    def tag(self, name: str) -> str | None:
        """Return the value of a tag, or None."""
        return self._journal.tag(name)

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Log a file as an artifact, in ``folder`` of the run's artifacts."""
        self._journal.add_file(file, f"{folder}/{file.name}" if folder else file.name)

    def log_folder(self, folder: Path, into: str | None = None) -> None:
        """Log all files of a folder and its subfolders, in ``into`` of the run's artifacts."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            path = file.relative_to(folder).as_posix()
            self._journal.add_file(file, f"{into}/{path}" if into else path)

    def log_text(self, text: str, path: str) -> None:
        self._journal.add_file(text.encode(), path)

    def wait_for_start(self) -> None:
        """Wait until the server has the run or cannot be reached, for some seconds at most."""
        self._uploader.wait_for_start()

    def backlog(self) -> Backlog:
        """Return what the server does not have yet."""
        return self._journal.outbox.backlog()

    def checkpoint(self) -> None:
        """Force what was logged to the disk, so that it survives a power cut."""
        self._journal.checkpoint_wal()

    def finish(self, status: Status | None) -> None:
        """Send the rest and the status; what cannot be sent is kept, and one warning says so.

        With None as the status the run goes on, or another process ends it.

        Raises:
            TrackingError: there was no space on the disk for metrics.
        """
        try:
            if status:
                self._journal.end(status)
        except TrackingError:  # no space on the disk
            self._uploader.report_failed()
            raise
        finally:
            delivered, journal = self._uploader.finish(), self._journal
            self.is_delivered = delivered
            self._last_id = journal.reference
            self._log_undelivered(delivered)
            ended_well = status is None or (
                status == "FINISHED" and journal.get_meta("status_sent")
            )
            if delivered and not journal.outbox.refusals() and ended_well:
                journal.remove()
            else:  # to be sent later, or to be continued
                self._uploader.close(journal)

    def summary(self, kind: str = "run") -> str:
        """Return, after the end, where MLflow shows the run, and its id on a line of its own."""
        lines = [f"{kind} {self.run_id}"]
        if self.is_delivered:  # else the server may be down
            with contextlib.suppress(TrackingError):
                lines.insert(0, f"its page: {mlflow_client.run_page(self.run_id)}")
        return "\n".join(lines)

    def _log_undelivered(self, delivered: bool) -> None:
        journal = self._journal
        if not delivered:
            log.warning(
                "run %s: the tracking server does not have %s yet (%s); it is kept in %s, and "
                "`python -m eurosat.tracking sync` sends it",
                self.run_id,
                journal.outbox.backlog(),
                self._uploader.last_error or "it does not answer",
                journal.directory,
            )
        elif refusals := journal.outbox.refusals():
            log.warning(
                "run %s: the tracking server refused %d entries (kept in %s); the first: %s",
                self.run_id,
                len(refusals),
                journal.directory,
                refusals[0],
            )


class NullRun(Run):
    """A run that logs nothing, for the processes of a distributed training that do not log."""

    def __init__(self) -> None: ...
    @property
    def run_id(self) -> str:
        return ""

    @property
    def journal(self) -> str:
        return ""

    @property
    def age_s(self) -> float:
        return 0

    def log_metrics(
        self, metrics: Mapping[str, float], step: int = 0, *, once: bool = False
    ) -> None: ...
    def log_params(self, params: Mapping[str, Any]) -> None: ...
    def set_tags(self, tags: Mapping[str, object]) -> None: ...
    def tag(self, name: str) -> str | None: ...
    def log_file(self, file: Path, folder: str | None = None) -> None: ...
    def log_folder(self, folder: Path, into: str | None = None) -> None: ...
    def log_text(self, text: str, path: str) -> None: ...
    def wait_for_start(self) -> None: ...
    def backlog(self) -> Backlog:
        return Backlog(entries=0, files=0, bytes=0, status=False)

    def checkpoint(self) -> None: ...
    def finish(self, status: Status | None) -> None: ...
    def summary(self, kind: str = "run") -> str:
        return ""


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
    """Open a run, and end it with its true status.

    The status is FINISHED, FAILED after an exception or if `Run.failed` was set, or KILLED after an
    interrupt or one of the exceptions ``killed_by``; exceptions go on to the caller. The run does
    not need the server: it is sent when the server answers.

    ``parent`` is the reference of the run above this one, which is then in the same experiment.
    ``journal`` is the reference of a new run, from `new_journal`, for callers that store it before
    the run begins. ``resume`` is the reference of a run to continue (see `can_continue`); if its
    journal is on another machine, a new one begins with what the server has.

    Without ``resume`` and ``parent``, the run that ``mlflow run`` created for this process
    (MLFLOW_RUN_ID) is used; with ``resume``, that run gets the tag ``continued.run_id``.

    Raises:
        TrackingError: MLflow does not know the kind of the server's address, or the journal
            cannot be written.
    """
    with mlflow_client.translate_errors():
        client = mlflow_client.client()
    journal_index.prune_old()
    active_run = Run(_open_journal(experiment, name, parent, journal, resume), client)
    status: Status = "FAILED"
    sampler: SystemMetrics | None = None
    try:
        active_run.wait_for_start()
        origin_tags = {
            "code.commit": code_commit(),
            journal_runs.USER_TAG: user(),
            "mlflow.source.name": _command_name(),
        }
        active_run.set_tags(origin_tags | dict(tags or {}))
        sampler = (
            SystemMetrics(active_run.log_metrics, active_run.age_s) if system_metrics else None
        )
        yield active_run
        status = "FAILED" if active_run.failed else "FINISHED"
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, *killed_by)):
            status = "KILLED"
        raise
    finally:
        if sampler:
            sampler.stop()
        active_run.finish(status)


@contextmanager
def append_to(reference: str) -> Iterator[Run]:
    """Add to a run that has ended, or that another process will end.

    Raises:
        TrackingError: MLflow does not know the kind of the server's address, or the journal
            cannot be written.
    """
    with mlflow_client.translate_errors():
        client = mlflow_client.client()
    target = Run(Journal.create(server=mlflow_client.tracking_uri(), attached=reference), client)
    try:
        yield target
    finally:
        target.finish(None)


def fail(reference: str, reason: str) -> None:
    """End a run as FAILED for its dead process; the tag ``failed.why`` gives the reason."""
    end(reference, "FAILED", {"failed.why": reason})


def end(reference: str, status: Status, tags: Mapping[str, object] | None = None) -> None:
    """End a run for its dead process."""
    with mlflow_client.translate_errors():
        client = mlflow_client.client()
    directory = journal_index.find_journal(reference)
    journal = journal_index.try_open(directory) if directory else None
    if journal is None or not journal.acquire():
        journal = Journal.create(server=mlflow_client.tracking_uri(), attached=reference)
    dead_run = Run(journal, client)
    dead_run.set_tags(tags or {})
    dead_run.finish(status)


def new_journal() -> str:
    """Return a new reference ``journal:ID`` for a run that does not exist yet."""
    return PREFIX + uuid.uuid4().hex


def can_continue(reference: str | None) -> bool:
    """Return whether a run can be continued from its journal here.

    It must not have FINISHED, and must not have been deleted on the server.
    """
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
        return (
            error.error_code not in journal_runs.NOT_FOUND_CODES
        )  # a server that is down may have it


def journal_state(journal: str) -> Literal["new", "open", "over"]:
    """Return "over" if the journal's run FINISHED, "open" if it began, "new" if it is unknown.

    A run of another machine is looked up on the server; it is "new" if the server is down.
    """
    if can_continue(journal):
        return "open"
    if journal_index.find_journal(journal):
        return "over"
    with contextlib.suppress(TrackingError):
        return "over" if mlflow_client.get(journal).status == "FINISHED" else "open"
    return "new"


def code_commit() -> str:
    """Return the commit of the working directory, with ``-dirty`` if files differ from it.

    Changes in reports and docs do not count: a benchmark that has written its report still
    measures the same code. Without a repository, as in a container image, it is EUROSAT_COMMIT.
    """
    try:
        diff = ["diff", "--name-only", "HEAD", "--", ":/", ":(top,exclude)reports"]
        diff += [":(top,exclude)docs", ":(top,exclude)*.md"]
        commit, changed = (
            subprocess.run(
                ["git", *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], diff)
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("EUROSAT_COMMIT", "unknown")
    return f"{commit}-dirty" if changed else commit


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one dict with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _open_journal(
    experiment: str, name: str, parent: str | None, journal: str | None, resume: str | None
) -> Journal:
    """Create or continue a journal; `run` describes the arguments."""
    run_of_mlflow = None if parent else os.environ.get("MLFLOW_RUN_ID")
    if not resume:
        return Journal.create(
            journal.removeprefix(PREFIX) if journal else None,
            server=mlflow_client.tracking_uri(),
            experiment=experiment,
            run_name=name,
            parent=parent,
            run_id=run_of_mlflow,
        )
    directory = journal_index.find_journal(resume)
    if directory is None:
        return _import_journal(experiment, name, parent, resume)
    existing = Journal(directory)
    if not existing.acquire(SYNC_WAIT_S):
        existing.close()
        raise TrackingError(f"another process is writing the journal {directory}: wait for it")
    existing.reopen()
    if run_of_mlflow:
        with append_to(run_of_mlflow) as other:
            other.set_tags({"continued.run_id": existing.reference})
    return existing


def _import_journal(experiment: str, name: str, parent: str | None, resume: str) -> Journal:
    """Create a journal here for a run of another machine, from what the server has.

    Raises:
        TrackingError: the run is not on the server, or was found by its tag and is of another user
            or experiment: every writer can set the tag.
    """
    with mlflow_client.translate_errors():
        run_id = mlflow_client.to_run_id(resume)
        snapshot = mlflow_client.snapshot(run_id)
        if resume.startswith(PREFIX):
            _check_origin(resume, run_id, snapshot, experiment, parent)
    journal = Journal.create(
        resume.removeprefix(PREFIX),  # the same id: child runs refer to it
        server=mlflow_client.tracking_uri(),
        experiment=experiment,
        run_name=name,
        run_id=run_id,
        parent=snapshot.parent,
        start_ms=str(snapshot.start_ms),
        user=snapshot.user,
    )
    journal.import_history(snapshot.points, snapshot.params, snapshot.tags)
    journal.reopen()
    return journal


def _check_origin(
    reference: str,
    run_id: str,
    snapshot: mlflow_client.RunSnapshot,
    experiment: str,
    parent: str | None,
) -> None:
    if snapshot.user != user():
        raise TrackingError(
            f"run {run_id} has the tag of {reference}, but is of user {snapshot.user}, not "
            f"{user()}: if it is yours, set LOGNAME={snapshot.user} to continue it"
        )
    if parent:
        expected = mlflow_client.get(parent).experiment_id
    else:
        client = mlflow_client.client()
        expected = mlflow_client.get_or_create_experiment(client, experiment)
    if snapshot.experiment_id != expected:
        raise TrackingError(
            f"run {run_id} has the tag of {reference}, but is of experiment "
            f"{snapshot.experiment_id}, not {expected} ({experiment}): start a new run, or remove "
            "that run's tag"
        )


def _command_name() -> str:
    main = sys.modules["__main__"].__spec__
    return f"python -m {main.name}" if main else Path(sys.argv[0]).name
