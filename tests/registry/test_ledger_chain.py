"""The ledger's chain as functions of values: which entries count, and where a rollback leads."""

import dataclasses

import pytest

from eurosat.errors import ConfigError
from registry import ledger


def make_entry(to: str, previous: str, actor: str = "ann") -> ledger.LedgerEntry:
    return ledger.LedgerEntry(
        time="2026-01-01T00:00:00+00:00",
        actor=actor,
        from_version=None,
        to_version=to,
        why="because",
        verdict="passed",
        previous=previous,
    )


def make_record(number: int, entry: ledger.LedgerEntry | str) -> ledger.LedgerRecord:
    text = entry if isinstance(entry, str) else entry.as_json()
    return ledger.LedgerRecord(number=number, text=text)


def linked(*records: ledger.LedgerRecord) -> list[tuple[int, ledger.LedgerEntry]]:
    return [(link.number, link.entry) for link in ledger.chain(records)]


def test_of_entries_with_one_predecessor_the_lowest_number_is_in_the_chain() -> None:
    first = make_entry("1", ledger.GENESIS)
    rival = make_entry("2", ledger.GENESIS, "bob")
    second = make_entry("3", first.digest)
    after_the_rival = make_entry("4", rival.digest)
    records = [
        make_record(4, after_the_rival),
        make_record(3, second),
        make_record(2, rival),
        make_record(1, first),
    ]
    assert linked(*records) == [(1, first), (3, second)]
    assert ledger.find_unlinked(records) == ([2], [4])


def test_an_altered_entry_breaks_the_chain_after_it() -> None:
    first = make_entry("1", ledger.GENESIS)
    second = make_entry("2", first.digest)
    altered = dataclasses.replace(first, why="because of something else")
    records = [make_record(1, altered), make_record(2, second)]
    assert linked(*records) == [(1, altered)]
    assert ledger.find_unlinked(records) == ([], [2])
    assert ledger.find_unlinked([make_record(2, second)]) == ([], [2]), "the first was deleted"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"from": null, "to": "1"}', "null"])
def test_a_record_that_is_no_entry_is_ignored_with_a_warning(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_entry("1", ledger.GENESIS)
    records = [make_record(1, text), make_record(2, first)]
    assert linked(*records) == [(2, first)]
    assert "entry 1 of the ledger is ignored" in caplog.text
    assert ledger.find_unlinked(records) == ([], [1])


def test_entries_of_the_first_ledgers_keep_their_digests() -> None:
    """They had no action, evidence or registered_by."""
    text = (
        '{"actor":"ann","from":null,"previous":"' + ledger.GENESIS + '","time":"t","to":"1",'
        '"verdict":"passed","why":"because"}'
    )
    assert ledger.parse(text).as_json() == text
    later = dataclasses.replace(ledger.parse(text), action=ledger.ROLLBACK, evidence="e")
    later = dataclasses.replace(later, registered_by="ada")
    assert ledger.parse(later.as_json()) == later
    assert later.digest != ledger.parse(text).digest


@pytest.mark.parametrize(
    ("moves", "stack"),
    [
        ([], []),
        ([("promote", "1"), ("promote", "2")], ["1", "2"]),
        ([("promote", "1"), ("promote", "2"), ("rollback", "1")], ["1"]),
        ([("promote", "1"), ("promote", "2"), ("rollback", "1"), ("promote", "3")], ["1", "3"]),
        ([("promote", "1"), ("promote", "2"), ("promote", "1")], ["1", "2", "1"]),
        ([("promote", "1"), ("promote", "2"), ("promote", "3"), ("rollback", "1")], ["1"]),
        ([("promote", "1"), ("by hand", "5"), ("by hand", "1")], ["1"]),
        ([("promote", "1"), ("by hand", None)], ["1"]),
        ([("promote", "1"), ("promote", "2"), ("rollback", "1"), ("rollback", "2")], ["1", "2"]),
    ],
)
def test_a_rollback_skips_versions_that_were_rolled_back(
    moves: list[tuple[str, str | None]], stack: list[str]
) -> None:
    entries = [
        dataclasses.replace(make_entry("0", ledger.GENESIS), action=action, to_version=to)
        for action, to in moves
    ]
    assert ledger.rollback_stack(entries) == stack


def test_an_entry_survives_its_json() -> None:
    first = make_entry("1", ledger.GENESIS)
    assert ledger.parse(first.as_json()) == first
    with pytest.raises(ConfigError, match="over the limit of 2000"):
        dataclasses.replace(first, why="x" * 2001)
