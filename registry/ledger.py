"""The ledger: an append-only chain in MLflow of who made which version champion, when and why.

Each entry is a version of the registered model ``<model>.ledger``. MLflow gives each version number
once, also to concurrent writers. Of two entries with the same predecessor, the one with the lower
number is in the chain and the other is not: this is a compare-and-swap, which MLflow's aliases
lack. The aliases follow the ledger: see `registry.reconcile`.
"""

from datetime import UTC, datetime

from eurosat import tracking
from eurosat.runtime.templates import markdown_text
from eurosat.tracking.ledger_chain import (
    BY_HAND,
    ENTRY_TAG,
    GENESIS,
    MAX_WHY,
    PROMOTE,
    ROLLBACK,
    ChainLink,
    LedgerConflictError,
    LedgerEntry,
    LedgerRecord,
    chain,
    find_unlinked,
    ledger_name,
    manifest_digest,
    parse,
    rollback_stack,
)
from registry import versions

__all__ = [
    "APPLIED_TAG",
    "BY_HAND",
    "ENTRY_TAG",
    "GENESIS",
    "MAX_WHY",
    "PROMOTE",
    "ROLLBACK",
    "ChainLink",
    "LedgerConflictError",
    "LedgerEntry",
    "LedgerRecord",
    "append",
    "chain",
    "entries",
    "find_unlinked",
    "ledger_name",
    "manifest_digest",
    "mark_applied",
    "now",
    "parse",
    "records",
    "rollback_stack",
]

APPLIED_TAG = "ledger.settled"
"""Tag of an entry whose aliases have been set; if they differ later, somebody moved them."""


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
            description=markdown_text(
                f"{entry.action}: {entry.from_version} -> {entry.to_version} "
                f"by {entry.actor}: {entry.why}"
            ),
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
