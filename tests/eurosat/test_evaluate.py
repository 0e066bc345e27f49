"""Evaluation of a run: metrics with intervals, calibration, corruptions, comparisons."""

import json
from pathlib import Path

import numpy as np
import pytest

from eurosat import evaluate, tracking, train
from eurosat.config import compose
from eurosat.data.arrays import Floats, Labels
from eurosat.data.pack import Pack
from eurosat.data.prepare import PreparedData, prepare
from eurosat.errors import DataError
from eurosat.evaluation import calibration, corruptions, recorded, report, results
from eurosat.evaluation.metrics import per_tile_nll
from eurosat.runtime import exit_codes
from tests.support.recipes import TINY


@pytest.mark.usefixtures("tracking_store")
def test_the_report_of_an_evaluation_is_printed_and_stored_in_the_run(
    tiny_data: PreparedData, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with tracking.run("e", "one", system_metrics=False) as run:
        tested = train.train(compose(TINY), tiny_data, run)
    with tracking.run("e", "two", system_metrics=False) as other:
        train.train(compose([*TINY, "seed=1", "trainer.epochs=1"]), tiny_data, other)

    quiet = ["--log-level", "warning"]
    flags = ["--against", other.run_id, "--corruptions", "--corruption-tiles", "20"]
    assert evaluate.main([run.run_id, *flags, *quiet]) == exit_codes.OK
    printed = capsys.readouterr().out
    for text in (
        "macro_auroc",
        "95 % interval",
        "exact McNemar p",
        "missing lines",
        "Temperature",
    ):
        assert text in printed
    with tracking.artifact(run.run_id, "evaluation/test") as folder:
        summary = json.loads((folder / "report.json").read_text())
        assert (folder / "report.md").read_text() in printed
        plots = {file.name for file in folder.glob("*.png")}
    assert plots == {
        "confusion.png",
        "confusion-shares.png",
        "reliability.png",
        "worst.png",
        "corruptions.png",
    }
    for name, metric in summary["metrics"].items():
        assert metric["value"] == pytest.approx(tested[f"test_{name}"], abs=1e-6)
        assert metric["low"] <= metric["high"]
    assert summary["against"]["run"] == other.run_id
    assert len(summary["corruptions"]) == 1 + 5 * len(corruptions.KINDS)
    losses = [tile["loss"] for tile in summary["worst"]]
    assert losses == sorted(losses, reverse=True)
    for tile in summary["worst"]:
        assert tile["tile"] in set(tiny_data.pack.table["path"])
        assert tile["tile"].startswith(f"{tile['expected']}/")
    for label in tiny_data.pack.classes:
        assert f"| {label} | " in printed, "a line for each class"

    assert evaluate.main([run.run_id, "--fold", "val", *quiet]) == exit_codes.OK
    with tracking.artifact(run.run_id, "evaluation/val/report.json") as file:
        val_metrics = json.loads(file.read_text())["metrics"]
    best = tracking.get(run.run_id).metrics["best_val_accuracy"]
    assert val_metrics["accuracy"]["value"] == pytest.approx(best, abs=1e-6)

    again = results.evaluate(run.run_id, data=" ".join((*TINY[:3], "data.synthetic.seed=5")))
    assert (again.fold, len(again.rows)) == ("all", 200)
    same = results.evaluate(run.run_id, data=" ".join(TINY[:3]))
    assert len(same.rows) == len(tiny_data.split.indices("test")), (
        "the tiles that it was trained on are left out"
    )
    with pytest.raises(
        DataError, match=r"tiles of \(64, 64, 3\); the network needs .* \(32, 32, 3"
    ):
        results.evaluate(run.run_id, data="synthetic data.synthetic.tiles=100")


def test_confused_pairs_of_classes_are_counted_in_both_directions_and_sorted() -> None:
    counts = np.array([[5, 2, 0], [1, 5, 0], [0, 4, 5]])
    assert report._most_confused_pairs(counts, ("a", "b", "c")) == [
        {"classes": ["b", "c"], "tiles": 4},
        {"classes": ["a", "b"], "tiles": 3},
    ]


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.usefixtures("tracking_store", "eurosat_root")
def test_accuracy_on_real_tiles_falls_with_the_severity_of_each_corruption() -> None:
    config = compose(
        ["data=eurosat", "data.allow_unvalidated=true", "trainer.epochs=3", "model.tta_views=1"]
    )
    data = prepare(config)
    with tracking.run("e", "r", system_metrics=False) as run:
        tested = train.train(config, data, run)
    table = results.evaluate_corrupted(results.evaluate(run.run_id), evaluate.CORRUPTED_TILES)
    accuracy = {(row["kind"], row["severity"]): row["accuracy"] for row in table}
    assert {row["tiles"] for row in table} == {evaluate.CORRUPTED_TILES}
    assert accuracy["none", 0] == pytest.approx(tested["test_accuracy"], abs=0.03)
    for kind in corruptions.KINDS:
        assert accuracy[kind, 5] < accuracy["none", 0], kind
        assert accuracy[kind, 5] <= accuracy[kind, 1] + 0.02, kind


@pytest.mark.usefixtures("tracking_store")
def test_evaluation_refuses_data_that_differ_from_those_of_the_run(tiny_data: PreparedData) -> None:
    with tracking.run("e", "r", system_metrics=False) as run:
        train.describe(compose(TINY), tiny_data, run)
        run.set_tags({"data.fingerprint": "f" * 64})
    with pytest.raises(DataError, match=r"data.fingerprint of run .* is fff.*trained on"):
        recorded.recorded_fold(run.run_id, "test")


def draw_logits(
    seed: int, tiles: int, sharpness: float, spread: float = 2
) -> tuple[Floats, Labels]:
    """Return logits and labels; softmax at temperature ``sharpness`` is the true probability."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (tiles, 5))
    true = calibration.softmax(logits)
    labels = (true.cumsum(axis=1) < rng.random((tiles, 1))).sum(axis=1)
    return logits * sharpness, labels


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 2.5])
def test_the_fitted_temperature_undoes_overconfidence(sharpness: float) -> None:
    logits, labels = draw_logits(0, 20_000, sharpness)
    fitted = calibration.fit(logits, labels)
    assert fitted.temperature == pytest.approx(sharpness, rel=0.03)
    best = per_tile_nll(labels, calibration.softmax(logits / fitted.temperature)).mean()
    for other in (0.9, 1.1):
        worse = calibration.softmax(logits / (fitted.temperature * other))
        assert per_tile_nll(labels, worse).mean() > best


def test_prediction_sets_reach_the_coverage_for_every_class() -> None:
    fitted = calibration.fit(*draw_logits(1, 20_000, 1.0))
    measured = calibration.evaluate(fitted, *draw_logits(2, 20_000, 1.0))
    assert measured["coverage"] == pytest.approx(calibration.COVERAGE, abs=0.01)
    assert measured["coverage_worst_class"] == pytest.approx(calibration.COVERAGE, abs=0.02)
    assert measured["out_of_distribution"] == pytest.approx(calibration.OOD_SHARE, abs=0.005)
    assert 0.95 <= measured["set_size"] <= 5


def test_prediction_sets_are_sometimes_empty_if_the_accuracy_exceeds_the_coverage() -> None:
    fitted = calibration.fit(*draw_logits(1, 20_000, 1.0, spread=30))
    logits, labels = draw_logits(2, 20_000, 1.0, spread=30)
    measured = calibration.evaluate(fitted, logits, labels)
    assert (logits.argmax(axis=1) == labels).mean() > 0.97
    assert measured["coverage"] == pytest.approx(calibration.COVERAGE, abs=0.01)
    assert measured["set_size"] < 1


def test_a_class_with_too_few_tiles_is_in_every_prediction_set() -> None:
    probabilities = np.full((4, 2), 0.5)
    assert calibration.conformal_thresholds(probabilities, np.zeros(4, np.int64), 0.95) == (1, 1)
    members = calibration.prediction_sets(np.array([[0.6, 0.4]]), (0.5, 0.5))
    assert members.tolist() == [[True, False]]


def test_energy_is_lower_for_confident_logits_and_does_not_overflow() -> None:
    sure, unsure = np.array([[9.0, 0, 0]]), np.array([[0.5, 0.4, 0.5]])
    assert calibration.energy(sure) < calibration.energy(unsure)
    assert calibration.energy(np.array([[1000.0, 0]])) == pytest.approx(-1000)


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_a_corruption_grows_with_its_severity_and_is_deterministic(
    kind: str, tiny_pack: Pack
) -> None:
    tiles = tiny_pack.tiles_NHWC[:40]
    before = tiles.copy()
    corrupted = [corruptions.corrupt(tiles, kind, severity) for severity in corruptions.SEVERITIES]
    change = [float(np.abs(result.astype(float) - tiles).mean()) for result in corrupted]
    assert change == sorted(change)
    assert change[0] > 0
    np.testing.assert_array_equal(tiles, before)
    np.testing.assert_array_equal(corrupted[2], corruptions.corrupt(tiles, kind, 3))
    assert {(result.shape, result.dtype) for result in corrupted} == {(tiles.shape, tiles.dtype)}


@pytest.mark.parametrize("bands", [1, 13])
@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_corruptions_work_on_any_number_of_bands(kind: str, bands: int) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2, 16, 16, bands)).astype(np.uint8)
    assert corruptions.corrupt(tiles, kind, 3).shape == tiles.shape
