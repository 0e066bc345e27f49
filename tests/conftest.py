"""Fixtures: a cache and a tracking store per test, made from ones that are built once."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import postgresql
from eurosat.config import TrainConfig, compose
from eurosat.data.pack import Pack, open_pack
from eurosat.data.prepare import PreparedData
from eurosat.data.split import make_split
from eurosat.runtime import telemetry
from tests.support import platforms
from tests.support.offline import sitecustomize
from tests.support.postgres import running
from tests.support.recipes import TINY

OFFLINE = str(Path(sitecustomize.__file__).parent)


@pytest.fixture(scope="session", autouse=True)
def quiet_and_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No store or cache of the user's, whatever the shell says, and nothing leaves the machine.

    Importing ``tests.support.offline.sitecustomize`` guards this process; PYTHONPATH guards those
    that it starts.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in telemetry.OFF.items():
            patch.setenv(name, value)
        refused = tmp_path_factory.mktemp("sockets") / "refused.txt"
        patch.setenv(sitecustomize.RECORD, str(refused))
        patch.setenv("PYTHONPATH", os.pathsep.join([OFFLINE, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("EUROSAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            patch.delenv(name, raising=False)
        yield
    assert not refused.exists(), f"something tried to leave the machine: {refused.read_text()}"


@pytest.fixture(autouse=True)
def keep_handlers() -> Iterator[None]:
    """A verb sets up logging for its process; here that process is pytest's."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def blank_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables: making them takes seconds, copying nothing."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    store = SqlAlchemyStore(f"sqlite:///{file}", str(file.parent / "artifacts"))
    store.engine.dispose()
    return file


@pytest.fixture
def tracking_store(blank_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracking store of the test's own, which is also where it stands."""
    shutil.copy(blank_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    return uri


@pytest.fixture(scope="module")
def store(blank_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tracking store that the tests of a module share, and where they stand: a folder."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(blank_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # artifacts go to ./mlruns
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield folder


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """The name of a registered model of the test's own."""
    return f"m{abs(hash(request.node.name))}"


@pytest.fixture(scope="session")
def platform(quiet_and_apart: None) -> "Iterator[platforms.Platform]":
    """Of `make platform`, for all tests that ask it."""
    with platforms.place() as folder:
        yield platforms.started(folder)


@pytest.fixture(scope="session")
def tiny_config(quiet_and_apart: None) -> TrainConfig:
    return compose(TINY)


@pytest.fixture(scope="session")
def tiny_pack(tiny_config: TrainConfig) -> Pack:
    return open_pack(tiny_config.data)


@pytest.fixture(scope="session")
def tiny_data(tiny_pack: Pack) -> PreparedData:
    return PreparedData(pack=tiny_pack, split=make_split(tiny_pack.table), validation="missing")


@pytest.fixture(scope="session")
def eurosat_root() -> Path:
    """The real tiles; a test that asks for them is skipped where they are not."""
    root = os.environ.get("EUROSAT_ROOT")
    if not root:
        pytest.skip("EUROSAT_ROOT is not set: the real tiles are not here")
    return Path(root)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL; a test that asks for it is skipped where it is not installed."""
    if postgresql.program("initdb") is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with running() as url:
        yield url


@pytest.fixture(scope="session")
def real_pack(eurosat_root: Path) -> Pack:
    return open_pack(compose(["data=eurosat"]).data)
