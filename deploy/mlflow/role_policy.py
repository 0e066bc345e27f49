"""Who may move an alias or approve: MLflow's permissions do not tell a writer from a promoter.

Its server calls `authenticate` on every request, in the place of its own basic authentication
(``authorization_function`` of auth.ini), and only what that lets pass meets MLflow's permissions.
"""

import json
from typing import Any

from flask import Response, request
from mlflow.server import auth
from werkzeug.datastructures import Authorization

ROLE, WRITERS = "promoter", {"writer", "promoter"}
REFUSED = "{} is for users with the role {}: ask an administrator (make user NAME=... ROLE={})"
ALIAS = "/mlflow/registered-models/alias"
ENDS = {
    "/mlflow/registered-models/rename": "renaming a model",
    "/mlflow/registered-models/delete": "deleting a model",
    "/mlflow/registered-models/update": "a model's description",
    "/mlflow/registered-models/set-tag": "a tag of a model",
    "/mlflow/registered-models/delete-tag": "a tag of a model",
    "/mlflow/model-versions/delete": "deleting a version",
    "/mlflow/model-versions/update": "a version's description",
    "/mlflow/model-versions/transition-stage": "moving a stage",
    "/mlflow/model-versions/set-tag": "a tag of a version",
    "/mlflow/model-versions/delete-tag": "a tag of a version",
}
CREATE = "/mlflow/model-versions/create"
NEW = ("/mlflow/experiments/create", "/mlflow/registered-models/create")
"""MLflow lets everybody make these whom it knows."""
OURS = {"approval", "retired", "verdict"}
"""Tags that the registry's verbs believe (registry/approvals.py, registry/versions.py)."""
PROMPT = "mlflow.prompt."
"""How tags begin that make MLflow take a model for a prompt, and hide it from all others."""
LEDGER = ".ledger"
"""How the name of a model ends that holds the history of another (registry/ledger.py)."""


def authenticate() -> Authorization | Response:
    told = auth.authenticate_request_basic_auth()
    if isinstance(told, Response):
        return told
    name = str(told.username)
    if (what := _for_promoters()) and not _has(name, {ROLE}):
        return _refused(what, ROLE)
    if _rule().endswith(NEW) and not _has(name, WRITERS):
        return _refused("making one", "writer")
    return told


def _refused(what: str, role: str) -> Response:
    return Response(REFUSED.format(what, role, role) + "\n", status=403, mimetype="text/plain")


def _has(name: str, roles: set[str]) -> bool:
    user = auth.store.get_user(name)
    return user.is_admin or bool(roles & {one.name for one in auth.store.list_user_roles(user.id)})


def _rule() -> str:
    return request.url_rule.rule if request.url_rule else request.path


def _for_promoters() -> str:
    """What of the request is; empty where nothing is."""
    rule = _rule()
    if request.method == "GET" or not ("/registered-models/" in rule or "/model-versions/" in rule):
        return ""
    if rule.endswith(ALIAS):
        return "moving an alias"
    for end, what in ENDS.items():
        if rule.endswith(end):
            return what
    asked = _asked()
    names = [str(asked.get("name", "")), *request.args.getlist("name")]
    if any(name.endswith(LEDGER) for name in names):
        return "the ledger"
    if rule.endswith(CREATE):
        tags = asked.get("tags") or []
        keys = {str(tag.get("key")) for tag in tags if isinstance(tag, dict)}
        forged = sorted(key for key in keys if key in OURS or key.startswith(PROMPT))
        if forged:
            return f"the tag {forged[0]}"
    return ""


def _asked() -> dict[str, Any]:
    """The body as MLflow reads it: of any content type, and JSON within JSON from old clients."""
    body = request.get_json(force=True, silent=True)
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            return {}
    return body if isinstance(body, dict) else {}
