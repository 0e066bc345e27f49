"""A training step for benchmarks: a recipe's network on one random batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from eurosat.config import compose
from eurosat.models import network
from eurosat.models.compute import has_bf16
from eurosat.training.optimizers import make_optimizer


def make_step(
    recipe: str, forward_context: Callable[[], AbstractContextManager[object]] = nullcontext
) -> tuple[Callable[[], float], int]:
    """Return a step, which returns its loss, and its number of tiles.

    ``forward_context`` creates the context of the forward pass. It runs in bf16 if the processor
    has it.
    """
    config = compose([f"recipe={recipe}"])
    torch.manual_seed(0)
    spec = network.NetworkSpec(
        name=config.model.name,
        classes=tuple("abcdefghij"),
        bands=3,
        tile_size=(64, 64),
        input_size=config.model.input_size,
        norm="batch",
        drop_rate=0.0,
        mean=(100.0,) * 3,
        std=(50.0,) * 3,
    )
    net = network.build_untrained(spec).train()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(net, config.optim)
    tiles = torch.rand(config.optim.batch_size, 3, 64, 64) * 255
    labels = torch.randint(0, 10, (len(tiles),))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()), forward_context():
            loss = torch.nn.functional.cross_entropy(net(tiles).float(), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    return step, len(tiles)
