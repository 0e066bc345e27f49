"""Every route of MLflow's server is given to a role, or to administrators alone."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import processes
from tests.support.paths import ROOT

FOR_ADMINISTRATORS = re.compile(
    r"""
    (GET|POST|PUT|PATCH|DELETE)\ (
        /build/.* | /health | /signup | /static-files/.*          # pages without login
      | /docs.* | /redoc | /openapi.json                          # of FastAPI
      | /mlflow/(users|roles|workspaces|webhooks)\b.*             # accounts and deliveries
      | /v1/traces | /gateway/.* | /jobs/.* | /mlflow/jobs/.*     # of language models, as all below
      | /mlflow/(traces|issues|scorers?|prompt-optimization|genai|gateway|assistant|mcp)\b.*
      | /mlflow/(gateway-proxy|demo|datasets|label-schemas|review-queues|mcp-servers)\b.*
      | /mlflow/(get-trace-artifact|get-online-trace-details|unified-traces|ui-telemetry)
      | /mlflow/runs/create-promptlab-run
      | /mlflow/artifacts/presigned-(down|up)load-url             # no object store of ours signs
      | /mlflow-artifacts/(presigned|mpu)/.*                      # they write past the server
      | /(ajax-)?api/2.0mlflow/experiments/search-datasets        # a route without its slash
    )
    """,
    re.VERBOSE,
)
"""What no role may use. A route that is neither here nor in ROUTES is new in MLflow: decide."""


def list_routes(file: Path) -> None:
    """Write the routes of MLflow's server with accounts: of its Flask and of its FastAPI part."""
    os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"
    from mlflow.server import app as flask_app
    from mlflow.server import auth

    from deploy.mlflow import role_policy

    app = auth.create_app(flask_app)
    pairs = [
        (method, rule.rule)
        for rule in flask_app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    ]
    native = list(native_routes(app.routes))
    assert len(native) > 20, "FastAPI keeps its routes elsewhere"
    pairs += native
    rules = [(method, re.sub(r"{(\w+):path}", r"<path:\1>", path)) for method, path in pairs]
    routes = {f"{method} {role_policy.API_PREFIX.sub('', rule)}" for method, rule in rules}
    routes_by_role = {role: sorted(routes) for role, routes in role_policy.ROUTES.items()}
    file.write_text(json.dumps({"routes": sorted(routes), "routes_by_role": routes_by_role}))


def native_routes(routes: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield method and path of each route that FastAPI serves without Flask."""
    for route in routes:
        if included := getattr(route, "original_router", None):
            yield from native_routes(included.routes, prefix + route.include_context.prefix)
        for method in (getattr(route, "methods", None) or set()) - {"HEAD", "OPTIONS"}:
            yield method, prefix + route.path


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """In a process of its own: MLflow keeps the application and its users' database."""
    folder = tmp_path_factory.mktemp("routes")
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\nadmin_username = admin\n"
        f"database_uri = sqlite:///{folder}/users.db\n"
    )
    environment = os.environ | {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": "twelve or more",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "key",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    process = processes.start_function(
        list_routes, (folder / "routes.json",), folder=ROOT, env=environment
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    content: dict[str, object] = json.loads((folder / "routes.json").read_text())
    return content


def test_every_route_is_given_to_a_role_or_to_administrators_alone(
    listed: dict[str, object],
) -> None:
    routes, routes_by_role = listed["routes"], listed["routes_by_role"]
    assert isinstance(routes, list)
    assert isinstance(routes_by_role, dict)
    assert len(routes) > 200
    of_roles = {route for routes_of_role in routes_by_role.values() for route in routes_of_role}
    undecided = [
        route
        for route in routes
        if route not in of_roles and not FOR_ADMINISTRATORS.fullmatch(route)
    ]
    assert not undecided, "new routes of MLflow: add each to ROUTES or to FOR_ADMINISTRATORS"
    assert not of_roles - {*routes}, "MLflow has no such route any more"


def test_each_role_includes_the_one_before(listed: dict[str, object]) -> None:
    routes_by_role = listed["routes_by_role"]
    assert isinstance(routes_by_role, dict)
    assert {*routes_by_role["reader"]} < {*routes_by_role["writer"]} < {*routes_by_role["promoter"]}
    writing = [route for route in routes_by_role["reader"] if not route.startswith("GET ")]
    assert all(
        re.search("search|graphql|get-latest-versions|update-password", route) for route in writing
    )
