"""A platform of the benchmark's own, in a folder that is gone afterwards."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.reports import ROOT
from deploy import platform, users
from eurosat.errors import ConfigError, TrackingError

PASSWORD = "of nobody but this benchmark"  # noqa: S105 - on loopback, and gone with its folder
GONE_S = 60.0
ANONYMOUS = "Pss_Anon"
"""Of smaps_rollup: what no file backs, a page of several processes counted once. PostgreSQL's
shared buffers, which are of one size for good, are not in it."""


@dataclass(frozen=True)
class Stand:
    folder: Path
    env: dict[str, str]
    """What `.platform/env` says."""

    @property
    def url(self) -> str:
        return self.env["MLFLOW_TRACKING_URI"]

    def administrator(self) -> users.Server:
        told = (self.env[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD"))
        return users.Server(*told)

    def user(self, role: str) -> tuple[str, str]:
        """Name and password of one with that role."""
        self.administrator().add(f"bench-{role}", role, PASSWORD)
        return f"bench-{role}", PASSWORD

    def connection(self) -> Any:
        """To its database, of psycopg2.

        Raises:
            psycopg2.OperationalError: it does not answer.
        """
        import psycopg2

        told = self.env["EUROSAT_DATABASE_URI"].replace("+psycopg2", "")
        made = psycopg2.connect(told, passfile=self.env["PGPASSFILE"], connect_timeout=5)
        made.autocommit = True
        return made

    def processes(self) -> dict[str, psutil.Process]:
        """The first process of each service that runs at this moment."""
        signs = {
            "postgres": str(self.folder / "postgres"),
            "store": f"={self.folder / 'store'}",
            "mlflow": "--serve-artifacts",
            "promoter": "registry.receiver",
            "serving": "serving.server",
        }
        found: dict[str, psutil.Process] = {}
        for child in psutil.Process(platform.running(self.folder)).children():
            try:
                told = " ".join(child.cmdline())
            except psutil.Error:
                continue
            found |= {name: child for name, sign in signs.items() if sign in told}
        return found

    def end(self, service: str) -> None:
        """At once; returns when it is gone. Whoever looks after it starts it again.

        Raises:
            TrackingError: it does not go.
        """
        process = self.processes()[service]
        if service == "postgres":
            process.send_signal(signal.SIGINT)  # its clients are cut off
        else:
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(GONE_S)
        except psutil.TimeoutExpired as error:
            raise TrackingError(f"{service} did not end within {GONE_S:g} s") from error

    @contextmanager
    def cut(self, service: str) -> Iterator[None]:
        """It is there and says nothing."""
        process = self.processes()[service]
        process.suspend()
        try:
            yield
        finally:
            process.resume()

    def is_there(self, service: str) -> bool:
        """Whether it answers; of postgres, mlflow and store."""
        import psycopg2

        if service == "postgres":
            try:
                self.connection().close()
            except psycopg2.OperationalError:
                return False
            return True
        bucket = self.env["EUROSAT_ARTIFACTS"].removeprefix("gs://").partition("/")[0]
        paths = {
            "mlflow": f"{self.url}/health",
            "store": f"{self.env['STORAGE_EMULATOR_HOST']}/storage/v1/b/{bucket}",
        }
        try:
            return requests.get(paths[service], timeout=5).ok
        except requests.RequestException:
            return False

    def memory_mb(self) -> dict[str, float]:
        """Of each service with its children."""
        return {name: _memory_mb(process) for name, process in self.processes().items()}


def _memory_mb(first: psutil.Process) -> float:
    try:
        tree = [first, *first.children(recursive=True)]
    except psutil.Error:
        return 0.0
    total_kb = 0
    for process in tree:
        try:
            told = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended since
            continue
        total_kb += sum(int(x.split()[1]) for x in told.splitlines() if x.startswith(ANONYMOUS))
    return total_kb / 1024


def _said(verb: str, folder: Path, *flags: str) -> int:
    """The exit status of `deploy.platform`, as a user says it."""
    command = [sys.executable, "-m", "deploy.platform", verb, f"--folder={folder}", *flags]
    return subprocess.run(command, cwd=ROOT).returncode


@contextmanager
def standing() -> Iterator[Stand]:
    """Up, in a folder that PostgreSQL's own user can enter.

    Raises:
        ConfigError: it does not come up.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench-platform"))
    folder.chmod(0o755)
    try:
        if _said("up", folder, "--free-ports"):
            raise ConfigError("the platform did not come up: the lines above say why")
        lines = (folder / "env").read_text().splitlines()
        yield Stand(folder, dict(line.split("=", 1) for line in lines))
    except BaseException:
        for log in sorted((folder / "logs").glob("*.log")):
            print(f"--- the end of {log.name}\n{log.read_text()[-1500:]}", file=sys.stderr)
        raise
    finally:
        _said("down", folder)
        shutil.rmtree(folder, ignore_errors=True)
