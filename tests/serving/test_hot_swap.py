"""How many tiles may wait, by the pace of the batches; versions that cannot be loaded."""

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from serving import hot_swap
from serving.hot_swap import AliasWatcher, LoadedVersion
from serving.limits import Limits
from serving.metrics import Metrics
from tests.support.registry import REGISTRY
from tests.support.serving import make_champion

pytestmark = REGISTRY
MAX_WAITING, BATCH = 64, 16
LIMITS = Limits(queue=MAX_WAITING)


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
    while not version.is_full(LIMITS, 0):
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
    assert not version.is_full(LIMITS, 0)
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
    assert not version.is_full(LIMITS, MAX_WAITING + BATCH - 1)
    assert version.is_full(LIMITS, MAX_WAITING + BATCH)


def test_the_excess_of_one_process_may_wait_unless_it_is_overloaded(
    version: LoadedVersion, clock: SimpleNamespace
) -> None:
    limits = Limits(queue=MAX_WAITING, uneven=9)
    run_batches(version, clock, 0.01)
    version.waiting.extend([None] * (MAX_WAITING + 8))
    assert not version.is_full(limits, 0)
    version.waiting.append(None)
    assert version.is_full(limits, 0)
    assert room(version) == hot_swap.OVERLOAD_SHARE * MAX_WAITING


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[ONNXRuntimeError] : Failed to allocate memory for requested buffer"),
    ],
    ids=["memory", "disk", "ONNX Runtime"],
)
def test_a_version_is_not_refused_for_a_fault_of_the_machine(
    error: Exception, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = make_champion(store)
    watcher = AliasWatcher("models:/eurosat@champion", {}, 0.01, Metrics())
    with monkeypatch.context() as patch:
        patch.setattr(hot_swap, "_self_test", Mock(side_effect=error))
        asyncio.run(watcher.check_alias())
    assert not watcher.refused
    assert watcher.current is None

    async def retry() -> None:
        while watcher.current is None:
            await watcher.check_alias()
            await asyncio.sleep(0.01)
        assert watcher.current.version == number
        await watcher.close()

    asyncio.run(retry())


def test_a_version_that_is_faulty_itself_is_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_champion(store)
    watcher = AliasWatcher("models:/eurosat@champion", {}, 0.01, Metrics())
    monkeypatch.setattr(hot_swap, "_self_test", Mock(side_effect=KeyError("classes")))
    asyncio.run(watcher.check_alias())
    assert len(watcher.refused) == 1


def test_copies_of_killed_processes_are_removed_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getpid()):
        (tmp_path / f"{hot_swap.COPY_PREFIX}{pid}-x" / "model").mkdir(parents=True)
    (tmp_path / "eurosat-models").mkdir()
    hot_swap.remove_copies_of_the_dead()
    left = {folder.name for folder in tmp_path.iterdir()}
    assert left == {f"{hot_swap.COPY_PREFIX}{os.getpid()}-x", "eurosat-models"}
