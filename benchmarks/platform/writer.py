"""A writer of bench-platform: one run after another, and a record of what was acknowledged.

Started by `benchmarks.platform`. It says that it is ready, waits for a line on its standard input,
and then logs through `eurosat.tracking` as a training does.
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
"""Of one run: a step logs all of its metrics in one call."""
PARAMS = 10
ARTIFACT_EVERY_S, ARTIFACT_BYTES = 5.0, 50_000
READY = "ready"

Note = Callable[..., None]
"""Writes one thing down that a call of the log has returned from."""


def write_run(name: str, seconds: float, rate: int, rng: random.Random, note: Note) -> None:
    """One run of about so many seconds that logs ``rate`` metrics a second."""
    with tracking.run(EXPERIMENT, name, system_metrics=False) as run:
        note(journal=run.journal)
        params = {f"p{number}": rng.random() for number in range(PARAMS)}
        run.log_params(params)
        note(journal=run.journal, params={key: str(value) for key, value in params.items()})
        begun, steps, files = time.monotonic(), 0, 0
        while (passed := time.monotonic() - begun) < seconds:
            metrics = {f"m{number:02}": rng.random() for number in range(rate // STEPS_PER_S)}
            run.log_metrics(metrics, steps)
            note(journal=run.journal, step=steps, metrics=metrics)
            steps += 1
            if passed >= files * ARTIFACT_EVERY_S:
                text, path = rng.randbytes(ARTIFACT_BYTES // 2).hex(), f"files/{files}.txt"
                run.log_text(text, path)
                digest = hashlib.sha256(text.encode()).hexdigest()
                note(journal=run.journal, path=path, sha256=digest)
                files += 1
            time.sleep(max(0.0, begun + steps / STEPS_PER_S - time.monotonic()))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, required=True, help="of this writer")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--run-seconds", type=float, required=True)
    parser.add_argument("--rate", type=int, required=True, help="metrics a second")
    parser.add_argument("--record", type=Path, required=True, help="what was acknowledged")
    args = parser.parse_args(argv)
    logs.setup("warning")
    rng, runs = random.Random(args.number), 0  # noqa: S311 - figures, not secrets
    with args.record.open("w", buffering=1) as record:

        def note(**told: object) -> None:
            record.write(json.dumps(told | {"at": time.time()}) + "\n")

        import mlflow  # noqa: F401 - takes seconds where sixteen do it at once

        print(READY, flush=True)
        sys.stdin.readline()
        end = time.monotonic() + args.seconds
        while (left := end - time.monotonic()) > 0:
            name = f"writer {args.number}, run {runs}"
            write_run(name, min(args.run_seconds, left), args.rate, rng, note)
            runs += 1
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main, platform=False)
