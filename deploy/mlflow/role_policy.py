"""Authentication plugin of MLflow's server: what each role may do; everything else is refused.

MLflow's own permissions do not separate logging from promoting, and leave many of its routes to any
account. Its server calls `authenticate` for every request, in place of its basic authentication
(``authorization_function`` in auth.ini). Only requests that pass here are checked against MLflow's
permissions. Administrators may do everything.
"""

import functools
import json
import re
import threading
import time
from collections import deque
from typing import Any

from flask import Response, request
from mlflow.exceptions import MlflowException
from mlflow.server import auth, handlers
from werkzeug.datastructures import Authorization
from werkzeug.security import check_password_hash, generate_password_hash

API_PREFIX = re.compile(r"^/(ajax-)?api/\d\.0(?=/)")
"""Before each path of ROUTES: MLflow serves a route for programs and for its pages."""
CAPITAL = re.compile("[A-Z]")


def _routes(text: str) -> frozenset[str]:
    return frozenset(line.strip() for line in text.strip().splitlines())


ACCOUNT_ROUTES = _routes(
    """
    GET /
    GET /mlflow/server-info
    GET /mlflow/users/current
    GET /mlflow/users/current/permissions
    GET /version
    PATCH /mlflow/users/update-password
    """
)
"""Routes for every account, also without a role; MLflow lets it change its own password only."""
READER_ROUTES = ACCOUNT_ROUTES | _routes(
    """
    GET /get-artifact
    GET /graphql
    GET /mlflow-artifacts/artifacts
    GET /mlflow-artifacts/artifacts/<path:artifact_path>
    GET /mlflow/artifacts/list
    GET /mlflow/experiments/get
    GET /mlflow/experiments/get-by-name
    GET /mlflow/experiments/search
    GET /mlflow/logged-models/<model_id>
    GET /mlflow/logged-models/<model_id>/artifacts/directories
    GET /mlflow/logged-models/<model_id>/artifacts/files
    GET /mlflow/metrics/get-history
    GET /mlflow/metrics/get-history-bulk
    GET /mlflow/metrics/get-history-bulk-interval
    GET /mlflow/model-versions/get
    GET /mlflow/model-versions/get-download-uri
    GET /mlflow/model-versions/search
    GET /mlflow/registered-models/alias
    GET /mlflow/registered-models/get
    GET /mlflow/registered-models/get-latest-versions
    GET /mlflow/registered-models/search
    GET /mlflow/runs/get
    GET /model-versions/get-artifact
    POST /graphql
    POST /mlflow/experiments/search
    POST /mlflow/experiments/search-datasets
    POST /mlflow/logged-models/search
    POST /mlflow/registered-models/get-latest-versions
    POST /mlflow/runs/search
    """
)
WRITER_ROUTES = READER_ROUTES | _routes(
    """
    DELETE /mlflow-artifacts/artifacts/<path:artifact_path>
    DELETE /mlflow/logged-models/<model_id>
    DELETE /mlflow/logged-models/<model_id>/tags/<tag_key>
    PATCH /mlflow/logged-models/<model_id>
    PATCH /mlflow/logged-models/<model_id>/tags
    POST /mlflow/experiments/create
    POST /mlflow/experiments/delete
    POST /mlflow/experiments/delete-experiment-tag
    POST /mlflow/experiments/restore
    POST /mlflow/experiments/set-experiment-tag
    POST /mlflow/experiments/update
    POST /mlflow/logged-models
    POST /mlflow/logged-models/<model_id>/params
    POST /mlflow/model-versions/create
    POST /mlflow/registered-models/create
    POST /mlflow/runs/create
    POST /mlflow/runs/delete
    POST /mlflow/runs/delete-tag
    POST /mlflow/runs/log-batch
    POST /mlflow/runs/log-inputs
    POST /mlflow/runs/log-metric
    POST /mlflow/runs/log-model
    POST /mlflow/runs/log-parameter
    POST /mlflow/runs/outputs
    POST /mlflow/runs/restore
    POST /mlflow/runs/set-tag
    POST /mlflow/runs/update
    POST /mlflow/upload-artifact
    PUT /mlflow-artifacts/artifacts/<path:artifact_path>
    """
)
PROMOTER_ACTIONS = {
    "DELETE /mlflow/model-versions/delete": "deleting a version",
    "DELETE /mlflow/model-versions/delete-tag": "changing a version's tags",
    "DELETE /mlflow/registered-models/alias": "moving an alias",
    "DELETE /mlflow/registered-models/delete": "deleting a model",
    "DELETE /mlflow/registered-models/delete-tag": "changing a model's tags",
    "PATCH /mlflow/model-versions/update": "changing a version's description",
    "PATCH /mlflow/registered-models/update": "changing a model's description",
    "POST /mlflow/model-versions/set-tag": "changing a version's tags",
    "POST /mlflow/model-versions/transition-stage": "changing a version's stage",
    "POST /mlflow/registered-models/alias": "moving an alias",
    "POST /mlflow/registered-models/rename": "renaming a model",
    "POST /mlflow/registered-models/set-tag": "changing a model's tags",
}
ROUTES = {
    "reader": READER_ROUTES,
    "writer": WRITER_ROUTES,
    "promoter": WRITER_ROUTES | frozenset(PROMOTER_ACTIONS),
}
"""Role -> its routes, without API_PREFIX; each role includes the one before."""
REFUSAL = "{} needs the role {}: ask an administrator (make user NAME=... ROLE={})"
CREATE_EXPERIMENT = "POST /mlflow/experiments/create"
UPDATE_EXPERIMENT = "POST /mlflow/experiments/update"
CREATE_VERSION = "POST /mlflow/model-versions/create"
CREATE_ACTIONS = {
    CREATE_EXPERIMENT: "creating an experiment",
    "POST /mlflow/registered-models/create": "creating a registered model",
}
REGISTERED_BY_TAG = "registered.by"
"""Tag of a version that names the account that registered it (registry/versions.py)."""
RESERVED_TAGS = {"approval", "retired", "verdict"}
"""Tags that the registry's commands trust (registry/approvals.py, registry/versions.py)."""
PROMPT_PREFIX = "mlflow.prompt."
"""Prefix of tags that make MLflow treat a model as a prompt, and hide it from the others."""
MAX_NAME = 100
"""Characters of a name that a refusal repeats."""
LEDGER_SUFFIX = ".ledger"
"""Suffix of a model that holds the ledger of another (registry/ledger.py)."""
VERSION_FOLDER = "model"
"""Folder of a run's artifacts with the files of its version (registry/register.py)."""
MODEL_SOURCE = re.compile(r"models:/[^/@]+/\d+")
FROZEN = re.compile(r"(model(/.*)?|[^/]*\.onnx|[^/]*\.parquet|config\.yaml|split\.csv)", re.DOTALL)
"""Artifacts that nobody changes once a version wraps their run: its files and its evidence."""
ADDED_LATER = "corruptions.parquet"
"""Of FROZEN, what may be added to a version (registry/robustness.py), once."""
ARTIFACT_PATH = re.compile(r"(?:[\w-]+/)*([0-9a-f]{32})/artifacts/(.+)", re.DOTALL)
"""Path below the root of the artifacts: the run's id, and the path within the run."""
FORBIDDEN = re.compile(r"[%\\;?#\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""What no path of an artifact has: characters that MLflow removes from it or decodes."""
MAX_FAILED_LOGINS, MAX_FAILED_OF_ADDRESS, FAILED_LOGINS_S = 10, 100, 60.0
"""Wrong passwords from one address for one user, and for all of them, since each costs a tenth of a
second of processor; and the time in which they are counted."""
MAX_COUNTED_LOGINS = 10_000
"""Pairs of address and user, and addresses, in memory; beyond them the oldest are forgotten."""
_failed_logins: dict[tuple[str, str | None], deque[float]] = {}
_failed_logins_lock = threading.Lock()


def authenticate() -> Authorization | Response:
    """Return the user of the present request, or the answer 401, 403 or 429."""
    authorization = _log_in()
    if isinstance(authorization, Response):
        return authorization
    name = str(authorization.username)
    user = auth.store.get_user(name)
    if user.is_admin:
        return authorization
    roles = {role.name for role in auth.store.list_user_roles(user.id)}
    reason = _refused_route(roles) or _refused_content(name, roles)
    return Response(reason + "\n", status=403, mimetype="text/plain") if reason else authorization


def _log_in() -> Authorization | Response:
    """Check the password, or refuse to after many wrong ones."""
    if request.authorization is None:
        return auth.authenticate_request_basic_auth()
    name, password = request.authorization.username or "", request.authorization.password or ""
    address = (request.headers.get("X-Forwarded-For") or request.remote_addr or "")[:MAX_NAME]
    limits = {(address, name[:MAX_NAME]): MAX_FAILED_LOGINS, (address, None): MAX_FAILED_OF_ADDRESS}
    now = time.monotonic()
    with _failed_logins_lock:
        for key, limit in limits.items():
            failures = _failed_logins.get(key, deque())
            while failures and now - failures[0] > FAILED_LOGINS_S:
                failures.popleft()
            if len(failures) >= limit:
                seconds = f"{FAILED_LOGINS_S:.0f} s"
                message = f"{limit} wrong passwords within {seconds}: wait {seconds}\n"
                return Response(message, status=429, mimetype="text/plain")
    answer = auth.authenticate_request_basic_auth()
    if not isinstance(answer, Response):
        return answer
    if not auth.store.has_user(name):
        check_password_hash(_hash_of_nobody(), password)  # takes as long as for a known user
    with _failed_logins_lock:
        for key in limits:
            _failed_logins.setdefault(key, deque()).append(now)
        while len(_failed_logins) > MAX_COUNTED_LOGINS:
            _failed_logins.pop(next(iter(_failed_logins)))
    return answer


@functools.cache
def _hash_of_nobody() -> str:
    return generate_password_hash("of nobody")


def _refused_route(roles: set[str]) -> str:
    """Return why these roles may not use the route of the request; empty if they may."""
    route = _route()
    if any(route in ROUTES.get(role, ()) for role in roles) or route in ACCOUNT_ROUTES:
        return ""
    for role, routes in ROUTES.items():
        if route in routes:
            action = PROMOTER_ACTIONS.get(route) or CREATE_ACTIONS.get(route, route)
            return _needs(_name_target(action) if route in CREATE_ACTIONS else action, role)
    return f"{request.method} {request.path[:MAX_NAME]} is for administrators"


def _refused_content(name: str, roles: set[str]) -> str:
    """Return why the user may not send this request, whose route is allowed; empty if it may."""
    route, body = _route(), _json_body()
    if route == CREATE_EXPERIMENT and body.get("artifact_location"):
        return "only an administrator chooses an artifact_location: leave it out"
    if route == UPDATE_EXPERIMENT:
        experiment_id = str(body.get("experiment_id", ""))
        if not auth._get_experiment_permission(experiment_id, name).can_manage:
            return "only who created an experiment renames it: ask them, or an administrator"
    if route == CREATE_VERSION:
        source = str(body.get("source", ""))
        if not _is_allowed_source(source, str(body.get("run_id", ""))):
            return (
                f"the source {source[:MAX_NAME]!r} is neither the folder {VERSION_FOLDER} of the "
                "artifacts of its run_id nor a version (models:/NAME/NUMBER): log the files first"
            )
        if (registered_by := _version_tags().get(REGISTERED_BY_TAG, name)) != name:
            return f"you are {name}, and cannot register a version in the name of {registered_by}"
    if "promoter" not in roles and (action := _forged(route, body)):
        return _needs(action, "promoter")
    return _refused_artifact()


def _forged(route: str, body: dict[str, Any]) -> str:
    """Return what the request does in the name of a promoter; empty if nothing."""
    if request.method == "GET" or not route.startswith(
        ("POST /mlflow/registered-models/", "POST /mlflow/model-versions/")
    ):
        return ""
    names = [str(body.get("name", "")), *request.args.getlist("name")]
    if any(name.endswith(LEDGER_SUFFIX) for name in names):
        return "writing the ledger"
    forged = sorted(
        key for key in _version_tags() if key in RESERVED_TAGS or key.startswith(PROMPT_PREFIX)
    )
    return f"setting the tag {forged[0]}" if forged else ""


def _is_allowed_source(source: str, run_id: str) -> bool:
    """Return whether a version may be made of the files there: MLflow reads them for everybody.

    The files of a run must be in the folder that `_refused_artifact` protects, and the version must
    name that run.
    """
    if MODEL_SOURCE.fullmatch(source):
        return True
    try:
        run = handlers._get_tracking_store().get_run(run_id)
    except MlflowException:
        return False
    return source == f"{run.info.artifact_uri}/{VERSION_FOLDER}"


def _refused_artifact() -> str:
    """Return why the artifact of the request is not written or deleted; empty if it may be.

    What a registered version consists of, or was judged by, stays as it is.
    """
    if request.method == "GET":
        return ""
    if path := str((request.view_args or {}).get("artifact_path", "")):
        match = ARTIFACT_PATH.fullmatch(path)
        if match is None and request.method == "DELETE":
            return "only artifacts below a run are deleted here: delete the run or the experiment"
        run_id, name = match.groups() if match else ("", path)
    elif _route() == "POST /mlflow/upload-artifact":
        run_id = request.args.get("run_uuid", "")
        path = name = request.args.get("path", "")
    else:
        return ""
    parts = path.split("/")
    if (
        {"", ".", ".."} & {*parts}
        or any(part != part.strip() for part in parts)
        or FORBIDDEN.search(path)
    ):
        return (
            f"the path {path[:MAX_NAME]!r} has an empty part, '.', '..', a part that begins or "
            "ends with a space, one of %;?# or a backslash, or a character that cannot be printed"
        )
    is_frozen = FROZEN.fullmatch(name) and _has_version(run_id)
    if is_frozen and not (name == ADDED_LATER and not _exists(path)):
        return f"{name[:MAX_NAME]} belongs to a registered version and cannot be changed"
    return ""


def _exists(path: str) -> bool:
    folder = handlers._get_artifact_repo_mlflow_artifacts().list_artifacts(path.rpartition("/")[0])
    return path.rpartition("/")[2] in {file.path.rpartition("/")[2] for file in folder}


def _has_version(run_id: str) -> bool:
    registry = handlers._get_model_registry_store()
    return bool(registry.search_model_versions(f"run_id = '{run_id}'", max_results=1))


def _needs(action: str, role: str) -> str:
    return REFUSAL.format(action, role, role)


def _name_target(action: str) -> str:
    """Return the action with the name of what the request creates, such as "... 'maps'"."""
    return f"{action} {str(_json_body().get('name', ''))[:MAX_NAME]!r}"


def _route() -> str:
    """Return method and rule of the request, as in ROUTES."""
    method = "GET" if request.method == "HEAD" else request.method
    rule = request.url_rule.rule if request.url_rule else request.path
    return f"{method} {API_PREFIX.sub('', rule)}"


def _version_tags() -> dict[str, str]:
    """Return the tags of the version that the request creates; none if it creates no version."""
    tags = _json_body().get("tags") if _route() == CREATE_VERSION else None
    if not isinstance(tags, list):
        return {}
    return {str(tag.get("key")): str(tag.get("value")) for tag in tags if isinstance(tag, dict)}


def _json_body() -> dict[str, Any]:
    """Return the body as MLflow reads it.

    MLflow accepts every content type, a JSON string that holds JSON, as old clients send, and each
    name also in the form artifactLocation.
    """
    body = request.get_json(force=True, silent=True)
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            return {}
    if not isinstance(body, dict):
        return {}
    return {CAPITAL.sub(lambda match: f"_{match[0].lower()}", key): body[key] for key in body}
