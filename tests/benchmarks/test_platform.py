"""bench-platform: its functions on values, and its short form on a platform with every fault."""

import json
from collections.abc import Callable

import pytest

from benchmarks import reports
from benchmarks.platform import memory
from benchmarks.platform.__main__ import build_parser, goals, measure, rows
from benchmarks.platform.faults import CUT_S, schedule
from benchmarks.platform.integrity import Acknowledged, Stored, compare, read
from deploy import postgresql
from tests.support.registry import MLFLOW_WARNS

POINTS = [("m", 0, 0.25), ("m", 1, 0.5), ("n", 1, 0.5)]
FILES = {"files/0.txt": "a" * 64}


def acknowledged() -> Acknowledged:
    return Acknowledged(points=[*POINTS], params={"p": "1"}, files={**FILES})


def stored(
    points: list[tuple[str, int, float]] = POINTS,
    params: str = "1",
    digest: Callable[[str], str | None] = FILES.get,
) -> Stored:
    return Stored(points=points, params={"p": params}, digest=digest)


def test_a_writers_record_is_read_back_as_acknowledged() -> None:
    lines = [
        {"journal": "journal:one"},
        {"journal": "journal:one", "params": {"p": "1"}},
        {"journal": "journal:one", "step": 0, "metrics": {"m": 0.25}},
        {"journal": "journal:one", "step": 1, "metrics": {"m": 0.5, "n": 0.5}},
        {"journal": "journal:one", "path": "files/0.txt", "sha256": "a" * 64},
        {"journal": "journal:two"},
    ]
    assert read(map(json.dumps, lines)) == {"one": acknowledged(), "two": Acknowledged()}


@pytest.mark.parametrize(
    ("in_database", "lost", "twice"),
    [
        (stored(), 0, 0),
        (stored(points=POINTS[1:]), 1, 0),
        (stored(points=[*POINTS[:2], ("n", 1, 0.75)]), 1, 1),
        (stored(points=[*POINTS, POINTS[0]]), 0, 1),
        (stored(params="2"), 1, 0),
        (stored(digest=lambda path: None), 1, 0),
        (stored(digest=lambda path: "b" * 64), 1, 0),
        (None, 6, 0),
    ],
)
def test_acknowledged_data_that_is_missing_or_different_counts_as_lost(
    in_database: Stored | None, lost: int, twice: int
) -> None:
    counts = compare(acknowledged(), in_database)
    assert (counts["lost"], counts["twice"]) == (lost, twice)
    logged = [counts[name] for name in ("runs", "points", "params", "artifacts")]
    assert logged == [1, 3, 1, 1]


@pytest.mark.parametrize("seconds", [15, 60, 600])
def test_every_fault_happens_during_the_load(seconds: float) -> None:
    planned = schedule(seconds)
    assert sorted(fault.service for fault in planned) == ["mlflow", "postgres", "postgres", "store"]
    (cut,) = (fault for fault in planned if fault.for_s)
    assert cut.service == "store"
    assert cut.for_s == min(CUT_S, seconds / 2)
    assert all(fault.at_s > 0 and fault.at_s + fault.for_s < seconds for fault in planned)
    server = next(fault for fault in planned if fault.service == "mlflow")
    assert server.at_s < seconds / 5, "else the memory of two processes would be compared"


def test_memory_growth_compares_the_last_fifth_with_the_second() -> None:
    flat = [{"mlflow": 400.0, "store": 100.0} for _ in range(10)]
    assert memory.growth(flat) == 1
    warming = [{"mlflow": 100.0, "store": 100.0} for _ in range(2)] + flat[2:]
    assert memory.growth(warming) == 1, "the warm-up is no growth"
    leak = [*flat[:8], {"mlflow": 800.0, "store": 100.0}, {"mlflow": 1000.0, "store": 100.0}]
    assert memory.growth(leak) == 2
    down = [{"store": 100.0} for _ in range(4)] + flat[4:]
    assert memory.growth(down) == 1, "a service that was down is not compared"


@pytest.mark.slow
@pytest.mark.postgres
@MLFLOW_WARNS[0]
def test_nothing_acknowledged_is_lost_when_every_service_fails_once() -> None:
    if postgresql.find_program("initdb") is None:
        pytest.skip("PostgreSQL is not installed: no platform")
    args = build_parser().parse_args(["--minutes=1", "--runs=200", "--rounds=1"])
    measured = measure(args)
    reports.show("platform", 1, goals(measured), rows(measured, args))
    assert len(measured.outcome.faults) == 4
    counts = measured.outcome.counts
    assert min(counts[name] for name in ("runs", "points", "params", "artifacts")) > 0
    assert (counts["lost"], counts["stuck"], counts["twice"]) == (0, 0, 0)
