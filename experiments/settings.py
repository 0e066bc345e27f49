"""Settings of a sweep, apart from the recipe."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from eurosat.errors import ConfigError
from eurosat.runtime.settings import from_mapping, settings

T = TypeVar("T")


@settings()
class SweepConfig:
    trials: Annotated[int, Field(ge=1, le=10_000)] = 6
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Trials side by side: processes of this machine, or Ray trials."""
    trial_epochs: Annotated[int, Field(ge=1, le=10_000)] = 3
    """Epochs of a trial; its schedule is planned for them, not cut short."""
    space: str = "auto"
    """Name of a file in experiments/spaces, or path of a YAML file; auto is the recipe's own."""
    engine: Literal["optuna", "ray"] = "optuna"
    sampler: str = "TPESampler"
    """A class of optuna.samplers."""
    sampler_seed: int = 0
    pruner: Literal["asha", "median", "none"] = "median"
    objectives: Literal["accuracy", "accuracy,latency"] = "accuracy"
    """Validation accuracy, and milliseconds for one tile; with both, no trial is pruned."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """No trial starts later, and running ones stop after their epoch."""
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    """Validation accuracy of a trial, as a fraction, after which no other one starts."""
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
