"""Calibrate a network: temperature, prediction sets and out-of-distribution detection.

Everything is fitted on the validation fold alone.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eurosat.data.arrays import Floats, Labels
from eurosat.evaluation.metrics import per_tile_nll

log = logging.getLogger(__name__)

COVERAGE = 0.95
"""Share of the tiles of each class whose prediction set contains the true class."""
OOD_SHARE = 0.01
"""Share of validation tiles that count as out of distribution."""
LOG_TEMPERATURE_BOUNDS = (np.log(0.05), np.log(20.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    temperature: float
    """Divisor of the logits (Guo et al. 2017)."""
    coverage: float
    """Share of tiles whose prediction set should contain the true class."""
    thresholds: tuple[float, ...]
    """Class k is in the prediction set if 1 - p_k is at most the k-th value."""
    ood_threshold: float
    """Energy above which a tile is out of distribution (Liu et al. 2020)."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """Read what `as_dict` wrote, also with the field names of earlier releases."""
        renamed = {"unlike_above": "ood_threshold"}
        current = {renamed.get(name, name): value for name, value in values.items()}
        return cls(**(current | {"thresholds": tuple(current["thresholds"])}))


def fit(logits_NK: Floats, labels: Labels) -> Calibration:
    """Fit everything on uncalibrated logits of the validation fold."""
    temperature = fit_temperature(logits_NK, labels)
    _warn_of_few_errors(temperature, int((logits_NK.argmax(axis=1) != labels).sum()), len(labels))
    return Calibration(
        temperature=temperature,
        coverage=COVERAGE,
        thresholds=conformal_thresholds(softmax(logits_NK / temperature), labels, COVERAGE),
        ood_threshold=float(np.quantile(energy(logits_NK), 1 - OOD_SHARE)),
    )


def _warn_of_few_errors(temperature: float, wrong: int, tiles: int) -> None:
    """Log a warning if the validation fold cannot show how often a confident answer is wrong."""
    lowest, highest = np.exp(LOG_TEMPERATURE_BOUNDS)
    if not wrong or temperature < 1.01 * lowest:
        log.warning(
            "confidences will be too high (temperature %.3g): %d of %d validation tiles are "
            "misclassified, which is too few for a calibration; add validation tiles",
            temperature,
            wrong,
            tiles,
        )
    elif temperature > highest / 1.01:
        log.warning(
            "the temperature %.3g is at its limit: %d of %d validation tiles are misclassified, "
            "so confidences mean little; train longer, or with other settings",
            temperature,
            wrong,
            tiles,
        )


def fit_temperature(logits_NK: Floats, labels: Labels) -> float:
    """Return the temperature in [0.05, 20] with the lowest negative log-likelihood."""
    from scipy.optimize import minimize_scalar

    optimum = minimize_scalar(
        lambda log_t: per_tile_nll(labels, softmax(logits_NK / np.exp(log_t))).mean(),
        bounds=LOG_TEMPERATURE_BOUNDS,
        method="bounded",
    )
    return float(np.exp(optimum.x))


def conformal_thresholds(
    probabilities: Floats, labels: Labels, coverage: float
) -> tuple[float, ...]:
    """Return class-conditional split conformal thresholds on 1 - p (Sadinle et al. 2019).

    A class with too few tiles for the coverage gets the threshold 1: it is in every set.
    """
    thresholds = []
    for k in range(probabilities.shape[1]):
        scores = np.sort(1 - probabilities[labels == k, k])
        rank = int(np.ceil((len(scores) + 1) * coverage))
        thresholds.append(float(scores[rank - 1]) if rank <= len(scores) else 1.0)
    return tuple(thresholds)


def prediction_sets(probabilities: Floats, thresholds: tuple[float, ...]) -> npt.NDArray[np.bool_]:
    """Return (N, K) membership. A set is empty if no class is likely enough."""
    members: npt.NDArray[np.bool_] = 1 - probabilities <= np.asarray(thresholds)
    return members


def energy(logits_NK: Floats) -> Floats:
    """Return (N,) -log sum exp of uncalibrated logits: low for tiles like the training data."""
    top = logits_NK.max(axis=1)
    total: Floats = top + np.log(np.exp(logits_NK - top[:, None]).sum(axis=1))
    return np.negative(total)


def softmax(logits_NK: Floats) -> Floats:
    odds: Floats = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    return odds


def evaluate(calibration: Calibration, logits_NK: Floats, labels: Labels) -> dict[str, float]:
    """Measure a calibration on another fold than the one it was fitted on.

    Returns the coverage (of all tiles, and of the class with the lowest), the mean size of a
    prediction set, and the share of tiles that count as out of distribution.
    """
    probabilities = softmax(logits_NK / calibration.temperature)
    members = prediction_sets(probabilities, calibration.thresholds)
    covered = members[np.arange(len(labels)), labels]
    is_ood = energy(logits_NK) > calibration.ood_threshold
    return {
        "coverage": float(covered.mean()),
        "coverage_worst_class": min(float(covered[labels == k].mean()) for k in np.unique(labels)),
        "set_size": float(members.sum(axis=1).mean()),
        "out_of_distribution": float(is_ood.mean()),
    }
