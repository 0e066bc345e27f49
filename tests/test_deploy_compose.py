"""What docker-compose.yml promises: pinned, healthy in order, on loopback, without a password."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "docker-compose.yml"
SERVICES = {"postgres", "gcs", "mlflow"}
PINNED_IMAGE = re.compile(r"[^:@\s]+:\d[\w.-]*")
PINNED_REQUIREMENT = re.compile(r"([\w.-]+)==([\w.]+)")
REQUIRED_VARIABLE = re.compile(r"\$\{[A-Z_]+:\?[^}]+\}")


def services() -> dict[str, dict[str, Any]]:
    read: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return read


def pins(requirements: Path) -> dict[str, str]:
    lines = requirements.read_text().splitlines()
    return {match[1]: match[2] for line in lines if (match := PINNED_REQUIREMENT.match(line))}


def mlflow_option(name: str) -> str:
    prefix = f"--{name}="
    (value,) = (
        word.removeprefix(prefix)
        for word in services()["mlflow"]["command"]
        if word.startswith(prefix)
    )
    return str(value)


def test_the_platform_is_a_database_an_object_store_and_mlflow() -> None:
    assert set(services()) >= SERVICES


def test_every_service_has_a_healthcheck_a_restart_policy_and_a_memory_limit() -> None:
    for name, service in services().items():
        assert service.get("healthcheck", {}).get("test"), f"{name} has no healthcheck"
        assert service.get("restart") == "unless-stopped", f"{name} does not come back"
        assert service.get("mem_limit"), f"{name} may take all memory"


def test_every_image_is_pinned_to_a_release() -> None:
    for name, service in services().items():
        image = service.get("image", "")
        assert PINNED_IMAGE.fullmatch(image), f"{name}: {image!r} names no release"


def test_every_dockerfile_starts_from_a_pinned_image_and_installs_pinned_requirements() -> None:
    built = [service["build"] for service in services().values() if "build" in service]
    assert built, "no service is built here"
    for build in built:
        context = ROOT / (build if isinstance(build, str) else build["context"])
        bases = re.findall(r"^FROM\s+(\S+)", (context / "Dockerfile").read_text(), re.MULTILINE)
        assert bases, f"{context} has no FROM"
        for base in bases:
            assert PINNED_IMAGE.fullmatch(base), f"{context}: {base!r} names no release"
        for line in (context / "requirements.txt").read_text().splitlines():
            if line and not line.startswith("#"):
                assert PINNED_REQUIREMENT.fullmatch(line), f"{context}: {line!r} is not pinned"


def test_the_servers_mlflow_is_the_locked_one() -> None:
    server = pins(ROOT / "deploy" / "mlflow" / "requirements.txt")
    locked = pins(ROOT / "requirements.lock")
    assert server["mlflow"] == locked["mlflow"]
    assert services()["mlflow"]["image"].endswith(f":{locked['mlflow']}")


def test_nothing_is_published_beyond_loopback() -> None:
    for name, service in services().items():
        for port in service.get("ports", []):
            host = port.get("host_ip") if isinstance(port, dict) else str(port).split(":")[0]
            assert host == "127.0.0.1", f"{name} publishes {port}"
        assert service.get("network_mode") != "host", f"{name} stands on the host's network"


def test_no_password_is_written_down_and_a_missing_one_is_refused() -> None:
    seen = 0
    for name, service in services().items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN", key):
                seen += 1
                assert REQUIRED_VARIABLE.fullmatch(str(value)), f"{name}: {key} is a literal"
    assert seen, "no service asks for a password"
    assert not re.search(r"://[^\s/@]*:[^\s/@]*@", COMPOSE.read_text()), "a URL holds a password"


def test_the_example_environment_names_every_variable_and_holds_no_password() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE.read_text()))
    lines = (ROOT / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert set(example) == used
    for name, value in example.items():
        assert "PASSWORD" not in name or not value, f"{name} has a value that would be used"


def test_mlflow_waits_until_what_it_needs_is_healthy() -> None:
    needed = services()["mlflow"]["depends_on"]
    assert needed["postgres"] == {"condition": "service_healthy"}
    assert needed["gcs"] == {"condition": "service_healthy"}


def test_what_has_to_survive_lies_on_named_volumes() -> None:
    volumes = set(yaml.safe_load(COMPOSE.read_text())["volumes"])
    for name in ("postgres", "gcs"):
        mounted = {str(volume).split(":")[0] for volume in services()[name]["volumes"]}
        assert mounted & volumes, f"{name} keeps nothing on a named volume"


def test_mlflow_keeps_runs_in_postgres_and_proxies_artifacts_to_the_store() -> None:
    server = services()["mlflow"]
    assert mlflow_option("backend-store-uri").startswith("postgresql+psycopg2://")
    assert "--serve-artifacts" in server["command"]
    bucket = mlflow_option("artifacts-destination").removeprefix("gs://").split("/")[0]
    targets = [str(volume).split(":")[1] for volume in services()["gcs"]["volumes"]]
    assert f"/storage/{bucket}" in targets, f"nothing makes the bucket {bucket!r}"
    assert server["environment"]["STORAGE_EMULATOR_HOST"] == "http://gcs:4443"


def test_mlflow_answers_by_its_service_name_and_on_loopback_and_no_other() -> None:
    hosts = set(mlflow_option("allowed-hosts").split(","))
    assert hosts == {"mlflow:5000", "localhost:*", "127.0.0.1:*"}


def test_the_server_sends_no_telemetry() -> None:
    environment = services()["mlflow"]["environment"]
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["DO_NOT_TRACK"] == "true"


def compose_config(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("no docker command on PATH")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("this docker command has no compose plugin")
    return subprocess.run(
        [docker, "compose", "--env-file", os.devnull, "--file", str(COMPOSE), "config", "--quiet"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_docker_compose_accepts_the_file() -> None:
    asked = compose_config({"POSTGRES_PASSWORD": "x"})
    assert asked.returncode == 0, asked.stderr


def test_docker_compose_without_a_password_says_where_to_write_one() -> None:
    asked = compose_config({"POSTGRES_PASSWORD": ""})
    assert asked.returncode != 0
    assert "POSTGRES_PASSWORD" in asked.stderr
    assert ".env.example" in asked.stderr
