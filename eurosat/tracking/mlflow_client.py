"""Read runs, artifacts and model versions from the tracking server."""

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
from eurosat.tracking.journal_runs import (
    JOURNAL_TAG,
    NAME_TAG,
    NOT_FOUND_CODES,
    PARENT,
    USER_TAG,
    find_run,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

BEST_RUN = "sweep.best_run_id"
"""Tag of a sweep's parent run: id of the run that refits the best configuration in full."""

KIND_TAG, TRAINING_KIND = "mlflow.experimentKind", "custom_model_development"
"""Tag of an experiment, with which MLflow's pages open on its runs instead of GenAI traces."""
VERSIONS_PER_REQUEST = 1000
LOCAL_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` shows the runs of a store without a server."""
MAX_RETRIES = 2
"""MLflow's retries of a request; its default of 7 takes four minutes if the server is down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A run as the server has it."""

    run_id: str
    experiment_id: str
    status: str
    params: Mapping[str, str] = field(repr=False)
    metrics: Mapping[str, float] = field(repr=False)
    tags: Mapping[str, str] = field(repr=False)
    seconds: float
    """Duration, until now if the run has not ended."""


def get(run_id: str) -> RunRecord:
    """Read a run, by its id or ``journal:ID``.

    Raises:
        TrackingError: there is no such run, or the server cannot be reached.
    """
    with translate_errors(f"run {run_id}"):
        run = client().get_run(to_run_id(run_id))
    end_ms = run.info.end_time or time.time() * 1000
    return RunRecord(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        status=run.info.status,
        params=run.data.params,
        metrics=run.data.metrics,
        tags=run.data.tags,
        seconds=(end_ms - run.info.start_time) / 1000,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSnapshot:
    """What was logged to a run, in the form in which a journal imports it."""

    experiment_id: str
    user: str
    """The user who created the run."""
    start_ms: int
    parent: str | None
    """Parent as ``journal:ID``, stable across servers, or as a run id if it has no journal."""
    points: list[tuple[str, float, int, int]]
    """Name, value, time (milliseconds since 1970) and step of each point of a metric."""
    params: Mapping[str, str]
    tags: Mapping[str, str]
    """All tags but those that identify the run, its parent and its journal."""


def snapshot(run_id: str) -> RunSnapshot:
    """Read everything that the server has of a run, except its artifacts.

    Raises:
        MlflowException: there is no such run.
    """
    mlflow = client()
    run = mlflow.get_run(run_id)
    if parent := run.data.tags.get(PARENT):
        journal_id = mlflow.get_run(parent).data.tags.get(JOURNAL_TAG)
        parent = f"{PREFIX}{journal_id}" if journal_id else parent
    identity_tags = (JOURNAL_TAG, PARENT, NAME_TAG, USER_TAG)
    return RunSnapshot(
        experiment_id=run.info.experiment_id,
        user=run.info.user_id,
        start_ms=run.info.start_time,
        parent=parent,
        points=[
            (point.key, point.value, point.timestamp, point.step)
            for name in run.data.metrics
            for point in mlflow.get_metric_history(run_id, name)
        ],
        params=run.data.params,
        tags={k: v for k, v in run.data.tags.items() if k not in identity_tags},
    )


@contextmanager
def artifact(run_id: str, path: str) -> Iterator[Path]:
    """Download an artifact file or folder, for the duration of the block.

    Raises:
        TrackingError: the run has no such artifact.
    """
    with tempfile.TemporaryDirectory() as folder:
        with translate_errors(f"artifact {path} of run {run_id}"):
            copy = Path(client().download_artifacts(to_run_id(run_id), path, folder))
        yield copy


def tracking_uri() -> str:
    """Return the URI of the tracking server; the path of a local database is made absolute."""
    from mlflow import get_tracking_uri

    uri = str(get_tracking_uri())
    local = re.fullmatch(r"sqlite:///(?!/)(.+)", uri)
    return f"sqlite:///{Path(local[1]).absolute()}" if local else uri


def resolve_run(reference: str) -> str:
    """Return the run id that a reference stands for.

    References are ``ID``, ``runs:/ID``, ``models:/NAME/VERSION`` and ``models:/NAME@ALIAS``. A
    sweep's parent run stands for the run that refits its best configuration.

    Raises:
        TrackingError: there is no such run, version or alias.
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
    run = get(run_id)
    return run.tags.get(BEST_RUN, run.run_id)


def latest_run(experiment: str, *, kind: str) -> str:
    """Return the id of the latest run with this tag ``kind``.

    Raises:
        TrackingError: the experiment has no such run.
    """
    if not (run_ids := _search_run_ids(experiment, f"tags.kind = '{kind}'", max_results=1)):
        raise TrackingError(f"experiment {experiment} has no run of kind {kind}")
    return run_ids[0]


def finished_runs(
    experiment: str, tags: Mapping[str, str], params: Mapping[str, str] | None = None
) -> list[str]:
    """Return ids of FINISHED runs with these tags and params, latest first, 100 at most."""
    conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    conditions += [f"params.`{name}` = '{value}'" for name, value in (params or {}).items()]
    conditions.append("attributes.status = 'FINISHED'")
    return _search_run_ids(experiment, " AND ".join(conditions), max_results=100)


def _search_run_ids(experiment: str, filter_string: str, *, max_results: int) -> list[str]:
    with translate_errors(f"experiment {experiment}"):
        mlflow = client()
        runs = mlflow.search_runs(
            [get_or_create_experiment(mlflow, experiment)],
            filter_string,
            order_by=["attributes.start_time DESC"],
            max_results=max_results,
        )
    return [str(run.info.run_id) for run in runs]


def alias_version(model: str, alias: str) -> str | None:
    """Return the number of the version with this alias, or None."""
    from mlflow.exceptions import MlflowException

    with translate_errors(f"{model}@{alias}"):
        try:
            return str(client().get_model_version_by_alias(model, alias).version)
        except MlflowException as error:
            if error.error_code in NOT_FOUND_CODES:
                return None
            raise


def to_run_id(reference: str) -> str:
    """Return the run id for a run id or ``journal:ID``.

    Raises:
        TrackingError: the server does not have that journal's run yet, or several runs claim to
            be it.
    """
    if run_id := find_run(client(), reference):
        return run_id
    raise TrackingError(
        f"{reference} is not on the tracking server yet: run `python -m eurosat.tracking sync`"
    )


def all_versions(model: str) -> "list[ModelVersion]":
    """Return every version of a registered model, the oldest first; empty for an unknown model.

    MLflow leaves out the aliases of these versions.
    """
    versions, token = [], None
    with translate_errors(f"versions of {model}"):
        while True:
            page = client().search_model_versions(
                f"name = '{model}'", max_results=VERSIONS_PER_REQUEST, page_token=token
            )
            versions += list(page)
            token = page.token
            if not token:
                return sorted(versions, key=lambda version: int(version.version))


def runs_page(experiment: str, metric: str) -> str:
    """Return the address of MLflow's page with the runs of an experiment, best ``metric`` first.

    Raises:
        TrackingError: the server cannot be reached.
    """
    with translate_errors(f"experiment {experiment}"):
        experiment_id = get_or_create_experiment(client(), experiment)
    order = f"orderByKey=metrics.%60{metric}%60&orderByAsc=false"
    return f"{_pages()}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&{order}"


def run_page(run_id: str) -> str:
    """Return the address of MLflow's page of a run; without a server, with how to start one.

    Raises:
        TrackingError: the run does not exist, or the server cannot be reached.
    """
    experiment_id, server = get(run_id).experiment_id, _pages()
    hint = " (after `mlflow ui`)" if server == LOCAL_UI else ""
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}{hint}"


def _pages() -> str:
    """Return the address of the server's pages, or where `mlflow ui` shows them."""
    uri = tracking_uri()
    return without_credentials(uri).rstrip("/") if uri.startswith("http") else LOCAL_UI


def client(uri: str | None = None) -> "MlflowClient":
    """Return a client of the server at ``uri``, by default that of MLFLOW_TRACKING_URI."""
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(MAX_RETRIES))
    return MlflowClient(tracking_uri=uri)


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """Credentials of MLflow's client, from its variables or ~/.mlflow/credentials."""

    username: str | None
    password: str | None = field(repr=False)
    token: str | None = field(repr=False)
    verify: bool | str
    """Whether TLS certificates are checked, or the file of certificates to check with."""


def credentials() -> Credentials:
    """Return the credentials that MLflow's client uses for the tracking server."""
    from mlflow.utils.credentials import get_default_host_creds

    host = get_default_host_creds(tracking_uri())
    verify = host.server_cert_path or not host.ignore_tls_verification
    return Credentials(
        username=host.username, password=host.password, token=host.token, verify=verify
    )


def account() -> str | None:
    """Return the account with which this process logs in to the server; None if it does not.

    The server checks it with every request, unlike the name of this machine's user.
    """
    return credentials().username if tracking_uri().startswith("http") else None


def get_or_create_experiment(client: "MlflowClient", name: str) -> str:
    """Return the id of an experiment, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    if experiment := client.get_experiment_by_name(name):
        return str(experiment.experiment_id)
    try:
        return str(client.create_experiment(name, tags={KIND_TAG: TRAINING_KIND}))
    except MlflowException:  # another process created it meanwhile
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def is_denied(error: BaseException) -> bool:
    """Return whether the server refused the credentials (401 or 403)."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with passwords in addresses hidden."""
    text = str(error).strip()
    message = text.splitlines()[0] if text else type(error).__name__
    if is_denied(error):
        message += " (set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
    return without_password(message[:400])


def without_password(text: str) -> str:
    """Replace the passwords of all addresses in a text by ``***``."""
    return re.sub(r"(\w+://[^/\s:@]*:)[^/\s@]+@", r"\1***@", text)


def without_credentials(url: str) -> str:
    """Return an address without its user and password."""
    return re.sub(r"(\w+://)[^/\s@]*@", r"\1", url)


@contextmanager
def translate_errors(what: str = "") -> Iterator[None]:
    """Turn MLflow's errors into one line that names ``what`` and the server."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"{what + ': ' if what else ''}{first_line(error)} (tracking server "
            f"{without_password(tracking_uri())}; set MLFLOW_TRACKING_URI to use another)"
        ) from error
