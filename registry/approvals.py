"""Decisions of people about a version, stored as its tags."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eurosat.errors import ConfigError
from registry import ledger, versions
from registry.actor import actor

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

APPROVAL_TAG, RETIRED_TAG = "approval", "retired"
APPROVED, REJECTED, RETIRED = "approved", "rejected", "retired"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewDecision:
    """What a person decided about a version, and why."""

    decision: str
    """APPROVED, REJECTED or RETIRED."""
    by: str
    why: str
    time: str
    """UTC, ISO 8601."""

    @classmethod
    def from_tag(cls, version: "ModelVersion", tag: str) -> "ReviewDecision | None":
        """Read the decision from a tag; None if there is none that can be read."""
        try:
            stored = json.loads(version.tags[tag])
            return cls(decision=stored.pop("word"), **stored)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def as_json(self) -> str:
        """Return the tag's value."""
        return json.dumps(
            {"word": self.decision, "by": self.by, "why": self.why, "time": self.time}
        )


def record(
    model: str, number: str, tag: str, decision: str, why: str, by: str | None
) -> ReviewDecision:
    """Store a decision with the version; ``by`` names another person than the account.

    Raises:
        ConfigError: ``why`` is too long.
    """
    if len(why) > ledger.MAX_WHY:
        raise ConfigError(
            f"--why has {len(why)} characters, over {ledger.MAX_WHY}: give a shorter reason"
        )
    review = ReviewDecision(decision=decision, by=actor(by), why=why, time=ledger.now())
    versions.set_tag(model, number, tag, review.as_json())
    return review
