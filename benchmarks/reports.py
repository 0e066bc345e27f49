"""The format of every benchmark's report; see "Measurements" in docs/design.md."""

import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from eurosat.runtime import tables
from eurosat.runtime.hardware import describe_hardware
from eurosat.tracking import code_commit

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "reports"


def now() -> str:
    """UTC in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def goal(name: str, value: float, limit: float, *, at_most: bool = False) -> dict[str, Any]:
    """A measured value and its goal: ``limit`` or more, with ``at_most`` ``limit`` or less."""
    met = value <= limit if at_most else value >= limit
    return {"name": name, "value": round(value, 4), "goal": limit, "met": met}


def without_goal(name: str, value: float) -> dict[str, Any]:
    """A measured value that has no goal."""
    return {"name": name, "value": round(value, 4), "goal": None, "met": None}


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the rounds of the ratio within each round."""
    return float(statistics.median(a / b for a, b in zip(numerators, denominators, strict=True)))


def speed(arm: str, images_per_s: Sequence[float]) -> dict[str, Any]:
    """First columns of an arm's row: median, lowest and highest images per second."""
    return {
        "arm": arm,
        "images_per_s": round(statistics.median(images_per_s), 1),
        "low": round(min(images_per_s), 1),
        "high": round(max(images_per_s), 1),
    }


def show(
    name: str, n: int, goals: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Print the rows and the goals as tables."""
    columns = list(rows[0])
    table = Table(*columns, title=f"bench-{name}, n = {n}")
    for row in rows:
        table.add_row(*(f"{v:,.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    tables.print_table(table)
    verdicts = Table("name", "value", "goal", "met")
    for entry in goals:
        verdicts.add_row(*(str(entry[key]) for key in ("name", "value", "goal", "met")))
    tables.print_table(verdicts)


def write(
    name: str,
    *,
    started: str,
    n: int,
    goals: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    **more: Any,
) -> Path:
    """Print the tables and write reports/bench-NAME.json."""
    show(name, n, goals, rows)
    file = REPORTS / f"bench-{name}.json"
    report = {"commit": code_commit(), "hardware": describe_hardware(), "started": started, "n": n}
    report |= {"goals": list(goals), "rows": list(rows), **more}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {file.relative_to(ROOT)}")
    return file
