"""Measure ONNX Runtime alone on decoded tiles, without a server.

`python -m benchmarks.serving.limit FOLDER SECONDS [BATCH SESSIONS]` prints tiles per second as
JSON. Without BATCH and SESSIONS it tries all settings and prints the fastest.
"""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.networks import OnnxNetwork, Tiles

BATCHES = (1, 2, 4, 8, 16, 32, 64)
WARM_RUNS = 3


def speed(folder: Path, tiles_NHWC: Tiles, batch: int, sessions: int, seconds: float) -> float:
    """Return tiles per second of concurrent ``sessions``, which share the cores evenly."""
    cores = len(os.sched_getaffinity(0))
    networks = [OnnxNetwork(folder, max(1, cores // sessions)) for _ in range(sessions)]
    chunks = [
        np.ascontiguousarray(tiles_NHWC[start : start + batch])
        for start in range(0, len(tiles_NHWC) - batch + 1, batch)
    ]
    done = [0] * sessions
    for network in networks:
        for chunk in chunks[:WARM_RUNS]:
            network.probabilities(chunk)
    until = time.perf_counter() + seconds

    def work(number: int) -> None:
        for chunk in itertools.cycle(chunks):
            if time.perf_counter() >= until:
                return
            networks[number].probabilities(chunk)
            done[number] += batch

    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)


def main(argv: Sequence[str]) -> None:
    folder, seconds = Path(argv[0]), float(argv[1])
    tiles_NHWC: Tiles = np.load(folder / "tiles.npy", allow_pickle=False)  # written by `model`
    cores = len(os.sched_getaffinity(0))
    settings = (
        [(int(argv[2]), int(argv[3]))] if argv[2:] else itertools.product(BATCHES, {1, cores})
    )
    best: dict[str, Any] = max(
        (
            {
                "tiles_per_s": speed(folder, tiles_NHWC, batch, sessions, seconds),
                "batch": batch,
                "sessions": sessions,
            }
            for batch, sessions in settings
        ),
        key=lambda result: result["tiles_per_s"],
    )
    print(json.dumps(best))


if __name__ == "__main__":
    main(sys.argv[1:])
