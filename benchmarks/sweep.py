"""bench-sweep: the accuracy that a pruned sweep finds for its epochs, against random search.

`python -m benchmarks.sweep [--repeats 3] [--epochs 5] [--random 16] [--ours 8]`: both arms search
the same space on the same 5,400 real tiles with two workers, in turn. Also writes
docs/bench-sweep.png.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import reports
from benchmarks.results import validate
from eurosat.config import compose
from eurosat.data.pack import open_pack
from eurosat.data.sources import open_source
from eurosat.runtime import hardware, logs

PER_CLASS = 540
SPACE = "resnet18-wide"
WORKERS = 2
ACCURACY_TOLERANCE = 0.003
"""Validation accuracies that differ by less count as equal."""
ARMS = {
    "random": ("sampler=RandomSampler", "pruner=none"),
    "ours": ("sampler=TPESampler", "pruner=asha"),
}
ARM_LABELS = {
    "random": "random trials, none stopped",
    "ours": "TPE, stopped by successive halving",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    best: float
    """Validation accuracy of the best finished trial."""
    best_by_epoch: tuple[float, ...]
    """The best validation accuracy so far after each epoch, over all trials in their order."""
    trials: int
    minutes: float
    core_use: float
    """CPU time of the sweep's processes, divided by wall time and number of cores."""

    @property
    def epochs(self) -> int:
        return len(self.best_by_epoch)


Results = dict[str, list[SweepResult]]
"""The repeats of each arm."""


def write_tiles(folder: Path) -> None:
    """Write PER_CLASS tiles of each class, always the same: those with the lowest sha256."""
    config = compose(["data=eurosat"]).data
    table, source = open_pack(config).table, open_source(config)
    for _, class_table in table.sort_values("sha256").groupby("class"):
        for path in class_table["path"].head(PER_CLASS):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(source.read(path))


def run_sweep(
    arm: str, trials: int, epochs: int, seed: int, tiles: Path, folder: Path
) -> SweepResult:
    """Run one sweep in its own process, with its own tracking store and study in ``folder``."""
    import optuna

    storage = f"sqlite:///{folder}/optuna.db"
    command = [
        sys.executable,
        "-m",
        "experiments.sweep",
        "data=folder",
        f"data.root={tiles}",
        "data.allow_unvalidated=true",
        "recipe=resnet18-quick",
        f"space={SPACE}",
        f"trials={trials}",
        f"trial_epochs={epochs}",
        f"workers={WORKERS}",
        *ARMS[arm],
        f"sampler_seed={seed}",
        f"seed={seed}",
        "refit=false",
        "study=it",
        f"storage={storage}",
    ]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    cpu_before_s, started = _child_cpu_s(), time.monotonic()
    process = subprocess.run(
        command, cwd=reports.ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    wall_s, cpu_s = time.monotonic() - started, _child_cpu_s() - cpu_before_s
    if process.returncode:
        sys.exit(process.returncode)
    study = optuna.load_study(study_name="it", storage=storage)
    best, best_by_epoch = 0.0, []
    for trial in study.trials:
        for _, accuracy in sorted(trial.intermediate_values.items()):
            best = max(best, accuracy)
            best_by_epoch.append(best)
    return SweepResult(
        best=study.best_value,
        best_by_epoch=tuple(best_by_epoch),
        trials=len(study.trials),
        minutes=wall_s / 60,
        core_use=cpu_s / (wall_s * hardware.cores()),
    )


def _child_cpu_s() -> float:
    """Return the CPU time of all ended child processes and of their children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def draw(results: Results, file: Path) -> None:
    """Plot the best accuracy so far by the epochs trained, one line per sweep."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm, colour in zip(ARMS, ("tab:gray", "tab:blue"), strict=True):
        for number, result in enumerate(results[arm]):
            axes.step(
                range(1, result.epochs + 1),
                result.best_by_epoch,
                where="post",
                color=colour,
                alpha=0.8,
                label=None if number else ARM_LABELS[arm],
            )
    axes.set(
        xlabel="epochs trained, over all trials",
        ylabel="best validation accuracy so far",
        title="ResNet18 on 5,400 EuroSAT tiles",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def gaps(results: Results) -> list[float]:
    """Return for each repeat how much our best accuracy is below that of random search."""
    pairs = zip(results["ours"], results["random"], strict=True)
    return [random.best - ours.best for ours, random in pairs]


def goals(results: Results) -> list[dict[str, Any]]:
    """Compare the medians over the repeats with their goals."""
    pairs = list(zip(results["ours"], results["random"], strict=True))
    share = statistics.median(ours.epochs / random.epochs for ours, random in pairs)
    gap = statistics.median(gaps(results))
    use = statistics.median(ours.core_use for ours, _ in pairs)
    return [
        reports.goal("sweep.epochs_share", share, 0.35, at_most=True),
        reports.goal("sweep.accuracy_gap", gap, ACCURACY_TOLERANCE, at_most=True),
        reports.goal("sweep.core_use", use, 0.9),
    ]


def _row(arm: str, trials: int, repeats: list[SweepResult]) -> dict[str, Any]:
    best = [result.best for result in repeats]
    core_use = statistics.median(result.core_use for result in repeats)
    return {
        "arm": arm,
        "what": ARM_LABELS[arm],
        "trials": trials,
        "epochs": statistics.median(result.epochs for result in repeats),
        "best_val_accuracy": round(statistics.median(best), 4),
        "low": round(min(best), 4),
        "high": round(max(best), 4),
        "minutes": round(statistics.median(result.minutes for result in repeats), 1),
        "core_use": round(core_use, 3),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--random", type=int, default=16, help="trials of random search")
    parser.add_argument("--ours", type=int, default=8, help="trials of TPE with pruning")
    args = parser.parse_args(argv)
    logs.setup("info")
    started, trials = reports.now(), {"random": args.random, "ours": args.ours}
    validate()
    results: Results = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as temporary:
        tiles = Path(temporary) / "tiles"
        write_tiles(tiles)
        for seed in range(args.repeats):
            for arm in ARMS:
                folder = Path(temporary) / f"{arm}-{seed}"
                folder.mkdir()
                result = run_sweep(arm, trials[arm], args.epochs, seed, tiles, folder)
                results[arm].append(result)
                print(
                    f"repeat {seed + 1} of {args.repeats}: {arm} {result.best:.4f} in "
                    f"{result.epochs} epochs, {result.minutes:.1f} min, "
                    f"{result.core_use:.0%} of the cores",
                    flush=True,
                )
    draw(results, reports.ROOT / "docs/bench-sweep.png")
    rows = [_row(arm, trials[arm], results[arm]) for arm in ARMS]
    reports.write(
        "sweep",
        started=started,
        n=args.repeats,
        goals=goals(results),
        rows=rows,
        trial_epochs=args.epochs,
        tiles=10 * PER_CLASS,
        gaps=[round(gap, 4) for gap in gaps(results)],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
