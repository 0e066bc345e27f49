"""Settings of a sweep, apart from the recipe."""

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
    """Trials side by side: processes of this machine, or Ray trials."""
    trial_epochs: int = 3
    """Epochs of a trial; its schedule is planned for them, not cut short."""
    space: str = "resnet18"
    """Name of a file in experiments/spaces, or path of a YAML file."""
    engine: Literal["optuna", "ray"] = "optuna"
    sampler: str = "TPESampler"
    """A class of optuna.samplers."""
    sampler_seed: int = 0
    pruner: Literal["asha", "median", "none"] = "median"
    objectives: Literal["accuracy", "accuracy,latency"] = "accuracy"
    """Validation accuracy, and milliseconds for one tile; with both, no trial is pruned."""
    minutes: float | None = None
    """No trial starts later, and running ones stop after their epoch."""
    target: float | None = None
    """Validation accuracy of a trial, in (0, 1], after which no other one starts."""
    study: str | None = None
    """Name of the study; None is ``sweep-`` and the id of the parent run."""
    storage: str = "sqlite:///optuna.db"
    """URL of the database of studies."""
    from_study: str | None = None
    """Earlier study of the same storage and space, whose trials the sampler starts with."""
    resume: str | None = None
    """Study to continue; RESUMABLE_SETTINGS in studies.py lists what may change."""
    refit: bool = True
    """Train the best configuration in full."""
    register: bool = False
    """Register the refit as a version of the model (`python -m registry.register`)."""
    ray_address: str | None = None
    """Address of a Ray cluster; None starts one on this machine."""
    trial_cpus: float = 1
    """CPU cores of one trial on Ray."""
    trial_gpus: float = 0
    """GPUs of one trial on Ray; fractions share a GPU."""

    def __post_init__(self) -> None:
        for name, limit in (("trials", 10_000), ("workers", 256), ("trial_epochs", 10_000)):
            if not 1 <= getattr(self, name) <= limit:
                raise ConfigError(f"{name} must be in [1, {limit}]; got {getattr(self, name)}")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes must be above 0; got {self.minutes}")
        if self.target is not None and not 0 < self.target <= 1:
            raise ConfigError(f"target is an accuracy, in (0, 1]; got {self.target}")

    @property
    def objective_names(self) -> tuple[str, ...]:
        return tuple(self.objectives.split(","))


def split_settings(settings_class: type[T], overrides: Sequence[str]) -> tuple[T, list[str]]:
    """Return the settings among ``key=value`` arguments, and the arguments for the recipe.

    Raises:
        ConfigError: the value of a setting is invalid.
    """
    import yaml

    names = {field.name for field in fields(settings_class)}  # type: ignore[arg-type]
    values, recipe = {}, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in names:
            recipe.append(override)
            continue
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override} is not valid YAML: {error}") from error
    return from_mapping(settings_class, values), recipe
