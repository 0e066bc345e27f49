"""Bring aliases and ledger together: set what the ledger says, and record what was done by hand.

A command writes its ledger entry first and sets the aliases after. If it is killed in between, the
next command sets them. An alias that matches neither the last entry nor, until that entry is marked
as applied, the champion before it, was changed outside these commands.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eurosat import tracking
from registry import ledger, versions
from registry.approvals import RETIRED_TAG

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

SETTLE_S = 1.0
"""How long to wait for another command that may be about to set an alias."""
UNKNOWN_ACTOR = "unknown"
"""The actor of changes outside these commands; MLflow does not record who made them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryState:
    """A state in which ledger and aliases agree."""

    head_digest: str
    """Digest of the last entry, which the next one names as its predecessor."""
    champion: "ModelVersion | None"
    rollback_stack: tuple[str, ...]
    """See `registry.ledger.rollback_stack`."""

    @property
    def champion_number(self) -> str | None:
        return _number(self.champion)

    @property
    def earlier_champions(self) -> tuple[str, ...]:
        """Return the versions that a rollback goes back to, the next target last."""
        return self.rollback_stack[:-1] if self.champion else self.rollback_stack

    def describe_change(self, model: str, number: str) -> str:
        """Return a command's last line, after this state was followed by another champion."""
        before = f"version {self.champion_number} before" if self.champion else "none before"
        return f"{model} version {number} is the champion ({before})"


def reconcile(model: str) -> RegistryState:
    """Complete what was cut off, record what was done by hand, and return the state.

    Raises:
        TrackingError: the registry cannot be reached.
    """
    overtaken = False  # one of our aliases was set after another's entry: not a change by hand
    suspect: tuple[str, str | None] | None = None
    while True:
        links = ledger.chain(ledger.records(model))
        last = links[-1].entry if links else None
        head_digest = last.digest if last else ledger.GENESIS
        entered = last.to_version if last else None
        alias = _number(versions.by_alias(model, versions.CHAMPION))
        if alias not in (entered, _champion_before(links)) and not overtaken:
            if suspect == (head_digest, alias):
                _record_by_hand(model, head_digest, entered, alias)
            else:  # another command may be about to set it: look again before recording it
                suspect = head_digest, alias
                time.sleep(SETTLE_S)
            continue
        entries = [link.entry for link in links]
        if links:
            apply_aliases(model, entries, alias)
            if not links[-1].applied:
                ledger.mark_applied(model, links[-1].number)
        latest = ledger.entries(model)
        overtaken = (latest[-1].digest if latest else ledger.GENESIS) != head_digest
        champion = versions.by_alias(model, versions.CHAMPION)
        if not overtaken and _number(champion) == entered:
            return RegistryState(
                head_digest=head_digest,
                champion=champion,
                rollback_stack=tuple(ledger.rollback_stack(entries)),
            )


def _champion_before(links: Sequence[ledger.ChainLink]) -> str | None:
    """Return what the alias may still be until the last entry is marked as applied."""
    if not links:
        return None
    last = links[-1]
    if last.applied or last.entry.action == ledger.BY_HAND:
        return last.entry.to_version
    return last.entry.from_version


def append_and_apply(
    model: str,
    before: RegistryState,
    action: str,
    to: str,
    why: str,
    actor: str,
    verdict: str,
    evidence: str | None = None,
) -> None:
    """Make a version the champion: append to the ledger, then set the aliases.

    Raises:
        LedgerConflictError: another entry came first; no alias was moved.
    """
    version = versions.get_or_none(model, to)
    entry = ledger.LedgerEntry(
        time=ledger.now(),
        actor=actor,
        from_version=before.champion_number,
        to_version=to,
        why=why,
        verdict=verdict,
        previous=before.head_digest,
        action=action,
        evidence=evidence,
        registered_by=version.tags.get(versions.REGISTERED_BY_TAG) if version else None,
        files=_files_digest(version) if version else None,
    )
    ledger.append(model, entry)
    reconcile(model)


def _files_digest(version: "ModelVersion") -> str | None:
    """Return the digest of the files that were registered; None if they were not recorded."""
    digests = versions.registered_digests(version)
    return ledger.manifest_digest(digests) if digests else None


def baseline(model: str, state: RegistryState) -> "ModelVersion | None":
    """Return the version to compare a candidate with: the champion, or the last there was."""
    if state.champion is not None:
        return state.champion
    number = last_active(model, state.earlier_champions)
    return versions.get(model, number) if number else None


def apply_aliases(model: str, entries: Sequence[ledger.LedgerEntry], expected: str | None) -> None:
    """Set ``champion`` and ``previous`` as the entries say; remove a challenger that won.

    If ``champion`` is no longer the ``expected`` version, somebody has just moved it, and it stays.
    """
    champion, stack = entries[-1].to_version, ledger.rollback_stack(entries)
    earlier = stack[:-1] if champion else stack
    if ledger.entries(model)[-1].digest != entries[-1].digest:
        return  # another command has appended an entry meanwhile, and sets the aliases
    if expected != champion and expected == _number(versions.by_alias(model, versions.CHAMPION)):
        _set_alias(model, versions.CHAMPION, champion)
    _set_alias(model, versions.PREVIOUS, last_active(model, earlier))
    challenger = versions.by_alias(model, versions.CHALLENGER)
    if challenger and str(challenger.version) == champion:
        _set_alias(model, versions.CHALLENGER, None)


def last_active(model: str, numbers: Sequence[str]) -> str | None:
    """Return the last of these versions that is neither deleted nor retired."""
    return next((number for number in reversed(numbers) if _is_active(model, number)), None)


def _is_active(model: str, number: str) -> bool:
    version = versions.get_or_none(model, number)
    return version is not None and RETIRED_TAG not in version.tags


def _number(version: "ModelVersion | None") -> str | None:
    return str(version.version) if version else None


def _set_alias(model: str, alias: str, number: str | None) -> None:
    """Point the alias to the version, or delete it for None."""
    if _number(versions.by_alias(model, alias)) == number:
        return
    if number is not None and versions.get_or_none(model, number) is None:
        log.warning("version %s of %s was deleted: the alias %s is not set", number, model, alias)
        return
    with tracking.translate_errors(f"alias {alias} of {model}"):
        if number is None:
            versions.client().delete_registered_model_alias(model, alias)
        else:
            versions.client().set_registered_model_alias(model, alias, number)


def _record_by_hand(model: str, head_digest: str, before: str | None, after: str | None) -> None:
    """Append an entry for an alias moved by hand, unless another command comes first."""
    log.warning(
        "champion is version %s, but the ledger says %s: the alias was moved by hand, and the "
        "ledger records this",
        after or "none",
        before or "none",
    )
    entry = ledger.LedgerEntry(
        time=ledger.now(),
        actor=UNKNOWN_ACTOR,
        from_version=before,
        to_version=after,
        why="the alias was moved outside these commands",
        verdict="not judged",
        previous=head_digest,
        action=ledger.BY_HAND,
    )
    try:
        ledger.append(model, entry)
    except ledger.LedgerConflictError as error:
        log.info("not entered: %s", error)
