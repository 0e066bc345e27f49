"""Write the README's tables from the committed reports: `python -m benchmarks.tables`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
REPORTS = ROOT / "reports"


def main_job(report: dict[str, Any]) -> str:
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
    lines = ["| `make main-job` | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items()])


def results(report: list[dict[str, Any]]) -> str:
    """One line a recipe and split, the best first."""
    columns = ["recipe", "split", "seeds", "views", "test accuracy", "in one view", "macro F1"]
    columns += ["macro AUPRC", "epochs", "minutes a seed", "hardware"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in report:
        spread = "" if one["accuracy_std"] is None else f" ± {one['accuracy_std']:.4f}"
        cells = [
            f"`{one['recipe']}`",
            one["split"],
            one["n"],
            one["views"],
            f"**{one['accuracy_mean']:.4f}**{spread}",
            f"{one['one_view_accuracy_mean']:.4f}",
            f"{one['macro_f1_mean']:.4f}",
            f"{one['macro_auprc_mean']:.4f}",
            one["epochs"],
            f"{one['minutes']:.0f}",
            f"{one['hardware']}, {one['precision']}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *(f"- `{one['command']}`" for one in report)]
    return "\n".join(lines)


def bench_train(report: dict[str, Any]) -> str:
    """Images a second of each arm, and this project's speed as a multiple of it."""
    lines = [
        "| ResNet18, 64 px, batch 64 | images/s | speed of this project ÷ this | private memory |"
    ]
    lines.append("|---|---|---|---|")
    for one in report["rows"]:
        lines.append(
            f"| {one['what']} | {one['images_per_s']:.0f} | {one['ours_is_times']:.2f} "
            f"| {one['private_gb']:.2f} GB |"
        )
    unmet = [f"`{g['name']}` {g['value']} of {g['goal']}" for g in report["goals"] if not g["met"]]
    told = "All goals met." if not unmet else f"Goals not met: {', '.join(unmet)}."
    hardware = f"{report['hardware']}; median of {report['n']} interleaved rounds."
    return "\n".join([*lines, "", f"{told} {hardware}"])


def bench_tracking(report: dict[str, Any]) -> str:
    """What a training step costs with each way of logging."""
    lines = ["| one metric set a step, batch 64 | ms a step | of it in the logger | overhead |"]
    lines.append("|---|---|---|---|")
    for one in report["rows"]:
        spread = f"{100 * one['low']:.1f} to {100 * one['high']:.1f}"
        overhead = "" if one["arm"] == "none" else f"{100 * one['overhead']:.1f} % ({spread})"
        lines.append(
            f"| {one['what']} | {one['step_ms']:.0f} | {one['call_ms']:.2f} | {overhead} |"
        )
    return "\n".join([*lines, "", _goals(report)])


def bench_sweep(report: dict[str, Any]) -> str:
    """What each way to search came to."""
    columns = [f"{report['trial_epochs']} epochs a trial, {report['tiles']:,} tiles"]
    columns += ["epochs trained", "best validation accuracy", "minutes", "of both cores"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in report["rows"]:
        spread = f"{one['low']:.4f} to {one['high']:.4f}"
        lines.append(
            f"| {one['trials']} {one['what']} | {one['epochs']:.0f} "
            f"| {one['best_val_accuracy']:.4f} ({spread}) | {one['minutes']:.1f} "
            f"| {100 * one['core_use']:.0f} % |"
        )
    return "\n".join([*lines, "", _goals(report)])


def bench_serving(report: dict[str, Any]) -> str:
    """Each server at 32 connections, and alone with one."""
    columns = ["server", "answers/s at 32", "p50 ms", "p99 ms", "p50 ms at 1", "errors", "memory"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows = {(one["arm"], one["concurrency"]): one for one in report["rows"]}
    for arm, at in rows:
        one, alone = rows[arm, at], rows.get((arm, 1))
        if at == 32 and alone:
            lines.append(
                f"| {report['arms'][arm]} | {one['images_per_s']:,.0f} | {one['p50_ms']:.1f} "
                f"| {one['p99_ms']:.1f} | {alone['p50_ms']:.1f} | {one['errors']} "
                f"| {one['memory_mb']:,} MB |"
            )
        elif at is None:
            lines.append(f"| {report['arms'][arm]} | {one['images_per_s']:,.0f} | | | | | |")
    return "\n".join([*lines, "", _goals(report)])


def bench_forms(report: dict[str, Any]) -> str:
    """What each form of one network is worth."""
    columns = [f"`{report['network']}` of `{report['recipe']}`, one view", "test accuracy", "MB"]
    columns += ["images/s in batches of 32", "ms for one tile"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in report["rows"]:
        lines.append(
            f"| {one['what']} | {one['accuracy']:.4f} | {one['size_mb']:.1f} "
            f"| {one['images_per_s']:,.0f} | {one['p50_ms']:.2f} |"
        )
    return "\n".join([*lines, "", _goals(report)])


def bench_strain(report: dict[str, Any]) -> str:
    """The goals alone: the rows are in the report."""
    return _goals(report)


def bench_registry(report: dict[str, Any]) -> str:
    """How often pairs of models of a known difference end in a promotion."""
    columns = list(report["rows"][0])
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in report["rows"]:
        shares = [f"{value:.1%}" for value in list(row.values())[1:]]
        lines.append(f"| {row[columns[0]]} | {' | '.join(shares)} |")
    return "\n".join([*lines, "", _goals(report)])


def bench_platform(report: dict[str, Any]) -> str:
    """What was done to the platform, and what became of it."""
    lines = ["| `make bench-platform` | |", "|---|---|"]
    lines += [
        f"| {one['what']} | {one['value']:,.10g} {one['unit']}".rstrip() + " |"
        for one in report["rows"]
    ]
    return "\n".join([*lines, "", f"{_told(report)}. {report['hardware']}."])


def verdict(report: dict[str, Any]) -> str:
    """What the gates said of one version."""
    lines = ["| gate | value | champion's | bar | verdict |", "|---|---|---|---|---|"]
    for one in report["findings"]:
        cells = (one["gate"], one["value"], one["champion"], one["bar"], one["verdict"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _goals(report: dict[str, Any]) -> str:
    hardware = f"{report['hardware']}; median (lowest to highest) of {report['n']} rounds."
    return f"{_told(report)}. {hardware}"


def _told(report: dict[str, Any]) -> str:
    """Each figure, its goal where it has one, and whether that was not met."""
    return ", ".join(
        f"`{g['name']}` {g['value']}"
        + ("" if g["goal"] is None else f", goal {g['goal']}")
        + (" (not met)" if g["met"] is False else "")
        for g in report["goals"]
    )


TABLES: dict[str, Callable[[Any], str]] = {
    "main-job": main_job,
    "results": results,
    "bench-train": bench_train,
    "bench-tracking": bench_tracking,
    "bench-sweep": bench_sweep,
    "bench-serving": bench_serving,
    "bench-strain": bench_strain,
    "bench-forms": bench_forms,
    "bench-registry": bench_registry,
    "bench-platform": bench_platform,
    "verdict": verdict,
}
"""Each report with a table, and how it is drawn."""


def rewritten(readme: str) -> str:
    """The README with every table drawn anew between its markers."""
    for name, draw in TABLES.items():
        if not (REPORTS / f"{name}.json").exists():
            continue  # not measured yet
        table = draw(json.loads((REPORTS / f"{name}.json").read_text()))
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = readme.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            sys.exit(f"error: README.md has no place {begin} ... {end}")
        readme = f"{before}{begin}\n{table}\n{end}{after}"
    return readme


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
