"""A study: one key, several values, one figure."""

from pathlib import Path

import pytest

from eurosat import tracking
from eurosat.config import compose
from eurosat.errors import ConfigError
from eurosat.runtime import exit_codes
from experiments import ablation
from tests.support.recipes import TINY


@pytest.mark.parametrize("name", sorted(file.stem for file in ablation.STUDIES.glob("*.yaml")))
def test_every_study_asks_what_its_recipe_knows(name: str) -> None:
    asked = ablation.load(name)
    for value in asked.values:
        compose([*asked.overrides, f"{asked.key}={value}"])


def test_an_unknown_study_is_named_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="no study 'nope': known are features, fine-tuning-rates, learning-rates"
    ):
        ablation.load("nope")


@pytest.mark.usefixtures("tracking_store")
def test_a_study_trains_each_value_and_draws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text(
        "question: Which rate?\nkey: optim.lr\nvalues: [0.05, 1.0e+30]\n"
        f"overrides: [{', '.join(TINY)}, optim.warmup=0]\n"
    )
    assert ablation.main([str(file), "log_level=error"]) == exit_codes.OK
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("optim.lr=0.05\tbest val_macro_f1 0.")
    assert told[1].startswith("optim.lr=1e+30\tbest val_macro_f1 nan")
    parent = told[-1].split()[-1]
    with tracking.artifact(parent, "study.csv") as table:
        assert len(table.read_text().splitlines()) == 3
    with tracking.artifact(parent, "figures/rates.png") as figure:
        assert figure.stat().st_size > 5000
