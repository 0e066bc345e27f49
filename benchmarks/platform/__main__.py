"""bench-platform: no acknowledged data is lost when the platform's services are killed.

`python -m benchmarks.platform [--minutes 10] [--writers 16] [--readers 4] [--rate 200]
[--runs 10000] [--rounds 12]`. Only a run with the default values writes the report; others print
tables.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import reports
from benchmarks.platform import load, memory, search
from benchmarks.platform.fixture import running_platform
from eurosat.runtime import cli, exit_codes, logs

MAX_MEMORY_GROWTH = 1.2


@dataclass(frozen=True)
class Measurement:
    """What one run of the benchmark has measured."""

    outcome: load.Outcome
    searches_ms: Mapping[str, Sequence[float]]
    """Milliseconds of searches before the load, by kind of search."""


def measure(args: argparse.Namespace) -> Measurement:
    """Time searches on an idle platform, then run the load on it."""
    with running_platform() as platform:
        experiment_id, values_RM = search.fill(platform, args.runs)
        searcher = search.Searcher(platform, platform.user("reader"), experiment_id)
        searches_ms = search.time_searches(searcher, values_RM, args.rounds)
        outcome = load.run(
            platform,
            seconds=60 * args.minutes,
            writers=args.writers,
            readers=args.readers,
            rate=args.rate,
        )
    return Measurement(outcome, searches_ms)


def p95(values: Sequence[float]) -> float:
    """Return the 95th percentile; NaN without values."""
    return float(np.percentile(values, 95)) if values else float("nan")


def goals(measured: Measurement) -> list[dict[str, Any]]:
    counts = measured.outcome.counts
    all_ms = [took_ms for kind_ms in measured.searches_ms.values() for took_ms in kind_ms]
    growth = memory.growth(measured.outcome.samples)
    return [
        reports.goal("platform.lost", counts["lost"], 0, at_most=True),
        reports.goal("platform.stuck", counts["stuck"], 0, at_most=True),
        reports.goal("platform.memory_growth", growth, MAX_MEMORY_GROWTH, at_most=True),
        reports.without_goal("platform.search_p95_ms", p95(all_ms)),
    ]


def rows(measured: Measurement, args: argparse.Namespace) -> list[dict[str, Any]]:
    outcome, seconds = measured.outcome, 60 * args.minutes
    counts = outcome.counts
    before, after = memory.fifths(outcome.samples)

    def row(label: str, value: float, unit: str = "") -> dict[str, Any]:
        return {"what": label, "value": round(value, 1), "unit": unit}

    return [
        row(f"metrics requested, {args.writers} writers", args.writers * args.rate, "/s"),
        row("metrics acknowledged", counts["points"] / seconds, "/s"),
        row("from the writers' end until all data had arrived", outcome.arrived_s, "s"),
        *(
            row(f"{name} acknowledged", counts[name])
            for name in ("runs", "points", "params", "artifacts")
        ),
        row("points that nobody logged, or that are stored twice", counts["twice"]),
        *outcome.faults,
        row(f"searches of {args.readers} readers under load", len(outcome.searches_ms)),
        row("searches under load, p95", p95(outcome.searches_ms), "ms"),
        row("searches under load that failed", outcome.failed),
        *(
            row(f"memory of {name}, from {before[name]:.0f} MB to", after[name], "MB")
            for name in sorted(before.keys() & after.keys())
        ),
        *(
            row(f"search of {args.runs:,} runs: {name}, p95", p95(kind_ms), "ms")
            for name, kind_ms in measured.searches_ms.items()
        ),
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="duration of the load")
    parser.add_argument("--writers", type=int, default=16)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--rate", type=int, default=200, help="metrics per second and writer")
    parser.add_argument("--runs", type=int, default=10_000, help="runs that are searched")
    parser.add_argument(
        "--rounds", type=int, default=12, help="rounds with one search of each kind"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    args, started = build_parser().parse_args(argv), reports.now()
    logs.setup("info")
    measured = measure(args)
    count = sum(map(len, measured.searches_ms.values()))
    if args != build_parser().parse_args([]):
        reports.show("platform", count, goals(measured), rows(measured, args))
        return exit_codes.OK
    reports.write(
        "platform",
        started=started,
        n=count,
        goals=goals(measured),
        rows=rows(measured, args),
        minutes=args.minutes,
        searches_ms=measured.searches_ms,
    )
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main, platform=False)
