"""bench-depthwise: training steps of EfficientNet-Lite0 with oneDNN's gradients and with ours.

`python -m benchmarks.depthwise [--rounds 5] [--seconds 6]`
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from benchmarks import reports
from eurosat import logs, machine, network
from eurosat.config import compose
from eurosat.depthwise import fast_backward
from eurosat.module import make_optimizer

RECIPE = "efficientnet-lite0"
CONTEXTS = {"native": nullcontext, "ours": fast_backward}
TOLD = {"native": "PyTorch's own gradients", "ours": "depthwise gradients by forward convolutions"}


def stepper(name: str) -> Callable[[], int]:
    """One training step on a random batch, again and again; returns the number of tiles."""
    config = compose([f"recipe={RECIPE}"])
    torch.manual_seed(0)
    spec = network.NetworkSpec(
        name=config.model.name, classes=tuple("abcdefghij"), bands=3, tile_size=(64, 64),
        input_size=config.model.input_size, norm="batch", drop_rate=0.0,
        mean=(100.0,) * 3, std=(50.0,) * 3,
    )  # fmt: skip
    net = network.untrained(spec).train()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(net, config.optim)
    tiles = torch.rand(config.optim.batch_size, 3, 64, 64) * 255
    labels = torch.randint(0, 10, (len(tiles),))

    def step() -> int:
        with torch.autocast("cpu", torch.bfloat16), CONTEXTS[name]():
            loss = torch.nn.functional.cross_entropy(net(tiles).float(), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return len(tiles)

    return step


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    args = parser.parse_args(argv)
    logs.setup("info")
    torch.set_num_threads(machine.cores())
    started = reports.now()
    arms = {name: stepper(name) for name in TOLD}
    for step in arms.values():
        step()
    speeds: dict[str, list[float]] = {name: [] for name in TOLD}
    for number in range(args.rounds):
        for name, step in arms.items():
            begun, tiles = time.perf_counter(), 0
            while time.perf_counter() - begun < args.seconds:
                tiles += step()
            speeds[name].append(tiles / (time.perf_counter() - begun))
            rate = speeds[name][-1]
            print(f"round {number + 1} of {args.rounds}: {name} {rate:,.0f} images/s", flush=True)
    rows = [reports.speed(name, each) | {"what": TOLD[name]} for name, each in speeds.items()]
    gain = reports.ratio(speeds["ours"], speeds["native"])
    goals = [reports.goal("depthwise.vs_native", gain, 1.5)]
    reports.write("depthwise", started=started, n=args.rounds, goals=goals, rows=rows)


if __name__ == "__main__":
    main(sys.argv[1:])
