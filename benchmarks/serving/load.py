"""The client: wrk, which is written in C and takes little of the cores that the server needs."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("load.lua")
TIMEOUT_S = 10
"""After which wrk gives a request up."""
FAULTS = ("connect", "read", "write", "timeout", "status")
"""What wrk counts apart; `status` are answers of 400 and above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one spell of requests came to."""

    answered: int
    """Requests that got an answer below 400."""
    seconds: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int

    @property
    def asked(self) -> int:
        return self.answered + self.errors

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.answered / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """What is posted: ``count`` bodies in the files 1, 2, 3 ... of ``folder``."""

    folder: Path
    count: int
    path: str
    content_type: str


def check_installed() -> None:
    if not shutil.which("wrk"):
        sys.exit("error: wrk is not installed: apt-get install wrk")


def parse(said: str) -> Load:
    """Read what wrk printed, whose own report stands before the script's line of JSON."""
    lines = [line for line in said.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(f"error: wrk said nothing that can be read: {' '.join(said.split())[-300:]}")
    told = json.loads(lines[-1])
    return Load(
        answered=told["requests"] - told["status"],
        errors=sum(told[name] for name in FAULTS),
        **{name: told[name] for name in ("seconds", "p50_ms", "p95_ms", "p99_ms")},
    )


def load(port: int, requests: Requests, concurrency: int, seconds: int, pause_ms: int = 0) -> Load:
    """Post for a while over ``concurrency`` connections, each with one request at a time."""
    command = [
        "wrk",
        "--threads",
        "1",
        "--connections",
        str(concurrency),
        "--duration",
        f"{seconds}s",
        "--timeout",
        f"{TIMEOUT_S}s",
        "--script",
        str(SCRIPT),
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
