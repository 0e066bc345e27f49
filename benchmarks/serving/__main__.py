"""bench-serving: this project's server against its peers, one JPEG tile a request, interleaved.

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
from benchmarks.serving.figures import AT, LIMIT, Turn, goals, rows
from benchmarks.serving.load import Requests, check_installed, load
from benchmarks.serving.model import Served
from benchmarks.serving.process import Server, running
from eurosat.runtime import exit_codes, logs, telemetry
from tests.support.mlflow_server import free_port

CONCURRENCIES = (1, 8, AT, 128)
WARM_S = 1
FIRST_WARM_S = 3
"""Before the first round, at each concurrency: adaptive batching learns from it."""
SCAN_S = 1.0
"""For each setting of the limit that is tried."""


class Limit:
    """ONNX Runtime alone, in the setting that is its fastest here."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.best = self._ask(SCAN_S)

    def turn(self, seconds: float) -> float:
        """Tiles a second."""
        setting = (str(self.best["batch"]), str(self.best["sessions"]))
        return float(self._ask(seconds, *setting)["tiles_per_s"])

    def _ask(self, seconds: float, *setting: str) -> Any:
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
    arm: Arm, served: Served, folder: Path, stack: ExitStack
) -> tuple[Server, Requests, float]:
    """Stands ready, has answered rightly and warmed up, and is paused; with its idle CPU time."""
    port = free_port()
    surroundings = arm.surroundings(served) | {"BENTOML_HOME": str(folder / "bentoml")}
    server = stack.enter_context(
        running(arm.name, arm.command(served, port), surroundings, port, arm.ready, folder)
    )
    arm.check(served, port)
    requests = arm.requests(served, folder)
    for concurrency in CONCURRENCIES:
        load(port, requests, concurrency, FIRST_WARM_S)
        server.settle()
    idle = server.idle_cores()
    server.pause()
    print(f"{arm.name} stands ready, and takes {idle:.1%} of a core to do so", flush=True)
    return server, requests, idle


def measure(
    chosen: Sequence[Arm], served: Served, rounds: int, seconds: int, folder: Path
) -> tuple[list[Turn], dict[str, float], Mapping[str, Any]]:
    """The turns of all, the idle CPU time of each, and the setting of the limit."""
    turns: list[Turn] = []
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
                        one = turn(server, requests, number, concurrency, seconds)
                    elif concurrency == AT:
                        rate = limit.turn(seconds)
                        one = Turn(arm=LIMIT, round=number, concurrency=AT, rate=rate)
                    else:
                        continue
                    turns.append(one)
                    print(f"round {number + 1} of {rounds}: {one.told()}", flush=True)
    return turns, {name: idle for name, (_, _, idle) in started.items()}, limit.best


def turn(server: Server, requests: Requests, number: int, concurrency: int, seconds: int) -> Turn:
    server.resume()
    load(server.port, requests, concurrency, WARM_S)
    server.settle()
    took = load(server.port, requests, concurrency, seconds)
    memory_mb = server.memory_mb()
    server.settle()
    server.pause()
    latencies = {}  # of no answers there are none
    if took.answered:
        latencies = {"p50_ms": took.p50_ms, "p95_ms": took.p95_ms, "p99_ms": took.p99_ms}
    return Turn(
        arm=server.name,
        round=number,
        concurrency=concurrency,
        rate=took.rate,
        errors=took.errors,
        memory_mb=memory_mb,
        **latencies,
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--litserve", help="python of an environment with LitServe and FastAPI")
    parser.add_argument("--bentoml", help="python of an environment with BentoML")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--retrain", action="store_true", help="the network, though it is cached")
    parser.add_argument("--arms", nargs="+", help="only these; the report is left as it is")
    args = parser.parse_args(argv)
    logs.setup("info")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(exit_codes.TERMINATED)
    )  # no server is left behind
    check_installed()
    every = [*arms.ours(), *arms.peers(args.litserve, args.bentoml)]
    known = {arm.name for arm in every}
    if unknown := set(args.arms or ()) - known:
        sys.exit(
            f"error: no arm {', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}"
        )
    chosen = [arm for arm in every if arm.name in (args.arms or known)]
    started = reports.now()
    os.environ |= telemetry.OFF
    served = model.served(retrain=args.retrain)
    with tempfile.TemporaryDirectory() as temporary:
        turns, idle, best = measure(chosen, served, args.rounds, args.seconds, Path(temporary))
    told = {arm.name: arm.what for arm in chosen} | {LIMIT: "ONNX Runtime alone, decoded tiles"}
    table, verdicts = rows(turns, list(told), idle), goals(turns)
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
        arms=told,
        limit=best,
        seconds_per_turn=args.seconds,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
