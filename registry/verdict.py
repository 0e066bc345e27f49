"""The result of each gate, the verdict that they make together, and how a verdict is printed."""

from dataclasses import dataclass
from typing import Any

from eurosat.runtime import tables

EMPTY = "-"
"""Shown where there is no value."""
NOT_MEASURED = "not measured"
CHANGE_LIMITS = (
    "to change a limit, copy registry/gates.toml, edit the copy, and pass it as --gates FILE"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """What one gate says of a candidate."""

    gate: str
    value: str = EMPTY
    champion: str = EMPTY
    """The champion's value."""
    limit: str = EMPTY
    """The value that the candidate must reach."""
    refusal: str = ""
    """Value, limit and remedy of a refusal; empty if the gate passed."""
    off: str = ""
    """Why the gate is switched off; then it refuses nothing."""
    measured: bool = True
    """False if nobody requested the measurement; then the gate refuses nothing."""
    why: str
    """Why the gate exists."""

    @property
    def outcome(self) -> str:
        """Return "passed", "refused", "off" or "not measured"."""
        if self.off:
            return "off"
        if not self.measured:
            return NOT_MEASURED
        return "refused" if self.refusal else "passed"

    @property
    def summary(self) -> str:
        """Return the gate's part of the verdict's line."""
        if self.off:
            return f"{self.gate} off ({self.off})"
        champion = f" (champion {self.champion})" if self.champion != EMPTY else ""
        return f"{self.gate} {self.value}{champion}"

    def as_dict(self) -> dict[str, Any]:
        """Return the result for a JSON report; `python -m benchmarks.tables` reads these keys."""
        return {
            "gate": self.gate,
            "value": self.value,
            "champion": self.champion,
            "bar": self.limit,
            "refusal": self.refusal,
            "off": self.off,
            "asked": self.measured,
            "why": self.why,
            "verdict": self.outcome,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The results of all gates for one candidate."""

    results: tuple[GateResult, ...] = ()
    notes: tuple[str, ...] = ()
    """Exceptions that were made, such as accepted new data."""
    evidence: str | None = None
    """sha256 of the judged files and of the gates."""

    @property
    def refusals(self) -> tuple[str, ...]:
        """Return every reason against the candidate."""
        return tuple(result.refusal for result in self.results if result.outcome == "refused")

    @property
    def passed(self) -> bool:
        """Return whether at least one gate judged and none refused."""
        return bool(self.results) and not self.refusals

    def __str__(self) -> str:
        """Return one line; tags of versions and the ledger store it."""
        if self.refusals:
            return f"refused: {'; '.join(self.refusals)}"
        summaries = [result.summary for result in self.results if result.off or result.measured]
        return f"passed: {'; '.join([*summaries, *self.notes])}"


def print_verdict(verdict: Verdict) -> None:
    """Print a table of all gates, then their summary."""
    from rich.table import Table

    table = Table("gate", "value", "champion's", "limit", "verdict")
    for result in verdict.results:
        table.add_row(result.gate, result.value, result.champion, result.limit, result.outcome)
    tables.print_table(table)
    print_summary(verdict)


def print_summary(verdict: Verdict) -> None:
    """Print one line for the gates that passed, then those that are off, notes and refusals."""
    outcomes = [result.outcome for result in verdict.results]
    print(f"passed: {outcomes.count('passed')} of {len(outcomes)} gates")
    for result in verdict.results:
        if result.off:
            print(f"off: {result.gate}: {result.off}")
    for note in verdict.notes:
        print(f"note: {note}")
    for refusal in verdict.refusals:
        print(f"refused: {refusal}")
    if verdict.refusals:
        print(CHANGE_LIMITS)
