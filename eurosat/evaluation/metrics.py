"""Classification metrics of labels and probabilities, with bootstrap intervals.

Every metric is computed for many weightings of the tiles at once: weights of one give the metric
itself, and counts of a draw with replacement give its bootstrap distribution.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eurosat.data.arrays import Floats, Labels

Probabilities = npt.NDArray[np.float64] | npt.NDArray[np.float32]

NUM_BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""
RESAMPLES = 1000
"""Bootstrap draws for an interval."""
RESAMPLES_PER_CHUNK = 100
"""Resamples computed at once: 4 MB per array for 5,400 tiles."""


def evaluate(
    labels: Labels, probabilities: Probabilities, classes: Sequence[str]
) -> dict[str, float]:
    """Return every metric of `_weighted_metrics` by name.

    ``labels`` is (N,), ``probabilities`` (N, K). A class without tiles is left out of the macro
    averages and has no metrics of its own.
    """
    ones = np.ones((1, len(labels)))
    weighted = _weighted_metrics(labels, probabilities.astype(np.float64), ones, classes)
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
    """Return an interval of every metric.

    Accuracy and the recall of each class are shares of tiles: their interval is the exact one
    (Clopper & Pearson 1934), which is right for few tiles too. The others get the bootstrap
    percentile interval (Efron & Tibshirani 1993), which has no width where no tile is wrong.
    """
    drawn: dict[str, list[Floats]] = {}
    for weights_BN in _bootstrap_weights(len(labels), resamples, seed):
        weighted = _weighted_metrics(labels, probabilities.astype(np.float64), weights_BN, classes)
        for name, values in weighted.items():
            drawn.setdefault(name, []).append(values)
    tails = [(1 - level) / 2, (1 + level) / 2]
    limits = {name: np.nanquantile(np.concatenate(parts), tails) for name, parts in drawn.items()}
    bootstrapped = {name: (float(low), float(high)) for name, (low, high) in limits.items()}
    return bootstrapped | _exact_intervals(labels, probabilities.argmax(axis=1), classes, level)


def _exact_intervals(
    labels: Labels, predicted: Labels, classes: Sequence[str], level: float
) -> dict[str, tuple[float, float]]:
    from scipy.stats import binomtest

    right = predicted == labels
    groups = {"accuracy": right}
    groups |= {f"recall/{classes[int(k)]}": right[labels == k] for k in np.unique(labels)}
    exact = {}
    for name, group in groups.items():
        interval = binomtest(int(group.sum()), len(group)).proportion_ci(level, "exact")
        exact[name] = (float(interval.low), float(interval.high))
    return exact


def _bootstrap_weights(tiles: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield (B, tiles) counts of a draw with replacement, until there were ``resamples``."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, RESAMPLES_PER_CHUNK):
        counts = rng.multinomial(
            tiles, np.full(tiles, 1 / tiles), min(RESAMPLES_PER_CHUNK, resamples - start)
        )
        yield counts.astype(np.float64)


def _weighted_metrics(
    labels: Labels, probabilities: Floats, weights_BN: Floats, classes: Sequence[str]
) -> dict[str, Floats]:
    """Return (B,) values of every metric, one for each weighting of the tiles.

    These are accuracy, macro_precision, macro_recall, macro_f1, macro_auprc, macro_auroc, nll
    (nats), brier, ece; and of each class precision/CLASS, recall/, f1/, auprc/ and auroc/CLASS.
    """
    num_classes = len(classes)
    predicted = probabilities.argmax(axis=1)
    present = np.flatnonzero(np.bincount(labels, minlength=num_classes))
    total = weights_BN.sum(axis=1)
    truth_NK = np.eye(num_classes)[labels]
    guess_NK = np.eye(num_classes)[predicted]
    right_BK = weights_BN @ (truth_NK * guess_NK)
    true_BK, guessed_BK = weights_BN @ truth_NK, weights_BN @ guess_NK
    per_class = {
        "precision": _ratio(right_BK, guessed_BK),
        "recall": _ratio(right_BK, true_BK),
        "f1": _ratio(2 * right_BK, true_BK + guessed_BK),
        "auprc": np.zeros_like(right_BK),
        "auroc": np.zeros_like(right_BK),
    }
    for k in present:
        ranked = _auprc_and_auroc(labels == k, probabilities[:, k], weights_BN)
        per_class["auprc"][:, k], per_class["auroc"][:, k] = ranked
    squares = ((probabilities - truth_NK) ** 2).sum(axis=1)
    weighted = {
        "accuracy": right_BK.sum(axis=1) / total,
        **{f"macro_{name}": values[:, present].mean(axis=1) for name, values in per_class.items()},
        "nll": weights_BN @ per_tile_nll(labels, probabilities) / total,
        "brier": weights_BN @ squares / total,
        "ece": np.abs(weights_BN @ _calibration_gaps(labels, probabilities)).sum(axis=1) / total,
    }
    for name, values in per_class.items():
        weighted |= {f"{name}/{classes[int(k)]}": values[:, k] for k in present}
    return weighted


def _ratio(part: Floats, total: Floats) -> Floats:
    """Divide; 0 where the divisor is 0."""
    return np.divide(part, total, out=np.zeros_like(part), where=total > 0)


def _auprc_and_auroc(
    positive: npt.NDArray[np.bool_], score: Floats, weights_BN: Floats
) -> tuple[Floats, Floats]:
    """Return average precision and area under the ROC curve; tied scores count as one step."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    selected = np.cumsum(weights_BN[:, order], axis=1)[:, ends]
    hits = np.cumsum(weights_BN[:, order] * positive[order], axis=1)[:, ends]
    misses = selected - hits
    new_hits = np.diff(hits, axis=1, prepend=0)
    new_misses = np.diff(misses, axis=1, prepend=0)
    precision = (_ratio(hits, selected) * new_hits).sum(axis=1)
    below = ((hits - new_hits / 2) * new_misses).sum(axis=1)
    return _ratio(precision, hits[:, -1]), _ratio(below, hits[:, -1] * misses[:, -1])


def per_tile_nll(labels: Labels, probabilities: Probabilities) -> Floats:
    """Return (N,) -ln p of the true class, in nats; p is clipped to at least 1e-12."""
    true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.clip(true, 1e-12, 1))


def _calibration_gaps(labels: Labels, probabilities: Floats, bins: int = NUM_BINS) -> Floats:
    """Return (N, bins): correctness minus confidence of each tile, in the bin of its confidence."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    gaps = np.zeros((len(labels), bins))
    gaps[np.arange(len(labels)), confidence_bin(confidence, bins)] = right - confidence
    return gaps


def confidence_bin(confidence: Floats, bins: int = NUM_BINS) -> Labels:
    """Return the bin of each confidence; bins have equal width and include their upper edge."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def confusion(labels: Labels, predicted: Labels, num_classes: int) -> npt.NDArray[np.int64]:
    """Return (K, K) counts; rows are true classes, columns predictions."""
    pairs = labels * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedComparison:
    """The first of two models compared with the second, on the same tiles."""

    only_first: int
    """Tiles that only the first model classifies correctly."""
    only_second: int
    """Tiles that only the second model classifies correctly."""
    p_value: float
    """p of the exact, two-sided McNemar test: chance of counts at least as uneven."""
    difference: Mapping[str, float]
    """First minus second: accuracy, macro_f1 and macro_auprc."""
    interval: Mapping[str, tuple[float, float]]
    """95 % paired bootstrap interval of each difference."""


def mcnemar(only_first: int, only_second: int) -> float:
    """Return p of the exact, two-sided McNemar test (1947).

    The arguments are the numbers of tiles that only one of two models classifies correctly.
    """
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
    """Compare two models by the exact McNemar test and a paired bootstrap over tiles."""
    right = [p.argmax(axis=1) == labels for p in (first, second)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    names = ("accuracy", "macro_f1", "macro_auprc")
    drawn: dict[str, list[Floats]] = {name: [] for name in names}
    for weights_BN in _bootstrap_weights(len(labels), resamples, seed):
        weighted_first, weighted_second = (
            _weighted_metrics(labels, p.astype(np.float64), weights_BN, classes)
            for p in (first, second)
        )
        for name in names:
            drawn[name].append(weighted_first[name] - weighted_second[name])
    of_first, of_second = (evaluate(labels, p, classes) for p in (first, second))
    limits = {name: np.quantile(np.concatenate(drawn[name]), [0.025, 0.975]) for name in names}
    return PairedComparison(
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
        difference={name: of_first[name] - of_second[name] for name in names},
        interval={name: (float(low), float(high)) for name, (low, high) in limits.items()},
    )
