"""The network that every peer serves, in torch and in ONNX Runtime, and how a tile is read.

Needs nothing of this project: it runs in the environments of others too. What to serve and how is
said by variables of the environment, which every kind of server passes on to its workers.
"""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

Tiles = npt.NDArray[np.uint8]
Answer = dict[str, Any]

FOLDER, RUNTIME = "BENCH_FOLDER", "BENCH_RUNTIME"
THREADS, WORKERS = "BENCH_THREADS", "BENCH_WORKERS"
WEIGHTS, DESCRIPTION, ONNX = "network.safetensors", "network.json", "served.onnx"
"""In the folder: a state dict of timm's, what else is needed to use it, and our own file."""


class Network(Protocol):
    """Tiles of pixels to an answer each."""

    def __call__(self, tiles_NHWC: Tiles) -> list[Answer]: ...


def decode(file: bytes) -> Tiles:
    """(H, W, 3) of a JPEG."""
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


class TorchNetwork:
    """Eager float32 in channels_last, the fastest mode of it on a CPU."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        import timm
        import torch
        from safetensors.torch import load_file

        if threads:
            torch.set_num_threads(threads)
        told = json.loads((folder / DESCRIPTION).read_text())
        self.classes: list[str] = told["classes"]
        network = timm.create_model(told["name"], num_classes=len(self.classes))
        network.load_state_dict(load_file(folder / WEIGHTS))
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network.eval()
        self.mean = torch.tensor(told["mean"]).view(1, -1, 1, 1)
        self.std = torch.tensor(told["std"]).view(1, -1, 1, 1)
        self.temperature: float = told["temperature"]

    def __call__(self, tiles_NHWC: Tiles) -> list[Answer]:
        import torch

        with torch.inference_mode():
            tiles_NCHW = torch.tensor(tiles_NHWC).permute(0, 3, 1, 2)
            logits = self.network((tiles_NCHW.float() - self.mean) / self.std)
            probabilities: Tiles = (logits / self.temperature).softmax(dim=1).numpy()
        return answers(self.classes, probabilities)


class OnnxNetwork:
    """The file that our own server serves."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self.session = onnxruntime.InferenceSession(
            str(folder / ONNX), options, providers=["CPUExecutionProvider"]
        )
        self.given = self.session.get_inputs()[0].name
        self.wanted = self.session.get_outputs()[0].name
        self.classes: list[str] = json.loads((folder / DESCRIPTION).read_text())["classes"]

    def probabilities(self, tiles_NHWC: Tiles) -> npt.NDArray[np.float32]:
        (told,) = self.session.run([self.wanted], {self.given: tiles_NHWC})
        return np.asarray(told)

    def __call__(self, tiles_NHWC: Tiles) -> list[Answer]:
        return answers(self.classes, self.probabilities(tiles_NHWC))


def answers(classes: Sequence[str], probabilities_NK: npt.NDArray[Any]) -> list[Answer]:
    best = probabilities_NK.argmax(axis=1)
    return [
        {"label": classes[number], "confidence": float(probabilities[number])}
        for number, probabilities in zip(best, probabilities_NK, strict=True)
    ]


def from_environment() -> Network:
    folder, threads = Path(os.environ[FOLDER]), int(os.environ[THREADS])
    if os.environ[RUNTIME] == "onnx":
        return OnnxNetwork(folder, threads)
    return TorchNetwork(folder, threads)
