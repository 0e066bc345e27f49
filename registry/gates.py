"""What a candidate must reach to become champion, and the verdict on it."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from eurosat.config import from_mapping
from eurosat.errors import ConfigError

FILE = Path(__file__).with_name("gates.toml")
NONE, NOT_ASKED = "-", "not asked for"
RESAMPLES = 10_000
FACTS = {
    "data_validation": "a model is no better than its tiles",
    "leakage": "a tile that was learned from tells nothing",
    "lineage": "what nobody can make again, nobody can mend",
    "committed": "code that nobody has committed is gone with the next change to it",
    "signature": "the champion's clients must understand its successor",
    "approval": "a person takes the responsibility",
    "retired": "who was taken out of service does not come back by itself",
    "files": "what is served is what was registered, and runs nobody else's code",
}
"""Gates that hold or do not, and why they stand; a file of gates may only switch them off."""
USUALLY_OFF = {"approval": "nobody has to be asked"}
"""Facts that a file has to switch on, by `off = ""`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A bound for one figure."""

    metric: str
    """A figure of `registry.evidence`."""
    floor: float | None = None
    """Least value, whatever the champion has, where more is better."""
    ceiling: float | None = None
    """Largest value, where less is better."""
    margin: float = 0.0
    """Loss against the champion that is tolerated."""
    alone: bool = False
    """The bound alone judges: the champion's figure does not matter."""
    wins: bool = False
    """At least one of the gates so marked must be better than the champion's."""
    off: str = ""
    """Why it is switched off; shown in every verdict."""
    why: str

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.floor, self.ceiling) if bound is not None]
        if len(bounds) != 1:
            raise ConfigError(
                f"{self.metric} has {len(bounds)} bounds: give it a floor or a ceiling"
            )
        if not math.isfinite(bounds[0]):
            kind = "floor" if self.ceiling is None else "ceiling"
            raise ConfigError(f"{self.metric}.{kind} must be a finite number; got {bounds[0]}")
        if not 0 <= self.margin < math.inf:
            raise ConfigError(
                f"{self.metric}.margin is a loss that is tolerated, 0 or more; got {self.margin}"
            )
        if self.alone and self.wins:
            raise ConfigError(f"{self.metric} is judged alone, so it cannot be won: drop wins")
        _check_why(self.metric, self.why)

    @property
    def bound(self) -> float:
        return self.floor if self.floor is not None else float(self.ceiling or 0)

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.ceiling is None else -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Whether the candidate is worse than the champion on the tiles that both were tested on."""

    alpha: float = 0.05
    """Of the exact McNemar test, and of the paired bootstrap interval of the difference."""
    tolerance: float = 0.005
    """Loss of accuracy that the interval must exclude; else the tiles are too few to tell."""
    better: bool = False
    """The test must call the candidate better, and not only fail to call it worse."""
    off: str = ""
    why: str = "so small a gain or loss may be chance"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"difference.alpha must be above 0 and below 0.5; got {self.alpha}")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"difference.tolerance must be in [0, 1); got {self.tolerance}")
        _check_why("difference", self.why)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """How long the candidate may take, where `registry.judge --latency` asks."""

    ceiling: float = 2.0
    """Of the ratio to the champion's time in the same form and batch."""
    off: str = ""
    why: str = "a version that is twice as slow needs twice the servers"

    def __post_init__(self) -> None:
        if not 0 < self.ceiling < math.inf:
            raise ConfigError(
                f"latency.ceiling is a ratio to the champion's, above 0; got {self.ceiling}"
            )
        _check_why("latency", self.why)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    name: str
    off: str = ""
    why: str

    def __post_init__(self) -> None:
        _check_why(self.name, self.why)


def _facts() -> tuple[Fact, ...]:
    return tuple(
        Fact(name=name, why=why, off=USUALLY_OFF.get(name, "")) for name, why in FACTS.items()
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Gates:
    figures: tuple[Gate, ...]
    difference: Difference = field(default_factory=Difference)
    latency: Latency = field(default_factory=Latency)
    facts: tuple[Fact, ...] = field(default_factory=_facts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One gate's line in a verdict."""

    gate: str
    value: str = NONE
    champion: str = NONE
    bar: str = NONE
    refusal: str = ""
    """Empty where the gate passed."""
    off: str = ""
    """Why the gate is switched off; then it refuses nothing."""
    asked: bool = True
    """False where nothing was measured, as nobody wanted it; then it refuses nothing."""
    why: str

    @property
    def verdict(self) -> str:
        if self.off:
            return "off"
        if not self.asked:
            return NOT_ASKED
        return "refused" if self.refusal else "passed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    """How it was judged, as far as that is not the ordinary way."""
    evidence: str | None = None
    """sha256 of what was judged, and by which gates."""

    @property
    def refusals(self) -> tuple[str, ...]:
        """Every reason against the candidate."""
        return tuple(found.refusal for found in self.findings if found.verdict == "refused")

    @property
    def passed(self) -> bool:
        return bool(self.findings) and not self.refusals

    def __str__(self) -> str:
        if self.refusals:
            return f"refused: {'; '.join(self.refusals)}"
        told = [
            f"{found.gate} off ({found.off})"
            if found.off
            else f"{found.gate} {found.value}"
            + (f" (champion {found.champion})" if found.champion != NONE else "")
            for found in self.findings
            if found.asked
        ]
        return f"passed: {'; '.join([*told, *self.notes])}"


def load(file: Path = FILE) -> Gates:
    """Read gates: a table per figure; those of `Difference`, `Latency`, `FACTS` where they differ.

    Raises:
        ConfigError: unreadable, not TOML, no figure, an unknown key or a wrong type.
    """
    try:
        tables = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the gates in {file} cannot be read: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {name} must be a table, such as [accuracy]")
    figures = [
        from_mapping(Gate, {"metric": name} | table, name)
        for name, table in tables.items()
        if name not in (*FACTS, "difference", "latency")
    ]
    if not figures:
        raise ConfigError(f"{file} holds no gate for a figure: nothing would be judged")
    return Gates(
        figures=tuple(figures),
        difference=from_mapping(Difference, tables.get("difference", {}), "difference"),
        latency=from_mapping(Latency, tables.get("latency", {}), "latency"),
        facts=tuple(
            from_mapping(Fact, asdict(fact) | tables.get(fact.name, {}), fact.name)
            for fact in _facts()
        ),
    )


def judge(
    candidate: Mapping[str, float],
    champion: Mapping[str, float] | None,
    gates: tuple[Gate, ...],
    faults: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Finding, ...]:
    """Compare figures of the same test tiles; without ``champion`` the bounds alone decide.

    ``faults`` tells of figures why one is missing, and what can be done.
    """
    findings = tuple(_find(candidate, champion, gate, faults.get(gate.metric)) for gate in gates)
    if champion is not None and not any(found.refusal for found in findings):
        deciding = {gate.metric: gate for gate in gates if gate.wins and not gate.off}
        won = [
            gate.sign * candidate[metric] > gate.sign * champion[metric]
            for metric, gate in deciding.items()
        ]
        if not any(won):
            findings = tuple(_tie(found) if found.gate in deciding else found for found in findings)
    return findings


def judge_difference(right: "Paired | None", bar: Difference) -> Finding:
    """By the exact McNemar test (McNemar 1947) and the paired bootstrap interval."""
    found = Finding(gate="difference", why=bar.why, off=bar.off)
    if right is None or bar.off:
        return found
    low, high = right.interval(bar.alpha)
    p_value = right.p_value
    told = p_value < bar.alpha
    better, worse = told and right.difference > 0, told and right.difference < 0
    counts = f"{right.only_candidate} tiles won and {right.only_champion} lost"
    refusal = ""
    if worse:
        refusal = f"difference: worse than the champion, {counts} (exact McNemar p = {p_value:.2g})"
    elif bar.better and not better:
        refusal = (
            f"difference: {right.tiles} tiles are not enough to tell that it is better, {counts} "
            f"(exact McNemar p = {p_value:.2g}, and {bar.alpha:g} is asked for)"
        )
    elif low < -bar.tolerance and not better:
        refusal = (
            f"difference: {right.tiles} tiles are not enough to tell: accuracy differs by "
            f"{low:+.4f} to {high:+.4f}, and a loss of {bar.tolerance:g} must be ruled out"
        )
    return replace(
        found,
        value=f"{right.difference:+.4f} [{low:+.4f}, {high:+.4f}], p = {p_value:.2g}",
        bar=f"> {-bar.tolerance:+.4f}",
        refusal=refusal,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Two versions on the same tiles."""

    tiles: int
    only_candidate: int
    """Tiles that the candidate alone has right."""
    only_champion: int

    @property
    def difference(self) -> float:
        """Of the accuracies, candidate less champion."""
        return (self.only_candidate - self.only_champion) / self.tiles

    @property
    def p_value(self) -> float:
        """Of the exact, two-sided McNemar test."""
        from eurosat.evaluation.metrics import mcnemar

        return mcnemar(self.only_candidate, self.only_champion)

    def interval(self, alpha: float) -> tuple[float, float]:
        """Paired bootstrap of the difference, over tiles.

        All that a draw of tiles tells of it is how many each has won: those are drawn, half a tile
        added to both, so that what was seen in no tile is not taken for impossible.
        """
        import numpy as np

        alike = self.tiles - self.only_candidate - self.only_champion
        counts = np.array([self.only_candidate + 0.5, self.only_champion + 0.5, alike + 1.0])
        shares = counts / counts.sum()
        drawn = np.random.default_rng(0).multinomial(self.tiles, shares, RESAMPLES)
        low, high = np.quantile(
            (drawn[:, 0] - drawn[:, 1]) / self.tiles, [alpha / 2, 1 - alpha / 2]
        )
        return float(low), float(high)


def _find(
    candidate: Mapping[str, float],
    champion: Mapping[str, float] | None,
    gate: Gate,
    fault: str | None,
) -> Finding:
    if gate.off:
        return Finding(gate=gate.metric, off=gate.off, why=gate.why)
    value = candidate.get(gate.metric)
    against = champion is not None and not gate.alone
    theirs = champion.get(gate.metric) if champion is not None and against else None
    word, than = ("floor", "under") if gate.sign > 0 else ("ceiling", "over")
    bar, refusal = gate.sign * gate.bound, ""
    tolerated = None
    if theirs is not None and math.isfinite(theirs):
        tolerated = theirs - gate.sign * gate.margin
        bar = max(bar, gate.sign * tolerated)
    if value is None:
        refusal = f"{gate.metric}: {fault or 'the candidate has no such figure'}"
    elif not math.isfinite(value):
        refusal = f"{gate.metric}: the candidate's figure is {value}"
    elif gate.sign * value < gate.sign * gate.bound:
        refusal = f"{gate.metric}: {_said(value)} is {than} the {word} {_said(gate.bound)}"
    elif against and tolerated is None:
        missing = f"the champion's figure is {theirs}, so nothing compares with it"
        refusal = f"{gate.metric}: {fault or missing}"
    elif tolerated is not None and gate.sign * value < gate.sign * tolerated:
        refusal = (
            f"{gate.metric}: {_said(value)} is {than} the champion's bar {_said(tolerated)} "
            f"({_said(theirs)} with a margin of {gate.margin:g})"
        )
    return Finding(
        gate=gate.metric,
        value=_said(value),
        champion=_said(theirs),
        bar=_said(gate.sign * bar),
        refusal=refusal,
        why=gate.why,
    )


def _said(value: float | None) -> str:
    """Four places, and more for what is smaller."""
    if value is None:
        return NONE
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def _tie(found: Finding) -> Finding:
    refusal = f"{found.gate}: {found.value} is no better than the champion's {found.champion}"
    return replace(found, refusal=refusal)


def _check_why(name: str, why: str) -> None:
    if not why.strip():
        raise ConfigError(f"{name}.why is empty: say why this gate stands where it does")
