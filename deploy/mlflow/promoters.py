"""Who may move an alias or approve: MLflow's permissions do not tell a writer from a promoter.

Its server calls `authenticate` on every request, in the place of its own basic authentication
(``authorization_function`` of auth.ini), and only what that lets pass meets MLflow's permissions.
"""

import json
from typing import Any

from flask import Response, request
from mlflow.server import auth
from werkzeug.datastructures import Authorization

ROLE = "promoter"
REFUSED = (
    f"{{}} is for users with the role {ROLE}: ask an administrator "
    f"(make user NAME=... ROLE={ROLE}), or let the promoter do it"
)
ALIAS = "/mlflow/registered-models/alias"
ENDS = {
    "/mlflow/registered-models/rename": "renaming a model",
    "/mlflow/registered-models/delete": "deleting a model",
    "/mlflow/model-versions/delete": "deleting a version",
    "/mlflow/model-versions/transition-stage": "moving a stage",
    "/mlflow/model-versions/set-tag": "a tag of a version",
    "/mlflow/model-versions/delete-tag": "a tag of a version",
}
CREATE = "/mlflow/model-versions/create"
OURS = {"approval", "retired", "verdict"}
"""Tags that the registry's verbs believe (registry/opinions.py, registry/versions.py)."""
LEDGER = ".ledger"
"""How the name of a model ends that holds the history of another (registry/ledger.py)."""


def authenticate() -> Authorization | Response:
    told = auth.authenticate_request_basic_auth()
    if isinstance(told, Response):
        return told
    what = _for_promoters()
    if not what or _promotes(str(told.username)):
        return told
    return Response(REFUSED.format(what) + "\n", status=403, mimetype="text/plain")


def _promotes(name: str) -> bool:
    user = auth.store.get_user(name)
    return user.is_admin or ROLE in {role.name for role in auth.store.list_user_roles(user.id)}


def _for_promoters() -> str:
    """What of the request is; empty where nothing is."""
    rule = request.url_rule.rule if request.url_rule else request.path
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
        if forged := sorted(keys & OURS):
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
