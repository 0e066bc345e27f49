"""What people have said of a version, kept as its tags."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.errors import ConfigError
from registry import ledger, versions

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

APPROVAL, RETIRED = "approval", "retired"
"""Tags."""
APPROVED, REJECTED = "approved", "rejected"


@dataclass(frozen=True, kw_only=True, slots=True)
class Opinion:
    word: str
    by: str
    why: str
    time: str
    """UTC, ISO 8601."""

    @classmethod
    def of(cls, version: "ModelVersion", tag: str) -> "Opinion | None":
        """None where nobody has said anything that can be read."""
        try:
            return cls(**json.loads(version.tags[tag]))
        except (KeyError, TypeError, ValueError):
            return None


def say(model: str, number: str, tag: str, word: str, why: str, by: str | None) -> Opinion:
    """Leave it with the version.

    Raises:
        ConfigError: ``why`` is too long.
    """
    if len(why) > ledger.MAX_WHY:
        raise ConfigError(f"--why has {len(why)} characters, over {ledger.MAX_WHY}")
    said = Opinion(word=word, by=by or tracking.user(), why=why, time=ledger.now())
    with tracking.translate_errors(f"tag of version {number}"):
        versions.client().set_model_version_tag(model, number, tag, json.dumps(asdict(said)))
    return said
