"""Metrics agree with scikit-learn, torchmetrics and SciPy on random inputs."""

import numpy as np
import pytest

from eurosat.data.arrays import Floats, Labels
from eurosat.evaluation import metrics

CLASSES = ("a", "b", "c", "d")


def random_predictions(seed: int, tiles: int = 300) -> tuple[Labels, Floats]:
    """Return labels and probabilities that often agree; odd seeds give many ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), tiles)
    logits = rng.normal(0, 1, (tiles, len(CLASSES)))
    logits[np.arange(tiles), labels] += 1.5
    if seed % 2:
        logits = np.round(logits)
    odds = np.exp(logits)
    return labels, odds / odds.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(6))
def test_metrics_agree_with_torchmetrics(seed: int) -> None:
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

    labels, probabilities = random_predictions(seed)
    computed = metrics.evaluate(labels, probabilities, CLASSES)
    inputs = torch.from_numpy(probabilities), torch.from_numpy(labels)
    k = len(CLASSES)
    for name, reference in {
        "accuracy": MulticlassAccuracy(k, average="micro"),
        "macro_precision": MulticlassPrecision(k, average="macro"),
        "macro_recall": MulticlassRecall(k, average="macro"),
        "macro_f1": MulticlassF1Score(k, average="macro"),
        "macro_auprc": MulticlassAveragePrecision(k, average="macro"),
        "macro_auroc": MulticlassAUROC(k, average="macro"),
        "ece": MulticlassCalibrationError(k, n_bins=metrics.NUM_BINS, norm="l1"),
    }.items():
        assert computed[name] == pytest.approx(float(reference(*inputs)), abs=1e-5), name
    f1_per_class = MulticlassF1Score(k, average=None)(*inputs)
    assert [computed[f"f1/{name}"] for name in CLASSES] == pytest.approx(f1_per_class.tolist())


def by_scikit_learn(labels: Labels, probabilities: Floats, weights: Floats) -> dict[str, float]:
    from sklearn import metrics as sk

    predicted = probabilities.argmax(axis=1)
    truth = np.eye(len(CLASSES))[labels]
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted, sample_weight=weights),
        "nll": sk.log_loss(labels, probabilities, sample_weight=weights),
        "brier": np.average(((probabilities - truth) ** 2).sum(axis=1), weights=weights),
    }
    for k, name in enumerate(CLASSES):
        common = {"y_true": labels == k, "sample_weight": weights}
        expected |= {
            f"precision/{name}": sk.precision_score(y_pred=predicted == k, **common),
            f"recall/{name}": sk.recall_score(y_pred=predicted == k, **common),
            f"f1/{name}": sk.f1_score(y_pred=predicted == k, **common),
            f"auprc/{name}": sk.average_precision_score(y_score=probabilities[:, k], **common),
            f"auroc/{name}": sk.roc_auc_score(y_score=probabilities[:, k], **common),
        }
    for name in ("precision", "recall", "f1", "auprc", "auroc"):
        expected[f"macro_{name}"] = np.mean([expected[f"{name}/{c}"] for c in CLASSES])
    return expected


@pytest.mark.parametrize("seed", range(6))
def test_metrics_agree_with_scikit_learn_under_any_weights(seed: int) -> None:
    labels, probabilities = random_predictions(seed)
    weights_BN = np.random.default_rng(seed).poisson(1, (3, len(labels))).astype(float)
    computed = metrics._weighted_metrics(labels, probabilities, weights_BN, CLASSES)
    for number, weights in enumerate(weights_BN):
        expected = by_scikit_learn(labels, probabilities, weights)
        assert set(computed) - set(expected) == {"ece"}
        for name, value in expected.items():
            assert computed[name][number] == pytest.approx(value, abs=1e-9), name


def test_intervals_agree_with_scipys_bootstrap() -> None:
    from scipy.stats import bootstrap

    labels, probabilities = random_predictions(2)
    intervals = metrics.intervals(labels, probabilities, CLASSES, resamples=4000)
    right = (probabilities.argmax(axis=1) == labels).astype(float)
    reference = bootstrap(
        (right,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert intervals["accuracy"] == pytest.approx((reference.low, reference.high), abs=0.01)
    computed = metrics.evaluate(labels, probabilities, CLASSES)
    assert set(intervals) == set(computed)
    assert all(low <= high for low, high in intervals.values())


def test_the_interval_of_an_accuracy_without_errors_is_that_of_its_few_tiles() -> None:
    labels = np.arange(96) % 4
    intervals = metrics.intervals(labels, np.eye(4)[labels], CLASSES, resamples=50)
    closed_form = {"accuracy": 0.025 ** (1 / 96), "recall/a": 0.025 ** (1 / 24)}
    for name, low in closed_form.items():
        assert intervals[name] == pytest.approx((low, 1))


def test_a_95_percent_interval_contains_the_true_value_in_about_95_percent_of_cases() -> None:
    hits = 0
    for seed in range(200):
        right = np.random.default_rng(seed).random(250) < 0.9
        labels = np.zeros(250, np.int64)
        probabilities = np.where(right[:, None], [[0.8, 0.2]], [[0.2, 0.8]])
        low, high = metrics.intervals(labels, probabilities, ("a", "b"), resamples=200)["accuracy"]
        hits += low <= 0.9 <= high
    assert 178 <= hits <= 200, "binomial: 95 % of 200, four standard deviations below"


def test_the_mcnemar_test_is_exact_and_the_difference_is_paired() -> None:
    from scipy.stats import binom

    labels = np.zeros(100, np.int64)
    good, bad = np.array([0.9, 0.1]), np.array([0.1, 0.9])
    first = np.array([bad] * 3 + [good] * 97)
    second = np.array([good] * 3 + [bad] * 12 + [good] * 85)
    comparison = metrics.compare(labels, first, second, ("a", "b"))
    assert (comparison.only_first, comparison.only_second) == (12, 3)
    assert comparison.p_value == pytest.approx(2 * binom.cdf(3, 15, 0.5))
    assert comparison.difference["accuracy"] == pytest.approx(0.09)
    low, high = comparison.interval["accuracy"]
    assert 0 < low < 0.09 < high < 0.2
    same = metrics.compare(labels, first, first, ("a", "b"))
    assert (same.p_value, same.interval["accuracy"]) == (1, (0, 0))


def test_the_nll_of_a_certain_wrong_prediction_is_finite() -> None:
    assert np.isfinite(metrics.per_tile_nll(np.array([1]), np.array([[1.0, 0.0]]))).all()


def test_perfect_predictions_get_perfect_metrics() -> None:
    labels = np.arange(8) % 4
    computed = metrics.evaluate(labels, np.eye(4)[labels], CLASSES)
    perfect = ("accuracy", "macro_f1", "macro_auprc", "macro_auroc")
    assert [computed[name] for name in perfect] == [1, 1, 1, 1]
    assert (computed["ece"], computed["nll"], computed["brier"]) == (0, 0, 0)


def test_a_class_without_tiles_has_no_metrics() -> None:
    labels = np.array([0, 0, 1, 1])
    computed = metrics.evaluate(labels, np.eye(4)[labels], CLASSES)
    assert computed["macro_f1"] == 1
    assert "f1/c" not in computed


def test_the_confusion_matrix_counts_true_classes_in_rows() -> None:
    counts = metrics.confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    assert counts.tolist() == [[1, 1], [0, 1]]
