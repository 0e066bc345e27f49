"""bench-serving: this project's server and its peers in turn, with one JPEG tile per request.

`python -m benchmarks.serving [--litserve PYTHON] [--bentoml PYTHON] [--rounds 3] [--seconds 5]`
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import reports
from benchmarks.serving import arms, model
from benchmarks.serving.arms import Arm
from benchmarks.serving.load import Requests, check_installed, load
from benchmarks.serving.model import ServedModel
from benchmarks.serving.process import Server, running
from benchmarks.serving.summary import GOAL_CONCURRENCY, LIMIT, Measurement, goals, rows
from eurosat.runtime import exit_codes, logs, telemetry
from tests.support.mlflow_server import free_port

CONCURRENCIES = (1, 8, GOAL_CONCURRENCY, 128)
WARM_S = 1
FIRST_WARM_S = 3
"""Warm-up before the first round, at each concurrency: adaptive batching learns from it."""
SCAN_S = 1.0
"""Time for each setting of ONNX Runtime that is tried."""


class Limit:
    """ONNX Runtime alone, in its fastest setting on this machine."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self.best = self._run(SCAN_S)

    def rate(self, seconds: float) -> float:
        """Return tiles per second."""
        setting = (str(self.best["batch"]), str(self.best["sessions"]))
        return float(self._run(seconds, *setting)["tiles_per_s"])

    def _run(self, seconds: float, *setting: str) -> Any:
        command = [sys.executable, "-m", "benchmarks.serving.limit", str(self._served.folder)]
        done = subprocess.run(
            [*command, str(seconds), *setting],
            cwd=reports.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)


def start(
    arm: Arm, served: ServedModel, folder: Path, stack: ExitStack
) -> tuple[Server, Requests, float]:
    """Start, check, warm up and pause a server; return it with its requests and idle CPU share."""
    port = free_port()
    environment = arm.environment(served) | {"BENTOML_HOME": str(folder / "bentoml")}
    server = stack.enter_context(
        running(arm.name, arm.command(served, port), environment, port, arm.ready, folder)
    )
    arm.check(served, port)
    requests = arm.requests(served, folder)
    for concurrency in CONCURRENCIES:
        load(port, requests, concurrency, FIRST_WARM_S)
        server.settle()
    idle = server.idle_cores()
    server.pause()
    print(f"{arm.name} is ready; idle, it uses {idle:.1%} of a core", flush=True)
    return server, requests, idle


def measure(
    chosen: Sequence[Arm], served: ServedModel, rounds: int, seconds: int, folder: Path
) -> tuple[list[Measurement], dict[str, float], Mapping[str, Any]]:
    """Return all measurements, the idle CPU share of each server, and the setting of the limit."""
    measurements: list[Measurement] = []
    with ExitStack() as stack:
        limit = Limit(served)
        print(f"the limit: {limit.best}", flush=True)
        started = {arm.name: start(arm, served, folder, stack) for arm in chosen}
        names = [*started, LIMIT]
        for number in range(rounds):
            shift = number % len(names)
            for concurrency in CONCURRENCIES:
                for name in [*names[shift:], *names[:shift]]:
                    if name != LIMIT:
                        server, requests, _ = started[name]
                        result = measure_one(server, requests, number, concurrency, seconds)
                    elif concurrency == GOAL_CONCURRENCY:
                        result = Measurement(
                            arm=LIMIT,
                            round=number,
                            concurrency=GOAL_CONCURRENCY,
                            rate=limit.rate(seconds),
                        )
                    else:
                        continue
                    measurements.append(result)
                    print(f"round {number + 1} of {rounds}: {result.describe()}", flush=True)
    return measurements, {name: idle for name, (_, _, idle) in started.items()}, limit.best


def measure_one(
    server: Server, requests: Requests, number: int, concurrency: int, seconds: int
) -> Measurement:
    """Measure a server in round ``number``, and pause it again."""
    server.resume()
    load(server.port, requests, concurrency, WARM_S)
    server.settle()
    result = load(server.port, requests, concurrency, seconds)
    memory_mb = server.memory_mb()
    server.settle()
    server.pause()
    latencies = {}  # without answers there are no latencies
    if result.answered:
        latencies = {"p50_ms": result.p50_ms, "p95_ms": result.p95_ms, "p99_ms": result.p99_ms}
    return Measurement(
        arm=server.name,
        round=number,
        concurrency=concurrency,
        rate=result.rate,
        errors=result.errors,
        memory_mb=memory_mb,
        **latencies,
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--litserve", help="python of an environment with LitServe and FastAPI")
    parser.add_argument("--bentoml", help="python of an environment with BentoML")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument(
        "--retrain", action="store_true", help="train the network again, though it is cached"
    )
    parser.add_argument("--arms", nargs="+", help="measure only these, without writing the report")
    args = parser.parse_args(argv)
    logs.setup("info")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(exit_codes.TERMINATED)
    )  # no server is left behind
    check_installed()
    available = [*arms.ours(), *arms.peers(args.litserve, args.bentoml)]
    known = {arm.name for arm in available}
    if unknown := set(args.arms or ()) - known:
        sys.exit(
            f"error: no arm {', '.join(sorted(unknown))}: choose of {', '.join(sorted(known))}"
        )
    chosen = [arm for arm in available if arm.name in (args.arms or known)]
    started = reports.now()
    os.environ |= telemetry.OFF
    served = model.prepare(retrain=args.retrain)
    with tempfile.TemporaryDirectory() as temporary:
        measurements, idle, best = measure(
            chosen, served, args.rounds, args.seconds, Path(temporary)
        )
    descriptions = {arm.name: arm.description for arm in chosen} | {
        LIMIT: "ONNX Runtime alone, decoded tiles"
    }
    table, verdicts = rows(measurements, list(descriptions), idle), goals(measurements)
    if args.arms:
        reports.show("serving", args.rounds, verdicts, table)
        return
    reports.write(
        "serving",
        started=started,
        n=args.rounds,
        goals=verdicts,
        rows=table,
        file=served.file,
        arms=descriptions,
        limit=best,
        seconds_per_turn=args.seconds,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
