"""Draw tables in Markdown from reports; `benchmarks.tables` puts them into the pages."""

from collections.abc import Iterable, Sequence
from typing import Any

Report = dict[str, Any]
SERVING_CLIENTS = 32
"""Connections at which the summaries compare servers, as the goals of bench-serving do."""


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def _goal_value(report: Report, name: str) -> Any:
    return next(goal["value"] for goal in report["goals"] if goal["name"] == name)


def _row(report: Report, **values: object) -> Report:
    """Return the one row that has these values."""
    (row,) = (row for row in report["rows"] if values.items() <= row.items())
    return dict(row)


def reasons(results: list[Report], tracking: Report, registry: Report, serving: Report) -> str:
    """Four reasons to use this project, each with a number and a link to its measurement."""
    best = results[0]
    logging = _row(tracking, arm="ours, far")["overhead"]
    worse = next(row for row in registry["rows"] if row["true difference, pp"] == "-0.5")
    times = _goal_value(serving, "serving.vs_mlflow")
    where = "([measured](docs/benchmarks.md#{}))"
    return "\n".join(
        [
            f"- **Accurate on a small machine.** The recipe `{best['recipe']}`, trained on two CPU "
            f"cores, is right on {best['accuracy_mean']:.2%} of EuroSAT's test tiles "
            f"{where.format('recipes')}.",
            "- **Runs survive their server.** Metrics go to a journal on disk first. With a server "
            f"50 ms away, logging takes {logging:.1%} of a training step "
            f"{where.format('cost-of-tracking')}.",
            "- **Worse models are stopped.** Gates compare each model with the champion. Of models "
            f"that are 0.5 percentage points worse, {worse['promoted']:.1%} are promoted "
            f"{where.format('promotion-by-chance')}.",
            f"- **Fast answers.** The server answers {times:.1f} times as many tiles per second as "
            f"`mlflow models serve` with a pyfunc model {where.format('serving')}.",
        ]
    )


def results_summary(report: list[Report]) -> str:
    """One row per recipe, the most accurate first."""
    columns = ["recipe", "test accuracy", "macro F1", "macro AUPRC", "ECE", "views", "seeds"]
    rows = [
        [
            f"`{row['recipe']}`",
            _accuracy(row),
            f"{row['macro_f1_mean']:.4f}",
            f"{row['macro_auprc_mean']:.4f}",
            f"{row['ece_mean']:.4f}",
            row["views"],
            row["n"],
            f"{row['minutes']:.0f}",
        ]
        for row in report
    ]
    return _table([*columns, "minutes per seed"], rows)


def _accuracy(row: Report) -> str:
    spread = "" if row["accuracy_std"] is None else f" ± {row['accuracy_std']:.4f}"
    return f"**{row['accuracy_mean']:.4f}**{spread}"


def benchmarks_summary(serving: Report, train: Report, tracking: Report, platform: Report) -> str:
    """One row for each of four benchmarks."""
    speeds = {
        arm: f"{_row(serving, arm=arm, concurrency=SERVING_CLIENTS)['images_per_s']:,.0f}"
        for arm in ("server", "mlflow", "bentoml-onnx")
    }
    images = {row["arm"]: f"{row['images_per_s']:.0f}" for row in train["rows"]}
    overhead = {row["arm"]: f"{row['overhead']:.1%}" for row in tracking["rows"]}
    (points,) = (r["value"] for r in platform["rows"] if r["what"] == "points acknowledged")
    rows = [
        [
            "[serving](docs/benchmarks.md#serving)",
            f"tiles answered per second, {SERVING_CLIENTS} clients",
            speeds["server"],
            f"{speeds['mlflow']} `mlflow models serve`, {speeds['bentoml-onnx']} BentoML",
            _met(serving, "serving.vs_mlflow", "{:g} times MLflow's"),
        ],
        [
            "[training](docs/benchmarks.md#training-speed)",
            "tiles trained per second, ResNet18",
            images["ours"],
            f"{images['plain']} Lightning with ImageFolder, {images['torchgeo']} torchgeo",
            _met(train, "train.vs_plain_lightning", "{:g} times Lightning's"),
        ],
        [
            "[tracking](docs/benchmarks.md#cost-of-tracking)",
            "share of a step spent on logging, server 50 ms away",
            overhead["ours, far"],
            f"{overhead['MLFlowLogger, far']} Lightning's MLFlowLogger",
            _met(tracking, "tracking.overhead", "{:.1%}"),
        ],
        [
            "[platform](docs/benchmarks.md#platform-under-load)",
            f"of {points:,} acknowledged points, lost while services were killed",
            _goal_value(platform, "platform.lost"),
            "",
            _met(platform, "platform.lost", "{:g}"),
        ],
    ]
    return _table(["benchmark", "what is measured", "this project", "others", "goal"], rows)


def _met(report: Report, name: str, words: str) -> str:
    """Return the goal ``name`` in words, and whether it was met."""
    (goal,) = (goal for goal in report["goals"] if goal["name"] == name)
    return f"{words.format(goal['goal'])}: {'met' if goal['met'] else 'not met'}"


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
        rows.append(
            [
                f"`{row['recipe']}`",
                row["split"],
                row["n"],
                row["views"],
                _accuracy(row),
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
    columns = ["arm", "ResNet18, 64 px, batch 64", "tiles/s", "this project is ... times as fast"]
    rows = [
        [
            f"`{row['arm']}`",
            row["what"],
            f"{row['images_per_s']:.0f}",
            f"{row['ours_is_times']:.2f}",
            f"{row['private_gb']:.2f} GB",
        ]
        for row in report["rows"]
    ]
    return f"{_table([*columns, 'private memory'], rows)}\n\n{_goals_and_rounds(report)}"


def bench_convolutions(report: Report) -> str:
    """Training steps with each kind of convolutions."""
    columns = ["arm", "recipe", "tiles/s (lowest to highest)"]
    rows = [
        [
            f"`{row['arm']}`",
            f"`{row['recipe']}`",
            f"{row['images_per_s']:.0f} ({row['low']:.0f} to {row['high']:.0f})",
        ]
        for row in report["rows"]
    ]
    return f"{_table(columns, rows)}\n\n{_goals_and_rounds(report)}"


def bench_tracking(report: Report) -> str:
    """What each way of logging adds to a training step."""
    columns = ["arm", "one set of metrics per step, batch 64", "ms per step", "in the logger"]
    rows = []
    for row in report["rows"]:
        spread = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        overhead = "" if row["arm"] == "none" else f"{100 * row['overhead']:.1f} % ({spread})"
        times = [f"{row['step_ms']:.0f}", f"{row['call_ms']:.2f}"]
        rows.append([f"`{row['arm']}`", row["what"], *times, overhead])
    return f"{_table([*columns, 'overhead'], rows)}\n\n{_goals_and_rounds(report)}"


def bench_sweep(report: Report) -> str:
    """Accuracy and cost of each way to search."""
    columns = ["arm", f"{report['trial_epochs']} epochs per trial, {report['tiles']:,} tiles"]
    columns += ["epochs trained", "best validation accuracy", "minutes", "use of both cores"]
    rows = [
        [
            f"`{row['arm']}`",
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
    columns = ["arm", "server", "answers/s at 32", "p50 ms", "p99 ms", "p50 ms at 1", "errors"]
    by_load = {(row["arm"], row["concurrency"]): row for row in report["rows"]}
    rows = []
    for (arm, concurrency), row in by_load.items():
        start = [f"`{arm}`", report["arms"][arm], f"{row['images_per_s']:,.0f}"]
        single = by_load.get((arm, 1))
        if concurrency == SERVING_CLIENTS and single:
            latencies = [f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", f"{single['p50_ms']:.1f}"]
            rows.append([*start, *latencies, row["errors"], f"{row['memory_mb']:,} MB"])
        elif concurrency is None:
            rows.append([*start, "", "", "", "", ""])
    return f"{_table([*columns, 'memory'], rows)}\n\n{_goals_and_rounds(report)}"


def bench_precisions(report: Report) -> str:
    """Accuracy, size and speed of one network in each precision."""
    columns = ["arm", f"`{report['network']}` of `{report['recipe']}`, one view", "test accuracy"]
    columns += ["MB", "tiles/s in batches of 32", "ms for one tile"]
    rows = [
        [
            f"`{row['arm']}`",
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
    """What the server accepted and refused in each phase."""
    columns = ["phase", "accepted", "refused", "failed", "p99 ms of accepted", "growth in MB"]
    names = ["accepted", "refused", "failed", "accepted_p99_ms", "grown_mb"]
    rows = [
        [row["arm"], *(f"{row[name]:,}" if row[name] != "" else "" for name in names)]
        for row in report["rows"]
    ]
    return f"{_table(columns, rows)}\n\n{_goals_and_rounds(report)}"


def bench_registry(report: Report) -> str:
    """How often a model of a known difference from the champion is promoted."""
    columns = list(report["rows"][0])
    rows = [
        [row[columns[0]], *(f"{share:.1%}" for share in list(row.values())[1:])]
        for row in report["rows"]
    ]
    return f"{_table(columns, rows)}\n\n{_goals_and_rounds(report)}"


def bench_platform(report: Report) -> str:
    """The load, the faults, and how long the platform took to recover."""
    rows = [[row["what"], f"{row['value']:,.10g} {row['unit']}".rstrip()] for row in report["rows"]]
    table = _table(["`make bench-platform`", ""], rows)
    return f"{table}\n\n{_goals(report)}\n\n{report['hardware']}; {report['minutes']} minutes."


def studies(report: dict[str, Report]) -> str:
    """One row per training of the studies that vary one setting."""
    columns = ["study", "varied", "test accuracy", "macro F1", "epochs", "minutes"]
    varied = {"few-labels": "tiles per class: {per_class}", "bands": "bands: {bands}"}
    rows = [
        [
            f"`{name}`",
            words.format(**row),
            f"{row['test_accuracy']:.4f}",
            f"{row['test_macro_f1']:.4f}",
            row["epochs"],
            f"{row['minutes']:.0f}",
        ]
        for name, words in varied.items()
        for row in report[name]["rows"]
    ]
    hardware = ", ".join(f"{name}: {report[name]['hardware']}" for name in varied)
    return f"{_table(columns, rows)}\n\n{hardware}; one seed."


def verdict(report: Report) -> str:
    """Each gate's verdict on one version."""
    names = ["gate", "value", "champion", "bar", "verdict"]
    rows = [[row[name] for name in names] for row in report["findings"]]
    return _table(["gate", "value", "champion", "limit", "verdict"], rows)


def _goals_and_rounds(report: Report) -> str:
    n = report["n"]
    rounds = "one run" if n == 1 else f"median (lowest to highest) of {n} rounds"
    return f"{_goals(report)}\n\n{report['hardware']}; {rounds}."


def _goals(report: Report) -> str:
    """A table of each measured value, its goal, and whether it was met."""
    met = {True: "met", False: "**not met**", None: ""}
    rows = [
        [f"`{goal['name']}`", goal["value"], _or_empty(goal["goal"]), met[goal["met"]]]
        for goal in report["goals"]
    ]
    return _table(["goal", "measured", "limit", ""], rows)


def _or_empty(value: object) -> object:
    return "" if value is None else value
