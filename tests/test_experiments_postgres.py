"""A team's sweep: a study in PostgreSQL, several drivers, and a tracking server on it too."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from benchmarks.server import free_port, mlflow_server
from eurosat import cli, tracking
from tests.sweeps import SWEEP, children, saying, until

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL of the tests' own; yields its URL up to the name of a database."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    as_user = []
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        shutil.chown(folder, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
    data, control = str(folder / "data"), str(Path(initdb).with_name("pg_ctl"))
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"

    def run(*command: str) -> None:
        done = subprocess.run([*as_user, *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    run(initdb, "-D", data, "-U", "eurosat", "--auth=trust", "--encoding=UTF8", "--no-sync")
    run(control, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg2://eurosat@127.0.0.1:{port}"
    finally:
        run(control, "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def create(url: str, database: str) -> str:
    import psycopg2

    server = url.replace("postgresql+psycopg2", "postgresql")
    with contextlib.closing(psycopg2.connect(f"{server}/postgres")) as connection:
        connection.autocommit = True
        connection.cursor().execute(f"CREATE DATABASE {database}")
    return f"{url}/{database}"


@pytest.mark.usefixtures("tiny_pack")
def test_two_drivers_work_on_one_study(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, backend = create(postgres, "studies"), create(postgres, "mlflow")
    with mlflow_server(tmp_path, backend) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        given = (*SWEEP, "study=s", f"storage={storage}", "trial_epochs=30", "pruner=none")
        first = saying(tmp_path, *given, "trials=6", "refit=false")

        def held() -> list[optuna.trial.FrozenTrial]:
            with contextlib.suppress(KeyError):
                return optuna.load_study(study_name="s", storage=storage).trials
            return []

        until(lambda: any(t.state.name == "RUNNING" for t in held()), first)
        second = saying(tmp_path, "resume=s", f"storage={storage}")
        said, complaint = second.communicate(timeout=200)
        assert second.returncode == cli.OK, complaint[-3000:]
        assert "its own driver concludes it" in said
        said, complaint = first.communicate(timeout=200)
        assert first.returncode == cli.OK, complaint[-3000:]
        assert said.startswith("6 trials: 6 finished")
        drivers = {trial.user_attrs["driver"] for trial in held()}
        assert len(drivers) == 2, "both had a share"
        parent = MlflowClient().get_run(tracking.latest_run("eurosat", kind="sweep"))
        below = children(parent)
        assert parent.info.status == "FINISHED"
        assert sorted(run.data.tags["trial.number"] for run in below) == list("012345")
        for run in below:
            assert run.info.status == "FINISHED"
            points = MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")
            assert sorted(p.step for p in points) == list(range(30))
