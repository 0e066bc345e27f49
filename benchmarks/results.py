"""Train recipes on the real tiles over several seeds, and keep what they reach.

`python -m benchmarks.results RECIPE [--seeds 0 1 2] [--protocol 60/20/20]` trains what the tracking
server does not hold yet; `--runs ID ...` takes runs as they are. Writes reports/results.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.reports import REPORTS, ROOT
from eurosat import logs, tracking
from eurosat.config import compose

FILE = REPORTS / "results.json"


def arguments(recipe: str, protocol: str, seed: int) -> list[str]:
    return ["data=eurosat", f"recipe={recipe}", f"data.protocol={protocol}", f"seed={seed}"]


def trained(given: Sequence[str]) -> str:
    """The run of this configuration: one that has finished, or a new one."""
    config = compose(given)
    tags = {"config.digest": config.digest, "kind": "train"}
    if held := tracking.finished_runs(config.experiment, tags):
        return held[0]
    command = [sys.executable, "-m", "eurosat.train", *given]
    print(f"$ {' '.join(['python', *command[1:]])}", flush=True)
    return said(command).split()[-1]


def said(command: Sequence[str]) -> str:
    """What a verb of ours prints; ends with its exit code where it fails, as it has said why."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def validate() -> None:
    """Give the real tiles the receipt that training asks for."""
    print("validating the tiles", flush=True)
    said([sys.executable, "-m", "expectations.validate", "data=eurosat"])


def taught(recipe: str, protocol: str, seed: int) -> str:
    """The run of a recipe on the real tiles, after that of its teacher with the same seed."""
    given = arguments(recipe, protocol, seed)
    teacher = compose(given).distill.teacher
    if teacher != "none":
        given.append(f"distill.teacher=runs:/{taught(teacher, protocol, seed)}")
    return trained(given)


def check(run: tracking.FinishedRun) -> None:
    """End where this run is not what the recipe says, on all of the real tiles."""
    recipe, split = run.params["recipe"], run.params["data.protocol"]
    given = arguments(recipe, split, int(run.params["seed"]))
    if (teacher := run.params["distill.teacher"]) != "none":
        given.append(f"distill.teacher={teacher}")
    if run.status != "FINISHED" or run.params["data.source"] != "eurosat":
        sys.exit(f"error: run {run.run_id} has not finished, or is not of the real tiles")
    if compose(given).digest != run.tags["config.digest"]:
        sys.exit(f"error: run {run.run_id} has other settings than {' '.join(given)}")


def row(runs: Sequence[tracking.FinishedRun]) -> dict[str, Any]:
    """One line of the table, over runs of one recipe and split that differ by their seed."""
    recipe, split = runs[0].params["recipe"], runs[0].params["data.protocol"]
    for run in runs:
        check(run)
        if (run.params["recipe"], run.params["data.protocol"]) != (recipe, split):
            sys.exit(f"error: run {run.run_id} is not of recipe {recipe} and split {split}")
    seeds = sorted(int(run.params["seed"]) for run in runs)
    views = int(runs[0].params["model.views"])
    one_view = "test_one_view_accuracy" if views > 1 else "test_accuracy"

    def each(metric: str) -> list[float]:
        return [run.metrics[metric] for run in runs]

    return {
        "recipe": recipe,
        "split": split,
        "n": len(runs),
        "accuracy_mean": round(statistics.mean(each("test_accuracy")), 4),
        "accuracy_std": round(statistics.stdev(each("test_accuracy")), 4) if seeds[1:] else None,
        "views": views,
        "one_view_accuracy_mean": round(statistics.mean(each(one_view)), 4),
        "ece_mean": round(statistics.mean(each("test_ece")), 4),
        "coverage_mean": round(statistics.mean(each("test_coverage")), 4),
        "macro_f1_mean": round(statistics.mean(each("test_macro_f1")), 4),
        "macro_auprc_mean": round(statistics.mean(each("test_macro_auprc")), 4),
        "epochs": int(max(each("epochs"))),
        "minutes": round(statistics.mean(run.seconds / 60 for run in runs), 1),
        "hardware": runs[0].tags["compute.hardware"],
        "precision": runs[0].tags["compute.precision"],
        "seeds": seeds,
        "commit": runs[0].tags["code.commit"],
        "command": f"python -m benchmarks.results {recipe} --protocol {split} "
        f"--seeds {' '.join(map(str, seeds))}",
    }


def keep(new: dict[str, Any]) -> None:
    """Put the row in the place of the one it replaces."""
    rows = json.loads(FILE.read_text()) if FILE.exists() else []
    rows = [one for one in rows if (one["recipe"], one["split"]) != (new["recipe"], new["split"])]
    rows = sorted([*rows, new], key=lambda one: -one["accuracy_mean"])
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocol", default="60/20/20")
    parser.add_argument("--runs", nargs="+", help="ids of runs that have finished")
    args = parser.parse_args(argv)
    logs.setup("info")
    if not args.runs:
        validate()
    ids = args.runs or [taught(args.recipe, args.protocol, seed) for seed in args.seeds]
    new = row([tracking.get(run_id) for run_id in ids])
    keep(new)
    print(json.dumps(new, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
