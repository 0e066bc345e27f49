"""Secrets that a restored database does not know, and secrets that are generated anew."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from deploy import backup, databases, postgresql, rotate, secrets
from deploy.databases import DATABASE_SPECS, Database
from eurosat.runtime import exit_codes
from tests.support import platforms
from tests.support.commands import fails, last_error
from tests.support.paths import ROOT
from tests.support.platforms import Platform
from tests.support.postgres import create_database
from tests.support.registry import MLFLOW_WARNS

pytestmark = [
    *MLFLOW_WARNS,
    pytest.mark.postgres,
    pytest.mark.skipif(
        postgresql.find_program("initdb") is None, reason="PostgreSQL is not installed: no platform"
    ),
]
TABLES = """
CREATE TABLE users (username text, password_hash text);
CREATE TABLE webhooks (webhook_id text, name text, secret text, deleted_timestamp bigint);
CREATE TABLE webhook_events (webhook_id text, action text);
"""


@pytest.fixture
def restored(postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A database with the administrator and a webhook of another platform, and fresh secrets."""
    from werkzeug.security import generate_password_hash

    secrets.make_missing(tmp_path)
    name = f"secrets_{os.getpid()}_{abs(hash(tmp_path))}"
    uri = create_database(postgres, name).replace("+psycopg2", "")
    database = Database(spec=DATABASE_SPECS[0], uri=uri, password=None)
    other_key = Fernet(Fernet.generate_key()).encrypt(b"signing key").decode()
    own_key = Fernet(secrets.read("webhook_key", tmp_path)).encrypt(b"signing key").decode()
    with database.connected() as connection, connection, connection.cursor() as cursor:
        cursor.execute(TABLES)
        hashed = generate_password_hash("password of the other platform")
        cursor.execute("INSERT INTO users VALUES ('admin', %s), ('ada', %s)", (hashed, hashed))
        for name, key in (("promoter", other_key), ("chat", own_key)):
            cursor.execute("INSERT INTO webhooks VALUES (%s, %s, %s)", (name, name, key))
            cursor.execute("INSERT INTO webhook_events VALUES (%s, 'created')", (name,))
    monkeypatch.setenv("EUROSAT_DATABASE_URI", uri)
    monkeypatch.setenv("EUROSAT_SECRETS", str(tmp_path))
    return database


def test_secrets_that_a_restored_database_does_not_know_are_named_and_can_be_used(
    restored: Database,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    configured = databases.from_environment(os.environ)
    backup._warn_of_other_secrets(configured)
    (record,) = caplog.records
    assert "another admin_password and webhook_key" in record.message
    assert "`python -m deploy.backup use-secrets`" in record.message
    assert backup.main(["use-secrets"]) == exit_codes.OK
    assert capsys.readouterr().out.splitlines() == [
        f"admin has the password of {tmp_path / 'admin_password'}",
        "the webhook promoter is deleted: its signing key cannot be read",
    ]
    caplog.clear()
    backup._warn_of_other_secrets(configured)
    assert not caplog.records
    assert backup.main(["use-secrets"]) == exit_codes.OK
    assert capsys.readouterr().out == "nothing to change\n"
    with restored.connected() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT webhook_id FROM webhook_events")
        assert cursor.fetchall() == [("chat",)]


def test_a_rotated_secret_is_new_and_the_database_accepts_it(
    restored: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("admin_password", "webhook_secret", "tls.crt"):
        before = (tmp_path / name).read_bytes()
        assert rotate.main([name]) == exit_codes.OK
        assert (tmp_path / name).read_bytes() != before
        out = capsys.readouterr().out
        assert "make platform-down && make platform" in out
        assert (name == "admin_password") == ("admin has the password" in out)


def test_without_the_database_the_commands_of_docker_compose_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EUROSAT_DATABASE_URI", raising=False)
    assert rotate.main([f"--folder={tmp_path}", "admin_password"]) == exit_codes.OK
    lines = [line.strip() for line in capfd.readouterr().out.splitlines()]
    assert lines[1:] == [
        "docker compose run --rm backup use-secrets",
        "docker compose up --wait --force-recreate",
    ]
    for name in rotate.ISSUED_ELSEWHERE:
        assert fails(rotate.main, name) == exit_codes.BAD_INPUT
        assert "is no secret that is generated" in last_error(capfd)


def command(*arguments: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_backup_starts_on_a_fresh_machine_after_use_secrets(platform: Platform) -> None:
    administrator = platform.administrator()
    administrator.add("before", "writer", platforms.PASSWORD)
    with platforms.platform_folder() as folder:
        saved = command("deploy.backup", "save", "--to", str(folder / "saved"), env=platform.env)
        assert saved.returncode == 0, saved.stderr
        only = platforms.start_platform(folder, "--only=postgres,store")
        arguments = ("deploy.backup", "restore", "--from", saved.stdout.strip())
        assert "another backup_key" in command(*arguments, env=only.env).stderr
        shutil.copy(platform.folder / "secrets/backup_key", folder / "secrets")
        restored = command(*arguments, env=only.env)
        assert restored.returncode == 0, restored.stderr
        assert "saved with another admin_password and webhook_key" in restored.stderr
        assert platforms.platform_command("down", folder).returncode == 0

        result = platforms.platform_command("up", folder, "--free-ports")
        assert result.returncode == 2
        assert "deploy.backup use-secrets" in result.stderr

        only = platforms.start_platform(folder, "--only=postgres,store")
        assert command("deploy.backup", "use-secrets", env=only.env).returncode == 0
        rotated = command("deploy.rotate", "postgres_password", env=only.env)
        assert rotated.returncode == 0, rotated.stderr
        assert platforms.platform_command("down", folder).returncode == 0
        fresh = platforms.start_platform(folder)
        login = ("before", platforms.PASSWORD)
        assert fresh.status(login, "GET", "registered-models/get", name="eurosat") == 200
        hooks = fresh.administrator().request("GET", "2.0/mlflow/webhooks") or {}
        assert [hook["name"] for hook in hooks["webhooks"]] == ["eurosat-registry"]
