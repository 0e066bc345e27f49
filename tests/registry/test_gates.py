"""The gates as functions of values: limits, the champion's values, chance, files of gates."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from eurosat.errors import ConfigError
from eurosat.evaluation import metrics
from registry.boolean_gates import CHECKS
from registry.gates import BOOLEAN_GATES, OFF_BY_DEFAULT, DifferenceGate, Gate, load
from registry.metric_gates import PairedCounts, judge_difference, judge_metrics
from registry.verdict import GateResult, Verdict, print_summary

ACCURACY = Gate(metric="accuracy", floor=0.85, must_improve=True, why="be right more often")
F1 = Gate(metric="macro_f1", floor=0.8, margin=0.01, why="small classes count")
GATES = (ACCURACY, F1)
GOOD = {"accuracy": 0.95, "macro_f1": 0.94}
ONE_GATE = "[accuracy]\nfloor = 0.9\nwhy = 'x'\n"


def refusals(results: tuple[GateResult, ...]) -> list[str]:
    return [result.refusal for result in results if result.refusal]


@pytest.mark.parametrize(
    ("candidate", "champion", "reasons"),
    [
        (GOOD, None, []),
        ({"accuracy": 0.85, "macro_f1": 0.8}, None, []),
        (GOOD | {"accuracy": 0.84}, None, ["accuracy: 0.8400 is under the floor 0.8500"]),
        (GOOD | {"accuracy": math.nan}, None, ["accuracy: the candidate's value is nan"]),
        (GOOD | {"accuracy": math.inf}, None, ["accuracy: the candidate's value is inf"]),
        ({"accuracy": 0.95}, None, ["macro_f1: the candidate has no such metric"]),
        ({}, None, ["accuracy: the cand", "macro_f1: the cand"]),
        (GOOD, GOOD | {"accuracy": 0.94}, []),
        (GOOD, {"accuracy": 0.9499, "macro_f1": 0.9499}, []),
        (GOOD, {"accuracy": 0.94, "macro_f1": 0.951}, ["macro_f1: 0.9400 is under the champion's"]),
        (GOOD, GOOD, ["accuracy: 0.9500 is no better than the champion's 0.9500"]),
        (
            GOOD,
            GOOD | {"accuracy": 0.96},
            ["accuracy: 0.9500 is under the champion's limit 0.9600"],
        ),
        (GOOD, {"macro_f1": 0.9}, ["accuracy: the champion's value is None"]),
        (GOOD, GOOD | {"macro_f1": math.nan}, ["macro_f1: the champion's value is nan"]),
    ],
)
def test_a_verdict_gives_every_reason_against_the_candidate(
    candidate: dict[str, float], champion: dict[str, float] | None, reasons: list[str]
) -> None:
    verdict = Verdict(results=judge_metrics(candidate, champion, GATES))
    assert verdict.passed is not bool(reasons)
    assert len(verdict.refusals) == len(reasons)
    for refusal, reason in zip(verdict.refusals, reasons, strict=True):
        assert refusal.startswith(reason)
    assert [result.gate for result in verdict.results] == ["accuracy", "macro_f1"]


def test_a_missing_metric_is_refused_with_its_remedy() -> None:
    faults = {"macro_f1": "measure it again"}
    (refusal,) = refusals(judge_metrics({"accuracy": 0.95}, None, GATES, faults))
    assert refusal == "macro_f1: measure it again"
    (refusal,) = refusals(judge_metrics(GOOD, {"accuracy": 0.9}, GATES, faults))
    assert refusal == "macro_f1: measure it again"


def test_a_refusal_ends_with_the_gates_remedy() -> None:
    gates = (dataclasses.replace(ACCURACY, remedy="train longer"),)
    for accuracy, champion in ((0.8, None), (0.9, 0.91), (0.9, 0.9)):
        against = None if champion is None else {"accuracy": champion}
        (refusal,) = refusals(judge_metrics({"accuracy": accuracy}, against, gates))
        assert refusal.endswith(": train longer")


def test_one_improvement_is_enough_among_the_gates_that_must_improve() -> None:
    both = (ACCURACY, dataclasses.replace(F1, must_improve=True))
    assert refusals(judge_metrics(GOOD, GOOD | {"macro_f1": 0.93}, both)) == []
    assert len(refusals(judge_metrics(GOOD, GOOD, both))) == 2


def test_a_tie_passes_if_no_gate_must_improve() -> None:
    assert refusals(judge_metrics(GOOD, GOOD, (F1,))) == []


def test_a_verdict_without_gates_does_not_pass() -> None:
    assert not Verdict().passed


def test_less_is_better_for_a_gate_with_a_ceiling() -> None:
    ece = (Gate(metric="ece", ceiling=0.05, margin=0.01, must_improve=True, why="be believed"),)
    assert refusals(judge_metrics({"ece": 0.05}, None, ece)) == []
    (refusal,) = refusals(judge_metrics({"ece": 0.06}, None, ece))
    assert refusal == "ece: 0.0600 is over the ceiling 0.0500"
    (refusal,) = refusals(judge_metrics({"ece": 0.04}, {"ece": 0.02}, ece))
    assert (
        refusal == "ece: 0.0400 is over the champion's limit 0.0300 (0.0200 with a margin of 0.01)"
    )
    assert len(refusals(judge_metrics({"ece": 0.02}, {"ece": 0.02}, ece))) == 1, "a tie"
    assert refusals(judge_metrics({"ece": 0.01}, {"ece": 0.02}, ece)) == []


def test_an_absolute_gate_does_not_compare_with_the_champion() -> None:
    size = (Gate(metric="size_mb", ceiling=50, absolute_only=True, why="it must fit"),)
    assert refusals(judge_metrics({"size_mb": 40}, {}, size)) == []


def test_a_gate_that_is_switched_off_is_shown_and_refuses_nothing() -> None:
    gates = (ACCURACY, dataclasses.replace(F1, off="no small classes here"))
    verdict = Verdict(results=judge_metrics({"accuracy": 0.9}, None, gates))
    assert verdict.passed
    assert verdict.results[1].outcome == "off"
    assert "macro_f1 off (no small classes here)" in str(verdict)


def test_a_verdict_is_one_line() -> None:
    results = judge_metrics(GOOD, GOOD | {"accuracy": 0.9}, GATES)
    passed = Verdict(results=results, notes=("a note",))
    assert str(passed) == (
        "passed: accuracy 0.9500 (champion 0.9000); macro_f1 0.9400 (champion 0.9400); a note"
    )
    refused = Verdict(results=judge_metrics({}, None, (F1,)))
    assert str(refused) == (
        "refused: macro_f1: the candidate has no such metric: train and register it again"
    )


def test_a_refusal_says_what_the_metric_is_before_what_to_do() -> None:
    limits = {gate.metric: gate for gate in load().metrics}
    (refusal,) = refusals(judge_metrics({"ece": 0.288}, None, (limits["ece"],)))
    assert refusal.startswith(
        "ece: 0.2880 is over the ceiling 0.0800; ece is the expected calibration error: the mean "
        "gap between confidence and the share of right answers: add validation tiles"
    )
    assert all(gate.meaning for gate in limits.values())


def test_the_loss_of_recall_is_not_measured_without_a_champion() -> None:
    drop = Gate(metric="recall_drop", ceiling=0.05, absolute_only=True, why="no class may lose")
    [result] = judge_metrics({}, None, (drop,))
    assert (result.outcome, result.value) == ("not measured", "-")
    [result] = judge_metrics({"recall_drop": 0.0}, {"accuracy": 0.9}, (drop,))
    assert (result.outcome, result.value) == ("passed", "0.0000")


def test_the_summary_folds_what_passed_and_lists_what_did_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gates = (ACCURACY, F1, Gate(metric="ece", ceiling=1, off="few tiles", why="be believed"))
    print_summary(Verdict(results=judge_metrics(GOOD | {"macro_f1": 0.7}, None, gates)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "passed: 1 of 3 gates",
        "off: ece: few tiles",
        "refused: macro_f1: 0.7000 is under the floor 0.8000",
    ]


def test_a_reported_result_keeps_the_keys_of_earlier_reports() -> None:
    (result,) = judge_metrics({"accuracy": 0.9}, None, (ACCURACY,))
    assert result.as_dict() == {
        "gate": "accuracy",
        "value": "0.9000",
        "champion": "-",
        "bar": "0.8500",
        "refusal": "",
        "off": "",
        "asked": True,
        "why": "be right more often",
        "verdict": "passed",
    }


@pytest.mark.parametrize(
    ("won", "lost", "reason"),
    [
        (0, 0, ""),
        (60, 20, ""),
        (1, 0, ""),
        (20, 20, ""),
        (20, 60, "worse than the champion, 20 tiles won and 60 lost"),
        (200, 190, "5400 tiles are not enough to tell"),
    ],
)
def test_a_difference_is_told_from_chance(won: int, lost: int, reason: str) -> None:
    counts = PairedCounts(tiles=5400, only_candidate=won, only_champion=lost)
    result = judge_difference(counts, DifferenceGate())
    assert reason in result.refusal
    assert bool(reason) == bool(result.refusal)
    strict = judge_difference(counts, DifferenceGate(better=True)).refusal
    assert bool(strict) == ((won, lost) != (60, 20))
    low, high = counts.interval(0.05)
    assert low <= counts.difference <= high
    assert judge_difference(counts, DifferenceGate(off="not here")).outcome == "off"


def test_a_handful_of_tiles_rules_nothing_out() -> None:
    counts = PairedCounts(tiles=10, only_candidate=1, only_champion=0)
    assert "10 tiles are not enough to tell" in judge_difference(counts, DifferenceGate()).refusal


def test_interval_and_test_agree_with_the_library() -> None:
    labels = np.zeros(900, np.int64)
    first, second = np.tile([[0.9, 0.1]], (900, 1)), np.tile([[0.9, 0.1]], (900, 1))
    first[:20], second[10:50] = [0.1, 0.9], [0.1, 0.9]
    expected = metrics.compare(labels, first, second, ["a", "b"], resamples=4000)
    counts = PairedCounts(tiles=900, only_candidate=30, only_champion=10)
    assert (expected.only_first, expected.only_second) == (30, 10)
    assert counts.p_value == pytest.approx(expected.p_value)
    assert counts.difference == pytest.approx(expected.difference["accuracy"])
    assert counts.interval(0.05) == pytest.approx(expected.interval["accuracy"], abs=0.002)


def test_the_default_gates_are_read() -> None:
    gates = load()
    by_metric = {gate.metric: gate for gate in gates.metrics}
    assert {name: gate.floor for name, gate in by_metric.items() if gate.floor} == {
        "accuracy": 0.85,
        "macro_f1": 0.8,
        "macro_auprc": 0.85,
        "worst_recall": 0.6,
        "robustness": 0.6,
    }
    assert [gate.metric for gate in gates.metrics if gate.must_improve] == ["accuracy"]
    assert all(gate.why and gate.remedy and not gate.off for gate in gates.metrics)
    assert {gate.name for gate in gates.booleans if gate.off} == {"approval"}
    assert all(gate.why for gate in gates.booleans)
    assert [gate.name for gate in gates.booleans] == list(BOOLEAN_GATES)
    assert list(CHECKS) == list(BOOLEAN_GATES), "each has a check"


def test_a_boolean_gate_is_switched_off_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(f"{ONE_GATE}[leakage]\noff = 'the split is gone'")
    off = {gate.name: gate.off for gate in load(file).booleans}
    expected = dict.fromkeys(BOOLEAN_GATES, "") | OFF_BY_DEFAULT
    assert off == expected | {"leakage": "the split is gone"}
    file.write_text(f"{ONE_GATE}[approval]\noff = ''")
    assert not any(gate.off for gate in load(file).booleans)
    file.write_text(f"{ONE_GATE}[leakage]\nfloor = 1")
    with pytest.raises(ConfigError, match=r"unknown key leakage\.floor"):
        load(file)


def test_the_keys_of_earlier_files_of_gates_are_read(tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(
        "[accuracy]\nfloor = 0.9\nwins = true\nwhy = 'x'\n"
        "[ece]\nceiling = 0.1\nalone = true\nwhy = 'x'\n"
    )
    accuracy, ece = load(file).metrics
    assert accuracy.must_improve
    assert ece.absolute_only


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no gate"),
        ("[accuracy", "cannot be read"),
        ("accuracy = 1", "must be a table"),
        ("[a]\nfloor = 1\nwhy = 'x'\nflor = 2", "unknown key a.flor: did you mean floor"),
        ("[a]\nfloor = '1'\nwhy = 'x'", "a.floor must be float"),
        ("[a]\nwhy = 'x'", "a has 0 limits: give it either a floor or a ceiling"),
        ("[a]\nfloor = 1\nceiling = 2\nwhy = 'x'", "a has 2 limits"),
        ("[a]\nfloor = 1\nwhy = 'x'\n[difference]\nalpha = 0.5", "difference.alpha must be"),
        (
            "[a]\nfloor = 1\nwhy = 'x'\nabsolute_only = true\nmust_improve = true",
            "a has both absolute_only and must_improve",
        ),
        ("[difference]\nalpha = 0.1", "has no gate for a metric"),
        ("[latency]\nceiling = 2.0", "has no gate for a metric"),
        ("[a]\nfloor = 1\nwhy = 'x'\n[latency]\nceiling = 0.0", "latency.ceiling is a ratio"),
        ("[a]\nfloor = 1\nwhy = ' '", "a.why is empty"),
        ("[a]\nfloor = nan\nwhy = 'x'", "a.floor must be a finite number"),
        ("[a]\nfloor = 1\nmargin = -1\nwhy = 'x'", "a.margin is the tolerated loss"),
    ],
)
def test_a_faulty_file_of_gates_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=reason.replace(".", r"\.")):
        load(file)


def test_a_missing_file_of_gates_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        load(tmp_path / "none.toml")
