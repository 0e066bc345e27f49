"""Samplers and pruners that a sweep's settings name."""

import optuna

from experiments.samplers import make_sampler
from experiments.settings import SweepConfig


def test_a_genetic_sampler_gets_several_generations_within_the_trials() -> None:
    sampler = make_sampler(SweepConfig(trials=40, sampler="NSGAIISampler"))
    assert isinstance(sampler, optuna.samplers.NSGAIISampler)
    assert sampler.population_size == 10
