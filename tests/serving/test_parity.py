"""A trained network predicts the same through every interface."""

import base64
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import requests
from PIL import Image
from pyarrow import parquet

from eurosat import tracking, train
from eurosat.config import compose
from eurosat.data.prepare import prepare
from eurosat.models import onnx_session
from registry import register, versions
from serving import client
from tests.support import processes
from tests.support.images import saved
from tests.support.mlflow_server import START_TIMEOUT_S, free_port
from tests.support.recipes import TINY
from tests.support.registry import MLFLOW_WARNS

pytestmark = MLFLOW_WARNS
CLOSE = 1e-4
"""Tolerance between torch and ONNX Runtime in float32: `eurosat.models.export.TOLERANCE`."""
SAME = 1e-6
"""Tolerance between two interfaces to the same ONNX file: batch sizes change the summation."""
INT8_MEAN = 0.01
"""Largest mean difference of a probability between float32 and INT8."""
PER_REQUEST = 64
Floats = npt.NDArray[np.float64]


def matrix(answers: Sequence[Mapping[str, dict[str, float]]]) -> Floats:
    return np.array([list(answer["probabilities"].values()) for answer in answers])


def by_rest(url: str, path: str, tiles_NHWC: npt.NDArray[np.uint8]) -> Floats:
    """Send the tiles as PNG files, which are lossless."""
    answers: list[dict[str, dict[str, float]]] = []
    for start in range(0, len(tiles_NHWC), PER_REQUEST):
        files = [
            saved(Image.fromarray(tile), "PNG") for tile in tiles_NHWC[start : start + PER_REQUEST]
        ]
        images = [base64.b64encode(file).decode() for file in files]
        split = {"columns": ["image"], "data": [[image] for image in images]}
        body = {"dataframe_split": split} if path == "/invocations" else {"images": images}
        answer = requests.post(url + path, json=body, timeout=120)
        assert answer.ok, answer.text
        answers += answer.json()["predictions"]
    return matrix(answers)


def started(folder: Path, precision: str, module: str, *arguments: str) -> processes.CommandProcess:
    model_config = {"precision": precision}  # MLflow's own server reads it
    environment = os.environ | {"SERVING_MODEL_CONFIG": json.dumps(model_config)}
    log = folder / f"{module}.log"
    return processes.start(module, *arguments, folder=folder, log=log, env=environment)


def interfaces(
    settings: Sequence[str], folder: Path, precision: str
) -> Iterator[tuple[str, Floats, Floats]]:
    """Yield each interface's name, its probabilities for the test fold, and those of torch."""
    import mlflow.pyfunc
    from mlflow.artifacts import download_artifacts

    config = compose(settings)
    data = prepare(config)
    with tracking.run(config.experiment, "parity", tags={"kind": "train"}) as run:
        train.train(config, data, run)
        run_id = run.run_id
    versions.client().set_registered_model_alias(
        "eurosat", "champion", register.register(run_id, "eurosat", "challenger")
    )
    model = "models:/eurosat@champion"
    files = Path(download_artifacts(model))
    file = download_artifacts(f"runs:/{run_id}/predictions.parquet")
    table = parquet.read_table(file).to_pandas()
    torch_NK = table[[name for name in table if str(name).startswith("p/")]].to_numpy(np.float64)
    tiles_NHWC = data.pack.tiles_NHWC[data.split.indices("test")]
    name = "model.onnx" if precision == "fp32" else "model.int8.onnx"
    yield "ONNX", onnx_session.probabilities(files / "artifacts" / name, tiles_NHWC), torch_NK
    loaded = mlflow.pyfunc.load_model(model, model_config={"precision": precision})
    frame = pd.DataFrame({"image": [saved(Image.fromarray(tile), "PNG") for tile in tiles_NHWC]})
    parts = [loaded.predict(frame[start : start + 1024]) for start in range(0, len(frame), 1024)]
    yield "pyfunc", matrix([answer for part in parts for answer in part]), torch_NK
    for module, words, paths in (
        ("serving.mlflow_server", "--port {}", ("/invocations",)),
        (
            "serving.server",
            f"--precision {precision} --port {{}}",
            ("/invocations", "/predict/batch"),
        ),
        ("serving.ray_app", f"precision={precision} port={{}}", ("/predict/batch",)),
    ):
        port = free_port()
        process = started(folder, precision, module, *words.format(port).split())
        try:
            url = f"http://127.0.0.1:{port}"
            client.wait_ready(url, process, START_TIMEOUT_S)
            for path in paths:
                yield f"{module} {path}", by_rest(url, path, tiles_NHWC), torch_NK
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def check_all(settings: Sequence[str], folder: Path, precision: str) -> None:
    first: Floats | None = None
    for name, onnx_NK, torch_NK in interfaces(settings, folder, precision):
        first = onnx_NK if first is None else first
        difference = np.abs(onnx_NK - torch_NK)
        print(f"{precision}, {name}: {len(onnx_NK)} tiles, up to {difference.max():.1e} from torch")
        assert np.abs(onnx_NK - first).max() < (SAME if precision == "fp32" else CLOSE), name
        if precision == "fp32":
            assert difference.max() < CLOSE, name
        else:
            assert difference.mean() < INT8_MEAN, name
            same = (onnx_NK.argmax(axis=1) == torch_NK.argmax(axis=1)).mean()
            assert same > 0.98, name


def test_every_interface_predicts_the_same(tracking_store: str, tmp_path: Path) -> None:
    check_all(TINY, tmp_path, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_interface_predicts_the_same_for_the_real_test_fold(
    precision: str, tracking_store: str, tmp_path: Path, eurosat_root: Path
) -> None:
    real = (
        "data=eurosat",
        "data.allow_unvalidated=true",
        "model.name=resnet18",
        "model.tta_views=1",
    )
    check_all((*real, "distill.teacher=none", "trainer.epochs=1"), tmp_path, precision)
