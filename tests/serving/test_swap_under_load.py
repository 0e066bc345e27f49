"""A server of two processes under load, while its champion is moved and while it is overrun."""

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
from tests.support.load import Seen, watched
from tests.support.registry import REGISTRY, make_run
from tests.support.serving import Server, running, until

pytestmark = REGISTRY
TILE = encoded("River", "JPEG")
JPEG = {"Content-Type": "image/jpeg"}
CLIENTS, CROWD = 32, 128
SWAPS, SWAP_EVERY_S = 4, 2.0
"""The slow form makes twenty within a minute."""


@pytest.fixture(scope="module")
def numbers(store: Path) -> list[str]:
    """Two versions of the registered model."""
    return [register.register(make_run(store), "eurosat", "challenger") for _ in range(2)]


def champion(number: str) -> None:
    versions.client().set_registered_model_alias("eurosat", "champion", number)


@pytest.fixture
def server(store: Path, numbers: list[str], request: pytest.FixtureRequest) -> Iterator[Server]:
    champion(numbers[0])
    with running(store, "--poll", "0.5", *getattr(request, "param", ()), processes=2) as started:
        yield started
    assert started.process.returncode == 0


def predict(server: Server) -> requests.Response:
    return requests.post(f"{server.url}/predict", TILE, headers=JPEG, timeout=10)


def lineage(server: Server) -> dict[str, object]:
    told: dict[str, object] = requests.get(f"{server.url}/model", timeout=10).json()
    return told


def under_load(
    server: Server, seconds: float, clients: int, meanwhile: Callable[[], None] = lambda: None
) -> Seen:
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(watched, server.port, TILE, seconds, clients)
        meanwhile()
        return seen.result()


def swaps(server: Server, numbers: list[str], count: int, every_s: float) -> None:
    def move() -> None:
        for number in range(count):
            time.sleep(every_s)
            champion(numbers[(number + 1) % 2])

    seen = under_load(server, (count + 1) * every_s, CLIENTS, move)
    print(f"{seen.statuses.total()} requests over {count} swaps: {dict(seen.versions)}")
    assert set(seen.statuses) == {200}, "not one failed request"
    assert set(seen.versions) == set(numbers), "every answer names the version that made it"
    assert min(seen.versions.values()) > 0.1 * seen.versions.total(), "both have answered"
    assert lineage(server)["model_version"] == numbers[count % 2]


def test_no_request_fails_while_versions_are_swapped(server: Server, numbers: list[str]) -> None:
    swaps(server, numbers, SWAPS, SWAP_EVERY_S)


@pytest.mark.slow
def test_no_request_fails_in_twenty_swaps_within_a_minute(
    server: Server, numbers: list[str]
) -> None:
    swaps(server, numbers, 20, 2.8)


def test_a_version_that_answers_otherwise_than_when_it_was_registered_gets_no_traffic(
    server: Server, store: Path, numbers: list[str]
) -> None:
    bad = register.register(make_run(store), "eurosat", "challenger")
    (file,) = store.rglob(f"{versions.run_of(versions.get('eurosat', bad))}/**/lineage.json")
    told = json.loads(file.read_text())
    told["example_probabilities"] = {"network": [0.8, 0.1, 0.1]}
    file.write_text(json.dumps(told))
    try:
        champion(bad)

        def both_refuse_it() -> bool:
            assert predict(server).ok
            return server.counted("eurosat_versions_refused_total") == 2

        until(both_refuse_it, 30.0, "a version refused by both processes")
        refused = lineage(server)["refused"]
        assert isinstance(refused, dict)
        assert "answered 0.467 away from what it was" in refused[f"models:/eurosat/{bad}"]
        assert predict(server).json()["model_version"] == numbers[0]
    finally:
        champion(numbers[0])


@pytest.mark.parametrize("server", [["--max-queue", "16"]], indirect=True, ids=["queue of 16"])
def test_an_overrun_server_answers_some_in_time_tells_the_rest_to_wait_and_recovers(
    server: Server,
) -> None:
    def memory() -> int:
        workers = psutil.Process(server.process.pid).children()
        return sum(one.memory_info().rss for one in workers)

    under_load(server, 2.0, CROWD)
    before = memory()
    seen = under_load(server, 5.0, CROWD)
    print(f"{dict(seen.statuses)}; the slowest answer took {max(seen.accepted_ms):.0f} ms")
    assert set(seen.statuses) == {200, 429}
    assert max(seen.accepted_ms) < 2000
    assert memory() < before + 50_000_000
    until(lambda: predict(server).ok, 2.0, "an answer after it was overrun")
