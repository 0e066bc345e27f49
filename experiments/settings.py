"""What a sweep is told beside the recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from eurosat.config import from_mapping
from eurosat.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    trials: int = 6
    workers: int = 1
    """Processes, or trials at once on a Ray cluster."""
    trial_epochs: int = 3
    """Epochs of a trial; its schedule is laid out for them, not cut short."""
    space: str = "resnet18"
    engine: Literal["optuna", "ray"] = "optuna"
    sampler: str = "TPESampler"
    """A class of optuna.samplers."""
    sampler_seed: int = 0
    pruner: Literal["asha", "median", "none"] = "median"
    objectives: Literal["accuracy", "accuracy,latency"] = "accuracy"
    """Validation accuracy, and milliseconds for one tile; two of them are not pruned."""
    minutes: float | None = None
    """No trial begins later; those that run are stopped after their epoch."""
    target: float | None = None
    """Validation accuracy at which no further trial begins."""
    study: str | None = None
    """None is named after the parent run."""
    storage: str = "sqlite:///optuna.db"
    from_study: str | None = None
    """An earlier study in this storage, on the same space: the sampler begins with its trials."""
    resume: str | None = None
    """A study to go on with, by the settings it began with; see ``ANEW`` in search.py."""
    refit: bool = True
    register: bool = False
    """Let `python -m registry.register` wrap the refit as a version of the model."""
    ray_address: str | None = None
    """Of a cluster; None starts one on this machine."""
    trial_cpus: float = 1
    """Of each trial on a cluster."""
    trial_gpus: float = 0

    def __post_init__(self) -> None:
        for name, limit in (("trials", 10_000), ("workers", 256), ("trial_epochs", 10_000)):
            if not 1 <= getattr(self, name) <= limit:
                raise ConfigError(f"{name} must be in [1, {limit}]; got {getattr(self, name)}")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes must be above 0; got {self.minutes}")
        if self.target is not None and not 0 < self.target <= 1:
            raise ConfigError(f"target is an accuracy, in (0, 1]; got {self.target}")

    @property
    def aims(self) -> tuple[str, ...]:
        return tuple(self.objectives.split(","))


def take(own: type[T], overrides: Sequence[str]) -> tuple[T, list[str]]:
    """The settings that the dataclass ``own`` knows, and what is left for the recipe.

    Raises:
        ConfigError: a value of its own does not fit.
    """
    import yaml

    names = {field.name for field in fields(own)}  # type: ignore[arg-type]
    given = dict(one.split("=", 1) for one in overrides if one.split("=", 1)[0] in names)
    try:
        values = {key: yaml.safe_load(value) for key, value in given.items()}
    except yaml.YAMLError as error:
        raise ConfigError(f"{given} cannot be read: {error}") from error
    return from_mapping(own, values), [
        one for one in overrides if one.split("=", 1)[0] not in names
    ]
