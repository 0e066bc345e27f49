"""bench-convolutions: training steps with PyTorch's own CPU convolutions and with this project's.

`python -m benchmarks.convolutions [--rounds 5] [--seconds 6]`
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from benchmarks import reports
from benchmarks.steps import make_step
from eurosat.models import cpu_convolutions
from eurosat.runtime import hardware, logs

GOALS = {"resnet18": 1.3, "efficientnet-lite0": 1.5}
"""Speed-up to reach by recipe: a network with small maps, one with depthwise convolutions."""
CONTEXTS = {"native": nullcontext, "ours": cpu_convolutions.fast}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    args = parser.parse_args(argv)
    logs.setup("info")
    torch.set_num_threads(hardware.cores())
    started = reports.now()
    arms = {
        (recipe, name): make_step(recipe, context)
        for recipe in GOALS
        for name, context in CONTEXTS.items()
    }
    for step, _ in arms.values():
        step()
    speeds: dict[tuple[str, str], list[float]] = {key: [] for key in arms}
    for number in range(args.rounds):
        for (recipe, name), (step, batch) in arms.items():
            start, tiles = time.perf_counter(), 0
            while time.perf_counter() - start < args.seconds:
                step()
                tiles += batch
            rate = tiles / (time.perf_counter() - start)
            speeds[recipe, name].append(rate)
            progress = f"round {number + 1} of {args.rounds}"
            print(f"{progress}: {recipe}, {name} {rate:,.0f} images/s", flush=True)
    rows = [
        reports.speed(name, rates) | {"recipe": recipe} for (recipe, name), rates in speeds.items()
    ]
    goals = [
        reports.goal(
            f"convolutions.{recipe}_vs_native",
            reports.median_ratio(speeds[recipe, "ours"], speeds[recipe, "native"]),
            speedup,
        )
        for recipe, speedup in GOALS.items()
    ]
    reports.write("convolutions", started=started, n=args.rounds, goals=goals, rows=rows)


if __name__ == "__main__":
    main(sys.argv[1:])
