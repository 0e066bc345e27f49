"""Train recipes on the real tiles over several seeds, and keep what they reach.

`python -m benchmarks.results RECIPE [--seeds 0 1 2] [--protocol 60/20/20]` trains what the tracking
server does not hold yet; `--runs ID ...` takes runs as they are, and `--add` keeps the seeds that
the row has, for a recipe that has not changed. Writes reports/results.json.
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
"""Of the test fold; the mean of each over the seeds stands in the row."""
TEACHER_SEED = 0
"""One teacher teaches all seeds of a recipe: it is part of the recipe, as a loss is."""


def arguments(recipe: str, protocol: str, seed: int) -> list[str]:
    return ["data=eurosat", f"recipe={recipe}", f"data.protocol={protocol}", f"seed={seed}"]


def find_or_train(given: Sequence[str]) -> str:
    """The run of this configuration: one that has finished, or a new one."""
    config = compose(given)
    tags = {"config.digest": config.digest, "kind": "train"}
    if held := tracking.finished_runs(config.experiment, tags):
        return held[0]
    command = [sys.executable, "-m", "eurosat.train", *given]
    print(f"$ {' '.join(['python', *command[1:]])}", flush=True)
    return run_command(command).split()[-1]


def run_command(command: Sequence[str]) -> str:
    """What a verb of ours prints; ends with its exit code where it fails, as it has said why."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def validate() -> None:
    """Validate the real tiles, which training requires."""
    print("validating the tiles", flush=True)
    run_command([sys.executable, "-m", "expectations.validate", "data=eurosat"])


def train_recipe(recipe: str, protocol: str, seed: int) -> str:
    """The run of a recipe on the real tiles, after that of its teacher."""
    given = arguments(recipe, protocol, seed)
    teacher = compose(given).distill.teacher
    if teacher not in ("none", PACKAGED):
        given.append(f"distill.teacher=runs:/{train_recipe(teacher, protocol, TEACHER_SEED)}")
    return find_or_train(given)


def check(run: tracking.RunRecord) -> None:
    """End where this run is not what the recipe says, on all of the real tiles."""
    recipe, split = run.params["recipe"], run.params["data.protocol"]
    given = arguments(recipe, split, int(run.params["seed"]))
    if (teacher := run.params["distill.teacher"]) != "none":
        given.append(f"distill.teacher={teacher}")
    if run.status != "FINISHED" or run.params["data.source"] != "eurosat":
        sys.exit(f"error: run {run.run_id} has not finished, or is not of the real tiles")
    if compose(given).digest != run.tags["config.digest"]:
        sys.exit(f"error: run {run.run_id} has other settings than {' '.join(given)}")


def seed_row(run: tracking.RunRecord) -> dict[str, Any]:
    """What one seed has reached."""
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


def summarise(runs: Sequence[tracking.RunRecord], held: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table, over runs of one recipe and split, and the seeds that it ``held``."""
    recipe, split = runs[0].params["recipe"], runs[0].params["data.protocol"]
    for run in runs:
        check(run)
        if (run.params["recipe"], run.params["data.protocol"]) != (recipe, split):
            sys.exit(f"error: run {run.run_id} is not of recipe {recipe} and split {split}")
    by_seed = {one["seed"]: one for one in [*held, *map(seed_row, runs)]}
    each = [by_seed[seed] for seed in sorted(by_seed)]

    def mean(name: str) -> float:
        return float(round(statistics.mean(one[name] for one in each), 4))

    accuracies = [one["accuracy"] for one in each]
    seeds = " ".join(str(one["seed"]) for one in each)
    return {
        "recipe": recipe,
        "split": split,
        "n": len(each),
        "accuracy_mean": mean("accuracy"),
        "accuracy_std": round(statistics.stdev(accuracies), 4) if each[1:] else None,
        "views": int(runs[0].params["model.tta_views"]),
        **{f"{name}_mean": mean(name) for name in ("one_view_accuracy", *METRICS[1:])},
        "epochs": int(max(run.metrics["epochs"] for run in runs)),
        "minutes": round(statistics.mean(one["minutes"] for one in each), 1),
        "hardware": runs[0].tags["compute.hardware"],
        "precision": runs[0].tags["compute.precision"],
        "command": f"python -m benchmarks.results {recipe} --protocol {split} --seeds {seeds}",
        "each": each,
    }


def read_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else []
    return rows


def replace_row(new: dict[str, Any]) -> None:
    """Put the row in the place of the one it replaces."""
    rows = [
        one for one in read_rows() if (one["recipe"], one["split"]) != (new["recipe"], new["split"])
    ]
    rows = sorted([*rows, new], key=lambda one: -one["accuracy_mean"])
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocol", default="60/20/20")
    parser.add_argument("--runs", nargs="+", help="ids of runs that have finished")
    parser.add_argument("--add", action="store_true", help="keep the seeds that the row has")
    args = parser.parse_args(argv)
    logs.setup("info")
    if not args.runs:
        validate()
    ids = args.runs or [train_recipe(args.recipe, args.protocol, seed) for seed in args.seeds]
    held = [
        one for one in read_rows() if (one["recipe"], one["split"]) == (args.recipe, args.protocol)
    ]
    new = summarise(
        [tracking.get(run_id) for run_id in ids], held[0]["each"] if held and args.add else []
    )
    replace_row(new)
    print(json.dumps(new, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
