"""A real ``python -m serving.server``, and a small network that has all that can be asked for."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import requests
from mlflow import MlflowClient
from onnx import TensorProto, helper, numpy_helper

from registry import register, versions
from tests.support.mlflow_server import free_port
from tests.support.paths import ROOT
from tests.support.registry import CLASSES, make_run

START_S = 120.0
STOP_S = 30.0
CALIBRATION = {"thresholds": [0.9, 0.9, 0.9], "ood_threshold": -2.0}


def until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


@dataclass(frozen=True)
class Server:
    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def counted(self, name: str) -> float:
        """A metric over all of its labels; 0 before it is told."""
        told = requests.get(f"{self.url}/metrics", timeout=10).text
        pattern = rf"^{name}(?:{{[^}}]*}})? (\S+)$"
        return sum(float(value) for value in re.findall(pattern, told, re.MULTILINE))


@contextlib.contextmanager
def started(folder: Path, log: Path, *command: str) -> "Iterator[subprocess.Popen[bytes]]":
    """A verb of ours as a process in ``folder``; stopped as an operator would."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            stdout=written,
            stderr=written,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@contextlib.contextmanager
def running(folder: Path, *flags: str, processes: int = 1) -> Iterator[Server]:
    """Ready, all of its processes; stopped as an operator would, unless the test has done it."""
    port = free_port()
    log = folder / f"server-{port}.log"
    command = ["serving.server", "--port", str(port), *flags, "--processes", str(processes)]
    with started(folder, log, *command) as process:
        server = Server(f"http://127.0.0.1:{port}", port, process, log)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                return server.counted("eurosat_model") == processes
            except requests.RequestException:
                return False

        until(ready, START_S, f"{processes} processes that answer")
        yield server


def make_whole_network(file: Path) -> Path:
    """As `eurosat.models.export` writes it: ``tta``, ``energy`` and ``activation`` too.

    It looks at the left half of a tile, or, with ``tta``, at all of it.
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
    made = helper.make_node
    nodes = [
        made("Cast", ["tiles_NHWC"], ["pixels"], to=TensorProto.FLOAT),
        made("Slice", ["pixels", "from", "half", "across"], ["left"]),
        made("ReduceMean", ["left", "axes"], ["left_means"], keepdims=0),
        made("ReduceMean", ["pixels", "axes"], ["all_means"], keepdims=0),
        made("Where", ["tta", "all_means", "left_means"], ["means"]),
        made("MatMul", ["means", "weights"], ["logits"]),
        made("Softmax", ["logits"], ["probabilities"], axis=1),
        made("ReduceLogSumExp", ["logits", "last"], ["knowing"], keepdims=0),
        made("Neg", ["knowing"], ["energy"]),
        made("Slice", ["pixels", "corner", "end", "axes", "step"], ["few"]),
        made("MatMul", ["few", "weights"], ["maps"]),
        made("Transpose", ["maps"], ["activation"], perm=[0, 3, 1, 2]),
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
    told = {
        "classes": CLASSES,
        "tile_size": [64, 64],
        "bands": 3,
        "views": 1,
        "calibration": CALIBRATION,
    }
    helper.set_model_props(network, {name: json.dumps(value) for name, value in told.items()})
    onnx.save(network, str(file))
    return file


def make_champion(store: Path) -> str:
    """A run with that network, registered as the champion; its version."""
    run_id = make_run(store)
    MlflowClient().log_artifact(run_id, str(make_whole_network(store / run_id / "model.onnx")))
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
    """The next one of a connection; None where it has been closed."""
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
