"""bench-depthwise: training steps of EfficientNet-Lite0 with oneDNN's gradients and with ours.

`python -m benchmarks.depthwise [--rounds 5] [--seconds 6]`
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from benchmarks import reports
from benchmarks.steps import stepper
from eurosat import logs, machine
from eurosat.depthwise import fast_backward

RECIPE = "efficientnet-lite0"
CONTEXTS = {"native": nullcontext, "ours": fast_backward}
TOLD = {"native": "PyTorch's own gradients", "ours": "depthwise gradients by forward convolutions"}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    args = parser.parse_args(argv)
    logs.setup("info")
    torch.set_num_threads(machine.cores())
    started = reports.now()
    arms = {name: stepper(RECIPE, CONTEXTS[name]) for name in TOLD}
    for step, _ in arms.values():
        step()
    speeds: dict[str, list[float]] = {name: [] for name in TOLD}
    for number in range(args.rounds):
        for name, (step, batch) in arms.items():
            begun, tiles = time.perf_counter(), 0
            while time.perf_counter() - begun < args.seconds:
                step()
                tiles += batch
            speeds[name].append(tiles / (time.perf_counter() - begun))
            rate = speeds[name][-1]
            print(f"round {number + 1} of {args.rounds}: {name} {rate:,.0f} images/s", flush=True)
    rows = [reports.speed(name, each) | {"what": TOLD[name]} for name, each in speeds.items()]
    gain = reports.ratio(speeds["ours"], speeds["native"])
    goals = [reports.goal("depthwise.vs_native", gain, 1.5)]
    reports.write("depthwise", started=started, n=args.rounds, goals=goals, rows=rows)


if __name__ == "__main__":
    main(sys.argv[1:])
