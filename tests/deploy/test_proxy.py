"""The proxy's limits: nginx with the shipped configuration, before a running platform."""

import contextlib
import http.client
import json
import shutil
import ssl
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from deploy import postgresql
from tests.support.http_server import listening
from tests.support.mlflow_server import free_port
from tests.support.paths import ROOT
from tests.support.platforms import Platform
from tests.support.serving import until

CONFIGURATION = ROOT / "deploy/proxy/nginx.conf"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(
        postgresql.find_program("initdb") is None, reason="PostgreSQL is not installed: no platform"
    ),
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt-get install nginx"),
]
MB = 1_000_000
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
MAX_CONNECTIONS = 256
"""limit_conn of the configuration."""


class Echo(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(dict(self.headers)).encode())


@pytest.fixture(scope="module")
def grafana() -> Iterator[str]:
    """A server in Grafana's place, which answers with the headers that it gets."""
    with listening(Echo) as url:
        yield url


@pytest.fixture(scope="module")
def port(
    platform: Platform, grafana: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """Run nginx on loopback, with the platform's certificate; yield its port."""
    folder, port = tmp_path_factory.mktemp("proxy"), free_port()
    text = CONFIGURATION.read_text()
    for shipped, here in (
        ("/tmp/", f"{folder}/"),
        ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("/run/secrets/", f"{platform.folder}/secrets/"),
        ("http://mlflow:5000", platform.url),
        ("http://grafana:3000", grafana),
        ("  resolver 127.0.0.11 valid=5s;", "  #"),
        ("worker_processes auto;", "worker_processes auto; daemon off; user root;"),
    ):
        assert shipped in text
        text = text.replace(shipped, here)
    (folder / "nginx.conf").write_text(text)
    log = folder / "log.txt"
    with log.open("wb") as stream:
        command = [str(NGINX), "-c", str(folder / "nginx.conf"), "-p", str(folder)]
        process = subprocess.Popen(command, stdout=stream, stderr=stream)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return request(port, "GET", "/healthz") == 200
        return False

    try:
        until(answers, 30, "nginx answers")
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def connect(port: int) -> http.client.HTTPSConnection:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)


def headers(platform: Platform | None) -> dict[str, str]:
    """Return the login of a writer; none without a platform."""
    if platform is None:
        return {}
    login = ":".join(platform.user("writer"))
    return {"Authorization": f"Basic {b64encode(login.encode()).decode()}"}


def request(
    port: int, method: str, path: str, body: bytes = b"", login: dict[str, str] | None = None
) -> int:
    connection = connect(port)
    try:
        connection.request(method, path, body, login or {})
        return connection.getresponse().status
    finally:
        connection.close()


def announce(port: int, method: str, path: str, size: int) -> int:
    """Send the head of a request with a body of ``size``, and nothing of the body."""
    connection = connect(port)
    try:
        connection.putrequest(method, path)
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_large_body_is_refused_before_it_is_read(port: int) -> None:
    for path in ("/api/2.0/mlflow/runs/create", "/ajax-api/2.0/mlflow/runs/log-batch", "/graphql"):
        assert announce(port, "POST", path, 400 * MB) == 413


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", f"{ARTIFACTS}/0/x/artifacts/a.bin"),
        ("PUT", "/ajax-api/2.0/mlflow-artifacts/artifacts/0/x/artifacts/a.bin"),
        ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid=x&path=a"),
    ],
)
def test_an_artifact_without_a_login_is_refused_before_it_is_read(
    port: int, method: str, path: str
) -> None:
    assert announce(port, method, path, 400 * MB) == 401


def test_a_writer_uploads_a_large_artifact(port: int, platform: Platform) -> None:
    created = platform.administrator().request("POST", "2.0/mlflow/runs/create", experiment_id="0")
    run_id = (created or {})["run"]["info"]["run_id"]
    path = f"{ARTIFACTS}/0/{run_id}/artifacts/large.bin"
    assert request(port, "PUT", path, bytes(40 * MB), headers(platform)) == 200
    assert request(port, "GET", path, login=headers(platform)) == 200
    assert request(port, "GET", path) == 401


def test_one_address_cannot_take_all_connections(port: int) -> None:
    """Requests that never end are answered with 429 beyond the limit, and others of it go on."""
    unfinished, statuses = [], []
    try:
        for _ in range(MAX_CONNECTIONS + 20):
            connection = connect(port)
            connection.putrequest("POST", "/api/2.0/mlflow/runs/create")
            connection.putheader("Content-Length", "100")
            connection.endheaders()
            unfinished.append(connection)
        for connection in unfinished[-10:]:
            assert connection.sock is not None
            statuses.append(connection.getresponse().status)
        assert set(statuses) == {429}
    finally:
        for connection in unfinished:
            connection.close()
    until(lambda: request(port, "GET", "/healthz") == 200, 30, "the address is served again")


def test_an_account_without_a_role_is_no_user_of_the_other_pages(
    port: int, platform: Platform
) -> None:
    administrator = platform.administrator()
    if administrator.request("GET", "2.0/mlflow/users/get", none_on=404, username="lone") is None:
        administrator.request(
            "POST", "2.0/mlflow/users/create", username="lone", password="twelve or more"
        )
    lone = {"Authorization": f"Basic {b64encode(b'lone:twelve or more').decode()}"}
    assert request(port, "GET", "/prometheus/", login=lone) == 403
    assert request(port, "GET", "/prometheus/") == 401


def test_grafana_has_a_host_of_its_own_and_gets_the_name_of_who_logged_in(
    port: int, platform: Platform
) -> None:
    def answer(host: str, **more: str) -> tuple[int, bytes]:
        with contextlib.closing(connect(port)) as connection:
            connection.request("GET", "/", headers={"Host": f"{host}:{port}", **more})
            response = connection.getresponse()
            return response.status, response.read()

    login = headers(platform)
    assert answer("grafana.localhost")[0] == 401
    status, body = answer("grafana.localhost", **{"X-WEBAUTH-USER": "admin"}, **login)
    assert status == 200
    received = json.loads(body)
    assert received["X-WEBAUTH-USER"] == "a-writer", "who logged in, not whom the request names"
    assert "Authorization" not in received
    assert b"X-WEBAUTH-USER" not in answer("localhost", **login)[1], "MLflow, not Grafana"
    assert request(port, "GET", "/grafana/", login=login) != 200


def test_pages_may_run_nothing_from_elsewhere_and_uploads_nothing_at_all(
    port: int, platform: Platform
) -> None:
    def policy(path: str) -> str:
        with contextlib.closing(connect(port)) as connection:
            connection.request("GET", path, headers=headers(platform))
            return connection.getresponse().headers["Content-Security-Policy"]

    page = policy("/")
    assert "default-src 'self'" in page
    assert "http" not in page, "no other host"
    for path in (f"{ARTIFACTS}/0/x/artifacts/page.html", "/get-artifact?path=a.html&run_uuid=x"):
        assert policy(path) == "default-src 'none'; sandbox"


def test_what_nginx_is_told_is_what_the_tests_expect() -> None:
    assert f"limit_conn connections {MAX_CONNECTIONS};" in CONFIGURATION.read_text()
