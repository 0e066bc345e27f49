"""Search spaces: YAML files that say what a trial may change in a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat.errors import ConfigError
from experiments import presets

if TYPE_CHECKING:
    import optuna

SPACES = Path(__file__).parent / "spaces"


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    choices: tuple[float | int | str | bool, ...]


Space = Mapping[str, Range | Choices]
"""What each dotted key of the recipe may become."""


def load(name: str) -> Space:
    """Read ``experiments/spaces/NAME.yaml``, or the file that ``name`` names.

    Raises:
        ConfigError: no such space, or an entry that is neither a range nor choices.
    """
    entries, file = presets.read("search space", SPACES, name)
    return {key: _entry(value, f"{file}: {key}") for key, value in entries.items()}


def suggest(trial: "optuna.trial.BaseTrial", space: Space) -> dict[str, Any]:
    """Ask the sampler for one value per key."""
    return {
        key: trial.suggest_float(key, one.low, one.high, log=one.log)
        if isinstance(one, Range)
        else trial.suggest_categorical(key, one.choices)
        for key, one in space.items()
    }


def edge(one: Range | Choices) -> Any:
    """One value that it allows."""
    return one.low if isinstance(one, Range) else one.choices[0]


def inside(values: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """What of ``values`` the space could have suggested: a point to start from."""
    return {
        key: values[key]
        for key, one in space.items()
        if key in values
        and (
            one.low <= values[key] <= one.high
            if isinstance(one, Range)
            else values[key] in one.choices
        )
    }


def _entry(value: Any, where: str) -> Range | Choices:
    match value:
        case {"choices": [_, *_] as choices, **rest} if not rest:
            return Choices(choices=tuple(choices))
        case {"low": int() | float() as low, "high": int() | float() as high, **rest}:
            log = rest.pop("log", False)
            if not rest and low < high and (low > 0 or not log):
                return Range(low=float(low), high=float(high), log=bool(log))
    raise ConfigError(
        f"{where} must be {{low, high[, log]}} with low < high (above 0 for log) or "
        f"{{choices: [...]}}; got {value!r}"
    )
