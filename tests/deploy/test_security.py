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
from tests.support import platforms
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


def raw(
    platform: Platform,
    method: str,
    path: str,
    login: tuple[str, str] | None = None,
    **headers: str,
) -> int:
    """Send a request whose path is not normalised on its way; return the status of the answer."""
    env = platform.env
    login = login or (env["MLFLOW_TRACKING_USERNAME"], env["MLFLOW_TRACKING_PASSWORD"])
    headers |= urllib3.make_headers(basic_auth=":".join(login))
    host, port = platform.url.removeprefix("http://").split(":")
    body = b"" if method in ("GET", "DELETE") else b"escaped"
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


def send(platform: Platform, role: str, method: str, path: str, **body: object) -> int:
    """Send a request as a user with the role, or without one; return the status of the answer."""
    login = platform.user(role) if role else nobody(platform)
    response = requests.request(
        method, f"{platform.url}{path}", auth=login, timeout=60, json=body or None
    )
    return response.status_code


def nobody(platform: Platform) -> tuple[str, str]:
    """Return the login of a user without a role."""
    administrator = platform.administrator()
    if administrator.request("GET", "2.0/mlflow/users/get", none_on=404, username="alone") is None:
        administrator.request(
            "POST", "2.0/mlflow/users/create", username="alone", password=platforms.PASSWORD
        )
    return "alone", platforms.PASSWORD


SECRET = {"secret_name": "s", "secret_value": {"api_key": "x"}, "provider": "openai"}


@pytest.mark.parametrize("role", ["", "reader", "writer", "promoter"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/3.0/mlflow/gateway/secrets/create", SECRET),
        ("POST", "/ajax-api/3.0/mlflow/gateway/endpoints/create", {"name": "e"}),
        ("POST", "/ajax-api/3.0/mlflow/demo/generate", {}),
        ("POST", "/api/3.0/mlflow/scorers/register", {"experiment_id": "0", "name": "s"}),
        ("POST", "/api/3.0/mlflow/traces", {}),
        ("GET", "/api/2.0/mlflow/users/list", {}),
        ("GET", "/api/3.0/mlflow/roles/list", {}),
        ("GET", "/api/2.0/mlflow/no/such/route", {}),
    ],
)
def test_what_no_role_needs_is_for_administrators(
    platform: Platform, role: str, method: str, path: str, body: dict[str, object]
) -> None:
    assert send(platform, role, method, path, **body) == 403


def test_an_account_without_a_role_makes_nothing(platform: Platform) -> None:
    for path in ("registered-models/create", "experiments/create"):
        assert send(platform, "", "POST", f"/api/2.0/mlflow/{path}", name="e") == 403
    assert send(platform, "", "GET", "/api/2.0/mlflow/users/current") == 200


@pytest.mark.parametrize("role", ["writer", "promoter"])
@pytest.mark.parametrize("key", ["artifact_location", "artifactLocation"])
@pytest.mark.parametrize("location", ["gs://mlflow/backups", "file:///etc", "mlflow-artifacts:/"])
def test_only_administrators_choose_where_artifacts_are(
    platform: Platform, role: str, key: str, location: str
) -> None:
    body = {"name": "elsewhere", key: location}
    assert send(platform, role, "POST", "/api/2.0/mlflow/experiments/create", **body) == 403


@pytest.mark.parametrize("role", ["writer", "promoter"])
@pytest.mark.parametrize(
    "source",
    [
        "gs://mlflow/backups",
        "s3://elsewhere/files",
        "file:///etc",
        "/etc/passwd",
        "http://127.0.0.1:9/model",
        "mlflow-artifacts:/",
        "mlflow-artifacts://127.0.0.1:9/0/{run}/artifacts/model",
        "mlflow-artifacts:/0/{run}/artifacts/../../../secrets",
        "mlflow-artifacts:/0/{run}/artifacts/%2e%2e/%2e%2e/secrets",
        "mlflow-artifacts:/1/{run}/artifacts/model",
        "mlflow-artifacts:/0/00000000000000000000000000000000/artifacts/model",
        "runs:/{run}/../model",
        "models:/m-1/../../secrets",
        "mlflow-artifacts:/0/{run}/artifacts",
        "mlflow-artifacts:/0/{run}/artifacts/unprotected",
        "mlflow-artifacts:/0/{other}/artifacts/model",
    ],
)
def test_a_version_is_made_of_files_of_a_run_alone(
    platform: Platform, role: str, source: str
) -> None:
    run_id = new_run(platform)
    source = source.format(run=run_id, other=new_run(platform))
    create = "/api/2.0/mlflow/model-versions/create"
    for fields in ({}, {"run_id": run_id}, {"runId": run_id}):
        body = {"name": "eurosat", "source": source, **fields}
        assert send(platform, role, "POST", create, **body) == 403
    own = {"name": "eurosat", "source": f"mlflow-artifacts:/0/{run_id}/artifacts/model"}
    assert send(platform, role, "POST", create, **own) == 403, "it names no run"


def new_run(platform: Platform) -> str:
    created = platform.administrator().request("POST", "2.0/mlflow/runs/create", experiment_id="0")
    return str((created or {})["run"]["info"]["run_id"])


CHANGES = [
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model/pyfunc.py"),
    ("PUT", "/ajax-api/2.0/mlflow-artifacts/artifacts/0/{run}/artifacts/model/pyfunc.py"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model%2Fpyfunc.py"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model%252Fpyfunc.py"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts//model/pyfunc.py"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/./model/pyfunc.py"),
    ("PUT", ARTIFACTS + "/0//{run}/artifacts/model/pyfunc.py"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model/added.py"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model/added%0A.py"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model%2Fadded%0D%0A.py"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/%0Amodel/added.py"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/%20model/pyfunc.py"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model/pyfunc.py%20"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model.onnx;"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model.onnx%3B"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model.onnx%3F"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/predictions.parquet%23"),
    ("PUT", ARTIFACTS + "/%200/{run}/artifacts/model.onnx"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/model.onnx"),
    ("PUT", ARTIFACTS + "/0/{run}/artifacts/predictions.parquet"),
    ("POST", "/api/2.0/mlflow-artifacts/mpu/create/0/{run}/artifacts/model/pyfunc.py"),
    ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=model/pyfunc.py"),
    ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=.//model/pyfunc.py"),
    ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=%20model/pyfunc.py"),
    ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=predictions.parquet%3B"),
    ("DELETE", ARTIFACTS + "/0/{run}/artifacts/model/pyfunc.py"),
    ("DELETE", ARTIFACTS + "/0/{run}/artifacts/model"),
    ("DELETE", ARTIFACTS + "/0/{run}/artifacts"),
    ("DELETE", ARTIFACTS + "/0/{run}/artifacts/model;"),
    ("DELETE", ARTIFACTS + "/0/{run}/artifacts/%20"),
    ("DELETE", ARTIFACTS + "/0/{run}"),
    ("DELETE", ARTIFACTS + "/0"),
]


def test_the_files_of_a_version_stay_as_they_were_registered(platform: Platform) -> None:
    """Whoever may log to the run may not change what was judged, by any way to its artifacts."""
    login, promoter = platform.user("writer"), platform.user("promoter")
    run_id = new_run(platform)
    url = f"{platform.url}{ARTIFACTS}/0/{run_id}/artifacts"
    for name in ("model/pyfunc.py", "model.onnx", "predictions.parquet"):
        assert requests.put(f"{url}/{name}", b"judged", auth=login, timeout=30).ok
    source = f"mlflow-artifacts:/0/{run_id}/artifacts/model"
    body = {"name": "frozen", "source": source, "run_id": run_id}
    assert (
        send(platform, "writer", "POST", "/api/2.0/mlflow/registered-models/create", name="frozen")
        == 200
    )
    create = "/api/2.0/mlflow/model-versions/create"
    assert send(platform, "writer", "POST", create, **body) == 200
    for method, path in CHANGES:
        for user in (login, promoter):
            status = raw(platform, method, path.format(run=run_id), login=user)
            assert status in (400, 403, 404), f"{method} {path}: {status}"
    for name in ("model/pyfunc.py", "model.onnx", "predictions.parquet"):
        assert requests.get(f"{url}/{name}", auth=login, timeout=30).content == b"judged", name
    assert requests.get(f"{url}/model/added.py", auth=login, timeout=30).status_code >= 400
    listing = requests.get(
        f"{platform.url}{ARTIFACTS}",
        {"path": f"0/{run_id}/artifacts/model"},
        auth=login,
        timeout=30,
    )
    assert [file["path"] for file in listing.json()["files"]] == ["pyfunc.py"]
    for name in ("evaluation/test/report.md", "corruptions.parquet"):
        assert requests.put(f"{url}/{name}", b"later", auth=login, timeout=30).ok, name
    again = requests.put(f"{url}/corruptions.parquet", b"again", auth=login, timeout=30)
    assert again.status_code == 403


@pytest.mark.parametrize("role", ["writer", "promoter"])
@pytest.mark.parametrize("action", ["create", "complete", "abort"])
def test_no_member_uploads_to_the_bucket_past_the_server(
    platform: Platform, role: str, action: str
) -> None:
    """The server signs addresses of the bucket there, and reads the file's name from the body."""
    url = f"{platform.url}/api/2.0/mlflow-artifacts/mpu/{action}/0/{new_run(platform)}/artifacts"
    body = {"path": "model.onnx", "num_parts": 1, "upload_id": "1", "parts": []}
    answer = requests.post(url, json=body, auth=platform.user(role), timeout=30)
    assert answer.status_code == 403


def test_after_ten_wrong_passwords_an_address_waits(platform: Platform) -> None:
    path = "/api/2.0/mlflow/users/current"
    for name in (nobody(platform)[0], "unknown"):
        statuses = [
            requests.get(f"{platform.url}{path}", auth=(name, f"wrong {n}"), timeout=30).status_code
            for n in range(24)  # each process of MLflow's server counts
        ]
        assert set(statuses) == {401, 429}
        assert statuses[-1] == 429
    assert send(platform, "writer", "GET", path) == 200, "others are not affected"


def test_an_address_that_tries_many_users_waits(platform: Platform) -> None:
    """Each wrong password costs processor time, whoever it is for."""
    url = f"{platform.url}/api/2.0/mlflow/users/current"
    elsewhere = {"X-Forwarded-For": "192.0.2.1"}  # so that other tests go on

    def statuses(count: int) -> list[int]:
        return [
            requests.get(
                url, auth=(f"user {number}", "wrong"), headers=elsewhere, timeout=30
            ).status_code
            for number in range(count)
        ]

    assert set(statuses(230)) == {401, 429}, "each process of MLflow's server counts"
    assert statuses(5) == [429] * 5
    assert send(platform, "writer", "GET", "/api/2.0/mlflow/users/current") == 200


def test_another_host_or_origin_is_refused(platform: Platform) -> None:
    path = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert raw(platform, "GET", path) == 200
    assert raw(platform, "GET", path, Host="evil.example") == 403
    create = "/api/2.0/mlflow/runs/create"
    assert raw(platform, "POST", create, Origin="https://evil.example") == 403
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert raw(platform, "POST", "/api/2.0/mlflow/users/create-ui", None, **form) in (400, 403)


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
