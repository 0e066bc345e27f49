"""The result of a validation: which expectations passed, and which tiles broke the others."""

from dataclasses import asdict, dataclass
from typing import Any

MAX_TILES_SHOWN = 10
"""Tiles that the console lists for each failed expectation; result.json lists all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectationResult:
    """The result of one expectation."""

    name: str
    description: str
    success: bool
    observed: str
    """What was observed instead, if the expectation is about the whole table; may be empty."""
    tiles: tuple[tuple[str, str], ...]
    """Path and offending value of each tile that broke it."""

    def lines(self) -> list[str]:
        """Return the result as text: a line for the expectation, then its first bad tiles."""
        head = f"{'passed' if self.success else 'FAILED'}  {self.name:<26} {self.description}"
        if self.success:
            return [head]
        observed = f": {self.observed}" if self.observed else ""
        count = f": {len(self.tiles):,} tile{'s' * (len(self.tiles) != 1)}" if self.tiles else ""
        lines = [f"{head}{observed}{count}"]
        shown = self.tiles[:MAX_TILES_SHOWN]
        lines += [f"          {path}  {value}".rstrip() for path, value in shown]
        if (more := len(self.tiles) - MAX_TILES_SHOWN) > 0:
            lines.append(f"          ... and {more:,} more")
        return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The results of a whole suite."""

    results: tuple[ExpectationResult, ...]
    suite: str
    """sha256 of the suite's definition."""

    @property
    def success(self) -> bool:
        """Whether there are results and none failed."""
        return bool(self.results) and not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the failed expectations."""
        return tuple(result.name for result in self.results if not result.success)

    def lines(self) -> list[str]:
        """Return a summary: one line for all that passed, then each failure with its tiles."""
        count, num_failed = len(self.results), len(self.failed)
        if not num_failed:
            return [f"all {count} expectations passed"]
        failures = [line for r in self.results if not r.success for line in r.lines()]
        return [
            f"passed  {count - num_failed} expectations",
            *failures,
            f"{num_failed} of {count} expectations failed",
        ]

    def as_dict(self) -> dict[str, Any]:
        return {"success": self.success, **asdict(self)}
