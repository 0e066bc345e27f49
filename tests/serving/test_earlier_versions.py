"""Versions that an earlier release registered, which carry the `serving/pyfunc.py` of that time."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import requests
from mlflow import MlflowClient

from registry import register, versions
from serving import hot_swap
from serving.hot_swap import SelfTestFailed
from tests.support.images import COLOURS, encoded, files
from tests.support.registry import REGISTRY, make_run
from tests.support.serving import CALIBRATION, make_champion, make_full_network, running, until

pytestmark = REGISTRY

PYFUNC = Path(__file__).parent / "data" / "earlier_pyfunc.py.txt"
CONFIG = {"form": "auto", "threads": 0, "max_batch": 16, "max_wait_ms": 2.0}
EARLIER_CALIBRATION = {
    "thresholds": CALIBRATION["thresholds"],
    "unlike_above": CALIBRATION["ood_threshold"],
}
"""As earlier trainings wrote it into the ONNX file."""
TILES = [encoded(label) for label in COLOURS]


def load(uri: str, **model_config: Any) -> hot_swap.LoadedVersion:
    return hot_swap.load(uri, model_config)


def predictions(uri: str) -> list[dict[str, Any]]:
    """Predict the tiles with MLflow alone, without the server."""
    import mlflow.pyfunc

    return list(mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({"image": TILES})))


def assert_same(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Compare predictions; batches of another size may sum in another order."""
    for prediction, other in zip(actual, expected, strict=True):
        assert prediction.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, float | dict):
                assert prediction[key] == pytest.approx(value, abs=1e-6)
            else:
                assert prediction[key] == value


def make_earlier_run(store: Path) -> str:
    run_id = make_run(store)
    network = make_full_network(store / run_id / "model.onnx", EARLIER_CALIBRATION)
    MlflowClient().log_artifact(run_id, str(network))
    return run_id


@pytest.fixture(scope="module")
def earlier_version(store: Path) -> str:
    """Register a run with the code and the configuration of an earlier release."""
    pyfunc = store / "earlier" / "pyfunc.py"
    pyfunc.parent.mkdir()
    shutil.copy(PYFUNC, pyfunc)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(register, "PYFUNC", pyfunc)
        patch.setattr(register, "MODEL_CONFIG", CONFIG)
        return register.register(make_earlier_run(store), "eurosat", "challenger")


def test_an_earlier_version_is_loaded_with_todays_configuration(earlier_version: str) -> None:
    uri = f"models:/eurosat/{earlier_version}"
    loaded = load(uri, precision="fp32", max_batch=4)
    assert loaded.labels.precision == "fp32"
    assert loaded.batch_size == 4
    assert loaded.classifier.default_views == 1
    loaded.files.close()
    with pytest.raises(SelfTestFailed, match="this version has no form int8"):
        load(uri, precision="int8")


def test_a_server_swaps_between_an_earlier_and_a_current_version(
    store: Path, earlier_version: str
) -> None:
    current_version = make_champion(store)
    earlier = predictions(f"models:/eurosat/{earlier_version}")
    current = predictions(f"models:/eurosat/{current_version}")
    assert set(earlier[0]) - set(current[0]) == {"unlike_training", "unlike_score"}
    assert set(current[0]) - set(earlier[0]) == {"out_of_distribution", "ood_score"}
    with running(store, "--poll", "0.2", "--precision", "fp32", "--max-batch", "8") as server:
        for version, expected in (
            (current_version, current),
            (earlier_version, earlier),
            (current_version, current),
        ):
            versions.client().set_registered_model_alias("eurosat", "champion", version)

            def is_served(version: str = version) -> bool:
                model = requests.get(f"{server.url}/model", timeout=10).json()
                return bool(model["model_version"] == version)

            until(is_served, 60.0, f"version {version} is served")
            assert requests.get(f"{server.url}/model", timeout=10).json()["precision"] == "fp32"
            form = [("files", (f"{number}.png", tile)) for number, tile in enumerate(TILES)]
            batch = requests.post(f"{server.url}/predict/batch", files=form, timeout=30)
            assert_same(batch.json()["predictions"], expected)
            rows = requests.post(f"{server.url}/invocations", json=files(*TILES), timeout=30)
            assert_same(rows.json()["predictions"], expected)


def test_a_run_of_before_is_registered_with_todays_code(store: Path, earlier_version: str) -> None:
    number = register.register(make_earlier_run(store), "eurosat", "challenger")
    (current, *_) = predictions(f"models:/eurosat/{number}")
    (earlier, *_) = predictions(f"models:/eurosat/{earlier_version}")
    assert current["out_of_distribution"] == earlier["unlike_training"]
    assert current["ood_score"] == earlier["unlike_score"]
