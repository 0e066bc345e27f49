"""Which test tiles two versions are compared on, and the metrics of these tiles."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from mlflow import MlflowClient
from pyarrow import parquet

from eurosat.errors import ModelError
from registry import evidence
from registry.evidence import Predictions, compare, metrics
from tests.support.registry import MLFLOW_WARNS, make_predictions, make_run

pytestmark = MLFLOW_WARNS
PEAK_MB = 100
"""Memory that a refusal may take."""


def fold(tiles: range, wrong: int = 0) -> Predictions:
    return Predictions(frame=make_predictions(tiles, wrong))


def test_metrics_are_those_of_the_library() -> None:
    values = metrics(fold(range(600), wrong=30))
    assert values["accuracy"] == pytest.approx(0.95)
    assert set(values) >= {"macro_f1", "macro_auprc", "nll", "ece", "f1/Forest"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.5])
def test_invalid_probabilities_give_no_metrics(value: float) -> None:
    predictions = fold(range(600))
    predictions.frame.loc[3, "p/River"] = value
    assert metrics(predictions) == {}


def test_the_first_candidate_is_judged_by_the_fixed_limits_only() -> None:
    compared = compare(fold(range(100)), None)
    assert compared.champion is None
    assert not compared.refusal
    assert compared.notes


def test_equal_test_folds_compare_in_any_order_and_with_duplicates() -> None:
    tiles = fold(range(100), wrong=10)
    doubled = Predictions(frame=tiles.frame.iloc[[*range(100), 0, 1]])
    shuffled = Predictions(frame=doubled.frame.sample(frac=1, random_state=0))
    compared = compare(doubled, shuffled)
    assert compared.champion is not None
    assert compared.candidate == pytest.approx({**compared.champion, "recall_drop": 0})
    assert compared.candidate == pytest.approx(metrics(doubled) | {"recall_drop": 0})
    assert not compared.notes


@pytest.mark.parametrize(
    ("candidate", "champion", "common"),
    [(range(1000), range(400, 1400), 600), (range(100), range(5, 100), 95)],
)
def test_folds_that_overlap_compare_on_the_common_tiles(
    candidate: range, champion: range, common: int
) -> None:
    compared = compare(fold(candidate, wrong=2), fold(champion, wrong=0))
    assert compared.notes == (f"compared on the {common} test tiles in common",)
    assert compared.champion is not None
    assert compared.champion["accuracy"] == 1
    wrong_in_common = len({*candidate[:2]} & {*champion})
    assert compared.candidate["accuracy"] == pytest.approx(1 - wrong_in_common / common)


@pytest.mark.parametrize(
    ("champion", "reason"),
    [
        (range(1000, 2000), "the test tiles are not the champion's"),
        (range(800, 1800), "only 200 of 1000 test tiles are also the champion's"),
    ],
)
def test_folds_that_do_not_overlap_enough_do_not_compare(champion: range, reason: str) -> None:
    compared = compare(fold(range(1000)), fold(champion))
    assert compared.refusal.startswith(reason)
    assert "--accept-new-data" in compared.refusal
    accepted = compare(fold(range(1000)), fold(champion), accept_new_data=True)
    assert not accepted.refusal
    assert accepted.champion is None
    assert accepted.notes[0].startswith(reason)


def test_a_tile_with_another_label_is_another_test_tile() -> None:
    relabelled = fold(range(1000))
    relabelled.frame["label"] = relabelled.frame["label"].map(
        {"Forest": "River", "River": "Forest", "SeaLake": "SeaLake"}
    )
    assert compare(relabelled, fold(range(1000))).refusal
    assert evidence.MIN_COMMON_TILES == 500


def test_training_tiles_of_either_version_are_left_out_of_the_comparison() -> None:
    candidate, champion = fold(range(1000), wrong=100), fold(range(1000), wrong=0)
    training_tiles = set(candidate.frame["sha256"][:100])
    compared = compare(candidate, champion, training_tiles)
    assert compared.candidate["accuracy"] == 1
    assert compared.paired is not None
    assert compared.paired.tiles == 900
    assert compare(candidate, champion, set(candidate.frame["sha256"][:600])).refusal


def test_the_largest_drop_of_a_class_is_a_metric() -> None:
    candidate, champion = fold(range(600), wrong=0), fold(range(600), wrong=0)
    rivers = candidate.frame.index[candidate.frame["label"] == "River"][:50]
    candidate.frame.loc[rivers, ["p/River", "p/Forest"]] = [0.1, 0.8]
    compared = compare(candidate, champion)
    assert compared.candidate["recall_drop"] == pytest.approx(0.25)
    assert compared.candidate["worst_recall"] == pytest.approx(0.75)


def many_rows() -> pa.Table:
    """Return rows that are all equal: Parquet stores a column of them in a few bytes."""
    rows = 8_000_000
    text = pa.array(["a"]).dictionary_encode().take(pa.array(np.zeros(rows, np.int8)))
    number = pa.array(np.zeros(rows, np.float32))
    return pa.table({"sha256": text, "label": text, "p/a": number})


def many_columns() -> pa.Table:
    return pa.table({"sha256": ["a"], "label": ["a"]} | {f"p/{k}": [0.1] for k in range(5000)})


def long_texts() -> pa.Table:
    """Return one long text in many rows, which Parquet stores once."""
    rows = 200
    text = pa.array(["a" * 1_000_000] * rows)
    label = pa.array(["a"] * rows)
    return pa.table({"sha256": text, "label": label, "p/a": pa.array(np.zeros(rows))})


def large_cells() -> pa.Table:
    """Return zeros that are stored as they are, and packed well."""
    values = pa.array([b"\0" * 1_000_000] * 300)
    text = pa.array(["a"] * 300)
    return pa.table({"sha256": text, "label": text, "p/a": pa.array(np.zeros(300)), "x": values})


def peak_mb() -> float:
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) / 1000


@pytest.mark.parametrize(
    ("make_table", "reason"),
    [
        (many_rows, "8000000 rows, over 500000"),
        (many_columns, "5002 columns, over 1000"),
        (long_texts, "1000000 characters in the column sha256, over 1024"),
        (large_cells, "unpacked, over 256 MB"),
    ],
)
def test_a_small_file_that_would_unpack_to_a_large_table_is_refused_by_its_metadata(
    make_table: Callable[[], pa.Table], reason: str, store: Path, tmp_path: Path
) -> None:
    run_id = make_run(store)
    file = tmp_path / evidence.PREDICTIONS
    dictionary = ["sha256", "label", "p/a"]
    parquet.write_table(make_table(), file, use_dictionary=dictionary, compression="zstd")
    assert file.stat().st_size < 2_000_000
    MlflowClient().log_artifact(run_id, str(file))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = peak_mb()
    with pytest.raises(ModelError, match=f"{re.escape(reason)}.*: train again"):
        evidence.read(run_id)
    assert peak_mb() - before < PEAK_MB


def test_an_artifact_that_is_too_large_is_refused_before_it_is_downloaded(
    store: Path, tmp_path: Path
) -> None:
    run_id = make_run(store)
    for name in (evidence.PREDICTIONS, evidence.SPLIT):
        with (tmp_path / name).open("wb") as file:
            file.truncate(int(evidence.MAX_FILE_MB * 1e6) + 1)
        MlflowClient().log_artifact(run_id, str(tmp_path / name))
    with pytest.raises(ModelError, match=r"predictions.parquet .* MB, over \d+ MB: train again"):
        evidence.read(run_id)
    with pytest.raises(ModelError, match=r"split.csv .* MB, over \d+ MB: train again"):
        evidence.training_tiles(run_id)
