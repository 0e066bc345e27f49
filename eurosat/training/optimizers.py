"""Optimisers, their groups of parameters, and the schedule of their rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.overrides import TorchFunctionMode

from eurosat.config import OptimConfig
from eurosat.models.network import Network

MOMENTUM = 0.9


class _InOrder(TorchFunctionMode):
    """Gives fused steps their tensors in the order in which memory has them.

    PyTorch 2.13 copies each gradient that is channels last before a fused step on a CPU, which
    costs more than the step. It works on each number by itself, so that any order will do.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch._fused_sgd_, torch._fused_adamw_) and args[0][0].device.type == "cpu":
            orders = [_order(parameter) for parameter in args[0]]
            args = [_ordered(given, orders) if isinstance(given, list) else given for given in args]
        return func(*args, **(kwargs or {}))


def _order(parameter: Tensor) -> tuple[int, ...]:
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return 0, 2, 3, 1
    return tuple(range(parameter.ndim))


def _ordered(tensors: list[Tensor], orders: list[tuple[int, ...]]) -> list[Tensor]:
    """Views whose axes stand in these orders, of all but numbers, such as the count of steps."""
    return [
        tensor.permute(order) if tensor.ndim == len(order) else tensor
        for tensor, order in zip(tensors, orders, strict=False)  # a list that is not used is empty
    ]


def _laid_out(values: Tensor, parameter: Tensor) -> Tensor:
    """The same values in the memory order of ``parameter``: themselves, if they have it."""
    strides = zip(values.shape, values.stride(), parameter.stride(), strict=True)
    if all(ours == theirs for size, ours, theirs in strides if size > 1):
        return values
    return torch.empty_like(parameter.detach()).copy_(values)


class _InOrderStep(Optimizer):
    """A step whose gradients and state lie in memory as their parameters do.

    Where they do not, PyTorch 2.13 mixes up their numbers: with a gradient that somebody has set,
    or a state that was saved on a GPU.
    """

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = _laid_out(value, parameter)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = _laid_out(parameter.grad, parameter)
        with _InOrder():
            super().step()
        return loss


class InOrderSGD(_InOrderStep, SGD):
    """SGD whose fused step copies nothing."""


class InOrderAdamW(_InOrderStep, AdamW):
    """AdamW whose fused step copies nothing."""


def make_optimizer(network: Network, config: OptimConfig) -> Optimizer:
    """Weight decay on kernels only: on biases and norms it costs accuracy (He et al. 2019).

    Fused, the step passes over the weights once: half the time of the usual one on a CPU.
    """
    groups = [
        {
            "params": group["params"],
            "weight_decay": group["weight_decay"],
            "lr": config.lr * group.get("lr_scale", 1.0),
        }
        for group in _groups(network, config)
    ]
    if config.name == "sgd":
        return InOrderSGD(groups, lr=config.lr, momentum=MOMENTUM, nesterov=True, fused=True)
    return InOrderAdamW(groups, lr=config.lr, fused=True)


def _groups(network: Network, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, per stage of the backbone where rates differ.

    The head stands apart: while it learns alone, the momentum of all others is not there yet, and
    a fused step takes groups that have it or have it not.
    """
    from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay

    decay = config.weight_decay
    groups: list[dict[str, Any]]
    if config.layer_decay < 1:
        groups = param_groups_layer_decay(network.backbone, decay, layer_decay=config.layer_decay)
    else:
        groups = param_groups_weight_decay(network, decay)
    backbone: Any = network.backbone
    head = {id(p) for p in backbone.get_classifier().parameters()}
    parts = []
    for group in groups:
        for in_head in (False, True):
            some = [p for p in group["params"] if (id(p) in head) == in_head]
            parts += [{**group, "params": some}] if some else []
    return parts


def one_cycle(step: int, *, total: int, warmup: float) -> float:
    """Share of the peak rate: a line up over ``warmup`` of all steps, half a cosine down."""
    rise = warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * min((step - rise) / max(total - rise, 1), 1)))
