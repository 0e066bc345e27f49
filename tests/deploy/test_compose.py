"""docker-compose.yml: pinned images, health checks, locked down, without secrets."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import secrets
from tests.support.paths import ROOT

COMPOSE = ROOT / "docker-compose.yml"
ALWAYS = {
    "postgres",
    "gcs",
    "mlflow",
    "bootstrap",
    "promoter",
    "serving",
    "prometheus",
    "alertmanager",
    "proxy",
}
"""Services that `docker compose up` starts; the others need a profile."""
RUN_ONCE = {"upgrade", "bootstrap", "trainer", "backup"}
PINNED_IMAGE = re.compile(r"[^:@\s]+:v?\d[\w.-]*(@sha256:[0-9a-f]{64})?")
PINNED_REQUIREMENT = re.compile(r"([\w.-]+)==([\w.]+)")


def services() -> dict[str, dict[str, Any]]:
    parsed: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return parsed


def pins(requirements: Path) -> dict[str, str]:
    lines = requirements.read_text().splitlines()
    return {match[1]: match[2] for line in lines if (match := PINNED_REQUIREMENT.match(line))}


def dockerfiles() -> list[Path]:
    return sorted((ROOT / "deploy").glob("*/Dockerfile"))


def test_up_starts_the_platform_and_profiles_start_the_rest() -> None:
    assert {name for name, service in services().items() if "profiles" not in service} == ALWAYS


def test_every_service_has_a_healthcheck_a_restart_policy_and_a_memory_limit() -> None:
    for name, service in services().items():
        assert service.get("mem_limit"), f"{name} has no memory limit"
        runs_once = service["restart"] == "no"
        assert runs_once == (name in RUN_ONCE), f"{name} is not restarted"
        assert runs_once or service.get("healthcheck", {}).get("test"), f"{name} has no healthcheck"


def test_every_service_is_locked_down() -> None:
    for name, service in services().items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("network_mode") != "host", name
        assert not service.get("privileged"), name


def test_no_service_runs_as_root() -> None:
    for name, service in services().items():
        if user := service.get("user"):
            assert not user.startswith("0"), name
        else:
            lines = (ROOT / service["build"]["dockerfile"]).read_text().splitlines()
            users = [line.split()[1] for line in lines if line.startswith("USER ")]
            assert users, f"{name}: the Dockerfile names no user"
            assert users[-1] == "10001:10001", name


def test_every_image_is_pinned_to_a_release_and_a_digest() -> None:
    for name, service in services().items():
        match = PINNED_IMAGE.fullmatch(service.get("image", ""))
        assert match, f"{name}: {service.get('image')!r} has no version"
        assert bool(match[1]) != ("build" in service), f"{name} is built here, or has a digest"


@pytest.mark.parametrize("file", dockerfiles(), ids=lambda file: file.parent.name)
def test_every_dockerfile_starts_from_pinned_images_and_installs_from_a_lock(file: Path) -> None:
    text = file.read_text()
    stages = set(re.findall(r" AS (\w+)$", text, re.MULTILINE))
    bases = re.findall(r"^FROM\s+(\S+)", text, re.MULTILINE)
    assert bases, f"{file} has no FROM"
    for base in bases:
        match = PINNED_IMAGE.fullmatch(base)
        assert base in stages or (match and match[1]), f"{base!r} has no version and digest"
    if "pip install" in text:
        assert len(bases) > 1, "the stage that installs packages is not the final one"
        assert "--require-hashes" in text


@pytest.mark.parametrize("name", ["mlflow", "postgres", "serving"])
def test_the_locks_of_images_have_the_versions_of_the_main_lock(name: str) -> None:
    main, image = pins(ROOT / "requirements.lock"), pins(ROOT / f"deploy/{name}/requirements.lock")
    assert image
    differing = {key for key in main.keys() & image.keys() if main[key] != image[key]}
    assert not differing
    assert "torch" not in image
    if name == "mlflow":
        assert services()["mlflow"]["image"].endswith(f":{image['mlflow']}")


def test_only_the_proxy_is_published_and_on_loopback() -> None:
    published = {name: s["ports"] for name, s in services().items() if "ports" in s}
    assert published == {"proxy": ["${PLATFORM_BIND:-127.0.0.1}:${PLATFORM_PORT:-8443}:8443"]}


def test_only_services_that_need_the_stores_can_reach_them() -> None:
    parsed = yaml.safe_load(COMPOSE.read_text())
    assert parsed["networks"]["stores"]["internal"]
    inside = {name for name, s in services().items() if "stores" in s.get("networks", [])}
    assert services()["postgres"]["networks"] == services()["gcs"]["networks"] == ["stores"]
    assert inside == {"postgres", "gcs", "mlflow", "upgrade", "backup"}


def test_grafana_is_reached_through_the_proxy_alone_and_has_no_anonymous_user() -> None:
    parsed = yaml.safe_load(COMPOSE.read_text())
    assert parsed["networks"]["dashboards"]["internal"]
    inside = {name for name, s in services().items() if "dashboards" in s.get("networks", [])}
    assert inside == {"grafana", "prometheus", "proxy"}
    grafana = services()["grafana"]
    assert grafana["networks"] == ["dashboards"]
    assert grafana["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert grafana["environment"]["GF_AUTH_PROXY_HEADER_NAME"] == "X-WEBAUTH-USER"
    assert grafana["environment"]["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


def test_each_service_has_the_secrets_of_its_own_role_alone() -> None:
    """A service that reads files of members must not hold what opens more than its own role."""
    mounted = {name: set(service.get("secrets", [])) for name, service in services().items()}
    assert mounted["promoter"] == {"promoter_password", "webhook_secret", "serving_key"}
    assert mounted["serving"] == {"serving_password", "serving_keys"}
    assert mounted["trainer"] == {"trainer_password"}
    assert {name for name, secrets in mounted.items() if "admin_password" in secrets} == {
        "mlflow",
        "upgrade",
        "bootstrap",
        "backup",
    }
    for secret in ("backup_key", "backup_credentials"):
        assert {name for name, secrets in mounted.items() if secret in secrets} == {"backup"}


def test_no_secret_is_in_the_compose_file() -> None:
    for name, service in services().items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN|_KEY", key):
                assert str(value).startswith("/run/secrets/"), f"{name}: {key} is a literal"
    assert not re.search(r"://[^\s/@]*:[^\s/@]*@", COMPOSE.read_text()), "a URL holds a password"


def test_every_secret_is_a_file_that_make_secrets_generates(tmp_path: Path) -> None:
    generated = set(secrets.make_missing(tmp_path))
    declared = yaml.safe_load(COMPOSE.read_text())["secrets"]
    assert set(declared) <= generated
    for name, secret in declared.items():
        file = re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", secret["file"])
        assert file == f"{secrets.FOLDER}/{name}"
    used = {name for service in services().values() for name in service.get("secrets", [])}
    assert used == set(declared)


def test_the_example_environment_names_every_variable_with_its_default() -> None:
    text = COMPOSE.read_text()
    used = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", text))
    assert set(re.findall(r"\$\{([A-Z_]+)", text)) == set(used), "a variable has no default"
    lines = (ROOT / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert example == used


def test_services_wait_until_what_they_need_is_healthy() -> None:
    healthy = {"condition": "service_healthy"}
    dependencies = {name: s.get("depends_on", {}) for name, s in services().items()}
    assert dependencies["mlflow"] == {"postgres": healthy, "gcs": healthy}
    assert dependencies["bootstrap"] == {"mlflow": healthy}
    completed = {"condition": "service_completed_successfully"}
    for name in ("promoter", "serving", "trainer"):
        assert dependencies[name] == {"bootstrap": completed}, name
    assert dependencies["proxy"] == {"mlflow": healthy}


def test_persistent_data_is_on_named_volumes() -> None:
    volumes = set(yaml.safe_load(COMPOSE.read_text())["volumes"])
    for name in ("postgres", "gcs", "promoter", "prometheus", "alertmanager"):
        mounted = {str(volume).split(":")[0] for volume in services()[name]["volumes"]}
        assert mounted & volumes, f"{name} has no named volume"


def test_mlflow_has_authentication_allowed_hosts_and_no_telemetry() -> None:
    serve = (ROOT / "deploy/mlflow/serve").read_text()
    assert "--app-name=basic-auth" in serve
    names = "mlflow:5000,localhost:*,127.0.0.1:*,$PLATFORM_HOST,$PLATFORM_HOST:*"
    assert f'--allowed-hosts="{names}"' in serve
    environment = services()["mlflow"]["environment"]
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


def test_the_dashboard_and_the_alerts_use_metrics_that_our_servers_export() -> None:
    from registry.receiver import EVENTS_METRIC
    from serving.metrics import Metrics, VersionLabels

    text = Metrics().text().decode()
    exported = set(re.findall(r"^# HELP (eurosat_\w+)", text, re.MULTILINE))
    exported |= {f"{name}_bucket" for name in exported} | {EVENTS_METRIC}
    dashboard = (ROOT / "deploy/grafana/serving.json").read_text()
    assert json.loads(dashboard)["panels"]
    used = set(re.findall(r"eurosat_\w+", dashboard.replace("eurosat-serving", "")))
    used |= set(re.findall(r"eurosat_\w+", (ROOT / "deploy/prometheus/rules.yml").read_text()))
    assert used
    assert used <= exported, used - exported
    (labels,) = re.findall(r"sum by \(([\w, ]+)\) \(eurosat_model\)", dashboard)
    assert set(labels.split(", ")) <= set(VersionLabels._fields)


def compose_config(**variables: str) -> "subprocess.CompletedProcess[str]":
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
    result = compose_config()
    assert result.returncode == 0, result.stderr
