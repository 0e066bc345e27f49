"""The one network behind all arms: trained, registered, and laid out for each kind of server."""

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
USUAL, FLAVOUR = "mlflow-usual", "mlflow-pytorch"
"""MLflow models of the peers, beside the folder."""
INT8, FP32 = "model.int8.onnx", "model.onnx"
TILES_FILE = "tiles.npy"
"""The decoded tiles, in the folder; written last."""
TILES, SURE = 256, 5
"""Posted in turn; and those of them that every server is tried on first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    folder: Path
    """Holds what `networks` reads."""
    uri: str
    """Of the tracking store in which CHAMPION is registered."""
    classes: tuple[str, ...]
    file: str
    """The name of the ONNX file that our own server serves."""
    tiles: tuple[bytes, ...]
    """JPEGs of all classes."""
    sure: tuple[tuple[bytes, str], ...]
    """Those that the network is surest of, with their labels."""


def onnx_file(model: Path) -> Path:
    """Which network our server serves, of a registered model's folder."""
    held = [model / "artifacts" / name for name in (INT8, FP32)]
    return next(file for file in held if file.exists())


def served(*, retrain: bool) -> Served:
    """Train and register it for one epoch, unless the cache holds it from another time."""
    data = "eurosat" if os.environ.get("EUROSAT_ROOT") else "synthetic"
    store = cache_root().absolute() / "bench-serving" / data
    uri, folder = f"sqlite:///{store}/mlflow.db", store / "served"
    os.environ["MLFLOW_TRACKING_URI"] = uri
    if retrain or not (folder / TILES_FILE).exists():
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir(parents=True)
        run_id = _said(store, "eurosat.train", f"data={data}", *TRAINING).split()[-1]
        number = _said(store, "registry.register", run_id).strip()
        versions.client().set_registered_model_alias(versions.MODEL, versions.CHAMPION, number)
        _lay_out(run_id, folder, _read(data))
    told = json.loads((folder / networks.DESCRIPTION).read_text())
    tiles = _read(data)
    return Served(
        folder=folder,
        uri=uri,
        classes=tuple(told["classes"]),
        file=told["file"],
        tiles=tiles,
        sure=_sure(folder, tiles),
    )


def _said(store: Path, verb: str, *given: str) -> str:
    """What a verb prints, run where the store is: MLflow keeps the artifacts there too."""
    command = [sys.executable, "-m", verb, *given]
    print(f"$ {' '.join(['python', *command[1:]])}", flush=True)
    own = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=store, env=own, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def _lay_out(run_id: str, folder: Path, tiles: Sequence[bytes]) -> None:
    """The same weights as a state dict of timm's, as ONNX and as two kinds of MLflow model."""
    from mlflow.artifacts import download_artifacts
    from safetensors.torch import save_file

    folder.mkdir()
    with tracking.artifact(run_id, "weights.safetensors") as file:
        network = load(file)
    spec, file = network.spec, onnx_file(Path(download_artifacts(CHAMPION)))
    save_file(network.backbone.state_dict(), str(folder / networks.WEIGHTS))
    shutil.copy(file, folder / networks.ONNX)
    told: dict[str, Any] = {"name": spec.name, "classes": spec.classes, "file": file.name}
    told |= {"mean": spec.mean, "std": spec.std, "temperature": float(network.temperature)}
    (folder / networks.DESCRIPTION).write_text(json.dumps(told))
    _save_models(network, folder)
    np.save(folder / TILES_FILE, np.stack([networks.decode(tile) for tile in tiles]))


def _save_models(network: Network, folder: Path) -> None:
    import mlflow.pyfunc
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    needs = ["mlflow", "torch", "timm"]
    mlflow.pyfunc.save_model(
        folder.parent / USUAL,
        python_model=str(Path(__file__).with_name("mlflow_model.py")),
        artifacts={"network": str(folder)},
        signature=ModelSignature(inputs=Schema([ColSpec("binary", "image")])),
        pip_requirements=needs,
    )
    height, width = network.spec.tile_size
    example = np.full((2, network.spec.bands, height, width), 128, np.float32)
    mlflow.pytorch.save_model(
        network, folder.parent / FLAVOUR, input_example=example, pip_requirements=needs
    )


def _read(data: str) -> tuple[bytes, ...]:
    """TILES of the source, evenly over its sorted paths and so over the classes."""
    source = open_source(compose([f"data={data}"]).data)
    paths = source.paths[:: max(1, len(source.paths) // TILES)][:TILES]
    return tuple(source.read(path) for path in paths)


def _sure(folder: Path, tiles: Sequence[bytes]) -> tuple[tuple[bytes, str], ...]:
    network = networks.OnnxNetwork(folder)
    answers = network(np.stack([networks.decode(tile) for tile in tiles]))
    best: dict[str, tuple[float, bytes]] = {}
    for tile, answer in zip(tiles, answers, strict=True):
        label, confidence = answer["label"], answer["confidence"]
        best[label] = max(best.get(label, (0.0, b"")), (confidence, tile))
    surest = sorted(best, key=lambda label: -best[label][0])[:SURE]
    return tuple((best[label][1], label) for label in surest)
