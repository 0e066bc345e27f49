"""What the turns of bench-serving come to: rows of a table, and goals."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import reports

AT = 32
"""The concurrency at which the goals compare."""
LIMIT, OURS = "limit", "server"
SAME_FILE = ("litserve-onnx", "bentoml-onnx")
"""The peers that serve our ONNX file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One arm in one round at one concurrency."""

    arm: str
    round: int
    concurrency: int
    rate: float
    """Good answers a second."""
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    errors: int = 0
    memory_mb: float | None = None

    def told(self) -> str:
        if self.p99_ms is None:
            return f"{self.arm} {self.rate:,.0f} tiles/s"
        errors = f", {self.errors} ERRORS" if self.errors else ""
        return (
            f"{self.arm} at {self.concurrency}: {self.rate:,.0f}/s, p50 {self.p50_ms:.1f} ms, "
            f"p99 {self.p99_ms:.1f} ms{errors}"
        )


def rows(
    turns: Sequence[Turn], arms: Sequence[str], idle: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One an arm and concurrency: medians over the rounds, all errors, the most memory."""
    table = []
    for name, concurrency in dict.fromkeys((turn.arm, turn.concurrency) for turn in turns):
        its = [turn for turn in turns if (turn.arm, turn.concurrency) == (name, concurrency)]
        memory = [turn.memory_mb for turn in its if turn.memory_mb is not None]
        table.append(
            reports.speed(name, [turn.rate for turn in its])
            | {
                "concurrency": None if name == LIMIT else concurrency,
                "p50_ms": _median(turn.p50_ms for turn in its),
                "p95_ms": _median(turn.p95_ms for turn in its),
                "p99_ms": _median(turn.p99_ms for turn in its),
                "errors": sum(turn.errors for turn in its),
                "memory_mb": round(max(memory)) if memory else None,
                "idle_cores": round(idle[name], 3) if name in idle else None,
            }
        )
    return sorted(table, key=lambda row: (arms.index(row["arm"]), row["concurrency"] or 0))


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 2) if known else None


def goals(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Those whose arms took part; ratios are medians over the rounds of the one within a round.

    With only one of LitServe and BentoML there is no best of them. The latency of a peer that
    answered with errors is not held against ours: refusing is quick.
    """
    by_round: dict[int, dict[str, Turn]] = {}
    for turn in turns:
        if turn.concurrency == AT:
            by_round.setdefault(turn.round, {})[turn.arm] = turn
    peers = sorted({turn.arm for turn in turns} - {OURS, LIMIT})
    found = []

    def compare(
        name: str,
        value: Callable[[dict[str, Turn]], float],
        wanted: float,
        needs: Sequence[str],
        *,
        at_most: bool = False,
    ) -> None:
        if needs and all({OURS, *needs} <= set(each) for each in by_round.values()):
            median = statistics.median(value(each) for each in by_round.values())
            found.append(reports.goal(name, median, wanted, at_most=at_most))

    def over(arm: str) -> Callable[[dict[str, Turn]], float]:
        return lambda each: each[OURS].rate / _rate(each[arm])

    same_file = [name for name in peers if name in SAME_FILE]
    compare("serving.vs_mlflow", over("mlflow"), 8, ["mlflow"])
    compare("serving.vs_fastapi", over("fastapi"), 4, ["fastapi"])
    compare(
        "serving.vs_best_peer",
        lambda each: each[OURS].rate / max(_rate(each[name]) for name in same_file),
        1.3,
        SAME_FILE,
    )
    compare(
        "serving.p99_vs_best_peer",
        lambda each: _p99(each[OURS]) / min(_p99(each[name]) for name in peers),
        1,
        peers,
        at_most=True,
    )
    compare("serving.vs_limit", over(LIMIT), 0.6, [LIMIT])
    alone = [
        t.p50_ms for t in turns if (t.arm, t.concurrency) == (OURS, 1) and t.p50_ms is not None
    ]
    if alone:
        found.append(reports.goal("serving.p50_ms", statistics.median(alone), 4, at_most=True))
    return found


def _rate(turn: Turn) -> float:
    """One a second at least: what answers nothing can be compared too."""
    return max(turn.rate, 1.0)


def _p99(turn: Turn) -> float:
    failed = turn.errors and turn.arm != OURS
    return float("inf") if failed or turn.p99_ms is None else turn.p99_ms
