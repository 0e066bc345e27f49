"""A writer of bench-platform: logs one run after another, and records what was acknowledged.

`benchmarks.platform` starts it. It prints that it is ready, waits for a line on standard input, and
then logs through `eurosat.tracking` as a training does.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from eurosat import tracking
from eurosat.runtime import cli, exit_codes, logs

EXPERIMENT = "bench-platform"
STEPS_PER_S = 20
"""Steps of a run per second; each logs all its metrics in one call."""
PARAMS = 10
ARTIFACT_INTERVAL_S, ARTIFACT_BYTES = 5.0, 50_000
READY = "ready"

Record = Callable[..., None]
"""Records data after its logging call has returned."""


def write_run(name: str, seconds: float, rate: int, rng: random.Random, record: Record) -> None:
    """Log a run of about ``seconds``, with ``rate`` metrics per second."""
    with tracking.run(EXPERIMENT, name, system_metrics=False) as run:
        record(journal=run.journal)
        params = {f"p{number}": rng.random() for number in range(PARAMS)}
        run.log_params(params)
        record(journal=run.journal, params={key: str(value) for key, value in params.items()})
        start, steps, files = time.monotonic(), 0, 0
        while (elapsed := time.monotonic() - start) < seconds:
            metrics = {f"m{number:02}": rng.random() for number in range(rate // STEPS_PER_S)}
            run.log_metrics(metrics, steps)
            record(journal=run.journal, step=steps, metrics=metrics)
            steps += 1
            if elapsed >= files * ARTIFACT_INTERVAL_S:
                text, path = rng.randbytes(ARTIFACT_BYTES // 2).hex(), f"files/{files}.txt"
                run.log_text(text, path)
                digest = hashlib.sha256(text.encode()).hexdigest()
                record(journal=run.journal, path=path, sha256=digest)
                files += 1
            time.sleep(max(0.0, start + steps / STEPS_PER_S - time.monotonic()))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, required=True, help="number of this writer")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--run-seconds", type=float, required=True)
    parser.add_argument("--rate", type=int, required=True, help="metrics per second")
    parser.add_argument("--record", type=Path, required=True, help="file for what was acknowledged")
    args = parser.parse_args(argv)
    logs.setup("warning")
    rng, runs = random.Random(args.number), 0  # noqa: S311 - no secrets
    with args.record.open("w", buffering=1) as file:

        def record(**entry: object) -> None:
            file.write(json.dumps(entry | {"at": time.time()}) + "\n")

        import mlflow  # noqa: F401 - takes seconds if sixteen processes do it at once

        print(READY, flush=True)
        sys.stdin.readline()
        end = time.monotonic() + args.seconds
        while (remaining := end - time.monotonic()) > 0:
            name = f"writer {args.number}, run {runs}"
            write_run(name, min(args.run_seconds, remaining), args.rate, rng, record)
            runs += 1
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main, platform=False)
