"""The aliases brought to what the ledger says, and what was done by hand entered in it.

The ledger comes first, then the aliases: whoever is killed in between is completed by the next
command. An alias that is neither what the last entry made it nor, until that is settled, what was
before was moved by somebody.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eurosat import tracking
from registry import ledger, versions
from registry.approvals import RETIRED

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

SETTLE_S = 1.0
"""After which an alias that another command was about to set is set."""
NOBODY = "unknown"
"""The actor of what was done outside these commands: MLflow does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What ledger and aliases agree on."""

    predecessor: str
    """Digest that the next entry names."""
    champion: "ModelVersion | None"
    reigns: tuple[str, ...]
    """See `registry.ledger.reigns`."""

    @property
    def number(self) -> str | None:
        """Of the champion."""
        return _number(self.champion)

    @property
    def before(self) -> tuple[str, ...]:
        """Those that a rollback goes back to, the last one first in line."""
        return self.reigns[:-1] if self.champion else self.reigns

    def followed_by(self, model: str, number: str) -> str:
        """What a command says at its end."""
        was = f"version {self.number} before" if self.champion else "none before"
        return f"{model} version {number} is the champion ({was})"


def reconcile(model: str) -> Standing:
    """Complete what was cut off, enter what was done by hand, and tell what now holds.

    Raises:
        TrackingError: the registry cannot be asked.
    """
    overtaken = False  # an alias of ours came after another's entry: that is nobody's hand
    seen: tuple[str, str | None] | None = None
    while True:
        links = ledger.chain(ledger.records(model))
        champion = versions.by_alias(model, versions.CHAMPION)
        held = _number(champion)
        last = links[-1].entry if links else None
        predecessor = last.digest if last else ledger.GENESIS
        entered = last.to_version if last else None
        awaited = entered  # what the alias may be until the last entry is settled
        if last and last.action != ledger.BY_HAND and not links[-1].settled:
            awaited = last.from_version
        if held not in (entered, awaited) and not overtaken:
            if seen == (predecessor, held):
                _enter_by_hand(model, predecessor, entered, held)
            else:  # or is another command about to set it?
                seen = predecessor, held
                time.sleep(SETTLE_S)
            continue
        entries = [link.entry for link in links]
        if links:
            follow(model, entries, held)
            if not links[-1].settled:
                ledger.settle(model, links[-1].number)
        now = ledger.entries(model)
        overtaken = (now[-1].digest if now else ledger.GENESIS) != predecessor
        champion = versions.by_alias(model, versions.CHAMPION)
        if not overtaken and _number(champion) == entered:
            reigns = tuple(ledger.reigns(entries))
            return Standing(predecessor=predecessor, champion=champion, reigns=reigns)


def enter(
    model: str,
    before: Standing,
    action: str,
    to: str,
    why: str,
    actor: str,
    verdict: str,
    evidence: str | None = None,
) -> None:
    """Make a version the champion: in the ledger first, then the aliases follow.

    Raises:
        LedgerConflictError: another entry came first; no alias was moved.
    """
    entry = ledger.Entry(
        time=ledger.now(),
        actor=actor,
        from_version=before.number,
        to_version=to,
        why=why,
        verdict=verdict,
        previous=before.predecessor,
        action=action,
        evidence=evidence,
    )
    ledger.append(model, entry)
    reconcile(model)


def rival(model: str, standing: Standing) -> "ModelVersion | None":
    """Whom a candidate must not be worse than: the champion, or the last there was."""
    if standing.champion is not None:
        return standing.champion
    number = last_kept(model, standing.before)
    return versions.get(model, number) if number else None


def follow(model: str, entries: Sequence[ledger.Entry], held: str | None) -> None:
    """Set ``champion`` and ``previous`` to what the entries say; a challenger that won is none.

    A champion that is no longer the one that was ``held`` has just been moved by somebody else,
    and stays.
    """
    champion, reigns = entries[-1].to_version, ledger.reigns(entries)
    before = reigns[:-1] if champion else reigns
    if ledger.entries(model)[-1].digest != entries[-1].digest:
        return  # another entry came meanwhile, and whoever made it sets the aliases
    if held != champion and held == _number(versions.by_alias(model, versions.CHAMPION)):
        _point(model, versions.CHAMPION, champion)
    _point(model, versions.PREVIOUS, last_kept(model, before))
    challenger = versions.by_alias(model, versions.CHALLENGER)
    if challenger and str(challenger.version) == champion:
        _point(model, versions.CHALLENGER, None)


def last_kept(model: str, numbers: Sequence[str]) -> str | None:
    """The last of these versions that nobody has deleted or retired."""
    return next((number for number in reversed(numbers) if _in_service(model, number)), None)


def _in_service(model: str, number: str) -> bool:
    found = versions.find(model, number)
    return found is not None and RETIRED not in found.tags


def _number(version: "ModelVersion | None") -> str | None:
    return str(version.version) if version else None


def _point(model: str, alias: str, number: str | None) -> None:
    if _number(versions.by_alias(model, alias)) == number:
        return
    if number is not None and versions.find(model, number) is None:
        log.warning("version %s of %s was deleted: %s is not set to it", number, model, alias)
        return
    with tracking.translate_errors(f"alias {alias} of {model}"):
        if number is None:
            versions.client().delete_registered_model_alias(model, alias)
        else:
            versions.client().set_registered_model_alias(model, alias, number)


def _enter_by_hand(model: str, predecessor: str, was: str | None, now: str | None) -> None:
    """Unless another command did, or was about to set the alias itself."""
    log.warning(
        "champion is version %s where the ledger says %s: it was moved by hand, and is entered so",
        now or "none",
        was or "none",
    )
    entry = ledger.Entry(
        time=ledger.now(),
        actor=NOBODY,
        from_version=was,
        to_version=now,
        why="the alias was moved outside these commands",
        verdict="not judged",
        previous=predecessor,
        action=ledger.BY_HAND,
    )
    try:
        ledger.append(model, entry)
    except ledger.LedgerConflictError as error:
        log.info("not entered: %s", error)
