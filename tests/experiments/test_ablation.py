"""Ablations: one key, several values, one plot."""

from pathlib import Path

import pytest

from eurosat import tracking
from eurosat.config import compose
from eurosat.errors import ConfigError
from eurosat.runtime import exit_codes
from experiments import ablation
from tests.support.recipes import TINY


@pytest.mark.parametrize("name", sorted(file.stem for file in ablation.ABLATIONS.glob("*.yaml")))
def test_every_ablation_uses_keys_that_its_recipe_has(name: str) -> None:
    loaded = ablation.load(name)
    for value in loaded.values:
        compose([*loaded.overrides, f"{loaded.key}={value}"])


def test_the_error_for_an_unknown_ablation_lists_the_known_ones() -> None:
    known = "features, fine-tuning-rates, learning-rates"
    with pytest.raises(ConfigError, match=f"no ablation 'nope': choose from {known}"):
        ablation.load("nope")


@pytest.mark.usefixtures("tracking_store")
def test_an_ablation_trains_each_value_and_plots_the_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text(
        "question: Which rate?\nkey: optim.lr\nvalues: [0.05, 1.0e+30]\n"
        f"overrides: [{', '.join(TINY)}, optim.warmup=0]\n"
    )
    assert ablation.main([str(file), "log_level=error"]) == exit_codes.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("optim.lr=0.05\tbest val_macro_f1 0.")
    assert lines[1].startswith("optim.lr=1e+30\tbest val_macro_f1 nan")
    parent = lines[-1].split()[-1]
    with tracking.artifact(parent, "study.csv") as table:
        assert len(table.read_text().splitlines()) == 3
    with tracking.artifact(parent, "figures/rates.png") as plot:
        assert plot.stat().st_size > 5000
