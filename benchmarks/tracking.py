"""bench-tracking: what logging one metric set a step costs a training, on a near and a far server.

`python -m benchmarks.tracking [--rounds 10] [--seconds 6]`
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import reports
from benchmarks.steps import make_step
from eurosat import tracking
from eurosat.errors import TrackingError
from eurosat.runtime import hardware, logs
from tests.support.mlflow_server import free_port, mlflow_server, proxy

FAR_DELAY_S = 0.05
METRICS = ("train_loss_step", "train_accuracy_step", "lr")
ARMS = {
    "none": "no logging",
    "ours, near": "the journal, a server on this machine",
    "ours, far": "the journal, a server 50 ms away",
    "ours, gone": "the journal, no server at all",
    "MLFlowLogger, near": "Lightning's MLFlowLogger, a server on this machine",
    "MLFlowLogger, far": "Lightning's MLFlowLogger, a server 50 ms away",
}

DRAIN_TIMEOUT_S = 60
"""A server that answers has what a turn logged within EVERY_S of `eurosat.tracking.uploader`."""

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    log_metrics: Log
    drain: Callable[[], None] = lambda: None
    """Returns once nothing waits to be sent."""


@contextmanager
def journal_arm(uri: str, *, is_reachable: bool = True) -> Iterator[Arm]:
    """``there`` says that a server answers at ``uri``: without one nothing is ever sent."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    with tracking.run("bench", "ours", system_metrics=False) as run:

        def drain() -> None:
            deadline = time.monotonic() + DRAIN_TIMEOUT_S
            while waiting := run.backlog():
                if time.monotonic() > deadline:
                    raise TrackingError(f"{uri} did not take {waiting} within {DRAIN_TIMEOUT_S} s")
                time.sleep(0.05)

        yield Arm(log_metrics=run.log_metrics, drain=drain if is_reachable else lambda: None)


@contextmanager
def lightning_arm(uri: str) -> Iterator[Arm]:
    """It sends within the call: nothing waits after it."""
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("bench", tracking_uri=uri)
    yield Arm(log_metrics=logger.log_metrics)
    logger.finalize("success")


def time_steps(step: Callable[[], float], arm: Arm, seconds: float) -> tuple[float, float]:
    """Train and log for a while; returns the seconds of a step, and of a call to the logger.

    What is left to be sent is sent after them, so that it does not slow the next arm's turn.
    """
    begun, steps, calling = time.perf_counter(), 0, 0.0
    while time.perf_counter() - begun < seconds:
        loss = step()
        called = time.perf_counter()
        arm.log_metrics(dict.fromkeys(METRICS, loss), steps)
        calling += time.perf_counter() - called
        steps += 1
    taken = time.perf_counter() - begun
    arm.drain()
    return taken / steps, calling / steps


def report_row(
    name: str, steps_s: Sequence[float], calls_s: Sequence[float], baseline_s: Any
) -> dict[str, Any]:
    return {
        "arm": name,
        "what": ARMS[name],
        "step_ms": round(1000 * statistics.median(steps_s), 2),
        "call_ms": round(1000 * statistics.median(calls_s), 3),
        "overhead": round(reports.median_ratio(steps_s, baseline_s) - 1, 4),
        "low": round(min(a / b for a, b in zip(steps_s, baseline_s, strict=True)) - 1, 4),
        "high": round(max(a / b for a, b in zip(steps_s, baseline_s, strict=True)) - 1, 4),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=6)
    args = parser.parse_args(argv)
    logs.setup("info")
    torch.set_num_threads(hardware.cores())
    started, (step, _) = reports.now(), make_step("resnet18-quick")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.environ["EUROSAT_CACHE"] = folder
        port = stack.enter_context(mlflow_server(Path(folder)))
        far = stack.enter_context(proxy(port))
        far.delay_s = FAR_DELAY_S
        near, gone = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
        arms: dict[str, Arm] = {
            "none": Arm(log_metrics=lambda *_: None),
            "ours, near": stack.enter_context(journal_arm(near)),
            "ours, far": stack.enter_context(journal_arm(far.uri)),
            "ours, gone": stack.enter_context(journal_arm(gone, is_reachable=False)),
            "MLFlowLogger, near": stack.enter_context(lightning_arm(near)),
            "MLFlowLogger, far": stack.enter_context(lightning_arm(far.uri)),
        }
        step()
        for arm in arms.values():
            arm.drain()
        steps: dict[str, list[float]] = {name: [] for name in ARMS}
        calls: dict[str, list[float]] = {name: [] for name in ARMS}
        for number in range(args.rounds):
            names = list(ARMS)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                of_step, of_call = time_steps(step, arms[name], args.seconds)
                steps[name].append(of_step)
                calls[name].append(of_call)
                print(
                    f"round {number + 1} of {args.rounds}: {name} {1000 * of_step:.1f} ms a step, "
                    f"{1000 * of_call:.3f} of it logging",
                    flush=True,
                )
        rows = [report_row(name, steps[name], calls[name], steps["none"]) for name in ARMS]
    worst = max(one["overhead"] for one in rows if str(one["arm"]).startswith("ours"))
    goals = [reports.goal("tracking.overhead", worst, 0.01, at_most=True)]
    reports.write("tracking", started=started, n=args.rounds, goals=goals, rows=rows)


if __name__ == "__main__":
    main(sys.argv[1:])
