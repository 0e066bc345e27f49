"""Replicas on Ray have the server's routes and answers, and all follow the alias."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from eurosat.errors import ConfigError
from eurosat.runtime import exit_codes
from registry import register, versions
from serving import ray_app
from tests.support.images import encoded
from tests.support.mlflow_server import free_port
from tests.support.registry import REGISTRY, make_run
from tests.support.serving import START_TIMEOUT_S, make_champion, running, started, until

pytestmark = REGISTRY
TILE = encoded("River", "JPEG")
REPLICAS = 2


@contextlib.contextmanager
def on_ray(folder: Path, *words: str) -> Iterator[str]:
    """Start replicas, yield their address, and stop them by a signal."""
    port, log = free_port(), folder / "ray.log"
    url = f"http://127.0.0.1:{port}"
    with started(folder, log, "serving.ray_app", f"port={port}", *words) as process:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(requests.RequestException):
                return requests.get(f"{url}/ready", timeout=5).ok
            return False

        until(ready, START_TIMEOUT_S, "replicas that answer")
        yield url
    assert process.returncode == exit_codes.OK, log.read_text()[-2000:]


def answers(url: str) -> dict[str, Any]:
    """Return the answer of each route."""
    jpeg = {"Content-Type": "image/jpeg"}
    single = requests.post(f"{url}/predict?explain=true", TILE, headers=jpeg, timeout=30)
    several = requests.post(
        f"{url}/predict/batch", files=[("files", ("a.jpg", TILE))] * 3, timeout=30
    )
    pixels = {"inputs": [[[[1, 2, 3]] * 64] * 64]}
    return {
        "/predict": single.json(),
        "/predict/batch": several.json(),
        "/invocations": requests.post(f"{url}/invocations", json=pixels, timeout=30).json(),
        "/ping": requests.get(f"{url}/ping", timeout=30).status_code,
        "broken": requests.post(f"{url}/predict", b"not a tile", headers=jpeg, timeout=30).json(),
        "nowhere": requests.get(f"{url}/nowhere", timeout=30).json(),
    }


def test_replicas_answer_like_the_server_and_follow_the_alias(store: Path) -> None:
    number = make_champion(store)
    with running(store) as server:
        expected = answers(server.url)
    assert expected["/predict"]["model_version"] == number
    with on_ray(store, "poll=0.5", "cpus=0.5", f"replicas={REPLICAS}") as url:
        for _ in range(2 * REPLICAS):
            assert answers(url) == expected
        other = register.register(make_run(store), "eurosat", "challenger")
        versions.client().set_registered_model_alias("eurosat", "champion", other)

        def all_follow() -> bool:
            models = [requests.get(f"{url}/model", timeout=5).json() for _ in range(4 * REPLICAS)]
            return all(model["model_version"] == other for model in models)

        until(all_follow, START_TIMEOUT_S, "every replica serves the new champion")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"replicas": "0"}, "replicas must be above 0"),
        ({"host": "0.0.0.0"}, "keys=FILE"),
        ({"replica": "2"}, "replica"),
        ({"precision": "fp8"}, "precision must be"),
    ],
)
def test_malformed_settings_are_rejected(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ray_app.parse_config(overrides)
