"""Promotions on a real SQLite store: a first champion, refusals, a better one, two at once."""

import threading
from pathlib import Path

import pytest

from eurosat.errors import TrackingError
from registry import (
    gates,
    history,
    judge,
    ledger,
    promote,
    reconcile,
    register,
    show,
    versions,
)
from tests.support.registry import REGISTRY, aliases, register_challenger, run_promote

pytestmark = REGISTRY


def test_a_better_version_replaces_the_champion_and_others_are_refused(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = register_challenger(store, model, wrong=30)
    assert aliases(model) == {"challenger": first}
    assert run_promote(model, "--why", "the first") == 0
    printed = capsys.readouterr().out
    assert "there is no champion yet: only the fixed limits apply" in printed
    assert printed.splitlines()[-1] == f"{model} version {first} is the champion (none before)"
    assert aliases(model) == {"champion": first}

    assert run_promote(model, first) == 0
    assert "is the champion already" in capsys.readouterr().out

    worse = register_challenger(store, model, wrong=60)
    assert run_promote(model) == 1
    printed = capsys.readouterr().out
    assert "refused: accuracy: 0.9000 is under the champion's limit 0.9500" in printed
    assert aliases(model) == {"champion": first, "challenger": worse}
    assert versions.get(model, worse).tags["verdict"].startswith("refused: accuracy: 0.9000")

    equal = register_challenger(store, model, wrong=30)
    assert run_promote(model, equal) == 1
    assert "no better than the champion" in capsys.readouterr().out

    better = register_challenger(store, model, wrong=20)
    assert run_promote(model, "--why", "a longer schedule") == 0
    assert f"version {first} before" in capsys.readouterr().out
    assert aliases(model) == {"champion": better, "previous": first}
    assert versions.get(model, better).tags["verdict"].startswith("passed: ")

    entries = ledger.entries(model)
    assert [(entry.from_version, entry.to_version, entry.why) for entry in entries] == [
        (None, first, "the first"),
        (first, better, "a longer schedule"),
    ]
    assert entries[1].previous == entries[0].digest
    assert entries[0].verdict.startswith("passed: data_validation passed; leakage 0; lineage c")
    assert "; accuracy 0.9667 (champion 0.9500); " in entries[1].verdict
    assert entries[0].evidence != entries[1].evidence

    assert history.main(["--model", model, "--verify"]) == 0
    printed = capsys.readouterr().out
    assert f"2 entries link up from the first to {entries[1].digest[:12]}" in printed
    assert "a longer schedule" in printed
    assert len(printed.splitlines()) == 7, "a table of a line per entry, and the verification"

    assert history.main(["--model", model, "--full"]) == 0
    printed = capsys.readouterr().out
    assert f"verdict: {entries[1].verdict}\ndigest: {entries[1].digest}" in printed

    assert show.main(["champion", "--model", model]) == 0
    printed = capsys.readouterr().out
    assert "d" * 64 not in printed
    assert "d" * 12 in printed
    assert ".onnx" not in printed, "the number of files, not their digests"
    assert show.main([better, "--model", model, "--full"]) == 0
    assert ".onnx" in capsys.readouterr().out


def test_data_that_failed_validation_is_refused(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    register_challenger(store, model, wrong=0, validation="failed")
    assert run_promote(model) == 1
    printed = capsys.readouterr().out
    assert "refused: data_validation: failed, where 'passed' is needed" in printed
    assert ledger.entries(model) == []
    assert history.main(["--model", model]) == 0
    assert "nothing was promoted yet" in capsys.readouterr().out


def test_accepted_new_data_is_judged_by_the_fixed_limits(
    store: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    register_challenger(store, model, wrong=0)
    assert run_promote(model) == 0
    newer = register_challenger(store, model, wrong=30, tiles=range(10_000, 10_600))
    capsys.readouterr()
    assert run_promote(model) == 1
    assert "--accept-new-data" in capsys.readouterr().out
    assert run_promote(model, "--accept-new-data") == 0
    assert "which was accepted: only the fixed limits apply" in capsys.readouterr().out
    assert aliases(model)["champion"] == newer
    assert "was accepted" in ledger.entries(model)[-1].verdict


def test_another_file_of_gates_can_be_given(store: Path, model: str, tmp_path: Path) -> None:
    strict = tmp_path / "gates.toml"
    strict.write_text("[accuracy]\nfloor = 0.99\nwhy = 'strict'\n")
    register_challenger(store, model, wrong=30)
    assert run_promote(model, "--gates", str(strict)) == 1
    assert run_promote(model) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "has no challenger"),
        ([""], "has no challenger"),
        (["seven"], "VERSION must be a whole number"),
        (["7"], "models:/nothing/7"),
        (["champion"], "nothing has no champion"),
        (["--gates", "none.toml"], "none.toml cannot be read"),
        (["--why", "x" * 2001], "over 2000"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_promote("nothing", *arguments) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert reason in errors[0]


def test_of_two_promoters_at_once_exactly_one_wins(store: Path, model: str) -> None:
    champion = register_challenger(store, model, wrong=30)
    assert run_promote(model) == 0
    rivals = [register_challenger(store, model, wrong=wrong) for wrong in (20, 10, 5)]
    before = reconcile.reconcile(model)
    barrier = threading.Barrier(len(rivals))
    outcomes: dict[str, str] = {}

    def try_to_promote(number: str) -> None:
        candidate = versions.get(model, number)
        verdict = judge.judge_version(candidate, before.champion, gates.load())
        barrier.wait()
        try:
            promote.promote(model, candidate, before, verdict, f"rival {number}", number)
            outcomes[number] = ""
        except TrackingError as error:
            outcomes[number] = str(error)

    threads = [threading.Thread(target=try_to_promote, args=(number,)) for number in rivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number in rivals if outcomes[number] == ""]
    assert len(winners) == 1
    for number in rivals:
        if number not in winners:
            assert f"promote of version {number} was not entered" in outcomes[number]
            assert f"entered promote of version {winners[0]}" in outcomes[number]
    current = aliases(model)
    assert (current["champion"], current["previous"]) == (winners[0], champion)
    assert [entry.to_version for entry in ledger.entries(model)] == [champion, winners[0]]


def test_registering_the_champion_again_leaves_the_challenger_alone(
    store: Path, model: str
) -> None:
    first = register_challenger(store, model, wrong=30)
    assert run_promote(model) == 0
    second = register_challenger(store, model, wrong=20)
    run_id = versions.run_of(versions.get(model, first))
    assert register.register(run_id, model, "challenger") == first
    assert aliases(model) == {"champion": first, "challenger": second}


def test_a_version_without_a_run_cannot_be_judged(
    store: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    number = register_challenger(store, model, wrong=30)
    source = versions.get(model, number).source
    bare = str(versions.client().create_model_version(model, str(source)).version)
    assert run_promote(model, bare) == 2
    assert "names no run" in capfd.readouterr().err
