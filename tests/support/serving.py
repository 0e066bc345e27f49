"""A real ``python -m serving.server``, and a small network with every output."""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import requests
from mlflow import MlflowClient
from onnx import TensorProto, helper, numpy_helper

from registry import register, versions
from tests.support.mlflow_server import free_port
from tests.support.processes import CommandProcess, start
from tests.support.registry import CLASSES, make_run

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
CALIBRATION = {"thresholds": [0.9, 0.9, 0.9], "ood_threshold": -2.0}


def until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until a condition holds; ``what`` names it in the failure."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


@dataclass(frozen=True)
class Server:
    url: str
    port: int
    process: CommandProcess
    log: Path

    def metric(self, name: str) -> float:
        """Return a metric summed over its labels; 0 if it is missing."""
        text = requests.get(f"{self.url}/metrics", timeout=10).text
        pattern = rf"^{name}(?:{{[^}}]*}})? (\S+)$"
        return sum(float(value) for value in re.findall(pattern, text, re.MULTILINE))


@contextlib.contextmanager
def started(folder: Path, log: Path, *command: str) -> Iterator[CommandProcess]:
    """Run one of our commands in ``folder``, and stop it by SIGTERM."""
    process = start(*command, folder=folder, log=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@contextlib.contextmanager
def running(folder: Path, *flags: str, processes: int = 1) -> Iterator[Server]:
    """Start a server, yield it when all processes are ready, and stop it by SIGTERM."""
    port = free_port()
    log = folder / f"server-{port}.log"
    command = ["serving.server", "--port", str(port), *flags, "--processes", str(processes)]
    with started(folder, log, *command) as process:
        server = Server(f"http://127.0.0.1:{port}", port, process, log)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                return server.metric("eurosat_model") == processes
            except requests.RequestException:
                return False

        until(ready, START_TIMEOUT_S, f"{processes} processes are ready")
        yield server


def make_full_network(file: Path, calibration: Mapping[str, Any] = CALIBRATION) -> Path:
    """Write a network like `eurosat.models.export`, with ``tta``, ``energy`` and ``activation``.

    It uses the left half of a tile, or with ``tta`` all of it.
    """
    weights = np.eye(3, dtype=np.float32) * 10 / 255
    constants = {
        "weights": weights,
        "axes": np.array([1, 2]),
        "last": np.array([1]),
        "tta": np.array(False),
        "from": np.array([0]),
        "half": np.array([32]),
        "across": np.array([2]),
        "corner": np.array([0, 0]),
        "end": np.array([64, 64]),
        "step": np.array([16, 16]),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["tiles_NHWC"], ["pixels"], to=TensorProto.FLOAT),
        node("Slice", ["pixels", "from", "half", "across"], ["left"]),
        node("ReduceMean", ["left", "axes"], ["left_means"], keepdims=0),
        node("ReduceMean", ["pixels", "axes"], ["all_means"], keepdims=0),
        node("Where", ["tta", "all_means", "left_means"], ["means"]),
        node("MatMul", ["means", "weights"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
        node("ReduceLogSumExp", ["logits", "last"], ["log_sum"], keepdims=0),
        node("Neg", ["log_sum"], ["energy"]),
        node("Slice", ["pixels", "corner", "end", "axes", "step"], ["corners"]),
        node("MatMul", ["corners", "weights"], ["maps"]),
        node("Transpose", ["maps"], ["activation"], perm=[0, 3, 1, 2]),
    ]
    count = len(CLASSES)
    outputs: dict[str, list[str | int | None]] = {
        "probabilities": ["N", count],
        "energy": ["N"],
        "activation": ["N", count, 4, 4],
    }
    graph = helper.make_graph(
        nodes,
        "halves",
        [
            helper.make_tensor_value_info("tiles_NHWC", TensorProto.UINT8, ["N", 64, 64, 3]),
            helper.make_tensor_value_info("tta", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in outputs.items()
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    metadata = {
        "classes": CLASSES,
        "tile_size": [64, 64],
        "bands": 3,
        "views": 1,
        "calibration": dict(calibration),
    }
    helper.set_model_props(network, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(network, str(file))
    return file


def make_champion(store: Path) -> str:
    """Register a run with the full network as the champion; return its version."""
    run_id = make_run(store)
    MlflowClient().log_artifact(run_id, str(make_full_network(store / run_id / "model.onnx")))
    number = register.register(run_id, "eurosat", "challenger")
    versions.client().set_registered_model_alias("eurosat", "champion", number)
    return number


@dataclass(frozen=True)
class Answer:
    status: int
    head: bytes
    body: bytes

    @property
    def kind(self) -> str:
        return headers_of(self.head).get("content-type", "")


def headers_of(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }


def read_answer(file: BinaryIO, *, to_head: bool = False) -> Answer | None:
    """Return the next answer on a connection; None if it is closed."""
    status = 100
    while status == 100:
        lines = []
        while (line := file.readline()) not in (b"\r\n", b""):
            lines.append(line)
        if not lines:
            return None
        head = b"".join(lines)
        status = int(head.split(b" ", 2)[1])
    size = 0 if to_head else int(headers_of(head)["content-length"])
    return Answer(status, head, file.read(size))
