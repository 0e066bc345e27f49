"""The servers of bench-serving: how each is started, its requests, and its answers."""

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
from benchmarks.serving.model import ServedModel
from eurosat.runtime import hardware
from serving import mlflow_server

HOST = "127.0.0.1"
JSON, JPEG = "application/json", "image/jpeg"
TIMEOUT_S = 60.0

WORKERS = 2
"""Processes of a peer, which share the cores: on two cores at concurrency 32, FastAPI, and LitServe
and BentoML with ONNX, were about 20 % faster than in one process.
"""
RUNTIMES = {"torch": "torch", "onnx": "our ONNX file"}

Command = Callable[[ServedModel, int], list[str]]


def _as_column(tile: bytes) -> bytes:
    split = {"columns": ["image"], "data": [[base64.b64encode(tile).decode()]]}
    return json.dumps({"dataframe_split": split}).encode()


def _as_tensor(tile: bytes) -> bytes:
    pixels_CHW = np.moveaxis(networks.decode(tile), -1, 0)
    return json.dumps({"inputs": [pixels_CHW.tolist()]}).encode()


def _as_field(name: str, *, listed: bool) -> Callable[[bytes], bytes]:
    def encode(tile: bytes) -> bytes:
        text = base64.b64encode(tile).decode()
        return json.dumps({name: [text] if listed else text}).encode()

    return encode


def _argmax(answer: Any, classes: tuple[str, ...]) -> str:
    return classes[int(np.argmax(answer["predictions"][0]))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    name: str
    description: str
    command: Command
    variables: Mapping[str, str] = field(default_factory=dict)
    path: str = "/predict"
    content_type: str = JPEG
    encode: Callable[[bytes], bytes] = lambda tile: tile
    label: Callable[[Any, tuple[str, ...]], str] = lambda answer, _: str(answer["label"])
    ready: str

    def environment(self, served: ServedModel) -> dict[str, str]:
        """Return the environment variables of its processes."""
        variables = mlflow_server.environment(os.environ) | dict(self.variables)
        variables |= {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": served.uri}
        return variables | {networks.FOLDER: str(served.folder)}

    def requests(self, served: ServedModel, scratch: Path) -> Requests:
        """Write its request for each tile into a file."""
        folder = scratch / f"{self.name}.requests"
        folder.mkdir()
        for number, tile in enumerate(served.tiles, start=1):
            (folder / str(number)).write_bytes(self.encode(tile))
        return Requests(
            folder=folder, count=len(served.tiles), path=self.path, content_type=self.content_type
        )

    def check(self, served: ServedModel, port: int) -> None:
        """Exit if it predicts another label than the network for a tile it must know."""
        for tile, expected in served.checked:
            answer = requests.post(
                f"http://{HOST}:{port}{self.path}",
                self.encode(tile),
                timeout=TIMEOUT_S,
                headers={"Content-Type": self.content_type},
            )
            if not answer.ok:
                sys.exit(f"error: {self.name} answers {answer.status_code}: {answer.text[-500:]}")
            label = self.label(answer.json(), served.classes)
            if label != expected:
                sys.exit(f"error: {self.name} predicts {label} for a tile of {expected}")


def _mlflow(name: str) -> Command:
    return lambda served, port: mlflow_server.command(
        str(served.folder.parent / name), HOST, port, 1
    )


def _peer_variables(runtime: str) -> dict[str, str]:
    return {
        networks.RUNTIME: runtime,
        networks.WORKERS: str(WORKERS),
        networks.THREADS: str(max(1, hardware.cores() // WORKERS)),
    }


def ours() -> list[Arm]:
    """Return the servers that run in this project's own environment."""
    return [
        _mlflow_arm(
            "mlflow",
            "mlflow models serve, a pyfunc of Pillow and torch",
            _mlflow(model.PILLOW_TORCH),
        ),
        replace(
            _mlflow_arm(
                "mlflow-pytorch",
                "mlflow models serve, its PyTorch flavour, JSON tensors",
                _mlflow(model.PYTORCH_FLAVOUR),
            ),
            encode=_as_tensor,
            label=_argmax,
        ),
        _mlflow_arm(
            "stock", "our model under mlflow models serve", _command("serving.mlflow_server")
        ),
        Arm(
            name="server",
            description="our server",
            command=_command("serving.server"),
            ready="/ready",
        ),
    ]


def _mlflow_arm(name: str, description: str, command: Command) -> Arm:
    """Return a server with MLflow's protocol."""
    return Arm(
        name=name,
        description=description,
        command=command,
        path="/invocations",
        content_type=JSON,
        encode=_as_column,
        label=lambda answer, _: str(answer["predictions"][0]["label"]),
        ready="/ping",
    )


def _command(module: str) -> Command:
    def command(_: ServedModel, port: int) -> list[str]:
        address = ["--host", HOST, "--port", str(port)]
        return [sys.executable, "-m", module, "--model", model.CHAMPION, *address]

    return command


def peers(litserve: str | None, bentoml: str | None) -> list[Arm]:
    """Return the servers with an environment of their own, given by its python."""
    peers = []
    if litserve:
        peers += [_fastapi(litserve), _litserve(litserve, "torch"), _litserve(litserve, "onnx")]
    if bentoml:
        peers += [_bentoml(bentoml, "torch"), _bentoml(bentoml, "onnx")]
    return peers


def _fastapi(python: str) -> Arm:
    return Arm(
        name="fastapi",
        description="FastAPI and torch, written by hand",
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
        variables=_peer_variables("torch"),
        ready="/openapi.json",
    )


def _litserve(python: str, runtime: str) -> Arm:
    return Arm(
        name=f"litserve-{runtime}",
        description=f"LitServe, batching, {RUNTIMES[runtime]}",
        command=lambda _, port: [python, "-m", "benchmarks.serving.litserve_server", str(port)],
        variables=_peer_variables(runtime),
        content_type=JSON,
        encode=_as_field("image", listed=False),
        ready="/health",
    )


def _bentoml(python: str, runtime: str) -> Arm:
    return Arm(
        name=f"bentoml-{runtime}",
        description=f"BentoML, adaptive batching, {RUNTIMES[runtime]}",
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
        variables=_peer_variables(runtime),
        content_type=JSON,
        encode=_as_field("images", listed=True),
        label=lambda answer, _: str(answer[0]["label"]),
        ready="/readyz",
    )
