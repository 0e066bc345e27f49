"""What people say of versions: approved, rejected, retired."""

from pathlib import Path

import pytest

from eurosat.errors import ConfigError, EuroSATError
from eurosat.runtime import exit_codes
from registry import approvals, approve, ledger, reconcile, retire, versions
from tests.support.registry import REGISTRY, aliases, challenge, run_promote, run_rollback

pytestmark = REGISTRY


def test_a_version_waits_for_a_person_where_one_is_asked(
    store: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gates.toml"
    file.write_text("[accuracy]\nfloor = 0.9\nwhy = 'x'\n[approval]\noff = ''\n")
    asked = ("--gates", str(file))
    number = challenge(store, model, wrong=30)
    assert run_promote(model, *asked) == 1
    assert f"approval: version {number} waits for a person" in capsys.readouterr().out
    told = ["--model", model, "--by", "ann"]
    assert approve.main([number, "--why", "not yet", "--reject", *told]) == exit_codes.OK
    assert run_promote(model, *asked) == 1
    assert "approval: rejected by ann: not yet" in capsys.readouterr().out
    assert approve.main([number, "--why", "now it may", *told]) == exit_codes.OK
    assert run_promote(model, *asked) == 0
    assert "approval approved by ann" in ledger.entries(model)[-1].verdict
    with pytest.raises(ConfigError, match="over 2000"):
        approve.main([number, "--why", "x" * 2001, *told])


def test_who_is_retired_challenges_nobody_and_is_not_gone_back_to(
    store: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = []
    for wrong in (40, 30, 20):
        numbers.append(challenge(store, model, wrong))
        assert run_promote(model) == 0
    first, second, third = numbers
    with pytest.raises(EuroSATError, match="is the champion: roll back"):
        retire.main([third, "--why", "no", "--model", model])
    assert (
        retire.main([second, "--why", "it cannot tell rivers", "--model", model]) == exit_codes.OK
    )
    assert aliases(model) == {"champion": third, "previous": first}
    assert run_rollback(model, "--why", "no", "--to", second) == 2
    assert "was retired by" in capfd.readouterr().err
    assert run_promote(model, second) == 1
    assert "it cannot tell rivers" in " ".join(capfd.readouterr().out.split())
    assert run_rollback(model, "--why", "back") == 0
    assert aliases(model)["champion"] == first
    fourth = challenge(store, model, wrong=10)
    assert retire.main([fourth, "--why", "of the wrong data", "--model", model]) == exit_codes.OK
    assert "challenger" not in aliases(model)
    assert reconcile.reconcile(model).reigns == (first,)


def test_a_tag_that_nobody_of_ours_wrote_says_nothing(store: Path, model: str) -> None:
    number = challenge(store, model, wrong=30)
    for text in ("yes", "{}", '{"word": "approved"}', "[1]"):
        versions.client().set_model_version_tag(model, number, approvals.APPROVAL, text)
        assert approvals.Opinion.of(versions.get(model, number), approvals.APPROVAL) is None
