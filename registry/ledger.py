"""Who made which version champion, when and why: an append-only chain kept in MLflow.

Each entry is a version of the registered model ``<model>.ledger``. MLflow hands out version
numbers once, also to concurrent writers, so that of two entries with the same predecessor the
one with the lower number is in the chain and the other is not: a compare-and-swap, which
MLflow's aliases lack.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from eurosat import cli, logs, tracking
from eurosat.errors import ConfigError, TrackingError
from registry import tables, versions

log = logging.getLogger(__name__)

GENESIS = "0" * 64
"""The predecessor of the first entry."""
TAG = "ledger.entry"
MAX_WHY = 2000
"""Characters."""


class LedgerConflictError(TrackingError):
    """Another promotion was entered first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    time: str
    """UTC, ISO 8601."""
    actor: str
    from_version: str | None
    """The champion before; None for the first."""
    to_version: str
    why: str
    verdict: str
    previous: str
    """Digest of the entry before."""

    def __post_init__(self) -> None:
        if len(self.why) > MAX_WHY:
            raise ConfigError(f"why has {len(self.why)} characters, over the limit of {MAX_WHY}")

    def as_json(self) -> str:
        """Canonical: sorted keys, no spaces."""
        values = {
            "time": self.time,
            "actor": self.actor,
            "from": self.from_version,
            "to": self.to_version,
            "why": self.why,
            "verdict": self.verdict,
            "previous": self.previous,
        }
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.as_json().encode()).hexdigest()


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


def chain(records: Iterable[tuple[int, str]]) -> list[tuple[int, Entry]]:
    """Of (number, JSON) those that link up from the genesis, the lowest number first."""
    linked: list[tuple[int, Entry]] = []
    head = GENESIS
    for number, text in sorted(records):
        try:
            entry = parse(text)
        except ValueError as error:
            log.warning("entry %d of the ledger is left out: %s", number, error)
            continue
        if entry.previous == head:
            linked.append((number, entry))
            head = entry.digest
    return linked


def entries(model: str) -> list[Entry]:
    """The valid chain, in order."""
    return [entry for _, entry in chain(_records(model))]


def head(model: str) -> tuple[str, Entry | None]:
    """Digest that the next entry names as its predecessor, and the last entry."""
    known = entries(model)
    return (known[-1].digest, known[-1]) if known else (GENESIS, None)


def append(model: str, entry: Entry) -> None:
    """Enter it, unless another entry came first after the same predecessor.

    Raises:
        LedgerConflictError: one did; nothing may be changed on the strength of this entry.
    """
    name = name_of(model)
    versions.ensure(name, f"Ledger of {model}: one version per promotion, written by promote")
    with tracking.explained(f"ledger {name}"):
        made = versions.client().create_model_version(
            name,
            f"models:/{model}/{entry.to_version}",
            tags={TAG: entry.as_json()},
            description=f"{entry.from_version} -> {entry.to_version} by {entry.actor}: {entry.why}",
        )
    for number, entered in chain(_records(model)):
        if number == int(made.version):
            return
        if entered.previous == entry.previous:
            raise LedgerConflictError(
                f"version {entry.to_version} was not promoted: {entered.actor} promoted version "
                f"{entered.to_version} at the same time; see `python -m registry.ledger` and "
                "promote again"
            )
    raise LedgerConflictError(
        f"version {entry.to_version} was not promoted: the ledger {name} changed underneath; "
        "promote again"
    )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def name_of(model: str) -> str:
    return f"{model}.ledger"


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.ledger", "Print who made which version champion, when and why.")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    from rich.table import Table

    table = Table("time (UTC)", "by", "from", "to", "why", "verdict", "digest")
    for column in (*table.columns[:4], table.columns[-1]):
        column.no_wrap = True
    known = entries(args.model)
    for entry in known:
        cells = (entry.time[:19], entry.actor, entry.from_version or "-", entry.to_version)
        table.add_row(*cells, entry.why, entry.verdict, entry.digest[:12])
    if known:
        tables.show(table)
    else:
        print(f"the ledger of {args.model} is empty: nothing was promoted yet")
    return cli.OK


def _records(model: str) -> list[tuple[int, str]]:
    return [(int(v.version), v.tags.get(TAG, "")) for v in versions.all_of(name_of(model))]


if __name__ == "__main__":
    cli.finish(main)
