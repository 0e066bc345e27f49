"""Fixtures: a cache and a tracking store for each test, copied from ones that are built once."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer

from deploy import postgresql
from eurosat.config import TrainConfig, compose
from eurosat.data.pack import Pack, open_pack
from eurosat.data.prepare import PreparedData
from eurosat.data.split import make_split
from eurosat.runtime import telemetry, worker_processes
from tests.support import processes, schedule
from tests.support.mlflow_server import blank_database
from tests.support.offline import sitecustomize
from tests.support.postgres import postgres_server
from tests.support.recipes import TINY

OFFLINE = str(Path(sitecustomize.__file__).parent)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    schedule.sort_longest_first(items)


def pytest_xdist_make_scheduler(
    config: pytest.Config, log: Producer
) -> schedule.FileScheduling | None:
    """Replace the scheduler of `--dist loadfile`."""
    is_by_file = config.getvalue("dist") == "loadfile"
    return schedule.FileScheduling(config, log) if is_by_file else None


@pytest.fixture(scope="session", autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use no store or cache of the user, and let no connection leave the machine.

    Importing ``tests.support.offline.sitecustomize`` guards this process; through PYTHONPATH it
    also guards the processes that it starts.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in telemetry.OFF.items():
            patch.setenv(name, value)
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 starves them beside other tests
        refused = tmp_path_factory.mktemp("sockets") / "refused.txt"
        patch.setenv(sitecustomize.RECORD, str(refused))
        patch.setenv("PYTHONPATH", os.pathsep.join([OFFLINE, os.environ.get("PYTHONPATH", "")]))
        patch.setattr(worker_processes, "PRELOAD", processes.PRELOAD)
        if sys.version_info < (3, 12):
            processes.trace_servers_alone(patch)
        patch.setenv("EUROSAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            patch.delenv(name, raising=False)
        yield
    assert not refused.exists(), f"something tried to leave the machine: {refused.read_text()}"


@pytest.fixture(autouse=True)
def keep_handlers() -> Iterator[None]:
    """Restore the logging of pytest: a command sets up logging for its whole process."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def blank_store() -> Path:
    """An MLflow database with its tables."""
    return blank_database()


@pytest.fixture
def tracking_store(blank_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracking store for one test, whose folder becomes the working directory."""
    shutil.copy(blank_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    return uri


@pytest.fixture(scope="module")
def store(blank_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a tracking store that the tests of a module share; their working directory."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(blank_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # artifacts go to ./mlruns
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield folder


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A name for the registered model of one test."""
    return f"m{abs(hash(request.node.name))}"


@pytest.fixture(scope="session")
def tiny_config(isolated: None) -> TrainConfig:
    return compose(TINY)


@pytest.fixture(scope="session")
def tiny_pack(tiny_config: TrainConfig) -> Pack:
    return open_pack(tiny_config.data)


@pytest.fixture(scope="session")
def tiny_data(tiny_pack: Pack) -> PreparedData:
    return PreparedData(pack=tiny_pack, split=make_split(tiny_pack.table), validation="missing")


@pytest.fixture(scope="session")
def eurosat_root() -> Path:
    """The folder of the real tiles; without it the test is skipped."""
    root = os.environ.get("EUROSAT_ROOT")
    if not root:
        pytest.skip("EUROSAT_ROOT is not set: no real tiles")
    return Path(root)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server; if it is not installed, the test is skipped."""
    if postgresql.find_program("initdb") is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with postgres_server() as url:
        yield url


@pytest.fixture(scope="session")
def real_tiles(eurosat_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides for the real tiles, with a cache that all workers share: packing takes a minute."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return "data=eurosat", f"data.cache={folder / 'real'}"


@pytest.fixture(scope="session")
def real_pack(real_tiles: tuple[str, ...]) -> Pack:
    return open_pack(compose(real_tiles).data)
