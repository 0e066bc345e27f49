"""What a candidate must reach to become champion, and the verdict on it."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from eurosat.config import build
from eurosat.errors import ConfigError

FILE = Path(__file__).with_name("gates.toml")
NONE = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A bar for one figure in which more is better."""

    metric: str
    """A figure of ``eurosat.metrics.evaluate``."""
    floor: float
    """Least value, whatever the champion has."""
    margin: float = 0.0
    """Loss against the champion that is tolerated."""
    wins: bool = False
    """At least one of the gates so marked must be better than the champion's."""
    why: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.floor):
            raise ConfigError(f"{self.metric}.floor must be a finite number; got {self.floor}")
        if not 0 <= self.margin < math.inf:
            raise ConfigError(
                f"{self.metric}.margin is a loss that is tolerated, 0 or more; got {self.margin}"
            )
        if not self.why.strip():
            raise ConfigError(f"{self.metric}.why is empty: say why this gate stands where it does")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One gate's line in a verdict."""

    gate: str
    value: str
    champion: str = NONE
    bar: str = NONE
    refusal: str = ""
    """Empty where the gate passed."""
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    findings: tuple[Finding, ...] = ()
    refusals: tuple[str, ...] = ()
    """Every reason against the candidate; none promotes it."""
    notes: tuple[str, ...] = ()
    """How it was judged, as far as that is not the ordinary way."""
    evidence: str | None = None
    """sha256 of what was judged."""

    @property
    def passed(self) -> bool:
        return not self.refusals

    def __str__(self) -> str:
        if self.refusals:
            return f"refused: {'; '.join(self.refusals)}"
        figures = [
            f"{found.gate} {found.value}"
            + (f" (champion {found.champion})" if found.champion != NONE else "")
            for found in self.findings
        ]
        return f"passed: {'; '.join([*figures, *self.notes])}"


def load(file: Path = FILE) -> tuple[Gate, ...]:
    """Read gates, one table per metric.

    Raises:
        ConfigError: unreadable, not TOML, no gate, an unknown key or a wrong type.
    """
    try:
        tables = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the gates in {file} cannot be read: {error}") from error
    if not tables:
        raise ConfigError(f"{file} holds no gate: nothing would be judged")
    gates = []
    for metric, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {metric} must be a table, such as [accuracy]")
        gates.append(build(Gate, {"metric": metric} | table, metric))
    return tuple(gates)


def judge(
    candidate: Mapping[str, float],
    champion: Mapping[str, float] | None,
    gates: tuple[Gate, ...],
    *,
    notes: tuple[str, ...] = (),
) -> Verdict:
    """Compare figures of the same test tiles; without ``champion`` the floors alone decide."""
    if not gates:
        return Verdict(refusals=("there is no gate to pass",), notes=notes)
    findings = tuple(_find(candidate, champion, gate) for gate in gates)
    if champion is not None and not any(found.refusal for found in findings):
        deciding = {gate.metric for gate in gates if gate.wins}
        if not any(candidate[metric] > champion[metric] for metric in deciding):
            findings = tuple(_tie(found) if found.gate in deciding else found for found in findings)
    refusals = tuple(found.refusal for found in findings if found.refusal)
    return Verdict(findings=findings, refusals=refusals, notes=notes)


def judge_validation(state: str | None) -> Finding:
    """The gate on the tag ``data.validation`` of the candidate's run."""
    refusal = ""
    if state != "passed":
        refusal = (
            f"data validation: {state or 'not recorded'}, where 'passed' is needed: run "
            "`python -m expectations.validate` and train again"
        )
    return Finding(
        gate="data validation",
        value=state or NONE,
        bar="passed",
        refusal=refusal,
        why="a model is no better than its tiles",
    )


def _find(
    candidate: Mapping[str, float], champion: Mapping[str, float] | None, gate: Gate
) -> Finding:
    value = candidate.get(gate.metric)
    theirs = champion.get(gate.metric) if champion is not None else None
    bar, refusal = gate.floor, ""
    if value is None:
        refusal = f"{gate.metric}: the candidate has no such figure"
    elif not math.isfinite(value):
        refusal = f"{gate.metric}: the candidate's figure is {value}"
    elif value < gate.floor:
        refusal = f"{gate.metric}: {value:.4f} is under the floor {gate.floor:.4f}"
    elif champion is not None and (theirs is None or not math.isfinite(theirs)):
        refusal = f"{gate.metric}: the champion's figure is {theirs}, so nothing compares with it"
    elif theirs is not None and value < theirs - gate.margin:
        refusal = (
            f"{gate.metric}: {value:.4f} is under the champion's bar {theirs - gate.margin:.4f} "
            f"({theirs:.4f} less a margin of {gate.margin:g})"
        )
    if theirs is not None and math.isfinite(theirs):
        bar = max(bar, theirs - gate.margin)
    return Finding(
        gate=gate.metric,
        value=NONE if value is None else f"{value:.4f}",
        champion=NONE if theirs is None else f"{theirs:.4f}",
        bar=f"{bar:.4f}",
        refusal=refusal,
        why=gate.why,
    )


def _tie(found: Finding) -> Finding:
    refusal = f"{found.gate}: {found.value} is no better than the champion's {found.champion}"
    return replace(found, refusal=refusal)
