"""Recipes become validated settings, and one error names every fault."""

import dataclasses

import pytest
import yaml

from eurosat.config import CONF, TrainConfig, compose, from_mapping
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes
from eurosat.tracking import flatten


@pytest.mark.parametrize("recipe", sorted(file.stem for file in (CONF / "recipe").glob("*.yaml")))
def test_every_recipe_composes_under_its_own_name(recipe: str) -> None:
    assert compose([f"recipe={recipe}"]).recipe == recipe


def test_overrides_reach_groups_nested_keys_and_keys_that_no_recipe_writes() -> None:
    config = compose(["data=eurosat", "data.root=/tiles", "optim.lr=1e-2", "model.drop_rate=0.1"])
    assert (config.data.source, config.data.root) == ("eurosat", "/tiles")
    assert (config.optim.lr, config.model.drop_rate) == (0.01, 0.1)


def test_the_environment_names_the_root_and_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EUROSAT_ROOT", "/here")
    monkeypatch.setenv("EUROSAT_CACHE", "/there")
    config = compose(["data=eurosat"])
    assert (config.data.root, config.data.cache) == ("/here", "/there")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate=1", "unknown key optim.learning_rate"),
        ("optim.warmpu=0.1", "did you mean warmup"),
        ("trainer.epochs=many", "trainer.epochs must be int; got 'many'"),
        ("trainer.epochs=0", "trainer.epochs must be at least 1; got 0"),
        ("trainer.epochs=true", "must be int; got True"),
        ("optim.lr=-1", "optim.lr must be above 0"),
        ("optim.lr=nan", "optim.lr must be above 0; got nan"),
        ("optim.name=adam", "must be 'adamw' or 'sgd'; got 'adam'"),
        ("data.protocol=50/50", "data.protocol must be '60/20/20' or '80/20'; got '50/50'"),
        ("recipe=resnet19", "'recipe/resnet19' Available options in 'recipe': demo efficientnet"),
        ("data=moon", "'data/moon' Available options in 'data': eurosat folder synthetic"),
        ("data=folder", "missing key data.root: add data.root=PATH, a folder or zip with one"),
        ("data=/my/tiles", "data=/my/tiles is a path, and data names a kind of source: give "),
        ("data=~/tiles", "give data=folder data.root=~/tiles"),
        ("data.root=", "data.root= names no folder"),
        ("augment.cutmix=2", "augment.cutmix must be at most 1; got 2"),
        ("optim=5", "optim must be a mapping; got 5"),
        ("seed=[1", "seed"),
    ],
)
def test_a_fault_in_the_configuration_is_named_in_one_line(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_error_names_all_faults() -> None:
    with pytest.raises(ConfigError, match=r"nonsense.*must be int"):
        from_mapping(
            TrainConfig,
            {"recipe": "r", "data": {"source": "synthetic"}, "nonsense": 1, "seed": "x"},
        )


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="missing key recipe"):
        from_mapping(TrainConfig, {"data": {"source": "synthetic"}})


def test_the_digest_depends_on_the_settings_and_not_on_local_places() -> None:
    config = compose()
    moved = dataclasses.replace(
        config, experiment="other", data=dataclasses.replace(config.data, root="/x", cache="/y")
    )
    assert moved.digest == config.digest
    assert compose(["seed=1"]).digest != config.digest


def test_a_command_prints_one_line_and_exits_2_on_bad_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(argv: object) -> int:
        raise ConfigError("seed is -1,\nbut must be at least 0")

    with pytest.raises(SystemExit) as caught:
        cli.run_command(command, [])
    assert caught.value.code == exit_codes.BAD_INPUT
    assert capsys.readouterr().err == "error: seed is -1, but must be at least 0\n"


def test_an_interrupt_exits_130_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: object) -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        cli.run_command(command, [])
    assert caught.value.code == exit_codes.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_overrides_passed_by_mlproject_are_split() -> None:
    argv = ["seed=1", "overrides=optim.lr=0.1 'model.name=a b'", "overrides=", "log_level=error"]
    assert cli.overrides(argv, "usage") == ["seed=1", "optim.lr=0.1", "model.name=a b"]


@pytest.mark.parametrize("argument", ["--seed", "seed", "--seed=1"])
def test_an_argument_that_is_not_key_value_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        cli.overrides([argument], "usage")


def test_an_unknown_log_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="'loud' is not one of debug"):
        cli.overrides(["log_level=loud"], "usage")


@pytest.mark.parametrize("recipe", sorted(f.stem for f in (CONF / "recipe").glob("*.yaml")))
def test_a_composed_recipe_has_the_values_of_its_file(recipe: str) -> None:
    """A later file in Hydra's defaults list could override them."""
    written = yaml.safe_load((CONF / "recipe" / f"{recipe}.yaml").read_text())
    written.pop("defaults", None)
    composed = flatten(compose([f"recipe={recipe}"]).as_dict())
    for key, value in flatten(written).items():
        assert composed[key] == value, key
