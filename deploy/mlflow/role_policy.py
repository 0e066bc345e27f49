"""Authentication plugin of MLflow's server: only promoters may move aliases or approve.

MLflow's own permissions do not separate logging from promoting. Its server calls `authenticate` for
every request, in place of its basic authentication (``authorization_function`` in auth.ini). Only
requests that pass here are checked against MLflow's permissions.
"""

import json
from typing import Any

from flask import Response, request
from mlflow.server import auth
from werkzeug.datastructures import Authorization

PROMOTER, WRITERS = "promoter", {"writer", "promoter"}
REFUSAL = "{} needs the role {}: ask an administrator (make user NAME=... ROLE={})"
ALIAS_ROUTE = "/mlflow/registered-models/alias"
PROMOTER_ROUTES = {
    "/mlflow/registered-models/rename": "renaming a model",
    "/mlflow/registered-models/delete": "deleting a model",
    "/mlflow/registered-models/update": "changing a model's description",
    "/mlflow/registered-models/set-tag": "changing a model's tags",
    "/mlflow/registered-models/delete-tag": "changing a model's tags",
    "/mlflow/model-versions/delete": "deleting a version",
    "/mlflow/model-versions/update": "changing a version's description",
    "/mlflow/model-versions/transition-stage": "changing a version's stage",
    "/mlflow/model-versions/set-tag": "changing a version's tags",
    "/mlflow/model-versions/delete-tag": "changing a version's tags",
}
VERSION_ROUTE = "/mlflow/model-versions/create"
CREATE_ROUTES = {
    "/mlflow/experiments/create": "creating an experiment",
    "/mlflow/registered-models/create": "creating a registered model",
}
"""Routes that MLflow opens to every user, also to one without a role."""
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


def authenticate() -> Authorization | Response:
    """Return the user of the present request, or the answer 401 or 403."""
    authorization = auth.authenticate_request_basic_auth()
    if isinstance(authorization, Response):
        return authorization
    name = str(authorization.username)
    if (action := _promoter_action()) and not _has_role(name, {PROMOTER}):
        return _refusal(action, PROMOTER)
    for suffix, action in CREATE_ROUTES.items():
        if _route().endswith(suffix) and not _has_role(name, WRITERS):
            return _refusal(_name_target(action), "writer")
    if (registered_by := _version_tags().get(REGISTERED_BY_TAG, name)) != name:
        message = f"you are {name}, and cannot register a version in the name of {registered_by}\n"
        return Response(message, status=403, mimetype="text/plain")
    return authorization


def _name_target(action: str) -> str:
    """Return the action with the name of what the request creates, such as "... 'maps'"."""
    return f"{action} {str(_json_body().get('name', ''))[:MAX_NAME]!r}"


def _refusal(action: str, role: str) -> Response:
    return Response(REFUSAL.format(action, role, role) + "\n", status=403, mimetype="text/plain")


def _has_role(name: str, roles: set[str]) -> bool:
    user = auth.store.get_user(name)
    return user.is_admin or bool(
        roles & {role.name for role in auth.store.list_user_roles(user.id)}
    )


def _route() -> str:
    return request.url_rule.rule if request.url_rule else request.path


def _promoter_action() -> str:
    """Return what the request does that only promoters may do; empty if nothing."""
    route = _route()
    if request.method == "GET" or not (
        "/registered-models/" in route or "/model-versions/" in route
    ):
        return ""
    if route.endswith(ALIAS_ROUTE):
        return "moving an alias"
    for suffix, action in PROMOTER_ROUTES.items():
        if route.endswith(suffix):
            return action
    body = _json_body()
    names = [str(body.get("name", "")), *request.args.getlist("name")]
    if any(name.endswith(LEDGER_SUFFIX) for name in names):
        return "writing the ledger"
    forged = sorted(
        key for key in _version_tags() if key in RESERVED_TAGS or key.startswith(PROMPT_PREFIX)
    )
    return f"setting the tag {forged[0]}" if forged else ""


def _version_tags() -> dict[str, str]:
    """Return the tags of the version that the request creates; none if it creates no version."""
    tags = _json_body().get("tags") if _route().endswith(VERSION_ROUTE) else None
    if not isinstance(tags, list):
        return {}
    return {str(tag.get("key")): str(tag.get("value")) for tag in tags if isinstance(tag, dict)}


def _json_body() -> dict[str, Any]:
    """Return the body as MLflow reads it.

    MLflow accepts every content type, and a JSON string that holds JSON, as old clients send.
    """
    body = request.get_json(force=True, silent=True)
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            return {}
    return body if isinstance(body, dict) else {}
