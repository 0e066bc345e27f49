"""Figures of merit, held against scikit-learn and torchmetrics on random inputs."""

import numpy as np
import pytest

from eurosat.data.arrays import Floats, Labels
from eurosat.evaluation import metrics

CLASSES = ("a", "b", "c", "d")


def drawn(seed: int, tiles: int = 300) -> tuple[Labels, Floats]:
    """Labels, and probabilities that often agree with them; every other seed has many ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), tiles)
    logits = rng.normal(0, 1, (tiles, len(CLASSES)))
    logits[np.arange(tiles), labels] += 1.5
    if seed % 2:
        logits = np.round(logits)
    odds = np.exp(logits)
    return labels, odds / odds.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(6))
def test_figures_agree_with_torchmetrics(seed: int) -> None:
    import torch
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassAUROC,
        MulticlassAveragePrecision,
        MulticlassCalibrationError,
        MulticlassF1Score,
        MulticlassPrecision,
        MulticlassRecall,
    )

    labels, probabilities = drawn(seed)
    figures = metrics.evaluate(labels, probabilities, CLASSES)
    given = torch.from_numpy(probabilities), torch.from_numpy(labels)
    k = len(CLASSES)
    for name, judge in {
        "accuracy": MulticlassAccuracy(k, average="micro"),
        "macro_precision": MulticlassPrecision(k, average="macro"),
        "macro_recall": MulticlassRecall(k, average="macro"),
        "macro_f1": MulticlassF1Score(k, average="macro"),
        "macro_auprc": MulticlassAveragePrecision(k, average="macro"),
        "macro_auroc": MulticlassAUROC(k, average="macro"),
        "ece": MulticlassCalibrationError(k, n_bins=metrics.NUM_BINS, norm="l1"),
    }.items():
        assert figures[name] == pytest.approx(float(judge(*given)), abs=1e-5), name
    of_class = MulticlassF1Score(k, average=None)(*given)
    assert [figures[f"f1/{name}"] for name in CLASSES] == pytest.approx(of_class.tolist())


def by_scikit_learn(labels: Labels, probabilities: Floats, weights: Floats) -> dict[str, float]:
    from sklearn import metrics as sk

    predicted = probabilities.argmax(axis=1)
    truth = np.eye(len(CLASSES))[labels]
    figures = {
        "accuracy": sk.accuracy_score(labels, predicted, sample_weight=weights),
        "nll": sk.log_loss(labels, probabilities, sample_weight=weights),
        "brier": np.average(((probabilities - truth) ** 2).sum(axis=1), weights=weights),
    }
    for k, name in enumerate(CLASSES):
        one = {"y_true": labels == k, "sample_weight": weights}
        figures |= {
            f"precision/{name}": sk.precision_score(y_pred=predicted == k, **one),
            f"recall/{name}": sk.recall_score(y_pred=predicted == k, **one),
            f"f1/{name}": sk.f1_score(y_pred=predicted == k, **one),
            f"auprc/{name}": sk.average_precision_score(y_score=probabilities[:, k], **one),
            f"auroc/{name}": sk.roc_auc_score(y_score=probabilities[:, k], **one),
        }
    for figure in ("precision", "recall", "f1", "auprc", "auroc"):
        figures[f"macro_{figure}"] = np.mean([figures[f"{figure}/{c}"] for c in CLASSES])
    return figures


@pytest.mark.parametrize("seed", range(6))
def test_figures_agree_with_scikit_learn_under_any_weights(seed: int) -> None:
    labels, probabilities = drawn(seed)
    weights_BN = np.random.default_rng(seed).poisson(1, (3, len(labels))).astype(float)
    ours = metrics._weighted_metrics(labels, probabilities, weights_BN, CLASSES)
    for number, weights in enumerate(weights_BN):
        wanted = by_scikit_learn(labels, probabilities, weights)
        assert set(ours) - set(wanted) == {"ece"}
        for name, value in wanted.items():
            assert ours[name][number] == pytest.approx(value, abs=1e-9), name


def test_intervals_agree_with_scipys_bootstrap() -> None:
    from scipy.stats import bootstrap

    labels, probabilities = drawn(2)
    ours = metrics.intervals(labels, probabilities, CLASSES, resamples=4000)
    right = (probabilities.argmax(axis=1) == labels).astype(float)
    theirs = bootstrap(
        (right,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours["accuracy"] == pytest.approx((theirs.low, theirs.high), abs=0.01)
    whole = metrics.evaluate(labels, probabilities, CLASSES)
    assert set(ours) == set(whole)
    assert all(low <= high for low, high in ours.values())


def test_a_95_percent_interval_holds_the_truth_about_95_times_in_a_hundred() -> None:
    held = 0
    for seed in range(200):
        right = np.random.default_rng(seed).random(250) < 0.9
        labels = np.zeros(250, np.int64)
        probabilities = np.where(right[:, None], [[0.8, 0.2]], [[0.2, 0.8]])
        low, high = metrics.intervals(labels, probabilities, ("a", "b"), resamples=200)["accuracy"]
        held += low <= 0.9 <= high
    assert 178 <= held <= 200, "binomial: 95 % of 200, four standard deviations below"


def test_the_mcnemar_test_is_exact_and_the_difference_is_paired() -> None:
    from scipy.stats import binom

    labels = np.zeros(100, np.int64)
    good, bad = np.array([0.9, 0.1]), np.array([0.1, 0.9])
    first = np.array([bad] * 3 + [good] * 97)
    second = np.array([good] * 3 + [bad] * 12 + [good] * 85)
    found = metrics.compare(labels, first, second, ("a", "b"))
    assert (found.only_first, found.only_second) == (12, 3)
    assert found.p_value == pytest.approx(2 * binom.cdf(3, 15, 0.5))
    assert found.difference["accuracy"] == pytest.approx(0.09)
    low, high = found.interval["accuracy"]
    assert 0 < low < 0.09 < high < 0.2
    same = metrics.compare(labels, first, first, ("a", "b"))
    assert (same.p_value, same.interval["accuracy"]) == (1, (0, 0))


def test_certainty_that_is_wrong_has_a_finite_surprise() -> None:
    assert np.isfinite(metrics.per_tile_nll(np.array([1]), np.array([[1.0, 0.0]]))).all()


def test_perfect_answers_get_perfect_figures() -> None:
    labels = np.arange(8) % 4
    figures = metrics.evaluate(labels, np.eye(4)[labels], CLASSES)
    perfect = ("accuracy", "macro_f1", "macro_auprc", "macro_auroc")
    assert [figures[name] for name in perfect] == [1, 1, 1, 1]
    assert (figures["ece"], figures["nll"], figures["brier"]) == (0, 0, 0)


def test_a_class_without_tiles_is_left_out() -> None:
    labels = np.array([0, 0, 1, 1])
    figures = metrics.evaluate(labels, np.eye(4)[labels], CLASSES)
    assert figures["macro_f1"] == 1
    assert "f1/c" not in figures


def test_the_confusion_matrix_counts_true_classes_in_rows() -> None:
    counts = metrics.confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    assert counts.tolist() == [[1, 1], [0, 1]]
