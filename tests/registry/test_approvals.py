"""Decisions of people about versions: approved, rejected, retired."""

from pathlib import Path

import pytest

from eurosat.errors import ConfigError, EuroSATError
from eurosat.runtime import exit_codes
from registry import approvals, approve, gates, ledger, reconcile, retire, versions
from registry.approvals import APPROVAL_TAG, ReviewDecision
from registry.event_queue import EventQueue
from registry.worker import Worker
from tests.support.registry import (
    REGISTRY,
    aliases,
    register_challenger,
    run_promote,
    run_rollback,
)

pytestmark = REGISTRY


def test_a_version_waits_for_approval_if_the_gate_is_on(
    store: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gates.toml"
    file.write_text("[accuracy]\nfloor = 0.9\nwhy = 'x'\n[approval]\noff = ''\n")
    limits = ("--gates", str(file))
    number = register_challenger(store, model, wrong=30)
    assert run_promote(model, *limits) == 1
    assert f"approval: version {number} waits for a person" in capsys.readouterr().out
    person = ["--model", model, "--by", "ann"]
    assert approve.main([number, "--why", "not yet", "--reject", *person]) == exit_codes.OK
    assert run_promote(model, *limits) == 1
    assert "approval: rejected by ann: not yet" in capsys.readouterr().out
    assert approve.main([number, "--why", "now it may", *person]) == exit_codes.OK
    assert run_promote(model, *limits) == 0
    assert "approval approved by ann" in ledger.entries(model)[-1].verdict
    with pytest.raises(ConfigError, match="over 2000"):
        approve.main([number, "--why", "x" * 2001, *person])


def test_the_promoter_reads_the_gates_again_for_each_judgement(
    store: Path, model: str, tmp_path: Path
) -> None:
    file = tmp_path / "gates.toml"
    text = gates.FILE.read_text()
    switch = '[approval]\noff = "no person has to approve"\n'
    assert switch in text, "gates.toml shows the switch"
    file.write_text(text)
    queue = EventQueue(tmp_path / "queue.db")
    worker = Worker(model, queue, promotes=True, gates_file=file)

    def judge_next(wrong: int) -> str:
        number = register_challenger(store, model, wrong)
        worker.poll_registry()
        while event := queue.next(model, 0):
            worker.process(event)
        return number

    first = judge_next(40)
    assert aliases(model) == {"champion": first}
    file.write_text(text.replace(switch, '[approval]\noff = ""\n'))
    second = judge_next(30)
    assert aliases(model) == {"champion": first}
    approve.main([second, "--why", "it may", "--model", model])
    worker.poll_registry()
    while event := queue.next(model, 0):
        worker.process(event)
    assert aliases(model)["champion"] == second
    queue.close()


def test_a_retired_version_is_neither_promoted_nor_rolled_back_to(
    store: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = []
    for wrong in (40, 30, 20):
        numbers.append(register_challenger(store, model, wrong))
        assert run_promote(model) == 0
    first, second, third = numbers
    with pytest.raises(EuroSATError, match="is the champion: roll back"):
        retire.main([third, "--why", "no", "--model", model])
    reason = "it confuses rivers"
    assert retire.main([second, "--why", reason, "--model", model]) == exit_codes.OK
    assert aliases(model) == {"champion": third, "previous": first}
    assert run_rollback(model, "--why", "no", "--to", second) == 2
    assert "was retired by" in capfd.readouterr().err
    assert run_promote(model, second) == 1
    assert reason in " ".join(capfd.readouterr().out.split())
    assert run_rollback(model, "--why", "back") == 0
    assert aliases(model)["champion"] == first
    fourth = register_challenger(store, model, wrong=10)
    assert retire.main([fourth, "--why", "of the wrong data", "--model", model]) == exit_codes.OK
    assert "challenger" not in aliases(model)
    assert reconcile.reconcile(model).rollback_stack == (first,)


def test_a_tag_that_is_no_decision_is_ignored(store: Path, model: str) -> None:
    number = register_challenger(store, model, wrong=30)
    for text in ("yes", "{}", '{"word": "approved"}', "[1]", "1"):
        versions.client().set_model_version_tag(model, number, APPROVAL_TAG, text)
        assert ReviewDecision.from_tag(versions.get(model, number), APPROVAL_TAG) is None


def test_a_decision_is_read_from_the_keys_that_tags_have(store: Path, model: str) -> None:
    number = register_challenger(store, model, wrong=30)
    stored = '{"word": "approved", "by": "ann", "why": "it may", "time": "t"}'
    versions.client().set_model_version_tag(model, number, APPROVAL_TAG, stored)
    review = ReviewDecision.from_tag(versions.get(model, number), APPROVAL_TAG)
    assert review == ReviewDecision(decision=approvals.APPROVED, by="ann", why="it may", time="t")
    assert review.as_json() == stored
