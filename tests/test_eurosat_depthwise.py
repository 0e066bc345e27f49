"""Depthwise convolutions with a fast backward pass give the gradients of PyTorch's own."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from eurosat import depthwise

CASES = [(3, 1, 1), (3, 2, 0), (3, 2, 1), (5, 1, 2), (5, 2, 0), (5, 2, 2), (7, 3, 1)]
"""Kernel, stride, padding."""


def gradients(
    size: int, kernel: int, stride: int, padding: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients, in ``dtype`` throughout or (bfloat16) under autocast."""
    generator = torch.Generator().manual_seed(kernel * 100 + size)
    low = dtype == torch.bfloat16
    exact = torch.float32 if low else dtype
    x = torch.randn(6, 8, size, size, generator=generator).to(exact).requires_grad_()
    weight = torch.randn(8, 1, kernel, kernel, generator=generator).to(exact).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low), depthwise.fast_backward():
        out = torch.conv2d(x, weight, None, (stride,) * 2, (padding,) * 2, (1, 1), 8)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert weight.grad is not None
    return out.detach(), x.grad, weight.grad


@pytest.mark.parametrize(("kernel", "stride", "padding"), CASES)
@pytest.mark.parametrize("size", [9, 12])
def test_gradients_are_those_of_float64(kernel: int, stride: int, padding: int, size: int) -> None:
    fast = gradients(size, kernel, stride, padding, torch.bfloat16)
    exact = gradients(size, kernel, stride, padding, torch.float64)
    for ours, theirs in zip(fast, exact, strict=True):
        scale = float(theirs.abs().max())
        assert float((ours.double() - theirs).abs().max()) < 0.02 * scale


def test_the_fast_way_is_taken_under_autocast_and_nowhere_else() -> None:
    x = torch.randn(2, 4, 8, 8)

    def way(channels: int, groups: int, *, padding: int | str = 2) -> str:
        layer = torch.nn.Conv2d(4, channels, 5, padding=padding, groups=groups, bias=False)
        with depthwise.fast_backward():
            return type(layer(x).grad_fn).__name__

    usual = "ConvolutionBackward0"
    assert way(4, 4) == usual
    with torch.autocast("cpu", torch.bfloat16):
        assert way(4, 4) == "_DepthwiseBackward"
        assert way(4, 1) == usual
        assert way(8, 4) == usual
        assert way(4, 4, padding="same") == usual
        assert way(4, 4, padding=5) == usual, "more padding than the kernel has taps"


def test_a_bias_is_added_and_learns() -> None:
    layer = torch.nn.Conv2d(4, 4, 7, padding=3, groups=4)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        usual = layer(x)
        with depthwise.fast_backward():
            fast = layer(x)
    torch.testing.assert_close(fast, usual, rtol=0.02, atol=0.02)
    fast.sum().backward()
    assert layer.bias is not None
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 128.0))


def test_a_network_under_it_learns_the_same() -> None:
    from eurosat.network import NetworkSpec, untrained

    spec = NetworkSpec(
        name="tf_efficientnet_lite0", classes=("a", "b"), bands=3, tile_size=(32, 32),
        input_size=None, norm="batch", drop_rate=0.0, mean=(0.0,) * 3, std=(255.0,) * 3,
    )  # fmt: skip
    torch.manual_seed(0)
    network = untrained(spec).train()
    tiles = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    found = []
    for fast in (False, True):
        network.zero_grad()
        with (
            torch.autocast("cpu", torch.bfloat16),
            depthwise.fast_backward() if fast else nullcontext(),
        ):
            out = network(tiles)
        loss = functional.cross_entropy(out.float(), torch.arange(8) % 2)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))  # type: ignore[union-attr]
    similarity = functional.cosine_similarity(found[0], found[1], dim=0)
    assert float(similarity) > 0.99
