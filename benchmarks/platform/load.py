"""The load: writers and readers use the platform while faults are injected."""

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
from benchmarks.platform.fixture import PlatformFixture
from benchmarks.platform.search import Searcher
from benchmarks.reports import ROOT
from eurosat.errors import TrackingError
from eurosat.runtime import telemetry
from eurosat.runtime.progress import track

log = logging.getLogger(__name__)

MAX_RUN_S, MIN_RUNS = 30.0, 4
"""Longest duration of a run, and fewest runs of a writer."""
READER_PAUSE_S = 1.0
"""Pause of a reader between an answer and the next search, as of a person who reads a page."""
SYNC_TIMEOUT_S = 1800.0
"""What has not arrived so long after the writers' end counts as lost."""
LOG_INTERVAL_S = 10.0
READER_QUERY = {"filter": "metrics.m00 > 0.5", "order_by": ["metrics.m01 DESC"], "max_results": 100}


@dataclass
class Outcome:
    """The measurements of one load."""

    counts: Counter[str]
    """See `integrity.count`."""
    arrived_s: float
    """Seconds from the end of the load until the server had all data."""
    faults: list[dict[str, Any]]
    samples: list[memory.Sample]
    searches_ms: list[float] = field(default_factory=list)
    """Milliseconds of the readers' searches."""
    failed: int = 0
    """Searches of the readers without an answer, or with an error."""


def run(
    platform: PlatformFixture, *, seconds: float, writers: int, readers: int, rate: int
) -> Outcome:
    """Run the load with faults for ``seconds``, wait until all data has arrived, and compare it.

    ``rate`` is in metrics per second and writer.

    Raises:
        TrackingError: a writer fails, or a service does not answer again.
    """
    environment = _login_env(platform, platform.user("writer"))
    records = [platform.folder / f"writer-{number}.jsonl" for number in range(writers)]
    admin = platform.administrator()
    created = admin.request("POST", "2.0/mlflow/experiments/create", name=writer.EXPERIMENT) or {}
    experiment_id = str(created["experiment_id"])
    searchers = [Searcher(platform, platform.user("reader"), experiment_id) for _ in range(readers)]
    planned = faults.schedule(seconds)
    with _writers(records, seconds, rate, environment) as processes:
        start = time.monotonic()
        with (
            memory.sampled(platform) as samples,
            _readers(searchers) as (searches_ms, failures),
            ThreadPoolExecutor(len(planned)) as pool,
        ):
            for process in processes:
                assert process.stdin
                process.stdin.write(b"go\n")
                process.stdin.close()
            injected = [pool.submit(faults.inject, fault, platform, start) for fault in planned]
            for second in track(range(int(seconds)), int(seconds), "writers log", "s"):
                time.sleep(max(0.0, start + second + 1 - time.monotonic()))
            fault_rows = [future.result() for future in injected]
        _wait_for_writers(processes)
    arrived_s = _sync(environment) - start - seconds
    return Outcome(
        counts=integrity.count(platform, records),
        arrived_s=arrived_s,
        faults=fault_rows,
        samples=samples,
        searches_ms=searches_ms,
        failed=failures.total(),
    )


def _login_env(platform: PlatformFixture, login: tuple[str, str]) -> dict[str, str]:
    """Return the environment of a user who trains on this machine."""
    return (
        os.environ
        | telemetry.OFF
        | {
            "MLFLOW_TRACKING_URI": platform.url,
            "MLFLOW_TRACKING_USERNAME": login[0],
            "MLFLOW_TRACKING_PASSWORD": login[1],
            "EUROSAT_CACHE": str(platform.folder / "cache"),
        }
    )


@contextmanager
def _writers(
    records: Sequence[Path], seconds: float, rate: int, environment: dict[str, str]
) -> "Iterator[list[subprocess.Popen[bytes]]]":
    """Start the writers and wait until they are ready. Their logs are beside their records."""
    run_s = min(MAX_RUN_S, seconds / MIN_RUNS)
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
            with record.with_suffix(".log").open("wb") as log_file:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log_file,
                    )
                )
        for process in track(processes, len(processes), "starting", "writers"):
            assert process.stdout
            if process.stdout.readline().decode().strip() != writer.READY:
                raise TrackingError("a writer did not start: see its log above")
        yield processes
    except BaseException:
        for record in records:
            sys.stderr.write(record.with_suffix(".log").read_text()[-500:])
        raise
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()


def _wait_for_writers(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Wait until the writers have sent what they still hold, and have ended."""
    last_log = time.monotonic()
    while running := [process for process in processes if process.poll() is None]:
        if time.monotonic() - last_log > LOG_INTERVAL_S:
            last_log = time.monotonic()
            log.info("%d writers are still sending", len(running))
        time.sleep(0.1)
    if failed := [process for process in processes if process.returncode]:
        raise TrackingError(
            f"{len(failed)} of {len(processes)} writers failed, the first with exit status "
            f"{failed[0].returncode}: see their logs above"
        )


def _sync(environment: dict[str, str]) -> float:
    """Send what is left in the journals, as a user would; return the time of `time.monotonic`."""
    deadline = time.monotonic() + SYNC_TIMEOUT_S
    command = [sys.executable, "-m", "eurosat.tracking", "sync"]
    while True:
        log.info("python -m eurosat.tracking sync")
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not result.returncode or time.monotonic() > deadline:
            log.info("%s", result.stdout.strip()[-1000:])
            return time.monotonic()
        log.warning("%s", (result.stdout + result.stderr).strip()[-1000:])


@contextmanager
def _readers(searchers: Sequence[Searcher]) -> Iterator[tuple[list[float], Counter[str]]]:
    """Run the readers; yield the milliseconds of their searches, and failures by error type."""
    searches_ms: list[float] = []
    failures: Counter[str] = Counter()
    stop = threading.Event()

    def read(searcher: Searcher) -> None:
        while not stop.wait(READER_PAUSE_S):
            started = time.perf_counter()
            try:
                searcher.search(**READER_QUERY)
            except requests.RequestException as error:  # the next search follows, as from a page
                failures[type(error).__name__] += 1
            else:
                searches_ms.append(1000 * (time.perf_counter() - started))

    threads = [
        threading.Thread(target=read, args=(searcher,), daemon=True) for searcher in searchers
    ]
    for thread in threads:
        thread.start()
    try:
        yield searches_ms, failures
    finally:
        stop.set()
        for thread in threads:
            thread.join()
