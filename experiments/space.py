"""Search spaces: YAML files that list the values a trial may give to keys of a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat.config import TrainConfig
from eurosat.errors import ConfigError
from experiments import presets

if TYPE_CHECKING:
    import optuna

SPACES = Path(__file__).parent / "spaces"
AUTO = "auto"
"""Instead of the name of a space: the one that the recipe names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    low: float
    high: float
    log: bool = False
    """Draw uniformly in the logarithm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    choices: tuple[float | int | str | bool, ...]


Space = Mapping[str, Range | Choices]
"""The allowed values by dotted key of the recipe."""


def choose(name: str, config: TrainConfig) -> str:
    """Return the name of the space to search; ``auto`` is the one that the recipe names.

    Raises:
        ConfigError: the recipe names none.
    """
    if name != AUTO:
        return name
    if not config.search_space:
        raise ConfigError(
            f"recipe={config.recipe} names no search_space: give space=NAME (experiments/spaces) "
            "or the path of a YAML file"
        )
    return config.search_space


def load(name: str) -> Space:
    """Read ``experiments/spaces/NAME.yaml``, or the YAML file at path ``name``.

    Raises:
        ConfigError: there is no such space, or an entry is neither a range nor choices.
    """
    entries, file = presets.read("search space", SPACES, name)
    return {key: _parse_entry(value, f"{file}: {key}") for key, value in entries.items()}


def suggest(trial: "optuna.trial.BaseTrial", space: Space) -> dict[str, Any]:
    """Take one value per key from the trial's sampler."""
    return {
        key: trial.suggest_float(key, entry.low, entry.high, log=entry.log)
        if isinstance(entry, Range)
        else trial.suggest_categorical(key, entry.choices)
        for key, entry in space.items()
    }


def example_value(entry: Range | Choices) -> Any:
    """Return one allowed value."""
    return entry.low if isinstance(entry, Range) else entry.choices[0]


def first_trial(recipe: Mapping[str, Any], space: Space, name: str) -> dict[str, Any]:
    """Return the recipe's own values of the keys of the space ``name``.

    Raises:
        ConfigError: one of them lies outside the space, which then was made for another recipe.
    """
    values = {key: recipe[key] for key in space if key in recipe}
    outside = [key for key in values if not _allows(space[key], values[key])]
    if outside:
        faults = ", ".join(f"{key}={values[key]} ({_describe(space[key])})" for key in outside)
        raise ConfigError(
            f"the recipe's own values lie outside space={name}: {faults}; the first trial is the "
            "recipe itself: set these keys to values of the space, or give another space="
        )
    return values


def _allows(entry: Range | Choices, value: Any) -> bool:
    if isinstance(entry, Range):
        return bool(entry.low <= value <= entry.high)
    return value in entry.choices


def _describe(entry: Range | Choices) -> str:
    if isinstance(entry, Range):
        return f"the space has {entry.low:g} to {entry.high:g}"
    return f"the space has {', '.join(map(str, entry.choices))}"


def _parse_entry(value: Any, where: str) -> Range | Choices:
    match value:
        case {"choices": [_, *_] as choices, **unknown} if not unknown:
            return Choices(choices=tuple(choices))
        case {"low": int() | float() as low, "high": int() | float() as high, **unknown}:
            log = unknown.pop("log", False)
            if not unknown and low < high and (low > 0 or not log):
                return Range(low=float(low), high=float(high), log=bool(log))
    raise ConfigError(
        f"{where} must be {{low, high[, log]}} with low < high (above 0 for log) or "
        f"{{choices: [...]}}; got {value!r}"
    )
