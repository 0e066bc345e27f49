"""All of docker-compose.yml on a real Docker engine: `make test-docker`."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient

from benchmarks.platform import load
from benchmarks.platform.fixture import PlatformFixture
from deploy import images, users
from tests.support.images import encoded
from tests.support.mlflow_server import free_port
from tests.support.offline import sitecustomize
from tests.support.paths import ROOT
from tests.support.platforms import PASSWORD
from tests.support.registry import MLFLOW_WARNS
from tests.support.serving import until

pytestmark = [*MLFLOW_WARNS, pytest.mark.docker]
PROJECT = "eurosat-test"
UP_S = 180.0
"""Limit for the start of all services from built images."""
BUILD_S = 1800
WAIT_S = 180.0
LARGE_BYTES = 300_000_000
IMAGE_BYTES = 1_500_000_000
LISTENER = """
import http.server
class Listener(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("", 8000), Listener).serve_forever()
"""
SMALL = (
    "data=synthetic",
    "recipe=demo",
    "data.synthetic.tiles=1200",
    "data.synthetic.difficulty=0",
    "model.name=test_resnet",
    "optim.name=adamw",
    "optim.lr=4e-3",
    "optim.ema=0.9",
    "optim.batch_size=16",
    "augment.cutmix=0",
    "trainer.epochs=10",
    "trainer.precision=fp32",
)
"""Passes the gates' floors after seconds of training."""
SERVICES = {"postgres": "postgres", "mlflow": "mlflow", "store": "gcs"}
"""Names of services in docker-compose.yml, by their names in bench-platform."""
LOAD_S, WRITERS, READERS, RATE = 60, 16, 4, 200
EMPTY: Mapping[str, str] = {}
ALERTS = """
route: {receiver: listener, group_by: [alertname], group_wait: 1s, group_interval: 1s}
receivers:
  - name: listener
    webhook_configs: [{url: "http://listener:8000/"}]
"""


@dataclass(frozen=True)
class Stack:
    """The running containers."""

    folder: Path
    """A copy of the repository, with its own secrets."""
    port: int
    env: dict[str, str]
    seconds: float
    """Duration of `docker compose up --wait`."""

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def certificate(self) -> str:
        return str(self.folder / ".platform/secrets/tls.crt")

    def secret(self, name: str) -> str:
        return (self.folder / ".platform/secrets" / name).read_text()

    def administrator(self) -> users.UserAdmin:
        return users.UserAdmin(self.url, "admin", self.secret("admin_password"), self.certificate)

    def compose(self, *arguments: str, timeout: float = 300) -> str:
        return run("docker", "compose", "-p", PROJECT, *arguments, at=self, timeout=timeout)

    def container(self, service: str) -> dict[str, Any]:
        output = run("docker", "inspect", self.compose("ps", "-aq", service).strip(), at=self)
        (container,) = json.loads(output)
        return dict(container)

    def containers(self) -> list[dict[str, Any]]:
        ids = self.compose("ps", "-aq").split()
        containers: list[dict[str, Any]] = json.loads(run("docker", "inspect", *ids, at=self))
        return containers

    def client(self, role: str) -> dict[str, str]:
        """Create a user with the role; return the environment of the user's shell."""
        self.administrator().add(f"a-{role}", role, PASSWORD)
        return {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": f"a-{role}",
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
            "MLFLOW_TRACKING_SERVER_CERT_PATH": self.certificate,
        }

    def champion_served(self) -> str | None:
        response = requests.post(
            f"{self.url}/serving/predict",
            encoded("River", "JPEG"),
            timeout=30,
            verify=self.certificate,
            headers={
                "Content-Type": "image/jpeg",
                "Authorization": f"Bearer {self.secret('serving_key')}",
            },
        )
        return str(response.json()["model_version"]) if response.ok else None


@dataclass(frozen=True)
class Containers(PlatformFixture):
    """The containers as a platform for the load of bench-platform."""

    stack: Stack

    def administrator(self) -> users.UserAdmin:
        return self.stack.administrator()

    def connection(self) -> Any:
        import psycopg2

        connection = psycopg2.connect(
            host=address(self.stack, "postgres"),
            user="mlflow",
            dbname="mlflow",
            password=self.stack.secret("postgres_password"),
            connect_timeout=5,
        )
        connection.autocommit = True
        return connection

    def kill(self, service: str) -> None:
        if service == "postgres":
            self.stack.compose("restart", service)
            return
        started_at = self.stack.container(service)["State"]["StartedAt"]
        # From inside, like a crash: Docker does not restart what `docker kill` has ended.
        compose = ("docker", "compose", "-p", PROJECT, "exec", "-T")
        subprocess.run(
            [*compose, service, "sh", "-c", "kill -9 -1"],
            cwd=self.stack.folder,
            env={**os.environ, **self.stack.env},
            capture_output=True,
            timeout=60,
        )
        until(
            lambda: self.stack.container(service)["State"]["StartedAt"] != started_at,
            WAIT_S,
            f"{service} is restarted",
        )

    @contextmanager
    def cut_off(self, service: str) -> Iterator[None]:
        self.stack.compose("pause", SERVICES[service])
        try:
            yield
        finally:
            self.stack.compose("unpause", SERVICES[service])

    def memory_mb(self) -> dict[str, float]:
        return {}  # a minute is too short; `make bench-platform` measures it


def address(stack: Stack, service: str) -> str:
    """Return the address of a container on Docker's network, which this machine can reach."""
    networks = stack.container(service)["NetworkSettings"]["Networks"]
    return str(next(iter(networks.values()))["IPAddress"])


def run(
    *command: str, at: "Stack | Path", timeout: float = 300, env: Mapping[str, str] = EMPTY
) -> str:
    folder = at if isinstance(at, Path) else at.folder
    stack_env = EMPTY if isinstance(at, Path) else at.env
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **stack_env, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, (
        f"{' '.join(command)}: {result.stdout[-2000:]}{result.stderr[-4000:]}"
    )
    return result.stdout


def use_local_images(folder: Path) -> None:
    """Where an image cannot be pulled, use the one of that name which the engine has.

    An engine that reaches no registry has images that were made on the machine, maybe of another
    version and without a digest; what was replaced is printed.
    """
    present = run("docker", "images", "--format", "{{.Repository}}:{{.Tag}}", at=folder).split()
    files = [file for file in images.files(folder) if ".github" not in file.parts]
    for image in sorted({image for file in files for image in images.pinned(file)}):
        command = ["docker", "pull", "-q", str(image)]
        if subprocess.run(command, capture_output=True, timeout=BUILD_S).returncode == 0:
            continue
        exact = f"{image.name}:{image.tag}"
        same = [name for name in present if name.rpartition(":")[0] == image.name]
        replacement = exact if exact in same else next(iter(same), exact)
        print(f"{exact} cannot be pulled: {replacement} is used")
        for file in files:
            file.write_text(file.read_text().replace(str(image), replacement))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if shutil.which("docker") is None:
        pytest.fail("no docker command on PATH: these tests need an engine with compose")
    folder = tmp_path_factory.mktemp("repository")
    for name in run("git", "ls-files", "-co", "--exclude-standard", at=ROOT).splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run(sys.executable, "-m", "deploy.secrets", at=folder)
    use_local_images(folder)
    (folder / "alerts.yml").write_text(ALERTS)
    rules = folder / "deploy/prometheus/rules.yml"
    rules.write_text(rules.read_text().replace("for: 30m", "for: 15s"))  # of NoChampion
    port = free_port()
    env = {"PLATFORM_PORT": str(port), "ALERTMANAGER_CONFIG": "./alerts.yml"}
    compose = ("docker", "compose", "-p", PROJECT)
    run(*compose, "down", "-v", "--remove-orphans", at=folder, env=env)
    run(*compose, "--profile", "backup", "build", at=folder, timeout=BUILD_S, env=env)
    start = time.monotonic()
    try:
        run(*compose, "up", "--wait", at=folder, timeout=600, env=env)
        stack = Stack(folder, port, env, time.monotonic() - start)
        run(
            "docker",
            "run",
            "-d",
            "--rm",
            "--name",
            f"{PROJECT}-listener",
            "--network",
            f"{PROJECT}_default",
            "--network-alias",
            "listener",
            "python:3.11-slim",
            "python",
            "-uc",
            LISTENER,
            at=stack,
        )
        yield stack
    finally:
        subprocess.run(["docker", "rm", "-f", f"{PROJECT}-listener"], capture_output=True)
        run(*compose, "down", "-v", "--remove-orphans", at=folder, env=env)


def test_the_stack_is_healthy_within_three_minutes(stack: Stack) -> None:
    print(f"up after {stack.seconds:.0f} s")
    assert stack.seconds < UP_S
    states = {c["Name"]: c["State"] for c in stack.containers() if "bootstrap" not in c["Name"]}
    assert len(states) == 8
    for name, state in states.items():
        assert state["Health"]["Status"] == "healthy", name
        assert not state["Restarting"], name


def test_the_containers_are_locked_down_as_the_file_says(stack: Stack) -> None:
    for container in stack.containers():
        name, host = container["Name"], container["HostConfig"]
        assert container["Config"]["User"] not in ("", "0", "root"), f"{name} is root"
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert not host["CapAdd"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["Memory"] > 0, name
        published = [port for ports in host["PortBindings"].values() for port in ports]
        if "proxy" in name:
            assert [port["HostIp"] for port in published] == ["127.0.0.1"]
        else:
            assert not published, name


def test_no_secret_is_in_what_docker_shows_or_in_a_log(stack: Stack) -> None:
    texts = json.dumps(stack.containers())
    texts += stack.compose("logs", "--no-color") + stack.compose("config")
    for file in (stack.folder / ".platform/secrets").iterdir():
        value = file.read_text().strip()
        if len(value) > 8 and file.name not in ("tls.crt", "serving_keys"):
            assert value not in texts, file.name


def test_the_serving_image_is_small_and_has_no_torch(stack: Stack) -> None:
    (image,) = json.loads(run("docker", "image", "inspect", "eurosat-serving:0.1.0", at=stack))
    print(f"the serving image has {image['Size'] / 1e6:.0f} MB")
    assert image["Size"] < IMAGE_BYTES
    output = stack.compose(
        "exec",
        "-T",
        "serving",
        "python",
        "-c",
        "import importlib.util as u; print([n for n in ('torch', 'ray') if u.find_spec(n)])",
    )
    assert output.strip() == "[]"


def test_requests_without_a_login_are_refused(stack: Stack) -> None:
    def status(path: str, method: str = "GET", **options: Any) -> int:
        url, trusted = f"{stack.url}/{path}", stack.certificate
        return requests.request(method, url, verify=trusted, timeout=30, **options).status_code

    search = "api/2.0/mlflow/experiments/get?experiment_id=0"
    assert status(search) == 401
    assert status(search, auth=("admin", "wrong")) == 401
    for path in ("prometheus/", "alertmanager/"):
        assert status(path) == 401
    admin = ("admin", stack.secret("admin_password"))
    assert status(search, auth=admin) == 200
    assert status("prometheus/-/ready", auth=admin) == 200
    assert status("alertmanager/-/ready", auth=admin) == 200
    assert status(search, auth=admin, headers={"Host": "evil.example"}) == 403
    assert status("serving/predict", "POST", data=b"x") in (401, 403)
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(stack.url, timeout=30)  # the client does not trust the certificate
    unencrypted = requests.get(f"http://127.0.0.1:{stack.port}/", timeout=30)
    assert unencrypted.status_code == 400


def test_an_alert_reports_that_there_is_no_champion(stack: Stack) -> None:
    def has_alert() -> bool:
        logs = ["docker", "logs", f"{PROJECT}-listener"]
        return b"NoChampion" in subprocess.run(logs, capture_output=True, check=True).stdout

    until(has_alert, WAIT_S, "Alertmanager's webhook delivers the alert")


def test_a_large_artifact_is_downloaded_unchanged(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in stack.client("writer").items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "large.bin"
    with file.open("wb") as out:
        for _ in range(LARGE_BYTES // 1_000_000):
            out.write(os.urandom(1_000_000))
    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    client.log_artifact(run_id, str(file))
    client.set_terminated(run_id)
    downloaded = Path(client.download_artifacts(run_id, file.name, str(tmp_path / "back")))
    with file.open("rb") as sent, downloaded.open("rb") as received:
        digests = {hashlib.file_digest(f, "sha256").hexdigest() for f in (sent, received)}
    assert len(digests) == 1


def test_a_model_that_was_trained_outside_is_promoted_and_served(
    stack: Stack, tmp_path: Path
) -> None:
    """Training through TLS and a password, registration, webhook, promotion, hot swap, a tile."""
    assert stack.champion_served() is None
    login = stack.client("writer")
    cache = {"EUROSAT_CACHE": str(tmp_path / "cache"), "EUROSAT_COMMIT": "c" * 40}
    path = os.pathsep.join([str(stack.folder), os.environ.get("PYTHONPATH", "")])
    environment = login | cache | {"PYTHONPATH": path}

    def command(*arguments: str) -> str:
        return run(sys.executable, "-m", *arguments, at=stack.folder, timeout=900, env=environment)

    command("expectations.validate", *SMALL)
    run_id = command("eurosat.train", *SMALL).split()[-1]
    number = command("registry.register", run_id).split()[-1]
    until(lambda: stack.champion_served() == number, WAIT_S, "serving answers with it")
    message = "served by http://serving:5001"
    until(
        lambda: message in stack.compose("logs", "promoter"),
        WAIT_S,
        "the promoter has checked that serving answers",
    )


def test_the_trainer_container_validates_and_trains(stack: Stack) -> None:
    """Entries of MLproject in the image of the profile ``trainer``, against the platform."""
    stack.compose("--profile", "trainer", "build", "trainer", timeout=BUILD_S)

    def entry(name: str, *params: str) -> str:
        options = [word for param in params for word in ("-P", param)]
        return stack.compose(
            "--profile",
            "trainer",
            "run",
            "--rm",
            "-T",
            "trainer",
            "mlflow",
            "run",
            ".",
            "--env-manager",
            "local",
            "-e",
            name,
            *options,
            timeout=900,
        )

    few = "overrides=data.synthetic.tiles=300"
    entry("validate", few)
    output = entry("train", "recipe=demo", few)
    run_id = re.findall(r"^run ([0-9a-f]{32})$", output, re.MULTILINE)[-1]
    run = stack.administrator().request("GET", "2.0/mlflow/runs/get", run_id=run_id)
    assert run
    assert run["run"]["info"]["status"] == "FINISHED"
    assert "test_accuracy" in {metric["key"] for metric in run["run"]["data"]["metrics"]}


def test_only_mlflow_and_backup_reach_the_stores(stack: Stack) -> None:
    connect = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    for service, reaches in (("mlflow", True), ("promoter", False), ("serving", False)):
        for host, port in (("gcs", "4443"), ("postgres", "5432")):
            command = ("exec", "-T", service, "python", "-c", connect, host, port)
            if reaches:
                stack.compose(*command)
            else:
                with pytest.raises(AssertionError, match="Name or service|name resolution"):
                    stack.compose(*command)


def test_mlflows_account_is_no_superuser_and_nobody_logs_in_as_one(stack: Stack) -> None:
    query = "SELECT rolname, rolsuper, rolpassword IS NULL FROM pg_authid WHERE rolcanlogin"
    roles = stack.compose(
        "exec", "-T", "postgres", "psql", "-U", "postgres", "-At", "-c", query, "postgres"
    )
    assert set(roles.split()) == {"postgres|t|t", "mlflow|f|f"}


def test_what_sets_up_the_accounts_has_ended(stack: Stack) -> None:
    state = stack.container("bootstrap")["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)


def test_a_backup_is_complete(stack: Stack) -> None:
    stack.compose("run", "--rm", "-T", "backup")
    listing = stack.compose(
        "run", "--rm", "-T", "--entrypoint", "sh", "backup", "-c", "ls /backups/*.tar"
    )
    (file,) = listing.split()
    stack.compose("run", "--rm", "-T", "backup", "verify", file)


def test_nothing_acknowledged_is_lost_when_containers_are_killed(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one-minute form of `make bench-platform`."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", stack.certificate)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", stack.certificate)
    store, is_local = address(stack, "gcs"), sitecustomize.is_local
    # Docker's networks are on this machine.
    monkeypatch.setattr(sitecustomize, "is_local", lambda host: host == store or is_local(host))
    env = {
        "MLFLOW_TRACKING_URI": stack.url,
        "EUROSAT_ARTIFACTS": "gs://mlflow/artifacts",
        "STORAGE_EMULATOR_HOST": f"http://{store}:4443",
    }
    outcome = load.run(
        Containers(tmp_path, env, stack),
        seconds=LOAD_S,
        writers=WRITERS,
        readers=READERS,
        rate=RATE,
    )
    print(*(f"{row['what']}: {row['value']} {row['unit']}" for row in outcome.faults), sep="\n")
    print(dict(outcome.counts), f"{outcome.arrived_s:.0f} s until all data had arrived")
    assert len(outcome.faults) == 4
    assert min(outcome.counts[name] for name in ("runs", "points", "params", "artifacts")) > 0
    assert all(outcome.counts[name] == 0 for name in ("lost", "stuck", "twice"))
