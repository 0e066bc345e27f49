"""A server process that is paused while another server is measured."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

READY_S = 300
KILL_S = 10
SETTLE_S, CALM, CALM_S = 30, 0.5, 0.2
"""After a client has gone, a server may work for up to SETTLE_S; it is idle when it uses less than
CALM of a core for CALM_S.
"""
IDLE_S = 3.0
"""How long the CPU time of an idle server is measured."""
ANONYMOUS = ("Pss_Anon", "Pss_Shmem")
"""Lines of smaps_rollup: memory without a file, where shared pages count in proportion."""


class Server:
    """The processes of a server on a port of this machine."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.name, self.port = name, port
        self._process = process

    def tree(self) -> list[psutil.Process]:
        """Return all processes, parents first."""
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def pause(self) -> None:
        """Stop all processes: some idle servers poll, and use up to a core for it."""
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        """Continue all processes, children first, so that their supervisors find them alive."""
        for process in reversed(self.tree()):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def idle_cores(self) -> float:
        """Return the CPU time without any request, as a share of one core."""
        return self._used(IDLE_S)

    def settle(self) -> None:
        """Wait until the server is idle: it may still answer requests of a client that has gone."""
        deadline = time.monotonic() + SETTLE_S
        while self._used(CALM_S) > CALM and time.monotonic() < deadline:
            pass

    def _used(self, seconds: float) -> float:
        before = self._cpu_s()
        time.sleep(seconds)
        return (self._cpu_s() - before) / seconds

    def _cpu_s(self) -> float:
        times = [process.cpu_times() for process in self.tree()]
        return float(sum(cpu.user + cpu.system for cpu in times))

    def memory_mb(self) -> float:
        """Return the memory without a file of all processes, in MiB."""
        total_kb = 0
        for process in self.tree():
            with suppress(OSError):  # one that has ended since
                for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith(ANONYMOUS):
                        total_kb += int(line.split()[1])
        return total_kb / 1024

    def end(self) -> None:
        tree = self.tree() if self._process.poll() is None else []
        for number in (signal.SIGCONT, signal.SIGTERM):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
        _, alive = psutil.wait_procs(tree, timeout=KILL_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    port: int,
    ready: str,
    folder: Path,
) -> Iterator[Server]:
    """Start a server in ``folder``, and yield it once the path ``ready`` answers 200."""
    log = folder / f"{name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(name, process, port)
    try:
        if not _wait_ready(port, ready, process):
            sys.exit(f"error: {name} did not start:\n{log.read_text()[-2000:]}")
        yield server
    finally:
        server.end()


def _wait_ready(port: int, path: str, process: "subprocess.Popen[bytes]") -> bool:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).close()
            return True
        time.sleep(0.2)
    return False
