"""The judgement, as functions of values: gates, comparable test tiles, the ledger's chain."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from eurosat.errors import ConfigError
from eurosat.evaluation import metrics
from registry import evidence, ledger
from registry.evidence import Predictions, compare, figures
from registry.gates import (
    FACTS,
    USUALLY_OFF,
    Difference,
    Finding,
    Gate,
    Paired,
    Verdict,
    judge,
    judge_difference,
    load,
)
from tests.support.registry import make_predictions

ACCURACY = Gate(metric="accuracy", floor=0.85, wins=True, why="be right more often")
F1 = Gate(metric="macro_f1", floor=0.8, margin=0.01, why="small classes count")
GATES = (ACCURACY, F1)


def refusals(findings: tuple[Finding, ...]) -> list[str]:
    return [found.refusal for found in findings if found.refusal]


GOOD = {"accuracy": 0.95, "macro_f1": 0.94}


@pytest.mark.parametrize(
    ("candidate", "champion", "reasons"),
    [
        (GOOD, None, []),
        ({"accuracy": 0.85, "macro_f1": 0.8}, None, []),
        (GOOD | {"accuracy": 0.84}, None, ["accuracy: 0.8400 is under the floor 0.8500"]),
        (GOOD | {"accuracy": math.nan}, None, ["accuracy: the candidate's figure is nan"]),
        (GOOD | {"accuracy": math.inf}, None, ["accuracy: the candidate's figure is inf"]),
        ({"accuracy": 0.95}, None, ["macro_f1: the candidate has no such figure"]),
        ({}, None, ["accuracy: the cand", "macro_f1: the cand"]),
        (GOOD, GOOD | {"accuracy": 0.94}, []),
        (GOOD, {"accuracy": 0.9499, "macro_f1": 0.9499}, []),
        (GOOD, {"accuracy": 0.94, "macro_f1": 0.951}, ["macro_f1: 0.9400 is under the champion's"]),
        (GOOD, GOOD, ["accuracy: 0.9500 is no better than the champion's 0.9500"]),
        (GOOD, GOOD | {"accuracy": 0.96}, ["accuracy: 0.9500 is under the champion's bar 0.9600"]),
        (GOOD, {"macro_f1": 0.9}, ["accuracy: the champion's figure is None"]),
        (GOOD, GOOD | {"macro_f1": math.nan}, ["macro_f1: the champion's figure is nan"]),
    ],
)
def test_a_verdict_gives_every_reason_against_the_candidate(
    candidate: dict[str, float], champion: dict[str, float] | None, reasons: list[str]
) -> None:
    verdict = Verdict(findings=judge(candidate, champion, GATES))
    assert verdict.passed is not bool(reasons)
    assert len(verdict.refusals) == len(reasons)
    for refusal, reason in zip(verdict.refusals, reasons, strict=True):
        assert refusal.startswith(reason)
    assert [found.gate for found in verdict.findings] == ["accuracy", "macro_f1"]


def test_a_figure_that_is_missing_says_what_can_be_done() -> None:
    faults = {"macro_f1": "measure it again"}
    (said,) = refusals(judge({"accuracy": 0.95}, None, GATES, faults))
    assert said == "macro_f1: measure it again"
    (said,) = refusals(judge(GOOD, {"accuracy": 0.9}, GATES, faults))
    assert said == "macro_f1: measure it again"


def test_one_win_is_enough_among_the_gates_that_decide() -> None:
    both = (ACCURACY, dataclasses.replace(F1, wins=True))
    assert refusals(judge(GOOD, GOOD | {"macro_f1": 0.93}, both)) == []
    assert len(refusals(judge(GOOD, GOOD, both))) == 2


def test_a_tie_passes_where_no_gate_has_to_be_won() -> None:
    assert refusals(judge(GOOD, GOOD, (F1,))) == []


def test_nothing_is_promoted_by_no_gates() -> None:
    assert not Verdict().passed


def test_less_is_better_where_there_is_a_ceiling() -> None:
    ece = (Gate(metric="ece", ceiling=0.05, margin=0.01, wins=True, why="be believed"),)
    assert refusals(judge({"ece": 0.05}, None, ece)) == []
    (said,) = refusals(judge({"ece": 0.06}, None, ece))
    assert said == "ece: 0.0600 is over the ceiling 0.0500"
    (said,) = refusals(judge({"ece": 0.04}, {"ece": 0.02}, ece))
    assert said == "ece: 0.0400 is over the champion's bar 0.0300 (0.0200 with a margin of 0.01)"
    assert len(refusals(judge({"ece": 0.02}, {"ece": 0.02}, ece))) == 1, "a tie"
    assert refusals(judge({"ece": 0.01}, {"ece": 0.02}, ece)) == []


def test_a_bound_that_stands_alone_asks_for_no_champion() -> None:
    size = (Gate(metric="size_mb", ceiling=50, alone=True, why="it must fit"),)
    assert refusals(judge({"size_mb": 40}, {}, size)) == []


def test_a_gate_that_is_switched_off_is_shown_and_refuses_nothing() -> None:
    gates = (ACCURACY, dataclasses.replace(F1, off="no small classes here"))
    verdict = Verdict(findings=judge({"accuracy": 0.9}, None, gates))
    assert verdict.passed
    assert verdict.findings[1].verdict == "off"
    assert "macro_f1 off (no small classes here)" in str(verdict)


def test_a_verdict_is_one_line() -> None:
    passed = Verdict(findings=judge(GOOD, GOOD | {"accuracy": 0.9}, GATES), notes=("a note",))
    assert str(passed) == (
        "passed: accuracy 0.9500 (champion 0.9000); macro_f1 0.9400 (champion 0.9400); a note"
    )
    refused = Verdict(findings=judge({}, None, (F1,)))
    assert str(refused) == "refused: macro_f1: the candidate has no such figure"


@pytest.mark.parametrize(
    ("won", "lost", "said"),
    [
        (0, 0, ""),
        (60, 20, ""),
        (1, 0, ""),
        (20, 20, ""),
        (20, 60, "worse than the champion, 20 tiles won and 60 lost"),
        (200, 190, "5400 tiles are not enough to tell"),
    ],
)
def test_a_difference_is_told_from_chance(won: int, lost: int, said: str) -> None:
    paired = Paired(tiles=5400, only_candidate=won, only_champion=lost)
    found = judge_difference(paired, Difference())
    assert said in found.refusal
    assert bool(said) == bool(found.refusal)
    strict = judge_difference(paired, Difference(better=True)).refusal
    assert bool(strict) == ((won, lost) != (60, 20))
    low, high = paired.interval(0.05)
    assert low <= paired.difference <= high
    assert judge_difference(paired, Difference(off="not here")).verdict == "off"


def test_a_handful_of_tiles_rules_nothing_out() -> None:
    few = judge_difference(Paired(tiles=10, only_candidate=1, only_champion=0), Difference())
    assert "10 tiles are not enough to tell" in few.refusal


def test_the_interval_and_the_test_are_those_of_the_library() -> None:
    labels = np.zeros(900, np.int64)
    one, other = np.tile([[0.9, 0.1]], (900, 1)), np.tile([[0.9, 0.1]], (900, 1))
    one[:20], other[10:50] = [0.1, 0.9], [0.1, 0.9]
    held = metrics.compare(labels, one, other, ["a", "b"], resamples=4000)
    paired = Paired(tiles=900, only_candidate=30, only_champion=10)
    assert (held.only_first, held.only_second) == (30, 10)
    assert paired.p_value == pytest.approx(held.p_value)
    assert paired.difference == pytest.approx(held.difference["accuracy"])
    assert paired.interval(0.05) == pytest.approx(held.interval["accuracy"], abs=0.002)


def test_the_gates_of_the_house_are_read() -> None:
    house = load()
    bars = {gate.metric: gate for gate in house.figures}
    assert {name: gate.floor for name, gate in bars.items() if gate.floor} == {
        "accuracy": 0.85,
        "macro_f1": 0.8,
        "macro_auprc": 0.85,
        "worst_recall": 0.6,
        "robustness": 0.6,
    }
    assert [gate.metric for gate in bars.values() if gate.wins] == ["accuracy"]
    assert all(gate.why and not gate.off for gate in house.figures)
    assert {fact.name for fact in house.facts if fact.off} == {"approval"}
    assert all(fact.why for fact in house.facts)
    assert [fact.name for fact in house.facts] == list(FACTS)


def test_a_fact_is_switched_off_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    file.write_text("[accuracy]\nfloor = 0.9\nwhy = 'x'\n[leakage]\noff = 'the split is gone'")
    facts = {fact.name: fact.off for fact in load(file).facts}
    assert facts == dict.fromkeys(FACTS, "") | USUALLY_OFF | {"leakage": "the split is gone"}
    file.write_text("[accuracy]\nfloor = 0.9\nwhy = 'x'\n[approval]\noff = ''")
    assert not any(fact.off for fact in load(file).facts)
    file.write_text("[accuracy]\nfloor = 0.9\nwhy = 'x'\n[leakage]\nfloor = 1")
    with pytest.raises(ConfigError, match=r"unknown key leakage\.floor"):
        load(file)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no gate"),
        ("[accuracy", "cannot be read"),
        ("accuracy = 1", "must be a table"),
        ("[a]\nfloor = 1\nwhy = 'x'\nflor = 2", "unknown key a.flor: did you mean floor"),
        ("[a]\nfloor = '1'\nwhy = 'x'", "a.floor must be float"),
        ("[a]\nwhy = 'x'", "a has 0 bounds: give it a floor or a ceiling"),
        ("[a]\nfloor = 1\nceiling = 2\nwhy = 'x'", "a has 2 bounds"),
        ("[a]\nfloor = 1\nwhy = 'x'\n[difference]\nalpha = 0.5", "difference.alpha must be"),
        ("[a]\nfloor = 1\nwhy = 'x'\nalone = true\nwins = true", "a is judged alone"),
        ("[difference]\nalpha = 0.1", "holds no gate for a figure"),
        ("[latency]\nceiling = 2.0", "holds no gate for a figure"),
        ("[a]\nfloor = 1\nwhy = 'x'\n[latency]\nceiling = 0.0", "latency.ceiling is a ratio"),
        ("[a]\nfloor = 1\nwhy = ' '", "a.why is empty"),
        ("[a]\nfloor = nan\nwhy = 'x'", "a.floor must be a finite number"),
        ("[a]\nfloor = 1\nmargin = -1\nwhy = 'x'", "a.margin is a loss"),
    ],
)
def test_gates_that_are_none_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=reason.replace(".", r"\.")):
        load(file)


def test_a_missing_file_of_gates_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        load(tmp_path / "none.toml")


def fold(tiles: range, wrong: int = 0) -> Predictions:
    return Predictions(frame=make_predictions(tiles, wrong))


def test_figures_are_those_of_the_library() -> None:
    found = figures(fold(range(600), wrong=30))
    assert found["accuracy"] == pytest.approx(0.95)
    assert set(found) >= {"macro_f1", "macro_auprc", "nll", "ece", "f1/Forest"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.5])
def test_probabilities_that_are_none_give_no_figures(value: float) -> None:
    predictions = fold(range(600))
    predictions.frame.loc[3, "p/River"] = value
    assert figures(predictions) == {}


def test_the_first_candidate_is_judged_by_the_floors() -> None:
    compared = compare(fold(range(100)), None)
    assert compared.champion is None
    assert not compared.refusal
    assert compared.notes


def test_equal_test_folds_compare_in_any_order_and_with_duplicates() -> None:
    tiles = fold(range(100), wrong=10)
    doubled = Predictions(frame=tiles.frame.iloc[[*range(100), 0, 1]])
    shuffled = Predictions(frame=doubled.frame.sample(frac=1, random_state=0))
    compared = compare(doubled, shuffled)
    assert compared.champion is not None
    assert compared.candidate == pytest.approx({**compared.champion, "recall_drop": 0})
    assert compared.candidate == pytest.approx(figures(doubled) | {"recall_drop": 0})
    assert not compared.notes


@pytest.mark.parametrize(
    ("mine", "theirs", "common"),
    [(range(1000), range(400, 1400), 600), (range(100), range(5, 100), 95)],
)
def test_folds_that_overlap_compare_on_the_common_tiles(
    mine: range, theirs: range, common: int
) -> None:
    compared = compare(fold(mine, wrong=2), fold(theirs, wrong=0))
    assert compared.notes == (f"compared on the {common} test tiles in common",)
    assert compared.champion is not None
    assert compared.champion["accuracy"] == 1
    wrong_in_common = len({*mine[:2]} & {*theirs})
    assert compared.candidate["accuracy"] == pytest.approx(1 - wrong_in_common / common)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (range(1000, 2000), "the test tiles are others than the champion's"),
        (range(800, 1800), "only 200 of 1000 test tiles are the champion's too"),
    ],
)
def test_folds_that_do_not_overlap_enough_do_not_compare(theirs: range, reason: str) -> None:
    compared = compare(fold(range(1000)), fold(theirs))
    assert compared.refusal.startswith(reason)
    assert "--accept-new-data" in compared.refusal
    accepted = compare(fold(range(1000)), fold(theirs), accept_new_data=True)
    assert not accepted.refusal
    assert accepted.champion is None
    assert accepted.notes[0].startswith(reason)


def test_a_tile_that_got_another_label_is_another_test_tile() -> None:
    relabelled = fold(range(1000))
    relabelled.frame["label"] = relabelled.frame["label"].map(
        {"Forest": "River", "River": "Forest", "SeaLake": "SeaLake"}
    )
    assert compare(relabelled, fold(range(1000))).refusal
    assert evidence.ENOUGH_TILES == 500


def entry(to: str, previous: str, actor: str = "ann") -> ledger.Entry:
    return ledger.Entry(
        time="2026-01-01T00:00:00+00:00",
        actor=actor,
        from_version=None,
        to_version=to,
        why="because",
        verdict="passed",
        previous=previous,
    )


def record(number: int, one: ledger.Entry | str, *, settled: bool = False) -> ledger.Record:
    text = one if isinstance(one, str) else one.as_json()
    return ledger.Record(number=number, text=text, settled=settled)


def links(*records: ledger.Record) -> list[tuple[int, ledger.Entry]]:
    return [(link.number, link.entry) for link in ledger.chain(records)]


def test_the_first_entry_with_a_predecessor_is_the_one_in_the_chain() -> None:
    first = entry("1", ledger.GENESIS)
    rival = entry("2", ledger.GENESIS, "bob")
    second = entry("3", first.digest)
    after_the_rival = entry("4", rival.digest)
    records = [
        record(4, after_the_rival),
        record(3, second),
        record(2, rival),
        record(1, first),
    ]
    assert links(*records) == [(1, first), (3, second)]
    assert ledger.outside(records) == ([2], [4])


def test_an_entry_that_was_altered_breaks_the_chain_after_it() -> None:
    first = entry("1", ledger.GENESIS)
    second = entry("2", first.digest)
    altered = dataclasses.replace(first, why="because of something else")
    records = [record(1, altered), record(2, second)]
    assert links(*records) == [(1, altered)]
    assert ledger.outside(records) == ([], [2])
    assert ledger.outside([record(2, second)]) == ([], [2]), "the first was taken out"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"from": null, "to": "1"}', "null"])
def test_what_is_no_entry_is_left_out_and_said(text: str, caplog: pytest.LogCaptureFixture) -> None:
    first = entry("1", ledger.GENESIS)
    records = [record(1, text), record(2, first)]
    assert links(*records) == [(2, first)]
    assert "entry 1 of the ledger is left out" in caplog.text
    assert ledger.outside(records) == ([], [1])


def test_entries_of_the_first_ledgers_keep_their_digests() -> None:
    """They had neither action nor evidence."""
    text = (
        '{"actor":"ann","from":null,"previous":"' + ledger.GENESIS + '","time":"t","to":"1",'
        '"verdict":"passed","why":"because"}'
    )
    assert ledger.parse(text).as_json() == text
    told = dataclasses.replace(ledger.parse(text), action=ledger.ROLLBACK, evidence="e")
    assert ledger.parse(told.as_json()) == told
    assert told.digest != ledger.parse(text).digest


@pytest.mark.parametrize(
    ("moves", "held"),
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
def test_a_rollback_goes_back_through_those_who_were_not_rolled_away(
    moves: list[tuple[str, str | None]], held: list[str]
) -> None:
    entries = [
        dataclasses.replace(entry("0", ledger.GENESIS), action=action, to_version=to)
        for action, to in moves
    ]
    assert ledger.reigns(entries) == held


def test_an_entry_survives_its_json() -> None:
    first = entry("1", ledger.GENESIS)
    assert ledger.parse(first.as_json()) == first
    with pytest.raises(ConfigError, match="over the limit of 2000"):
        dataclasses.replace(first, why="x" * 2001)


def test_tiles_that_one_has_learned_from_are_left_out_of_the_comparison() -> None:
    mine, theirs = fold(range(1000), wrong=100), fold(range(1000), wrong=0)
    known = set(mine.frame["sha256"][:100])
    compared = compare(mine, theirs, known)
    assert compared.candidate["accuracy"] == 1
    assert compared.paired is not None
    assert compared.paired.tiles == 900
    assert compare(mine, theirs, set(mine.frame["sha256"][:600])).refusal


def test_the_class_that_lost_most_is_told() -> None:
    mine, theirs = fold(range(600), wrong=0), fold(range(600), wrong=0)
    rivers = mine.frame.index[mine.frame["label"] == "River"][:50]
    mine.frame.loc[rivers, ["p/River", "p/Forest"]] = [0.1, 0.8]
    compared = compare(mine, theirs)
    assert compared.candidate["recall_drop"] == pytest.approx(0.25)
    assert compared.candidate["worst_recall"] == pytest.approx(0.75)
