"""The result of one check, and the two errors that a check may raise."""

from dataclasses import dataclass
from typing import Literal

from eurosat.errors import EuroSATError

Verdict = Literal["ok", "failed", "n/a"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    verdict: Verdict
    message: str
    """What the check found, or why it does not apply."""
    remedy: str = ""
    """How to mend it; empty unless the check failed."""
    seconds: float = 0.0


class Failed(EuroSATError):
    """The check found a fault."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class NotApplicable(EuroSATError):
    """The check does not apply here; the message gives the reason."""
