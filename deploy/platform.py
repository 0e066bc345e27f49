"""The platform without containers: `make platform` starts it, `make platform-down` stops it.

The services are those of docker-compose.yml, as processes on loopback. One process supervises them:
it starts each after those that it needs are healthy, restarts what has died, and stops them all at
its own end. While it runs, ``.platform/env`` tells every command how to reach them.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from deploy import addresses, postgresql, secrets
from deploy.addresses import PORTS, Addresses
from deploy.layout import BUCKET, ROOT, Layout
from deploy.service import Service, is_port_free
from deploy.services import all_services
from eurosat.errors import ConfigError
from eurosat.runtime import atomic, cli, env_file, exit_codes, logs

log = logging.getLogger(__name__)

FOLDER = Path(".platform")
DATABASE_OF_COMPOSE = "postgresql+psycopg2://mlflow@postgres:5432/mlflow"
"""Database in auth.ini, which is written for docker compose."""
HEALTHY_TIMEOUT_S = 180.0
POLL_INTERVAL_S = 0.5
LOCK_TIMEOUT_S = 2.0
"""Longer than `running_pid` holds the lock, which it takes to see whether a platform runs."""
RESTART_BACKOFF_S = 5.0
"""A service that dies sooner after its start is restarted only after this time."""


class Platform:
    """Supervisor of the services of one folder. Nothing runs before `run`."""

    def __init__(self, layout: Layout, names: Sequence[str] = tuple(PORTS)) -> None:
        """``names`` are the services to be run."""
        self._layout, self._names = layout, names
        self._stopping = False

    def run(self) -> int:
        """Run the services until a signal comes.

        Raises:
            ConfigError: a port is taken, a program is missing, or a service is not healthy.
        """
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        services: list[Service] = []
        try:
            self._prepare()
            services = [
                service for service in all_services(self._layout) if service.name in self._names
            ]
            for service in services:
                self._start_and_wait(service)
            env = self._layout.client_env()
            text = env_file.dump(env)
            self._layout.addresses.save(self._layout.folder)
            atomic.atomic_write_private(self._layout.env, text)
            if "mlflow" in self._names:
                log.info("the platform is up: %s", self._layout.url("mlflow"))
            else:
                log.info("only %s are up, without MLflow", ", ".join(self._names))
            while not self._stopping:
                for service in services:
                    self._restart_if_dead(service)
                    service.rotate_log(self._layout.logs)
                time.sleep(POLL_INTERVAL_S)
        finally:
            self._layout.env.unlink(missing_ok=True)
            for service in reversed(services):
                service.stop()
            log.info("the platform is down")
        return exit_codes.OK

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _prepare(self) -> None:
        """Check the ports; create secrets, folders, the database cluster and configuration."""
        layout = self._layout
        for name in self._names:
            port = layout.addresses.ports[name]
            if not is_port_free(port):
                raise ConfigError(
                    f"port {port} of 127.0.0.1 is taken: give --{name}-port, or --free-ports"
                )
        secrets.make_missing(layout.secrets)
        for path in (layout.logs, layout.folder / "store" / BUCKET):
            path.mkdir(parents=True, exist_ok=True)
        password = secrets.read("postgres_password", layout.secrets)
        cluster = layout.folder / "postgres"
        if not cluster.exists():
            unfinished = layout.folder / "postgres.begun"
            shutil.rmtree(unfinished, ignore_errors=True)  # of a start that was killed
            postgresql.initialise(
                unfinished, postgresql.SUPERUSER, layout.secrets / "postgres_password"
            )
            postgresql.create_account(unfinished, password)
            unfinished.rename(cluster)
        postgresql.write_password_file(layout.secrets, password)
        ini = (ROOT / "deploy/mlflow/auth.ini").read_text()
        atomic.atomic_write_text(layout.auth_ini, ini.replace(DATABASE_OF_COMPOSE, layout.database))

    def _start_and_wait(self, service: Service) -> None:
        """Start a service and wait until it is healthy.

        Raises:
            ConfigError: it ends, or is not healthy in time.
        """
        start, name = time.monotonic(), service.name
        service.start(self._layout.logs)
        while not service.healthy():
            if self._stopping:
                raise KeyboardInterrupt
            ended = service.process and service.process.poll() is not None
            if ended or time.monotonic() - start > HEALTHY_TIMEOUT_S:
                problem = "ended" if ended else f"is not healthy after {HEALTHY_TIMEOUT_S:g} s"
                raise ConfigError(f"{name} {problem}: {service.last_line(self._layout.logs)}")
            time.sleep(0.1)
        log.info("%s is healthy after %.1f s", name, time.monotonic() - start)
        if name == "mlflow":
            self._bootstrap()

    def _bootstrap(self) -> None:
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "deploy.bootstrap",
                f"--webhook={self._layout.url('promoter')}/webhook",
                f"--secrets={self._layout.secrets}",
            ],
            cwd=ROOT,
            env=os.environ | self._layout.login_env("admin"),
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise ConfigError(f"MLflow cannot be set up: {result.stderr.strip()[-300:]}")

    def _restart_if_dead(self, service: Service) -> None:
        if self._stopping or not service.process or service.process.poll() is None:
            return
        if time.monotonic() - service.started_at < RESTART_BACKOFF_S:
            return
        log.warning(
            "%s ended with %d: %s; it is restarted",
            service.name,
            service.process.returncode,
            service.last_line(self._layout.logs),
        )
        service.stop()  # its children may still hold the port
        service.start(self._layout.logs)


def up(folder: Path, chosen: Addresses, names: Sequence[str]) -> int:
    """Start the platform as a background process, and return when it is healthy.

    Its log is copied to standard error meanwhile. Returns 2 if it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (pid := running_pid(folder)) is not None:
        log.info("the platform of %s is up already (process %d)", folder, pid)
        return exit_codes.OK
    (folder / "logs").mkdir(exist_ok=True)
    log_file = folder / "logs" / "platform.log"
    flags = [f"--{name}-port={port}" for name, port in chosen.ports.items()]
    flags += [f"--public-url={chosen.public_url or ''}"]
    flags += [f"--only={','.join(names)}"]
    with log_file.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.platform", "run", f"--folder={folder}", *flags],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        return _follow_start(process, log_file, folder / "env")
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def _follow_start(process: "subprocess.Popen[bytes]", log_file: Path, env: Path) -> int:
    shown = 0
    while True:
        ended, is_ready = process.poll() is not None, env.exists()
        text = log_file.read_text()
        sys.stderr.write(text[shown:])
        shown = len(text)
        if ended:
            return exit_codes.BAD_INPUT
        if is_ready:
            return exit_codes.OK
        time.sleep(0.2)


def down(folder: Path) -> int:
    """Stop the platform, and wait until it has ended."""
    if (pid := running_pid(folder)) is None:
        log.info("no platform runs in %s", folder)
        return exit_codes.OK
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGTERM)
    while True:
        with suppress(ConfigError):
            if running_pid(folder) is None and not _is_alive(pid):
                break
        time.sleep(0.1)
    log.info("the platform of %s is down", folder)
    return exit_codes.OK


def _is_alive(pid: int) -> bool:
    """Return whether a process still runs; one that is only not reaped yet does not."""
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def running_pid(folder: Path) -> int | None:
    """Return the supervisor's process id; None if no platform runs in ``folder``.

    Raises:
        ConfigError: the platform is starting or ending at this moment.
    """
    try:
        with FileLock(folder / "lock", timeout=0):
            (folder / "env").unlink(missing_ok=True)  # left by a supervisor that was killed
            return None
    except Timeout:
        try:
            return int(json.loads((folder / "process.json").read_text())["pid"])
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the platform of {folder} is starting or ending: try again"
            ) from error


def _run(folder: Path, chosen: Addresses, names: Sequence[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=LOCK_TIMEOUT_S):
            atomic.atomic_write_text(folder / "process.json", json.dumps({"pid": os.getpid()}))
            try:
                return Platform(Layout(folder.resolve(), chosen), names).run()
            finally:
                (folder / "process.json").unlink(missing_ok=True)
    except Timeout as error:
        raise ConfigError(f"another platform runs in {folder}: make platform-down") from error


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("deploy.platform", "Run the platform as processes of this machine.")
    parser.add_argument("command", choices=("up", "down", "run"), help="run: in the foreground")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for data, logs and secrets")
    parser.add_argument(
        "--free-ports",
        action="store_true",
        help="choose free ports instead of the default ones; later starts keep them",
    )
    parser.add_argument(
        "--public-url",
        metavar="URL",
        help="of a reverse proxy before MLflow, kept for later starts; empty: none",
    )
    for name, port in PORTS.items():
        parser.add_argument(f"--{name}-port", type=int, metavar=str(port))
    parser.add_argument("--only", metavar="NAME,...", help="such as postgres,store for a restore")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    names = args.only.split(",") if args.only else list(PORTS)
    if unknown := sorted(set(names) - set(PORTS)):
        raise ConfigError(f"--only {unknown[0]} is none of {', '.join(PORTS)}")
    if args.command == "down":
        return down(args.folder)
    requested = {name: getattr(args, f"{name}_port") for name in PORTS}
    chosen = addresses.choose(args.folder, requested, args.public_url, free_ports=args.free_ports)
    return {"up": up, "run": _run}[args.command](args.folder, chosen, names)


if __name__ == "__main__":
    cli.run_command(main, platform=False)  # it writes the environment that others read
