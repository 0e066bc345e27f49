"""Backup and restore with a real server, database and object store; damaged archives."""

import contextlib
import hashlib
import hmac
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.oauth2.service_account import Credentials
from mlflow import MlflowClient
from mlflow.entities import Run

from deploy import archive, backup, databases, dumps, save, schema, secrets, transfer
from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import exit_codes
from eurosat.storage import GcsStore, ObjectChanged, ObjectStore
from registry import ledger
from tests.support.http_server import listening
from tests.support.mlflow_server import mlflow_server
from tests.support.object_stores import fake_gcs_server
from tests.support.paths import ROOT
from tests.support.postgres import create_database
from tests.support.registry import MLFLOW_WARNS, exit_code, register_challenger, run_promote
from tests.support.serving import until

if TYPE_CHECKING:
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore as UserStore

MODEL = "mapper"
USER, PASSWORD = "cartographer", "correct-horse-battery"
KEY = b"the key that seals this platform's archives"
pytestmark = [*MLFLOW_WARNS]


# Archives.


@pytest.fixture(scope="module", autouse=True)
def platform_secrets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("secrets")
    secrets.make_missing(folder)
    secrets.write(backup.SEAL_KEY, KEY, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backup.SECRETS, str(folder))
        yield


def written(*contents: bytes, key: bytes = KEY) -> bytes:
    out = io.BytesIO()
    writer = archive.Writer(out, key)
    for number, content in enumerate(contents):
        writer.add(f"artifacts/{number}", io.BytesIO(content), len(content))
    writer.finish({"databases": {}})
    return out.getvalue()


def verified(data: bytes, key: bytes | None = KEY) -> archive.Manifest:
    return archive.verify(io.BytesIO(data), len(data), key)


def resealed(data: bytes, key: bytes | None = KEY) -> bytes:
    """Replace the seal by one that fits the data; without a key by that of the first format."""
    body = data[: -archive.TAIL_BYTES]
    digest = hmac.new(key, body, hashlib.sha256) if key else hashlib.sha256(body)
    return body + archive._tail(digest.hexdigest())


def in_the_first_format(data: bytes) -> bytes:
    first, second = archive.FORMAT_WITHOUT_KEY.encode(), archive.FORMAT.encode()
    return resealed(data.replace(second, first), key=None)


def test_an_archive_is_a_tar_whose_manifest_has_the_checksums() -> None:
    data = written(b"one", b"", b"x" * 3_000_000)
    manifest = verified(data)
    assert [member.size for member in manifest.members] == [3, 0, 3_000_000]
    assert manifest.members[0].sha256 == hashlib.sha256(b"one").hexdigest()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames()[-2:] == [archive.MANIFEST, archive.SEAL]


def test_every_changed_byte_and_every_cut_is_refused() -> None:
    data = written(b"one", b"another")
    assert verified(data)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(archive.ArchiveError):
            verified(bytes(changed))
    for length in range(0, len(data), 97):
        with pytest.raises(archive.ArchiveError):
            verified(data[:length])
    with pytest.raises(archive.ArchiveError):
        verified(data + b"\0")


def test_an_archive_that_somebody_else_sealed_is_refused() -> None:
    for forged in (
        resealed(written(b"theirs"), key=None),
        resealed(written(b"theirs"), key=b"theirs"),
        written(b"theirs", key=b"theirs"),
        in_the_first_format(written(b"theirs")),
    ):
        with pytest.raises(archive.ArchiveError, match="sealed with another backup_key"):
            verified(forged)


def test_an_archive_without_a_key_is_accepted_on_request_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.tar", tmp_path / "new.tar"
    new.write_bytes(written(b"one"))
    old.write_bytes(in_the_first_format(new.read_bytes()))
    assert verified(old.read_bytes(), key=None).members == verified(new.read_bytes()).members
    assert exit_code(backup.main, "verify", str(old)) == exit_codes.BAD_INPUT
    assert "--without-key" in capsys.readouterr().err
    assert exit_code(backup.main, "verify", str(new), "--without-key") == exit_codes.BAD_INPUT
    assert "leave out --without-key" in capsys.readouterr().err
    monkeypatch.delenv(backup.SECRETS)
    assert exit_code(backup.main, "verify", str(new)) == exit_codes.BAD_INPUT
    assert f"{backup.SECRETS} is not set" in capsys.readouterr().err


def member(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd" if kind != tarfile.REGTYPE else ""
    return info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (member("artifacts/more"), "not those of its manifest"),
        (member("artifacts/0"), "not those of its manifest"),
        (member("../up"), "no file below a folder"),
        (member("/etc/cron.d/x"), "no file below a folder"),
        (member("artifacts/a/../../../up"), "no file below a folder"),
        (member("artifacts/link", tarfile.SYMTYPE), "no file below a folder"),
        (member("artifacts/link", tarfile.LNKTYPE), "no file below a folder"),
        (member("artifacts/device", tarfile.CHRTYPE), "no file below a folder"),
    ],
)
def test_an_added_member_is_refused_even_with_a_new_seal(added: bytes, message: str) -> None:
    with pytest.raises(archive.ArchiveError, match=message):
        verified(resealed(added + written(b"one")))


def test_a_name_that_cannot_be_unpacked_safely_is_not_archived() -> None:
    for name in ("../x", "/x", "a//b", "a/./b", "a/\0", "é" * 600, "\udcff"):
        with pytest.raises(archive.ArchiveError, match="cannot be unpacked safely"):
            archive.Writer(io.BytesIO(), KEY).add(name, io.BytesIO(b""), 0)
    long = "artifacts/" + "é" * 150
    writer = archive.Writer(out := io.BytesIO(), KEY)
    writer.add(long, io.BytesIO(b"x"), 1)
    writer.finish({})
    assert verified(out.getvalue()).members[0].name == long


# Settings.


def test_a_password_is_removed_from_the_uri_that_programs_get() -> None:
    uri = "postgresql+psycopg2://mlflow:s%2Fcret@db:5433/mlflow?sslmode=require"
    (database,) = databases.from_environment({"EUROSAT_DATABASE_URI": uri})
    assert database.uri == "postgresql://mlflow@db:5433/mlflow?sslmode=require"
    assert database.environment()["PGPASSWORD"] == "s/cret"
    assert database.renamed("other").uri == "postgresql://mlflow@db:5433/other?sslmode=require"


def test_a_database_that_is_configured_twice_is_saved_once() -> None:
    uri = "postgresql://mlflow@db/mlflow"
    both = {"EUROSAT_DATABASE_URI": uri, "EUROSAT_AUTH_DATABASE_URI": uri}
    assert len(databases.from_environment(both)) == 1


@pytest.mark.parametrize("uri", ["", "sqlite:///mlflow.db", "postgresql://user:word@host"])
def test_a_uri_that_is_not_of_postgresql_is_refused_in_one_line(uri: str) -> None:
    with pytest.raises(ConfigError, match="postgresql://user@host/database") as raised:
        databases.from_environment({"EUROSAT_DATABASE_URI": uri})
    assert "word" not in str(raised.value)


def test_a_program_older_than_the_server_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="pg_dump .*apt-get install postgresql-client-99"):
        dumps.find_program("pg_dump", 99, "mlflow is served by PostgreSQL 99")


def test_a_schema_is_older_if_migrations_start_from_it() -> None:
    spec = databases.DATABASE_SPECS[0]
    previous = schema.previous_revisions(spec)
    first = next(revision for revision, before in previous.items() if before is None)
    (newest,) = {*previous} - {*previous.values()}
    assert schema.can_upgrade(spec, newest, first)
    assert not schema.can_upgrade(spec, first, newest)
    assert schema.can_upgrade(spec, None, newest)
    assert not schema.can_upgrade(spec, None, "f" * 12)


def test_the_command_imports_no_heavy_package() -> None:
    heavy = "{'torch', 'mlflow', 'google.cloud', 'numpy', 'pandas'}"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys, deploy.backup; print({heavy} & {{*sys.modules}})"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "set()"


# The platform.


@dataclass(frozen=True)
class Platform:
    """The two databases and the bucket of a platform."""

    name: str
    postgres: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "EUROSAT_DATABASE_URI": f"{self.postgres}/{self.name}",
            "EUROSAT_AUTH_DATABASE_URI": f"{self.postgres}/{self.name}_auth",
            "EUROSAT_ARTIFACTS": f"gs://{self.name}/artifacts",
        }

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        folder = self.folder / self.name
        folder.mkdir()
        backend, artifacts = (
            self.environment[name] for name in ("EUROSAT_DATABASE_URI", "EUROSAT_ARTIFACTS")
        )
        with mlflow_server(folder, backend, f"--artifacts-destination={artifacts}") as port:
            yield f"http://127.0.0.1:{port}"

    @contextlib.contextmanager
    def users(self) -> "Iterator[UserStore]":
        """Yield MLflow's store of users, as its server with basic auth uses it."""
        with warnings.catch_warnings(action="ignore"):  # MLflow's server warns of newer libraries
            from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

            store = SqlAlchemyStore()
            store.init_db(self.environment["EUROSAT_AUTH_DATABASE_URI"])
        try:
            yield store
        finally:
            store.engine.dispose()

    def databases(self) -> list[databases.Database]:
        return databases.from_environment(self.environment)

    def artifacts(self) -> ObjectStore:
        return transfer.open_checked(self.environment["EUROSAT_ARTIFACTS"], "EUROSAT_ARTIFACTS")

    def objects(self) -> dict[str, str]:
        """Return the checksum of every object of the bucket, by name."""
        from google.cloud.storage import Client

        return {blob.name: blob.crc32c for blob in Client().list_blobs(self.name)}

    def query(self, query: str, database: str | None = None) -> list[Any]:
        with self.databases()[0].renamed(database or self.name).connected() as opened:
            cursor = opened.cursor()
            cursor.execute(query)
            return list(cursor.fetchall())

    def every_database(self) -> set[str]:
        return {name for (name,) in self.query("SELECT datname FROM pg_database", "postgres")}


@pytest.fixture(scope="module")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("platform")
    with fake_gcs_server(folder / "gcs") as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield folder


def platform(name: str, postgres: str, folder: Path) -> Platform:
    from google.cloud.storage import Client

    Client().create_bucket(name)
    create_database(postgres, name)
    create_database(postgres, f"{name}_auth")
    return Platform(name, postgres, folder)


@dataclass(frozen=True)
class Saved:
    source: Platform
    url: str
    file: Path
    steps_before: int
    """Steps that the writer had logged when the backup began."""
    writer: str
    """Id of the writer's run."""


def content(step: int) -> str:
    return f"state of step {step}\n" * 200


def write_on(run_id: str, steps: list[int], stop: threading.Event, folder: Path) -> None:
    """Log an artifact and then a point per step, and overwrite one artifact in every step."""
    client, step = MlflowClient(), 0
    while not stop.is_set():
        client.log_text(run_id, content(step), f"states/{step}.txt")
        client.log_text(run_id, content(step), "last.txt")
        client.log_metric(run_id, "step", step, step=step)
        steps.append(step)
        step += 1


@pytest.fixture(scope="module")
def saved(postgres: str, server_folder: Path) -> Iterator[Saved]:
    """A platform in use, and a backup that was saved while a run was being written."""
    source = platform("first", postgres, server_folder)
    with source.served() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {**source.environment, "MLFLOW_TRACKING_URI": url}.items():
            patch.setenv(name, value)
        with source.users() as users:
            users.create_user("admin", "a password of before", is_admin=True)
            users.create_user(USER, PASSWORD)
        client = MlflowClient()
        scratch = server_folder / "scratch"
        scratch.mkdir()
        register_challenger(scratch, MODEL, 30)
        assert run_promote(MODEL, "--why", "the first") == exit_codes.OK
        register_challenger(scratch, MODEL, 20)
        assert run_promote(MODEL, "--why", "better") == exit_codes.OK
        experiment = client.create_experiment("points", tags={"team": "maps"})
        for number in range(3):
            run_id = client.create_run(experiment, run_name=f"run {number}").info.run_id
            client.log_param(run_id, "lr", 0.1 * number)
            for step in range(20):
                client.log_metric(run_id, "loss", 1 / (step + 1), step=step, timestamp=step)
            client.log_metric(run_id, "nan", float("nan"))
            client.log_text(run_id, f"{number}", "a folder/ä name.txt")
            client.set_terminated(run_id, "FAILED" if number else "FINISHED")
        large = scratch / "large.bin"
        large.write_bytes(os.urandom(12 << 20))
        client.log_artifact(run_id, str(large))
        writer = client.create_run(experiment, run_name="goes on").info.run_id
        steps: list[int] = []
        stop = threading.Event()
        thread = threading.Thread(target=write_on, args=(writer, steps, stop, scratch))
        thread.start()
        try:
            until(lambda: len(steps) > 5, 60, "a run that is written")
            before = len(steps)
            assert (
                exit_code(backup.main, "save", "--to", str(server_folder / "kept")) == exit_codes.OK
            )
            until(lambda: len(steps) > before + 1, 60, "a run that goes on")
        finally:
            stop.set()
            thread.join()
        (file,) = (server_folder / "kept").iterdir()
        yield Saved(source, url, file, before, writer)


def every_run(client: MlflowClient) -> dict[str, Run]:
    experiments = [found.experiment_id for found in client.search_experiments()]
    return {run.info.run_id: run for run in client.search_runs(experiments)}


def as_json(run: Run) -> str:
    return json.dumps(run.to_dictionary(), sort_keys=True)  # in JSON, NaN equals itself


def points(client: MlflowClient, run: Run) -> set[tuple[Any, ...]]:
    return {
        (point.key, str(point.value), point.timestamp, point.step)
        for key in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, key)
    }


def checksums(client: MlflowClient, run_id: str, folder: Path) -> dict[str, str]:
    """Download every artifact of a run; return the sha256 by path."""
    folder.mkdir()
    client.download_artifacts(run_id, "", str(folder))
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.postgres
def test_a_restored_platform_equals_the_saved_one(saved: Saved, tmp_path: Path) -> None:
    source = saved.source
    second = platform("second", source.postgres, source.folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in second.environment.items():
            patch.setenv(name, value)
        assert exit_code(backup.main, "restore", "--from", str(saved.file)) == exit_codes.OK
    assert not [name for name in second.objects() if not name.startswith("artifacts/")]
    assert not {name for name in second.every_database() if name.startswith("second_")} - {
        "second_auth"
    }
    with second.users() as users:
        assert users.authenticate_user(USER, PASSWORD)
        assert [user.is_admin for user in users.list_users()] == [True, False]
    with second.served() as url:
        old, new = MlflowClient(saved.url), MlflowClient(url)
        runs, restored = every_run(old), every_run(new)
        assert restored.keys() == runs.keys()
        for run_id, run in restored.items():
            if run_id == saved.writer:
                continue
            assert as_json(run) == as_json(runs[run_id])
            assert points(new, run) == points(old, runs[run_id])
            downloaded = checksums(new, run_id, tmp_path / f"new-{run_id}")
            assert downloaded == checksums(old, run_id, tmp_path / f"old-{run_id}")
            assert downloaded
        written = restored[saved.writer]
        steps = sorted(step for _, _, _, step in points(new, written))
        assert steps == list(range(len(steps)))
        assert len(steps) >= saved.steps_before, "what was logged before the backup is in it"
        assert points(new, written) <= points(old, runs[saved.writer])
        downloaded = checksums(new, saved.writer, tmp_path / saved.writer)
        for step in steps:
            expected = hashlib.sha256(content(step).encode()).hexdigest()
            assert downloaded[f"states/{step}.txt"] == expected
        assert downloaded["last.txt"] in {
            hashlib.sha256(content(step).encode()).hexdigest() for step in range(10_000)
        }, "it is the content of one step"
        for name in (MODEL, ledger.ledger_name(MODEL)):
            model, again = old.get_registered_model(name), new.get_registered_model(name)
            assert again.aliases == model.aliases
            assert again.tags == model.tags
            versions = [
                sorted(
                    (
                        str(version.version),
                        version.run_id,
                        version.source,
                        sorted(version.tags.items()),
                    )
                    for version in client.search_model_versions(f"name='{name}'")
                )
                for client in (old, new)
            ]
            assert versions[0] == versions[1]
        assert new.get_registered_model(MODEL).aliases, "the comparison is not empty"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", saved.url)
            entries = ledger.entries(MODEL)
            patch.setenv("MLFLOW_TRACKING_URI", url)
            assert ledger.entries(MODEL) == entries
        assert len(entries) == 2


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def with_schema(file: Path, revision: str) -> bytes:
    """Return the archive with another schema of MLflow in its manifest."""
    manifest = verified(file.read_bytes())
    manifest.metadata["databases"]["mlflow"]["schema"] = revision
    writer = archive.Writer(out := io.BytesIO(), KEY)
    with tarfile.open(file) as tar:
        for member in manifest.members:
            content = tar.extractfile(member.name)
            assert content
            writer.add(member.name, content, member.size)
    writer.finish(manifest.metadata)
    return out.getvalue()


@pytest.mark.postgres
def test_a_damaged_archive_is_refused_before_anything_is_touched(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = platform("third", saved.source.postgres, saved.source.folder)
    databases_before = target.every_database()
    data = saved.file.read_bytes()
    with tarfile.open(saved.file) as tar:
        (manifest,) = (member for member in tar if member.name == archive.MANIFEST)
    file = tmp_path / "eurosat.tar"
    added = tmp_path / "added.tar"
    added.write_bytes(data)
    with tarfile.open(added, "a") as tar:
        tar.addfile(tarfile.TarInfo("artifacts/more"))
    cases = [
        *(data[: int(len(data) * share)] for share in (0, 0.3, 0.9)),
        *(data[:-cut] for cut in (1, 1024, archive.TAIL_BYTES)),
        *(changed(data, int(len(data) * share)) for share in (0, 0.001, 0.2, 0.6)),
        *(changed(data, manifest.offset_data + at) for at in (5, manifest.size // 2)),
        changed(data, len(data) - archive.TAIL_BYTES + 520),
        changed(data, len(data) - 1),
        added.read_bytes(),
        with_schema(saved.file, "f" * 12),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in target.environment.items():
            patch.setenv(name, value)
        for case in cases:
            file.write_bytes(case)
            assert exit_code(backup.main, "restore", "--from", str(file), "--replace") == 2
            (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
            assert "archive" in line
    assert "with the MLflow that it was saved from, or a newer one" in line, "the last of them"
    assert target.every_database() == databases_before
    assert not target.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert not target.objects()


@contextlib.contextmanager
def command(*arguments: str, environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.postgres
def test_a_killed_backup_leaves_no_file_that_looks_complete(saved: Saved, tmp_path: Path) -> None:
    with command(
        "-m", "deploy.backup", "save", "--to", str(tmp_path), environment=saved.source.environment
    ) as process:
        until(
            lambda: sum(file.stat().st_size for file in tmp_path.iterdir()) > 1 << 20,
            60,
            "a backup that is being written",
        )
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    assert not list(tmp_path.glob("*.tar")), (
        "not even a hidden one, which pathlib's star matches too"
    )
    (unfinished,) = tmp_path.iterdir()
    assert unfinished.name.startswith(".")
    assert exit_code(backup.main, "verify", str(unfinished)) == exit_codes.BAD_INPUT
    os.utime(unfinished, (0, 0))
    assert exit_code(backup.main, "save", "--to", str(tmp_path)) == exit_codes.OK
    (complete,) = tmp_path.iterdir()
    assert complete.suffix == ".tar"
    assert complete.stat().st_mode & 0o077 == 0, "it holds hashes of passwords"


@pytest.mark.postgres
def test_a_bucket_gets_a_complete_archive_or_none(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    from google.cloud.storage import Client

    bucket = Client().create_bucket("backups")
    killed = (
        "import os; from deploy import archive, backup; from eurosat.runtime import cli;"
        "archive.Writer.finish = lambda *_: os.kill(os.getpid(), 9);"
        "cli.run_command(backup.main)"
    )
    arguments = ("save", "--to", "gs://backups/daily")
    with command("-c", killed, *arguments, environment=saved.source.environment) as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert not list(bucket.list_blobs()), "12 MB had been sent"
    assert exit_code(backup.main, *arguments) == exit_codes.OK
    output = capsys.readouterr()
    assert "an account of its own" in output.err
    address = output.out.split()[-1]
    (blob,) = bucket.list_blobs()
    assert address == f"gs://backups/{blob.name}"
    assert exit_code(backup.main, "verify", address) == exit_codes.OK
    data = blob.download_as_bytes()
    assert verified(data).seal
    bucket.blob(blob.name).upload_from_string(changed(data, len(data) // 2))
    assert exit_code(backup.main, "verify", address) == exit_codes.BAD_INPUT


KILLED_AT = {
    "with one database restored": "dumps.restore = dies_after(dumps.restore)",
    "with everything restored beside": "restore.Restore._swap_artifacts = dies",
    "with the artifacts copied into place": "databases.swap = dies",
    "after the swap": "restore.Restore.clean_up = dies",
}
"""Point at which a restore is killed, and the code that kills it there."""
DYING = """
import os
from deploy import backup, databases, dumps, restore
from eurosat.runtime import cli
def dies(*_):
    os.kill(os.getpid(), 9)
def dies_after(work):
    return lambda *args: (work(*args), dies())
exec(%r)
cli.run_command(backup.main)
"""


@pytest.mark.postgres
@pytest.mark.parametrize(
    "points",
    [[*KILLED_AT][2:], pytest.param([*KILLED_AT], marks=pytest.mark.slow)],
    ids=["late", "everywhere"],
)
def test_a_restore_that_is_killed_at_any_point_completes_when_run_again(
    saved: Saved, points: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.tar"
    target = platform(f"fourth{len(points)}", saved.source.postgres, saved.source.folder)
    arguments = ("restore", "--from", str(saved.file))
    manifest = verified(saved.file.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in target.environment.items():
            patch.setenv(name, value)
        dying = DYING % "databases.swap = dies"
        with command("-c", dying, *arguments, environment={}) as process:
            assert process.wait(timeout=60) == -signal.SIGKILL
        assert target.objects(), "the empty bucket was being filled"
        assert exit_code(backup.main, *arguments) == exit_codes.OK, "and may be filled again"
        target.artifacts().write("1/new/artifacts/present.txt", io.BytesIO(b"new"))
        first = manifest.below(archive.ARTIFACTS)[0].name
        target.artifacts().write(first.removeprefix("artifacts/"), io.BytesIO(b"changed"))
        with target.databases()[0].connected() as opened:
            opened.cursor().execute("UPDATE runs SET name = 'present'")
            opened.commit()
        now = target.objects()
        assert exit_code(backup.main, *arguments) == exit_codes.BAD_INPUT
        assert "--replace" in capsys.readouterr().err
        assert target.objects() == now
        replacing = (*arguments, "--replace")
        with target.databases()[0].connected():
            assert exit_code(backup.main, *replacing) == exit_codes.BAD_INPUT
            assert "stop the MLflow server" in capsys.readouterr().err
        for point in points:
            with command("-c", DYING % KILLED_AT[point], *replacing, environment={}) as process:
                assert process.wait(timeout=60) == -signal.SIGKILL, (point, process.stderr)
            names = {name for (name,) in target.query("SELECT name FROM runs")}
            if point == "after the swap":
                assert "present" not in names
                same = manifest.metadata["databases"]["mlflow"]["schema"]
                other.write_bytes(with_schema(saved.file, same))
                assert (
                    exit_code(backup.main, "restore", "--from", str(other)) == exit_codes.BAD_INPUT
                )
                assert "--replace" in capsys.readouterr().err, (
                    "the unfinished restore is of another archive"
                )
                continue
            assert names == {"present"}, f"{point} the database is the old one"
            objects = target.objects()
            assert objects.keys() >= now.keys(), f"{point} no old artifact is missing"
        assert exit_code(backup.main, *replacing) == exit_codes.OK
        output = capsys.readouterr().out.splitlines()
    prefix = "kept from before: "
    kept = [line.removeprefix(prefix) for line in output if line.startswith(prefix)]
    assert [name.split("_before_")[0] for name in kept[:2]] == [
        f"database {target.name}",
        f"database {target.name}_auth",
    ]
    assert target.query("SELECT DISTINCT name FROM runs", kept[0].split()[1]) == [("present",)]
    objects = target.objects()
    assert {name for name in objects if name.startswith("artifacts/")} == {
        member.name for member in manifest.below(archive.ARTIFACTS)
    }
    oldest = min(name.split("/")[0] for name in objects if ".before-" in name)
    assert {name: objects[name.replace("artifacts", oldest, 1)] for name in now} == now
    assert not [name for name in objects if name.startswith("artifacts.resto")]
    assert not any("restoring" in name for name in target.every_database())
    artifacts = target.artifacts()
    for member in manifest.below(archive.ARTIFACTS):
        spool = io.BytesIO()
        info = artifacts.find(member.name.removeprefix("artifacts/"))
        assert info
        artifacts.read(info, spool)
        assert hashlib.sha256(spool.getvalue()).hexdigest() == member.sha256


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, server_folder: Path, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return transfer.open_checked(str(tmp_path / "artifacts"), "EUROSAT_ARTIFACTS")
    from google.cloud.storage import Client

    bucket = Client().bucket("places")
    if not bucket.exists():
        bucket.create()
    return transfer.open_checked("gs://places/artifacts", "EUROSAT_ARTIFACTS")


def test_an_overwritten_artifact_is_read_from_one_generation(
    store: ObjectStore,
) -> None:
    store.write("a/b", io.BytesIO(b"first"))
    (listed,) = store.list_objects()
    store.write("a/b", io.BytesIO(b"second, and longer"))
    with pytest.raises(ObjectChanged):
        store.read(listed, io.BytesIO())
    info, content = save._read_whole(store, listed)
    assert content
    with content:
        assert content.read() == b"second, and longer"
    assert info.size == 18
    assert info.generation != listed.generation
    store.delete("a/b")
    assert save._read_whole(store, listed) == (listed, None)
    assert not store.list_objects()


def test_a_copy_in_a_sibling_is_independent(store: ObjectStore) -> None:
    copy = store.sibling(".before-now")
    store.write("a/b", io.BytesIO(b"first"))
    store.copy("a/b", copy)
    store.write("a/b", io.BytesIO(b"second"))
    assert [info.key for info in store.list_objects()] == ["a/b"]
    (info,) = copy.list_objects()
    with copy.open(info) as stream:
        assert stream.read() == b"first"
    transfer.delete_all(copy)
    assert not copy.list_objects()
    (info,) = store.list_objects()
    with store.open(info) as stream:
        assert stream.read() == b"second"
    transfer.delete_all(store)


def test_a_stream_that_fails_leaves_no_object(store: ObjectStore) -> None:
    def fail(out: Any) -> None:
        out.write(b"x" * (20 << 20))
        raise TrackingError("gone")

    with pytest.raises(TrackingError, match="gone"):
        store.create("archive.tar", fail)
    assert not store.list_objects()


def test_a_backup_within_the_artifacts_is_refused(store: ObjectStore) -> None:
    within = (
        store.sibling("/backups")
        if isinstance(store, GcsStore)
        else transfer.open_checked(f"{store.url}/x", "")
    )
    with pytest.raises(ConfigError, match="lies within the artifacts"):
        save.save([], store, within, KEY)


def test_a_backup_in_the_bucket_of_the_artifacts_is_refused(server_folder: Path) -> None:
    from google.cloud.storage import Client

    Client().create_bucket("shared")
    artifacts, target = (
        transfer.open_checked(f"gs://shared/{prefix}", "--to") for prefix in ("artifacts", "daily")
    )
    with pytest.raises(ConfigError, match="where MLflow can read and delete it"):
        save.save([], artifacts, target, KEY)


class TokenServer(BaseHTTPRequestHandler):
    """Gives a token for every assertion, as Google's does for those of its service accounts."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        token = {
            "access_token": "of the backup account",
            "expires_in": 3600,
            "token_type": "Bearer",
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(token).encode())


class Storage(BaseHTTPRequestHandler):
    """Lists nothing, and remembers who asked."""

    logins: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.logins.append(self.headers["Authorization"])
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")


def test_archives_have_a_service_account_of_their_own(
    server_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifacts are in the emulator, the archives at Google's (here a server of the test)."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with listening(TokenServer) as tokens, listening(Storage) as google:
        account = {
            "type": "service_account",
            "project_id": "maps",
            "private_key": key.decode(),
            "client_email": "backup@maps.iam.gserviceaccount.com",
            "token_uri": tokens,
        }
        file = tmp_path / "backup.json"
        file.write_text(json.dumps(account))
        monkeypatch.setenv("API_ENDPOINT_OVERRIDE", google)
        monkeypatch.setattr(  # it asks Google, in a thread, for the regions of the account
            Credentials, "_is_regional_access_boundary_lookup_required", lambda _: False
        )
        monkeypatch.setenv(backup.CREDENTIALS, str(file))
        transfer.open_checked("gs://archives/daily", "--to", backup._credentials())
    assert set(Storage.logins) == {"Bearer of the backup account"}
    file.write_text("{}")
    assert backup._credentials() is None, "the file is still to be filled"
    monkeypatch.setenv(backup.CREDENTIALS, str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="cannot be read"):
        backup._credentials()


def test_a_missing_bucket_is_refused_in_one_line(server_folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no bucket gs://nowhere"):
        transfer.open_checked("gs://nowhere/x", "--to")
    with pytest.raises(ConfigError, match="neither a folder nor gs://"):
        transfer.open_checked("s3://nowhere/x", "--to")
