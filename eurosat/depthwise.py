"""Depthwise convolutions whose backward pass runs on fast CPU kernels.

On a CPU in bfloat16, PyTorch 2.13 (oneDNN) computes two gradients of a depthwise convolution with
its reference loops: of the input where the stride is above one, and of a weight wider than three
taps. Both can be said as forward convolutions, which have fast kernels. `make bench-depthwise`
measures what a training gains.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

WIDEST_NATIVE = 3
"""Taps a side up to which oneDNN has a fast kernel for the gradient of the weight."""


def fast_backward() -> AbstractContextManager[object]:
    """While it is entered under CPU autocast, depthwise convolutions take the fast way back."""
    return _FastBackward() if torch.is_autocast_enabled("cpu") else nullcontext()


class _FastBackward(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and _fits(*args):
            x_NCHW, weight_C1KK, bias, (stride, _), (padding, _), _, _ = args
            out_NCHW: Tensor = _Depthwise.apply(x_NCHW, weight_C1KK, stride, padding)  # type: ignore[no-untyped-call]
            return (
                out_NCHW if bias is None else out_NCHW + bias.to(out_NCHW.dtype).view(1, -1, 1, 1)
            )
        return func(*args, **(kwargs or {}))


def _fits(
    x: Tensor, weight: Tensor, _: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Depthwise on the CPU, the same along height and width, without dilation."""
    return (
        x.device.type == "cpu"
        and groups == x.shape[1] == weight.shape[0] > 1
        and weight.shape[2] == weight.shape[3]
        and all(isinstance(one, tuple) for one in (stride, padding, dilation))
        and len({*stride}) == len({*padding}) == 1
        and padding[0] < weight.shape[2]
        and {*dilation} == {1}
    )


class _Depthwise(torch.autograd.Function):
    """(N, C, H, W) and (C, 1, K, K) to (N, C, H', W'), each channel by its own kernel."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x_NCHW: Tensor, weight_C1KK: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_C1KK)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(x_NCHW, weight_C1KK, None, stride, padding, groups=weight_C1KK.shape[0])

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NCHW,) = gradients
        x_NCHW, weight_C1KK = ctx.saved_tensors
        wide, strided = weight_C1KK.shape[2] > WIDEST_NATIVE, ctx.stride > 1
        of_x, of_weight, *_ = torch.ops.aten.convolution_backward(
            grad_NCHW, x_NCHW, weight_C1KK, None, [ctx.stride] * 2, [ctx.padding] * 2, [1, 1],
            False, [0, 0], len(weight_C1KK),
            [ctx.needs_input_grad[0] and not strided, not wide, False],
        )  # fmt: skip
        if ctx.needs_input_grad[0] and strided:
            of_x = input_gradient(grad_NCHW, x_NCHW, weight_C1KK, ctx.stride, ctx.padding)
        if wide:
            of_weight = weight_gradient(grad_NCHW, x_NCHW, weight_C1KK, ctx.stride, ctx.padding)
        return of_x, of_weight, None, None


def input_gradient(
    grad_NCHW: Tensor, x_NCHW: Tensor, weight_C1KK: Tensor, stride: int, padding: int
) -> Tensor:
    """The gradient, spread out by the stride, convolved with the kernel turned by 180 degrees."""
    batch, channels, height, width = x_NCHW.shape
    size = weight_C1KK.shape[2]
    margin = size - 1 - padding
    spread_NCHW = grad_NCHW.new_zeros(
        batch, height + 2 * padding - size + 1, width + 2 * padding - size + 1, channels
    ).permute(0, 3, 1, 2)
    spread_NCHW[:, :, ::stride, ::stride] = grad_NCHW
    return torch.conv2d(spread_NCHW, weight_C1KK.flip(2, 3), None, 1, margin, 1, channels)


def weight_gradient(
    grad_NCHW: Tensor, x_NCHW: Tensor, weight_C1KK: Tensor, stride: int, padding: int
) -> Tensor:
    """Each tile's channel convolved with its gradient, summed over the tiles in float32."""
    batch, channels = grad_NCHW.shape[:2]
    size = weight_C1KK.shape[2]
    x_1MHW = x_NCHW.reshape(1, batch * channels, *x_NCHW.shape[2:]).contiguous()
    grad_M1HW = grad_NCHW.reshape(batch * channels, 1, *grad_NCHW.shape[2:]).contiguous()
    each_1MKK = functional.conv2d(
        x_1MHW, grad_M1HW, None, 1, padding, stride, batch * channels
    )[:, :, :size, :size]  # fmt: skip
    return each_1MKK.reshape(batch, channels, 1, size, size).sum(0, dtype=torch.float32)
