"""The defences of docs/security.md, tested on a running platform."""

import http.client
import os
import re
from pathlib import Path

import psutil
import pytest
import requests
import urllib3

from deploy import audit, postgresql
from eurosat.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.platforms import Platform

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(
        postgresql.find_program("initdb") is None, reason="PostgreSQL is not installed: no platform"
    ),
]
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
ESCAPES = [
    "../../escaped",
    "..%2F..%2Fescaped",
    "%2e%2e/%2e%2e/escaped",
    "..%252F..%252Fescaped",
    "0/../../escaped",
    "0/..%2f..%2f..%2fescaped",
    "/tmp/escaped",
    "%2Ftmp%2Fescaped",
    "0/%00escaped",
    "..\\..\\escaped",
    "file:///tmp/escaped",
    "0/./../escaped",
]


def processes(platform: Platform) -> list[psutil.Process]:
    """Return every process that the platform has started."""
    supervisor = psutil.Process(platform.pid)
    return supervisor.children(recursive=True)


def raw(platform: Platform, method: str, path: str, **headers: str) -> int:
    """Send a request whose path is not normalised on its way; return the status of the answer."""
    admin = platform.env["MLFLOW_TRACKING_USERNAME"], platform.env["MLFLOW_TRACKING_PASSWORD"]
    headers |= urllib3.make_headers(basic_auth=":".join(admin))
    host, port = platform.url.removeprefix("http://").split(":")
    body = b"escaped" if method == "PUT" else b""
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("path", ESCAPES)
def test_no_artifact_path_leads_out_of_the_bucket(platform: Platform, path: str) -> None:
    status = raw(platform, "PUT", f"{ARTIFACTS}/{path}")
    bucket = platform.folder / "store" / "mlflow"
    outside = [
        file
        for file in platform.folder.rglob("*escaped*")
        if not file.is_relative_to(bucket / "artifacts")
    ]
    assert not outside
    assert not Path("/tmp/escaped").exists()
    assert status < 500, status
    assert raw(platform, "GET", f"{ARTIFACTS}/{path.replace('escaped', 'env')}") >= 400


@pytest.mark.parametrize(
    "path", ["../../secrets/admin_password", "..%2f..%2fsecrets/admin_password"]
)
@pytest.mark.parametrize("call", ["list-artifacts", "get-artifact"])
def test_no_query_of_artifacts_reads_a_file_of_the_server(
    platform: Platform, path: str, call: str
) -> None:
    created = (
        platform.administrator().request("POST", "2.0/mlflow/runs/create", experiment_id="0") or {}
    )
    run_id = created["run"]["info"]["run_id"]
    route = "/get-artifact" if call == "get-artifact" else "/api/2.0/mlflow/artifacts/list"
    status = raw(platform, "GET", f"{route}?run_id={run_id}&path={path}")
    assert status in range(400, 500)


def test_another_host_or_origin_is_refused(platform: Platform) -> None:
    path = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert raw(platform, "GET", path) == 200
    assert raw(platform, "GET", path, Host="evil.example") == 403
    create = "/api/2.0/mlflow/runs/create"
    assert raw(platform, "POST", create, Origin="https://evil.example") == 403
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert raw(platform, "POST", "/api/2.0/mlflow/users/create-ui", **form) in (400, 403)


def test_a_delivery_that_mlflow_did_not_sign_is_refused(platform: Platform) -> None:
    url = f"{platform.env['EUROSAT_PROMOTER_URL']}/webhook"
    assert requests.post(url, json={"entity": "model_version"}, timeout=10).status_code == 401


def test_nothing_listens_beyond_loopback(platform: Platform) -> None:
    listening = [
        (process.name(), connection.laddr.ip)
        for process in processes(platform)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 5
    assert {address for _, address in listening} == {"127.0.0.1"}


def test_no_process_unpickles(platform: Platform) -> None:
    settings = {
        process.pid: process.environ().get("MLFLOW_ALLOW_PICKLE_DESERIALIZATION")
        for process in processes(platform)
        if "python" in process.name()
    }
    assert len(settings) >= 4
    assert set(settings.values()) == {"false"}


def test_no_secret_is_in_a_log_or_a_command_line(platform: Platform) -> None:
    texts = "".join(
        file.read_text(errors="replace") for file in (platform.folder / "logs").iterdir()
    )
    texts += "".join(" ".join(process.cmdline()) for process in processes(platform))
    assert "healthy" in texts
    for file in (platform.folder / "secrets").iterdir():
        for secret in re.findall(r"[\w=+/-]{30,}", file.read_text()):
            assert secret not in texts, file.name


def test_secrets_and_addresses_are_readable_for_their_owner_only(platform: Platform) -> None:
    for file in (platform.folder / "secrets", platform.folder / "env"):
        assert not file.stat().st_mode & 0o077, file
        assert file.stat().st_uid == os.geteuid()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/.platform/", "/.env"} <= set(ignored)
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


def test_ci_audits_every_lock_file(tmp_path: Path) -> None:
    assert "make audit\n" in (ROOT / ".ci/run").read_text()
    locks = {file.relative_to(ROOT) for file in (ROOT / "deploy").glob("*/requirements.lock")}
    assert locks | {Path("requirements.lock")} == set(audit.LOCK_FILES)
    (tmp_path / "lock").write_text("no requirement at all\n")
    with pytest.raises(ConfigError, match="cannot be audited"):
        audit.main([str(tmp_path / "lock")])


def test_every_test_that_the_docs_name_exists() -> None:
    text = (ROOT / "docs/security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
