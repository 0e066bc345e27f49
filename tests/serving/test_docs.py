"""docs/serving.md: its clients are run, and its tables are held against the server's own words."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import requests

from serving import mlflow_server, ray_app
from serving import server as verb
from serving.app import document
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
    def asks(self) -> bool:
        return DEFAULT_URL in self.text

    @property
    def guarded(self) -> bool:
        return "key.txt" in self.text


BLOCKS = [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)]
CLIENTS = [
    pytest.param(block, id=f"{number}-{block.language}")
    for number, block in enumerate(block for block in BLOCKS if block.asks)
]
(MAKES_A_KEY,) = (block for block in BLOCKS if "serving.keys" in block.text)
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
    """With the key that the page makes."""
    done(MAKES_A_KEY, store)
    assert (store / "key.txt").read_text().strip()
    with running(store, "--keys", "keys.txt") as started:
        yield started


def done(block: Block, folder: Path) -> str:
    """What it prints."""
    program = {"sh": "bash", "python": sys.executable, "js": "node"}[block.language]
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not on PATH: the page's {block.language} was not run")
    file = folder / f"block.{ {'sh': 'sh', 'python': 'py', 'js': 'mjs'}[block.language] }"
    file.write_text(f"set -eu\n{block.text}" if block.language == "sh" else block.text)
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ran = subprocess.run(
        [found, str(file)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": python_path, "PATH": path},
    )
    assert ran.returncode == 0, f"{block.text}\n{ran.stdout[-500:]}\n{ran.stderr[-1500:]}"
    return ran.stdout


@pytest.mark.parametrize("block", CLIENTS)
def test_a_client_of_the_page_is_answered(
    block: Block, store: Path, request: pytest.FixtureRequest
) -> None:
    if "curl" in block.text and shutil.which("curl") is None:
        pytest.skip("curl is not on PATH: the page's sh was not run")
    asked: Server = request.getfixturevalue("guarded" if block.guarded else "server")
    printed = done(Block(block.language, block.text.replace(DEFAULT_URL, asked.url)), store)
    said = f'"label": "{LABELS["tile.jpg"]}"' if block.language == "sh" else LABELS["tile.jpg"]
    assert printed.count(said) >= len(re.findall(r"^(?:curl|python|EUROSAT)", block.text, re.M))
    assert said in printed
    if "other.png" in block.text:
        assert said.replace(LABELS["tile.jpg"], LABELS["other.png"]) in printed


def test_every_language_that_is_promised_is_there() -> None:
    assert {block.language for block in BLOCKS if block.asks} == {"sh", "python", "js"}
    others = [block for block in BLOCKS if not block.asks and block.language != "json"]
    for block in others:
        found = re.match(r"python -m serving\.(server|keys|ray_app) (.*)", block.text)
        assert found
        if (
            found[1] == "ray_app"
        ):  # tests/serving/test_ray_app.py starts it; here, what is said to it
            ray_app.read(dict(word.split("=", 1) for word in found[2].split()))


def table(heading: str) -> str:
    return PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_the_flags_are_those_of_the_server() -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "serving.server", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    offered = set(re.findall(r"--[a-z-]+", helped.stdout.split("options:")[1])) - {"--help"}
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", table("Limits and flags"), re.M)
    told = {flag: default for cell, default in rows for flag in re.findall(r"--[a-z-]+", cell)}
    assert set(told) == offered
    for field in fields(Limits):
        assert told[f"--max-{field.name.replace('_', '-')}"] == f"{field.default:g}"
    assert (told["--poll"], told["--grace"]) == (f"{verb.POLL_S:g}", f"{verb.GRACE_S:g}")
    assert told["--model"] == f"`{mlflow_server.CHAMPION}`"


def test_the_routes_are_those_of_the_document() -> None:
    assert set(re.findall(r"`(?:GET |POST )?(/[\w/.]*)`", table("Routes"))) == set(
        document()["paths"]
    )


def test_the_metrics_are_those_that_are_told(server: Server) -> None:
    tile = encoded(kind="JPEG")
    assert requests.post(f"{server.url}/predict", data=tile, timeout=30).status_code == 200
    told = requests.get(f"{server.url}/metrics", timeout=30).text
    measured = set(re.findall(r"^# HELP (\w+)", told, re.M))
    assert set(re.findall(r"^\| `(\w+)`", table("Metrics"), re.M)) == measured


def test_the_keys_of_an_answer_are_those_of_the_document() -> None:
    promised = set(document()["components"]["schemas"]["Answer"]["properties"])
    rows = re.findall(r"^\| (`.*?) \|", table("What an answer holds"), re.M)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == promised


def test_the_load_test_asks_for_what_there_is() -> None:
    source = (ROOT / "tests" / "load" / "locustfile.py").read_text()
    asked = {
        node.value.partition("?")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("/")
    }
    assert asked == {"/predict", "/predict/batch", "/invocations", "/model"}
    assert asked <= set(document()["paths"])
