"""bench-sweep: what a sweep finds for the epochs it trains, against random trials unpruned.

`python -m benchmarks.sweep [--repeats 3] [--epochs 5] [--random 16] [--ours 8]`: both search the
same space on the same 5,400 real tiles with two workers, in turn. Writes docs/bench-sweep.png too.
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
GAP = 0.003
"""Of validation accuracy: nearer than this to the best random trial is as good."""
ARMS = {
    "random": ("sampler=RandomSampler", "pruner=none"),
    "ours": ("sampler=TPESampler", "pruner=asha"),
}
TOLD = {"random": "random trials, none stopped", "ours": "TPE, stopped by successive halving"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """What one sweep came to."""

    best: float
    """Validation accuracy of the best finished trial."""
    reached: tuple[float, ...]
    """The best validation accuracy of any trial after each epoch that was trained, in order of
    the trials."""
    trials: int
    minutes: float
    core_use: float
    """CPU time over wall time and cores, from the start of its process to its end."""

    @property
    def epochs(self) -> int:
        return len(self.reached)


def write_tiles(folder: Path) -> None:
    """The same PER_CLASS tiles of each class for all sweeps: those whose sha256 comes first."""
    config = compose(["data=eurosat"]).data
    table, source = open_pack(config).table, open_source(config)
    for _, of_class in table.sort_values("sha256").groupby("class"):
        for path in of_class["path"].head(PER_CLASS):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(source.read(path))


def search(arm: str, trials: int, epochs: int, seed: int, tiles: Path, folder: Path) -> Searched:
    """One sweep in a process of its own, with a store and a study of its own."""
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
    own = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    before, began = _cpu_s(), time.monotonic()
    done = subprocess.run(command, cwd=reports.ROOT, env=own, stdout=subprocess.PIPE, text=True)
    wall_s, cpu_s = time.monotonic() - began, _cpu_s() - before
    if done.returncode:
        sys.exit(done.returncode)
    study = optuna.load_study(study_name="it", storage=storage)
    best, reached = 0.0, []
    for trial in study.trials:
        for _, accuracy in sorted(trial.intermediate_values.items()):
            best = max(best, accuracy)
            reached.append(best)
    return Searched(
        best=study.best_value,
        reached=tuple(reached),
        trials=len(study.trials),
        minutes=wall_s / 60,
        core_use=cpu_s / (wall_s * hardware.cores()),
    )


def _cpu_s() -> float:
    """Of the processes that have ended below this one, and of those below them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def draw(found: dict[str, list[Searched]], file: Path) -> None:
    """The best accuracy so far by the epochs trained, a line a sweep."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm, colour in zip(ARMS, ("tab:gray", "tab:blue"), strict=True):
        for number, one in enumerate(found[arm]):
            axes.step(
                range(1, one.epochs + 1),
                one.reached,
                where="post",
                color=colour,
                alpha=0.8,
                label=None if number else TOLD[arm],
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


def gaps(found: dict[str, list[Searched]]) -> list[float]:
    """What ours lacks of the best random trial, a repeat."""
    pairs = zip(found["ours"], found["random"], strict=True)
    return [random.best - ours.best for ours, random in pairs]


def goals(found: dict[str, list[Searched]]) -> list[dict[str, Any]]:
    """Medians over the repeats."""
    pairs = list(zip(found["ours"], found["random"], strict=True))
    share = statistics.median(ours.epochs / random.epochs for ours, random in pairs)
    gap = statistics.median(gaps(found))
    use = statistics.median(ours.core_use for ours, _ in pairs)
    return [
        reports.goal("sweep.epochs_share", share, 0.35, at_most=True),
        reports.goal("sweep.accuracy_gap", gap, GAP, at_most=True),
        reports.goal("sweep.core_use", use, 0.9),
    ]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--random", type=int, default=16, help="trials that are not stopped")
    parser.add_argument("--ours", type=int, default=8)
    args = parser.parse_args(argv)
    logs.setup("info")
    started, trials = reports.now(), {"random": args.random, "ours": args.ours}
    validate()
    found: dict[str, list[Searched]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as temporary:
        tiles = Path(temporary) / "tiles"
        write_tiles(tiles)
        for seed in range(args.repeats):
            for arm in ARMS:
                folder = Path(temporary) / f"{arm}-{seed}"
                folder.mkdir()
                one = search(arm, trials[arm], args.epochs, seed, tiles, folder)
                found[arm].append(one)
                print(
                    f"repeat {seed + 1} of {args.repeats}: {arm} {one.best:.4f} in {one.epochs} "
                    f"epochs, {one.minutes:.1f} min, {one.core_use:.0%} of the cores",
                    flush=True,
                )
    draw(found, reports.ROOT / "docs/bench-sweep.png")
    rows = [
        {
            "arm": arm,
            "what": TOLD[arm],
            "trials": trials[arm],
            "epochs": statistics.median(one.epochs for one in found[arm]),
            "best_val_accuracy": round(statistics.median(one.best for one in found[arm]), 4),
            "low": round(min(one.best for one in found[arm]), 4),
            "high": round(max(one.best for one in found[arm]), 4),
            "minutes": round(statistics.median(one.minutes for one in found[arm]), 1),
            "core_use": round(statistics.median(one.core_use for one in found[arm]), 3),
        }
        for arm in ARMS
    ]
    reports.write(
        "sweep",
        started=started,
        n=args.repeats,
        goals=goals(found),
        rows=rows,
        trial_epochs=args.epochs,
        tiles=10 * PER_CLASS,
        gaps=[round(gap, 4) for gap in gaps(found)],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
