"""Figures of merit, held against scikit-learn and torchmetrics on random inputs."""

import numpy as np
import pytest

from eurosat import metrics

CLASSES = ("a", "b", "c", "d")


def drawn(seed: int, tiles: int = 300) -> tuple[metrics.Labels, metrics.Probabilities]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), tiles)
    logits = rng.normal(0, 1, (tiles, len(CLASSES)))
    logits[np.arange(tiles), labels] += 1.5
    odds = np.exp(logits)
    return labels, odds / odds.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_figures_agree_with_torchmetrics(seed: int) -> None:
    import torch
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassAveragePrecision,
        MulticlassCalibrationError,
        MulticlassF1Score,
    )

    labels, probabilities = drawn(seed)
    figures = metrics.evaluate(labels, probabilities, CLASSES)
    given = torch.from_numpy(probabilities), torch.from_numpy(labels)
    k = len(CLASSES)
    for name, judge in {
        "accuracy": MulticlassAccuracy(k, average="micro"),
        "macro_f1": MulticlassF1Score(k, average="macro"),
        "macro_auprc": MulticlassAveragePrecision(k, average="macro"),
        "ece": MulticlassCalibrationError(k, n_bins=metrics.BINS, norm="l1"),
    }.items():
        assert figures[name] == pytest.approx(float(judge(*given)), abs=1e-5), name
    of_class = MulticlassF1Score(k, average=None)(*given)
    assert [figures[f"f1/{name}"] for name in CLASSES] == pytest.approx(of_class.tolist())


def test_log_likelihood_agrees_with_scikit_learn_and_survives_certainty() -> None:
    from sklearn.metrics import log_loss

    labels, probabilities = drawn(9)
    ours = metrics.negative_log_likelihood(labels, probabilities)
    assert ours == pytest.approx(log_loss(labels, probabilities))
    sure = np.array([[1.0, 0.0]])
    assert np.isfinite(metrics.negative_log_likelihood(np.array([1]), sure))


def test_perfect_answers_get_perfect_figures() -> None:
    labels = np.arange(8) % 4
    figures = metrics.evaluate(labels, np.eye(4)[labels], CLASSES)
    perfect = ("accuracy", "macro_f1", "macro_auprc")
    assert [figures[name] for name in perfect] == [1, 1, 1]
    assert (figures["ece"], figures["nll"]) == (0, 0)


def test_a_class_without_tiles_is_left_out() -> None:
    labels = np.array([0, 0, 1, 1])
    figures = metrics.evaluate(labels, np.eye(4)[labels], CLASSES)
    assert figures["macro_f1"] == 1
    assert "f1/c" not in figures


def test_the_confusion_matrix_counts_true_classes_in_rows() -> None:
    counts = metrics.confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    assert counts.tolist() == [[1, 1], [0, 1]]
