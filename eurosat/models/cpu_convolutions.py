"""Convolutions and their gradients on faster CPU kernels.

PyTorch 2.13 runs convolutions on a CPU with oneDNN, which is slow in two cases:

- On maps of few pixels, such as the last stages of a ResNet on small tiles (2 x 2 pixels on tiles
  of 64), it takes many times as long as the matrix product that the convolution is.
- In bfloat16, it uses reference loops for two gradients of a depthwise convolution: that of the
  input if the stride is above one, and that of a kernel wider than three taps. Both can be computed
  as forward convolutions, which have fast kernels.

The choice depends on the shapes alone and never on a measurement, so that a resumed training
computes what an uninterrupted one does. `make bench-convolutions` measures the speed-up.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MAX_PRODUCT_PIXELS = 4
"""Output maps of up to this many pixels are computed as one matrix product, gradients included."""
MAX_WEIGHT_PRODUCT_PIXELS = 16
"""Up to this many output pixels, the gradient of the weight is computed as a matrix product."""
MAX_NATIVE_KERNEL = 3
"""Largest depthwise kernel (height or width) with a fast weight gradient in oneDNN."""


def fast() -> AbstractContextManager[object]:
    """Return a context in which convolutions on a CPU, and their gradients, are fast.

    With a GPU it changes nothing, since trainings run there.
    """
    return nullcontext() if _has_gpu() else _FastConvolutions()


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()  # takes half a millisecond


class _FastConvolutions(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and _is_supported(*args):
            x_NCHW, weight, bias, (stride, _), (padding, _), _, groups = args
            out_NCHW = _fast_conv2d(x_NCHW, weight, stride, padding, groups)
            if out_NCHW is not None and bias is None:
                return out_NCHW
            if out_NCHW is not None:
                return out_NCHW + bias.to(out_NCHW.dtype).view(1, -1, 1, 1)
        return func(*args, **(kwargs or {}))


def _is_supported(
    x: Tensor, weight: Tensor, _: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Return whether the convolution is on the CPU, square and without dilation."""
    return (
        x.device.type == "cpu"
        and x.ndim == 4
        and weight.shape[2] == weight.shape[3]
        and all(isinstance(sizes, tuple) for sizes in (stride, padding, dilation))
        and len({*stride}) == len({*padding}) == 1
        and padding[0] < weight.shape[2]
        and {*dilation} == {1}
    )


def _fast_conv2d(
    x_NCHW: Tensor, weight: Tensor, stride: int, padding: int, groups: int
) -> Tensor | None:
    """Return the output without bias, or None if oneDNN's own kernel is fast for it."""
    out_NCHW: Tensor
    if groups == x_NCHW.shape[1] == len(weight) > 1:
        if not torch.is_autocast_enabled("cpu"):
            return None
        out_NCHW = _DepthwiseConv.apply(x_NCHW, weight, stride, padding)  # type: ignore[no-untyped-call]
        return out_NCHW
    height, width = _output_size(x_NCHW, weight, stride, padding)
    if groups > 1 or min(height, width) < 1 or height * width > MAX_WEIGHT_PRODUCT_PIXELS:
        return None
    out_NCHW = _ProductConv.apply(x_NCHW, weight, stride, padding)  # type: ignore[no-untyped-call]
    return out_NCHW


def _output_size(x_NCHW: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    """Return the height and width of the output map."""
    size = weight.shape[2]
    height, width = ((side + 2 * padding - size) // stride + 1 for side in x_NCHW.shape[2:])
    return height, width


class _ProductConv(torch.autograd.Function):
    """Maps (N, C, H, W) and weights (D, C, K, K) to (N, D, H', W') by a matrix product.

    The factors are the M = N H' W' patches, (M, K K C), and the weights, (K K C, D).
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x_NCHW: Tensor, weight_DCKK: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_DCKK)
        ctx.stride, ctx.padding = stride, padding
        height, width = _output_size(x_NCHW, weight_DCKK, stride, padding)
        ctx.all_products = height * width <= MAX_PRODUCT_PIXELS
        if not ctx.all_products:
            return torch.conv2d(x_NCHW, weight_DCKK, None, stride, padding)
        out_NDHW = torch.empty(
            (len(x_NCHW), len(weight_DCKK), height, width),
            dtype=x_NCHW.dtype,
            memory_format=torch.channels_last,
        )
        patches_MP = _patches(x_NCHW, weight_DCKK, stride, padding)
        # The output is no view: the next layer may write into it.
        torch.mm(patches_MP, _weight_rows(weight_DCKK).T, out=_pixel_rows(out_NDHW))
        return out_NDHW

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NDHW,) = gradients
        x_NCHW, weight_DCKK = ctx.saved_tensors
        shape = (ctx.stride, ctx.padding)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0] and ctx.all_products:
            grad_x = _product_input_gradient(grad_NDHW, x_NCHW, weight_DCKK, *shape)
        elif ctx.needs_input_grad[0]:
            grad_x, *_ = torch.ops.aten.convolution_backward(
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
            rows_DP = _pixel_rows(grad_NDHW).T @ _patches(x_NCHW, weight_DCKK, *shape)
            grad_weight = rows_DP.view(weight_DCKK.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return grad_x, grad_weight, None, None


def _patches(x_NCHW: Tensor, weight_DCKK: Tensor, stride: int, padding: int) -> Tensor:
    """Return the input patch of each output pixel, (M, K K C), with zeros beyond the edges."""
    batch, channels = x_NCHW.shape[:2]
    size = weight_DCKK.shape[2]
    x_NHWC = x_NCHW.permute(0, 2, 3, 1)
    if padding:
        x_NHWC = functional.pad(x_NHWC, (0, 0, padding, padding, padding, padding))
    step_n, step_h, step_w, step_c = x_NHWC.stride()
    height, width = _output_size(x_NCHW, weight_DCKK, stride, padding)
    patches = x_NHWC.as_strided(
        (batch, height, width, size, size, channels),
        (step_n, step_h * stride, step_w * stride, step_h, step_w, step_c),
    )
    return patches.reshape(batch * height * width, size * size * channels)


def _weight_rows(weight_DCKK: Tensor) -> Tensor:
    """Return the weights as (D, K K C): a view if they are channels last."""
    return weight_DCKK.permute(0, 2, 3, 1).reshape(len(weight_DCKK), -1)


def _pixel_rows(map_NDHW: Tensor) -> Tensor:
    """Return a map as (M, D), one row per pixel: a view if it is channels last."""
    return map_NDHW.permute(0, 2, 3, 1).reshape(-1, map_NDHW.shape[1])


def _product_input_gradient(
    grad_NDHW: Tensor, x_NCHW: Tensor, weight_DCKK: Tensor, stride: int, padding: int
) -> Tensor:
    """Return the gradient of the input, (N, C, H, W).

    The gradient of the patches is added, tap by tap, at the pixels that the patches came from. Sums
    are in float32 at least.
    """
    batch, channels, height, width = x_NCHW.shape
    size, (out_height, out_width) = weight_DCKK.shape[2], grad_NDHW.shape[2:]
    grad_patches = (_pixel_rows(grad_NDHW) @ _weight_rows(weight_DCKK)).view(
        batch, out_height, out_width, size, size, channels
    )
    sum_NHWC = grad_NDHW.new_zeros(
        (batch, height, width, channels),
        dtype=torch.promote_types(grad_NDHW.dtype, torch.float32),
    )
    for i in range(size):
        out_h, in_h = _tap_slices(i - padding, stride, out_height, height)
        for j in range(size):
            out_w, in_w = _tap_slices(j - padding, stride, out_width, width)
            sum_NHWC[:, in_h, in_w] += grad_patches[:, out_h, out_w, i, j]
    return sum_NHWC.to(grad_NDHW.dtype).permute(0, 3, 1, 2)


def _tap_slices(shift: int, stride: int, count: int, side: int) -> tuple[slice, slice]:
    """Return the output pixels whose tap lies inside the input, and these input pixels.

    ``shift`` is the tap's offset from an output pixel, ``count`` the number of output pixels and
    ``side`` of input pixels, all along one axis.
    """
    first = max(0, -(shift // stride))
    last = min(count - 1, (side - 1 - shift) // stride)
    start = first * stride + shift
    inside = max(0, last - first + 1)
    return slice(first, first + inside), slice(start, start + inside * stride, stride)


class _DepthwiseConv(torch.autograd.Function):
    """Maps (N, C, H, W) and weights (C, 1, K, K) to (N, C, H', W'), one kernel per channel."""

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
        shape = (ctx.stride, ctx.padding)
        wide, strided = weight_C1KK.shape[2] > MAX_NATIVE_KERNEL, ctx.stride > 1
        grad_x, grad_weight, *_ = torch.ops.aten.convolution_backward(
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
            grad_x = _depthwise_input_gradient(grad_NCHW, x_NCHW, weight_C1KK, *shape)
        if wide:
            grad_weight = _depthwise_weight_gradient(grad_NCHW, x_NCHW, weight_C1KK, *shape)
        return grad_x, grad_weight, None, None


def _depthwise_input_gradient(
    grad_NCHW: Tensor, x_NCHW: Tensor, weight_C1KK: Tensor, stride: int, padding: int
) -> Tensor:
    """Return the gradient of the input, (N, C, H, W).

    It is the output's gradient, spread out by the stride, convolved with the kernel turned by 180
    degrees.
    """
    batch, channels, height, width = x_NCHW.shape
    size = weight_C1KK.shape[2]
    margin = size - 1 - padding
    spread_NCHW = grad_NCHW.new_zeros(
        batch, height + 2 * padding - size + 1, width + 2 * padding - size + 1, channels
    ).permute(0, 3, 1, 2)
    spread_NCHW[:, :, ::stride, ::stride] = grad_NCHW
    return torch.conv2d(spread_NCHW, weight_C1KK.flip(2, 3), None, 1, margin, 1, channels)


def _depthwise_weight_gradient(
    grad_NCHW: Tensor, x_NCHW: Tensor, weight_C1KK: Tensor, stride: int, padding: int
) -> Tensor:
    """Return the gradient of the weight, (C, 1, K, K).

    Each channel of each tile is convolved with its gradient; the results are summed in float32.
    """
    batch, channels = grad_NCHW.shape[:2]
    size = weight_C1KK.shape[2]
    x_1MHW = x_NCHW.reshape(1, batch * channels, *x_NCHW.shape[2:]).contiguous()
    grad_M1HW = grad_NCHW.reshape(batch * channels, 1, *grad_NCHW.shape[2:]).contiguous()
    products_1MKK = functional.conv2d(
        x_1MHW, grad_M1HW, None, 1, padding, stride, batch * channels
    )[:, :, :size, :size]
    return products_1MKK.reshape(batch, channels, 1, size, size).sum(0, dtype=torch.float32)
