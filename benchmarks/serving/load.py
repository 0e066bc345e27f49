"""Run wrk as the client: it is written in C, and leaves most of the cores to the server."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("load.lua")
TIMEOUT_S = 10
"""wrk gives up a request after this time."""
FAULTS = ("connect", "read", "write", "timeout", "status")
"""wrk's counters of errors; `status` are answers of 400 and above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadResult:
    """Result of one run of wrk."""

    answered: int
    """Requests that were answered with a status below 400."""
    seconds: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int

    @property
    def num_requests(self) -> int:
        return self.answered + self.errors

    @property
    def rate(self) -> float:
        """Successful answers per second."""
        return self.answered / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """Requests to post: ``count`` bodies, in the files 1, 2, 3 ... of ``folder``."""

    folder: Path
    count: int
    path: str
    content_type: str


def check_installed() -> None:
    if not shutil.which("wrk"):
        sys.exit("error: wrk is not installed: apt-get install wrk")


def parse(output: str) -> LoadResult:
    """Parse wrk's output: its own report, and then the line of JSON of our script."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(f"error: wrk printed no result: {' '.join(output.split())[-300:]}")
    counters = json.loads(lines[-1])
    return LoadResult(
        answered=counters["requests"] - counters["status"],
        errors=sum(counters[name] for name in FAULTS),
        **{name: counters[name] for name in ("seconds", "p50_ms", "p95_ms", "p99_ms")},
    )


def load(
    port: int, requests: Requests, concurrency: int, seconds: int, pause_ms: int = 0
) -> LoadResult:
    """Post requests for some seconds over ``concurrency`` connections, one at a time on each."""
    command = [
        "wrk",
        "--threads=1",
        f"--connections={concurrency}",
        f"--duration={seconds}s",
        f"--timeout={TIMEOUT_S}s",
        f"--script={SCRIPT}",
        f"http://127.0.0.1:{port}",
        "--",
        str(requests.folder),
        str(requests.count),
        requests.path,
        requests.content_type,
        str(pause_ms),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return parse(done.stdout + done.stderr)
