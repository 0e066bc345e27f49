"""Optimisers, parameter groups and the schedule; fused steps match PyTorch's own."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

from eurosat.config import OptimConfig
from eurosat.training.optimizers import (
    MemoryOrderAdamW,
    MemoryOrderSGD,
    make_optimizer,
    one_cycle,
)
from tests.support.networks import build as build_network

PAIRS: list[tuple[type[Optimizer], type[Optimizer], dict[str, Any]]] = [
    (MemoryOrderSGD, SGD, {"momentum": 0.9, "nesterov": True}),
    (MemoryOrderAdamW, AdamW, {}),
]


def weights(layout: torch.memory_format) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 4, 3, 3), (8, 4, 1, 1), (8, 1, 5, 5), (10, 8), (8,))
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(w.contiguous(memory_format=layout) if w.ndim == 4 else w) for w in made]


def stepped(
    kind: type[Optimizer],
    layout: torch.memory_format,
    gradient_layout: torch.memory_format,
    **options: Any,
) -> list[torch.Tensor]:
    """The weights after three steps."""
    parameters, generator = weights(layout), torch.Generator().manual_seed(1)
    optimizer = kind(parameters, lr=0.1, weight_decay=5e-4, **options)  # type: ignore[call-arg]
    for _ in range(3):
        for weight in parameters:
            grad = torch.randn(weight.shape, generator=generator)
            weight.grad = grad.contiguous(memory_format=gradient_layout) if grad.ndim == 4 else grad
        optimizer.step()
    return [weight.detach() for weight in parameters]


@pytest.mark.parametrize("gradient_layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("fast", "reference", "options"), PAIRS)
def test_a_step_matches_that_of_pytorch_in_any_layout(
    fast: type[Optimizer],
    reference: type[Optimizer],
    options: dict[str, Any],
    layout: torch.memory_format,
    gradient_layout: torch.memory_format,
) -> None:
    actual = stepped(fast, layout, gradient_layout, fused=True, **options)
    expected = stepped(reference, torch.contiguous_format, torch.contiguous_format, **options)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("fast", "_", "options"), PAIRS)
def test_a_step_copies_no_gradient(fast: type[Optimizer], _: Any, options: dict[str, Any]) -> None:
    parameters = weights(torch.channels_last)
    optimizer = fast(parameters, lr=0.1, fused=True, **options)  # type: ignore[call-arg]
    for weight in parameters:
        weight.grad = torch.ones_like(weight)
    optimizer.step()  # creates its state
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        optimizer.step()
    assert "aten::contiguous" not in {event.key for event in profiled.key_averages()}


@pytest.mark.parametrize("saved_in", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("fast", "reference", "options"), PAIRS)
def test_a_state_of_another_layout_is_loaded(
    fast: type[Optimizer],
    reference: type[Optimizer],
    options: dict[str, Any],
    saved_in: torch.memory_format,
) -> None:
    """As if a training that began on a GPU resumes on a CPU."""
    results = []
    for kind, fused in ((fast, True), (reference, False)):
        before, after = weights(saved_in), weights(torch.channels_last)
        first, resumed = (kind(w, lr=0.1, fused=fused, **options) for w in (before, after))  # type: ignore[call-arg]
        for optimizer, parameters in ((first, before), (resumed, after)):
            if optimizer is resumed:
                resumed.load_state_dict(first.state_dict())
            generator = torch.Generator().manual_seed(2)
            for weight in parameters:
                weight.grad = torch.randn(weight.shape, generator=generator).to(weight)
            optimizer.step()
        results.append([weight.detach() for weight in after])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("fast", "_", "options"), PAIRS)
def test_a_closure_is_called_once_and_its_loss_returned(
    fast: type[Optimizer], _: Any, options: dict[str, Any]
) -> None:
    weight = nn.Parameter(torch.ones(4, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer, calls = fast([weight], lr=0.1, fused=True, **options), []  # type: ignore[call-arg]

    def closure() -> float:
        calls.append(1)
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    with torch.no_grad():
        assert optimizer.step(closure) == 144
    assert len(calls) == 1
    assert float(weight.detach().max()) < 1


def test_the_schedule_rises_to_its_peak_and_falls_to_zero() -> None:
    shares = [one_cycle(step, total=100, warmup=0.2) for step in range(101)]
    assert max(shares) == pytest.approx(1)
    assert 19 <= int(np.argmax(shares)) <= 20
    assert shares[:20] == sorted(shares[:20])
    assert shares[-1] == pytest.approx(0, abs=1e-6)
    assert one_cycle(0, total=10, warmup=0) == 1


def test_weight_decay_leaves_biases_and_norms_alone() -> None:
    network = build_network()
    optimizer = make_optimizer(network, OptimConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        assert all(p.ndim > 1 for p in group["params"]) == (group["weight_decay"] == 0.1)
        assert all(p.ndim == 1 for p in group["params"]) == (group["weight_decay"] == 0)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, network.parameters()))
