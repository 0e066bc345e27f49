"""docs/serving.md and README.md: their clients are run, and tables are compared with the server."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from serving import mlflow_server, ray_app
from serving import server as server_module
from serving.app import openapi_schema
from serving.limits import Limits
from tests.support.images import encoded
from tests.support.paths import ROOT
from tests.support.registry import MLFLOW_WARNS
from tests.support.serving import Server, make_champion, running

pytestmark = MLFLOW_WARNS

PAGE = (ROOT / "docs" / "serving.md").read_text()
DEFAULT_URL = "http://127.0.0.1:5001"


@dataclass(frozen=True)
class Block:
    language: str
    text: str

    @property
    def is_client(self) -> bool:
        return DEFAULT_URL in self.text

    @property
    def needs_key(self) -> bool:
        return "key.txt" in self.text


def blocks(page: str) -> list[Block]:
    return [Block(*groups) for groups in re.findall(r"^```(\w+)\n(.*?)^```", page, re.M | re.S)]


BLOCKS = blocks(PAGE)
README_BLOCKS = blocks((ROOT / "README.md").read_text())
CLIENTS = [
    pytest.param(block, id=f"{page}-{number}-{block.language}")
    for page, of_page in (("serving", BLOCKS), ("readme", README_BLOCKS))
    for number, block in enumerate(block for block in of_page if block.is_client)
]
(CREATES_A_KEY,) = (block for block in BLOCKS if "serving.keys" in block.text)
LABELS = {"tile.jpg": "River", "other.png": "Forest"}


@pytest.fixture(scope="module", autouse=True)
def store(store: Path) -> Path:
    make_champion(store)
    (store / "tile.jpg").write_bytes(encoded(LABELS["tile.jpg"], "JPEG"))
    (store / "other.png").write_bytes(encoded(LABELS["other.png"], "PNG"))
    return store


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with running(store) as started:
        yield started


@pytest.fixture(scope="module")
def guarded(store: Path) -> Iterator[Server]:
    """Start a server with the key that the page creates."""
    run(CREATES_A_KEY, store)
    assert (store / "key.txt").read_text().strip()
    with running(store, "--keys", "keys.txt") as started:
        yield started


def run(block: Block, folder: Path) -> str:
    """Run a block of the page, and return its output."""
    program = {"sh": "bash", "python": sys.executable, "js": "node"}[block.language]
    executable = shutil.which(program)
    if executable is None:
        pytest.skip(f"{program} is not on PATH: the page's {block.language} was not run")
    file = folder / f"block.{ {'sh': 'sh', 'python': 'py', 'js': 'mjs'}[block.language] }"
    file.write_text(f"set -eu\n{block.text}" if block.language == "sh" else block.text)
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    process = subprocess.run(
        [executable, str(file)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": python_path, "PATH": path},
    )
    assert process.returncode == 0, (
        f"{block.text}\n{process.stdout[-500:]}\n{process.stderr[-1500:]}"
    )
    return process.stdout


@pytest.mark.parametrize("block", CLIENTS)
def test_every_client_of_the_page_gets_predictions(
    block: Block, store: Path, request: pytest.FixtureRequest
) -> None:
    if "curl" in block.text and shutil.which("curl") is None:
        pytest.skip("curl is not on PATH: the page's sh was not run")
    server: Server = request.getfixturevalue("guarded" if block.needs_key else "server")
    printed = run(Block(block.language, block.text.replace(DEFAULT_URL, server.url)), store)
    expected = f'"label": "{LABELS["tile.jpg"]}"' if block.language == "sh" else LABELS["tile.jpg"]
    assert printed.count(expected) >= len(re.findall(r"^(?:curl|python|EUROSAT)", block.text, re.M))
    assert expected in printed
    if "other.png" in block.text:
        assert expected.replace(LABELS["tile.jpg"], LABELS["other.png"]) in printed


def test_the_readme_has_clients_in_shell_and_python() -> None:
    assert {block.language for block in README_BLOCKS if block.is_client} == {"sh", "python"}


def test_the_page_has_clients_in_shell_python_and_javascript() -> None:
    assert {block.language for block in BLOCKS if block.is_client} == {"sh", "python", "js"}
    others = [block for block in BLOCKS if not block.is_client and block.language != "json"]
    for block in others:
        command = re.match(r"python -m serving\.(server|keys|ray_app) (.*)", block.text)
        assert command
        if (
            command[1] == "ray_app"
        ):  # started by tests/serving/test_ray_app.py; here its settings are read
            ray_app.parse_config(dict(word.split("=", 1) for word in command[2].split()))


def table(heading: str) -> str:
    return PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_the_flags_are_those_of_the_server() -> None:
    help_page = subprocess.run(
        [sys.executable, "-m", "serving.server", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    offered = set(re.findall(r"--[a-z-]+", help_page.stdout.split("options:")[1])) - {"--help"}
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", table("Limits and flags"), re.M)
    documented = {
        flag: default for cell, default in rows for flag in re.findall(r"--[a-z-]+", cell)
    }
    assert set(documented) == offered
    for name in server_module.LIMIT_HELP:
        assert documented[f"--max-{name.replace('_', '-')}"] == f"{getattr(Limits(), name):g}"
    assert (documented["--poll"], documented["--grace"]) == (
        f"{server_module.POLL_INTERVAL_S:g}",
        f"{server_module.SHUTDOWN_GRACE_S:g}",
    )
    assert documented["--model"] == f"`{mlflow_server.CHAMPION}`"


def test_the_routes_are_those_of_the_document() -> None:
    assert set(re.findall(r"`(?:GET |POST )?(/[\w/.]*)`", table("Routes"))) == set(
        openapi_schema()["paths"]
    )


def test_the_metrics_are_those_of_the_server(server: Server) -> None:
    tile = encoded(kind="JPEG")
    assert requests.post(f"{server.url}/predict", data=tile, timeout=30).status_code == 200
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    exposed = set(re.findall(r"^# HELP (\w+)", text, re.M))
    assert set(re.findall(r"^\| `(\w+)`", table("Metrics"), re.M)) == exposed


def test_the_keys_of_a_prediction_are_those_of_the_document() -> None:
    documented = set(openapi_schema()["components"]["schemas"]["Prediction"]["properties"])
    rows = re.findall(r"^\| (`.*?) \|", table("Predictions"), re.M)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == documented


def test_the_load_test_uses_existing_routes() -> None:
    source = (ROOT / "tests" / "load" / "locustfile.py").read_text()
    paths = {
        node.value.partition("?")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("/")
    }
    assert paths == {"/predict", "/predict/batch", "/invocations", "/model"}
    assert paths <= set(openapi_schema()["paths"])
