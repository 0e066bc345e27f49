"""Figures of merit, as functions of labels and probabilities."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64] | npt.NDArray[np.float32]

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""


def evaluate(
    labels: Labels, probabilities: Probabilities, classes: Sequence[str]
) -> dict[str, float]:
    """accuracy, macro_f1, macro_auprc, nll, ece and f1/Class, auprc/Class; all fractions but nll.

    ``labels`` is (N,), ``probabilities`` (N, K). A class that no tile has is left out of the
    macro averages and gets no figure of its own.
    """
    from sklearn.metrics import average_precision_score, f1_score

    predicted = probabilities.argmax(axis=1)
    present = np.flatnonzero(np.bincount(labels, minlength=len(classes)))
    f1 = f1_score(labels, predicted, labels=present, average=None, zero_division=0.0)
    auprc = [average_precision_score(labels == k, probabilities[:, k]) for k in present]
    figures = {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(np.mean(f1)),
        "macro_auprc": float(np.mean(auprc)),
        "nll": negative_log_likelihood(labels, probabilities),
        "ece": expected_calibration_error(labels, probabilities),
    }
    names = [classes[int(k)] for k in present]
    figures |= {f"f1/{name}": float(v) for name, v in zip(names, f1, strict=True)}
    return figures | {f"auprc/{name}": float(v) for name, v in zip(names, auprc, strict=True)}


def negative_log_likelihood(labels: Labels, probabilities: Probabilities) -> float:
    """Mean of -ln p of the true class, in nats; p is kept above 1e-12."""
    true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.clip(true, 1e-12, 1)).mean())


def expected_calibration_error(
    labels: Labels, probabilities: Probabilities, bins: int = BINS
) -> float:
    """Mean gap of confidence and accuracy over bins of equal width, weighted by their tiles."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def confusion(labels: Labels, predicted: Labels, num_classes: int) -> npt.NDArray[np.int64]:
    """(K, K) counts, rows by true class."""
    pairs = labels * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
