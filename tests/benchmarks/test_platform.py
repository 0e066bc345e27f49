"""bench-platform: its pieces on values, and its short form on a platform with every fault."""

import json
from collections.abc import Callable

import pytest

from benchmarks import reports, tables
from benchmarks.platform import memory
from benchmarks.platform.__main__ import goals, measured, parser, rows
from benchmarks.platform.faults import CUT_S, schedule
from benchmarks.platform.integrity import Acknowledged, Held, compare, read
from deploy import postgresql
from tests.support.registry import MLFLOW_WARNS

POINTS = [("m", 0, 0.25), ("m", 1, 0.5), ("n", 1, 0.5)]
FILES = {"files/0.txt": "a" * 64}


def told() -> Acknowledged:
    return Acknowledged(points=[*POINTS], params={"p": "1"}, files={**FILES})


def held(
    points: list[tuple[str, int, float]] = POINTS,
    params: str = "1",
    digest: Callable[[str], str | None] = FILES.get,
) -> Held:
    return Held(points=points, params={"p": params}, digest=digest)


def test_a_record_is_read_back_as_what_was_acknowledged() -> None:
    lines = [
        {"journal": "journal:one"},
        {"journal": "journal:one", "params": {"p": "1"}},
        {"journal": "journal:one", "step": 0, "metrics": {"m": 0.25}},
        {"journal": "journal:one", "step": 1, "metrics": {"m": 0.5, "n": 0.5}},
        {"journal": "journal:one", "path": "files/0.txt", "sha256": "a" * 64},
        {"journal": "journal:two"},
    ]
    assert read(map(json.dumps, lines)) == {"one": told(), "two": Acknowledged()}


@pytest.mark.parametrize(
    ("there", "lost", "twice"),
    [
        (held(), 0, 0),
        (held(points=POINTS[1:]), 1, 0),
        (held(points=[*POINTS[:2], ("n", 1, 0.75)]), 1, 1),
        (held(points=[*POINTS, POINTS[0]]), 0, 1),
        (held(params="2"), 1, 0),
        (held(digest=lambda path: None), 1, 0),
        (held(digest=lambda path: "b" * 64), 1, 0),
        (None, 6, 0),
    ],
)
def test_what_is_not_there_as_it_was_acknowledged_is_lost(
    there: Held | None, lost: int, twice: int
) -> None:
    found = compare(told(), there)
    assert (found["lost"], found["twice"]) == (lost, twice)
    assert (found["runs"], found["points"], found["params"], found["artifacts"]) == (1, 3, 1, 1)


@pytest.mark.parametrize("seconds", [15, 60, 600])
def test_every_fault_falls_into_the_time_of_the_load(seconds: float) -> None:
    planned = schedule(seconds)
    assert sorted(one.service for one in planned) == ["mlflow", "postgres", "postgres", "store"]
    (cut,) = (one for one in planned if one.for_s)
    assert cut.service == "store"
    assert cut.for_s == min(CUT_S, seconds / 2)
    assert all(one.at_s > 0 and one.at_s + one.for_s < seconds for one in planned)
    server = next(one for one in planned if one.service == "mlflow")
    assert server.at_s < seconds / 5, "another process would be compared with itself"


def test_memory_grows_from_the_second_fifth_to_the_last() -> None:
    flat = [{"mlflow": 400.0, "store": 100.0} for _ in range(10)]
    assert memory.growth(flat) == 1
    warming = [{"mlflow": 100.0, "store": 100.0} for _ in range(2)] + flat[2:]
    assert memory.growth(warming) == 1, "what is taken at first is no growth"
    leak = [*flat[:8], {"mlflow": 800.0, "store": 100.0}, {"mlflow": 1000.0, "store": 100.0}]
    assert memory.growth(leak) == 2
    away = [{"store": 100.0} for _ in range(4)] + flat[4:]
    assert memory.growth(away) == 1, "who was away then is not compared"


def test_the_table_tells_a_figure_without_a_goal_as_one() -> None:
    report = {
        "hardware": "a machine",
        "n": 60,
        "goals": [
            reports.goal("platform.lost", 0, 0, at_most=True),
            reports.goal("platform.stuck", 2, 0, at_most=True),
            reports.without_goal("platform.search_p95_ms", 812.34),
        ],
        "rows": [{"what": "points acknowledged", "value": 1920000, "unit": ""}],
    }
    drawn = tables.TABLES["bench-platform"](report)
    assert "| points acknowledged | 1,920,000 |" in drawn
    assert "`platform.lost` 0, goal 0, `platform.stuck` 2, goal 0 (not met)" in drawn
    assert "`platform.search_p95_ms` 812.34." in drawn


@pytest.mark.slow
@pytest.mark.postgres
@MLFLOW_WARNS[0]
def test_nothing_acknowledged_is_lost_though_every_service_falls_over() -> None:
    if postgresql.program("initdb") is None:
        pytest.skip("PostgreSQL is not installed: no platform")
    args = parser().parse_args(["--minutes=1", "--runs=200", "--rounds=1"])
    told = measured(args)
    reports.show("platform", 1, goals(told), rows(told, args))
    assert len(told.outcome.faults) == 4
    found = told.outcome.found
    assert min(found[name] for name in ("runs", "points", "params", "artifacts")) > 0
    assert (found["lost"], found["stuck"], found["twice"]) == (0, 0, 0)
