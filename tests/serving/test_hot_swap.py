"""How many tiles a version has wait, by how fast it answers them."""

from types import SimpleNamespace
from typing import Any

import pytest

from serving import hot_swap
from serving.hot_swap import Live
from tests.support.registry import MLFLOW_WARNS

pytestmark = MLFLOW_WARNS
MOST, BATCH = 64, 16


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    told = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("serving.hot_swap.time.monotonic", lambda: told.now)
    return told


@pytest.fixture
def version() -> Live:
    classifier: Any = SimpleNamespace(most=lambda _: BATCH, wish=lambda _: None)
    files: Any = None
    return Live(uri="", version="1", model=None, classifier=classifier, app=None, files=files)


def room(version: Live) -> int:
    """Tiles that wait when it is full."""
    version.waiting.clear()
    while not version.is_full(MOST, 0):
        version.waiting.append(None)
    return len(version.waiting)


def turn(version: Live, clock: SimpleNamespace, seconds: float, times: int = 100) -> None:
    for _ in range(times):
        clock.now += seconds
        version._turned(clock.now)


def test_all_may_wait_until_it_is_overrun(version: Live, clock: SimpleNamespace) -> None:
    turn(version, clock, 0.01)
    assert room(version) == MOST
    assert room(version) == hot_swap.SHORT * MOST, "from then on fewer"
    clock.now += hot_swap.OVERRUN_S
    version.waiting.clear()
    assert not version.is_full(MOST, 0)
    assert room(version) == MOST, "it tries the whole queue again"


def test_fewer_wait_while_others_take_its_time(version: Live, clock: SimpleNamespace) -> None:
    turn(version, clock, 0.01)
    turn(version, clock, 0.03)
    assert room(version) == MOST
    assert room(version) == int(hot_swap.SHORT * MOST / 3)
    turn(version, clock, 0.01, times=200)
    clock.now += hot_swap.OVERRUN_S
    room(version)
    assert room(version) == pytest.approx(hot_swap.SHORT * MOST, abs=1)


def test_requests_on_their_way_to_the_queue_count(version: Live, clock: SimpleNamespace) -> None:
    assert not version.is_full(MOST, MOST + BATCH - 1)
    assert version.is_full(MOST, MOST + BATCH)
