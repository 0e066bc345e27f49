"""bench-overload: our server under overload, during swaps of its version, and over a long time.

`python -m benchmarks.serving.overload [--seconds 60] [--soak MINUTES]`. wrk makes the load; answers
and latencies are those of one more client with its own connections.
"""

import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import reports
from benchmarks.serving import arms, load, model
from benchmarks.serving.process import Server, running
from eurosat.runtime import cli, exit_codes, logs
from registry import versions
from tests.support.load import CONNECTIONS, run_clients
from tests.support.mlflow_server import free_port

QUEUE = 128
"""The server's default limit of waiting tiles; with as many clients it rejects no request."""
OVERLOAD_FACTOR = 4
"""Requests that are offered, relative to the capacity."""
CLIENTS_PER_QUEUED_TILE = 8
"""Connections of the overload, relative to the queue; each pauses after an answer."""
TRIAL_S = 5.0
"""Time to measure how long wrk waits for answers, by which its pause is shortened."""
SWAPS, SWAP_CLIENTS = 20, 32
MAX_RECOVERY_S = 2.0
MB = 1e6


@contextmanager
def wrk_load(
    port: int, requests: load.Requests, clients: int, seconds: float, pause_ms: int = 0
) -> Iterator[list[load.LoadResult]]:
    """Run wrk in the background; its result is in the list afterwards."""
    results: list[load.LoadResult] = []

    def run() -> None:
        results.append(load.load(port, requests, clients, math.ceil(seconds) + 1, pause_ms))

    thread = threading.Thread(target=run)
    thread.start()
    yield results
    thread.join()


def memory_mb(server: Server) -> float:
    return sum(process.memory_info().rss for process in server.tree()) / MB


def descriptors(server: Server) -> int:
    return sum(process.num_fds() for process in server.tree())


def overload(
    server: Server, requests: load.Requests, tile: bytes, seconds: float
) -> dict[str, Any]:
    """Measure the capacity, with one client per place in the queue, and then a multiple of it."""
    with wrk_load(server.port, requests, QUEUE - CONNECTIONS, seconds / 3) as full:
        uncrowded = run_clients(server.port, tile, seconds / 3)
    server.settle()
    before_mb = memory_mb(server)
    capacity = full[0].rate + uncrowded.statuses[200] / (seconds / 3)
    clients = CLIENTS_PER_QUEUED_TILE * QUEUE
    interval_ms = 1000 * clients / (OVERLOAD_FACTOR * capacity)
    latency_ms = 0.0
    for _ in range(2):
        pause_ms = max(1, round(interval_ms - latency_ms))
        trial = load.load(server.port, requests, clients, round(TRIAL_S), pause_ms)
        latency_ms = 1000 * clients * trial.seconds / trial.num_requests - pause_ms
    pause_ms = max(1, round(interval_ms - latency_ms))
    with wrk_load(server.port, requests, clients, seconds, pause_ms) as offered_load:
        accepted = run_clients(server.port, tile, seconds)
    offered = offered_load[0].num_requests / offered_load[0].seconds
    ended = time.monotonic()
    while run_clients(server.port, tile, 0.2).statuses.keys() != {200}:
        pass
    return {
        "arm": "overload",
        "capacity": round(capacity),
        "offered": round(offered),
        "accepted": accepted.statuses[200],
        "refused": accepted.statuses[429],
        "failed": accepted.statuses.total() - accepted.statuses[200] - accepted.statuses[429],
        "uncrowded_p99_ms": round(uncrowded.p99_ms(), 1),
        "accepted_p99_ms": round(accepted.p99_ms(), 1),
        "grown_mb": round(memory_mb(server) - before_mb, 1),
        "recovered_s": round(time.monotonic() - ended, 2),
    }


def swaps(server: Server, tile: bytes, seconds: float) -> dict[str, Any]:
    """Move the champion between two versions of the same network, under load."""
    client = versions.client()
    first = versions.by_alias(versions.MODEL, versions.CHAMPION)
    if first is None:
        sys.exit("error: the cached store has no champion: run the command with --retrain")
    existing = versions.all_of(versions.MODEL)
    if not existing[1:]:
        source, run_id = str(first.source), str(first.run_id)
        existing.append(client.create_model_version(versions.MODEL, source, run_id))
    numbers = [str(version.version) for version in existing[:2]]
    interval_s = seconds / (SWAPS + 1)

    def move() -> None:
        for swap in range(SWAPS):
            time.sleep(interval_s)
            number = numbers[(swap + 1) % 2]
            client.set_registered_model_alias(versions.MODEL, versions.CHAMPION, number)

    before_mb = memory_mb(server)
    thread = threading.Thread(target=move)
    thread.start()
    result = run_clients(server.port, tile, seconds, SWAP_CLIENTS)
    thread.join()
    failed = result.statuses.total() - result.statuses[200]
    return {
        "arm": "swaps",
        "swaps": SWAPS,
        "accepted": result.statuses[200],
        "failed": failed,
        "by_version": dict(sorted(result.versions.items())),
        "accepted_p99_ms": round(result.p99_ms(), 1),
        "grown_mb": round(memory_mb(server) - before_mb, 1),
    }


def soak(server: Server, requests: load.Requests, minutes: float) -> dict[str, Any]:
    """Measure the growth in memory and open files after the first tenth of the time."""
    intervals = max(2, round(minutes * 6))
    samples: list[tuple[float, int]] = []
    answered = errors = 0
    for interval in range(intervals):
        result = load.load(
            server.port, requests, SWAP_CLIENTS, max(1, round(60 * minutes / intervals))
        )
        answered, errors = answered + result.answered, errors + result.errors
        samples.append((memory_mb(server), descriptors(server)))
        print(
            f"soak: {interval + 1} of {intervals}, {samples[-1][0]:.0f} MB, {samples[-1][1]} files",
            flush=True,
        )
    start = samples[max(0, intervals // 10)]
    return {
        "arm": "soak",
        "minutes": minutes,
        "accepted": answered,
        "failed": errors,
        "grown_mb": round(samples[-1][0] - start[0], 1),
        "grown_files": samples[-1][1] - start[1],
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_arm = {row["arm"]: row for row in rows}
    overloaded, swapped = by_arm["overload"], by_arm["swaps"]
    slower = overloaded["accepted_p99_ms"] / overloaded["uncrowded_p99_ms"]
    results = [
        reports.goal("serving.overload_p99", slower, 2.0, at_most=True),
        reports.goal("serving.overload_failures", overloaded["failed"], 0, at_most=True),
        reports.goal(
            "serving.recovered_s", overloaded["recovered_s"], MAX_RECOVERY_S, at_most=True
        ),
        reports.goal("serving.swap_failures", swapped["failed"], 0, at_most=True),
    ]
    if soaked := by_arm.get("soak"):
        results.append(reports.goal("serving.soak_grown_mb", soaked["grown_mb"], 20, at_most=True))
        results.append(
            reports.goal("serving.soak_grown_files", soaked["grown_files"], 4, at_most=True)
        )
    return results


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "benchmarks.serving.overload",
        "Measure our server under overload, during swaps, and over a long time.",
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of overload, and again of swaps"
    )
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument(
        "--retrain", action="store_true", help="train the network again, though it is cached"
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    load.check_installed()
    started = reports.now()
    served = model.prepare(retrain=args.retrain)
    arm = next(arm for arm in arms.ours() if arm.name == "server")
    port = free_port()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = [*arm.command(served, port), "--poll", "0.5"]
        with running(arm.name, command, arm.environment(served), port, arm.ready, folder) as server:
            requests, tile = arm.requests(served, folder), served.tiles[0]
            load.load(port, requests, SWAP_CLIENTS, 3)
            parts: list[tuple[str, Callable[[], dict[str, Any]]]] = [
                ("overload", lambda: overload(server, requests, tile, args.seconds)),
                ("swaps", lambda: swaps(server, tile, args.seconds)),
            ]
            if args.soak:
                parts.append(("soak", lambda: soak(server, requests, args.soak)))
            for name, part in parts:
                print(f"measuring {name}", flush=True)
                rows.append(part())
                print(json.dumps(rows[-1]), flush=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [{name: row.get(name, "") for name in columns} for row in rows]
    reports.write("overload", started=started, n=1, goals=goals(rows), rows=table)
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
