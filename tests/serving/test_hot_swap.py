"""The number of tiles that may wait, and how it depends on the pace of the batches."""

from types import SimpleNamespace
from typing import Any

import pytest

from serving import hot_swap
from serving.hot_swap import LoadedVersion
from tests.support.registry import MLFLOW_WARNS

pytestmark = MLFLOW_WARNS
MAX_WAITING, BATCH = 64, 16


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("serving.hot_swap.time.monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def version() -> LoadedVersion:
    classifier: Any = SimpleNamespace(
        max_tiles_per_batch=lambda _: BATCH, parse_options=lambda _: None
    )
    files: Any = None
    return LoadedVersion(
        uri="", version="1", model=None, classifier=classifier, app=None, files=files
    )


def room(version: LoadedVersion) -> int:
    """Return the number of waiting tiles at which the version is full."""
    version.waiting.clear()
    while not version.is_full(MAX_WAITING, 0):
        version.waiting.append(None)
    return len(version.waiting)


def run_batches(
    version: LoadedVersion, clock: SimpleNamespace, seconds: float, times: int = 100
) -> None:
    for _ in range(times):
        clock.now += seconds
        version._record_batch_time(clock.now)


def test_the_whole_queue_is_used_until_the_first_overload(
    version: LoadedVersion, clock: SimpleNamespace
) -> None:
    run_batches(version, clock, 0.01)
    assert room(version) == MAX_WAITING
    assert room(version) == hot_swap.OVERLOAD_SHARE * MAX_WAITING, "it is shorter after an overload"
    clock.now += hot_swap.OVERLOAD_S
    version.waiting.clear()
    assert not version.is_full(MAX_WAITING, 0)
    assert room(version) == MAX_WAITING, "then the whole queue is used again"


def test_the_queue_is_shorter_while_batches_are_slow(
    version: LoadedVersion, clock: SimpleNamespace
) -> None:
    run_batches(version, clock, 0.01)
    run_batches(version, clock, 0.03)
    assert room(version) == MAX_WAITING
    assert room(version) == int(hot_swap.OVERLOAD_SHARE * MAX_WAITING / 3)
    run_batches(version, clock, 0.01, times=200)
    clock.now += hot_swap.OVERLOAD_S
    room(version)
    assert room(version) == pytest.approx(hot_swap.OVERLOAD_SHARE * MAX_WAITING, abs=1)


def test_requests_that_have_arrived_count_too(
    version: LoadedVersion, clock: SimpleNamespace
) -> None:
    assert not version.is_full(MAX_WAITING, MAX_WAITING + BATCH - 1)
    assert version.is_full(MAX_WAITING, MAX_WAITING + BATCH)
