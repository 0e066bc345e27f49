"""Send journals to the tracking server: everything arrives once, despite interruptions."""

import json
import logging
import random
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eurosat.errors import TrackingError
from eurosat.runtime.digests import sha256_of
from eurosat.tracking import journal_runs, mlflow_client
from eurosat.tracking.journal import Journal, user
from eurosat.tracking.outbox import Entry, PendingFile

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

UPLOAD_INTERVAL_S = 5.0
"""Pause between two batches; at the end of a run the rest is sent at once."""
MAX_ENTRIES, MAX_PARAMS_OR_TAGS = 1000, 100
"""MLflow's limits for one request: of all entries, and of params or of tags."""
MIN_BACKOFF_S, MAX_BACKOFF_S = 1.0, 30.0
"""Delay before the first retry, and the cap up to which it doubles; see `backoff_s`."""
START_TIMEOUT_S = 5.0
"""Longest wait for the server at the start of a run, which then begins without it."""
STALL_TIMEOUT_S = 20.0
"""At the end of a run, give up after this long without progress."""
UNREACHABLE_TIMEOUT_S = 1.0
"""Replaces both timeouts for a server that did not answer an earlier run of this process."""
MIN_BYTES_PER_S = 250_000
"""Slowest transfer of a file, upload and check together, that counts as progress."""
DATA_TAG, DATA_NAME_TAG = "data.fingerprint", "data.name"
"""Tags of a run with its data set's fingerprint and name."""
MAX_DATASET_DIGEST = 36
"""MLflow's limit, in characters."""
PROGRESS_AFTER_S = 2.0
"""At the end of a run, log what is still being sent after this long."""


class JournalUploader:
    """Sends one journal to its server, one request per step."""

    def __init__(self, journal: Journal, client: "MlflowClient") -> None:
        self._journal, self._client = journal, client
        self.file_deadline = 0.0
        """Time by `time.monotonic` until which a file may be in transfer; 0 if there is none."""
        self._reported: set[str] = set()
        """Ids of other runs with the journal's tag that a warning has named."""

    def step(self) -> bool:
        """Send the next part; False if nothing is left. May be called again after any error.

        Raises:
            MlflowException, OSError: the server is down, fails, or refuses the credentials.
            TrackingError: a file arrived damaged, or a parent run is not on the server yet.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self._step()
        except MlflowException as error:
            if not self._is_lost(error):
                raise
            log.warning("the server no longer has run %s: creating it again", self._journal.run_id)
            self._journal.outbox.requeue_all()
            return True

    def _step(self) -> bool:
        outbox = self._journal.outbox
        if not self._journal.get_meta("opened"):
            self._open_run()
        elif entries := _first_batch(outbox.entries(MAX_ENTRIES)):
            self._send_entries(entries)
            outbox.mark_delivered(entries[-1].seq)
        elif file := outbox.next_file():
            self._send_file(file)
        elif outbox.backlog().status:
            self._end_run()
        else:
            return False
        return True

    def _open_run(self) -> None:
        """Find the run on the server or create it."""
        get_meta = self._journal.get_meta
        run_id = get_meta("run_id") or self._find_run()
        if attached := get_meta("attached"):  # another process starts and ends the run
            if not run_id:
                raise TrackingError(f"run {attached} is not on the server yet")
        elif run_id:
            self._client.update_run(run_id, status="RUNNING", name=get_meta("run_name"))
            self._client.set_tag(run_id, journal_runs.JOURNAL_TAG, self._journal.id)
        else:
            run_id = self._create_run()
        self._journal.set_meta(run_id=run_id, opened="yes")

    def _create_run(self) -> str:
        get_meta = self._journal.get_meta
        tags = {journal_runs.JOURNAL_TAG: self._journal.id, journal_runs.USER_TAG: self._user}
        if parent := get_meta("parent"):
            tags[journal_runs.PARENT] = self._parent_run_id(parent)
        created = self._client.create_run(
            self._experiment_id(), self._start_ms, tags, get_meta("run_name")
        )
        self._journal.set_meta(run_id=created.info.run_id)
        return self._find_run() or str(created.info.run_id)

    def _find_run(self) -> str | None:
        """Return the id of this journal's run, or None if the server does not have it.

        A request that was repeated although it had arrived creates a second run. Of several, the
        run that was written to is kept, else the first; the others are deleted if they are empty.
        A run of another experiment, user or start time is neither used nor deleted: every writer
        can set the tag `journal.id`.

        Raises:
            TrackingError: another process writes the run, and several runs have its tag.
        """
        if attached := self._journal.get_meta("attached"):
            return journal_runs.find_run(self._client, attached)
        tagged = journal_runs.tagged_runs(self._client, self._journal.id)
        keep = self._journal.run_id
        if not [run for run in tagged if run.info.run_id != keep]:
            return keep
        identity = (self._experiment_id(), self._user, self._start_ms)
        own = [str(run.info.run_id) for run in tagged if journal_runs.identity(run) == identity]
        empty = {run_id for run_id in own if journal_runs.is_empty(self._client, run_id)}
        keep = keep or next((run_id for run_id in own if run_id not in empty), None)
        keep = keep or next(iter(own), None)
        for run_id in empty - {keep}:
            self._client.delete_run(run_id)
        self._report_others({str(run.info.run_id) for run in tagged} - empty - {keep})
        return keep

    def _report_others(self, run_ids: set[str]) -> None:
        if new := sorted(run_ids - self._reported):
            log.warning(
                "other runs have the tag %s of run %s and are left as they are, because they are "
                "not empty copies of it: %s; remove the tag from them",
                journal_runs.JOURNAL_TAG,
                self._journal.reference,
                ", ".join(new),
            )
            self._reported |= run_ids

    def _experiment_id(self) -> str:
        """Return the id of the run's experiment, which is that of its parent if it has one."""
        if parent := self._journal.get_meta("parent"):
            return str(self._client.get_run(self._parent_run_id(parent)).info.experiment_id)
        experiment = self._journal.get_meta("experiment") or "Default"
        return mlflow_client.get_or_create_experiment(self._client, experiment)

    @property
    def _user(self) -> str:
        return self._journal.get_meta("user") or user()

    @property
    def _start_ms(self) -> int:
        return int(self._journal.get_meta("start_ms") or 0)

    def _parent_run_id(self, reference: str) -> str:
        """Return the parent's run id, found by its journal if that is all we know."""
        if run_id := journal_runs.find_run(self._client, reference):
            return run_id
        raise TrackingError(f"the parent run {reference} is not on the server yet")

    def _send_entries(self, entries: Sequence[Entry]) -> None:
        """Send entries in one request; if it is refused, halve it until the cause is alone."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        metrics = [
            Metric(entry.name, entry.value, entry.time, entry.step)
            for entry in entries
            if entry.kind == "metric"
        ]
        params = [Param(entry.name, entry.value) for entry in entries if entry.kind == "param"]
        latest_tags = {entry.name: entry.value for entry in entries if entry.kind == "tag"}
        tags = [RunTag(name, value) for name, value in latest_tags.items()]
        try:
            self._client.log_batch(self._run_id, metrics=metrics, params=params, tags=tags)
            if DATA_TAG in latest_tags:
                self._log_dataset(latest_tags)
        except MlflowException as error:
            if not _is_bad_request(error) or self._is_lost(error):
                raise
            if len(entries) > 1:
                half = len(entries) // 2
                self._send_entries(entries[:half])
                self._send_entries(entries[half:])
                return
            reason = mlflow_client.first_line(error)
            log.warning("the server refuses %s %s: %s", entries[0].kind, entries[0].name, reason)
            self._journal.outbox.mark_entry_refused(entries[0].seq, reason)

    def _log_dataset(self, tags: Mapping[str, str]) -> None:
        """Show the data of a run in the column "dataset" of MLflow's pages.

        Nothing is lost where the server refuses it: the tags say the same.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        name = tags.get(DATA_NAME_TAG, "tiles")
        digest, source = tags[DATA_TAG][:MAX_DATASET_DIGEST], json.dumps({"name": name})
        dataset = Dataset(name, digest, "local", source)
        is_validation = self._journal.tag("kind") == "validate"
        context = "validation" if is_validation else "training"
        label = InputTag("mlflow.data.context", context)
        try:
            self._client.log_inputs(self._run_id, [DatasetInput(dataset, [label])])
        except MlflowException as error:
            if not (_is_bad_request(error) or mlflow_client.is_denied(error)):
                raise
            log.debug("the server refuses the dataset: %s", mlflow_client.first_line(error))

    def _send_file(self, file: PendingFile) -> None:
        from mlflow.exceptions import MlflowException

        self.file_deadline = time.monotonic() + file.size / MIN_BYTES_PER_S
        try:
            self._upload(file)
        except (MlflowException, OSError) as error:
            if not _is_bad_request(error) or self._is_lost(error):
                raise
            reason = mlflow_client.first_line(error)
            log.warning("the server refuses the artifact %s: %s", file.path, reason)
            self._journal.outbox.mark_file_refused(file.seq, reason)
        else:
            self._journal.outbox.mark_file_sent(file.seq)
        finally:
            self.file_deadline = 0.0

    def _upload(self, file: PendingFile) -> None:
        """Upload a file, and download it again to compare its sha256."""
        folder = str(Path(file.path).parent)
        artifact_folder = None if folder == "." else folder
        self._client.log_artifact(self._run_id, str(file.local_path), artifact_folder)
        with tempfile.TemporaryDirectory() as temporary:
            copy = self._client.download_artifacts(self._run_id, file.path, temporary)
            if (sha256 := sha256_of(Path(copy))) != file.sha256:
                raise TrackingError(
                    f"artifact {file.path} arrived with sha256 {sha256[:12]} instead of "
                    f"{file.sha256[:12]}: sending it again"
                )

    def _end_run(self) -> None:
        get_meta = self._journal.get_meta
        self._find_run()  # repeated requests have arrived by now: end one run, delete the others
        self._client.set_terminated(self._run_id, get_meta("status"), int(get_meta("end_ms") or 0))
        self._journal.set_meta(status_sent="yes")

    def report_failed(self) -> None:
        """End the run as FAILED without its journal, which cannot be written."""
        if run_id := self._journal.run_id:
            self._client.set_terminated(run_id, "FAILED")

    @property
    def _run_id(self) -> str:
        run_id = self._journal.run_id
        assert run_id is not None
        return run_id

    def _is_lost(self, error: Any) -> bool:
        """Return whether the server had the run but lost it, or somebody deleted it."""
        from mlflow.exceptions import MlflowException

        run_id = self._journal.run_id
        if run_id is None or self._journal.get_meta("attached"):
            return False
        if not isinstance(error, MlflowException):
            return False
        if error.error_code not in journal_runs.NOT_FOUND_CODES:
            return False
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage != "active")
        except MlflowException as get_error:
            return bool(get_error.error_code in journal_runs.NOT_FOUND_CODES)


class BackgroundUploader:
    """Sends a journal in a thread of its own, so that training never waits for the server."""

    unreachable_servers: ClassVar[set[str | None]] = set()
    """Servers that did not answer an earlier run of this process, until one does."""

    def __init__(self, journal: Journal, client: "MlflowClient") -> None:
        self._journal = Journal(journal.directory)  # a connection of its own
        self._uploader = JournalUploader(self._journal, client)
        self._server = self._journal.get_meta("server")
        self.last_error: str | None = None
        """Why the last attempt failed; None if it succeeded."""
        self._error_is_local = False
        """Whether the last error came from the journal or from a parent that is not sent yet."""
        self._steps_done = 0
        self._ending = self._given_up = self._failure_pending = False
        self._wake = threading.Event()
        self._attempted = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)
        self._thread.start()

    def wait_for_start(self) -> None:
        """Wait for the first attempt, up to a timeout; log a warning if it failed."""
        self._attempted.wait(self._timeout_s(START_TIMEOUT_S))
        error = self.last_error
        if not error and not self._attempted.is_set():
            error = "it has not answered yet"
        if error:
            log.warning(
                "the run is kept in %s until the tracking server accepts it: %s",
                self._journal.directory,
                error,
            )

    def finish(self) -> bool:
        """Send the rest; False if the server made no progress within the timeout."""
        self._ending = True
        self._wake.set()
        started = last_progress = time.monotonic()
        steps, is_logged = self._steps_done, False
        while not self._done.wait(0.05):
            now = time.monotonic()
            if self._steps_done != steps:
                steps, last_progress = self._steps_done, now
            if now - started > PROGRESS_AFTER_S and not is_logged:
                is_logged = True
                log.info("sending to the tracking server: %s", self._journal.outbox.backlog())
            is_stalled = now - last_progress > self._timeout_s(STALL_TIMEOUT_S)
            if is_stalled and now > self._uploader.file_deadline:
                if last_progress == started and not self._error_is_local:
                    self.unreachable_servers.add(self._server)
                self._given_up = True
                self._wake.set()
                self._thread.join(1)  # it stays behind if a request hangs
                return False
        self._thread.join()
        return True

    def close(self, journal: Journal) -> None:
        """Close the run's journal; its lock stays until no request of this process is left.

        A request that hangs may still create the run. If another process sent the journal
        meanwhile, the server would get two runs with a part of the data each.
        """
        if self._thread.is_alive():
            waiter = threading.Thread(target=self._close_later, args=(journal,), daemon=True)
            waiter.start()
        else:
            journal.close()

    def _close_later(self, journal: Journal) -> None:
        self._thread.join()
        journal.close()

    def report_failed(self) -> None:
        """Let the thread end the run as FAILED, past a journal that cannot be written."""
        self._failure_pending = True

    def _timeout_s(self, default_s: float) -> float:
        is_unreachable = self._server in self.unreachable_servers
        return UNREACHABLE_TIMEOUT_S if is_unreachable else default_s

    def _loop(self) -> None:
        failures = 0
        while not self._given_up:
            ending = self._ending  # read first: everything was logged before it was set
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
                wait_s = UPLOAD_INTERVAL_S
            except Exception as error:  # noqa: BLE001 - a thread's boundary: training goes on
                self.last_error = mlflow_client.first_line(error)
                self._error_is_local = isinstance(error, TrackingError)
                log.debug("cannot send %s: %s", self._journal.reference, self.last_error)
                wait_s = backoff_s(failures, MIN_BACKOFF_S if self._ending else MAX_BACKOFF_S)
                failures += 1
            self._attempted.set()
            self._journal.checkpoint_wal("PASSIVE")  # training keeps writing meanwhile
            self._wake.wait(wait_s)
            self._wake.clear()
        self._journal.close()


def upload_all(
    journal: Journal, client: "MlflowClient", on_progress: Callable[[], None] | None = None
) -> str | None:
    """Send a whole journal now; return the reason if that failed, else None.

    It gives up after STALL_TIMEOUT_S of failures, or at once if the credentials are refused.
    ``on_progress`` is called after each request.
    """
    uploader, failing_since = JournalUploader(journal, client), None
    while True:
        try:
            while uploader.step():
                failing_since = None
                if on_progress:
                    on_progress()
            return None
        except Exception as error:  # noqa: BLE001 - whatever the server does wrong is the result
            failing_since = failing_since or time.monotonic()
            if time.monotonic() - failing_since > STALL_TIMEOUT_S or mlflow_client.is_denied(error):
                return mlflow_client.first_line(error)
            time.sleep(backoff_s(0, MIN_BACKOFF_S))


def backoff_s(failures: int, max_s: float) -> float:
    """Return the delay before the next retry after this many failures.

    The delay doubles up to ``max_s``, minus up to 50 % jitter, so that many runs do not return to
    a server at the same moment.
    """
    return min(MIN_BACKOFF_S * 2.0 ** min(failures, 60), max_s) * random.uniform(0.5, 1)  # noqa: S311


def _first_batch(entries: Sequence[Entry]) -> list[Entry]:
    """Return as many of the first entries as one request may contain."""
    batch: list[Entry] = []
    counts = {"param": 0, "tag": 0, "metric": 0}
    for entry in entries:
        counts[entry.kind] += 1
        if max(counts["param"], counts["tag"]) > MAX_PARAMS_OR_TAGS:
            break
        batch.append(entry)
    return batch


def _is_bad_request(error: Any) -> bool:
    """Return whether the server refuses the content itself, so that a retry is useless."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        too_large = "error code 413" in str(error)  # MLflow has no error code for it
        return error.get_http_status_code() == 400 or too_large
    response = getattr(error, "response", None)  # artifacts raise the errors of `requests`
    return getattr(response, "status_code", None) in (400, 413, 414)
