"""A process for each core, on one port: the kernel hands each its share of the connections."""

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

WORKER = "EUROSAT_SERVING_WORKER"
"""In the environment of the processes that answer: the process that started them."""
METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Where they count together; prometheus_client reads it when it is imported."""
LOOK_S = 0.2
TOO_SOON_S = 5.0
"""A process that ends sooner is not started again at once."""


def is_worker() -> bool:
    return WORKER in os.environ


def listener(host: str, port: int) -> socket.socket:
    """A socket of this process's own, which shares the port with those of the others.

    Raises:
        ConfigError: nothing can listen there.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, proto)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} cannot be listened on ({error}): name another") from error
    return made


def run(command: Sequence[str], args: argparse.Namespace) -> int:
    """Keep ``args.processes`` of the command running until this one is told to stop.

    Their port is shared with nobody else.

    Raises:
        ConfigError: nothing can listen on the port.
    """
    check_address(args.host, args.port)
    with tempfile.TemporaryDirectory(prefix="eurosat-metrics-") as folder:
        environment = dict(os.environ) | {WORKER: str(os.getpid()), METRICS: folder}
        return _keep(command, environment, args.processes, args.grace)


def _keep(
    command: Sequence[str], environment: Mapping[str, str], count: int, grace_s: float
) -> int:
    told: list[int] = []  # an Event could be waited on by the very thread that its handler stops
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    running: dict[subprocess.Popen[bytes], float] = {}
    code = exit_codes.OK
    again = 0.0
    while code == exit_codes.OK and not told:
        time.sleep(LOOK_S)
        for process in [one for one in running if one.poll() is not None]:
            lived_s = time.monotonic() - running.pop(process)
            log.warning("process %d ended with code %d", process.pid, process.returncode)
            _forget(process.pid, environment[METRICS])
            if process.returncode == exit_codes.BAD_INPUT:  # it has said what is wrong
                code = exit_codes.BAD_INPUT
            elif lived_s < TOO_SOON_S:
                again = time.monotonic() + TOO_SOON_S
        while len(running) < count and code == exit_codes.OK and time.monotonic() >= again:
            running[subprocess.Popen(command, env=environment)] = time.monotonic()
    for process in running:
        process.terminate()
    until = time.monotonic() + grace_s + LOOK_S
    for process in running:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("process %d did not end within its %g s: killed", process.pid, grace_s)
            process.kill()
            process.wait()
    return code


def end_with_parent() -> None:
    """Watch that this process does not outlive the one that would start it again."""
    parent = int(os.environ[WORKER])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _forget(pid: int, folder: str) -> None:
    """What a process that has ended says of the present no longer holds."""
    os.environ.setdefault(METRICS, folder)
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
