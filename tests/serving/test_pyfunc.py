"""The model from code, called in this process."""

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
from tests.support.images import COLOURS, GOOD, REFUSED, encoded, pixels
from tests.support.registry import CLASSES, MLFLOW_WARNS, make_network

if TYPE_CHECKING:
    from serving.pyfunc import TileClassifier

pytestmark = MLFLOW_WARNS


def load(
    folder: Path, count: int = 3, size: int = 64, settings: Any = None, **told: str
) -> "TileClassifier":
    from mlflow.pyfunc.model import PythonModelContext

    from serving.pyfunc import TileClassifier

    lineage = folder / "lineage.json"
    lineage.write_text(json.dumps({"data_fingerprint": "d", "run_id": "r"}))
    network = make_network(folder / "model.onnx", size=size, bands=count, **told)
    loaded = TileClassifier()
    artifacts = {"network": str(network), "lineage": str(lineage)}
    loaded.load_context(PythonModelContext(artifacts, settings))
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


@pytest.fixture(scope="module")
def multispectral(tmp_path_factory: pytest.TempPathFactory) -> "TileClassifier":
    scale = bands.band_full_scales().tolist()
    return load(tmp_path_factory.mktemp("bands"), count=13, size=16, full_scale=json.dumps(scale))


def reflectance(size: int = 16, count: int = 13) -> npt.NDArray[np.uint16]:
    """Bright in the second band alone, which the small network calls River."""
    values = np.zeros((size, size, count), np.uint16)
    values[:, :, 1] = 60_000
    return values


def test_a_model_of_thirteen_bands_takes_tensors_and_geotiffs(
    multispectral: "TileClassifier",
) -> None:
    as_trained = decode.decode(
        bands.encode_geotiff(reflectance()), "t.tif", dtype="uint16", reflectance_max=None
    )
    tensor, tiff = ask(multispectral, as_trained, bands.encode_geotiff(reflectance()))
    assert tensor == tiff
    assert tensor["label"] == "River"
    (resized,) = ask(multispectral, bands.encode_geotiff(reflectance(size=40)))
    assert resized["label"] == "River"
    assert resized["resized_from"] == [40, 40]


def test_a_model_of_thirteen_bands_refuses_what_is_not_of_them(
    multispectral: "TileClassifier",
) -> None:
    assert "send a GeoTIFF of 13 bands, or raw uint8" in refusal(multispectral, GOOD)
    assert "takes (16, 16, 13)" in refusal(multispectral, pixels("River"))
    four = bands.encode_geotiff(reflectance(count=4))
    assert "4 bands of uint16 where the model takes 13 of uint16" in refusal(multispectral, four)
    assert "damaged or truncated" in refusal(
        multispectral, bands.encode_geotiff(reflectance())[:300]
    )
    assert "1025x1025 pixels" in refusal(
        multispectral, bands.encode_geotiff(reflectance(size=1025))
    )


def test_tiles_that_wait_are_shared_among_the_threads_in_their_order() -> None:
    """Two free threads answer six tiles by three; a busy model gathers what comes meanwhile."""
    from serving.pyfunc import PLAIN, Batches, Job, Wish

    seen: list[list[object]] = []
    go = threading.Event()

    def answer(jobs: list[Job]) -> None:
        seen.append([job.row for job in jobs])
        go.wait(30)
        for job in jobs:
            job.future.set_result({"row": job.row})

    def jobs(rows: range, wish: Wish = PLAIN) -> list[Job]:
        return [Job(row, wish, None, Future()) for row in rows]

    batches = Batches(answer, lambda wish: 4, threads=2, max_wait_s=0.0)
    first = jobs(range(6))
    batches.put(first)
    while len(seen) < 2:
        time.sleep(0.001)
    assert sorted(map(len, seen)) == [3, 3]
    late = jobs(range(6, 20)) + jobs(range(20, 22), Wish(tta=True))
    batches.put(late)
    assert len(batches) == 16
    go.set()
    assert [job.future.result(30)["row"] for job in first + late] == list(range(22))
    assert max(map(len, seen)) == 4, "as many as one pass takes"
    assert not any({19, 20} <= set(some) for some in seen), "kinds are not mixed"
    batches.close()
    with pytest.raises(RuntimeError):
        batches.put(jobs(range(1)))


def test_a_batch_that_fails_leaves_nobody_waiting() -> None:
    from serving.pyfunc import PLAIN, Batches, Job

    def answer(jobs: list[Job]) -> None:
        raise MemoryError("no room")

    batches = Batches(answer, lambda wish: 4, threads=1, max_wait_s=0.0)
    lost = [Job(row, PLAIN, None, Future()) for row in range(3)]
    batches.put(lost)
    for job in lost:
        with pytest.raises(MemoryError):
            job.future.result(30)
    batches.close()


def test_a_tile_whose_time_has_passed_is_not_computed(model: "TileClassifier") -> None:
    late, good = (
        model.ask([GOOD], deadline=deadline)[0] for deadline in (time.monotonic() - 1, None)
    )
    with pytest.raises(TimeoutError):
        late.result(30)
    assert good.result(30)["label"] == "River"


def test_the_likeliest_classes_come_first_where_so_many_are_asked_for(
    model: "TileClassifier",
) -> None:
    frame = pd.DataFrame({"image": [GOOD]})
    (two,) = model.predict(Mock(), frame, {"top_k": 2})
    (every,) = model.predict(Mock(), frame)
    ranked = sorted(every["probabilities"].items(), key=lambda item: -item[1])
    assert list(two["probabilities"].items()) == ranked[:2]
    with pytest.raises(MlflowException, match="top_k is 4: ask for 1 to 3 classes, or 0 for all"):
        model.predict(Mock(), frame, {"top_k": 4})


def test_jpeg_tiles_are_read_to_the_pixels_that_pillow_reads() -> None:
    from serving.pyfunc import _plain_jpeg

    for label in COLOURS:
        data = encoded(label, "JPEG")
        quick = _plain_jpeg(data, 64, 64)
        assert quick is not None
        np.testing.assert_array_equal(quick, np.asarray(Image.open(io.BytesIO(data))))
    assert _plain_jpeg(encoded(kind="JPEG", mode="L"), 64, 64) is None
    assert _plain_jpeg(encoded(kind="JPEG", mode="CMYK"), 64, 64) is None
    assert _plain_jpeg(encoded(kind="JPEG", size=65), 64, 64) is None
    assert _plain_jpeg(encoded(kind="JPEG")[:500], 64, 64) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "int8"}, "this version has no form int8: it has fp32"),
        ({"speed": 1}, "model_config has no speed: it takes form, threads"),
        ({"max_batch": 0}, "max_batch 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_told(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, settings=settings)


def test_the_settings_that_a_version_is_saved_with_are_the_models_own() -> None:
    """MLflow keeps from a model each setting that it was not saved with."""
    from registry.register import SETTINGS
    from serving.pyfunc import Settings

    assert Settings()._asdict() == SETTINGS


def test_the_version_is_read_from_what_mlflow_writes_beside_the_model(tmp_path: Path) -> None:
    inner = tmp_path / "artifacts"
    inner.mkdir()
    (tmp_path / "MLmodel").write_text("")
    assert load(inner).provenance["model_version"] is None
    (tmp_path / "registered_model_meta").write_text("model_name: eurosat\nmodel_version: '7'\n")
    assert load(inner).provenance["model_version"] == "7"
