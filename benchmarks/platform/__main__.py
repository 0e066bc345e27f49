"""bench-platform: nothing acknowledged is lost, though the platform's services fall over.

`python -m benchmarks.platform [--minutes 10] [--writers 16] [--readers 4] [--rate 200]
[--runs 10000] [--rounds 12]`. The report is written by a whole run alone; others print tables.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import reports
from benchmarks.platform import load, memory, search
from benchmarks.platform.fixture import standing
from eurosat.runtime import cli, exit_codes, logs

MOST_GROWTH = 1.2


@dataclass(frozen=True)
class Measured:
    outcome: load.Outcome
    searches_ms: Mapping[str, Sequence[float]]
    """By kind, before the load."""


def measured(args: argparse.Namespace) -> Measured:
    """Search a platform that is at rest, and then lay the load upon it."""
    with standing() as stand:
        experiment_id, values_RM = search.fill(stand, args.runs)
        searcher = search.Searcher(stand, stand.user("reader"), experiment_id)
        searches_ms = search.timed(searcher, values_RM, args.rounds)
        outcome = load.run(
            stand,
            seconds=60 * args.minutes,
            writers=args.writers,
            readers=args.readers,
            rate=args.rate,
        )
    return Measured(outcome, searches_ms)


def p95(values: Sequence[float]) -> float:
    """Not a number where there are none."""
    return float(np.percentile(values, 95)) if values else float("nan")


def goals(told: Measured) -> list[dict[str, Any]]:
    found = told.outcome.found
    every_ms = [one for each in told.searches_ms.values() for one in each]
    grown = memory.growth(told.outcome.samples)
    return [
        reports.goal("platform.lost", found["lost"], 0, at_most=True),
        reports.goal("platform.stuck", found["stuck"], 0, at_most=True),
        reports.goal("platform.memory_growth", grown, MOST_GROWTH, at_most=True),
        reports.without_goal("platform.search_p95_ms", p95(every_ms)),
    ]


def rows(told: Measured, args: argparse.Namespace) -> list[dict[str, Any]]:
    found, outcome, seconds = told.outcome.found, told.outcome, 60 * args.minutes
    before, after = memory.fifths(outcome.samples)

    def row(what: str, value: float, unit: str = "") -> dict[str, Any]:
        return {"what": what, "value": round(value, 1), "unit": unit}

    return [
        row(f"metrics asked for, {args.writers} writers", args.writers * args.rate, "/s"),
        row("metrics acknowledged", found["points"] / seconds, "/s"),
        row("until the last had arrived, after the writers' time", outcome.arrived_s, "s"),
        *(
            row(f"{name} acknowledged", found[name])
            for name in ("runs", "points", "params", "artifacts")
        ),
        row("points that nobody logged, or that are there twice", found["twice"]),
        *outcome.faults,
        row(f"searches of {args.readers} readers under load, answered", len(outcome.searches_ms)),
        row("of these, p95", p95(outcome.searches_ms), "ms"),
        row("of theirs, without an answer", outcome.refused),
        *(
            row(f"memory of {name}, from {before[name]:.0f} MB to", after[name], "MB")
            for name in sorted(before.keys() & after.keys())
        ),
        *(
            row(f"search of {args.runs:,} runs: {name}, p95", p95(each), "ms")
            for name, each in told.searches_ms.items()
        ),
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--minutes", type=float, default=10)
    made.add_argument("--writers", type=int, default=16)
    made.add_argument("--readers", type=int, default=4)
    made.add_argument("--rate", type=int, default=200, help="metrics a second of each writer")
    made.add_argument("--runs", type=int, default=10_000, help="that are searched")
    made.add_argument("--rounds", type=int, default=12, help="of one search of each kind")
    return made


def main(argv: Sequence[str]) -> int:
    args, started = parser().parse_args(argv), reports.now()
    logs.setup("info")
    told = measured(args)
    count = sum(map(len, told.searches_ms.values()))
    if args != parser().parse_args([]):
        reports.show("platform", count, goals(told), rows(told, args))
        return exit_codes.OK
    reports.write(
        "platform",
        started=started,
        n=count,
        goals=goals(told),
        rows=rows(told, args),
        minutes=args.minutes,
        searches_ms=told.searches_ms,
    )
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main, platform=False)
