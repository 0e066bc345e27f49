"""Summarise the measurements of bench-serving: rows of a table, and goals."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import reports

GOAL_CONCURRENCY = 32
"""Concurrency of the comparisons in the goals."""
LIMIT, OURS = "limit", "server"
SAME_FILE = ("litserve-onnx", "bentoml-onnx")
"""Peers that serve our ONNX file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One arm in one round at one concurrency."""

    arm: str
    round: int
    concurrency: int
    rate: float
    """Successful answers per second."""
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    errors: int = 0
    memory_mb: float | None = None

    def describe(self) -> str:
        """Return one line for the console."""
        if self.p99_ms is None:
            return f"{self.arm} {self.rate:,.0f} tiles/s"
        errors = f", {self.errors} ERRORS" if self.errors else ""
        return (
            f"{self.arm} at {self.concurrency}: {self.rate:,.0f}/s, p50 {self.p50_ms:.1f} ms, "
            f"p99 {self.p99_ms:.1f} ms{errors}"
        )


def rows(
    measurements: Sequence[Measurement], arms: Sequence[str], idle: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return a row per arm and concurrency: medians over rounds, all errors, largest memory."""
    table = []
    for name, concurrency in dict.fromkeys(
        (measurement.arm, measurement.concurrency) for measurement in measurements
    ):
        group = [
            measurement
            for measurement in measurements
            if (measurement.arm, measurement.concurrency) == (name, concurrency)
        ]
        memory = [
            measurement.memory_mb for measurement in group if measurement.memory_mb is not None
        ]
        table.append(
            reports.speed(name, [measurement.rate for measurement in group])
            | {
                "concurrency": None if name == LIMIT else concurrency,
                "p50_ms": _median(measurement.p50_ms for measurement in group),
                "p95_ms": _median(measurement.p95_ms for measurement in group),
                "p99_ms": _median(measurement.p99_ms for measurement in group),
                "errors": sum(measurement.errors for measurement in group),
                "memory_mb": round(max(memory)) if memory else None,
                "idle_cores": round(idle[name], 3) if name in idle else None,
            }
        )
    return sorted(table, key=lambda row: (arms.index(row["arm"]), row["concurrency"] or 0))


def _median(values: Any) -> float | None:
    numbers = [value for value in values if value is not None]
    return round(statistics.median(numbers), 2) if numbers else None


def goals(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return the goals whose arms were measured; a ratio is the median of the rounds' ratios.

    The best peer needs both LitServe and BentoML. The latency of a peer that answered with errors
    is not compared, because an error is answered quickly.
    """
    by_round: dict[int, dict[str, Measurement]] = {}
    for measurement in measurements:
        if measurement.concurrency == GOAL_CONCURRENCY:
            by_round.setdefault(measurement.round, {})[measurement.arm] = measurement
    peers = sorted({measurement.arm for measurement in measurements} - {OURS, LIMIT})
    results = []

    def compare(
        name: str,
        value: Callable[[dict[str, Measurement]], float],
        goal: float,
        needs: Sequence[str],
        *,
        at_most: bool = False,
    ) -> None:
        if needs and all({OURS, *needs} <= set(by_arm) for by_arm in by_round.values()):
            median = statistics.median(value(by_arm) for by_arm in by_round.values())
            results.append(reports.goal(name, median, goal, at_most=at_most))

    def ratio_to(arm: str) -> Callable[[dict[str, Measurement]], float]:
        return lambda by_arm: by_arm[OURS].rate / _rate(by_arm[arm])

    same_file = [name for name in peers if name in SAME_FILE]
    compare("serving.vs_mlflow", ratio_to("mlflow"), 8, ["mlflow"])
    compare("serving.vs_fastapi", ratio_to("fastapi"), 4, ["fastapi"])
    compare(
        "serving.vs_best_peer",
        lambda by_arm: by_arm[OURS].rate / max(_rate(by_arm[name]) for name in same_file),
        1.3,
        SAME_FILE,
    )
    compare(
        "serving.p99_vs_best_peer",
        lambda by_arm: _p99(by_arm[OURS]) / min(_p99(by_arm[name]) for name in peers),
        1,
        peers,
        at_most=True,
    )
    compare("serving.vs_limit", ratio_to(LIMIT), 0.6, [LIMIT])
    ours_alone = [
        measurement.p50_ms
        for measurement in measurements
        if (measurement.arm, measurement.concurrency) == (OURS, 1)
    ]
    if latencies := [p50_ms for p50_ms in ours_alone if p50_ms is not None]:
        median_ms = statistics.median(latencies)
        results.append(reports.goal("serving.p50_ms", median_ms, 4, at_most=True))
    return results


def _rate(measurement: Measurement) -> float:
    """Return the rate, at least 1 per second, so that a ratio to it exists."""
    return max(measurement.rate, 1.0)


def _p99(measurement: Measurement) -> float:
    failed = measurement.errors and measurement.arm != OURS
    return float("inf") if failed or measurement.p99_ms is None else measurement.p99_ms
