"""Runs on the tracking server: the one place where this package calls MLflow.

Written on ``MlflowClient`` with explicit run ids: MLflow's fluent API keeps global state, which
parallel trials would share.
"""

import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eurosat.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

FLUSH_S = 1.0
"""Metrics are sent in batches at most this often; what is left goes when the run ends."""
SYSTEM_S = 5.0
"""Seconds between two samples of the machine's metrics."""
BATCH = 1000
"""MLflow's limit on metrics in one request."""
NOT_IN_NAMES = re.compile(r"[^/\w.\- :]")
"""What MLflow refuses in the name of a metric."""
PARENT = "mlflow.parentRunId"
BEST_RUN = "sweep.best_run_id"
"""On a sweep's parent run: the run of the best configuration, refitted in full."""

ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow answers an unknown alias of a known model with the second."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Run:
    """One run that this process writes. Methods may be called from several threads."""

    def __init__(self, client: "MlflowClient", run_id: str, experiment_id: str) -> None:
        self.run_id = run_id
        self.experiment_id = experiment_id
        self._client = client
        self._waiting: list[Any] = []
        self._sent_at = time.monotonic()
        self._lock = threading.Lock()

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Queue metrics with the present time; they are on the server when the run has ended.

        Characters that MLflow does not allow in a name become underscores.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {NOT_IN_NAMES.sub("_", key): float(value) for key, value in metrics.items()}
        with self._lock:
            self._waiting += [Metric(key, value, now, step) for key, value in named.items()]
        if time.monotonic() - self._sent_at > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Send what waits; what could not be sent goes on waiting."""
        with self._lock, self._explained():
            self._sent_at = time.monotonic()
            while self._waiting:
                some = self._waiting[:BATCH]
                self._client.log_batch(self.run_id, metrics=some)
                del self._waiting[: len(some)]

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested mappings become dotted names."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)) for key, value in flatten(params).items()]
        with self._explained():
            self._client.log_batch(self.run_id, params=flat)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        from mlflow.entities import RunTag

        with self._explained():
            self._client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])

    def tag(self, name: str) -> str | None:
        with self._explained():
            tags: dict[str, str] = self._client.get_run(self.run_id).data.tags
            return tags.get(name)

    def log_file(self, file: Path, folder: str | None = None) -> None:
        with self._explained():
            self._client.log_artifact(self.run_id, str(file), folder)

    def log_folder(self, folder: Path, into: str | None = None) -> None:
        with self._explained():
            self._client.log_artifacts(self.run_id, str(folder), into)

    def log_text(self, text: str, path: str) -> None:
        with self._explained():
            self._client.log_text(self.run_id, text, path)

    def finish(self, status: Status) -> None:
        """End the run; FAILED where its last metrics could not be sent."""
        try:
            self.flush()
        except TrackingError:
            status = "FAILED"
            raise
        finally:
            with self._explained():
                self._client.set_terminated(self.run_id, status)

    def _explained(self) -> AbstractContextManager[None]:
        return explained(f"run {self.run_id}")


class Unlogged(Run):
    """A run that keeps nothing: of the processes beside the one that logs."""

    def __init__(self) -> None:
        self.run_id = self.experiment_id = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None: ...
    def flush(self) -> None: ...
    def log_params(self, params: Mapping[str, Any]) -> None: ...
    def set_tags(self, tags: Mapping[str, object]) -> None: ...
    def tag(self, name: str) -> str | None: ...
    def log_file(self, file: Path, folder: str | None = None) -> None: ...
    def log_folder(self, folder: Path, into: str | None = None) -> None: ...
    def log_text(self, text: str, path: str) -> None: ...
    def finish(self, status: Status) -> None: ...


def attach(run_id: str, experiment_id: str) -> Run:
    """A run that another process has opened and will end."""
    return Run(_client(), run_id, experiment_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """What the server holds of a run."""

    run_id: str
    experiment_id: str
    status: str
    params: Mapping[str, str] = field(repr=False)
    metrics: Mapping[str, float] = field(repr=False)
    tags: Mapping[str, str] = field(repr=False)
    seconds: float
    """From its start to its end, or to now where it goes on."""


@contextmanager
def run(
    experiment: str,
    name: str,
    *,
    parent: str | None = None,
    resume: str | None = None,
    tags: Mapping[str, object] | None = None,
    system_metrics: bool = True,
    killed_by: tuple[type[BaseException], ...] = (),
) -> Iterator[Run]:
    """Open a run and end it with its true status.

    That is FINISHED, FAILED by an exception, or KILLED by an interrupt or one of ``killed_by``;
    exceptions go on to the caller. With ``parent`` the run stands below it, in its experiment.

    ``resume`` opens the run of that id again. Without it and without ``parent``, the run that
    ``mlflow run`` made for this process (MLFLOW_RUN_ID) is joined rather than a second one
    opened; beside a resumed one it gets the tag ``continued.run_id``.

    Raises:
        TrackingError: the server cannot be reached or refuses.
    """
    with explained():
        opened = _open(experiment, name, parent, resume, tags or {})
    sampler = _SystemMetrics(opened) if system_metrics else None
    status: Status = "FAILED"
    try:
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


def get(run_id: str) -> FinishedRun:
    """Read a run.

    Raises:
        TrackingError: there is no such run.
    """
    with explained(f"run {run_id}"):
        found = _client().get_run(run_id)
    return FinishedRun(
        run_id=run_id,
        experiment_id=found.info.experiment_id,
        status=found.info.status,
        params=found.data.params,
        metrics=found.data.metrics,
        tags=found.data.tags,
        seconds=(found.info.end_time or time.time() * 1000) / 1000 - found.info.start_time / 1000,
    )


@contextmanager
def artifact(run_id: str, path: str) -> Iterator[Path]:
    """A local copy of an artifact file or folder, gone after the block.

    Raises:
        TrackingError: the run has no such artifact.
    """
    with tempfile.TemporaryDirectory() as folder:
        with explained(f"artifact {path} of run {run_id}"):
            copy = Path(_client().download_artifacts(run_id, path, folder))
        yield copy


def add_folder(run_id: str, folder: Path, path: str) -> None:
    """Leave the files of a folder in a run that has ended."""
    with explained(f"run {run_id}"):
        _client().log_artifacts(run_id, str(folder), path)


def add_file(run_id: str, file: Path, folder: str) -> None:
    """Leave a file in a run that has ended."""
    with explained(f"run {run_id}"):
        _client().log_artifact(run_id, str(file), folder)


def fail(run_id: str, why: str) -> None:
    """End a run whose process can no longer do it."""
    with explained(f"run {run_id}"):
        _client().set_tag(run_id, "failed.why", why)
        _client().set_terminated(run_id, "FAILED")


def is_unfinished(run_id: str | None) -> bool:
    """Whether the server has this run, and it did not end well."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return False
    with explained(f"run {run_id}"):
        try:
            info = _client().get_run(run_id).info
        except MlflowException as error:
            if error.error_code in ABSENT:
                return False
            raise
    return bool(info.lifecycle_stage == "active" and info.status != "FINISHED")


def server() -> str:
    """URI of the tracking server."""
    from mlflow import get_tracking_uri

    return str(get_tracking_uri())


def resolve_run(reference: str) -> str:
    """The run behind ``ID``, ``runs:/ID``, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.

    A sweep's parent run stands for its refitted best.

    Raises:
        TrackingError: nothing stands behind the reference.
    """
    with explained(reference):
        if reference.startswith("models:/"):
            name, at, alias = reference.removeprefix("models:/").partition("@")
            if at:
                version = _client().get_model_version_by_alias(name, alias)
            else:
                name, _, number = name.rpartition("/")
                version = _client().get_model_version(name, number)
            return str(version.run_id)
        run_id = reference.removeprefix("runs:/").strip("/")
    return get(run_id).tags.get(BEST_RUN, run_id)


def latest_run(experiment: str, *, kind: str) -> str:
    """The id of the run of this kind (its tag ``kind``) that was started last.

    Raises:
        TrackingError: there is none.
    """
    if not (found := _search(experiment, f"tags.kind = '{kind}'", most=1)):
        raise TrackingError(f"experiment {experiment} has no run of kind {kind}")
    return found[0]


def finished_runs(
    experiment: str, tags: Mapping[str, str], params: Mapping[str, str] | None = None
) -> list[str]:
    """Ids of the runs with these tags and parameters that ended well, the latest first."""
    wanted = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    wanted += [f"params.`{name}` = '{value}'" for name, value in (params or {}).items()]
    finished = " AND ".join([*wanted, "attributes.status = 'FINISHED'"])
    return _search(experiment, finished, most=100)


def _search(experiment: str, wanted: str, *, most: int) -> list[str]:
    with explained(f"experiment {experiment}"):
        client = _client()
        found = client.search_runs(
            [_experiment_id(client, experiment)],
            wanted,
            order_by=["attributes.start_time DESC"],
            max_results=most,
        )
    return [str(run.info.run_id) for run in found]


def alias_version(model: str, alias: str) -> str | None:
    """The number of the version that carries the alias, or None where none does."""
    from mlflow.exceptions import MlflowException

    with explained(f"{model}@{alias}"):
        try:
            return str(_client().get_model_version_by_alias(model, alias).version)
        except MlflowException as error:
            if error.error_code in ABSENT:
                return None
            raise


def code_commit() -> str:
    """The commit of the working directory, with ``-dirty`` where files differ from it."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _client() -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient()


def _open(
    experiment: str, name: str, parent: str | None, resume: str | None, tags: Mapping[str, object]
) -> Run:
    client = _client()
    made_by_mlflow_run = None if parent else os.environ.get("MLFLOW_RUN_ID")
    if resume:
        if made_by_mlflow_run:
            client.set_tag(made_by_mlflow_run, "continued.run_id", resume)
        info = client.get_run(resume).info
        client.update_run(resume, status="RUNNING")
    elif made_by_mlflow_run:
        info = client.get_run(made_by_mlflow_run).info
        client.update_run(made_by_mlflow_run, status="RUNNING", name=name)
    elif parent:
        beside = client.get_run(parent).info.experiment_id
        info = client.create_run(beside, run_name=name, tags={PARENT: parent}).info
    else:
        info = client.create_run(_experiment_id(client, experiment), run_name=name).info
    opened = Run(client, info.run_id, info.experiment_id)
    own = {"code.commit": code_commit(), "mlflow.user": user(), "mlflow.source.name": _command()}
    opened.set_tags(own | dict(tags))
    return opened


def _experiment_id(client: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException:  # another process made it in between
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _command() -> str:
    main = sys.modules["__main__"].__spec__
    return f"python -m {main.name}" if main else Path(sys.argv[0]).name


def user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in some containers
        return "unknown"


@contextmanager
def explained(what: str = "") -> Iterator[None]:
    """Turn MLflow's errors into one line that names the server."""
    from mlflow import get_tracking_uri
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrackingError(
            f"{what + ': ' if what else ''}{first[:300]} (tracking server {get_tracking_uri()}; "
            "MLFLOW_TRACKING_URI names another)"
        ) from error


class _SystemMetrics:
    """Samples MLflow's own collectors, but logs through the run like everything else."""

    def __init__(self, target: Run) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._target = target
        self._collectors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no NVIDIA card or no pynvml: nothing to sample
            self._collectors.append(GPUMonitor())
        self._stopped = threading.Event()
        self._step = 0
        self._thread = threading.Thread(target=self._loop, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            self._sample()
            if self._stopped.wait(SYSTEM_S):
                self._sample()
                return

    def _sample(self) -> None:
        for collector in self._collectors:
            try:
                collector.collect_metrics()
                metrics = {f"system/{k}": v for k, v in collector.aggregate_metrics().items()}
                collector.clear_metrics()
                self._target.log_metrics(metrics, self._step)
            except Exception as error:  # noqa: BLE001 - a thread's boundary: training goes on
                log.warning("system metrics were not logged: %s", error)
        self._step += 1
