"""A platform for the benchmark alone, in a temporary folder."""

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

PASSWORD = "of nobody but this benchmark"  # noqa: S105 - on loopback, in a temporary folder
STOP_TIMEOUT_S = 60.0
ANONYMOUS_MEMORY = "Pss_Anon"
"""Field of smaps_rollup: memory that no file backs; a page shared by several processes counts
once. It excludes PostgreSQL's shared buffers, whose size is constant."""


@dataclass(frozen=True)
class PlatformFixture:
    """A running platform: its users, database, processes and faults."""

    folder: Path
    env: dict[str, str]
    """Content of the platform's file `env`."""

    @property
    def url(self) -> str:
        return self.env["MLFLOW_TRACKING_URI"]

    def administrator(self) -> users.UserAdmin:
        login = (self.env[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD"))
        return users.UserAdmin(*login)

    def user(self, role: str) -> tuple[str, str]:
        """Create a user with the role; return name and password."""
        self.administrator().add(f"bench-{role}", role, PASSWORD)
        return f"bench-{role}", PASSWORD

    def connection(self) -> Any:
        """Open a psycopg2 connection to the database.

        Raises:
            psycopg2.OperationalError: the database does not answer.
        """
        import psycopg2

        uri = self.env["EUROSAT_DATABASE_URI"].replace("+psycopg2", "")
        connection = psycopg2.connect(uri, passfile=self.env["PGPASSFILE"], connect_timeout=5)
        connection.autocommit = True
        return connection

    def processes(self) -> dict[str, psutil.Process]:
        """Return the first process of each service that is running."""
        patterns = {
            "postgres": str(self.folder / "postgres"),
            "store": f"={self.folder / 'store'}",
            "mlflow": "--serve-artifacts",
            "promoter": "registry.receiver",
            "serving": "serving.server",
        }
        processes: dict[str, psutil.Process] = {}
        for child in psutil.Process(platform.running_pid(self.folder)).children():
            try:
                command = " ".join(child.cmdline())
            except psutil.Error:
                continue
            processes |= {name: child for name, pattern in patterns.items() if pattern in command}
        return processes

    def kill(self, service: str) -> None:
        """Kill a service and wait until it has ended; the platform restarts it.

        Raises:
            TrackingError: it does not end.
        """
        process = self.processes()[service]
        if service == "postgres":
            process.send_signal(signal.SIGINT)  # disconnects its clients
        else:
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired as error:
            raise TrackingError(f"{service} did not end within {STOP_TIMEOUT_S:g} s") from error

    @contextmanager
    def cut_off(self, service: str) -> Iterator[None]:
        """Suspend a service: it keeps its port, and does not answer."""
        process = self.processes()[service]
        process.suspend()
        try:
            yield
        finally:
            process.resume()

    def answers(self, service: str) -> bool:
        """Return whether postgres, mlflow or store answers."""
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
        """Return the memory of each service and its children, in MiB."""
        return {name: _memory_mb(process) for name, process in self.processes().items()}


def _memory_mb(first: psutil.Process) -> float:
    try:
        tree = [first, *first.children(recursive=True)]
    except psutil.Error:
        return 0.0
    total_kb = 0
    for process in tree:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended since
            continue
        total_kb += sum(
            int(line.split()[1])
            for line in rollup.splitlines()
            if line.startswith(ANONYMOUS_MEMORY)
        )
    return total_kb / 1024


def _platform_command(name: str, folder: Path, *flags: str) -> int:
    """Run `python -m deploy.platform`, and return its exit code."""
    command = [sys.executable, "-m", "deploy.platform", name, f"--folder={folder}", *flags]
    return subprocess.run(command, cwd=ROOT).returncode


@contextmanager
def running_platform() -> Iterator[PlatformFixture]:
    """Start a platform in a temporary folder; stop it and delete the folder at the end.

    Raises:
        ConfigError: it does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench-platform"))
    folder.chmod(0o755)  # PostgreSQL's user enters it
    try:
        if _platform_command("up", folder, "--free-ports"):
            raise ConfigError("the platform did not start: see the lines above")
        lines = (folder / "env").read_text().splitlines()
        yield PlatformFixture(folder, dict(line.split("=", 1) for line in lines))
    except BaseException:
        for log_file in sorted((folder / "logs").glob("*.log")):
            print(
                f"--- the end of {log_file.name}\n{log_file.read_text()[-1500:]}", file=sys.stderr
            )
        raise
    finally:
        _platform_command("down", folder)
        shutil.rmtree(folder, ignore_errors=True)
