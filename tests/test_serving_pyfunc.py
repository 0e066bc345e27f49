"""The model from code, called in this process."""

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from tests.test_registry_register import CLASSES, MLFLOW_WARNS, make_network
from tests.test_serving_pictures import COLOURS, GOOD, REFUSED, encoded, pixels

if TYPE_CHECKING:
    from serving.pyfunc import TileClassifier

pytestmark = MLFLOW_WARNS


def load(folder: Path, bands: int = 3, size: int = 64) -> "TileClassifier":
    from mlflow.pyfunc.model import PythonModelContext

    from serving.pyfunc import TileClassifier

    lineage = folder / "lineage.json"
    lineage.write_text(json.dumps({"data_fingerprint": "d", "run_id": "r"}))
    network = make_network(folder / "model.onnx", size=size, bands=bands)
    loaded = TileClassifier()
    artifacts = {"network": str(network), "lineage": str(lineage)}
    loaded.load_context(PythonModelContext(artifacts, None))
    return loaded


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> "TileClassifier":
    return load(tmp_path_factory.mktemp("model"))


def ask(model: "TileClassifier", *rows: object) -> list[dict[str, Any]]:
    return list(model.predict(Mock(), pd.DataFrame({"image": pd.Series(rows, dtype=object)})))


def refusal(model: "TileClassifier", *rows: object) -> str:
    with pytest.raises(MlflowException) as refused:
        ask(model, *rows)
    assert refused.value.error_code == "INVALID_PARAMETER_VALUE"  # which the server makes 400
    message = str(refused.value.message)
    assert "\n" not in message
    return message


def test_an_answer_holds_everything_and_is_json(model: "TileClassifier") -> None:
    (answer,) = json.loads(json.dumps(ask(model, GOOD)))
    assert answer["label"] == "River"
    assert answer["confidence"] == max(answer["probabilities"].values())
    assert list(answer["probabilities"]) == CLASSES
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["data_fingerprint"] == "d"
    assert answer["run_id"] == "r"
    assert answer["model_version"] is None


def test_many_tiles_are_answered_in_order_over_several_batches(
    model: "TileClassifier", tmp_path: Path
) -> None:
    labels = [list(COLOURS)[k % 3] for k in range(150)]
    answers = ask(model, *[pixels(label) for label in labels])
    assert [answer["label"] for answer in answers] == labels
    session = onnxruntime.InferenceSession(make_network(tmp_path / "model.onnx"))
    (expected,) = session.run(
        ["probabilities"], {"tiles_NHWC": np.stack([pixels(label) for label in labels])}
    )
    answered = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(answered, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("label", list(COLOURS))
def test_files_are_read(model: "TileClassifier", kind: str, label: str) -> None:
    assert ask(model, encoded(label, kind))[0]["label"] == label


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "JPEG"),
        ("L", "PNG"),
        ("1", "TIFF"),
        ("LA", "PNG"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("P", "PNG"),
        ("P", "TIFF"),
        ("RGBA", "PNG"),
        ("RGBA", "TIFF"),
        ("YCbCr", "TIFF"),
    ],
)
def test_other_colours_are_converted(model: "TileClassifier", mode: str, kind: str) -> None:
    answer = ask(model, encoded("SeaLake", kind, mode=mode))[0]
    if mode in ("L", "1", "LA"):  # grey: no band is above the others
        assert answer["confidence"] == pytest.approx(1 / 3, abs=1e-4)
    else:
        assert answer["label"] == "SeaLake"


@pytest.mark.parametrize("size", [1, 13, 64, 1024])
def test_a_file_of_another_size_is_resized_bilinearly(model: "TileClassifier", size: int) -> None:
    image = Image.fromarray(pixels("Forest", size))
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR))
    resized, given = ask(model, encoded("Forest", size=size), expected)
    assert resized.pop("resized_from", [64, 64]) == [size, size], "and it says so"
    assert resized == given


def test_base64_in_a_row_is_decoded(model: "TileClassifier") -> None:
    assert ask(model, base64.b64encode(GOOD)) == ask(model, GOOD)


def test_a_tensor_is_taken_as_lists_or_as_an_array(model: "TileClassifier") -> None:
    tile = pixels("Forest")
    as_text = tile.astype("S3").tolist()  # how MLflow hands over JSON numbers
    answers = ask(model, tile, tile.tolist(), tile.astype(np.int64), as_text)
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), "float32 pixels: send whole numbers"),
        (np.zeros((64, 64, 3), bool), "bool pixels"),
        (np.full((64, 64, 3), 256), "outside 0 to 255"),
        ([[1, 2], [3]], "lists of unequal length"),
        (None, "a NoneType is no tile"),
        ("text", "a str is no tile"),
        (b"", "no bytes"),
    ],
)
def test_rows_that_are_no_tile_are_refused_by_number(
    model: "TileClassifier", row: object, message: str
) -> None:
    said = refusal(model, GOOD, row)
    assert said.startswith("row 1: ")
    assert message in said


FILES = {
    case: [row[0] for row in payload["dataframe_split"]["data"]]
    for case, (payload, _) in REFUSED.items()
    if isinstance(payload.get("dataframe_split"), dict)
}


@pytest.mark.parametrize("case", list(FILES))
def test_bad_files_are_refused(model: "TileClassifier", case: str) -> None:
    rows = [base64.decodebytes(bytes(text, "utf8")) for text in FILES[case]]  # as MLflow does
    assert REFUSED[case][1] in refusal(model, *rows)


def test_a_model_of_other_bands_takes_tensors_alone(tmp_path: Path) -> None:
    multispectral = load(tmp_path, bands=13, size=16)
    tile = np.zeros((16, 16, 13), np.uint8)
    tile[:, :, 1] = 255
    assert ask(multispectral, tile)[0]["label"] == "River"
    assert "send raw uint8 pixels of shape (N, 16, 16, 13)" in refusal(multispectral, GOOD)
    assert "takes (16, 16, 13)" in refusal(multispectral, pixels("River"))


def test_the_version_is_read_from_what_mlflow_writes_beside_the_model(tmp_path: Path) -> None:
    inner = tmp_path / "artifacts"
    inner.mkdir()
    (tmp_path / "MLmodel").write_text("")
    assert load(inner).provenance["model_version"] is None
    (tmp_path / "registered_model_meta").write_text("model_name: eurosat\nmodel_version: '7'\n")
    assert load(inner).provenance["model_version"] == "7"
