"""bench-strain: our server overrun, its version swapped under load, and at work for long.

`python -m benchmarks.serving.overload [--seconds 60] [--soak MINUTES]`. The crowd is wrk; what
is told of answers and latencies is what one more client sees, on connections of its own.
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
from tests.support.load import SEEN, watched
from tests.support.mlflow_server import free_port

QUEUE = 128
"""Tiles that the server lets wait, its default: with as many clients it refuses none."""
TIMES, CLIENTS_TIMES = 4, 8
"""Of requests, and of connections that send them: each pauses after an answer."""
TRIAL_S = 5.0
"""Of the crowd, to see how long it waits for its answers: its pause is so much shorter."""
SWAPS, SWAP_CLIENTS = 20, 32
CALM_S = 2.0
MB = 1e6


@contextmanager
def crowd(
    port: int, requests: load.Requests, clients: int, seconds: float, pause_ms: int = 0
) -> Iterator[list[load.Load]]:
    """What it saw itself is in the list afterwards."""
    seen: list[load.Load] = []

    def ask() -> None:
        seen.append(load.load(port, requests, clients, math.ceil(seconds) + 1, pause_ms))

    thread = threading.Thread(target=ask)
    thread.start()
    yield seen
    thread.join()


def memory_mb(server: Server) -> float:
    return sum(one.memory_info().rss for one in server.tree()) / MB


def descriptors(server: Server) -> int:
    return sum(one.num_fds() for one in server.tree())


def overload(
    server: Server, requests: load.Requests, tile: bytes, seconds: float
) -> dict[str, Any]:
    """Uncrowded: as many clients as the queue holds; overrun: TIMES as many requests as then."""
    with crowd(server.port, requests, QUEUE - SEEN, seconds / 3) as full:
        uncrowded = watched(server.port, tile, seconds / 3)
    server.settle()
    before_mb = memory_mb(server)
    capacity = full[0].rate + uncrowded.statuses[200] / (seconds / 3)
    clients = CLIENTS_TIMES * QUEUE
    every_ms = 1000 * clients / (TIMES * capacity)
    waits_ms = 0.0
    for _ in range(2):
        pause_ms = max(1, round(every_ms - waits_ms))
        tried = load.load(server.port, requests, clients, round(TRIAL_S), pause_ms)
        waits_ms = 1000 * clients * tried.seconds / tried.asked - pause_ms
    pause_ms = max(1, round(every_ms - waits_ms))
    with crowd(server.port, requests, clients, seconds, pause_ms) as many:
        overrun = watched(server.port, tile, seconds)
    offered = many[0].asked / many[0].seconds
    ended = time.monotonic()
    while watched(server.port, tile, 0.2).statuses.keys() != {200}:
        pass
    return {
        "arm": "overload",
        "capacity": round(capacity),
        "offered": round(offered),
        "accepted": overrun.statuses[200],
        "refused": overrun.statuses[429],
        "failed": sum(overrun.statuses.values()) - overrun.statuses[200] - overrun.statuses[429],
        "uncrowded_p99_ms": round(uncrowded.p99_ms(), 1),
        "accepted_p99_ms": round(overrun.p99_ms(), 1),
        "grown_mb": round(memory_mb(server) - before_mb, 1),
        "recovered_s": round(time.monotonic() - ended, 2),
    }


def swaps(server: Server, tile: bytes, seconds: float) -> dict[str, Any]:
    """Move the champion between two versions of the same network, under load."""
    client = versions.client()
    first = versions.by_alias(versions.MODEL, versions.CHAMPION)
    if first is None:
        sys.exit("error: the benchmark's store has lost its champion: give --retrain")
    held = versions.all_of(versions.MODEL)
    second = (
        held[1]
        if held[1:]
        else client.create_model_version(versions.MODEL, str(first.source), str(first.run_id))
    )
    numbers = [str(held[0].version), str(second.version)]
    every_s = seconds / (SWAPS + 1)

    def move() -> None:
        for swap in range(SWAPS):
            time.sleep(every_s)
            number = numbers[(swap + 1) % 2]
            client.set_registered_model_alias(versions.MODEL, versions.CHAMPION, number)

    before_mb = memory_mb(server)
    thread = threading.Thread(target=move)
    thread.start()
    seen = watched(server.port, tile, seconds, SWAP_CLIENTS)
    thread.join()
    failed = sum(seen.statuses.values()) - seen.statuses[200]
    return {
        "arm": "swaps",
        "swaps": SWAPS,
        "accepted": seen.statuses[200],
        "failed": failed,
        "by_version": dict(sorted(seen.versions.items())),
        "accepted_p99_ms": round(seen.p99_ms(), 1),
        "grown_mb": round(memory_mb(server) - before_mb, 1),
    }


def soak(server: Server, requests: load.Requests, minutes: float) -> dict[str, Any]:
    """Growth from after the first tenth of the time to its end."""
    spells = max(2, round(minutes * 6))
    looked: list[tuple[float, int]] = []
    answered = errors = 0
    for spell in range(spells):
        took = load.load(server.port, requests, SWAP_CLIENTS, max(1, round(60 * minutes / spells)))
        answered, errors = answered + took.answered, errors + took.errors
        looked.append((memory_mb(server), descriptors(server)))
        print(
            f"soak: {spell + 1} of {spells}, {looked[-1][0]:.0f} MB, {looked[-1][1]} files",
            flush=True,
        )
    start = looked[max(0, spells // 10)]
    return {
        "arm": "soak",
        "minutes": minutes,
        "accepted": answered,
        "failed": errors,
        "grown_mb": round(looked[-1][0] - start[0], 1),
        "grown_files": looked[-1][1] - start[1],
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_arm = {row["arm"]: row for row in rows}
    over, swapped = by_arm["overload"], by_arm["swaps"]
    slower = over["accepted_p99_ms"] / over["uncrowded_p99_ms"]
    told = [
        reports.goal("serving.overload_p99", slower, 2.0, at_most=True),
        reports.goal("serving.overload_failures", over["failed"], 0, at_most=True),
        reports.goal("serving.recovered_s", over["recovered_s"], CALM_S, at_most=True),
        reports.goal("serving.swap_failures", swapped["failed"], 0, at_most=True),
    ]
    if soaked := by_arm.get("soak"):
        told.append(reports.goal("serving.soak_grown_mb", soaked["grown_mb"], 20, at_most=True))
        told.append(
            reports.goal("serving.soak_grown_files", soaked["grown_files"], 4, at_most=True)
        )
    return told


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "benchmarks.serving.overload", "Our server overrun, swapped, and at work for long."
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload, and of swaps")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--retrain", action="store_true", help="the network that is served")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    load.check_installed()
    started = reports.now()
    served = model.served(retrain=args.retrain)
    arm = next(one for one in arms.ours() if one.name == "server")
    port = free_port()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = [*arm.command(served, port), "--poll", "0.5"]
        with running(
            arm.name, command, arm.surroundings(served), port, arm.ready, folder
        ) as server:
            requests, tile = arm.requests(served, folder), served.tiles[0]
            load.load(port, requests, SWAP_CLIENTS, 3)
            parts: list[tuple[str, Callable[[], dict[str, Any]]]] = [
                ("overload", lambda: overload(server, requests, tile, args.seconds)),
                ("swaps", lambda: swaps(server, tile, args.seconds)),
            ]
            if args.soak:
                parts.append(("soak", lambda: soak(server, requests, args.soak)))
            for name, part in parts:
                print(f"{name} begins", flush=True)
                rows.append(part())
                print(json.dumps(rows[-1]), flush=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [{name: row.get(name, "") for name in columns} for row in rows]
    reports.write("strain", started=started, n=1, goals=goals(rows), rows=table)
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
