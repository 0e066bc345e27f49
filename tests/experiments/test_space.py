"""Search spaces: YAML files of ranges and choices."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from eurosat.config import CONF, compose
from eurosat.errors import ConfigError
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


def test_a_start_value_outside_the_space_is_left_to_the_sampler() -> None:
    entries: space.Space = {"a": space.Range(low=0, high=1), "b": space.Choices(choices=("x", "y"))}
    assert space.values_in_space({"a": 0.5, "b": "z", "c": 1}, entries) == {"a": 0.5}
    assert space.values_in_space({"a": 2.0, "b": "y"}, entries) == {"b": "y"}
