"""bench-studies: single studies, `python -m benchmarks.studies STUDY [key=value ...]`.

STUDY is few-labels, learning-rates, features or bands. Each writes its rows to reports/studies.json
and, if it has curves, a plot to docs/. Arguments after the name are passed to its trainings, such
as `seed=1`.
"""

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reports import REPORTS, ROOT, now
from benchmarks.results import find_or_train, run_command, validate
from eurosat import tracking
from eurosat.runtime import logs
from eurosat.runtime.hardware import describe_hardware

FILE = REPORTS / "studies.json"
DOCS = ROOT / "docs"
REPEATS_PER_EPOCH = {5: 20, 50: 6, 500: 1}
"""By labelled tiles per class: fewer tiles are repeated more often, to get enough steps."""

Rows = list[dict[str, Any]]
Study = Callable[[Sequence[str]], Rows]
"""Takes overrides for its trainings and returns its rows."""


def few_labels(overrides: Sequence[str]) -> Rows:
    """Fine-tune from packaged weights on 5, 50 and 500 labelled tiles of each class."""
    rows = []
    for count, repeats in REPEATS_PER_EPOCH.items():
        settings = ["data=eurosat", "recipe=efficientnet-lite0-quick", f"data.per_class={count}"]
        settings += [f"trainer.repeats_per_epoch={repeats}", "trainer.epochs=4"]
        settings += ["optim.batch_size=32", "model.tta_views=1", *overrides]
        rows.append({"per_class": count, **_metrics(tracking.get(find_or_train(settings)))})
    draw_few_labels(rows, DOCS / "few-labels.png")
    return rows


def draw_few_labels(rows: Rows, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    counts = [row["per_class"] for row in rows]
    for name in ("test_accuracy", "test_macro_f1"):
        axes.plot(counts, [row[name] for row in rows], marker="o", label=name)
    for row in rows:
        point = (row["per_class"], row["test_accuracy"])
        axes.annotate(f"{point[1]:.3f}", point, (-36, 6), textcoords="offset points")
    axes.set(xscale="log", xlabel="labelled tiles of each class", xticks=counts)
    axes.set_xticklabels([str(count) for count in counts])
    axes.set_title("EfficientNet-Lite0 on EuroSAT RGB, 5,400 test tiles")
    axes.margins(0.1)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def curves(name: str) -> Study:
    """Return the study of ``experiments/ablations/NAME.yaml``: its metric by epoch and value."""

    def run_study(overrides: Sequence[str]) -> Rows:
        command = [sys.executable, "-m", "experiments.ablation", name, *overrides]
        run_id = run_command(command).split()[-1]
        commit = tracking.get(run_id).tags["code.commit"]
        with tracking.artifact(run_id, "study.csv") as file:
            table = list(csv.DictReader(file.read_text().splitlines()))
        with tracking.artifact(run_id, f"figures/{name}.png") as file:
            shutil.copy(file, DOCS / f"{name}.png")
        return [
            {key.split(".")[-1]: _number(value) for key, value in row.items()} | {"commit": commit}
            for row in table
        ]

    return run_study


def _number(text: str) -> float | str:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:  # a name
        return text


def bands(overrides: Sequence[str]) -> Rows:
    """Train on the same synthetic tiles in three colours and in all thirteen bands."""
    rows = []
    for selection in ("rgb", "all"):
        settings = ["data=synthetic", "recipe=resnet18-quick", "data.synthetic.bands=13"]
        settings += ["distill.teacher=none", "data.dtype=uint16", "trainer.epochs=12"]
        settings += ["data.synthetic.difficulty=2", f"data.bands={selection}"]
        settings += ["data.allow_unvalidated=true", "model.tta_views=1", *overrides]
        rows.append({"bands": selection, **_metrics(tracking.get(find_or_train(settings)))})
    return rows


def _metrics(run: tracking.RunRecord) -> dict[str, Any]:
    """Return test metrics and provenance of a run."""
    names = ("test_accuracy", "test_macro_f1", "test_macro_auprc")
    metrics: dict[str, Any] = {name: round(run.metrics[name], 4) for name in names}
    return metrics | {
        "epochs": int(run.metrics["epochs"]),
        "minutes": round(run.seconds / 60, 1),
        "seed": int(run.params["seed"]),
        "commit": run.tags["code.commit"],
    }


STUDIES: dict[str, Study] = {
    "few-labels": few_labels,
    "learning-rates": curves("learning-rates"),
    "features": curves("features"),
    "bands": bands,
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    args, overrides = parser.parse_known_args(argv)
    logs.setup("info")
    started = now()
    if args.study != "bands":
        validate()
    rows = STUDIES[args.study](overrides)
    report = json.loads(FILE.read_text()) if FILE.exists() else {}
    report[args.study] = {
        "started": started,
        "n": 1,
        "hardware": describe_hardware(),
        "command": " ".join(["python -m benchmarks.studies", args.study, *overrides]),
        "rows": rows,
    }
    FILE.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
