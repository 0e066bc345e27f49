"""The form of every benchmark's report; see Figures in docs/design.md."""

import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eurosat.runtime.hardware import describe_hardware
from eurosat.tracking import code_commit

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "reports"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def goal(name: str, value: float, wanted: float, *, at_most: bool = False) -> dict[str, Any]:
    met = value <= wanted if at_most else value >= wanted
    return {"name": name, "value": round(value, 4), "goal": wanted, "met": met}


def figure(name: str, value: float) -> dict[str, Any]:
    """What is written down without a goal."""
    return {"name": name, "value": round(value, 4), "goal": None, "met": None}


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return float(statistics.median(a / b for a, b in zip(one, other, strict=True)))


def speed(arm: str, images_per_s: Sequence[float]) -> dict[str, Any]:
    """The first columns of an arm's row."""
    return {
        "arm": arm,
        "images_per_s": round(statistics.median(images_per_s), 1),
        "low": round(min(images_per_s), 1),
        "high": round(max(images_per_s), 1),
    }


def show(
    name: str, n: int, goals: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Print the tables."""
    console = Console()
    columns = list(rows[0])
    table = Table(*columns, title=f"bench-{name}, n = {n}")
    for row in rows:
        table.add_row(*(f"{v:,.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    verdicts = Table("goal", "value", "wanted", "met")
    for one in goals:
        verdicts.add_row(one["name"], str(one["value"]), str(one["goal"]), str(one["met"]))
    console.print(verdicts)


def write(
    name: str,
    *,
    started: str,
    n: int,
    goals: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    **more: Any,
) -> Path:
    """Print the tables and leave reports/bench-NAME.json."""
    show(name, n, goals, rows)
    file = REPORTS / f"bench-{name}.json"
    report = {"commit": code_commit(), "hardware": describe_hardware(), "started": started, "n": n}
    report |= {"goals": list(goals), "rows": list(rows), **more}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {file.relative_to(ROOT)}")
    return file
