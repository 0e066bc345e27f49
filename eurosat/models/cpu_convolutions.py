"""Convolutions, each on a CPU kernel that is fast for it, and their gradients.

oneDNN, to which PyTorch 2.13 gives a convolution on a CPU, is slow in two places:

- On maps of few pixels, as the last stages of a ResNet have on small tiles (2 x 2 pixels on 64), it
  takes many times as long as the matrix product that a convolution is.
- In bfloat16, two gradients of a depthwise convolution are its reference loops: of the input where
  the stride is above one, and of a weight wider than three taps. Both can be said as forward
  convolutions, which have fast kernels.

The way is chosen by shapes, and never by a measurement, so that a training that is continued
computes what it would have.
`make bench-convolutions` measures what a training gains.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PRODUCT_PIXELS = 4
"""Pixels of a map that is put out, up to which all of a convolution is a matrix product."""
WEIGHT_PIXELS = 16
"""Up to which the gradient of its weight is one."""
WIDEST_NATIVE = 3
"""Taps a side up to which oneDNN has a fast kernel for the gradient of a depthwise weight."""


def fast() -> AbstractContextManager[object]:
    """While it is entered, convolutions on a CPU take the fast way, there and back.

    Where there is a GPU nothing changes: trainings are there.
    """
    return nullcontext() if _has_gpu() else _Fast()


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()  # half a millisecond each time


class _Fast(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and _square(*args):
            x_NCHW, weight, bias, (stride, _), (padding, _), _, groups = args
            out_NCHW = _faster(x_NCHW, weight, stride, padding, groups)
            if out_NCHW is not None:
                return (
                    out_NCHW
                    if bias is None
                    else out_NCHW + bias.to(out_NCHW.dtype).view(1, -1, 1, 1)
                )
        return func(*args, **(kwargs or {}))


def _square(
    x: Tensor, weight: Tensor, _: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """On the CPU, the same along height and width, without dilation."""
    return (
        x.device.type == "cpu"
        and x.ndim == 4
        and weight.shape[2] == weight.shape[3]
        and all(isinstance(one, tuple) for one in (stride, padding, dilation))
        and len({*stride}) == len({*padding}) == 1
        and padding[0] < weight.shape[2]
        and {*dilation} == {1}
    )


def _faster(
    x_NCHW: Tensor, weight: Tensor, stride: int, padding: int, groups: int
) -> Tensor | None:
    """Without the bias; None where oneDNN's own way is the fast one."""
    out_NCHW: Tensor
    if groups == x_NCHW.shape[1] == len(weight) > 1:
        if not torch.is_autocast_enabled("cpu"):
            return None
        out_NCHW = _Depthwise.apply(x_NCHW, weight, stride, padding)  # type: ignore[no-untyped-call]
        return out_NCHW
    height, width = _put_out(x_NCHW, weight, stride, padding)
    if groups > 1 or min(height, width) < 1 or height * width > WEIGHT_PIXELS:
        return None
    out_NCHW = _AsProduct.apply(x_NCHW, weight, stride, padding)  # type: ignore[no-untyped-call]
    return out_NCHW


def _put_out(x_NCHW: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    """Height and width of the map."""
    high, wide = ((side + 2 * padding - weight.shape[2]) // stride + 1 for side in x_NCHW.shape[2:])
    return high, wide


class _AsProduct(torch.autograd.Function):
    """(N, C, H, W) and (D, C, K, K) to (N, D, H', W'): the patches (M, K K C) times the weight."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x_NCHW: Tensor, weight_DCKK: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_DCKK)
        ctx.stride, ctx.padding = stride, padding
        height, width = _put_out(x_NCHW, weight_DCKK, stride, padding)
        ctx.wholly = height * width <= PRODUCT_PIXELS
        if not ctx.wholly:
            return torch.conv2d(x_NCHW, weight_DCKK, None, stride, padding)
        out_NDHW = torch.empty(
            (len(x_NCHW), len(weight_DCKK), height, width),
            dtype=x_NCHW.dtype,
            memory_format=torch.channels_last,
        )
        patches_MP = _patches(x_NCHW, weight_DCKK, stride, padding)
        # No view is given back: whoever follows may write into it.
        torch.mm(patches_MP, _rows(weight_DCKK).T, out=_by_pixel(out_NDHW))
        return out_NDHW

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NDHW,) = gradients
        x_NCHW, weight_DCKK = ctx.saved_tensors
        shape = (ctx.stride, ctx.padding)
        of_x = of_weight = None
        if ctx.needs_input_grad[0] and ctx.wholly:
            of_x = _input_gradient_of_patches(grad_NDHW, x_NCHW, weight_DCKK, *shape)
        elif ctx.needs_input_grad[0]:
            of_x, *_ = torch.ops.aten.convolution_backward(
                grad_NDHW,
                x_NCHW,
                weight_DCKK,
                None,
                [ctx.stride] * 2,
                [ctx.padding] * 2,
                [1, 1],
                False,
                [0, 0],
                1,
                [True, False, False],
            )
        if ctx.needs_input_grad[1]:
            rows_DP = _by_pixel(grad_NDHW).T @ _patches(x_NCHW, weight_DCKK, *shape)
            of_weight = rows_DP.view(weight_DCKK.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return of_x, of_weight, None, None


def _patches(x_NCHW: Tensor, weight_DCKK: Tensor, stride: int, padding: int) -> Tensor:
    """(M, K K C): what each pixel that is put out sees, with zeros beyond the edges."""
    batch, channels = x_NCHW.shape[:2]
    size = weight_DCKK.shape[2]
    x_NHWC = x_NCHW.permute(0, 2, 3, 1)
    if padding:
        x_NHWC = functional.pad(x_NHWC, (0, 0, padding, padding, padding, padding))
    of_n, of_h, of_w, of_c = x_NHWC.stride()
    high, wide = _put_out(x_NCHW, weight_DCKK, stride, padding)
    return x_NHWC.as_strided(
        (batch, high, wide, size, size, channels),
        (of_n, of_h * stride, of_w * stride, of_h, of_w, of_c),
    ).reshape(batch * high * wide, size * size * channels)


def _rows(weight_DCKK: Tensor) -> Tensor:
    """(D, K K C), a view of a weight that is channels last."""
    return weight_DCKK.permute(0, 2, 3, 1).reshape(len(weight_DCKK), -1)


def _by_pixel(map_NDHW: Tensor) -> Tensor:
    """(M, D), a view of a map that is channels last."""
    return map_NDHW.permute(0, 2, 3, 1).reshape(-1, map_NDHW.shape[1])


def _input_gradient_of_patches(
    grad_NDHW: Tensor, x_NCHW: Tensor, weight_DCKK: Tensor, stride: int, padding: int
) -> Tensor:
    """The gradient of the patches, each tap added where it was taken from, in float32 at least."""
    batch, channels, height, width = x_NCHW.shape
    size, (high, wide) = weight_DCKK.shape[2], grad_NDHW.shape[2:]
    each = (_by_pixel(grad_NDHW) @ _rows(weight_DCKK)).view(batch, high, wide, size, size, channels)
    sum_NHWC = grad_NDHW.new_zeros(
        (batch, height, width, channels),
        dtype=torch.promote_types(grad_NDHW.dtype, torch.float32),
    )
    for i in range(size):
        of_h, to_h = _inside(i - padding, stride, high, height)
        for j in range(size):
            of_w, to_w = _inside(j - padding, stride, wide, width)
            sum_NHWC[:, to_h, to_w] += each[:, of_h, of_w, i, j]
    return sum_NHWC.to(grad_NDHW.dtype).permute(0, 3, 1, 2)


def _inside(shift: int, stride: int, count: int, side: int) -> tuple[slice, slice]:
    """Of ``count`` pixels those whose tap lies within the ``side``, and where it lies."""
    first = max(0, -(shift // stride))
    last = min(count - 1, (side - 1 - shift) // stride)
    start = first * stride + shift
    some = max(0, last - first + 1)
    return slice(first, first + some), slice(start, start + some * stride, stride)


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
            grad_NCHW,
            x_NCHW,
            weight_C1KK,
            None,
            [ctx.stride] * 2,
            [ctx.padding] * 2,
            [1, 1],
            False,
            [0, 0],
            len(weight_C1KK),
            [ctx.needs_input_grad[0] and not strided, not wide, False],
        )
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
    each_1MKK = functional.conv2d(x_1MHW, grad_M1HW, None, 1, padding, stride, batch * channels)[
        :, :, :size, :size
    ]
    return each_1MKK.reshape(batch, channels, 1, size, size).sum(0, dtype=torch.float32)
