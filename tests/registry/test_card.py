"""The model card: purpose, data, recipe and metrics of a version."""

from pathlib import Path

import pytest
from mlflow.artifacts import load_text

from eurosat.runtime import exit_codes
from registry import card, versions
from tests.support.registry import REGISTRY, TAGS, register_challenger, run_promote

pytestmark = REGISTRY


def test_a_card_is_written_at_registration_and_again_with_the_verdict(store: Path) -> None:
    number = register_challenger(store, "cards", wrong=30)
    run_id = versions.run_of(versions.get("cards", number))
    text = load_text(f"runs:/{run_id}/{card.FILE}")
    for line in (
        f"# cards version {number}",
        "**0.9500** of 600 test tiles are classified correctly; the worst class, ",
        "**Verdict**: not judged yet",
        f"- data.fingerprint: {TAGS['data.fingerprint']}",
        f"- run: {run_id}",
        "| Forest | 200 | ",
        "| Forest | 190 | 10 | 0 |",
        "- largest difference of a probability from the trained network: 1e-06",
        "- model.onnx: 0.0 MB",
    ):
        assert line in text
    low, high = text.partition("| accuracy | 0.9500 | ")[2].partition(" |")[0].split(" to ")
    assert 0.92 < float(low) < 0.95 < float(high) < 0.98
    assert run_promote("cards") == 0
    description = str(versions.get("cards", number).description)
    assert "**Verdict**: passed: data_validation passed; " in description
    assert len(description) <= card.MAX_DESCRIPTION
    assert description in load_text(f"runs:/{run_id}/{card.FILE}")


def test_the_command_prints_the_card(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = register_challenger(store, "printed", wrong=0)
    assert card.main([number, "--model", "printed"]) == exit_codes.OK
    assert capsys.readouterr().out.startswith(f"# printed version {number}\n")
