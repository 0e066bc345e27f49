"""Runs as training leaves them, with a small network, and the registry's commands on them."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pandas as pd
import pytest
from mlflow import MlflowClient
from onnx import TensorProto, helper, numpy_helper

from eurosat.evaluation import corruptions
from eurosat.models.version_files import FILES_TAG
from eurosat.runtime import cli
from registry import ledger, promote, register, robustness, rollback, versions

MLFLOW_WARNS = [
    pytest.mark.filterwarnings(warning)
    for warning in (
        # MLflow 3.17's own classes, when mlflow.pyfunc is first imported.
        "ignore:.*Any type hint is inferred as AnyType:UserWarning",
        # MLflow 3.17's tables under SQLAlchemy 2.1.
        "ignore:The ``noload`` loader strategy is deprecated",
    )
]
REGISTRY = [*MLFLOW_WARNS, pytest.mark.usefixtures("store")]
"""Marks for a module whose tests share one MLflow store."""

CLASSES = ["Forest", "River", "SeaLake"]
TAGS = {
    "data.fingerprint": "d" * 64,
    "split.fingerprint": "e" * 64,
    "code.commit": "c" * 40,
    "config.digest": "f" * 64,
    "data.validation": "passed",
}


def make_network(
    file: Path, size: int = 64, bands: int = 3, classes: Sequence[str] = CLASSES, **properties: str
) -> Path:
    """Write a network whose probabilities are a softmax of the bands' means: red is Forest."""
    weights = np.eye(bands, len(classes), dtype=np.float32) * 10 / 255
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["tiles_NHWC"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
            helper.make_node("MatMul", ["means", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "means",
        [helper.make_tensor_value_info("tiles_NHWC", TensorProto.UINT8, ["N", size, size, bands])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", len(classes)])],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array([1, 2]), "axes"),
        ],
    )
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    metadata = {"classes": list(classes), "tile_size": [size, size], "bands": bands}
    helper.set_model_props(network, {k: json.dumps(v) for k, v in metadata.items()} | properties)
    onnx.save(network, str(file))
    return file


def make_predictions(
    tiles: range = range(600), wrong: int = 30, classes: Sequence[str] = CLASSES
) -> pd.DataFrame:
    """Return predictions of a test fold; the first ``wrong`` tiles are misclassified."""
    labels = np.array([tile % len(classes) for tile in tiles])
    return pd.DataFrame(
        {
            "tile": [f"{classes[k]}/{i}.jpg" for i, k in zip(tiles, labels, strict=True)],
            "sha256": [hashlib.sha256(str(tile).encode()).hexdigest() for tile in tiles],
            "label": [classes[k] for k in labels],
        }
        | probability_columns(labels, wrong, classes)
    )


def probability_columns(
    labels: npt.NDArray[np.int64], wrong: int, classes: Sequence[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """Return columns of probabilities of 0.94 for each label but the first ``wrong``."""
    predicted = np.where(np.arange(len(labels)) < wrong, (labels + 1) % len(classes), labels)
    probabilities = np.full((len(labels), len(classes)), 0.06 / (len(classes) - 1), np.float32)
    probabilities[np.arange(len(labels)), predicted] = 0.94
    return {f"p/{name}": probabilities[:, k] for k, name in enumerate(classes)}


def make_corrupted(predictions: pd.DataFrame, wrong: float = 0.2) -> pd.DataFrame:
    """Return predictions for corrupted tiles, of which the share ``wrong`` is misclassified."""
    tiles = predictions.iloc[robustness.select_tiles(predictions["sha256"])]
    columns = map(str, predictions.columns)
    classes = [name.removeprefix("p/") for name in columns if name.startswith("p/")]
    labels = np.array([classes.index(label) for label in tiles["label"]])
    tiles = tiles.assign(**probability_columns(labels, round(wrong * len(tiles)), classes))
    frames = [tiles.assign(kind=kind, severity=robustness.SEVERITY) for kind in corruptions.KINDS]
    return pd.concat(frames, ignore_index=True)


def make_run(
    scratch: Path,
    predictions: pd.DataFrame | None = None,
    *,
    tags: dict[str, str] = TAGS,
    leave_out: str | None = None,
    status: str = "FINISHED",
    bands: int = 3,
    corrupted_wrong: float = 0.2,
) -> str:
    """Log a run as training and registration leave it, with a small network; return its id."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("tests")
    run_id = str(client.create_run(experiment_id, tags=tags).info.run_id)
    folder = scratch / run_id
    folder.mkdir()
    make_network(folder / "model.onnx", bands=bands)
    predictions = make_predictions() if predictions is None else predictions
    predictions.to_parquet(folder / "predictions.parquet")
    if "sha256" in predictions:
        make_corrupted(predictions, corrupted_wrong).to_parquet(folder / robustness.FILE)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "split.csv").write_text("tile,sha256,class,fold\nlearned.jpg,1234,Forest,train\n")
    if leave_out:
        (folder / leave_out).unlink()
    client.log_artifacts(run_id, str(folder))
    client.log_metric(run_id, "test_accuracy", 0.95)
    client.log_metric(run_id, "onnx_difference", 1e-6)
    if status != "RUNNING":
        client.set_terminated(run_id, status)
    return run_id


def register_challenger(
    store: Path, model: str, wrong: int, tiles: range = range(600), validation: str = "passed"
) -> str:
    """Register a run with so many misclassified test tiles; return the version's number."""
    tags = TAGS | {"data.validation": validation}
    run_id = make_run(store, make_predictions(tiles, wrong), tags=tags)
    return register.register(run_id, model, "challenger")


def record_files(model: str, number: str, folder: Path) -> None:
    """Record the digests of the files as they are now, as a promoter could."""
    digests = json.dumps(register.hash_files(folder))
    MlflowClient().set_model_version_tag(model, number, FILES_TAG, digests)


def exit_code(command: Callable[[Sequence[str]], int], *arguments: str) -> int:
    """Return the exit code that the command's process would have."""
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(command, list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def run_promote(model: str, *arguments: str) -> int:
    return exit_code(promote.main, "--model", model, *arguments)


def run_rollback(model: str, *arguments: str) -> int:
    return exit_code(rollback.main, "--model", model, *arguments)


def aliases(model: str) -> dict[str, str]:
    names = (versions.CHALLENGER, versions.CHAMPION, versions.PREVIOUS)
    current = {name: versions.by_alias(model, name) for name in names}
    return {name: str(version.version) for name, version in current.items() if version}


def ledger_moves(model: str) -> list[tuple[str, str | None, str | None]]:
    return [(entry.action, entry.from_version, entry.to_version) for entry in ledger.entries(model)]


def move_champion_by_hand(model: str, number: str) -> None:
    """Set the alias without our commands, as in MLflow's pages."""
    MlflowClient().set_registered_model_alias(model, versions.CHAMPION, number)
