"""Run one worker process per core on one port; the kernel spreads the connections over them."""

import argparse
import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence

from eurosat.errors import ConfigError
from eurosat.runtime import exit_codes
from serving.mlflow_server import check_address

log = logging.getLogger(__name__)

WORKER_VARIABLE = "EUROSAT_SERVING_WORKER"
"""Environment variable of the workers: the pid of the process that started them."""
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Folder of the workers' common metrics; prometheus_client reads it when it is imported."""
POLL_INTERVAL_S = 0.2
RESTART_BACKOFF_S = 5.0
"""A worker that lived for less than this time is restarted only after it."""


def is_worker() -> bool:
    return WORKER_VARIABLE in os.environ


def listener(host: str, port: int) -> socket.socket:
    """Return a socket of this process that shares its port with the other workers.

    Raises:
        ConfigError: nothing can listen there.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error}): choose another") from error
    return sock


def run(command: Sequence[str], args: argparse.Namespace) -> int:
    """Keep ``args.processes`` workers running until SIGTERM or SIGINT; return the exit code.

    Raises:
        ConfigError: nothing can listen on the port.
    """
    check_address(args.host, args.port)
    with tempfile.TemporaryDirectory(prefix="eurosat-metrics-") as folder:
        worker_variables = {WORKER_VARIABLE: str(os.getpid()), METRICS_VARIABLE: folder}
        environment = dict(os.environ) | worker_variables
        return _supervise(command, environment, args.processes, args.grace)


def _supervise(
    command: Sequence[str], environment: Mapping[str, str], count: int, grace_s: float
) -> int:
    signals: list[int] = []  # not an Event: its lock may be held by the thread that is interrupted
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    started_at: dict[subprocess.Popen[bytes], float] = {}
    code = exit_codes.OK
    restart_at = 0.0
    while code == exit_codes.OK and not signals:
        time.sleep(POLL_INTERVAL_S)
        for worker in [worker for worker in started_at if worker.poll() is not None]:
            lived_s = time.monotonic() - started_at.pop(worker)
            log.warning("worker %d ended with code %d", worker.pid, worker.returncode)
            _remove_gauges(worker.pid, environment[METRICS_VARIABLE])
            if worker.returncode == exit_codes.BAD_INPUT:  # it has logged what is wrong
                code = exit_codes.BAD_INPUT
            elif lived_s < RESTART_BACKOFF_S:
                restart_at = time.monotonic() + RESTART_BACKOFF_S
        if code == exit_codes.OK and time.monotonic() >= restart_at:
            while len(started_at) < count:
                started_at[subprocess.Popen(command, env=environment)] = time.monotonic()
    _stop(list(started_at), grace_s)
    return code


def _stop(workers: Sequence["subprocess.Popen[bytes]"], grace_s: float) -> None:
    """Terminate the workers, and kill those that are still running after the grace period."""
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + grace_s + POLL_INTERVAL_S
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("worker %d did not end within %g s: killed", worker.pid, grace_s)
            worker.kill()
            worker.wait()


def end_with_parent() -> None:
    """Start a thread that terminates this worker when its parent has ended."""
    parent = int(os.environ[WORKER_VARIABLE])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_INTERVAL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _remove_gauges(pid: int, folder: str) -> None:
    """Remove the gauges of a worker that has ended from the common metrics."""
    os.environ.setdefault(METRICS_VARIABLE, folder)
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
