"""From a journal to the server: what it holds, once, however often that is interrupted."""

import logging
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eurosat.errors import TrackingError
from eurosat.tracking import mlflow_client
from eurosat.tracking.journal import PREFIX, Entry, Journal, PendingFile, sha256_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

UPLOAD_INTERVAL_S = 5.0
"""Entries are sent in batches at most this often; what is left goes when the run ends."""
MAX_ENTRIES, MAX_PARAMS_OR_TAGS = 1000, 100
"""MLflow's limits on one request: in all, and of params or tags."""
MIN_BACKOFF_S, MAX_BACKOFF_S = 1.0, 30.0
"""Before the first repetition, doubled up to the cap; a random half of it is waited."""
START_TIMEOUT_S = 5.0
"""A run waits so long for the server at its start, and then begins without it."""
STALL_TIMEOUT_S = 20.0
"""At the end a run waits for as long as the server gets on; and then so long for nothing."""
UNREACHABLE_TIMEOUT_S = 1.0
"""So long, at its start and at its end, for one that an earlier run has waited for in vain."""
MIN_BYTES_PER_S = 250_000
"""Bytes a second, there and back: a file that is on its way for as long as that is no fault."""
PROGRESS_AFTER_S = 2.0


class JournalUploader:
    """Carries one journal to its server, one request a step."""

    def __init__(self, journal: Journal, client: "MlflowClient") -> None:
        self._journal, self._client = journal, client
        self.file_deadline = 0.0
        """Until then a file may be on its way, on the clock of `time.monotonic`."""

    def step(self) -> bool:
        """Send what is next; False where nothing waits. May be repeated after any exception.

        Raises:
            MlflowException, OSError: the server is away, refuses the credentials, or is wrong.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self._step()
        except MlflowException as error:
            if not self._is_lost(error):
                raise
            log.warning("the server no longer has run %s: it is made anew", self._journal.run_id)
            self._journal.requeue_all()
            return True

    def _step(self) -> bool:
        if not self._journal.get_meta("opened"):
            self._open_run()
        elif entries := _first_batch(self._journal.pending_entries(MAX_ENTRIES)):
            self._send_entries(entries)
            self._journal.mark_delivered(entries[-1].seq)
        elif file := self._journal.next_pending_file():
            self._send_file(file)
        elif self._journal.backlog().status:
            self._end_run()
        else:
            return False
        return True

    def _open_run(self) -> None:
        """Find the run, or make it: by the journal's id it is made once."""
        about = self._journal.get_meta
        run_id = about("run_id") or self._find_run()
        if about("attached"):  # the run is another's to open and to end
            if not run_id:
                raise TrackingError(f"the run {about('attached')} is not on the server yet")
        elif run_id:
            self._client.update_run(run_id, status="RUNNING", name=about("run_name"))
            self._client.set_tag(run_id, mlflow_client.JOURNAL_TAG, self._journal.id)
        else:
            run_id = self._create_run()
        self._journal.set_meta(run_id=run_id, opened="yes")

    def _create_run(self) -> str:
        about = self._journal.get_meta
        tags = {mlflow_client.JOURNAL_TAG: self._journal.id}
        experiment = about("experiment") or "Default"
        if parent := about("parent"):
            tags[mlflow_client.PARENT] = self._parent_run_id(parent)
            experiment_id = self._client.get_run(tags[mlflow_client.PARENT]).info.experiment_id
        else:
            experiment_id = mlflow_client.get_or_create_experiment(self._client, experiment)
        made = self._client.create_run(
            experiment_id, int(about("start_ms") or 0), tags, about("run_name")
        )
        self._journal.set_meta(run_id=made.info.run_id)
        return self._find_run() or str(made.info.run_id)

    def _find_run(self) -> str | None:
        """The run that this journal is of.

        Of several, made by requests that were repeated although they had arrived, the one that was
        written to, else the first; the others are deleted.

        Raises:
            TrackingError: there are several, and the journal of another process is to choose.
        """
        reference = self._journal.get_meta("attached") or PREFIX + self._journal.id
        if not reference.startswith(PREFIX):
            return reference
        found = mlflow_client.find_runs_by_tag(
            self._client, mlflow_client.JOURNAL_TAG, _journal_id(reference)
        )
        if len(found) > 1 and self._journal.get_meta("attached"):
            raise TrackingError(f"the run {reference} is there {len(found)} times for the moment")
        kept = self._journal.run_id if self._journal.run_id in found else next(iter(found), None)
        for other in found:
            if other != kept:
                self._client.delete_run(other)
        return kept

    def _parent_run_id(self, reference: str) -> str:
        """A run's id on the server, also where only its journal is known so far."""
        if not reference.startswith(PREFIX):
            return reference
        if found := mlflow_client.find_runs_by_tag(
            self._client, mlflow_client.JOURNAL_TAG, _journal_id(reference)
        ):
            return found[0]
        raise TrackingError(f"the run {reference} above this one is not on the server yet")

    def _send_entries(self, entries: Sequence[Entry]) -> None:
        """In one request; where it is refused, by halves, until the culprit is alone."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        tags = {one.name: one.value for one in entries if one.kind == "tag"}  # the last of each
        try:
            self._client.log_batch(
                self._run_id,
                metrics=[
                    Metric(one.name, one.value, one.time, one.step)
                    for one in entries
                    if one.kind == "metric"
                ],
                params=[Param(one.name, one.value) for one in entries if one.kind == "param"],
                tags=[RunTag(name, value) for name, value in tags.items()],
            )
        except MlflowException as error:
            if not _is_bad_request(error) or self._is_lost(error):
                raise
            if len(entries) > 1:
                half = len(entries) // 2
                self._send_entries(entries[:half])
                self._send_entries(entries[half:])
                return
            why = mlflow_client.first_line(error)
            log.warning("the server refuses %s %s: %s", entries[0].kind, entries[0].name, why)
            self._journal.mark_entry_refused(entries[0].seq, why)

    def _send_file(self, file: PendingFile) -> None:
        from mlflow.exceptions import MlflowException

        self.file_deadline = time.monotonic() + file.size / MIN_BYTES_PER_S
        try:
            self._upload(file)
        except (MlflowException, OSError) as error:
            if not _is_bad_request(error) or self._is_lost(error):
                raise
            why = mlflow_client.first_line(error)
            log.warning("the server refuses the artifact %s: %s", file.path, why)
            self._journal.mark_file_refused(file.seq, why)
        else:
            self._journal.mark_file_sent(file.seq)
        finally:
            self.file_deadline = 0.0

    def _upload(self, file: PendingFile) -> None:
        folder = str(Path(file.path).parent)
        self._client.log_artifact(
            self._run_id, str(file.local_path), None if folder == "." else folder
        )
        with tempfile.TemporaryDirectory() as temporary:
            copy = self._client.download_artifacts(self._run_id, file.path, temporary)
            if (arrived := sha256_of(Path(copy))) != file.sha256:
                raise TrackingError(
                    f"artifact {file.path} arrived with sha256 {arrived[:12]}, not "
                    f"{file.sha256[:12]}: it is sent again"
                )

    def _end_run(self) -> None:
        about = self._journal.get_meta
        self._find_run()  # the last word is said of one run: repeated requests have all arrived
        self._client.set_terminated(self._run_id, about("status"), int(about("end_ms") or 0))
        self._journal.set_meta(status_sent="yes")

    def report_failed(self) -> None:
        """The last word of a run whose journal has no room for it."""
        if run_id := self._journal.run_id:
            self._client.set_terminated(run_id, "FAILED")

    @property
    def _run_id(self) -> str:
        run_id = self._journal.run_id
        assert run_id is not None
        return run_id

    def _is_lost(self, error: Any) -> bool:
        """Whether the run was there and is no more: a new disk, or deleted by hand."""
        from mlflow.exceptions import MlflowException

        run_id = self._journal.run_id
        if run_id is None or self._journal.get_meta("attached"):
            return False
        if not isinstance(error, MlflowException):
            return False
        if error.error_code not in mlflow_client.NOT_FOUND_CODES:
            return False
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage != "active")
        except MlflowException as answer:
            return bool(answer.error_code in mlflow_client.NOT_FOUND_CODES)


class BackgroundUploader:
    """Delivers a journal in a thread of its own, so that the server's moods are not ours."""

    unreachable_servers: ClassVar[set[str | None]] = set()
    """Servers for which a run of this process has waited in vain: until one answers, the next run
    does not wait so long for it again."""

    def __init__(self, journal: Journal, client: "MlflowClient") -> None:
        self._journal = Journal(journal.directory)  # a connection of its own
        self._uploader = JournalUploader(self._journal, client)
        self._wake = threading.Event()
        self._attempted = threading.Event()
        self._done = threading.Event()
        self._ending = self._given_up = self._failure_pending = False
        self._error_is_local = False
        """Whether the fault is in what is here: in the journal, or in a run above that waits."""
        self._steps_done = 0
        self._server = self._journal.get_meta("server")
        self.last_error: str | None = None
        """Why the last attempt failed."""
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)
        self._thread.start()

    def wait_for_start(self) -> None:
        """Until the first attempt has ended, or START_S at most; tells of its failure."""
        self._attempted.wait(
            UNREACHABLE_TIMEOUT_S if self._server in self.unreachable_servers else START_TIMEOUT_S
        )
        if fault := self.last_error or (
            "" if self._attempted.is_set() else "it has not answered yet"
        ):
            log.warning(
                "the run is kept in %s until the tracking server takes it: %s",
                self._journal.directory,
                fault,
            )

    def finish(self) -> bool:
        """Send all that waits; False where the server made no progress for PATIENCE_S, or AWAY_S
        where it is `away`.
        """
        self._ending = True
        self._wake.set()
        started = moved = time.monotonic()
        steps, shown = self._steps_done, False
        while not self._done.wait(0.05):
            now = time.monotonic()
            if self._steps_done != steps:
                steps, moved = self._steps_done, now
            if now - started > PROGRESS_AFTER_S and not shown:
                shown = True
                log.info("sending to the tracking server: %s", self._journal.backlog())
            patience_s = (
                UNREACHABLE_TIMEOUT_S
                if self._server in self.unreachable_servers
                else STALL_TIMEOUT_S
            )
            if now - moved > patience_s and now > self._uploader.file_deadline:
                if moved == started and not self._error_is_local:
                    self.unreachable_servers.add(self._server)
                self._given_up = True
                self._wake.set()
                self._thread.join(1)  # unless a request hangs
                return False
        self._thread.join()
        return True

    def report_failed(self) -> None:
        """Past the journal, which has no room for that."""
        self._failure_pending = True

    def _loop(self) -> None:
        failures = 0
        while not self._given_up:
            ending = self._ending  # all was said before it was asked for
            try:
                if self._failure_pending:
                    self._uploader.report_failed()
                    self._failure_pending = False
                while not self._given_up and self._uploader.step():
                    self._steps_done += 1
                    self.unreachable_servers.discard(self._server)
                self.last_error, failures = None, 0
                if ending:
                    self._done.set()
                    break
                wait = UPLOAD_INTERVAL_S
            except Exception as error:  # noqa: BLE001 - a thread's boundary: training goes on
                self.last_error, self._error_is_local = (
                    mlflow_client.first_line(error),
                    isinstance(error, TrackingError),
                )
                log.debug("delivery of %s failed: %s", self._journal.reference, self.last_error)
                wait = backoff_s(failures, MIN_BACKOFF_S if self._ending else MAX_BACKOFF_S)
                failures += 1
            self._attempted.set()
            self._journal.checkpoint_wal("PASSIVE")  # beside the training, which writes on
            self._wake.wait(wait)
            self._wake.clear()
        self._journal.close()


def upload_all(
    journal: Journal, client: "MlflowClient", on_progress: Callable[[], None] | None = None
) -> str | None:
    """Send all of a journal now. Returns why it could not, or None where all arrived.

    ``told`` is called after each step.
    """
    delivery, failing_since = JournalUploader(journal, client), None
    while True:
        try:
            while delivery.step():
                failing_since = None
                if on_progress:
                    on_progress()
            return None
        except Exception as error:  # noqa: BLE001 - any fault of the far end is the answer
            failing_since = failing_since or time.monotonic()
            if time.monotonic() - failing_since > STALL_TIMEOUT_S or mlflow_client.is_denied(error):
                return mlflow_client.first_line(error)
            time.sleep(backoff_s(0, MIN_BACKOFF_S))


def backoff_s(failures: int, max_s: float) -> float:
    """Before a request is repeated that has failed so often before: doubled each time, up to
    ``most``, less a random half, so that many runs do not return to a server at once.
    """
    return min(MIN_BACKOFF_S * 2.0 ** min(failures, 60), max_s) * random.uniform(0.5, 1)  # noqa: S311


def _first_batch(entries: Sequence[Entry]) -> list[Entry]:
    """As many from the front as one request may hold."""
    taken: list[Entry] = []
    counts = {"param": 0, "tag": 0, "metric": 0}
    for one in entries:
        counts[one.kind] += 1
        if max(counts["param"], counts["tag"]) > MAX_PARAMS_OR_TAGS:
            break
        taken.append(one)
    return taken


def _journal_id(reference: str) -> str:
    return reference.removeprefix(PREFIX)


def _is_bad_request(error: Any) -> bool:
    """Whether the fault is in what was sent, so that sending it again is in vain."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        too_large = "error code 413" in str(error)  # MLflow knows no code of its own for it
        return error.get_http_status_code() == 400 or too_large
    answer = getattr(error, "response", None)  # artifacts raise what requests raises
    return getattr(answer, "status_code", None) in (400, 413, 414)
