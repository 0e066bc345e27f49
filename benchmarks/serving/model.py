"""Train and register the network of all arms, and write it for each kind of server."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reports import ROOT
from benchmarks.serving import networks
from eurosat import tracking
from eurosat.config import compose
from eurosat.data.sources import open_source
from eurosat.models.network import Network, load
from eurosat.runtime.cache import cache_root
from registry import versions

CHAMPION = f"models:/{versions.MODEL}@{versions.CHAMPION}"
TRAINING = (
    "recipe=resnet18-quick",
    "model.name=resnet18",
    "model.tta_views=1",
    "distill.teacher=none",
    "trainer.epochs=1",
    "data.allow_unvalidated=true",
)
PILLOW_TORCH, PYTORCH_FLAVOUR = "mlflow-usual", "mlflow-pytorch"
"""Folders of the peers' MLflow models, beside the folder of the network."""
INT8, FP32 = "model.int8.onnx", "model.onnx"
TILES_FILE = "tiles.npy"
"""Decoded tiles, in the folder of the network; written last."""
NUM_TILES = 256
"""Tiles that are posted in turn."""
NUM_CHECKED = 5
"""Tiles on which every server is checked first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    folder: Path
    """Folder of the files that `networks` reads."""
    uri: str
    """Tracking store in which CHAMPION is registered."""
    classes: tuple[str, ...]
    file: str
    """Name of the ONNX file that our own server serves."""
    tiles: tuple[bytes, ...]
    """JPEGs of all classes."""
    checked: tuple[tuple[bytes, str], ...]
    """Tiles with the highest confidence, each of another class, with their labels."""


def onnx_file(model: Path) -> Path:
    """Return the network that our server serves, from the folder of a registered model."""
    candidates = [model / "artifacts" / name for name in (INT8, FP32)]
    return next(file for file in candidates if file.exists())


def prepare(*, retrain: bool) -> ServedModel:
    """Return the network from the cache; else train it for one epoch and register it."""
    data = "eurosat" if os.environ.get("EUROSAT_ROOT") else "synthetic"
    store = cache_root().absolute() / "bench-serving" / data
    uri, folder = f"sqlite:///{store}/mlflow.db", store / "served"
    os.environ["MLFLOW_TRACKING_URI"] = uri
    if retrain or not (folder / TILES_FILE).exists():
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir(parents=True)
        run_id = _run(store, "eurosat.train", f"data={data}", *TRAINING).split()[-1]
        number = _run(store, "registry.register", run_id).strip()
        versions.client().set_registered_model_alias(versions.MODEL, versions.CHAMPION, number)
        _write_files(run_id, folder, _read_tiles(data))
    metadata = json.loads((folder / networks.DESCRIPTION).read_text())
    tiles = _read_tiles(data)
    return ServedModel(
        folder=folder,
        uri=uri,
        classes=tuple(metadata["classes"]),
        file=metadata["file"],
        tiles=tiles,
        checked=_most_confident(folder, tiles),
    )


def _run(store: Path, module: str, *args: str) -> str:
    """Run a command in the store's folder, where MLflow writes the artifacts; return its output."""
    command = [sys.executable, "-m", module, *args]
    print(f"$ {' '.join(['python', *command[1:]])}", flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=store, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def _write_files(run_id: str, folder: Path, tiles: Sequence[bytes]) -> None:
    """Write the weights as a state dict of timm, as ONNX, and as two kinds of MLflow model."""
    from mlflow.artifacts import download_artifacts
    from safetensors.torch import save_file

    folder.mkdir()
    with tracking.artifact(run_id, "weights.safetensors") as file:
        network = load(file)
    spec, file = network.spec, onnx_file(Path(download_artifacts(CHAMPION)))
    save_file(network.backbone.state_dict(), str(folder / networks.WEIGHTS))
    shutil.copy(file, folder / networks.ONNX)
    metadata: dict[str, Any] = {"name": spec.name, "classes": spec.classes, "file": file.name}
    metadata |= {"mean": spec.mean, "std": spec.std, "temperature": float(network.temperature)}
    (folder / networks.DESCRIPTION).write_text(json.dumps(metadata))
    _save_models(network, folder)
    np.save(folder / TILES_FILE, np.stack([networks.decode(tile) for tile in tiles]))


def _save_models(network: Network, folder: Path) -> None:
    import mlflow.pyfunc
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    requirements = ["mlflow", "torch", "timm"]
    mlflow.pyfunc.save_model(
        folder.parent / PILLOW_TORCH,
        python_model=str(Path(__file__).with_name("mlflow_model.py")),
        artifacts={"network": str(folder)},
        signature=ModelSignature(inputs=Schema([ColSpec("binary", "image")])),
        pip_requirements=requirements,
    )
    height, width = network.spec.tile_size
    example = np.full((2, network.spec.bands, height, width), 128, np.float32)
    mlflow.pytorch.save_model(
        network,
        folder.parent / PYTORCH_FLAVOUR,
        input_example=example,
        pip_requirements=requirements,
    )


def _read_tiles(data: str) -> tuple[bytes, ...]:
    """Return `NUM_TILES` of the source, evenly over its sorted paths and so over the classes."""
    source = open_source(compose([f"data={data}"]).data)
    paths = source.paths[:: max(1, len(source.paths) // NUM_TILES)][:NUM_TILES]
    return tuple(source.read(path) for path in paths)


def _most_confident(folder: Path, tiles: Sequence[bytes]) -> tuple[tuple[bytes, str], ...]:
    network = networks.OnnxNetwork(folder)
    predictions = network(np.stack([networks.decode(tile) for tile in tiles]))
    best: dict[str, tuple[float, bytes]] = {}
    for tile, prediction in zip(tiles, predictions, strict=True):
        label, confidence = prediction["label"], prediction["confidence"]
        best[label] = max(best.get(label, (0.0, b"")), (confidence, tile))
    surest = sorted(best, key=lambda label: -best[label][0])[:NUM_CHECKED]
    return tuple((best[label][1], label) for label in surest)
