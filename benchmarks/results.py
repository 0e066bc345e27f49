"""Train a recipe on the real tiles with several seeds, and record the results.

`python -m benchmarks.results RECIPE [--seeds 0 1 2] [--protocol 60/20/20]` trains the runs that the
tracking server does not have yet. `--runs ID ...` uses finished runs instead, and `--add` keeps the
seeds that the row has, for a recipe that has not changed. It writes reports/results.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.reports import REPORTS, ROOT
from eurosat import tracking
from eurosat.config import PACKAGED, compose
from eurosat.runtime import logs

FILE = REPORTS / "results.json"
METRICS = ("accuracy", "macro_f1", "macro_auprc", "ece", "coverage")
"""Metrics of the test fold; a row holds the mean of each over the seeds."""
TEACHER_SEED = 0
"""Seed of the teacher, which is the same for all seeds of a recipe."""


def arguments(recipe: str, protocol: str, seed: int) -> list[str]:
    return ["data=eurosat", f"recipe={recipe}", f"data.protocol={protocol}", f"seed={seed}"]


def find_or_train(overrides: Sequence[str]) -> str:
    """Return the finished run of a configuration, which is trained if there is none."""
    config = compose(overrides)
    tags = {"config.digest": config.digest, "kind": "train"}
    if finished := tracking.finished_runs(config.experiment, tags):
        return finished[0]
    command = [sys.executable, "-m", "eurosat.train", *overrides]
    print(f"$ {' '.join(['python', *command[1:]])}", flush=True)
    return run_command(command).split()[-1]


def run_command(command: Sequence[str]) -> str:
    """Return the output of a command of the project; exit with its code if it fails."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def validate() -> None:
    """Validate the real tiles, which training requires."""
    print("validating the tiles", flush=True)
    run_command([sys.executable, "-m", "expectations.validate", "data=eurosat"])


def train_recipe(recipe: str, protocol: str, seed: int) -> str:
    """Return the run of a recipe on the real tiles; its teacher is trained first."""
    overrides = arguments(recipe, protocol, seed)
    teacher = compose(overrides).distill.teacher
    if teacher not in ("none", PACKAGED):
        overrides.append(f"distill.teacher=runs:/{train_recipe(teacher, protocol, TEACHER_SEED)}")
    return find_or_train(overrides)


def check(run: tracking.RunRecord) -> None:
    """Exit unless the run has finished on all real tiles, with the settings of its recipe."""
    recipe, protocol = run.params["recipe"], run.params["data.protocol"]
    overrides = arguments(recipe, protocol, int(run.params["seed"]))
    if (teacher := run.params["distill.teacher"]) != "none":
        overrides.append(f"distill.teacher={teacher}")
    if run.status != "FINISHED" or run.params["data.source"] != "eurosat":
        sys.exit(f"error: run {run.run_id} has not finished, or is not on the real tiles")
    if compose(overrides).digest != run.tags["config.digest"]:
        sys.exit(f"error: run {run.run_id} has other settings than {' '.join(overrides)}")


def seed_row(run: tracking.RunRecord) -> dict[str, Any]:
    """Return the results of one seed."""
    one_view = (
        "test_one_view_accuracy" if int(run.params["model.tta_views"]) > 1 else "test_accuracy"
    )
    metrics = {name: f"test_{name}" for name in METRICS} | {"one_view_accuracy": one_view}
    return {
        "seed": int(run.params["seed"]),
        **{name: round(run.metrics[metric], 5) for name, metric in metrics.items()},
        "minutes": round(run.seconds / 60, 1),
        "commit": run.tags["code.commit"],
    }


def summarise(
    runs: Sequence[tracking.RunRecord], earlier: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the row of one recipe and split, over its runs and ``earlier`` seeds."""
    recipe, split = runs[0].params["recipe"], runs[0].params["data.protocol"]
    for run in runs:
        check(run)
        if (run.params["recipe"], run.params["data.protocol"]) != (recipe, split):
            sys.exit(f"error: run {run.run_id} is not of recipe {recipe} and split {split}")
    by_seed = {row["seed"]: row for row in [*earlier, *map(seed_row, runs)]}
    rows = [by_seed[seed] for seed in sorted(by_seed)]

    def mean(name: str) -> float:
        return float(round(statistics.mean(row[name] for row in rows), 4))

    accuracies = [row["accuracy"] for row in rows]
    seeds = " ".join(str(row["seed"]) for row in rows)
    return {
        "recipe": recipe,
        "split": split,
        "n": len(rows),
        "accuracy_mean": mean("accuracy"),
        "accuracy_std": round(statistics.stdev(accuracies), 4) if rows[1:] else None,
        "views": int(runs[0].params["model.tta_views"]),
        **{f"{name}_mean": mean(name) for name in ("one_view_accuracy", *METRICS[1:])},
        "epochs": int(max(run.metrics["epochs"] for run in runs)),
        "minutes": round(statistics.mean(row["minutes"] for row in rows), 1),
        "hardware": runs[0].tags["compute.hardware"],
        "precision": runs[0].tags["compute.precision"],
        "command": f"python -m benchmarks.results {recipe} --protocol {split} --seeds {seeds}",
        "each": rows,
    }


def read_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else []
    return rows


def replace_row(new: dict[str, Any]) -> None:
    """Write the row in place of the one with the same recipe and split."""
    key = (new["recipe"], new["split"])
    others = [row for row in read_rows() if (row["recipe"], row["split"]) != key]
    rows = sorted([*others, new], key=lambda row: -row["accuracy_mean"])
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocol", default="60/20/20")
    parser.add_argument("--runs", nargs="+", help="ids of finished runs")
    parser.add_argument("--add", action="store_true", help="keep the seeds that the row has")
    args = parser.parse_args(argv)
    logs.setup("info")
    if not args.runs:
        validate()
    ids = args.runs or [train_recipe(args.recipe, args.protocol, seed) for seed in args.seeds]
    key = (args.recipe, args.protocol)
    earlier = [row["each"] for row in read_rows() if (row["recipe"], row["split"]) == key]
    runs = [tracking.get(run_id) for run_id in ids]
    new = summarise(runs, earlier[0] if earlier and args.add else [])
    replace_row(new)
    print(json.dumps(new, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
