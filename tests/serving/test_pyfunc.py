"""The served model, called in this process."""

import base64
import io
import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import onnxruntime
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from eurosat.data import bands, decode
from tests.support.images import COLOURS, GOOD, REJECTED, encoded, pixels
from tests.support.registry import CLASSES, MLFLOW_WARNS, make_network
from tests.support.tiffs import sparse_tiff, tiff_with_large_block

if TYPE_CHECKING:
    from serving.pyfunc import TileClassifier

pytestmark = MLFLOW_WARNS


def load(
    folder: Path, count: int = 3, size: int = 64, model_config: Any = None, **metadata: str
) -> "TileClassifier":
    from mlflow.pyfunc.model import PythonModelContext

    from serving.pyfunc import TileClassifier

    lineage = folder / "lineage.json"
    lineage.write_text(json.dumps({"data_fingerprint": "d", "run_id": "r"}))
    network = make_network(folder / "model.onnx", size=size, bands=count, **metadata)
    loaded = TileClassifier()
    artifacts = {"network": str(network), "lineage": str(lineage)}
    loaded.load_context(PythonModelContext(artifacts, model_config))
    return loaded


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> "TileClassifier":
    return load(tmp_path_factory.mktemp("model"))


def predict(model: "TileClassifier", *rows: object) -> list[dict[str, Any]]:
    return list(model.predict(Mock(), pd.DataFrame({"image": pd.Series(rows, dtype=object)})))


def rejection(model: "TileClassifier", *rows: object) -> str:
    """Return the message for rows of which one is invalid."""
    with pytest.raises(MlflowException) as error:
        predict(model, *rows)
    assert error.value.error_code == "INVALID_PARAMETER_VALUE"  # HTTP 400
    message = str(error.value.message)
    assert "\n" not in message
    return message


def test_a_prediction_has_all_keys_and_is_json(model: "TileClassifier") -> None:
    (answer,) = json.loads(json.dumps(predict(model, GOOD)))
    assert answer["label"] == "River"
    assert answer["confidence"] == max(answer["probabilities"].values())
    assert list(answer["probabilities"]) == CLASSES
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["data_fingerprint"] == "d"
    assert answer["run_id"] == "r"
    assert answer["model_version"] is None


def test_many_tiles_are_predicted_in_order_over_several_batches(
    model: "TileClassifier", tmp_path: Path
) -> None:
    labels = [list(COLOURS)[k % 3] for k in range(150)]
    answers = predict(model, *[pixels(label) for label in labels])
    assert [answer["label"] for answer in answers] == labels
    session = onnxruntime.InferenceSession(make_network(tmp_path / "model.onnx"))
    (expected,) = session.run(
        ["probabilities"], {"tiles_NHWC": np.stack([pixels(label) for label in labels])}
    )
    answered = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(answered, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("label", list(COLOURS))
def test_files_are_decoded(model: "TileClassifier", kind: str, label: str) -> None:
    assert predict(model, encoded(label, kind))[0]["label"] == label


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
    answer = predict(model, encoded("SeaLake", kind, mode=mode))[0]
    if mode in ("L", "1", "LA"):  # grey: all bands are equal
        assert answer["confidence"] == pytest.approx(1 / 3, abs=1e-4)
    else:
        assert answer["label"] == "SeaLake"


@pytest.mark.parametrize("size", [1, 13, 64, 1024])
def test_a_file_of_another_size_is_resized_bilinearly(model: "TileClassifier", size: int) -> None:
    image = Image.fromarray(pixels("Forest", size))
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR))
    resized, direct = predict(model, encoded("Forest", size=size), expected)
    assert resized.pop("resized_from", [64, 64]) == [size, size], (
        "the prediction names the original size"
    )
    assert resized == direct


def test_base64_in_a_row_is_decoded(model: "TileClassifier") -> None:
    expected = predict(model, GOOD)
    assert predict(model, base64.b64encode(GOOD)) == expected
    assert predict(model, base64.b64encode(GOOD).decode()) == expected, "as text in a DataFrame"


def test_a_tensor_may_be_lists_or_an_array(model: "TileClassifier") -> None:
    tile = pixels("Forest")
    as_text = tile.astype("S3").tolist()  # as MLflow passes JSON numbers
    answers = predict(model, tile, tile.tolist(), tile.astype(np.int64), as_text)
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), "float32 pixels: send whole numbers"),
        (np.zeros((64, 64, 3), bool), "bool pixels"),
        (np.full((64, 64, 3), 256), "outside 0 to 255"),
        ([[1, 2], [3]], "lists of unequal length"),
        (None, "a NoneType is not a tile"),
        ("text", "4 bytes that are not a JPEG, PNG or TIFF file"),
        (b"", "no bytes"),
    ],
)
def test_invalid_rows_are_rejected_by_number(
    model: "TileClassifier", row: object, message: str
) -> None:
    error = rejection(model, GOOD, row)
    assert error.startswith("row 1: ")
    assert message in error


FILES = {
    case: [row[0] for row in payload["dataframe_split"]["data"]]
    for case, (payload, _) in REJECTED.items()
    if isinstance(payload.get("dataframe_split"), dict)
}


@pytest.mark.parametrize("case", list(FILES))
def test_invalid_files_are_rejected(model: "TileClassifier", case: str) -> None:
    rows = [base64.decodebytes(bytes(text, "utf8")) for text in FILES[case]]  # as MLflow decodes it
    assert REJECTED[case][1] in rejection(model, *rows)


@pytest.fixture(scope="module")
def multispectral(tmp_path_factory: pytest.TempPathFactory) -> "TileClassifier":
    scale = bands.band_full_scales().tolist()
    return load(tmp_path_factory.mktemp("bands"), count=13, size=16, full_scale=json.dumps(scale))


def reflectance(size: int = 16, count: int = 13) -> npt.NDArray[np.uint16]:
    """Return a tile that is bright in the second band only, which is River to the small network."""
    values = np.zeros((size, size, count), np.uint16)
    values[:, :, 1] = 60_000
    return values


def test_a_model_of_13_bands_takes_tensors_and_geotiffs(
    multispectral: "TileClassifier",
) -> None:
    as_trained = decode.decode(
        bands.encode_geotiff(reflectance()), "t.tif", dtype="uint16", reflectance_max=None
    )
    tensor, tiff = predict(multispectral, as_trained, bands.encode_geotiff(reflectance()))
    assert tensor == tiff
    assert tensor["label"] == "River"
    (resized,) = predict(multispectral, bands.encode_geotiff(reflectance(size=40)))
    assert resized["label"] == "River"
    assert resized["resized_from"] == [40, 40]


def test_a_model_of_13_bands_rejects_other_bands(
    multispectral: "TileClassifier",
) -> None:
    assert "send a GeoTIFF of 13 bands, or uint8 pixels" in rejection(multispectral, GOOD)
    assert "takes (16, 16, 13)" in rejection(multispectral, pixels("River"))
    four = bands.encode_geotiff(reflectance(count=4))
    assert "4 bands of uint16: the model takes 13 bands of uint16" in rejection(multispectral, four)
    assert "damaged or truncated" in rejection(
        multispectral, bands.encode_geotiff(reflectance())[:300]
    )
    assert "1025x1025 pixels" in rejection(
        multispectral, bands.encode_geotiff(reflectance(size=1025))
    )


def test_a_tiff_with_a_huge_internal_tile_is_rejected(
    model: "TileClassifier", multispectral: "TileClassifier"
) -> None:
    bomb = tiff_with_large_block(64, 8192)
    assert "internal tiles of up to 8192 pixels per side" in rejection(model, bomb)
    multiband = sparse_tiff(13, 16, tiled=True, blockxsize=8192, blockysize=8192)
    assert "internal tiles of up to 8192 pixels" in rejection(multispectral, multiband)


def test_waiting_tiles_are_split_among_the_threads_in_order() -> None:
    """Two free threads take three of six tiles each; a busy model collects new tiles meanwhile."""
    from serving.pyfunc import DEFAULT_OPTIONS, DynamicBatcher, PendingTile, PredictOptions

    batches: list[list[object]] = []
    go = threading.Event()

    def run_batch(tiles: list[PendingTile]) -> None:
        batches.append([tile.row for tile in tiles])
        go.wait(30)
        for tile in tiles:
            tile.future.set_result({"row": tile.row})

    def pending(rows: range, options: PredictOptions = DEFAULT_OPTIONS) -> list[PendingTile]:
        return [PendingTile(row, options, None, Future()) for row in rows]

    batcher = DynamicBatcher(run_batch, lambda options: 4, threads=2, max_wait_s=0.0)
    first = pending(range(6))
    batcher.submit(first)
    while len(batches) < 2:
        time.sleep(0.001)
    assert sorted(map(len, batches)) == [3, 3]
    late = pending(range(6, 20)) + pending(range(20, 22), PredictOptions(tta=True))
    batcher.submit(late)
    assert len(batcher) == 16
    go.set()
    assert [tile.future.result(30)["row"] for tile in first + late] == list(range(22))
    assert max(map(len, batches)) == 4, "the largest batch"
    assert not any({19, 20} <= set(batch) for batch in batches), (
        "tiles of different tta are not mixed"
    )
    batcher.close()
    with pytest.raises(RuntimeError):
        batcher.submit(pending(range(1)))


def test_a_failed_batch_passes_its_error_to_every_tile() -> None:
    from serving.pyfunc import DEFAULT_OPTIONS, DynamicBatcher, PendingTile

    def run_batch(tiles: list[PendingTile]) -> None:
        raise MemoryError("no room")

    batcher = DynamicBatcher(run_batch, lambda options: 4, threads=1, max_wait_s=0.0)
    lost = [PendingTile(row, DEFAULT_OPTIONS, None, Future()) for row in range(3)]
    batcher.submit(lost)
    for tile in lost:
        with pytest.raises(MemoryError):
            tile.future.result(30)
    batcher.close()


def test_a_tile_is_not_computed_after_its_deadline(model: "TileClassifier") -> None:
    late, good = (
        model.submit([GOOD], deadline=deadline)[0] for deadline in (time.monotonic() - 1, None)
    )
    with pytest.raises(TimeoutError):
        late.result(30)
    assert good.result(30)["label"] == "River"


def test_top_k_returns_the_highest_probabilities_first(
    model: "TileClassifier",
) -> None:
    frame = pd.DataFrame({"image": [GOOD]})
    (two,) = model.predict(Mock(), frame, {"top_k": 2})
    (complete,) = model.predict(Mock(), frame)
    ranked = sorted(complete["probabilities"].items(), key=lambda item: -item[1])
    assert list(two["probabilities"].items()) == ranked[:2]
    with pytest.raises(MlflowException, match="top_k is 4: ask for 1 to 3 classes, or 0 for all"):
        model.predict(Mock(), frame, {"top_k": 4})


def test_the_fast_jpeg_decoder_returns_the_same_pixels_as_pillow() -> None:
    from serving.pyfunc import _decode_fast_jpeg

    for label in COLOURS:
        data = encoded(label, "JPEG")
        fast = _decode_fast_jpeg(data, 64, 64)
        assert fast is not None
        np.testing.assert_array_equal(fast, np.asarray(Image.open(io.BytesIO(data))))
    assert _decode_fast_jpeg(encoded(kind="JPEG", mode="L"), 64, 64) is None
    assert _decode_fast_jpeg(encoded(kind="JPEG", mode="CMYK"), 64, 64) is None
    assert _decode_fast_jpeg(encoded(kind="JPEG", size=65), 64, 64) is None
    assert _decode_fast_jpeg(encoded(kind="JPEG")[:500], 64, 64) is None


@pytest.mark.parametrize(
    ("model_config", "message"),
    [
        ({"precision": "int8"}, "this version has no int8 network: it has fp32"),
        ({"speed": 1}, "model_config has no key speed: its keys are precision, threads"),
        ({"max_batch": 0}, "max_batch 1 or more"),
    ],
)
def test_a_malformed_model_config_is_rejected(
    tmp_path: Path, model_config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, model_config=model_config)


def test_a_version_is_saved_with_the_default_model_config() -> None:
    """MLflow passes a model only the keys that it was saved with."""
    from registry.register import MODEL_CONFIG
    from serving.pyfunc import ModelConfig

    assert ModelConfig()._asdict() == MODEL_CONFIG


def test_the_version_is_read_from_the_file_that_mlflow_writes_beside_the_model(
    tmp_path: Path,
) -> None:
    inner = tmp_path / "artifacts"
    inner.mkdir()
    (tmp_path / "MLmodel").write_text("")
    assert load(inner).provenance["model_version"] is None
    (tmp_path / "registered_model_meta").write_text("model_name: eurosat\nmodel_version: '7'\n")
    assert load(inner).provenance["model_version"] == "7"
