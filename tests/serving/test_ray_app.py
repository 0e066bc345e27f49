"""Replicas on Ray: the server's routes and answers, and an alias that all of them follow."""

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
from tests.support.serving import START_S, make_champion, running, started, until

pytestmark = REGISTRY
TILE = encoded("River", "JPEG")
REPLICAS = 2


@contextlib.contextmanager
def on_ray(folder: Path, *words: str) -> Iterator[str]:
    """The address of replicas that are ready; stopped as an operator would."""
    port, log = free_port(), folder / "ray.log"
    url = f"http://127.0.0.1:{port}"
    with started(folder, log, "serving.ray_app", f"port={port}", *words) as process:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(requests.RequestException):
                return requests.get(f"{url}/ready", timeout=5).ok
            return False

        until(ready, START_S, "replicas that answer")
        yield url
    assert process.returncode == exit_codes.OK, log.read_text()[-2000:]


def asked(url: str) -> dict[str, Any]:
    """What each route says of the same tile."""
    jpeg = {"Content-Type": "image/jpeg"}
    one = requests.post(f"{url}/predict?explain=true", TILE, headers=jpeg, timeout=30)
    several = requests.post(
        f"{url}/predict/batch", files=[("files", ("a.jpg", TILE))] * 3, timeout=30
    )
    pixels = {"inputs": [[[[1, 2, 3]] * 64] * 64]}
    return {
        "/predict": one.json(),
        "/predict/batch": several.json(),
        "/invocations": requests.post(f"{url}/invocations", json=pixels, timeout=30).json(),
        "/ping": requests.get(f"{url}/ping", timeout=30).status_code,
        "broken": requests.post(f"{url}/predict", b"no tile", headers=jpeg, timeout=30).json(),
        "nowhere": requests.get(f"{url}/nowhere", timeout=30).json(),
    }


def test_replicas_answer_as_the_server_does_and_follow_the_alias(store: Path) -> None:
    number = make_champion(store)
    with running(store) as server:
        expected = asked(server.url)
    assert expected["/predict"]["model_version"] == number
    with on_ray(store, "poll=0.5", "cpus=0.5", f"replicas={REPLICAS}") as url:
        for _ in range(2 * REPLICAS):
            assert asked(url) == expected
        other = register.register(make_run(store), "eurosat", "challenger")
        versions.client().set_registered_model_alias("eurosat", "champion", other)

        def moved() -> bool:
            told = [requests.get(f"{url}/model", timeout=5).json() for _ in range(4 * REPLICAS)]
            return all(one["model_version"] == other for one in told)

        until(moved, START_S, "every replica answers by the new champion")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"replicas": "0"}, "replicas must be above 0"),
        ({"host": "0.0.0.0"}, "keys=FILE"),
        ({"replica": "2"}, "replica"),
        ({"form": "fp8"}, "form must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(words: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ray_app.read(words)
