"""Write the README's tables from the committed reports: `python -m benchmarks.tables`."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
REPORTS = ROOT / "reports"

Report = dict[str, Any]


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def main_job(report: Report) -> str:
    """The champion of one main job on the real tiles."""
    rows = {
        "data": f"EuroSAT RGB, {report['split']} split, seed {report['seed']}",
        "recipe": f"`{report['recipe']}` as of commit {report['commit'][:7]}, "
        f"{report['epochs']} epochs",
        "test accuracy": f"**{report['test_accuracy']:.4f}**",
        "macro F1": f"{report['macro_f1']:.4f}",
        "macro AUPRC": f"{report['macro_auprc']:.4f}",
        "time, from the first tile to the last answer": f"{report['seconds'] / 60:.0f} min",
        "of which training the champion": f"{report['train_seconds'] / 60:.0f} min",
        "hardware": f"{report['hardware']}, {report['precision']}",
    }
    return _table(["`make main-job`", ""], list(rows.items()))


def results(report: list[Report]) -> str:
    """One row per recipe and split, the most accurate first; below it the commands."""
    columns = ["recipe", "split", "seeds", "views", "test accuracy", "in one view", "macro F1"]
    columns += ["macro AUPRC", "epochs", "minutes per seed", "hardware"]
    rows = []
    for row in report:
        spread = "" if row["accuracy_std"] is None else f" ± {row['accuracy_std']:.4f}"
        rows.append(
            [
                f"`{row['recipe']}`",
                row["split"],
                row["n"],
                row["views"],
                f"**{row['accuracy_mean']:.4f}**{spread}",
                f"{row['one_view_accuracy_mean']:.4f}",
                f"{row['macro_f1_mean']:.4f}",
                f"{row['macro_auprc_mean']:.4f}",
                row["epochs"],
                f"{row['minutes']:.0f}",
                f"{row['hardware']}, {row['precision']}",
            ]
        )
    commands = "\n".join(f"- `{row['command']}`" for row in report)
    return f"{_table(columns, rows)}\n\n{commands}"


def bench_train(report: Report) -> str:
    """Images per second of each arm, and how many times faster this project is."""
    columns = ["ResNet18, 64 px, batch 64", "images/s", "this project is ... times as fast"]
    rows = [
        [
            row["what"],
            f"{row['images_per_s']:.0f}",
            f"{row['ours_is_times']:.2f}",
            f"{row['private_gb']:.2f} GB",
        ]
        for row in report["rows"]
    ]
    unmet = [f"`{g['name']}` {g['value']} of {g['goal']}" for g in report["goals"] if not g["met"]]
    verdict = f"Goals not met: {', '.join(unmet)}." if unmet else "All goals met."
    rounds = f"{report['hardware']}; median of {report['n']} interleaved rounds."
    return f"{_table([*columns, 'private memory'], rows)}\n\n{verdict} {rounds}"


def bench_tracking(report: Report) -> str:
    """What each way of logging adds to a training step."""
    columns = ["one set of metrics per step, batch 64", "ms per step", "of it in the logger"]
    rows = []
    for row in report["rows"]:
        spread = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        overhead = "" if row["arm"] == "none" else f"{100 * row['overhead']:.1f} % ({spread})"
        rows.append([row["what"], f"{row['step_ms']:.0f}", f"{row['call_ms']:.2f}", overhead])
    return f"{_table([*columns, 'overhead'], rows)}\n\n{_goals_and_rounds(report)}"


def bench_sweep(report: Report) -> str:
    """Accuracy and cost of each way to search."""
    columns = [f"{report['trial_epochs']} epochs per trial, {report['tiles']:,} tiles"]
    columns += ["epochs trained", "best validation accuracy", "minutes", "use of both cores"]
    rows = [
        [
            f"{row['trials']} {row['what']}",
            f"{row['epochs']:.0f}",
            f"{row['best_val_accuracy']:.4f} ({row['low']:.4f} to {row['high']:.4f})",
            f"{row['minutes']:.1f}",
            f"{100 * row['core_use']:.0f} %",
        ]
        for row in report["rows"]
    ]
    return f"{_table(columns, rows)}\n\n{_goals_and_rounds(report)}"


def bench_serving(report: Report) -> str:
    """Each server with 32 connections, and its latency with one."""
    columns = ["server", "answers/s at 32", "p50 ms", "p99 ms", "p50 ms at 1", "errors", "memory"]
    by_load = {(row["arm"], row["concurrency"]): row for row in report["rows"]}
    rows = []
    for (arm, concurrency), row in by_load.items():
        name, speed = report["arms"][arm], f"{row['images_per_s']:,.0f}"
        single = by_load.get((arm, 1))
        if concurrency == 32 and single:
            latencies = [f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", f"{single['p50_ms']:.1f}"]
            rows.append([name, speed, *latencies, row["errors"], f"{row['memory_mb']:,} MB"])
        elif concurrency is None:
            rows.append([name, speed, "", "", "", "", ""])
    return f"{_table(columns, rows)}\n\n{_goals_and_rounds(report)}"


def bench_precisions(report: Report) -> str:
    """Accuracy, size and speed of one network in each precision."""
    columns = [f"`{report['network']}` of `{report['recipe']}`, one view", "test accuracy", "MB"]
    columns += ["images/s in batches of 32", "ms for one tile"]
    rows = [
        [
            row["what"],
            f"{row['accuracy']:.4f}",
            f"{row['size_mb']:.1f}",
            f"{row['images_per_s']:,.0f}",
            f"{row['p50_ms']:.2f}",
        ]
        for row in report["rows"]
    ]
    return f"{_table(columns, rows)}\n\n{_goals_and_rounds(report)}"


def bench_overload(report: Report) -> str:
    """The goals alone: the rows are in the report."""
    return _goals_and_rounds(report)


def bench_registry(report: Report) -> str:
    """How often pairs of models of a known difference end in a promotion."""
    columns = list(report["rows"][0])
    rows = [
        [row[columns[0]], *(f"{share:.1%}" for share in list(row.values())[1:])]
        for row in report["rows"]
    ]
    return f"{_table(columns, rows)}\n\n{_goals_and_rounds(report)}"


def bench_platform(report: Report) -> str:
    """The load and the faults that the platform was given, and how it came through."""
    rows = [[row["what"], f"{row['value']:,.10g} {row['unit']}".rstrip()] for row in report["rows"]]
    table = _table(["`make bench-platform`", ""], rows)
    return f"{table}\n\n{_goals(report)}. {report['hardware']}."


def verdict(report: Report) -> str:
    """Each gate's verdict on one version."""
    columns = ["gate", "value", "champion", "bar", "verdict"]
    return _table(columns, [[row[name] for name in columns] for row in report["findings"]])


def _goals_and_rounds(report: Report) -> str:
    rounds = f"median (lowest to highest) of {report['n']} rounds"
    return f"{_goals(report)}. {report['hardware']}; {rounds}."


def _goals(report: Report) -> str:
    """Each measured value, with its goal if it has one, and whether that was missed."""
    return ", ".join(
        f"`{goal['name']}` {goal['value']}"
        + ("" if goal["goal"] is None else f", goal {goal['goal']}")
        + (" (not met)" if goal["met"] is False else "")
        for goal in report["goals"]
    )


TABLES: dict[str, Callable[[Any], str]] = {
    "main-job": main_job,
    "results": results,
    "bench-train": bench_train,
    "bench-tracking": bench_tracking,
    "bench-sweep": bench_sweep,
    "bench-serving": bench_serving,
    "bench-overload": bench_overload,
    "bench-precisions": bench_precisions,
    "bench-registry": bench_registry,
    "bench-platform": bench_platform,
    "verdict": verdict,
}
"""Each report that has a table in the README, and the function that draws it."""


def rewrite(readme: str) -> str:
    """Return the README with each table between its markers drawn from its report."""
    for name, draw in TABLES.items():
        if not (REPORTS / f"{name}.json").exists():
            continue  # not measured yet
        table = draw(json.loads((REPORTS / f"{name}.json").read_text()))
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, opening, rest = readme.partition(begin)
        _, closing, after = rest.partition(end)
        if not (opening and closing):
            sys.exit(f"error: README.md lacks the markers {begin} and {end}: add both")
        readme = f"{before}{begin}\n{table}\n{end}{after}"
    return readme


if __name__ == "__main__":
    README.write_text(rewrite(README.read_text()))
