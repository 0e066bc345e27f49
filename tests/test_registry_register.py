"""Registration, and the runs that the other tests of registry and serving stand on."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from mlflow import MlflowClient
from onnx import TensorProto, helper, numpy_helper

from eurosat import cli
from eurosat.errors import ConfigError, ModelError, TrackingError
from registry import register, versions

MLFLOW_WARNS = [
    pytest.mark.filterwarnings(warning)
    for warning in (
        # MLflow 3.17's own classes, when mlflow.pyfunc is first imported.
        "ignore:.*Any type hint is inferred as AnyType:UserWarning",
        # MLflow 3.17's tables under SQLAlchemy 2.1.
        "ignore:The ``noload`` loader strategy is deprecated",
    )
]
pytestmark = MLFLOW_WARNS

CLASSES = ["Forest", "River", "SeaLake"]
TAGS = {
    "data.fingerprint": "d" * 64,
    "split.fingerprint": "e" * 64,
    "code.commit": "c" * 40,
    "config.digest": "f" * 64,
    "data.validation": "passed",
}


def make_network(
    file: Path, size: int = 64, bands: int = 3, classes: Sequence[str] = CLASSES, **told: str
) -> Path:
    """Probabilities are a softmax of the mean of each of the first bands: red is Forest."""
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
    properties = {"classes": list(classes), "tile_size": [size, size], "bands": bands}
    helper.set_model_props(network, {k: json.dumps(v) for k, v in properties.items()} | told)
    onnx.save(network, str(file))
    return file


def make_predictions(
    tiles: range = range(600), wrong: int = 30, classes: Sequence[str] = CLASSES
) -> pd.DataFrame:
    """A test fold of which the first ``wrong`` tiles are misjudged."""
    labels = np.array([tile % len(classes) for tile in tiles])
    predicted = np.where(np.arange(len(tiles)) < wrong, (labels + 1) % len(classes), labels)
    probabilities = np.full((len(tiles), len(classes)), 0.06 / (len(classes) - 1), np.float32)
    probabilities[np.arange(len(tiles)), predicted] = 0.94
    frame = pd.DataFrame(
        {
            "tile": [f"{classes[k]}/{i}.jpg" for i, k in zip(tiles, labels, strict=True)],
            "sha256": [hashlib.sha256(str(tile).encode()).hexdigest() for tile in tiles],
            "label": [classes[k] for k in labels],
        }
    )
    for k, name in enumerate(classes):
        frame[f"p/{name}"] = probabilities[:, k]
    return frame


def make_run(
    scratch: Path,
    predictions: pd.DataFrame | None = None,
    *,
    tags: dict[str, str] = TAGS,
    leave_out: str | None = None,
    status: str = "FINISHED",
    bands: int = 3,
) -> str:
    """A run as eurosat.train leaves it, with a small network."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("tests")
    run_id = str(client.create_run(experiment_id, tags=tags).info.run_id)
    folder = scratch / run_id
    folder.mkdir()
    make_network(folder / "model.onnx", bands=bands)
    (make_predictions() if predictions is None else predictions).to_parquet(
        folder / "predictions.parquet"
    )
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


@contextlib.contextmanager
def tracking_store(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh SQLite store for a module, the schema made once: that takes seconds."""
    template = factory.getbasetemp() / "mlflow-template.db"
    folder = factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # artifacts go to ./mlruns
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        if not template.exists():
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{template}.making")
            MlflowClient().search_experiments()
            Path(f"{template}.making").rename(template)
        shutil.copy(template, folder / "mlflow.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield folder


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tracking_store(tmp_path_factory) as folder:
        yield folder


@pytest.fixture(scope="module")
def run_id(store: Path) -> str:
    return make_run(store)


@pytest.fixture(scope="module")
def number(run_id: str) -> str:
    return register.register(run_id, "eurosat", "challenger")


def model_folder(number: str, model: str = "eurosat") -> Path:
    return Path(str(versions.get(model, number).source).removeprefix("file://"))


def test_a_run_becomes_the_challenger(run_id: str, number: str) -> None:
    challenger = versions.by_alias("eurosat", "challenger")
    assert challenger is not None
    assert (str(challenger.version), challenger.run_id) == (number, run_id)
    assert challenger.tags["data.fingerprint"] == TAGS["data.fingerprint"]


def test_the_command_prints_the_number_alone_and_registers_a_run_once(
    run_id: str, number: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.finish(register.main, [run_id])
    printed = capfd.readouterr()
    assert stopped.value.code == 0
    assert printed.out.strip() == number
    assert f"version {number} already wraps run {run_id}" in printed.err
    assert len(versions.all_of("eurosat")) == 1


def test_the_model_folder_holds_no_pickle_and_its_lineage(run_id: str, number: str) -> None:
    files = [file for file in model_folder(number).rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"MLmodel", "pyfunc.py", "model.onnx", "lineage.json"}
    assert not [file for file in files if file.suffix in (".pkl", ".pickle", ".pt", ".joblib")]
    # Protocol 2 and later start with \x80 and the protocol's number.
    assert not [file for file in files if file.read_bytes()[:1] == b"\x80"]
    lineage = json.loads((model_folder(number) / "artifacts" / "lineage.json").read_text())
    assert lineage["run_id"] == run_id
    assert lineage["classes"] == CLASSES
    assert lineage["metrics"] == {"test_accuracy": 0.95}
    for name, value in TAGS.items():
        assert lineage[name.replace(".", "_")] == value


def test_the_model_pins_what_it_is_served_by_as_the_lock_does(number: str) -> None:
    pinned = (model_folder(number) / "requirements.txt").read_text().splitlines()
    locked = (register.ROOT / "requirements.lock").read_text()
    assert len(pinned) == len(register.SERVED_BY)
    for pin in pinned:
        assert f"\n{pin} " in locked


def test_the_signature_is_one_binary_column(number: str) -> None:
    import mlflow.pyfunc  # warns: see pytestmark

    loaded = mlflow.pyfunc.load_model(f"models:/eurosat/{number}")
    assert [(spec.name, spec.type.name) for spec in loaded.metadata.signature.inputs] == [
        ("image", "binary")
    ]
    assert len(loaded.predict(loaded.input_example)) == 1


@pytest.mark.parametrize("missing", ["model.onnx", "predictions.parquet", "config.yaml"])
def test_a_run_without_an_artifact_is_refused(store: Path, missing: str) -> None:
    with pytest.raises(TrackingError, match=f"lacks {missing}"):
        register.register(make_run(store, leave_out=missing), "other", "challenger")


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_a_run_that_did_not_finish_is_refused(store: Path, status: str) -> None:
    with pytest.raises(TrackingError, match=f"is {status}: only a FINISHED"):
        register.register(make_run(store, status=status), "other", "challenger")


def test_a_run_without_a_tag_is_refused(store: Path) -> None:
    tags = {k: v for k, v in TAGS.items() if k != "data.fingerprint"}
    with pytest.raises(TrackingError, match=r"lacks the tag data\.fingerprint"):
        register.register(make_run(store, tags=tags), "other", "challenger")


def test_predictions_of_other_classes_are_refused(store: Path) -> None:
    predictions = make_predictions(classes=["Forest", "River", "Pasture"])
    with pytest.raises(ModelError, match="knows the classes Forest, River, SeaLake but"):
        register.register(make_run(store, predictions), "other", "challenger")


def test_predictions_without_a_column_are_refused(store: Path) -> None:
    predictions = make_predictions().drop(columns="sha256")
    with pytest.raises(ModelError, match="lacks sha256"):
        register.register(make_run(store, predictions), "other", "challenger")


def test_a_network_of_another_form_is_refused(tmp_path: Path) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not a network")
    with pytest.raises(ModelError, match="no network that ONNX Runtime opens"):
        register.describe(junk)
    network = onnx.load(make_network(tmp_path / "model.onnx"))
    del network.metadata_props[:]
    onnx.save(network, tmp_path / "bare.onnx")
    with pytest.raises(ModelError, match="lacks or garbles its property 'classes'"):
        register.describe(tmp_path / "bare.onnx")
    network.graph.output[0].name = network.graph.node[-1].output[0] = "other"
    onnx.save(network, tmp_path / "renamed.onnx")
    with pytest.raises(ModelError, match="export it again"):
        register.describe(tmp_path / "renamed.onnx")


@pytest.mark.parametrize("alias", ["champion", "previous"])
def test_registering_does_not_go_around_the_gates(run_id: str, alias: str) -> None:
    with pytest.raises(ConfigError, match=r"registry\.promote"):
        register.register(run_id, "eurosat", alias)


def test_an_unknown_run_is_one_line_and_exit_code_2(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.finish(register.main, ["0" * 32])
    assert stopped.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "0" * 32 in errors[0]


def test_pins_come_from_a_lock_that_holds_them(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# c\none==1 ; python_version < '3' \\\n    --hash=x\none==2 \\\n    --hash=y\n"
    )
    assert register.pins(["one"], lock) == ["one==2"]
    with pytest.raises(ConfigError, match="does not pin two"):
        register.pins(["one", "two"], lock)
    lock.write_text("???\n")
    with pytest.raises(ConfigError, match="no requirement"):
        register.pins(["one"], lock)
    with pytest.raises(ConfigError, match="cannot be read"):
        register.pins(["one"], tmp_path / "none")
