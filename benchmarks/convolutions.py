"""bench-convolutions: training steps with PyTorch's own convolutions on a CPU and with ours.

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
"""By recipe, how many times as fast: a network of small maps, one of depthwise convolutions."""
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
        (recipe, name): make_step(recipe, within)
        for recipe in GOALS
        for name, within in CONTEXTS.items()
    }
    for step, _ in arms.values():
        step()
    speeds: dict[tuple[str, str], list[float]] = {key: [] for key in arms}
    for number in range(args.rounds):
        for (recipe, name), (step, batch) in arms.items():
            begun, tiles = time.perf_counter(), 0
            while time.perf_counter() - begun < args.seconds:
                step()
                tiles += batch
            rate = tiles / (time.perf_counter() - begun)
            speeds[recipe, name].append(rate)
            told = f"round {number + 1} of {args.rounds}: {recipe}, {name} {rate:,.0f} images/s"
            print(told, flush=True)
    rows = [
        reports.speed(name, each) | {"recipe": recipe} for (recipe, name), each in speeds.items()
    ]
    goals = [
        reports.goal(
            f"convolutions.{recipe}_vs_native",
            reports.median_ratio(speeds[recipe, "ours"], speeds[recipe, "native"]),
            wanted,
        )
        for recipe, wanted in GOALS.items()
    ]
    reports.write("convolutions", started=started, n=args.rounds, goals=goals, rows=rows)


if __name__ == "__main__":
    main(sys.argv[1:])
