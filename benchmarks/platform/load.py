"""Writers and readers at work on the platform while faults befall it."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from benchmarks.platform import faults, integrity, memory, writer
from benchmarks.platform.fixture import Stand
from benchmarks.platform.search import Searcher
from benchmarks.reports import ROOT
from eurosat.errors import TrackingError
from eurosat.runtime import telemetry
from eurosat.runtime.progress import track

log = logging.getLogger(__name__)

RUN_S, RUNS = 30.0, 4
"""A run lasts so long, or that part of the load, whichever is less."""
PAUSE_S = 1.0
"""Of a reader between an answer and the next search: four that look at a page."""
ARRIVED_S = 1800.0
"""All has arrived by then, after the writers' time is up, or counts as lost."""
TOLD_S = 10.0
READ = {"filter": "metrics.m00 > 0.5", "order_by": ["metrics.m01 DESC"], "max_results": 100}


@dataclass
class Outcome:
    """What a load has come to."""

    found: Counter[str]
    """See `arrived.counted`."""
    arrived_s: float
    """From the moment at which the writers' time was up until the server had everything."""
    faults: list[dict[str, Any]]
    samples: list[memory.Sample]
    searches_ms: list[float] = field(default_factory=list)
    """Of the readers."""
    refused: int = 0
    """Searches of the readers that had no answer, or an error."""


def run(stand: Stand, *, seconds: float, writers: int, readers: int, rate: int) -> Outcome:
    """Under faults for so long, and on until all has arrived; then it is compared.

    Raises:
        TrackingError: a writer fails, or a service does not come back.
    """
    who = stand.user("writer")
    environment = _as(stand, who)
    records = [stand.folder / f"writer-{number}.jsonl" for number in range(writers)]
    asked = stand.administrator()
    made = asked.ask("POST", "2.0/mlflow/experiments/create", name=writer.EXPERIMENT) or {}
    searchers = [
        Searcher(stand, stand.user("reader"), str(made["experiment_id"])) for _ in range(readers)
    ]
    planned = faults.schedule(seconds)
    with _started(records, seconds, rate, environment) as processes:
        begun = time.monotonic()
        with (
            memory.sampled(stand) as samples,
            _reading(searchers) as (searches_ms, refused),
            ThreadPoolExecutor(len(planned)) as pool,
        ):
            for process in processes:
                assert process.stdin
                process.stdin.write(b"go\n")
                process.stdin.close()
            befallen = [pool.submit(faults.inflict, fault, stand, begun) for fault in planned]
            for second in track(range(int(seconds)), int(seconds), "writers log", "s"):
                time.sleep(max(0.0, begun + second + 1 - time.monotonic()))
            told = [one.result() for one in befallen]
        _ended(processes)
    arrived_s = _synchronised(environment) - begun - seconds
    return Outcome(
        found=integrity.counted(stand, records),
        arrived_s=arrived_s,
        faults=told,
        samples=samples,
        searches_ms=searches_ms,
        refused=refused.total(),
    )


def _as(stand: Stand, who: tuple[str, str]) -> dict[str, str]:
    """The environment of a user who trains on this machine."""
    return (
        os.environ
        | telemetry.OFF
        | {
            "MLFLOW_TRACKING_URI": stand.url,
            "MLFLOW_TRACKING_USERNAME": who[0],
            "MLFLOW_TRACKING_PASSWORD": who[1],
            "EUROSAT_CACHE": str(stand.folder / "cache"),
        }
    )


@contextmanager
def _started(
    records: Sequence[Path], seconds: float, rate: int, environment: dict[str, str]
) -> "Iterator[list[subprocess.Popen[bytes]]]":
    """The writers, ready to begin; what they say is beside their records."""
    run_s = min(RUN_S, seconds / RUNS)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number, record in enumerate(records):
            command = [
                sys.executable,
                "-m",
                "benchmarks.platform.writer",
                f"--number={number}",
                f"--seconds={seconds}",
                f"--run-seconds={run_s}",
                f"--rate={rate}",
                f"--record={record}",
            ]
            with record.with_suffix(".log").open("wb") as said:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=said,
                    )
                )
        for process in track(processes, len(processes), "starting", "writers"):
            assert process.stdout
            if process.stdout.readline().decode().strip() != writer.READY:
                raise TrackingError("a writer did not start: what it said is above")
        yield processes
    except BaseException:
        for record in records:
            sys.stderr.write(record.with_suffix(".log").read_text()[-500:])
        raise
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for end in (process.stdin, process.stdout):
                if end:
                    end.close()


def _ended(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Wait for the writers, who send what they have left."""
    told = time.monotonic()
    while left := [one for one in processes if one.poll() is None]:
        if time.monotonic() - told > TOLD_S:
            told = time.monotonic()
            log.info("%d writers send what they have left", len(left))
        time.sleep(0.1)
    if failed := [one for one in processes if one.returncode]:
        raise TrackingError(
            f"{len(failed)} of {len(processes)} writers failed, the first with exit status "
            f"{failed[0].returncode}: what they said is above"
        )


def _synchronised(environment: dict[str, str]) -> float:
    """What runs have left behind is sent, as a user would; returns when, by `time.monotonic`."""
    deadline = time.monotonic() + ARRIVED_S
    command = [sys.executable, "-m", "eurosat.tracking", "sync"]
    while True:
        log.info("python -m eurosat.tracking sync")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not done.returncode or time.monotonic() > deadline:
            log.info("%s", done.stdout.strip()[-1000:])
            return time.monotonic()
        log.warning("%s", (done.stdout + done.stderr).strip()[-1000:])


@contextmanager
def _reading(searchers: Sequence[Searcher]) -> Iterator[tuple[list[float], Counter[str]]]:
    """Milliseconds of their searches, and those that failed, by the kind of the error."""
    took_ms: list[float] = []
    refused: Counter[str] = Counter()
    over = threading.Event()

    def read(searcher: Searcher) -> None:
        while not over.wait(PAUSE_S):
            started = time.perf_counter()
            try:
                searcher.search(**READ)
            except requests.RequestException as error:  # it is tried again, as a page would be
                refused[type(error).__name__] += 1
            else:
                took_ms.append(1000 * (time.perf_counter() - started))

    threads = [threading.Thread(target=read, args=(one,), daemon=True) for one in searchers]
    for thread in threads:
        thread.start()
    try:
        yield took_ms, refused
    finally:
        over.set()
        for thread in threads:
            thread.join()
