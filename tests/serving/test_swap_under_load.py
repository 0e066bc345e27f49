"""A server of two processes under load: swaps of its champion, and overload."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from registry import register, versions
from tests.support.images import encoded
from tests.support.load import LoadResult, run_clients
from tests.support.registry import REGISTRY, make_run, record_files
from tests.support.serving import Server, running, until

pytestmark = REGISTRY
TILE = encoded("River", "JPEG")
JPEG = {"Content-Type": "image/jpeg"}
CLIENTS, OVERLOAD_CLIENTS = 32, 128
SWAPS, SWAP_INTERVAL_S = 4, 2.0
"""The slow test makes 20 swaps in a minute."""


@pytest.fixture(scope="module")
def numbers(store: Path) -> list[str]:
    """Register two versions of the model."""
    return [register.register(make_run(store), "eurosat", "challenger") for _ in range(2)]


def set_champion(number: str) -> None:
    versions.client().set_registered_model_alias("eurosat", "champion", number)


@pytest.fixture
def server(store: Path, numbers: list[str], request: pytest.FixtureRequest) -> Iterator[Server]:
    set_champion(numbers[0])
    with running(store, "--poll", "0.5", *getattr(request, "param", ()), processes=2) as started:
        yield started
    assert started.process.returncode == 0


def predict(server: Server) -> requests.Response:
    return requests.post(f"{server.url}/predict", TILE, headers=JPEG, timeout=10)


def provenance(server: Server) -> dict[str, object]:
    model: dict[str, object] = requests.get(f"{server.url}/model", timeout=10).json()
    return model


def under_load(
    server: Server, seconds: float, clients: int, meanwhile: Callable[[], None] = lambda: None
) -> LoadResult:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_clients, server.port, TILE, seconds, clients)
        meanwhile()
        return future.result()


def check_swaps(server: Server, numbers: list[str], count: int, interval_s: float) -> None:
    def move() -> None:
        for number in range(count):
            time.sleep(interval_s)
            set_champion(numbers[(number + 1) % 2])

    result = under_load(server, (count + 1) * interval_s, CLIENTS, move)
    print(f"{result.statuses.total()} requests over {count} swaps: {dict(result.versions)}")
    assert set(result.statuses) == {200}, "no request fails"
    assert set(result.versions) == set(numbers), "both versions answer"
    assert min(result.versions.values()) > 0.1 * result.versions.total(), (
        "and neither of them only briefly"
    )
    assert provenance(server)["model_version"] == numbers[count % 2]


def test_no_request_fails_while_versions_are_swapped(server: Server, numbers: list[str]) -> None:
    check_swaps(server, numbers, SWAPS, SWAP_INTERVAL_S)


@pytest.mark.slow
def test_no_request_fails_during_20_swaps_in_a_minute(server: Server, numbers: list[str]) -> None:
    check_swaps(server, numbers, 20, 2.8)


def test_a_version_that_fails_its_self_test_gets_no_traffic(
    server: Server, store: Path, numbers: list[str]
) -> None:
    bad = register.register(make_run(store), "eurosat", "challenger")
    (file,) = store.rglob(f"{versions.run_of(versions.get('eurosat', bad))}/**/lineage.json")
    lineage = json.loads(file.read_text())
    lineage["example_probabilities"] = {"network": [0.8, 0.1, 0.1]}
    file.write_text(json.dumps(lineage))
    record_files("eurosat", bad, file.parents[1])
    try:
        set_champion(bad)

        def both_refuse_it() -> bool:
            assert predict(server).ok
            return server.metric("eurosat_versions_refused_total") == 2

        until(both_refuse_it, 30.0, "both processes refuse the version")
        refused = provenance(server)["refused"]
        assert isinstance(refused, dict)
        assert "differs by 0.467 from the registered one" in refused[f"models:/eurosat/{bad}"]
        assert predict(server).json()["model_version"] == numbers[0]
    finally:
        set_champion(numbers[0])


@pytest.mark.parametrize("server", [["--max-queue", "16"]], indirect=True, ids=["queue of 16"])
def test_an_overloaded_server_answers_some_in_time_rejects_the_rest_and_recovers(
    server: Server,
) -> None:
    def memory() -> int:
        workers = psutil.Process(server.process.pid).children()
        return sum(worker.memory_info().rss for worker in workers)

    under_load(server, 2.0, OVERLOAD_CLIENTS)
    before = memory()
    result = under_load(server, 5.0, OVERLOAD_CLIENTS)
    print(f"{dict(result.statuses)}; the slowest answer took {max(result.accepted_ms):.0f} ms")
    assert set(result.statuses) == {200, 429}
    assert max(result.accepted_ms) < 2000
    assert memory() < before + 50_000_000
    until(lambda: predict(server).ok, 2.0, "an answer after the overload")
