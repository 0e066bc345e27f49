"""The network that every peer serves, in torch and in ONNX Runtime, and the decoding of a tile.

It imports nothing of this project, because it also runs in the environments of the peers. It is
configured by environment variables, which every kind of server passes on to its workers.
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
Prediction = dict[str, Any]

FOLDER, RUNTIME = "BENCH_FOLDER", "BENCH_RUNTIME"
THREADS, WORKERS = "BENCH_THREADS", "BENCH_WORKERS"
WEIGHTS, DESCRIPTION, ONNX = "network.safetensors", "network.json", "served.onnx"
"""Files of the folder: a state dict of timm, its metadata, and our ONNX file."""


class Network(Protocol):
    """Predicts each tile of a batch."""

    def __call__(self, tiles_NHWC: Tiles) -> list[Prediction]: ...


def decode(file: bytes) -> Tiles:
    """Return the (H, W, 3) pixels of a JPEG."""
    with Image.open(io.BytesIO(file), formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB"))


class TorchNetwork:
    """Eager torch, float32, channels_last: its fastest mode on a CPU."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        import timm
        import torch
        from safetensors.torch import load_file

        if threads:
            torch.set_num_threads(threads)
        metadata = json.loads((folder / DESCRIPTION).read_text())
        self.classes: list[str] = metadata["classes"]
        network = timm.create_model(metadata["name"], num_classes=len(self.classes))
        network.load_state_dict(load_file(folder / WEIGHTS))
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network.eval()
        self.mean = torch.tensor(metadata["mean"]).view(1, -1, 1, 1)
        self.std = torch.tensor(metadata["std"]).view(1, -1, 1, 1)
        self.temperature: float = metadata["temperature"]

    def __call__(self, tiles_NHWC: Tiles) -> list[Prediction]:
        import torch

        with torch.inference_mode():
            tiles_NCHW = torch.tensor(tiles_NHWC).permute(0, 3, 1, 2)
            logits = self.network((tiles_NCHW.float() - self.mean) / self.std)
            probabilities: Tiles = (logits / self.temperature).softmax(dim=1).numpy()
        return format_predictions(self.classes, probabilities)


class OnnxNetwork:
    """The ONNX file that our own server serves."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self.session = onnxruntime.InferenceSession(
            str(folder / ONNX), options, providers=["CPUExecutionProvider"]
        )
        self.input_name = self.session.get_inputs()[0].name
        self.output_name = self.session.get_outputs()[0].name
        self.classes: list[str] = json.loads((folder / DESCRIPTION).read_text())["classes"]

    def probabilities(self, tiles_NHWC: Tiles) -> npt.NDArray[np.float32]:
        (probabilities,) = self.session.run([self.output_name], {self.input_name: tiles_NHWC})
        return np.asarray(probabilities)

    def __call__(self, tiles_NHWC: Tiles) -> list[Prediction]:
        return format_predictions(self.classes, self.probabilities(tiles_NHWC))


def format_predictions(
    classes: Sequence[str], probabilities_NK: npt.NDArray[Any]
) -> list[Prediction]:
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
