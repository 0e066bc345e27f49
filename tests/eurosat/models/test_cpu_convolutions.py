"""The fast convolutions give the outputs and gradients of PyTorch's own."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from eurosat.models import cpu_convolutions

CASES = [(3, 1, 1), (3, 2, 0), (3, 2, 1), (5, 1, 2), (5, 2, 0), (5, 2, 2), (7, 3, 1)]
"""Kernel, stride, padding."""
UP_TO_4_PIXELS = [
    (2, 3, 9, 1, 4),
    (3, 1, 9, 2, 4),
    (2, 2, 3, 1, 1),
    (4, 4, 3, 2, 1),
    (5, 4, 3, 2, 1),
    (4, 2, 1, 2, 0),
    (3, 3, 3, 1, 0),
    (1, 4, 1, 1, 0),
]
UP_TO_16_PIXELS = [(4, 4, 3, 1, 1), (8, 7, 3, 2, 1), (9, 9, 5, 2, 1), (3, 5, 1, 1, 0)]
"""Height, width, kernel, stride and padding with at most 4, and at most 16, output pixels."""


def gradients(
    size: int,
    kernel: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output and gradients of a depthwise convolution, with bfloat16 under autocast."""
    generator = torch.Generator().manual_seed(kernel * 100 + size)
    low = dtype == torch.bfloat16
    exact = torch.float32 if low else dtype
    x = torch.randn(6, 8, size, size, generator=generator).to(exact).requires_grad_()
    weight = torch.randn(8, 1, kernel, kernel, generator=generator).to(exact).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low), cpu_convolutions.fast():
        out = torch.conv2d(x, weight, None, (stride,) * 2, (padding,) * 2, (1, 1), 8)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert weight.grad is not None
    return out.detach(), x.grad, weight.grad


@pytest.mark.parametrize(("kernel", "stride", "padding"), CASES)
@pytest.mark.parametrize("size", [9, 12])
def test_depthwise_gradients_match_those_in_float64(
    kernel: int, stride: int, padding: int, size: int
) -> None:
    fast = gradients(size, kernel, stride, padding, torch.bfloat16)
    exact = gradients(size, kernel, stride, padding, torch.float64)
    for actual, expected in zip(fast, exact, strict=True):
        scale = float(expected.abs().max())
        assert float((actual.double() - expected).abs().max()) < 0.02 * scale


def dense(
    case: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    *,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output and gradients of a convolution over all channels."""
    high, wide, kernel, stride, padding = case
    generator = torch.Generator().manual_seed(sum(case))
    low = dtype == torch.bfloat16
    exact = torch.float32 if low else dtype
    x = torch.randn(6, 8, high, wide, generator=generator).to(exact)
    weight = torch.randn(5, 8, kernel, kernel, generator=generator).to(exact)
    x, weight = (t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight))
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=low),
        cpu_convolutions.fast() if fast else nullcontext(),
    ):
        out = torch.conv2d(x, weight, None, (stride,) * 2, (padding,) * 2, (1, 1), 1)
    assert (type(out.grad_fn).__name__ == "_ProductConvBackward") == fast
    (out * torch.randn(out.shape, generator=generator)).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert weight.grad is not None
    return out.detach(), x.grad, weight.grad


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("case", [*UP_TO_4_PIXELS, *UP_TO_16_PIXELS])
def test_a_convolution_with_few_output_pixels_matches_float64(
    case: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    tolerance: float,
    layout: torch.memory_format,
) -> None:
    fast = dense(case, dtype, layout, fast=True)
    reference = dense(case, torch.float64, torch.contiguous_format, fast=False)
    for actual, expected in zip(fast, reference, strict=True):
        assert actual.shape == expected.shape
        difference = float((actual.double() - expected).abs().max())
        assert difference <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("size", [2, 4])
def test_the_next_layer_may_write_into_the_output(size: int) -> None:
    x, weight = torch.randn(2, 4, size, size), torch.randn(4, 4, 3, 3).requires_grad_()
    with cpu_convolutions.fast():
        out = torch.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
        out.relu_().sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None


def test_an_empty_batch_is_accepted() -> None:
    with cpu_convolutions.fast():
        layer = torch.nn.Conv2d(4, 5, 3, padding=1, bias=False)
        assert layer(torch.zeros(0, 4, 2, 2)).shape == (0, 5, 2, 2)


def test_frozen_tensors_get_no_gradient() -> None:
    for frozen in ("x", "weight"):
        x, weight = torch.randn(2, 4, 2, 2), torch.randn(4, 4, 3, 3)
        trainable = weight if frozen == "x" else x
        trainable.requires_grad_()
        with cpu_convolutions.fast():
            out = torch.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
        out.sum().backward()  # type: ignore[no-untyped-call]
        assert trainable.grad is not None
        assert (x if frozen == "x" else weight).grad is None


def test_only_small_dense_convolutions_become_matrix_products() -> None:
    def backward_of(
        size: int, *, groups: int = 1, padding: int | str = 1, dilation: int = 1
    ) -> str:
        layer = torch.nn.Conv2d(4, 4, 3, padding=padding, groups=groups, dilation=dilation)
        with cpu_convolutions.fast():
            return type(layer(torch.randn(2, 4, size, size)).grad_fn).__name__

    stock, product = "ConvolutionBackward0", "AddBackward0"  # the bias is added last
    assert backward_of(2) == product
    assert backward_of(4) == product
    assert backward_of(5) == stock, "too many pixels"
    assert backward_of(2, groups=2) == stock
    assert backward_of(2, padding="same") == stock
    assert backward_of(4, padding=2, dilation=2) == stock


def test_depthwise_convolutions_are_replaced_only_under_autocast() -> None:
    x = torch.randn(2, 4, 8, 8)

    def backward_of(channels: int, groups: int, *, padding: int | str = 2) -> str:
        layer = torch.nn.Conv2d(4, channels, 5, padding=padding, groups=groups, bias=False)
        with cpu_convolutions.fast():
            return type(layer(x).grad_fn).__name__

    stock = "ConvolutionBackward0"
    assert backward_of(4, 4) == stock
    with torch.autocast("cpu", torch.bfloat16):
        assert backward_of(4, 4) == "_DepthwiseConvBackward"
        assert backward_of(4, 1) == stock
        assert backward_of(8, 4) == stock
        assert backward_of(4, 4, padding="same") == stock
        assert backward_of(4, 4, padding=5) == stock, "more padding than the kernel has taps"


def test_a_bias_is_added_and_gets_its_gradient() -> None:
    layer = torch.nn.Conv2d(4, 4, 7, padding=3, groups=4)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        stock = layer(x)
        with cpu_convolutions.fast():
            fast = layer(x)
    torch.testing.assert_close(fast, stock, rtol=0.02, atol=0.02)
    fast.sum().backward()
    assert layer.bias is not None
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 128.0))


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18"])
def test_a_network_gets_the_same_gradients(name: str, low: bool) -> None:
    from eurosat.models.network import NetworkSpec, build_untrained

    spec = NetworkSpec(
        name=name,
        classes=("a", "b"),
        bands=3,
        tile_size=(64, 64),
        input_size=None,
        norm="batch",
        drop_rate=0.0,
        mean=(0.0,) * 3,
        std=(255.0,) * 3,
    )
    torch.manual_seed(0)
    network = build_untrained(spec).train()
    tiles = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    both = []
    for fast in (False, True):
        network.zero_grad()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=low),
            cpu_convolutions.fast() if fast else nullcontext(),
        ):
            out = network(tiles)
        loss = functional.cross_entropy(out.float(), torch.arange(16) % 2)
        loss.backward()  # type: ignore[no-untyped-call]
        both.append(torch.cat([p.grad.flatten() for p in network.parameters()]).double())  # type: ignore[union-attr]
    similarity = functional.cosine_similarity(both[0], both[1], dim=0)
    assert float(similarity) > (0.98 if low else 0.9999)
