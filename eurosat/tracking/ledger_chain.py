"""The chain of entries that the ledger of a registered model consists of.

`registry.ledger` writes it, and whoever loads a version reads what was judged.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from eurosat.errors import ConfigError, TrackingError

log = logging.getLogger(__name__)

GENESIS = "0" * 64
"""The predecessor of the first entry."""
ENTRY_TAG = "ledger.entry"
"""Tag of a version of the ledger's model: the entry as JSON."""
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
    files: str | None = None
    """Digest of the new champion's files, as they were judged; see `manifest_digest`."""

    def __post_init__(self) -> None:
        if len(self.why) > MAX_WHY:
            raise ConfigError(
                f"why has {len(self.why)} characters, over the limit of {MAX_WHY}: give a shorter "
                "reason"
            )

    def as_json(self) -> str:
        """Return the canonical form: sorted keys, no spaces.

        The first ledgers had no action, evidence, registered_by and files; these keys are written
        only if they differ from the defaults, so that old entries keep their digests.
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
        values |= {"files": self.files} if self.files else {}
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


def ledger_name(model: str) -> str:
    """Return the name of the registered model that holds the ledger."""
    return f"{model}.ledger"


def manifest_digest(sha256_by_name: Mapping[str, str]) -> str:
    """Return one sha256 for the files of a version, from the sha256 of each."""
    return hashlib.sha256(json.dumps(sha256_by_name, sort_keys=True).encode()).hexdigest()
