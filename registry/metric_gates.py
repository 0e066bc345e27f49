"""The arithmetic of the gates: metrics against limits, and differences against chance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from registry.gates import DifferenceGate, Gate
from registry.verdict import EMPTY, GateResult

NEED_A_CHAMPION = ("recall_drop",)
"""Metrics that compare with the champion, and do not exist without one."""
RESAMPLES = 10_000
"""Draws of the paired bootstrap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedCounts:
    """How two versions answer the same test tiles."""

    tiles: int
    only_candidate: int
    """Tiles that only the candidate classifies correctly."""
    only_champion: int
    """Tiles that only the champion classifies correctly."""

    @property
    def difference(self) -> float:
        """Return the candidate's accuracy minus the champion's."""
        return (self.only_candidate - self.only_champion) / self.tiles

    @property
    def p_value(self) -> float:
        """Return the p-value of the exact, two-sided McNemar test."""
        from eurosat.evaluation.metrics import mcnemar

        return mcnemar(self.only_candidate, self.only_champion)

    def interval(self, alpha: float) -> tuple[float, float]:
        """Return the paired bootstrap interval of the difference, over tiles.

        The difference of a resample depends only on how many tiles each version alone has right,
        so these counts are drawn. Half a tile is added to both, so that an outcome that no tile
        showed still has a probability above zero.
        """
        import numpy as np

        equal = self.tiles - self.only_candidate - self.only_champion
        counts = np.array([self.only_candidate + 0.5, self.only_champion + 0.5, equal + 1.0])
        shares = counts / counts.sum()
        draws = np.random.default_rng(0).multinomial(self.tiles, shares, RESAMPLES)
        differences = (draws[:, 0] - draws[:, 1]) / self.tiles
        low, high = np.quantile(differences, [alpha / 2, 1 - alpha / 2])
        return float(low), float(high)


def judge_metrics(
    candidate: Mapping[str, float],
    champion: Mapping[str, float] | None,
    gates: tuple[Gate, ...],
    faults: Mapping[str, str] = MappingProxyType({}),
) -> tuple[GateResult, ...]:
    """Judge metrics of the same test tiles; without ``champion`` only the fixed limits count.

    ``faults`` maps a metric that may be missing to the reason and the remedy.
    """
    results = tuple(
        _judge_metric(candidate, champion, gate, faults.get(gate.metric)) for gate in gates
    )
    if champion is None or any(result.refusal for result in results):
        return results
    improvable = {gate.metric: gate for gate in gates if gate.must_improve and not gate.off}
    improved = [
        gate.sign * candidate[metric] > gate.sign * champion[metric]
        for metric, gate in improvable.items()
    ]
    if any(improved):
        return results
    return tuple(
        _refuse_tie(result, improvable[result.gate]) if result.gate in improvable else result
        for result in results
    )


def judge_difference(counts: PairedCounts | None, gate: DifferenceGate) -> GateResult:
    """Judge by the exact McNemar test (McNemar 1947) and the paired bootstrap interval."""
    result = GateResult(gate="difference", why=gate.why, off=gate.off)
    if counts is None or gate.off:
        return result
    low, high = counts.interval(gate.alpha)
    return replace(
        result,
        value=f"{counts.difference:+.4f} [{low:+.4f}, {high:+.4f}], p = {counts.p_value:.2g}",
        limit=f"> {-gate.tolerance:+.4f}",
        refusal=_difference_refusal(counts, gate, low, high),
    )


def _difference_refusal(counts: PairedCounts, gate: DifferenceGate, low: float, high: float) -> str:
    p_value = counts.p_value
    significant = p_value < gate.alpha
    better = significant and counts.difference > 0
    worse = significant and counts.difference < 0
    won_and_lost = f"{counts.only_candidate} tiles won and {counts.only_champion} lost"
    if worse:
        return (
            f"difference: worse than the champion, {won_and_lost} (exact McNemar p = "
            f"{p_value:.2g}): train a better candidate"
        )
    if gate.better and not better:
        return (
            f"difference: {counts.tiles} tiles are not enough to show that it is better, "
            f"{won_and_lost} (exact McNemar p = {p_value:.2g}, must be below {gate.alpha:g}): "
            "test on more tiles, or train a better candidate"
        )
    if low < -gate.tolerance and not better:
        return (
            f"difference: {counts.tiles} tiles are not enough to tell: accuracy differs by "
            f"{low:+.4f} to {high:+.4f}, and a loss of {gate.tolerance:g} must be ruled out: "
            "test on more tiles, or train a better candidate"
        )
    return ""


def _judge_metric(
    candidate: Mapping[str, float],
    champion: Mapping[str, float] | None,
    gate: Gate,
    fault: str | None,
) -> GateResult:
    if gate.off:
        return GateResult(gate=gate.metric, off=gate.off, why=gate.why)
    if gate.metric in NEED_A_CHAMPION and champion is None:
        return GateResult(gate=gate.metric, measured=False, why=gate.why)
    value = candidate.get(gate.metric)
    compares = champion is not None and not gate.absolute_only
    champions_value = champion.get(gate.metric) if champion is not None and compares else None
    strictest, relative_limit = gate.sign * gate.limit, None
    if champions_value is not None and math.isfinite(champions_value):
        relative_limit = champions_value - gate.sign * gate.margin
        strictest = max(strictest, gate.sign * relative_limit)
    refusal = _limit_refusal(value, gate, fault)
    if not refusal and compares:
        refusal = _champion_refusal(value, champions_value, relative_limit, gate, fault)
    return GateResult(
        gate=gate.metric,
        value=_formatted(value),
        champion=_formatted(champions_value),
        limit=_formatted(gate.sign * strictest),
        refusal=refusal,
        why=gate.why,
    )


def _limit_refusal(value: float | None, gate: Gate, fault: str | None) -> str:
    """Compare with the floor or ceiling."""
    if value is None:
        missing = "the candidate has no such metric: train and register it again"
        return f"{gate.metric}: {fault or missing}"
    if not math.isfinite(value):
        return f"{gate.metric}: the candidate's value is {value}{_remedy(gate)}"
    if gate.sign * value < gate.sign * gate.limit:
        than = "under the floor" if gate.sign > 0 else "over the ceiling"
        return (
            f"{gate.metric}: {_formatted(value)} is {than} {_formatted(gate.limit)}{_remedy(gate)}"
        )
    return ""


def _champion_refusal(
    value: float | None,
    champions_value: float | None,
    relative_limit: float | None,
    gate: Gate,
    fault: str | None,
) -> str:
    """Compare with the champion's value less the margin."""
    if relative_limit is None:
        missing = f"the champion's value is {champions_value}, so there is nothing to compare with"
        return f"{gate.metric}: {fault or missing}"
    if value is not None and gate.sign * value < gate.sign * relative_limit:
        than = "under" if gate.sign > 0 else "over"
        return (
            f"{gate.metric}: {_formatted(value)} is {than} the champion's limit "
            f"{_formatted(relative_limit)} ({_formatted(champions_value)} with a margin of "
            f"{gate.margin:g}){_remedy(gate)}"
        )
    return ""


def _refuse_tie(result: GateResult, gate: Gate) -> GateResult:
    refusal = (
        f"{result.gate}: {result.value} is no better than the champion's {result.champion}"
        f"{_remedy(gate)}"
    )
    return replace(result, refusal=refusal)


def _remedy(gate: Gate) -> str:
    """Return the end of a refusal: what the metric is, and what to do."""
    meaning = f"; {gate.metric} is {gate.meaning}" if gate.meaning else ""
    return meaning + (f": {gate.remedy}" if gate.remedy else "")


def _formatted(value: float | None) -> str:
    """Return four decimal places, or two significant digits for smaller values."""
    if value is None:
        return EMPTY
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
