"""A training run: what it computes, what it logs, and when it is refused."""

from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import yaml
from pyarrow import parquet

from eurosat import tracking, train
from eurosat.config import TrainConfig, compose, from_mapping
from eurosat.data.loaders import TileLoader
from eurosat.data.pack import Pack
from eurosat.data.prepare import PreparedData
from eurosat.errors import NonFiniteLoss
from eurosat.evaluation.metrics import evaluate
from eurosat.models import quantise
from eurosat.models.network import load
from eurosat.models.predict import logits as logits_of
from eurosat.runtime import exit_codes
from tests.support.recipes import TINY

ARTIFACTS = {
    "config.yaml",
    "split.csv",
    "predictions.parquet",
    "weights.safetensors",
    "model.onnx",
    "figures/confusion.png",
    "figures/curves.png",
    "figures/reliability.png",
    "logs/train.log",
    "figures/explained.png",
    "calibration.json",
}


@pytest.mark.usefixtures("tracking_store")
def test_a_run_holds_all_that_evaluates_and_serves_it(
    tiny_pack: Pack, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train.main([*TINY, "log_level=warning"]) == exit_codes.OK
    run_id = capsys.readouterr().out.split()[-1]
    run = tracking.get(run_id)
    assert run.status == "FINISHED"
    with tracking.artifact(run_id, "") as folder:
        files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
        assert files - {"model.int8.onnx"} == ARTIFACTS
        lost = run.metrics["test_accuracy"] - run.metrics["int8_accuracy"]
        assert ("model.int8.onnx" in files) == (lost <= quantise.MAX_ACCURACY_LOSS), (
            "logged only if accurate"
        )
        config = from_mapping(TrainConfig, yaml.safe_load((folder / "config.yaml").read_text()))
        split = pd.read_csv(folder / "split.csv")
        predicted = parquet.read_table(folder / "predictions.parquet").to_pandas()
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert config == compose(TINY)
    for tag in ("data.fingerprint", "split.fingerprint", "code.commit", "config.digest"):
        assert run.tags[tag]
    assert run.tags["data.fingerprint"] == tiny_pack.fingerprint
    assert run.tags["data.validation"] == "missing"
    assert run.params["model.name"] == "test_resnet"

    assert list(split.columns) == ["tile", "sha256", "class", "fold"]
    assert len(split) == 200
    tested = split[split["fold"] == "test"]
    assert list(predicted["tile"]) == list(tested["tile"])
    assert list(predicted["sha256"]) == list(tested["sha256"])

    probabilities = predicted[[f"p/{name}" for name in tiny_pack.classes]].to_numpy()
    labels = np.array([tiny_pack.classes.index(name) for name in predicted["label"]])
    for name, value in evaluate(labels, probabilities, tiny_pack.classes).items():
        assert run.metrics[f"test_{name}"] == pytest.approx(value, abs=1e-5)
    rows = [list(tiny_pack.table["path"]).index(tile) for tile in predicted["tile"]]
    (served,) = session.run(["probabilities"], {"tiles_NHWC": tiny_pack.tiles_NHWC[rows]})
    np.testing.assert_allclose(served, probabilities, atol=1e-4)


@pytest.mark.usefixtures("tracking_store")
def test_a_gallery_that_cannot_be_drawn_costs_a_warning_and_not_the_training(
    tiny_config: TrainConfig,
    tiny_data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def gallery(*_: object) -> None:
        raise AttributeError("'ConvPatchEmbed' object has no attribute 'grid_size'")

    monkeypatch.setattr("eurosat.evaluation.gradcam.gallery", gallery)
    with tracking.run("e", "r", system_metrics=False) as run:
        train.train(tiny_config, tiny_data, run)
    assert caplog.text.count("no figures/explained.png") == 1
    assert "no attribute 'grid_size'" in caplog.text
    with tracking.artifact(run.run_id, "") as folder:
        names = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert names - {"model.int8.onnx"} == ARTIFACTS - {"figures/explained.png"}


@pytest.mark.usefixtures("tracking_store")
def test_weights_and_predictions_are_logged_before_figures_are_drawn(
    tiny_config: TrainConfig, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confusion_matrix(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("eurosat.evaluation.plots.confusion_matrix", confusion_matrix)
    with (
        pytest.raises(ZeroDivisionError),
        tracking.run("e", "r", system_metrics=False) as run,
    ):
        train.train(tiny_config, tiny_data, run)
    with tracking.artifact(run.run_id, "") as folder:
        names = {file.name for file in folder.iterdir()}
    assert {"weights.safetensors", "predictions.parquet", "calibration.json"} <= names


@pytest.mark.parametrize(
    ("lost", "tiles", "words"),
    [
        (11, 5400, "11 more of the 5,400 test tiles are wrong than in FP32, and at most 10 (0.2%)"),
        (3, 1000, "3 more of the 1,000 test tiles"),
        (2, 1000, None),
        (3, 1500, None),
        (1, 96, "and at most 0"),
        (-1, 96, None),
    ],
)
def test_an_int8_model_is_refused_by_the_number_of_tiles_that_it_loses(
    lost: int, tiles: int, words: str | None
) -> None:
    refusal = train.int8_refusal(lost, tiles)
    assert (refusal is None) == (words is None)
    assert (words or "") in (refusal or "")


@pytest.mark.usefixtures("tracking_store")
@pytest.mark.parametrize(
    "changes",
    [
        ["optim.name=adamw", "optim.lr=1e-3", "optim.ema=0", "optim.clip_norm=1"],
        ["trainer.precision=bf16", "augment.brightness=0.2", "augment.contrast=0.2"],
        ["trainer.precision=auto", "model.input_size=48", "model.tta_views=8"],
    ],
)
def test_every_setting_trains(tiny_data: PreparedData, changes: list[str]) -> None:
    config = compose([*TINY, "trainer.epochs=1", *changes])
    with tracking.run("e", "r", system_metrics=False) as run:
        tested = train.train(config, tiny_data, run)
    assert 0 <= tested["test_accuracy"] <= 1
    assert ("test_one_view_accuracy" in tested) == (config.model.tta_views == 8)
    if config.model.tta_views == 8:
        with tracking.artifact(run.run_id, "weights.safetensors") as file:
            net = load(file)
        with net.single_view():
            single, labels = logits_of(
                net, TileLoader(tiny_data.pack, tiny_data.split.indices("test"))
            )
        assert tested["test_one_view_accuracy"] == (single.argmax(axis=1) == labels).mean()


@pytest.mark.usefixtures("tracking_store")
def test_a_loss_that_is_not_finite_fails_the_run_and_names_the_rate(
    tiny_data: PreparedData,
) -> None:
    config = compose([*TINY, "optim.lr=1e30", "optim.warmup=0"])
    with (
        pytest.raises(NonFiniteLoss, match=r"optim.lr=1e\+30: lower it"),
        tracking.run("e", "r", system_metrics=False) as run,
    ):
        train.train(config, tiny_data, run)
    assert tracking.get(run.run_id).status == "FAILED"
    with tracking.artifact(run.run_id, "logs/train.log"):
        pass
