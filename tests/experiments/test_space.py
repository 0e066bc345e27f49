"""Search spaces: YAML files of ranges and choices."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from eurosat.config import CONF, compose
from eurosat.errors import ConfigError
from eurosat.tracking import flatten
from experiments import objective, space


@pytest.mark.parametrize("name", sorted(file.stem for file in space.SPACES.glob("*.yaml")))
def test_every_recipe_takes_the_bounds_of_every_space(name: str) -> None:
    recipes = sorted(file.stem for file in (CONF / "recipe").glob("*.yaml"))
    entries = space.load(name)
    lowest: dict[str, Any] = {}
    highest: dict[str, Any] = {}
    for key, entry in entries.items():
        if isinstance(entry, space.Range):
            lowest[key], highest[key] = entry.low, entry.high
        else:
            lowest[key], highest[key] = entry.choices[0], entry.choices[-1]
    for recipe in recipes:
        for values in (lowest, highest):
            compose([f"recipe={recipe}", *objective.as_overrides(values)])


@pytest.mark.parametrize(
    "entry",
    [
        "5",
        "{low: 1}",
        "{low: 2, high: 1}",
        "{low: 0, high: 1, log: true}",
        "{choices: []}",
        "{low: 0, high: 1, step: 2}",
        "{choices: [1], more: 2}",
    ],
)
def test_the_error_for_an_invalid_entry_names_its_file_and_key(tmp_path: Path, entry: str) -> None:
    (tmp_path / "s.yaml").write_text(f"optim.lr: {entry}\n")
    with pytest.raises(ConfigError, match="s.yaml: optim.lr must be"):
        space.load(str(tmp_path / "s.yaml"))


def test_an_empty_space_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump([]))
    with pytest.raises(ConfigError, match="has no keys"):
        space.load(str(tmp_path / "s.yaml"))


@pytest.mark.parametrize("recipe", sorted(file.stem for file in (CONF / "recipe").glob("*.yaml")))
def test_the_own_space_of_every_recipe_contains_its_values(recipe: str) -> None:
    config = compose([f"recipe={recipe}"])
    name = space.choose(space.AUTO, config)
    entries = space.load(name)
    values = flatten(config.as_dict())
    assert space.first_trial(values, entries, name) == {key: values[key] for key in entries}


def test_a_space_that_is_named_takes_precedence_over_the_recipes_own() -> None:
    assert space.choose("resnet18-wide", compose()) == "resnet18-wide"


def test_the_error_for_values_outside_the_space_names_key_value_and_space() -> None:
    entries: space.Space = {"a": space.Range(low=0, high=1), "b": space.Choices(choices=("x", "y"))}
    assert space.first_trial({"a": 0.5, "b": "y", "c": 1}, entries, "s") == {"a": 0.5, "b": "y"}
    with pytest.raises(ConfigError) as caught:
        space.first_trial({"a": 2.0, "b": "z"}, entries, "s")
    assert "space=s: a=2.0 (the space has 0 to 1), b=z (the space has x, y)" in str(caught.value)
