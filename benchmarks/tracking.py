"""bench-tracking: the cost of logging one set of metrics per step, by server and logger.

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
"""Delay of each request to the far server."""
METRICS = ("train_loss_step", "train_accuracy_step", "lr")
ARMS = {
    "none": "no logging",
    "ours, near": "the journal, a server on this machine",
    "ours, far": "the journal, a server 50 ms away",
    "ours, gone": "the journal, no server at all",
    "MLFlowLogger, near": "Lightning's MLFlowLogger, a server on this machine",
    "MLFlowLogger, far": "Lightning's MLFlowLogger, a server 50 ms away",
}
"""What each arm logs to, by its name in the report."""
DRAIN_TIMEOUT_S = 60
"""Limit for sending what a turn has logged; it starts within `uploader.UPLOAD_INTERVAL_S`."""

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A way of logging to measure."""

    log_metrics: Log
    drain: Callable[[], None] = lambda: None
    """Wait until everything is sent."""


@contextmanager
def journal_arm(uri: str, *, is_reachable: bool = True) -> Iterator[Arm]:
    """Log through a journal; ``is_reachable`` says whether a server answers at ``uri``."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    with tracking.run("bench", "ours", system_metrics=False) as run:

        def drain() -> None:
            deadline = time.monotonic() + DRAIN_TIMEOUT_S
            while backlog := run.backlog():
                if time.monotonic() > deadline:
                    raise TrackingError(
                        f"{uri} did not accept {backlog} within {DRAIN_TIMEOUT_S} s: is it busy?"
                    )
                time.sleep(0.05)

        yield Arm(log_metrics=run.log_metrics, drain=drain if is_reachable else lambda: None)


@contextmanager
def lightning_arm(uri: str) -> Iterator[Arm]:
    """Log through Lightning's logger, which sends within the call."""
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("bench", tracking_uri=uri)
    yield Arm(log_metrics=logger.log_metrics)
    logger.finalize("success")


def time_steps(step: Callable[[], float], arm: Arm, seconds: float) -> tuple[float, float]:
    """Train and log for a while; return the seconds per step and per call of the logger.

    The rest is sent after the measured time, so that it does not slow the next arm.
    """
    started, steps, logging_s = time.perf_counter(), 0, 0.0
    while time.perf_counter() - started < seconds:
        loss = step()
        before = time.perf_counter()
        arm.log_metrics(dict.fromkeys(METRICS, loss), steps)
        logging_s += time.perf_counter() - before
        steps += 1
    total_s = time.perf_counter() - started
    arm.drain()
    return total_s / steps, logging_s / steps


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


@contextmanager
def open_arms(folder: Path) -> Iterator[dict[str, Arm]]:
    """Start the servers, and yield the arm for each name of ARMS."""
    with ExitStack() as stack:
        port = stack.enter_context(mlflow_server(folder))
        far = stack.enter_context(proxy(port))
        far.delay_s = FAR_DELAY_S
        near, nowhere = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
        yield {
            "none": Arm(log_metrics=lambda *_: None),
            "ours, near": stack.enter_context(journal_arm(near)),
            "ours, far": stack.enter_context(journal_arm(far.uri)),
            "ours, gone": stack.enter_context(journal_arm(nowhere, is_reachable=False)),
            "MLFlowLogger, near": stack.enter_context(lightning_arm(near)),
            "MLFlowLogger, far": stack.enter_context(lightning_arm(far.uri)),
        }


def measure(arms: dict[str, Arm], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Time all arms in every round, each round beginning with another; return the report's rows."""
    step, _ = make_step("resnet18-quick")
    step()
    for arm in arms.values():
        arm.drain()
    steps_s: dict[str, list[float]] = {name: [] for name in ARMS}
    calls_s: dict[str, list[float]] = {name: [] for name in ARMS}
    names = list(ARMS)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            step_s, call_s = time_steps(step, arms[name], seconds)
            steps_s[name].append(step_s)
            calls_s[name].append(call_s)
            print(
                f"round {number + 1} of {rounds}: {name} {1000 * step_s:.1f} ms per step, "
                f"{1000 * call_s:.3f} ms of it logging",
                flush=True,
            )
    return [report_row(name, steps_s[name], calls_s[name], steps_s["none"]) for name in ARMS]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each arm")
    parser.add_argument("--seconds", type=float, default=6, help="length of a turn")
    args = parser.parse_args(argv)
    logs.setup("info")
    torch.set_num_threads(hardware.cores())
    started = reports.now()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EUROSAT_CACHE"] = folder
        with open_arms(Path(folder)) as arms:
            rows = measure(arms, args.rounds, args.seconds)
    worst = max(row["overhead"] for row in rows if str(row["arm"]).startswith("ours"))
    goals = [reports.goal("tracking.overhead", worst, 0.01, at_most=True)]
    reports.write("tracking", started=started, n=args.rounds, goals=goals, rows=rows)


if __name__ == "__main__":
    main(sys.argv[1:])
