"""How far a network's confidence can be trusted: temperature, prediction sets, unlike tiles.

All of it is fitted on the validation fold alone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eurosat.data.arrays import Floats, Labels
from eurosat.evaluation.metrics import per_tile_nll

COVERAGE = 0.95
"""Share of tiles, of every class, whose prediction set holds the true class."""
OOD_SHARE = 0.01
"""Share of validation tiles that count as unlike the training data."""
LOG_TEMPERATURES = (np.log(0.05), np.log(20.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    temperature: float
    """Logits are divided by it (Guo et al. 2017)."""
    coverage: float
    thresholds: tuple[float, ...]
    """Per class k: it belongs to the prediction set where 1 - p_k is at most this."""
    ood_threshold: float
    """Energy above which a tile is unlike the training data (Liu et al. 2020)."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """Also as runs before version 0.2 wrote it."""
        names = {"unlike_above": "ood_threshold"}
        current = {names.get(name, name): value for name, value in values.items()}
        return cls(**(current | {"thresholds": tuple(current["thresholds"])}))


def fit(logits_NK: Floats, labels: Labels) -> Calibration:
    """From uncalibrated logits of the validation fold."""
    temperature = fit_temperature(logits_NK, labels)
    return Calibration(
        temperature=temperature,
        coverage=COVERAGE,
        thresholds=conformal_thresholds(softmax(logits_NK / temperature), labels, COVERAGE),
        ood_threshold=float(np.quantile(energy(logits_NK), 1 - OOD_SHARE)),
    )


def fit_temperature(logits_NK: Floats, labels: Labels) -> float:
    """The temperature of the lowest negative log-likelihood, in [0.05, 20]."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: per_tile_nll(labels, softmax(logits_NK / np.exp(log_t))).mean(),
        bounds=LOG_TEMPERATURES,
        method="bounded",
    )
    return float(np.exp(found.x))


def conformal_thresholds(
    probabilities: Floats, labels: Labels, coverage: float
) -> tuple[float, ...]:
    """Class-conditional split conformal thresholds on 1 - p (Sadinle et al. 2019).

    A class with too few tiles to promise the coverage gets 1: it is in every set.
    """
    thresholds = []
    for k in range(probabilities.shape[1]):
        scores = np.sort(1 - probabilities[labels == k, k])
        rank = int(np.ceil((len(scores) + 1) * coverage))
        thresholds.append(float(scores[rank - 1]) if rank <= len(scores) else 1.0)
    return tuple(thresholds)


def prediction_sets(probabilities: Floats, thresholds: tuple[float, ...]) -> npt.NDArray[np.bool_]:
    """(N, K) membership. A set may be empty: no class is likely enough for the coverage asked."""
    inside: npt.NDArray[np.bool_] = 1 - probabilities <= np.asarray(thresholds)
    return inside


def energy(logits_NK: Floats) -> Floats:
    """(N,) -log sum exp of uncalibrated logits: low where the network knows what it sees."""
    top = logits_NK.max(axis=1)
    total: Floats = top + np.log(np.exp(logits_NK - top[:, None]).sum(axis=1))
    return np.negative(total)


def softmax(logits_NK: Floats) -> Floats:
    odds: Floats = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    return odds


def evaluate(calibration: Calibration, logits_NK: Floats, labels: Labels) -> dict[str, float]:
    """What the promises are worth on another fold: coverage (of all, of the worst class), mean
    set size, and the share of tiles told to be unlike the training data.
    """
    probabilities = softmax(logits_NK / calibration.temperature)
    inside = prediction_sets(probabilities, calibration.thresholds)
    held = inside[np.arange(len(labels)), labels]
    return {
        "coverage": float(held.mean()),
        "coverage_worst_class": min(float(held[labels == k].mean()) for k in np.unique(labels)),
        "set_size": float(inside.sum(axis=1).mean()),
        "unlike": float((energy(logits_NK) > calibration.ood_threshold).mean()),
    }
