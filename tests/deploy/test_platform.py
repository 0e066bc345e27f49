"""`make platform`: PostgreSQL, an object store, MLflow, the promoter and serving, on loopback."""

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

import pytest
import requests
from mlflow import MlflowClient

from deploy import postgresql, secrets
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
"""Of MLflow 2.9, of 2023."""
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
    """Of the one whose log says where it listens, by the port in its command."""
    port = {"promoter": "EUROSAT_PROMOTER_URL", "serving": "EUROSAT_SERVING_URL"}[service]
    flag = f"--port={platform.env[port].rpartition(':')[2]}"
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                told = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if flag.encode() in told:
                return int(process.name)
    raise AssertionError(f"no {service} runs")


def test_the_addresses_are_written_for_the_owner_only(platform: Platform) -> None:
    assert stat.S_IMODE((platform.folder / "env").stat().st_mode) == 0o600
    assert stat.S_IMODE((platform.folder / "secrets").stat().st_mode) == 0o700
    for name in ("MLFLOW_TRACKING_URI", "EUROSAT_SERVING_URL", "EUROSAT_PROMOTER_URL"):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", platform.env[name]), name


def test_nobody_gets_in_without_a_password(platform: Platform) -> None:
    for who in (("admin", "wrong but long enough"), ("nobody", "nobody"), ("", "")):
        assert platform.status(who, "GET", "experiments/get", experiment_id="0") == 401


def test_the_database_requires_a_password(platform: Platform) -> None:
    import psycopg2

    told = platform.env["EUROSAT_DATABASE_URI"].replace("+psycopg2", "")
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(told, password="wrong")


CREATE_RUN = ("POST", "runs/create", {"experiment_id": "0"})
MODEL = {"name": "eurosat"}
VERSION = MODEL | {"version": "1"}
CREATE = MODEL | {"source": "runs:/x/y"}
PROMPT = {"key": "mlflow.prompt.other", "value": "true"}
MINE = {"tags": [{"key": "approval", "value": "{}"}]}
ALL, WRITERS, PROMOTERS, NOBODY = (
    (True,) * 3,
    (False, True, True),
    (False, False, True),
    (False,) * 3,
)


@pytest.mark.parametrize(
    ("method", "path", "told", "may"),
    [
        ("GET", "registered-models/get", MODEL, ALL),
        (*CREATE_RUN, WRITERS),
        ("POST", "registered-models/alias", VERSION | {"alias": "champion"}, PROMOTERS),
        ("DELETE", "registered-models/alias", MODEL | {"alias": "champion"}, PROMOTERS),
        ("POST", "model-versions/set-tag", VERSION | {"key": "approval", "value": "{}"}, PROMOTERS),
        ("POST", "model-versions/create", CREATE | MINE, PROMOTERS),
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
    platform: Platform, method: str, path: str, told: dict[str, object], may: tuple[bool, ...]
) -> None:
    for role, allowed in zip(("reader", "writer", "promoter"), may, strict=True):
        status = platform.status(platform.user(role), method, path, **told)
        assert (status != 403) is allowed, f"{role}: {status}"
        assert status != 401


@pytest.mark.parametrize(
    "body",
    [
        b'"{\\"name\\": \\"eurosat\\", \\"source\\": \\"runs:/x/y\\",'
        b' \\"tags\\": [{\\"key\\": \\"approval\\", \\"value\\": \\"{}\\"}]}"',  # as old clients
        b'{"name": "eurosat", "source": "s", "tags": [{"key": "appro\\u0076al", "value": "{}"}]}',
        b'{"name": "eurosat.ledger", "source": "s"}',
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", ""])
@pytest.mark.parametrize("prefix", ["api", "ajax-api"])
def test_a_writer_cannot_forge_tags_or_the_ledger_in_any_request_format(
    platform: Platform, body: bytes, kind: str, prefix: str
) -> None:
    answer = requests.post(
        f"{platform.url}/{prefix}/2.0/mlflow/model-versions/create",
        body,
        auth=platform.user("writer"),
        headers={"Content-Type": kind},
        timeout=30,
    )
    assert answer.status_code == 403
    assert "promoter" in answer.text


def test_a_user_without_a_role_sees_nothing(platform: Platform) -> None:
    platform.administrator().request(
        "POST", "2.0/mlflow/users/create", username="nobody", password=platforms.PASSWORD
    )
    who = ("nobody", platforms.PASSWORD)
    assert platform.status(who, "GET", "registered-models/get", name="eurosat") == 403
    assert platform.status(who, *CREATE_RUN[:2], experiment_id="0") == 403


def test_a_new_role_replaces_the_old_one(platform: Platform) -> None:
    who = ("changing", platforms.PASSWORD)
    call = ("POST", "registered-models/alias")
    told = {"name": "eurosat", "alias": "champion", "version": "1"}
    for role, may in (("promoter", True), ("writer", False), ("promoter", True)):
        platform.administrator().add(*who[:1], role, who[1])
        assert platform.administrator().roles_by_user()["changing"] == role
        assert (platform.status(who, *call, **told) != 403) is may


def test_what_a_writer_registers_is_judged_promoted_and_served(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    platform.log_in(monkeypatch, platform.user("writer"))
    number = register.register(make_run(tmp_path), "eurosat", "challenger")
    client = MlflowClient()
    serving = platform.env["EUROSAT_SERVING_URL"]

    def served() -> bool:
        answer = requests.post(
            f"{serving}/predict",
            encoded("River", "JPEG"),
            headers={"Content-Type": "image/jpeg"},
            timeout=10,
        )
        return answer.ok and answer.json()["model_version"] == number

    until(served, WAIT_S, "serving answers with what was registered")
    assert client.get_model_version_by_alias("eurosat", "champion").version == number
    entry = client.search_model_versions("name = 'eurosat.ledger'")
    assert entry, "the promotion stands in the ledger"


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
    told = {one["name"]: one["verdict"] for one in checks}
    wanted = [
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
        wanted += ["run and metric", "artifact", "removal"]
    if role == "administrator":
        wanted += ["model version", "webhook"]
    assert [name for name in wanted if told[name] != "ok"] == [], checks
    for kind in ("experiments", "registered-models"):
        found = platform.administrator().request(
            "GET", f"2.0/mlflow/{kind}/search", max_results=1000, filter="name LIKE 'doctor-%'"
        )
        assert found == {}, "something was left behind"


def test_a_killed_service_is_restarted(platform: Platform) -> None:
    before = pid_of(platform, "promoter")
    os.kill(before, signal.SIGKILL)
    health = f"{platform.env['EUROSAT_PROMOTER_URL']}/health"

    def again() -> bool:
        try:
            return requests.get(health, timeout=5).ok
        except requests.ConnectionError:
            return False

    until(lambda: not again(), WAIT_S, "it is gone")
    until(again, WAIT_S, "it is back")
    assert pid_of(platform, "promoter") != before


def test_a_second_start_reports_that_the_platform_is_up(platform: Platform) -> None:
    done = platforms.platform_command("up", platform.folder, "--free-ports")
    assert done.returncode == 0
    assert "up already" in done.stderr


def test_a_port_that_is_taken_is_named(platform: Platform) -> None:
    with platforms.platform_folder() as folder:
        taken = platform.url.rpartition(":")[2]
        done = platforms.platform_command("up", folder, "--free-ports", f"--mlflow-port={taken}")
        assert done.returncode == 2
        assert f"port {taken} of 127.0.0.1 is taken: give --mlflow-port" in done.stderr
        assert not (folder / "env").exists()
        assert not platforms.remaining_processes(folder)


def test_stopping_or_killing_it_leaves_no_process_and_loses_no_data() -> None:
    with platforms.platform_folder() as folder:
        platform = platforms.start_platform(folder)
        who = platform.user("writer")
        assert platform.status(who, "POST", "experiments/create", name="kept") == 200
        assert platforms.platform_command("down", folder).returncode == 0
        assert not (folder / "env").exists()
        assert not platforms.remaining_processes(folder)

        platform = platforms.start_platform(folder)
        who = ("a-writer", platforms.PASSWORD)
        kept = ("GET", "experiments/get-by-name")
        assert platform.status(who, *kept, experiment_name="kept") == 200
        os.kill(platform.pid, signal.SIGKILL)
        until(lambda: not platforms.remaining_processes(folder), WAIT_S, "its services end with it")

        platform = platforms.start_platform(folder)
        assert platform.status(who, *kept, experiment_name="kept") == 200


def test_secrets_are_generated_once(tmp_path: Path) -> None:
    made = secrets.make_missing(tmp_path / "s")
    assert {"postgres_password", "webhook_key", "tls.key", "tls.crt"} <= set(made)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    assert len(set(before.values())) == len(before)
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
    with contextlib.closing(sqlite3.connect(file)) as opened:
        opened.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")  # of the first
        opened.commit()
    command = ["-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{file}", "--workers=1"]
    done = subprocess.run(
        [sys.executable, *command, f"--port={free_port()}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode
    assert "out-of-date database schema" in done.stderr
    assert "mlflow db upgrade" in done.stderr


def test_upgrading_an_older_schema_keeps_all_data(postgres: str) -> None:
    """What the compose file's `upgrade` runs, on a database as an MLflow of 2023 left it."""
    import sqlalchemy
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    url = create_database(postgres, "older_schema")
    engine = sqlalchemy.create_engine(url)
    Base.metadata.create_all(engine)
    command.upgrade(_get_alembic_config(url), OLD_SCHEMA)
    with engine.begin() as opened:
        opened.execute(sqlalchemy.text(OLD_ROWS))
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
