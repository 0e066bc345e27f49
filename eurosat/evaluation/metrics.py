"""Figures of merit, as functions of labels and probabilities.

Every figure is written for many weightings of the tiles at once: one of ones gives the figure
itself, and counts drawn with replacement its bootstrap distribution.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eurosat.data.arrays import Floats, Labels

Probabilities = npt.NDArray[np.float64] | npt.NDArray[np.float32]

NUM_BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""
RESAMPLES = 1000
RESAMPLES_PER_CHUNK = 100
"""Resamples computed at a time: 4 MB an array for 5,400 tiles."""


def evaluate(
    labels: Labels, probabilities: Probabilities, classes: Sequence[str]
) -> dict[str, float]:
    """Every figure of `names`, by name.

    ``labels`` is (N,), ``probabilities`` (N, K). A class that no tile has is left out of the
    macro averages and gets no figure of its own.
    """
    once = np.ones((1, len(labels)))
    weighted = _weighted_metrics(labels, probabilities.astype(np.float64), once, classes)
    return {name: float(values[0]) for name, values in weighted.items()}


def intervals(
    labels: Labels,
    probabilities: Probabilities,
    classes: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Bootstrap percentile interval of every figure (Efron & Tibshirani 1993), over tiles."""
    drawn: dict[str, list[Floats]] = {}
    for weights_BN in _bootstrap_weights(len(labels), resamples, seed):
        figures = _weighted_metrics(labels, probabilities.astype(np.float64), weights_BN, classes)
        for name, values in figures.items():
            drawn.setdefault(name, []).append(values)
    tails = [(1 - level) / 2, (1 + level) / 2]
    limits = {name: np.nanquantile(np.concatenate(parts), tails) for name, parts in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in limits.items()}


def _bootstrap_weights(tiles: int, resamples: int, seed: int) -> Iterator[Floats]:
    """(CHUNK, tiles) counts of a draw with replacement, until there were ``resamples``."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, RESAMPLES_PER_CHUNK):
        counts = rng.multinomial(
            tiles, np.full(tiles, 1 / tiles), min(RESAMPLES_PER_CHUNK, resamples - start)
        )
        yield counts.astype(np.float64)


def _weighted_metrics(
    labels: Labels, probabilities: Floats, weights_BN: Floats, classes: Sequence[str]
) -> dict[str, Floats]:
    """(B,) values of: accuracy, macro_precision, macro_recall, macro_f1, macro_auprc,
    macro_auroc, nll (nats), brier, ece, and precision/, recall/, f1/, auprc/, auroc/ CLASS.
    """
    num_classes = len(classes)
    predicted = probabilities.argmax(axis=1)
    present = np.flatnonzero(np.bincount(labels, minlength=num_classes))
    total = weights_BN.sum(axis=1)
    truth_NK = np.eye(num_classes)[labels]
    guess_NK = np.eye(num_classes)[predicted]
    right_BK = weights_BN @ (truth_NK * guess_NK)
    true_BK, guessed_BK = weights_BN @ truth_NK, weights_BN @ guess_NK
    of_class = {
        "precision": _ratio(right_BK, guessed_BK),
        "recall": _ratio(right_BK, true_BK),
        "f1": _ratio(2 * right_BK, true_BK + guessed_BK),
        "auprc": np.zeros_like(right_BK),
        "auroc": np.zeros_like(right_BK),
    }
    for k in present:
        ranked = _auprc_and_auroc(labels == k, probabilities[:, k], weights_BN)
        of_class["auprc"][:, k], of_class["auroc"][:, k] = ranked
    squares = ((probabilities - truth_NK) ** 2).sum(axis=1)
    figures = {
        "accuracy": right_BK.sum(axis=1) / total,
        **{f"macro_{name}": values[:, present].mean(axis=1) for name, values in of_class.items()},
        "nll": weights_BN @ per_tile_nll(labels, probabilities) / total,
        "brier": weights_BN @ squares / total,
        "ece": np.abs(weights_BN @ _calibration_gaps(labels, probabilities)).sum(axis=1) / total,
    }
    for name, values in of_class.items():
        figures |= {f"{name}/{classes[int(k)]}": values[:, k] for k in present}
    return figures


def _ratio(part: Floats, whole: Floats) -> Floats:
    """0 where nothing is there to be divided by."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _auprc_and_auroc(
    positive: npt.NDArray[np.bool_], score: Floats, weights_BN: Floats
) -> tuple[Floats, Floats]:
    """Average precision and area under the ROC curve, tiles of one score taken together."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    seen = np.cumsum(weights_BN[:, order], axis=1)[:, ends]
    hits = np.cumsum(weights_BN[:, order] * positive[order], axis=1)[:, ends]
    misses = seen - hits
    new_hits = np.diff(hits, axis=1, prepend=0)
    new_misses = np.diff(misses, axis=1, prepend=0)
    precision = (_ratio(hits, seen) * new_hits).sum(axis=1)
    below = ((hits - new_hits / 2) * new_misses).sum(axis=1)
    return _ratio(precision, hits[:, -1]), _ratio(below, hits[:, -1] * misses[:, -1])


def per_tile_nll(labels: Labels, probabilities: Probabilities) -> Floats:
    """(N,) -ln p of the true class, in nats; p is kept above 1e-12."""
    true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.clip(true, 1e-12, 1))


def _calibration_gaps(labels: Labels, probabilities: Floats, bins: int = NUM_BINS) -> Floats:
    """(N, bins) accuracy minus confidence of each tile, in the column of its confidence."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    gaps = np.zeros((len(labels), bins))
    gaps[np.arange(len(labels)), confidence_bin(confidence, bins)] = right - confidence
    return gaps


def confidence_bin(confidence: Floats, bins: int = NUM_BINS) -> Labels:
    """Number of the bin, of equal width and closed above, that each confidence falls into."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def confusion(labels: Labels, predicted: Labels, num_classes: int) -> npt.NDArray[np.int64]:
    """(K, K) counts, rows by true class."""
    pairs = labels * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedComparison:
    """Two models on the same tiles, the first against the second."""

    only_first: int
    """Tiles that the first alone has right."""
    only_second: int
    p_value: float
    """Of the exact, two-sided McNemar test: how likely so uneven a count is by chance."""
    difference: Mapping[str, float]
    """First minus second, for accuracy, macro_f1 and macro_auprc."""
    interval: Mapping[str, tuple[float, float]]
    """95 % paired bootstrap interval of each difference."""


def mcnemar(only_first: int, only_second: int) -> float:
    """Give p of the exact, two-sided McNemar test (1947), from the tiles one alone has right."""
    from scipy.stats import binomtest

    uneven = only_first + only_second
    return float(binomtest(only_first, uneven).pvalue) if uneven else 1.0


def compare(
    labels: Labels,
    first: Probabilities,
    second: Probabilities,
    classes: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedComparison:
    """Exact McNemar test (McNemar 1947) and paired bootstrap over tiles."""
    right = [p.argmax(axis=1) == labels for p in (first, second)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    names = ("accuracy", "macro_f1", "macro_auprc")
    drawn: dict[str, list[Floats]] = {name: [] for name in names}
    for weights_BN in _bootstrap_weights(len(labels), resamples, seed):
        one, two = (
            _weighted_metrics(labels, p.astype(np.float64), weights_BN, classes)
            for p in (first, second)
        )
        for name in names:
            drawn[name].append(one[name] - two[name])
    whole = [evaluate(labels, p, classes) for p in (first, second)]
    limits = {name: np.quantile(np.concatenate(drawn[name]), [0.025, 0.975]) for name in names}
    return PairedComparison(
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
        difference={name: whole[0][name] - whole[1][name] for name in names},
        interval={name: (float(low), float(high)) for name, (low, high) in limits.items()},
    )
