"""Optuna's samplers and pruners, made from the settings of a sweep."""

import inspect
from typing import TYPE_CHECKING, Any

from eurosat.errors import ConfigError
from experiments.settings import SweepConfig

if TYPE_CHECKING:
    import optuna

REDUCTION_FACTOR = 4
"""Successive halving keeps one trial in this many; the default of Optuna and of Ray."""


def make_sampler(settings: SweepConfig, seed_offset: int = 0) -> "optuna.samplers.BaseSampler":
    """Return the sampler that ``settings.sampler`` names.

    TPE draws at random for the first quarter of the trials, ten at most.

    Raises:
        ConfigError: optuna has no such sampler, or it needs arguments other than a seed.
    """
    import optuna

    sampler_class = getattr(optuna.samplers, settings.sampler, None)
    known = [name for name in optuna.samplers.__all__ if name.endswith("Sampler")]
    if settings.sampler not in known or sampler_class is None:
        raise ConfigError(f"sampler={settings.sampler} is unknown: choose from {', '.join(known)}")
    arguments: dict[str, Any] = {
        "seed": settings.sampler_seed + seed_offset,
        # with optuna's 50 a short sweep would have a single generation
        "population_size": min(50, max(4, settings.trials // 4)),
    }
    if sampler_class is optuna.samplers.TPESampler:
        arguments["n_startup_trials"] = min(10, max(2, settings.trials // 4))
        arguments["constant_liar"] = settings.workers > 1
    parameters = inspect.signature(sampler_class).parameters
    accepted = {name: value for name, value in arguments.items() if name in parameters}
    try:
        sampler: optuna.samplers.BaseSampler = sampler_class(**accepted)
    except (TypeError, ImportError) as error:
        raise ConfigError(f"sampler={settings.sampler} cannot be used here: {error}") from error
    return sampler


def make_pruner(settings: SweepConfig) -> "optuna.pruners.BasePruner":
    import optuna

    if settings.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=first_rung_epochs(settings), reduction_factor=REDUCTION_FACTOR
        )
    if settings.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=2)
    return optuna.pruners.NopPruner()


def first_rung_epochs(settings: SweepConfig) -> int:
    """Return the number of epochs after which successive halving first stops trials.

    After one epoch, trials of more than three epochs are still warming up: their ranking says
    little about the final one.
    """
    return 2 if settings.trial_epochs > 3 else 1
