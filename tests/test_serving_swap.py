"""A server of two processes under load, while its champion is moved and while it is overrun."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from registry import register, versions
from serving import client
from tests.test_registry_register import MLFLOW_WARNS, make_run, tracking_store
from tests.test_serving_pictures import encoded
from tests.test_serving_stock import START_S, free_port

pytestmark = MLFLOW_WARNS
ROOT = Path(__file__).resolve().parents[1]
TILE = encoded("River", "JPEG")
JPEG = {"Content-Type": "image/jpeg"}
CLIENTS = 32
SWAPS, SWAP_EVERY_S = 4, 2.0
"""The slow form makes twenty within a minute."""


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tracking_store(tmp_path_factory) as folder:
        yield folder


@pytest.fixture(scope="module")
def numbers(store: Path) -> list[str]:
    """Two versions of the registered model."""
    return [register.register(make_run(store), "eurosat", "challenger") for _ in range(2)]


def champion(number: str) -> None:
    versions.client().set_registered_model_alias("eurosat", "champion", number)


@pytest.fixture
def server(store: Path, numbers: list[str], request: pytest.FixtureRequest) -> Iterator[str]:
    champion(numbers[0])
    port = free_port()
    command = [sys.executable, "-m", "serving.server", "--port", str(port), "--poll", "0.5"]
    command += getattr(request, "param", ["--processes", "2"])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    }
    with (store / f"server-{port}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=store, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        client.wait_ready(url, process, START_S)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


async def ask(port: int, each: Callable[[int, dict[str, Any]], None], until: float) -> None:
    """One client on one connection, which asks as soon as it is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\n"
    whole = f"{head}content-length: {len(TILE)}\r\n\r\n".encode() + TILE
    try:
        while time.monotonic() < until:
            writer.write(whole)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(answer.partition("content-length: ")[2].split()[0])
            each(int(answer.split()[1]), json.loads(await reader.readexactly(length)))
    finally:
        writer.close()


def under_load(
    url: str, seconds: float, clients: int, meanwhile: Callable[[], Awaitable[None]]
) -> tuple[Counter[int], Counter[str], list[float]]:
    """Statuses, the versions that answered, and seconds from one answer of all to the next."""
    statuses: Counter[int] = Counter()
    answered: Counter[str] = Counter()
    at: list[float] = []

    def each(status: int, answer: dict[str, Any]) -> None:
        statuses[status] += 1
        answered[answer.get("model_version", "none")] += 1
        at.append(time.monotonic())

    async def everything() -> None:
        port, until = int(url.rpartition(":")[2]), time.monotonic() + seconds
        await asyncio.gather(*(ask(port, each, until) for _ in range(clients)), meanwhile())

    asyncio.run(everything())
    return statuses, answered, [later - sooner for sooner, later in itertools.pairwise(at)]


def swaps(url: str, numbers: list[str], count: int, every_s: float) -> None:
    async def move() -> None:
        for number in range(count):
            await asyncio.sleep(every_s)
            await asyncio.to_thread(champion, numbers[(number + 1) % 2])

    statuses, answered, _ = under_load(url, (count + 1) * every_s, CLIENTS, move)
    print(f"{sum(statuses.values())} requests over {count} swaps: {dict(answered)}")
    assert set(statuses) == {200}, "not one failed request"
    assert set(answered) == set(numbers), "every answer names the version that made it"
    assert min(answered.values()) > 0.1 * sum(answered.values()), "both versions have answered"
    model = requests.get(f"{url}/model", timeout=10).json()
    assert model["model_version"] == numbers[count % 2]


def test_no_request_fails_while_versions_are_swapped(server: str, numbers: list[str]) -> None:
    swaps(server, numbers, SWAPS, SWAP_EVERY_S)


@pytest.mark.slow
def test_no_request_fails_in_twenty_swaps_within_a_minute(server: str, numbers: list[str]) -> None:
    swaps(server, numbers, 20, 2.8)


def test_a_version_that_answers_otherwise_than_when_it_was_registered_gets_no_traffic(
    server: str, store: Path, numbers: list[str]
) -> None:
    bad = register.register(make_run(store), "eurosat", "challenger")
    (lineage,) = store.rglob(f"{versions.run_of(versions.get('eurosat', bad))}/**/lineage.json")
    told = json.loads(lineage.read_text())
    told["example_probabilities"] = {"network": [0.8, 0.1, 0.1]}
    lineage.write_text(json.dumps(told))
    try:
        champion(bad)
        until = time.monotonic() + START_S / 6
        while not (refused := requests.get(f"{server}/model", timeout=10).json()["refused"]):
            assert requests.post(f"{server}/predict", TILE, timeout=10, headers=JPEG).ok
            assert time.monotonic() < until
            time.sleep(0.1)
        assert "answered 0.467 away from what it was" in refused[f"models:/eurosat/{bad}"]
        answer = requests.post(f"{server}/predict", TILE, timeout=10, headers=JPEG).json()
        assert answer["model_version"] == numbers[0]
        told_of = requests.get(f"{server}/metrics", timeout=10).text
        assert "eurosat_versions_refused_total 0.0" not in told_of
    finally:
        champion(numbers[0])


@pytest.mark.parametrize(
    "server", [["--processes", "2", "--max-queue", "16"]], indirect=True, ids=["queue of 16"]
)
def test_an_overrun_server_answers_some_in_time_tells_the_rest_to_wait_and_recovers(
    server: str,
) -> None:
    async def nothing() -> None:
        await asyncio.sleep(0)

    pid = next(
        one.pid
        for one in psutil.Process().children()
        if "serving.server" in " ".join(one.cmdline())
    )

    def memory() -> int:
        return sum(one.memory_info().rss for one in psutil.Process(pid).children())

    under_load(server, 2.0, 128, nothing)
    before = memory()
    statuses, _, gaps = under_load(server, 5.0, 128, nothing)
    print(f"{dict(statuses)}; longest time without an answer {max(gaps):.3f} s")
    assert set(statuses) <= {200, 429}
    assert statuses[200] > 0
    assert statuses[429] > 0
    assert max(gaps) < 2.0
    assert memory() < before + 50_000_000
    refused = 0
    until = time.monotonic() + 2.0
    while not requests.post(f"{server}/predict", TILE, timeout=2, headers=JPEG).ok:
        refused += 1
        assert time.monotonic() < until
