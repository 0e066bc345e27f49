"""The benchmark of tracking times training steps, but not the sending after them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from benchmarks import tracking as benchmark
from eurosat.tracking import uploader
from tests.support.mlflow_server import Proxy, mlflow_server, proxy
from tests.support.registry import MLFLOW_WARNS

pytestmark = MLFLOW_WARNS


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("EUROSAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(uploader, "UPLOAD_INTERVAL_S", 0.1)
    with mlflow_server(tmp_path) as port, proxy(port) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server


def test_a_turn_ends_when_the_server_has_every_point_and_its_time_excludes_sending(
    server: Proxy,
) -> None:
    server.delay_s = 0.2
    steps: list[float] = []

    def step() -> float:
        time.sleep(0.001)
        steps.append(0.5)
        return 0.5

    with benchmark.journal_arm(server.uri) as arm:
        step_s, _ = benchmark.time_steps(step, arm, 0.1)
        client = MlflowClient(f"http://127.0.0.1:{server.upstream}")
        experiment = client.get_experiment_by_name("bench")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        assert len(client.get_metric_history(run.info.run_id, "lr")) == len(steps)
    assert step_s * len(steps) < 0.2
