"""Who made which version champion, when and why: an append-only chain kept in MLflow.

Each entry is a version of the registered model ``<model>.ledger``. MLflow hands out version
numbers once, also to concurrent writers, so that of two entries with the same predecessor the
one with the lower number is in the chain and the other is not: a compare-and-swap, which
MLflow's aliases lack. Aliases follow the ledger: see `registry.reconcile`.
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
TAG = "ledger.entry"
SETTLED = "ledger.settled"
"""Tag of an entry whose aliases have been set: where they differ later, somebody moved them."""
PROMOTE, ROLLBACK, BY_HAND = "promote", "rollback", "by hand"
MAX_WHY = 2000
"""Characters."""


class LedgerConflictError(TrackingError):
    """Another entry came first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    time: str
    """UTC, ISO 8601."""
    actor: str
    from_version: str | None
    """The champion before; None for the first."""
    to_version: str | None
    """The champion after; None where its alias was taken away by hand."""
    why: str
    verdict: str
    previous: str
    """Digest of the entry before."""
    action: str = PROMOTE
    evidence: str | None = None
    """sha256 of what was judged, and by which gates; see `registry.promote.judge`."""

    def __post_init__(self) -> None:
        if len(self.why) > MAX_WHY:
            raise ConfigError(f"why has {len(self.why)} characters, over the limit of {MAX_WHY}")

    def as_json(self) -> str:
        """Canonical: sorted keys, no spaces; what the first ledgers lacked only where it tells."""
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
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.as_json().encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A version of the ledger's model."""

    number: int
    text: str
    """JSON of the entry."""
    settled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A record that is in the chain."""

    number: int
    entry: Entry
    settled: bool


def parse(text: str) -> Entry:
    """Read ``as_json``.

    Raises:
        ValueError: it is not an entry.
    """
    try:
        values = json.loads(text)
        from_version, to_version = values.pop("from"), values.pop("to")
        return Entry(from_version=from_version, to_version=to_version, **values)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a ledger entry: {error}") from error


def chain(records: Iterable[Record]) -> list[Link]:
    """Those that link up from the genesis, the lowest number first."""
    linked: list[Link] = []
    head = GENESIS
    for record in sorted(records, key=lambda one: one.number):
        try:
            entry = parse(record.text)
        except ValueError as error:
            log.warning("entry %d of the ledger is left out: %s", record.number, error)
            continue
        if entry.previous == head:
            linked.append(Link(number=record.number, entry=entry, settled=record.settled))
            head = entry.digest
    return linked


def outside(records: Sequence[Record]) -> tuple[list[int], list[int]]:
    """Numbers of records that are not in the chain: those that came second, and those that break
    it, which nobody could have entered so.
    """
    linked = chain(records)
    known, predecessors = {one.number for one in linked}, {one.entry.previous for one in linked}
    second: list[int] = []
    broken: list[int] = []
    for record in records:
        if record.number in known:
            continue
        try:
            late = parse(record.text).previous in predecessors
        except ValueError:
            late = False
        (second if late else broken).append(record.number)
    return second, broken


def reigns(entries: Iterable[Entry]) -> list[str]:
    """Champions in the order in which a rollback goes back through them, the last one first in
    line: who was rolled away, or passed over by hand, is not among them.
    """
    held: list[str] = []
    for entry in entries:
        if entry.to_version is None:
            continue
        if entry.action != PROMOTE and entry.to_version in held:
            while held[-1] != entry.to_version:
                held.pop()
        else:
            held.append(entry.to_version)
    return held


def records(model: str) -> list[Record]:
    return [
        Record(number=int(v.version), text=v.tags.get(TAG, ""), settled=SETTLED in v.tags)
        for v in versions.all_of(name_of(model))
    ]


def entries(model: str) -> list[Entry]:
    """The valid chain, in order."""
    return [link.entry for link in chain(records(model))]


def append(model: str, entry: Entry) -> None:
    """Enter it, unless another entry came first after the same predecessor.

    Raises:
        LedgerConflictError: one did; nothing may be changed on the strength of this entry.
    """
    name = name_of(model)
    if entry.to_version is not None:
        source = f"models:/{model}/{entry.to_version}"
    else:  # the version before may have been deleted; MLflow wants a source that is there
        source = f"models:/{name}/{chain(records(model))[-1].number}"
    versions.ensure(name, f"Ledger of {model}: one version per entry, written by this project")
    with tracking.translate_errors(f"ledger {name}"):
        made = versions.client().create_model_version(
            name,
            source,
            tags={TAG: entry.as_json()},
            description=f"{entry.action}: {entry.from_version} -> {entry.to_version} "
            f"by {entry.actor}: {entry.why}",
        )
    for link in chain(records(model)):
        if link.number == int(made.version) or link.entry.digest == entry.digest:
            return  # MLflow's client sends again what it had no answer to
        if (first := link.entry).previous == entry.previous:
            raise LedgerConflictError(
                f"{entry.action} of version {entry.to_version} was not entered: {first.actor} "
                f"entered {first.action} of version {first.to_version} at the same time; see "
                "`python -m registry.history`, and say it again"
            )
    raise LedgerConflictError(
        f"{entry.action} of version {entry.to_version} was not entered: the ledger {name} changed "
        "underneath; say it again"
    )


def settle(model: str, number: int) -> None:
    """Say that the aliases are as this entry wants them."""
    with tracking.translate_errors(f"ledger {name_of(model)}"):
        versions.client().set_model_version_tag(name_of(model), str(number), SETTLED, now())


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def name_of(model: str) -> str:
    return f"{model}.ledger"
