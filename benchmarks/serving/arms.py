"""Who takes part in bench-serving: how each is started, what it is asked, and what it answers."""

import base64
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import requests

from benchmarks.reports import ROOT
from benchmarks.serving import model, networks
from benchmarks.serving.load import Requests
from benchmarks.serving.model import Served
from eurosat.runtime import hardware
from serving import mlflow_server

HOST = "127.0.0.1"
JSON, JPEG = "application/json", "image/jpeg"
TIMEOUT_S = 60.0

WORKERS = 2
"""Processes of a peer, which share the cores: at concurrency 32 on two cores FastAPI, and LitServe
and BentoML with ONNX, answered a fifth more and better so than in one process."""
RUNTIMES = {"torch": "torch", "onnx": "our ONNX file"}

Command = Callable[[Served, int], list[str]]


def _column(tile: bytes) -> bytes:
    split = {"columns": ["image"], "data": [[base64.b64encode(tile).decode()]]}
    return json.dumps({"dataframe_split": split}).encode()


def _tensor(tile: bytes) -> bytes:
    pixels_CHW = np.moveaxis(networks.decode(tile), -1, 0)
    return json.dumps({"inputs": [pixels_CHW.tolist()]}).encode()


def _field(name: str, *, listed: bool) -> Callable[[bytes], bytes]:
    def encode(tile: bytes) -> bytes:
        text = base64.b64encode(tile).decode()
        return json.dumps({name: [text] if listed else text}).encode()

    return encode


def _highest(answer: Any, classes: tuple[str, ...]) -> str:
    return classes[int(np.argmax(answer["predictions"][0]))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    name: str
    what: str
    command: Command
    environment: Mapping[str, str] = field(default_factory=dict)
    path: str = "/predict"
    content_type: str = JPEG
    encode: Callable[[bytes], bytes] = lambda tile: tile
    label: Callable[[Any, tuple[str, ...]], str] = lambda answer, _: str(answer["label"])
    ready: str

    def surroundings(self, served: Served) -> dict[str, str]:
        """The variables of its processes."""
        own = mlflow_server.environment(os.environ) | dict(self.environment)
        own |= {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": served.uri}
        return own | {networks.FOLDER: str(served.folder)}

    def requests(self, served: Served, scratch: Path) -> Requests:
        """Its request for each tile, as files."""
        folder = scratch / f"{self.name}.requests"
        folder.mkdir()
        for number, tile in enumerate(served.tiles, start=1):
            (folder / str(number)).write_bytes(self.encode(tile))
        return Requests(
            folder=folder, count=len(served.tiles), path=self.path, content_type=self.content_type
        )

    def check(self, served: Served, port: int) -> None:
        """End where it answers otherwise than the network does."""
        for tile, label in served.sure:
            answer = requests.post(
                f"http://{HOST}:{port}{self.path}",
                self.encode(tile),
                timeout=TIMEOUT_S,
                headers={"Content-Type": self.content_type},
            )
            if not answer.ok:
                sys.exit(f"error: {self.name} answers {answer.status_code}: {answer.text[-500:]}")
            said = self.label(answer.json(), served.classes)
            if said != label:
                sys.exit(f"error: {self.name} takes a tile for {said} that is {label}")


def _mlflow(name: str) -> Command:
    return lambda served, port: mlflow_server.command(
        str(served.folder.parent / name), HOST, port, 1
    )


def _settings(runtime: str) -> dict[str, str]:
    return {
        networks.RUNTIME: runtime,
        networks.WORKERS: str(WORKERS),
        networks.THREADS: str(max(1, hardware.cores() // WORKERS)),
    }


def ours() -> list[Arm]:
    """Those that run in this project's own environment."""
    return [
        _scoring(
            "mlflow", "mlflow models serve, a pyfunc of Pillow and torch", _mlflow(model.USUAL)
        ),
        replace(
            _scoring(
                "mlflow-pytorch",
                "mlflow models serve, its PyTorch flavour, JSON tensors",
                _mlflow(model.FLAVOUR),
            ),
            encode=_tensor,
            label=_highest,
        ),
        _scoring("stock", "our model under mlflow models serve", _verb("serving.mlflow_server")),
        Arm(name="server", what="our server", command=_verb("serving.server"), ready="/ready"),
    ]


def _scoring(name: str, what: str, command: Command) -> Arm:
    """It speaks MLflow's protocol."""
    return Arm(
        name=name,
        what=what,
        command=command,
        path="/invocations",
        content_type=JSON,
        encode=_column,
        label=lambda answer, _: str(answer["predictions"][0]["label"]),
        ready="/ping",
    )


def _verb(name: str) -> Command:
    def command(_: Served, port: int) -> list[str]:
        where = ["--host", HOST, "--port", str(port)]
        return [sys.executable, "-m", name, "--model", model.CHAMPION, *where]

    return command


def peers(litserve: str | None, bentoml: str | None) -> list[Arm]:
    """Those with an environment of their own, given by its python."""
    found = []
    if litserve:
        found += [_fastapi(litserve), _litserve(litserve, "torch"), _litserve(litserve, "onnx")]
    if bentoml:
        found += [_bentoml(bentoml, "torch"), _bentoml(bentoml, "onnx")]
    return found


def _fastapi(python: str) -> Arm:
    return Arm(
        name="fastapi",
        what="FastAPI and torch, written by hand",
        command=lambda _, port: [
            python,
            "-m",
            "uvicorn",
            "--factory",
            "benchmarks.serving.fastapi_app:make",
            "--host",
            HOST,
            "--port",
            str(port),
            "--workers",
            str(WORKERS),
            "--log-level",
            "warning",
        ],
        environment=_settings("torch"),
        ready="/openapi.json",
    )


def _litserve(python: str, runtime: str) -> Arm:
    return Arm(
        name=f"litserve-{runtime}",
        what=f"LitServe, batching, {RUNTIMES[runtime]}",
        command=lambda _, port: [python, "-m", "benchmarks.serving.litserve_server", str(port)],
        environment=_settings(runtime),
        content_type=JSON,
        encode=_field("image", listed=False),
        ready="/health",
    )


def _bentoml(python: str, runtime: str) -> Arm:
    return Arm(
        name=f"bentoml-{runtime}",
        what=f"BentoML, adaptive batching, {RUNTIMES[runtime]}",
        command=lambda _, port: [
            python,
            "-m",
            "bentoml",
            "serve",
            "benchmarks.serving.bentoml_service:Tiles",
            "--host",
            HOST,
            "--port",
            str(port),
            "--working-dir",
            str(ROOT),
        ],
        environment=_settings(runtime),
        content_type=JSON,
        encode=_field("images", listed=True),
        label=lambda answer, _: str(answer[0]["label"]),
        ready="/readyz",
    )
