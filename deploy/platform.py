"""The platform without containers: `make platform` starts it, `make platform-down` ends it.

The services are those of docker-compose.yml, as processes on loopback. One process looks after
them: it starts each when those it needs are healthy, starts again what ends, and ends them all when
it is told to. While it runs, ``.platform/env`` says how to reach them; every verb reads that.
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

from deploy import postgresql, secrets, service
from deploy.service import Service
from eurosat.errors import ConfigError
from eurosat.runtime import atomic, cli, exit_codes, logs

log = logging.getLogger(__name__)

FOLDER = Path(".platform")
ROOT = Path(__file__).resolve().parents[1]
PORTS = {"mlflow": 5000, "serving": 5001, "promoter": 5002, "store": 4443, "postgres": 5432}
BUCKET = "mlflow"
DATABASE_OF_COMPOSE = "postgresql+psycopg2://mlflow@postgres:5432/mlflow"
"""As auth.ini has it."""
HEALTHY_S = 180.0
LOOK_S = 0.5
LOCK_S = 2.0
"""For whoever only looks whether a platform runs to have looked."""
TOO_SOON_S = 5.0
"""What ends sooner after its start waits so long before the next."""


class Platform:
    """The services of one folder. Nothing runs before `run`."""

    def __init__(
        self, folder: Path, ports: dict[str, int], only: Sequence[str] = tuple(PORTS)
    ) -> None:
        self.folder = folder.resolve()
        self.logs = self.folder / "logs"
        self.secrets = self.folder / "secrets"
        self.env = self.folder / "env"
        self._passwords = self.secrets / "pgpass"
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        self._ports, self._only = ports, only
        self._stopping = False
        self.database = f"postgresql+psycopg2://mlflow@127.0.0.1:{ports['postgres']}/mlflow"

    def run(self) -> int:
        """Until it is told to stop.

        Raises:
            ConfigError: a port is taken, a program is missing, or a service is not healthy.
        """
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        services: list[Service] = []
        try:
            self._prepare()
            services = [one for one in self._services() if one.name in self._only]
            for one in services:
                self._bring_up(one)
            _keep(self.env, self._told())
            log.info("the platform is up: %s", self.urls["mlflow"])
            while not self._stopping:
                for one in services:
                    self._look_after(one)
                time.sleep(LOOK_S)
        finally:
            self.env.unlink(missing_ok=True)
            for one in reversed(services):
                one.stop()
            log.info("the platform is down")
        return exit_codes.OK

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _prepare(self) -> None:
        for name in self._only:
            port = self._ports[name]
            if not service.is_free(port):
                raise ConfigError(
                    f"port {port} of 127.0.0.1 is taken: say --{name}-port, or --free-ports"
                )
        secrets.make(self.secrets)
        for path in (self.logs, self.folder / "store" / BUCKET):
            path.mkdir(parents=True, exist_ok=True)
        data = self.folder / "postgres"
        if not data.exists():
            begun = self.folder / "postgres.begun"
            shutil.rmtree(begun, ignore_errors=True)  # by one that was killed
            postgresql.initialise(begun, "mlflow", self.secrets / "postgres_password")
            begun.rename(data)
        password = secrets.read("postgres_password", self.secrets)
        _keep(self._passwords, f"*:*:*:mlflow:{password}\n")  # libpq wants it to be ours alone
        ini = (ROOT / "deploy/mlflow/auth.ini").read_text()
        atomic.atomic_write_text(
            self.folder / "auth.ini", ini.replace(DATABASE_OF_COMPOSE, self.database)
        )

    def _services(self) -> list[Service]:
        """In the order in which they start."""
        python, ports, urls = sys.executable, {k: str(v) for k, v in self._ports.items()}, self.urls
        return [
            Service(
                name="postgres",
                healthy=self._database_is_there,
                command=[
                    *postgresql.as_user(f"{service.WITH_PARENT}=INT"),
                    *postgresql.serve(self.folder / "postgres", self._ports["postgres"]),
                ],
            ),
            Service(
                name="store",
                healthy=lambda: service.answers(f"{urls['store']}/storage/v1/b/{BUCKET}"),
                command=service.object_store(self._ports["store"], self.folder / "store"),
            ),
            Service(
                name="mlflow",
                healthy=lambda: service.answers(f"{urls['mlflow']}/health"),
                environment=self._of_mlflow(),
                command=[
                    python,
                    "-m",
                    "mlflow",
                    "server",
                    "--host=127.0.0.1",
                    f"--port={ports['mlflow']}",
                    "--workers=1",
                    f"--backend-store-uri={self.database}",
                    "--serve-artifacts",
                    f"--artifacts-destination=gs://{BUCKET}/artifacts",
                    "--app-name=basic-auth",
                    "--allowed-hosts=localhost:*,127.0.0.1:*",
                ],
            ),
            Service(
                name="promoter",
                healthy=lambda: service.answers(f"{urls['promoter']}/health"),
                environment=self._as("promoter") | self._webhook(),
                command=[
                    python,
                    "-m",
                    "registry.receiver",
                    f"--port={ports['promoter']}",
                    "--promote",
                    f"--serving={urls['serving']}",
                    f"--inbox={self.folder / 'inbox.db'}",
                ],
            ),
            Service(
                name="serving",
                healthy=lambda: service.answers(f"{urls['serving']}/ping", also=503),
                environment=self._as("serving"),
                command=[python, "-m", "serving.server", f"--port={ports['serving']}"],
            ),
        ]

    def _of_mlflow(self) -> dict[str, str]:
        return {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT / "deploy" / "mlflow"), os.environ.get("PYTHONPATH", "")]
            ),
            "PGPASSFILE": str(self._passwords),
            "STORAGE_EMULATOR_HOST": self.urls["store"],
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": secrets.read("admin_password", self.secrets),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.read("flask_key", self.secrets),
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": secrets.read("webhook_key", self.secrets),
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_CACHE_TTL": "0",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        }

    def _as(self, user: str) -> dict[str, str]:
        """The environment of a service that asks MLflow."""
        return {
            "MLFLOW_TRACKING_URI": self.urls["mlflow"],
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": secrets.read(f"{user}_password", self.secrets),
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        }

    def _webhook(self) -> dict[str, str]:
        return {"MLFLOW_WEBHOOK_SECRET": secrets.read("webhook_secret", self.secrets)}

    def _bring_up(self, one: Service) -> None:
        begun = time.monotonic()
        one.start(self.logs)
        while not one.healthy():
            if self._stopping:
                raise KeyboardInterrupt
            ended = one.process and one.process.poll() is not None
            if ended or time.monotonic() - begun > HEALTHY_S:
                fault = "ended" if ended else f"is not healthy after {HEALTHY_S:g} s"
                said = one.last_line(self.logs)
                raise ConfigError(f"{one.name} {fault}: {said}")
            time.sleep(0.1)
        log.info("%s is healthy after %.1f s", one.name, time.monotonic() - begun)
        if one.name == "mlflow":
            self._introduce()

    def _introduce(self) -> None:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "deploy.bootstrap",
                f"--webhook={self.urls['promoter']}/webhook",
                f"--secrets={self.secrets}",
            ],
            cwd=ROOT,
            env=os.environ | self._as("admin"),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ConfigError(f"MLflow does not know its services: {done.stderr.strip()[-300:]}")

    def _look_after(self, one: Service) -> None:
        if self._stopping or not one.process or one.process.poll() is None:
            return
        wait = TOO_SOON_S - (time.monotonic() - one.started)
        if wait > 0:
            return  # it is looked at again soon
        log.warning(
            "%s ended with %d: %s; it is started again",
            one.name,
            one.process.returncode,
            one.last_line(self.logs),
        )
        one.stop()  # its children, which may hold the port
        one.start(self.logs)

    def _database_is_there(self) -> bool:
        import psycopg2

        told = self.database.replace("+psycopg2", "").removesuffix("/mlflow")
        try:
            connection = psycopg2.connect(f"{told}/postgres", passfile=str(self._passwords))
        except psycopg2.OperationalError:
            return False
        try:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")
            if not cursor.fetchone():
                cursor.execute("CREATE DATABASE mlflow")
        finally:
            connection.close()
        return True

    def _told(self) -> str:
        """What clients of it need to know, as the environment that every verb reads."""
        told = self._as("admin") | {
            "EUROSAT_SERVING_URL": self.urls["serving"],
            "EUROSAT_PROMOTER_URL": self.urls["promoter"],
            "EUROSAT_DATABASE_URI": self.database,
            "PGPASSFILE": str(self._passwords),
            "EUROSAT_ARTIFACTS": f"gs://{BUCKET}/artifacts",
            "STORAGE_EMULATOR_HOST": self.urls["store"],
            "EUROSAT_SECRETS": str(self.secrets),
        }
        return "".join(f"{name}={value}\n" for name, value in told.items())


def _keep(file: Path, text: str) -> None:
    """A file that nobody else can read, not even while it is written."""
    before = os.umask(0o077)
    try:
        atomic.atomic_write_text(file, text)
    finally:
        os.umask(before)


def up(folder: Path, ports: dict[str, int], only: Sequence[str]) -> int:
    """Start it as a process of its own, and return when it is healthy.

    Raises:
        ConfigError: it does not become so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (pid := running(folder)) is not None:
        log.info("the platform of %s is up already (process %d)", folder, pid)
        return exit_codes.OK
    (folder / "logs").mkdir(exist_ok=True)
    said = folder / "logs" / "platform.log"
    flags = [f"--{name}-port={port}" for name, port in ports.items()]
    flags += [f"--only={','.join(only)}"]
    with said.open("wb") as opened:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.platform", "run", f"--folder={folder}", *flags],
            stdout=opened,
            stderr=opened,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    told = 0
    try:
        while True:
            ended, ready = process.poll() is not None, (folder / "env").exists()
            text = said.read_text()
            sys.stderr.write(text[told:])
            told = len(text)
            if ended:
                return exit_codes.BAD_INPUT
            if ready:
                return exit_codes.OK
            time.sleep(0.2)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def down(folder: Path) -> int:
    """Tell it to end, and wait until it has."""
    if (pid := running(folder)) is None:
        log.info("no platform runs in %s", folder)
        return exit_codes.OK
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGTERM)
    while True:
        with suppress(ConfigError):
            if running(folder) is None:
                break
        time.sleep(0.1)
    log.info("the platform of %s is down", folder)
    return exit_codes.OK


def running(folder: Path) -> int | None:
    """The process that looks after it; None where there is none."""
    lock = FileLock(folder / "lock", timeout=0)
    try:
        with lock:
            (folder / "env").unlink(missing_ok=True)  # it was killed
            return None
    except Timeout:
        try:
            return int(json.loads((folder / "process.json").read_text())["pid"])
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} is being started or ended: try again") from error


def _run(folder: Path, ports: dict[str, int], only: Sequence[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=LOCK_S):
            atomic.atomic_write_text(folder / "process.json", json.dumps({"pid": os.getpid()}))
            try:
                return Platform(folder, ports, only).run()
            finally:
                (folder / "process.json").unlink(missing_ok=True)
    except Timeout as error:
        raise ConfigError(f"another platform runs in {folder}: make platform-down") from error


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("deploy.platform", "The platform as processes of this machine.")
    parser.add_argument("verb", choices=("up", "down", "run"), help="run: in the foreground")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="its data, logs and secrets")
    parser.add_argument("--free-ports", action="store_true", help="unless one is named")
    for name, port in PORTS.items():
        parser.add_argument(f"--{name}-port", type=int, metavar=str(port))
    parser.add_argument("--only", metavar="NAME,...", help="such as postgres,store for a restore")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    only = args.only.split(",") if args.only else list(PORTS)
    if unknown := set(only) - set(PORTS):
        raise ConfigError(f"--only {sorted(unknown)[0]} is none of {', '.join(PORTS)}")
    if args.verb == "down":
        return down(args.folder)
    ports = {
        name: getattr(args, f"{name}_port") or (service.free_port() if args.free_ports else port)
        for name, port in PORTS.items()
    }
    return {"up": up, "run": _run}[args.verb](args.folder, ports, only)


if __name__ == "__main__":
    cli.run_command(main, platform=False)  # what it writes is for others
