"""`make platform` starts PostgreSQL, an object store, MLflow, the promoter and serving."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from mlflow import MlflowClient

from deploy import postgresql, secrets, services, users
from deploy.addresses import Addresses
from deploy.layout import Layout
from eurosat.doctor import __main__ as doctor
from eurosat.errors import ConfigError
from eurosat.runtime import exit_codes
from registry import register
from tests.support import platforms
from tests.support.images import encoded
from tests.support.mlflow_server import free_port
from tests.support.platforms import Platform
from tests.support.postgres import create_database
from tests.support.registry import MLFLOW_WARNS, make_run
from tests.support.serving import until

pytestmark = [
    *MLFLOW_WARNS,
    pytest.mark.postgres,
    pytest.mark.skipif(
        postgresql.find_program("initdb") is None, reason="PostgreSQL is not installed: no platform"
    ),
]
WAIT_S = 90.0
OLD_SCHEMA = "acf3f17fdcc7"
"""Schema of MLflow 2.9, from 2023."""
OLD_ROWS = """
INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage)
    VALUES (1, 'maps', 'mlflow-artifacts:/1', 'active');
INSERT INTO runs (run_uuid, name, experiment_id, status, lifecycle_stage, source_type, user_id,
    start_time, artifact_uri)
    VALUES (repeat('a', 32), 'first', 1, 'FINISHED', 'active', 'LOCAL', 'ann', 1, 'x');
INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan)
    VALUES ('f1', 0.9, 1, repeat('a', 32), 0, false), ('f1', 0.95, 2, repeat('a', 32), 1, false);
INSERT INTO latest_metrics (key, value, timestamp, run_uuid, step, is_nan)
    VALUES ('f1', 0.95, 2, repeat('a', 32), 1, false);
INSERT INTO registered_models (name, creation_time) VALUES ('eurosat', 1);
INSERT INTO model_versions (name, version, creation_time, current_stage, source, status)
    VALUES ('eurosat', 3, 1, 'None', 'x', 'READY');
INSERT INTO registered_model_aliases (name, alias, version) VALUES ('eurosat', 'champion', 3);
"""


def pid_of(platform: Platform, service: str) -> int:
    """Return a service's process id, found by the port in its command line."""
    variable = {"promoter": "EUROSAT_PROMOTER_URL", "serving": "EUROSAT_SERVING_URL"}[service]
    flag = f"--port={platform.env[variable].rpartition(':')[2]}"
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if flag.encode() in words:
                return int(process.name)
    raise AssertionError(f"{service} does not run")


def test_the_addresses_are_written_for_the_owner_only(platform: Platform) -> None:
    assert stat.S_IMODE((platform.folder / "env").stat().st_mode) == 0o600
    assert stat.S_IMODE((platform.folder / "secrets").stat().st_mode) == 0o700
    for name in ("MLFLOW_TRACKING_URI", "EUROSAT_SERVING_URL", "EUROSAT_PROMOTER_URL"):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", platform.env[name]), name


def test_nobody_gets_in_without_a_password(platform: Platform) -> None:
    for login in (("admin", "wrong but long enough"), ("nobody", "nobody"), ("", "")):
        assert platform.status(login, "GET", "experiments/get", experiment_id="0") == 401


def test_the_database_requires_a_password(platform: Platform) -> None:
    import psycopg2

    uri = platform.env["EUROSAT_DATABASE_URI"].replace("+psycopg2", "")
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(uri, password="wrong")


def test_mlflows_account_owns_its_database_and_is_no_superuser(platform: Platform) -> None:
    import psycopg2

    uri = platform.env["EUROSAT_DATABASE_URI"].replace("+psycopg2", "")
    passfile = platform.env["PGPASSFILE"]
    with contextlib.closing(psycopg2.connect(uri, passfile=passfile)) as connection:
        cursor = connection.cursor()
        cursor.execute(
            "SELECT rolsuper, pg_get_userbyid(datdba) FROM pg_roles, pg_database "
            "WHERE rolname = current_user AND datname = current_database()"
        )
        assert cursor.fetchone() == (False, "mlflow")
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute("COPY (SELECT 1) TO PROGRAM 'id'")
    password = (platform.folder / "secrets/postgres_password").read_text()
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(uri.replace("mlflow@", "postgres@"), password=password)


def test_a_start_warns_while_mlflows_account_is_a_superuser(
    postgres: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import psycopg2

    layout = Layout(tmp_path, Addresses(ports={"postgres": urlsplit(postgres).port or 0}))
    server = postgres.replace("+psycopg2", "")
    with contextlib.closing(psycopg2.connect(f"{server}/postgres")) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("CREATE ROLE mlflow LOGIN SUPERUSER")
        cursor.execute("CREATE DATABASE mlflow OWNER mlflow")
        try:
            assert services._has_database(layout)
            assert "MLflow's account is a superuser of PostgreSQL" in caplog.text
            assert "docs/platform.md" in caplog.text
            caplog.clear()
            cursor.execute("ALTER ROLE mlflow NOSUPERUSER")
            assert services._has_database(layout)
        finally:  # other tests use the server too
            cursor.execute("DROP DATABASE mlflow")
            cursor.execute("DROP ROLE mlflow")
    assert not caplog.records


CREATE_RUN = ("POST", "runs/create", {"experiment_id": "0"})
MODEL = {"name": "eurosat"}
VERSION = MODEL | {"version": "1"}
CREATE = MODEL | {"source": "models:/eurosat/1"}
PROMPT = {"key": "mlflow.prompt.other", "value": "true"}
APPROVAL = {"tags": [{"key": "approval", "value": "{}"}]}
ALL, WRITERS, PROMOTERS, NOBODY = (
    (True,) * 3,
    (False, True, True),
    (False, False, True),
    (False,) * 3,
)


@pytest.mark.parametrize(
    ("method", "path", "fields", "allowed"),
    [
        ("GET", "registered-models/get", MODEL, ALL),
        (*CREATE_RUN, WRITERS),
        ("POST", "registered-models/alias", VERSION | {"alias": "champion"}, PROMOTERS),
        ("DELETE", "registered-models/alias", MODEL | {"alias": "champion"}, PROMOTERS),
        ("POST", "model-versions/set-tag", VERSION | {"key": "approval", "value": "{}"}, PROMOTERS),
        ("POST", "model-versions/create", CREATE | APPROVAL, PROMOTERS),
        ("POST", "model-versions/create", CREATE | {"name": "eurosat.ledger"}, PROMOTERS),
        ("DELETE", "model-versions/delete", VERSION, PROMOTERS),
        ("PATCH", "model-versions/update", VERSION | {"description": "passed"}, PROMOTERS),
        ("POST", "registered-models/set-tag", MODEL | PROMPT, PROMOTERS),
        ("POST", "model-versions/create", CREATE | {"tags": [PROMPT]}, PROMOTERS),
        ("POST", "registered-models/create", {"name": "another"}, WRITERS),
        ("POST", "experiments/create", {"name": "another"}, WRITERS),
        ("POST", "registered-models/rename", MODEL | {"new_name": "eurosat"}, PROMOTERS),
        ("POST", "webhooks", {"name": "w", "url": "http://127.0.0.1:1/"}, NOBODY),
        ("POST", "users/create", {"username": "u", "password": "p" * 20}, NOBODY),
    ],
)
def test_each_role_has_its_permissions_and_no_others(
    platform: Platform, method: str, path: str, fields: dict[str, object], allowed: tuple[bool, ...]
) -> None:
    for role, is_allowed in zip(("reader", "writer", "promoter"), allowed, strict=True):
        status = platform.status(platform.user(role), method, path, **fields)
        assert (status != 403) is is_allowed, f"{role}: {status}"
        assert status != 401


@pytest.mark.parametrize(
    "body",
    [
        b'"{\\"name\\": \\"eurosat\\", \\"source\\": \\"models:/eurosat/1\\",'
        b' \\"tags\\": [{\\"key\\": \\"approval\\", \\"value\\": \\"{}\\"}]}"',  # of old clients
        b'{"name": "eurosat", "source": "models:/eurosat/1",'
        b' "tags": [{"key": "appro\\u0076al", "value": "{}"}]}',
        b'{"name": "eurosat.ledger", "source": "models:/eurosat/1"}',
    ],
)
@pytest.mark.parametrize("media_type", ["application/json", "text/plain", ""])
@pytest.mark.parametrize("prefix", ["api", "ajax-api"])
def test_a_writer_cannot_forge_tags_or_the_ledger_in_any_request_format(
    platform: Platform, body: bytes, media_type: str, prefix: str
) -> None:
    response = requests.post(
        f"{platform.url}/{prefix}/2.0/mlflow/model-versions/create",
        body,
        auth=platform.user("writer"),
        headers={"Content-Type": media_type},
        timeout=30,
    )
    assert response.status_code == 403
    assert "promoter" in response.text


def test_the_first_writer_does_not_own_the_teams_experiment(platform: Platform) -> None:
    login = platform.user("writer")
    found = platform.administrator().request(
        "GET", "2.0/mlflow/experiments/get-by-name", experiment_name="eurosat"
    )
    experiment = (found or {})["experiment"]["experiment_id"]
    assert platform.status(login, "POST", "runs/create", experiment_id=experiment) == 200
    assert platform.status(login, "POST", "experiments/delete", experiment_id=experiment) == 403


def test_a_writer_renames_no_experiment_of_others(platform: Platform) -> None:
    login, route = platform.user("writer"), ("POST", "experiments/update")
    for name, other in (("eurosat", True), ("own", False)):
        platform.status(login, "POST", "experiments/create", name=name)
        found = platform.administrator().request(
            "GET", "2.0/mlflow/experiments/get-by-name", experiment_name=name
        )
        experiment = (found or {})["experiment"]["experiment_id"]
        status = platform.status(login, *route, experiment_id=experiment, new_name=f"{name} 2")
        assert status == (403 if other else 200)


def test_a_refusal_names_what_was_refused(platform: Platform) -> None:
    def refusal(role: str, path: str, fields: dict[str, object]) -> str:
        response = requests.post(
            f"{platform.url}/api/2.0/mlflow/{path}",
            json=fields,
            auth=platform.user(role),
            timeout=30,
        )
        assert response.status_code == 403
        return response.text

    assert refusal("reader", "experiments/create", {"name": "maps"}).startswith(
        "creating an experiment 'maps' needs the role writer"
    )
    tags = {"tags": [{"key": "registered.by", "value": "ada"}]}
    assert refusal("writer", "model-versions/create", {**CREATE, **tags}) == (
        "you are a-writer, and cannot register a version in the name of ada\n"
    )


def test_a_new_user_gets_the_address_too(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in platform.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "/srv/tls.crt")
    assert users.main(["add", "colleague", "--role=writer"]) == exit_codes.OK
    printed = capsys.readouterr()
    assert f"MLFLOW_TRACKING_URI={platform.url}\n" in printed.out
    assert "MLFLOW_TRACKING_SERVER_CERT_PATH=tls.crt" in printed.out
    assert "a copy of /srv/tls.crt" in printed.err
    assert "reachable from this machine only" in printed.err


def test_a_user_without_a_role_sees_nothing(platform: Platform) -> None:
    platform.administrator().request(
        "POST", "2.0/mlflow/users/create", username="nobody", password=platforms.PASSWORD
    )
    login = ("nobody", platforms.PASSWORD)
    assert platform.status(login, "GET", "registered-models/get", name="eurosat") == 403
    assert platform.status(login, *CREATE_RUN[:2], experiment_id="0") == 403


def test_a_new_role_replaces_the_old_one(platform: Platform) -> None:
    login = ("changing", platforms.PASSWORD)
    route = ("POST", "registered-models/alias")
    fields = {"name": "eurosat", "alias": "champion", "version": "1"}
    for role, allowed in (("promoter", True), ("writer", False), ("promoter", True)):
        platform.administrator().add(login[0], role, login[1])
        assert platform.administrator().roles_by_user()["changing"] == role
        assert (platform.status(login, *route, **fields) != 403) is allowed


def test_what_a_writer_registers_is_judged_promoted_and_served(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    platform.log_in(monkeypatch, platform.user("writer"))
    number = register.register(make_run(tmp_path), "eurosat", "challenger")
    client = MlflowClient()
    serving = platform.env["EUROSAT_SERVING_URL"]

    def served() -> bool:
        response = requests.post(
            f"{serving}/predict",
            encoded("River", "JPEG"),
            headers={"Content-Type": "image/jpeg"},
            timeout=10,
        )
        return response.ok and response.json()["model_version"] == number

    until(served, WAIT_S, "serving answers with what was registered")
    assert client.get_model_version_by_alias("eurosat", "champion").version == number
    entries = client.search_model_versions("name = 'eurosat.ledger'")
    assert entries, "the promotion is in the ledger"


@pytest.mark.parametrize("role", ["administrator", "writer", "reader"])
def test_the_doctor_finds_no_fault(
    role: str,
    platform: Platform,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in platform.env.items():
        monkeypatch.setenv(name, value)
    if role != "administrator":
        platform.log_in(monkeypatch, platform.user(role))
    assert doctor.main(["--json"]) == exit_codes.OK
    checks = json.loads(capsys.readouterr().out)["checks"]
    verdicts = {check["name"]: check["verdict"] for check in checks}
    expected = [
        "secrets",
        "tracking server",
        "version",
        "credentials",
        "promoter",
        "serving",
        "clock",
        "bucket",
    ]
    if role != "reader":
        expected += ["run and metric", "artifact", "removal"]
    if role == "administrator":
        expected += ["model version", "webhook"]
    assert [name for name in expected if verdicts[name] != "ok"] == [], checks
    for resource in ("experiments", "registered-models"):
        remaining = platform.administrator().request(
            "GET", f"2.0/mlflow/{resource}/search", max_results=1000, filter="name LIKE 'doctor-%'"
        )
        assert remaining == {}, "the doctor has left something behind"


def test_a_killed_service_is_restarted(platform: Platform) -> None:
    before = pid_of(platform, "promoter")
    os.kill(before, signal.SIGKILL)
    health = f"{platform.env['EUROSAT_PROMOTER_URL']}/health"

    def is_up() -> bool:
        try:
            return requests.get(health, timeout=5).ok
        except requests.ConnectionError:
            return False

    until(lambda: not is_up(), WAIT_S, "it is down")
    until(is_up, WAIT_S, "it is up again")
    assert pid_of(platform, "promoter") != before


def test_a_second_start_reports_that_the_platform_is_up(platform: Platform) -> None:
    result = platforms.platform_command("up", platform.folder, "--free-ports")
    assert result.returncode == 0
    assert "up already" in result.stderr


def test_a_port_that_is_taken_is_named(platform: Platform) -> None:
    with platforms.platform_folder() as folder:
        taken = platform.url.rpartition(":")[2]
        result = platforms.platform_command("up", folder, "--free-ports", f"--mlflow-port={taken}")
        assert result.returncode == 2
        assert f"port {taken} of 127.0.0.1 is taken: give --mlflow-port" in result.stderr
        assert not (folder / "env").exists()
        assert not platforms.remaining_processes(folder)


def test_stopping_or_killing_it_leaves_no_process_and_loses_no_data() -> None:
    with platforms.platform_folder() as folder:
        platform = platforms.start_platform(folder)
        login = platform.user("writer")
        assert platform.status(login, "POST", "experiments/create", name="kept") == 200
        assert platforms.platform_command("down", folder).returncode == 0
        assert not (folder / "env").exists()
        assert not platforms.remaining_processes(folder)

        address, platform = platform.url, platforms.start_platform(folder)
        assert platform.url == address, "the ports are kept"
        login = ("a-writer", platforms.PASSWORD)
        route = ("GET", "experiments/get-by-name")
        assert platform.status(login, *route, experiment_name="kept") == 200
        os.kill(platform.pid, signal.SIGKILL)
        until(lambda: not platforms.remaining_processes(folder), WAIT_S, "its services end with it")

        platform = platforms.start_platform(folder)
        assert platform.status(login, *route, experiment_name="kept") == 200


def test_secrets_are_generated_once(tmp_path: Path) -> None:
    generated = secrets.make_missing(tmp_path / "s")
    assert {"postgres_password", "webhook_key", "tls.key", "tls.crt"} <= set(generated)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    assert len(set(before.values())) == len(before) - 1, "two are to be filled"
    assert secrets.make_missing(tmp_path / "s") == []
    (tmp_path / "s" / "flask_key").unlink()
    assert secrets.make_missing(tmp_path / "s") == ["flask_key"]
    after = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"flask_key"}
    with pytest.raises(ConfigError, match="run `make secrets`"):
        secrets.read("another", tmp_path / "s")


def test_clients_can_trust_the_self_signed_certificate(tmp_path: Path) -> None:
    import ssl
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    secrets.make_missing(tmp_path)
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    try:
        url = f"https://localhost:{server.server_port}/"
        assert requests.get(url, verify=str(tmp_path / "tls.crt"), timeout=10).status_code == 501
    finally:
        thread.join()
        server.server_close()


def test_a_server_does_not_start_on_an_older_schema_and_says_what_to_do(
    blank_store: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(blank_store, tmp_path / "mlflow.db"))
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute(
            "UPDATE alembic_version SET version_num = '451aebb31d03'"
        )  # the first schema
        connection.commit()
    command = ["-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{file}", "--workers=1"]
    result = subprocess.run(
        [sys.executable, *command, f"--port={free_port()}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert result.returncode
    assert "out-of-date database schema" in result.stderr
    assert "mlflow db upgrade" in result.stderr


def test_upgrading_an_older_schema_keeps_all_data(postgres: str) -> None:
    """The command of the compose file's `upgrade`, on a database of an MLflow of 2023."""
    import sqlalchemy
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    url = create_database(postgres, "older_schema")
    engine = sqlalchemy.create_engine(url)
    Base.metadata.create_all(engine)
    command.upgrade(_get_alembic_config(url), OLD_SCHEMA)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(OLD_ROWS))
    engine.dispose()
    upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", url]
    subprocess.run(upgrade, check=True, timeout=WAIT_S)
    client = MlflowClient(url)
    run = client.get_run("a" * 32)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.metrics == {"f1": 0.95}
    assert [m.value for m in client.get_metric_history("a" * 32, "f1")] == [0.9, 0.95]
    assert int(client.get_model_version_by_alias("eurosat", "champion").version) == 3
    client.log_metric("a" * 32, "f1", 0.96, step=2)
