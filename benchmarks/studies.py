"""Studies beside the results table: `python -m benchmarks.studies STUDY [key=value ...]`.

STUDY is few-labels, learning-rates, features or bands. Each leaves its rows in
reports/results-extra.json and, where there is a curve, a figure in docs/. Arguments after the
study's name go to its trainings, such as `seed=1`.
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

FILE = REPORTS / "results-extra.json"
DOCS = ROOT / "docs"
REPEATS_PER_EPOCH = {5: 20, 50: 6, 500: 1}
"""Of few labels, in each epoch: more passes over fewer tiles, so that each count gets its steps."""

Rows = list[dict[str, Any]]
Study = Callable[[Sequence[str]], Rows]
"""Takes further arguments for its trainings."""


def few_labels(further: Sequence[str]) -> Rows:
    """Test accuracy against labelled tiles a class, fine-tuned from packaged weights."""
    rows = []
    for count, passes in REPEATS_PER_EPOCH.items():
        given = ["data=eurosat", "recipe=efficientnet-lite0-quick", f"data.per_class={count}"]
        given += [f"trainer.repeats_per_epoch={passes}", "trainer.epochs=4", "optim.batch_size=32"]
        given += ["model.tta_views=1", *further]
        rows.append({"per_class": count, **_metrics(tracking.get(find_or_train(given)))})
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
        told = f"{row['test_accuracy']:.3f}"
        axes.annotate(
            told, (row["per_class"], row["test_accuracy"]), (-36, 6), textcoords="offset points"
        )
    axes.set(xscale="log", xlabel="labelled tiles of each class", xticks=counts)
    axes.set_xticklabels([str(count) for count in counts])
    axes.set_title("EfficientNet-Lite0 on EuroSAT RGB, 5,400 test tiles")
    axes.margins(0.1)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def curves(name: str) -> Study:
    """The curves of ``experiments/ablations/NAME.yaml``: its metric by epoch for each value."""

    def ask(further: Sequence[str]) -> Rows:
        run_id = run_command(
            [sys.executable, "-m", "experiments.ablation", name, *further]
        ).split()[-1]
        commit = tracking.get(run_id).tags["code.commit"]
        with tracking.artifact(run_id, "study.csv") as file:
            read = list(csv.DictReader(file.read_text().splitlines()))
        with tracking.artifact(run_id, f"figures/{name}.png") as file:
            shutil.copy(file, DOCS / f"{name}.png")
        return [
            {key.split(".")[-1]: _number(value) for key, value in row.items()} | {"commit": commit}
            for row in read
        ]

    return ask


def _number(text: str) -> float | str:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:  # a key whose values are names
        return text


def bands(further: Sequence[str]) -> Rows:
    """The same synthetic tiles in three colours and in all thirteen bands."""
    rows = []
    for chosen in ("rgb", "all"):
        given = ["data=synthetic", "recipe=resnet18-quick", "data.synthetic.bands=13"]
        given += ["distill.teacher=none", "data.dtype=uint16", "trainer.epochs=12"]
        given += ["data.synthetic.difficulty=2"]
        given += [f"data.bands={chosen}", "data.allow_unvalidated=true", "model.tta_views=1"]
        rows.append({"bands": chosen, **_metrics(tracking.get(find_or_train([*given, *further])))})
    return rows


def _metrics(run: tracking.RunRecord) -> dict[str, Any]:
    names = ("test_accuracy", "test_macro_f1", "test_macro_auprc")
    merits: dict[str, Any] = {name: round(run.metrics[name], 4) for name in names}
    return merits | {
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
    args, further = parser.parse_known_args(argv)
    logs.setup("info")
    started = now()
    if args.study != "bands":
        validate()
    rows = STUDIES[args.study](further)
    held = json.loads(FILE.read_text()) if FILE.exists() else {}
    held[args.study] = {
        "started": started,
        "n": 1,
        "hardware": describe_hardware(),
        "command": " ".join(["python -m benchmarks.studies", args.study, *further]),
        "rows": rows,
    }
    FILE.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
