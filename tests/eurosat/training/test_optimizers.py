"""Fused steps that take weights in the order of memory compute what the usual ones do."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

from eurosat.training.optimizers import MemoryOrderAdamW, MemoryOrderSGD

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
    of_gradients: torch.memory_format,
    **further: Any,
) -> list[torch.Tensor]:
    """The weights after three steps."""
    parameters, generator = weights(layout), torch.Generator().manual_seed(1)
    optimizer = kind(parameters, lr=0.1, weight_decay=5e-4, **further)  # type: ignore[call-arg]
    for _ in range(3):
        for one in parameters:
            grad = torch.randn(one.shape, generator=generator)
            one.grad = grad.contiguous(memory_format=of_gradients) if grad.ndim == 4 else grad
        optimizer.step()
    return [one.detach() for one in parameters]


@pytest.mark.parametrize("of_gradients", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("ours", "theirs", "further"), PAIRS)
def test_a_step_is_that_of_pytorch_in_any_layout(
    ours: type[Optimizer],
    theirs: type[Optimizer],
    further: dict[str, Any],
    layout: torch.memory_format,
    of_gradients: torch.memory_format,
) -> None:
    one = stepped(ours, layout, of_gradients, fused=True, **further)
    other = stepped(theirs, torch.contiguous_format, torch.contiguous_format, **further)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("ours", "_", "further"), PAIRS)
def test_a_step_copies_no_gradient(ours: type[Optimizer], _: Any, further: dict[str, Any]) -> None:
    parameters = weights(torch.channels_last)
    optimizer = ours(parameters, lr=0.1, fused=True, **further)  # type: ignore[call-arg]
    for one in parameters:
        one.grad = torch.ones_like(one)
    optimizer.step()  # which makes its state
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        optimizer.step()
    assert "aten::contiguous" not in {event.key for event in profiled.key_averages()}


@pytest.mark.parametrize("saved_in", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("ours", "theirs", "further"), PAIRS)
def test_a_state_of_another_layout_is_taken_up(
    ours: type[Optimizer],
    theirs: type[Optimizer],
    further: dict[str, Any],
    saved_in: torch.memory_format,
) -> None:
    """As where a training goes on on a CPU that began on a GPU."""
    found = []
    for kind, fused in ((ours, True), (theirs, False)):
        before, after = weights(saved_in), weights(torch.channels_last)
        begun, goes_on = (kind(w, lr=0.1, fused=fused, **further) for w in (before, after))  # type: ignore[call-arg]
        for optimizer, parameters in ((begun, before), (goes_on, after)):
            if optimizer is goes_on:
                goes_on.load_state_dict(begun.state_dict())
            generator = torch.Generator().manual_seed(2)
            for one in parameters:
                one.grad = torch.randn(one.shape, generator=generator).to(one)
            optimizer.step()
        found.append([one.detach() for one in after])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("ours", "_", "further"), PAIRS)
def test_a_closure_is_asked_once_and_its_loss_told(
    ours: type[Optimizer], _: Any, further: dict[str, Any]
) -> None:
    weight = nn.Parameter(torch.ones(4, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer, asked = ours([weight], lr=0.1, fused=True, **further), []  # type: ignore[call-arg]

    def closure() -> float:
        asked.append(1)
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    with torch.no_grad():
        assert optimizer.step(closure) == 144
    assert len(asked) == 1
    assert float(weight.detach().max()) < 1
