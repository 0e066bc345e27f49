"""The ledger: an append-only chain in MLflow of who made which version champion, when and why.

Each entry is a version of the registered model ``<model>.ledger``. MLflow gives each version number
once, also to concurrent writers. Of two entries with the same predecessor, the one with the lower
number is in the chain and the other is not: this is a compare-and-swap, which MLflow's aliases
lack. The aliases follow the ledger: see `registry.reconcile`.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from eurosat import tracking
from eurosat.errors import ConfigError, TrackingError
from registry import versions

log = logging.getLogger(__name__)

GENESIS = "0" * 64
"""The predecessor of the first entry."""
ENTRY_TAG = "ledger.entry"
APPLIED_TAG = "ledger.settled"
"""Tag of an entry whose aliases have been set; if they differ later, somebody moved them."""
PROMOTE, ROLLBACK, BY_HAND = "promote", "rollback", "by hand"
MAX_WHY = 2000
"""Characters."""


class LedgerConflictError(TrackingError):
    """Another entry with the same predecessor came first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """One change of the champion."""

    time: str
    """UTC, ISO 8601."""
    actor: str
    from_version: str | None
    """The champion before; None for the first."""
    to_version: str | None
    """The champion after; None if its alias was removed by hand."""
    why: str
    verdict: str
    previous: str
    """Digest of the entry before."""
    action: str = PROMOTE
    evidence: str | None = None
    """sha256 of the judged files and of the gates; see `registry.evidence.digest`."""
    registered_by: str | None = None
    """Account that registered the new champion, as its tag says."""

    def __post_init__(self) -> None:
        if len(self.why) > MAX_WHY:
            raise ConfigError(
                f"why has {len(self.why)} characters, over the limit of {MAX_WHY}: give a shorter "
                "reason"
            )

    def as_json(self) -> str:
        """Return the canonical form: sorted keys, no spaces.

        The first ledgers had no action, evidence and registered_by; these keys are written only if
        they differ from the defaults, so that old entries keep their digests.
        """
        values = {
            "time": self.time,
            "actor": self.actor,
            "from": self.from_version,
            "to": self.to_version,
            "why": self.why,
            "verdict": self.verdict,
            "previous": self.previous,
        }
        values |= {"action": self.action} if self.action != PROMOTE else {}
        values |= {"evidence": self.evidence} if self.evidence else {}
        values |= {"registered_by": self.registered_by} if self.registered_by else {}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.as_json().encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRecord:
    """A version of the ledger's model."""

    number: int
    text: str
    """The entry as JSON."""
    applied: bool = False
    """Whether the aliases were set as the entry says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainLink:
    """A record that is part of the chain."""

    number: int
    entry: LedgerEntry
    applied: bool


def parse(text: str) -> LedgerEntry:
    """Read what ``as_json`` writes.

    Raises:
        ValueError: it is not an entry.
    """
    try:
        values = json.loads(text)
        from_version, to_version = values.pop("from"), values.pop("to")
        return LedgerEntry(from_version=from_version, to_version=to_version, **values)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a ledger entry: {error}") from error


def chain(records: Iterable[LedgerRecord]) -> list[ChainLink]:
    """Return the records that link up from the genesis; of rivals, the lowest number counts."""
    links: list[ChainLink] = []
    head = GENESIS
    for record in sorted(records, key=lambda record: record.number):
        try:
            entry = parse(record.text)
        except ValueError as error:
            log.warning("entry %d of the ledger is ignored: %s", record.number, error)
            continue
        if entry.previous == head:
            links.append(ChainLink(number=record.number, entry=entry, applied=record.applied))
            head = entry.digest
    return links


def find_unlinked(records: Sequence[LedgerRecord]) -> tuple[list[int], list[int]]:
    """Return the numbers of the records outside the chain.

    The first list holds those that lost against an entry with the same predecessor, the second
    those that link to nothing: an entry was changed or deleted.
    """
    links = chain(records)
    linked = {link.number for link in links}
    predecessors = {link.entry.previous for link in links}
    second: list[int] = []
    broken: list[int] = []
    for record in records:
        if record.number in linked:
            continue
        try:
            late = parse(record.text).previous in predecessors
        except ValueError:
            late = False
        (second if late else broken).append(record.number)
    return second, broken


def rollback_stack(entries: Iterable[LedgerEntry]) -> list[str]:
    """Return the champions that a rollback goes back through, the next target last.

    Versions that were rolled back, or skipped by a move by hand, are removed.
    """
    stack: list[str] = []
    for entry in entries:
        if entry.to_version is None:
            continue
        if entry.action != PROMOTE and entry.to_version in stack:
            while stack[-1] != entry.to_version:
                stack.pop()
        else:
            stack.append(entry.to_version)
    return stack


def records(model: str) -> list[LedgerRecord]:
    """Return all versions of the ledger's model, in the chain or not."""
    return [
        LedgerRecord(
            number=int(version.version),
            text=version.tags.get(ENTRY_TAG, ""),
            applied=APPLIED_TAG in version.tags,
        )
        for version in versions.all_of(ledger_name(model))
    ]


def entries(model: str) -> list[LedgerEntry]:
    """Return the entries of the valid chain, in order."""
    return [link.entry for link in chain(records(model))]


def append(model: str, entry: LedgerEntry) -> None:
    """Append the entry, unless another one with the same predecessor came first.

    Raises:
        LedgerConflictError: another came first; the caller must not change any alias.
    """
    name = ledger_name(model)
    if entry.to_version is not None:
        source = f"models:/{model}/{entry.to_version}"
    else:  # MLflow requires a source that exists, and the version before may have been deleted
        source = f"models:/{name}/{chain(records(model))[-1].number}"
    versions.ensure_model(
        name, f"Ledger of {model}: one version per entry, written by this project"
    )
    with tracking.translate_errors(f"ledger {name}"):
        created = versions.client().create_model_version(
            name,
            source,
            tags={ENTRY_TAG: entry.as_json()},
            description=f"{entry.action}: {entry.from_version} -> {entry.to_version} "
            f"by {entry.actor}: {entry.why}",
        )
    for link in chain(records(model)):
        if link.number == int(created.version) or link.entry.digest == entry.digest:
            return  # equal digests: MLflow's client repeats a request that got no answer
        if (first := link.entry).previous == entry.previous:
            raise LedgerConflictError(
                f"{entry.action} of version {entry.to_version} was not entered: {first.actor} "
                f"entered {first.action} of version {first.to_version} at the same time; see "
                "`python -m registry.history`, then run the command again"
            )
    raise LedgerConflictError(
        f"{entry.action} of version {entry.to_version} was not entered: the ledger {name} changed "
        "meanwhile; run the command again"
    )


def mark_applied(model: str, number: int) -> None:
    """Record that the aliases were set as this entry says."""
    versions.set_tag(ledger_name(model), str(number), APPLIED_TAG, now())


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def ledger_name(model: str) -> str:
    """Return the name of the registered model that holds the ledger."""
    return f"{model}.ledger"
