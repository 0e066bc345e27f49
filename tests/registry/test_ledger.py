"""Aliases follow the ledger: after rollbacks, kills, moves by hand and altered entries."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from eurosat.errors import EuroSATError, TrackingError
from registry import history, ledger, rollback, show, versions
from registry.reconcile import reconcile
from tests.support.registry import (
    REGISTRY,
    aliases,
    ledger_moves,
    move_champion_by_hand,
    register_challenger,
    run_promote,
    run_rollback,
)

pytestmark = REGISTRY
WRITES = (
    "create_model_version",
    "set_model_version_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
)
"""Calls by which promotion and rollback change the registry."""


class Killed(BaseException):
    """Stands for a killed process: nothing after it is done."""


@pytest.fixture
def champions(store: Path, model: str) -> list[str]:
    """Promote two versions, one after the other, and return their numbers."""
    numbers = []
    for wrong in (30, 20):
        numbers.append(register_challenger(store, model, wrong))
        assert run_promote(model) == 0
    return numbers


def test_a_rollback_goes_back_and_later_ones_skip_the_version_that_was_rolled_back(
    store: Path, model: str, champions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = champions
    assert run_rollback(model, "--why", "it lost the rivers", "--by", "ann") == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line == f"{model} version {first} is the champion (version {second} before)"
    assert aliases(model) == {"champion": first}
    last = ledger.entries(model)[-1]
    assert (last.action, last.actor, last.why) == ("rollback", "ann", "it lost the rivers")

    third = register_challenger(store, model, wrong=10)
    assert run_promote(model) == 0
    assert aliases(model) == {"champion": third, "previous": first}
    assert run_rollback(model, "--why", "again") == 0
    assert aliases(model) == {"champion": first}
    assert run_rollback(model, "--why", "the second was right", "--to", second) == 0
    assert aliases(model) == {"champion": second, "previous": first}
    assert history.main(["--model", model, "--verify"]) == 0
    assert "5 entries link up" not in capsys.readouterr().out
    assert len(ledger_moves(model)) == 6


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--to", "2"], "is the champion now"),
        (["--to", "99"], "never was champion (1, 2 were)"),
        (["--to", "seven"], "never was champion"),
    ],
)
@pytest.mark.usefixtures("champions")
def test_an_impossible_rollback_is_refused(
    model: str, arguments: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_rollback(model, "--why", "no", *arguments) == 2
    assert reason in capfd.readouterr().err
    assert len(ledger_moves(model)) == 2


def test_a_rollback_needs_an_earlier_champion(
    store: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    register_challenger(store, model, wrong=30)
    assert run_promote(model) == 0
    assert run_rollback(model, "--why", "no") == 2
    assert "has no earlier champion" in capfd.readouterr().err


def test_after_a_move_by_hand_the_error_names_the_version_to_go_back_to(
    store: Path, model: str, champions: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = champions
    move_champion_by_hand(model, first)
    assert run_rollback(model, "--why", "no") == 2
    assert f"version {second} has been champion: give --to {second}" in capfd.readouterr().err
    assert run_rollback(model, "--why", "back", "--to", second) == 0
    assert aliases(model)["champion"] == second


def kill_at(monkeypatch: pytest.MonkeyPatch, nth: int, *, after: bool) -> list[str]:
    """Raise Killed at the n-th change of the registry, before or ``after`` it is made."""
    begun: list[str] = []

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            begun.append(name)
            if len(begun) == nth and not after:
                raise Killed
            result = real(*args, **kwargs)
            if len(begun) == nth:
                raise Killed
            return result

        return change

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, dying(name, getattr(MlflowClient, name)))
    return begun


@pytest.mark.parametrize(
    ("command", "after"),
    [
        ("promote", False),
        ("rollback", True),
        pytest.param("promote", True, marks=pytest.mark.slow),
        pytest.param("rollback", False, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_point_the_next_command_completes_it(
    store: Path, model: str, champions: list[str], command: str, after: bool
) -> None:
    """An entry that was written counts; without one, nothing has changed."""
    points = 0
    for nth in range(1, 20):
        if command == "promote":
            register_challenger(store, model, wrong=19 - nth)
        elif len(ledger.rollback_stack(ledger.entries(model))) < 2:
            register_challenger(store, model, wrong=19 - nth)
            assert run_promote(model) == 0
        entered = len(ledger_moves(model))
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
            begun = kill_at(patch, nth, after=after)
            arguments = ["--model", model, "--why", f"killed at {nth}"]
            commands = {"promote": run_promote, "rollback": run_rollback}
            try:
                commands[command](model, *arguments[2:])
            except Killed:
                points += 1
        state = reconcile(model)
        entries = ledger.entries(model)
        assert len(entries) <= entered + 1
        assert all(entry.action != ledger.BY_HAND for entry in entries), (
            f"{command} killed at {nth}"
        )
        assert state.champion is not None
        assert str(state.champion.version) == entries[-1].to_version
        current, stack = aliases(model), ledger.rollback_stack(entries)
        assert current["champion"] == stack[-1]
        assert current.get("previous") == (stack[-2] if stack[1:] else None)
        assert current.get("challenger") != current["champion"]
        assert history.verify(model) == []
        if len(begun) < nth:
            break
    assert points >= 4, "the test killed nothing"
    assert len(begun) < nth, "it was killed at every point"


def test_a_champion_that_was_set_by_hand_is_recorded(
    store: Path, model: str, champions: list[str]
) -> None:
    first, second = champions
    other = register_challenger(store, model, wrong=25)
    move_champion_by_hand(model, other)
    assert history.main(["--model", model, "--verify"]) == 1
    assert len(ledger_moves(model)) == 2, "--verify changes nothing"
    state = reconcile(model)
    assert ledger_moves(model)[-1] == ("by hand", second, other)
    assert ledger.entries(model)[-1].actor == "unknown"
    assert state.rollback_stack == (first, second, other)
    assert aliases(model) == {"champion": other, "previous": second}
    assert run_rollback(model, "--why", "not judged") == 0
    assert aliases(model) == {"champion": second, "previous": first}

    MlflowClient().delete_registered_model_alias(model, versions.CHAMPION)
    assert reconcile(model).champion is None
    assert ledger_moves(model)[-1] == ("by hand", second, None)
    assert run_rollback(model, "--why", "there must be one") == 0
    assert aliases(model) == {"champion": second, "previous": first}
    assert history.main(["--model", model, "--verify"]) == 0


def test_without_a_champion_candidates_are_compared_with_the_last_one(
    store: Path, model: str, champions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    MlflowClient().delete_registered_model_alias(model, versions.CHAMPION)
    register_challenger(store, model, wrong=60)
    capsys.readouterr()
    assert run_promote(model) == 1
    assert "under the champion's limit 0.9667" in capsys.readouterr().out


def test_an_entry_that_was_sent_twice_counts_once(
    store: Path, model: str, champions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client repeats a request whose answer was lost."""
    real = MlflowClient.create_model_version

    def twice(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        real(self, *args, **kwargs)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", twice)
    assert run_rollback(model, "--why", "once") == 0
    assert [action for action, _, _ in ledger_moves(model)] == ["promote", "promote", "rollback"]
    assert history.verify(model) == []


def test_a_ledger_may_begin_with_a_champion_that_was_set_by_hand(store: Path, model: str) -> None:
    number = register_challenger(store, model, wrong=30)
    move_champion_by_hand(model, number)
    state = reconcile(model)
    assert state.rollback_stack == (number,)
    assert ledger_moves(model) == [("by hand", None, number)]
    assert aliases(model) == {"champion": number}, "it is no challenger now"


def test_rollbacks_skip_deleted_versions(
    store: Path, model: str, champions: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = champions
    third = register_challenger(store, model, wrong=10)
    assert run_promote(model) == 0
    MlflowClient().delete_model_version(model, second)
    assert run_rollback(model, "--why", "the second is gone", "--to", second) == 2
    assert f"models:/{model}/{second}" in capfd.readouterr().err
    assert run_rollback(model, "--why", "the second is gone") == 0
    assert aliases(model) == {"champion": first}
    assert ledger_moves(model)[-1] == ("rollback", third, first)
    MlflowClient().delete_model_version(model, first)
    assert reconcile(model).champion is None
    assert ledger_moves(model)[-1] == ("by hand", first, None)


def test_of_two_rollbacks_at_once_one_succeeds(
    store: Path, model: str, champions: list[str]
) -> None:
    before = reconcile(model)
    barrier = threading.Barrier(2)
    errors: list[str] = []

    def roll_back(name: str) -> None:
        barrier.wait(30)
        try:
            rollback.rollback(model, champions[0], before, "both at once", name)
            errors.append("")
        except TrackingError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=roll_back, args=(name,)) for name in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won, lost = sorted(errors)
    assert won == ""
    assert "at the same time" in lost
    assert aliases(model) == {"champion": champions[0]}
    assert len(ledger_moves(model)) == 3


def test_an_alias_that_a_command_sets_late_is_not_recorded_as_moved_by_hand(
    store: Path, model: str, champions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promotion is delayed just before its alias, while a rollback follows its entry."""
    third = register_challenger(store, model, wrong=10)
    real = MlflowClient.set_registered_model_alias
    overtaken = False

    def late(self: MlflowClient, name: str, alias: str, version: str) -> None:
        nonlocal overtaken
        if alias == versions.CHAMPION and version == third and not overtaken:
            overtaken = True
            reconcile(model)
            rollback.main(["--model", model, "--why", "meanwhile"])
        real(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", late)
    assert run_promote(model) == 0
    assert overtaken
    assert [action for action, _, _ in ledger_moves(model)] == ["promote"] * 3 + ["rollback"]
    assert aliases(model) == {"champion": champions[1], "previous": champions[0]}
    assert history.verify(model) == []


@pytest.mark.parametrize("applied", [True, False])
def test_an_alias_that_is_moved_during_reconciliation_is_not_moved_back(
    store: Path, model: str, champions: list[str], monkeypatch: pytest.MonkeyPatch, *, applied: bool
) -> None:
    third = register_challenger(store, model, wrong=25)
    if not applied:
        name, last = ledger.ledger_name(model), ledger.records(model)[-1].number
        MlflowClient().delete_model_version_tag(name, str(last), ledger.APPLIED_TAG)
    real, reads = versions.by_alias, 0

    def then_moved(model: str, alias: str) -> Any:
        nonlocal reads
        version = real(model, alias)
        reads += alias == versions.CHAMPION
        if reads == 1:
            move_champion_by_hand(model, third)
        return version

    monkeypatch.setattr(versions, "by_alias", then_moved)
    assert reconcile(model).champion_number == third
    assert reads > 1
    assert ledger_moves(model)[-1] == ("by hand", champions[1], third)
    assert aliases(model) == {"champion": third, "previous": champions[1]}


def test_an_alias_that_is_moved_before_it_is_set_is_not_moved_back(
    store: Path, model: str, champions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody moves it after a command has written its entry."""
    third = register_challenger(store, model, wrong=25)
    real = ledger.append

    def then_moved(model: str, entry: ledger.LedgerEntry) -> None:
        real(model, entry)
        monkeypatch.setattr(ledger, "append", real)
        move_champion_by_hand(model, third)

    monkeypatch.setattr(ledger, "append", then_moved)
    assert run_rollback(model, "--why", "not judged") == 0
    first, second = champions
    assert ledger_moves(model)[-2:] == [("rollback", second, first), ("by hand", first, third)]
    assert aliases(model) == {"champion": third, "previous": first}


def test_verification_finds_an_altered_entry(
    model: str, champions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert history.main(["--model", model, "--verify"]) == 0
    record = ledger.records(model)[0]
    altered = record.text.replace('"why":"', '"why":"well, ')
    assert altered != record.text
    MlflowClient().set_model_version_tag(ledger.ledger_name(model), "1", ledger.ENTRY_TAG, altered)
    assert history.main(["--model", model, "--verify"]) == 1
    assert "wrong: record 2 links to no entry" in capsys.readouterr().out


def test_a_version_is_shown_with_its_history(
    model: str, champions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.main([champions[0], "--model", model]) == 0
    printed = capsys.readouterr().out
    assert "previous" in printed
    assert "data_validation passed" in " ".join(printed.replace("│", " ").split())
    with pytest.raises(EuroSATError, match="whole number"):
        show.main(["x", "--model", model])
