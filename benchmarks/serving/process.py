"""A server that stands ready, stopped while it is another's turn."""

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
"""So long a server may work off what a client has left behind; it is done when it takes less than
half of a core for a while."""
IDLE_S = 3.0
"""For so long the CPU time of a server without requests is measured."""
ANONYMOUS = ("Pss_Anon", "Pss_Shmem")
"""Of smaps_rollup: what no file backs, a page of several processes counted once."""


class Server:
    """The processes behind a port of this machine."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.name, self.port = name, port
        self._process = process

    def tree(self) -> list[psutil.Process]:
        """Parents first."""
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def pause(self) -> None:
        """Idle servers poll, some of them at the cost of a core: nobody does it in our turn."""
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        """Children first: those that watch them find them awake."""
        for process in reversed(self.tree()):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def idle_cores(self) -> float:
        """CPU time that it takes without a request, as a share of one core."""
        return self._used(IDLE_S)

    def settle(self) -> None:
        """Wait until it works no more: servers answer on though the client has gone."""
        deadline = time.monotonic() + SETTLE_S
        while self._used(CALM_S) > CALM and time.monotonic() < deadline:
            pass

    def _used(self, seconds: float) -> float:
        before = self._cpu_s()
        time.sleep(seconds)
        return (self._cpu_s() - before) / seconds

    def _cpu_s(self) -> float:
        times = [process.cpu_times() for process in self.tree()]
        return float(sum(one.user + one.system for one in times))

    def memory_mb(self) -> float:
        """Memory of all its processes that no file backs."""
        total_kb = 0
        for process in self.tree():
            with suppress(OSError):  # one that has ended since
                for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith(ANONYMOUS):
                        total_kb += int(line.split()[1])
        return total_kb / 1024

    def end(self) -> None:
        tree = self.tree() if self._process.poll() is None else []
        for told in (signal.SIGCONT, signal.SIGTERM):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, told)
        _, left = psutil.wait_procs(tree, timeout=KILL_S)
        for process in left:
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
    """Started in ``folder``, where its log is; yielded once ``ready``, a path, answers 200."""
    log = folder / f"{name}.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(name, process, port)
    try:
        if not _answers(port, ready, process):
            sys.exit(f"error: {name} did not start:\n{log.read_text()[-2000:]}")
        yield server
    finally:
        server.end()


def _answers(port: int, path: str, process: "subprocess.Popen[bytes]") -> bool:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).close()
            return True
        time.sleep(0.2)
    return False
