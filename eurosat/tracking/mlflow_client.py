"""What the tracking server holds: runs, their artifacts, versions of models."""

import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat.errors import TrackingError
from eurosat.tracking.journal import PREFIX

if TYPE_CHECKING:
    from mlflow import MlflowClient

BEST_RUN = "sweep.best_run_id"
"""On a sweep's parent run: the run of the best configuration, refitted in full."""

NOT_FOUND_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow answers an unknown alias of a known model with the second."""
JOURNAL_TAG = "journal.id"
"""Tag by which a run is found again that was made, but whose id did not arrive here."""
PARENT, NAME_TAG = "mlflow.parentRunId", "mlflow.runName"
MAX_RETRIES = 2
"""Of a request, by MLflow; its own seven keep a verb waiting four minutes for a dead server."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What the server holds of a run."""

    run_id: str
    experiment_id: str
    status: str
    params: Mapping[str, str] = field(repr=False)
    metrics: Mapping[str, float] = field(repr=False)
    tags: Mapping[str, str] = field(repr=False)
    seconds: float
    """From its start to its end, or to now where it goes on."""


def get(run_id: str) -> RunRecord:
    """Read a run.

    Raises:
        TrackingError: there is no such run.
    """
    with translate_errors(f"run {run_id}"):
        found = client().get_run(to_run_id(run_id))
    return RunRecord(
        run_id=found.info.run_id,
        experiment_id=found.info.experiment_id,
        status=found.info.status,
        params=found.data.params,
        metrics=found.data.metrics,
        tags=found.data.tags,
        seconds=(found.info.end_time or time.time() * 1000) / 1000 - found.info.start_time / 1000,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSnapshot:
    """What a run was told, as a journal takes it up."""

    start_ms: int
    parent: str | None
    """By its journal where it has one: another server knows it by that."""
    points: list[tuple[str, float, int, int]]
    """Name, value, milliseconds since 1970 and step of each metric."""
    params: Mapping[str, str]
    tags: Mapping[str, str]
    """But for those that say which run it is."""


def snapshot(run_id: str) -> RunSnapshot:
    """All that the server has of a run but its files.

    Raises:
        MlflowException: there is no such run.
    """
    asked = client()
    held = asked.get_run(run_id)
    if parent := held.data.tags.get(PARENT):
        named = asked.get_run(parent).data.tags.get(JOURNAL_TAG)
        parent = f"{PREFIX}{named}" if named else parent
    return RunSnapshot(
        start_ms=held.info.start_time,
        parent=parent,
        points=[
            (one.key, one.value, one.timestamp, one.step)
            for name in held.data.metrics
            for one in asked.get_metric_history(run_id, name)
        ],
        params=held.data.params,
        tags={k: v for k, v in held.data.tags.items() if k not in (JOURNAL_TAG, PARENT, NAME_TAG)},
    )


@contextmanager
def artifact(run_id: str, path: str) -> Iterator[Path]:
    """A local copy of an artifact file or folder, gone after the block.

    Raises:
        TrackingError: the run has no such artifact.
    """
    with tempfile.TemporaryDirectory() as folder:
        with translate_errors(f"artifact {path} of run {run_id}"):
            copy = Path(client().download_artifacts(to_run_id(run_id), path, folder))
        yield copy


def tracking_uri() -> str:
    """URI of the tracking server; that of a local database holds wherever one stands."""
    from mlflow import get_tracking_uri

    uri = str(get_tracking_uri())
    local = re.fullmatch(r"sqlite:///(?!/)(.+)", uri)
    return f"sqlite:///{Path(local[1]).absolute()}" if local else uri


def resolve_run(reference: str) -> str:
    """The run behind ``ID``, ``runs:/ID``, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.

    A sweep's parent run stands for its refitted best.

    Raises:
        TrackingError: nothing stands behind the reference.
    """
    with translate_errors(reference):
        if reference.startswith("models:/"):
            name, at, alias = reference.removeprefix("models:/").partition("@")
            if at:
                version = client().get_model_version_by_alias(name, alias)
            else:
                name, _, number = name.rpartition("/")
                version = client().get_model_version(name, number)
            return str(version.run_id)
        run_id = reference.removeprefix("runs:/").strip("/")
    found = get(run_id)
    return found.tags.get(BEST_RUN, found.run_id)


def latest_run(experiment: str, *, kind: str) -> str:
    """The id of the run of this kind (its tag ``kind``) that was started last.

    Raises:
        TrackingError: there is none.
    """
    if not (found := _search_run_ids(experiment, f"tags.kind = '{kind}'", max_results=1)):
        raise TrackingError(f"experiment {experiment} has no run of kind {kind}")
    return found[0]


def finished_runs(
    experiment: str, tags: Mapping[str, str], params: Mapping[str, str] | None = None
) -> list[str]:
    """Ids of the runs with these tags and parameters that ended well, the latest first."""
    wanted = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    wanted += [f"params.`{name}` = '{value}'" for name, value in (params or {}).items()]
    finished = " AND ".join([*wanted, "attributes.status = 'FINISHED'"])
    return _search_run_ids(experiment, finished, max_results=100)


def _search_run_ids(experiment: str, filter_string: str, *, max_results: int) -> list[str]:
    with translate_errors(f"experiment {experiment}"):
        asked = client()
        found = asked.search_runs(
            [get_or_create_experiment(asked, experiment)],
            filter_string,
            order_by=["attributes.start_time DESC"],
            max_results=max_results,
        )
    return [str(run.info.run_id) for run in found]


def alias_version(model: str, alias: str) -> str | None:
    """The number of the version that carries the alias, or None where none does."""
    from mlflow.exceptions import MlflowException

    with translate_errors(f"{model}@{alias}"):
        try:
            return str(client().get_model_version_by_alias(model, alias).version)
        except MlflowException as error:
            if error.error_code in NOT_FOUND_CODES:
                return None
            raise


def to_run_id(reference: str) -> str:
    """The id of a run, also where it is given as ``journal:ID``.

    Raises:
        TrackingError: the server does not have that journal's run yet.
    """
    if not reference.startswith(PREFIX):
        return reference
    if found := find_runs_by_tag(client(), JOURNAL_TAG, reference.removeprefix(PREFIX)):
        return found[0]
    raise TrackingError(
        f"{reference} is not on the tracking server yet: run `python -m eurosat.tracking sync`"
    )


def find_runs_by_tag(client: "MlflowClient", name: str, value: str) -> list[str]:
    """Ids of the runs of all experiments that carry the tag, the first made first."""
    found = client.search_runs(
        [one.experiment_id for one in client.search_experiments()],
        f"tags.`{name}` = '{value}'",
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
    )
    return [str(run.info.run_id) for run in found]


def client(uri: str | None = None) -> "MlflowClient":
    """Of the server at ``uri``; None is the one that MLFLOW_TRACKING_URI names."""
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(MAX_RETRIES))
    return MlflowClient(tracking_uri=uri)


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What MLflow's client shows a server, from its variables or ~/.mlflow/credentials."""

    username: str | None
    password: str | None = field(repr=False)
    token: str | None = field(repr=False)
    verify: bool | str
    """Of TLS: whether, or by which file of certificates."""


def credentials() -> Credentials:
    from mlflow.utils.credentials import get_default_host_creds

    taken = get_default_host_creds(tracking_uri())
    verify = taken.server_cert_path or not taken.ignore_tls_verification
    return Credentials(
        username=taken.username, password=taken.password, token=taken.token, verify=verify
    )


def get_or_create_experiment(client: "MlflowClient", name: str) -> str:
    """Of the experiment of that name, which is made where there is none."""
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


def is_denied(error: BaseException) -> bool:
    """Whether the server does not take these credentials."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403)


def first_line(error: BaseException) -> str:
    """What a library said, without its traces; passwords in addresses are left out."""
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if is_denied(error):
        said += " (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are the credentials)"
    return without_password(said[:400])


def without_password(text: str) -> str:
    return re.sub(r"(\w+://[^/\s:@]*:)[^/\s@]+@", r"\1***@", text)


@contextmanager
def translate_errors(what: str = "") -> Iterator[None]:
    """Turn MLflow's errors into one line that names the server."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"{what + ': ' if what else ''}{first_line(error)} (tracking server "
            f"{without_password(tracking_uri())}; MLFLOW_TRACKING_URI names another)"
        ) from error
