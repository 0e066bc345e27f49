"""Aliases follow the ledger: rolled back, killed at every point, moved by hand, tampered with."""

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
    challenge,
    moves,
    point,
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
"""What promotion and rollback change the registry by."""


class Killed(BaseException):
    """As a process that is killed: nothing after it is done."""


@pytest.fixture
def champions(store: Path, model: str) -> list[str]:
    """Two versions that were promoted, one after the other."""
    numbers = []
    for wrong in (30, 20):
        numbers.append(challenge(store, model, wrong))
        assert run_promote(model) == 0
    return numbers


def test_a_rollback_gives_the_place_back_and_does_not_return_to_who_was_rolled_away(
    store: Path, model: str, champions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = champions
    assert run_rollback(model, "--why", "it lost the rivers", "--by", "ann") == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"{model} version {first} is the champion (version {second} before)"
    assert aliases(model) == {"champion": first}
    last = ledger.entries(model)[-1]
    assert (last.action, last.actor, last.why) == ("rollback", "ann", "it lost the rivers")

    third = challenge(store, model, wrong=10)
    assert run_promote(model) == 0
    assert aliases(model) == {"champion": third, "previous": first}
    assert run_rollback(model, "--why", "again") == 0
    assert aliases(model) == {"champion": first}
    assert run_rollback(model, "--why", "the second was right", "--to", second) == 0
    assert aliases(model) == {"champion": second, "previous": first}
    assert history.main(["--model", model, "--verify"]) == 0
    assert "5 entries link up" not in capsys.readouterr().out
    assert len(moves(model)) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "2"], "is the champion now"),
        (["--to", "99"], "never was champion (1, 2 were)"),
        (["--to", "seven"], "never was champion"),
    ],
)
@pytest.mark.usefixtures("champions")
def test_a_rollback_that_cannot_be_is_refused(
    model: str, arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_rollback(model, "--why", "no", *arguments) == 2
    assert said in capfd.readouterr().err
    assert len(moves(model)) == 2


def test_there_must_be_a_champion_to_go_back_to(
    store: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    challenge(store, model, wrong=30)
    assert run_promote(model) == 0
    assert run_rollback(model, "--why", "no") == 2
    assert "has no earlier champion" in capfd.readouterr().err


def killed_at(monkeypatch: pytest.MonkeyPatch, nth: int, *, after: bool) -> list[str]:
    """The n-th change of the registry is the last one that is begun, or ``after`` it is done."""
    begun: list[str] = []

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            begun.append(name)
            if len(begun) == nth and not after:
                raise Killed
            told = real(*args, **kwargs)
            if len(begun) == nth:
                raise Killed
            return told

        return change

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, dying(name, getattr(MlflowClient, name)))
    return begun


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("verb", ["promote", "rollback"])
def test_killed_at_any_point_the_next_command_completes_it(
    store: Path, model: str, champions: list[str], verb: str, after: bool
) -> None:
    """Whatever was entered holds; what was not entered has changed nothing."""
    points = 0
    for nth in range(1, 20):
        if verb == "promote":
            challenge(store, model, wrong=19 - nth)
        elif len(ledger.reigns(ledger.entries(model))) < 2:
            challenge(store, model, wrong=19 - nth)
            assert run_promote(model) == 0
        entered = len(moves(model))
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
            begun = killed_at(patch, nth, after=after)
            arguments = ["--model", model, "--why", f"killed at {nth}"]
            verbs = {"promote": run_promote, "rollback": run_rollback}
            try:
                verbs[verb](model, *arguments[2:])
            except Killed:
                points += 1
        standing = reconcile(model)
        known = ledger.entries(model)
        assert len(known) <= entered + 1
        assert all(one.action != ledger.BY_HAND for one in known), f"{verb} killed at {nth}"
        assert standing.champion is not None
        assert str(standing.champion.version) == known[-1].to_version
        held, reigns = aliases(model), ledger.reigns(known)
        assert held["champion"] == reigns[-1]
        assert held.get("previous") == (reigns[-2] if reigns[1:] else None)
        assert held.get("challenger") != held["champion"]
        assert history.verify(model) == []
        if len(begun) < nth:
            break
    assert points >= 4, "the test killed nothing"
    assert len(begun) < nth, "it was killed at every point"


def test_a_champion_that_was_set_by_hand_is_noticed_and_entered(
    store: Path, model: str, champions: list[str]
) -> None:
    first, second = champions
    other = challenge(store, model, wrong=25)
    point(model, other)
    assert history.main(["--model", model, "--verify"]) == 1
    assert len(moves(model)) == 2, "to verify changes nothing"
    standing = reconcile(model)
    assert moves(model)[-1] == ("by hand", second, other)
    assert ledger.entries(model)[-1].actor == "unknown"
    assert standing.reigns == (first, second, other)
    assert aliases(model) == {"champion": other, "previous": second}
    assert run_rollback(model, "--why", "not judged") == 0
    assert aliases(model) == {"champion": second, "previous": first}

    MlflowClient().delete_registered_model_alias(model, versions.CHAMPION)
    assert reconcile(model).champion is None
    assert moves(model)[-1] == ("by hand", second, None)
    assert run_rollback(model, "--why", "there must be one") == 0
    assert aliases(model) == {"champion": second, "previous": first}
    assert history.main(["--model", model, "--verify"]) == 0


def test_without_a_champion_the_last_one_is_the_measure(
    store: Path, model: str, champions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    MlflowClient().delete_registered_model_alias(model, versions.CHAMPION)
    challenge(store, model, wrong=60)
    capsys.readouterr()
    assert run_promote(model) == 1
    assert "under the champion's bar 0.9667" in capsys.readouterr().out


def test_an_entry_that_was_sent_twice_counts_once(
    store: Path, model: str, champions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client sends again where an answer was lost on its way."""
    real = MlflowClient.create_model_version

    def twice(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        real(self, *args, **kwargs)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", twice)
    assert run_rollback(model, "--why", "once") == 0
    assert [action for action, _, _ in moves(model)] == ["promote", "promote", "rollback"]
    assert history.verify(model) == []


def test_a_registry_that_was_never_promoted_in_begins_with_what_was_set_by_hand(
    store: Path, model: str
) -> None:
    number = challenge(store, model, wrong=30)
    point(model, number)
    standing = reconcile(model)
    assert standing.reigns == (number,)
    assert moves(model) == [("by hand", None, number)]
    assert aliases(model) == {"champion": number}, "it challenges nobody now"


def test_a_version_that_was_deleted_is_not_gone_back_to(
    store: Path, model: str, champions: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = champions
    third = challenge(store, model, wrong=10)
    assert run_promote(model) == 0
    MlflowClient().delete_model_version(model, second)
    assert run_rollback(model, "--why", "the second is gone", "--to", second) == 2
    assert f"models:/{model}/{second}" in capfd.readouterr().err
    assert run_rollback(model, "--why", "the second is gone") == 0
    assert aliases(model) == {"champion": first}
    assert moves(model)[-1] == ("rollback", third, first)
    MlflowClient().delete_model_version(model, first)
    assert reconcile(model).champion is None
    assert moves(model)[-1] == ("by hand", first, None)


def test_of_two_who_roll_back_at_once_one_does(
    store: Path, model: str, champions: list[str]
) -> None:
    before = reconcile(model)
    barrier = threading.Barrier(2)
    told: list[str] = []

    def go(name: str) -> None:
        barrier.wait(30)
        try:
            rollback.rollback(model, champions[0], before, "both at once", name)
            told.append("")
        except TrackingError as error:
            told.append(str(error))

    threads = [threading.Thread(target=go, args=(name,)) for name in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won, lost = sorted(told)
    assert won == ""
    assert "at the same time" in lost
    assert aliases(model) == {"champion": champions[0]}
    assert len(moves(model)) == 3


def test_an_alias_that_came_late_is_not_taken_for_somebodys_hand(
    store: Path, model: str, champions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promoter is held up just before its alias, while another one goes on from its entry."""
    third = challenge(store, model, wrong=10)
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
    assert [action for action, _, _ in moves(model)] == ["promote"] * 3 + ["rollback"]
    assert aliases(model) == {"champion": champions[1], "previous": champions[0]}
    assert history.verify(model) == []


@pytest.mark.parametrize("settled", [True, False])
def test_an_alias_that_is_moved_while_it_is_looked_at_is_not_moved_back(
    store: Path, model: str, champions: list[str], monkeypatch: pytest.MonkeyPatch, *, settled: bool
) -> None:
    third = challenge(store, model, wrong=25)
    if not settled:
        name, last = ledger.name_of(model), ledger.records(model)[-1].number
        MlflowClient().delete_model_version_tag(name, str(last), ledger.SETTLED)
    real, looked = versions.by_alias, 0

    def then_moved(model: str, alias: str) -> Any:
        nonlocal looked
        found = real(model, alias)
        looked += alias == versions.CHAMPION
        if looked == 1:
            point(model, third)
        return found

    monkeypatch.setattr(versions, "by_alias", then_moved)
    assert reconcile(model).number == third
    assert looked > 1
    assert moves(model)[-1] == ("by hand", champions[1], third)
    assert aliases(model) == {"champion": third, "previous": champions[1]}


def test_an_alias_that_is_moved_before_it_is_set_is_not_moved_back(
    store: Path, model: str, champions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who is quicker than the one who has just made an entry."""
    third = challenge(store, model, wrong=25)
    real = ledger.append

    def then_moved(model: str, entry: ledger.Entry) -> None:
        real(model, entry)
        monkeypatch.setattr(ledger, "append", real)
        point(model, third)

    monkeypatch.setattr(ledger, "append", then_moved)
    assert run_rollback(model, "--why", "not judged") == 0
    first, second = champions
    assert moves(model)[-2:] == [("rollback", second, first), ("by hand", first, third)]
    assert aliases(model) == {"champion": third, "previous": first}


def test_an_entry_that_was_altered_is_found(
    model: str, champions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert history.main(["--model", model, "--verify"]) == 0
    record = ledger.records(model)[0]
    altered = record.text.replace('"why":"', '"why":"well, ')
    assert altered != record.text
    MlflowClient().set_model_version_tag(ledger.name_of(model), "1", ledger.TAG, altered)
    assert history.main(["--model", model, "--verify"]) == 1
    assert "wrong: record 2 links to no entry" in capsys.readouterr().out


def test_a_version_is_shown_with_its_history(
    model: str, champions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.main([champions[0], "--model", model]) == 0
    told = capsys.readouterr().out
    assert "previous" in told
    assert "data_validation passed" in " ".join(told.replace("│", " ").split())
    with pytest.raises(EuroSATError, match="whole number"):
        show.main(["x", "--model", model])
