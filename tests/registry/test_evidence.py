"""Which test tiles two versions are compared on, and the metrics of these tiles."""

import math

import pytest

from registry import evidence
from registry.evidence import Predictions, compare, metrics
from tests.support.registry import make_predictions


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
