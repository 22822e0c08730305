"""Deformable aggregation on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NoReturn

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from deformconv.ops.aggregate.spec import Gradients
from deformconv.ops.words import unexpected
from deformconv.torch import calls
from deformconv.torch.aggregate import DEFORM_AGGREGATE

__all__ = ["deform_aggregate", "deform_aggregate1d", "deform_aggregate2d", "deform_aggregate3d", "deform_aggregate_backward"]


def deform_aggregate2d(
    input: Tensor, offset: Tensor, mask: Tensor | None = None, kernel_size: Any = 3, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, *, offset_groups: int | None = None, boundary: str = "zeros", backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor:  # fmt: skip
    """Add up, in each channel, the samples of a window whose taps are moved by `offset` and weighed by `mask`.

    Deformable convolution without its weight: what DCNv3 and DCNv4 compute between their projections. A channel is added up
    with the mask of its offset group, and no channel is mixed with another. On the CPU and on GPUs it runs compiled kernels,
    forward and backward, also under `torch.compile` and `torch.func`, and reads and writes channels-first and channels-last
    memory as it is; other devices, higher derivatives and forward mode run PyTorch operations. The formula is in
    `deformconv.deform_aggregate`.

    Args:
        input: shape (N, C, H, W). Or (C, H, W), one image, with `offset` and `mask` without N as well.
        offset: shape (N, offset_groups*2*K, H_out, W_out), in input pixels, for the K taps of the window; group-major, then
            tap (row-major), then dy before dx.
        mask: shape (N, offset_groups*K, H_out, W_out), a factor for every sample; None for 1.
        kernel_size: the window's taps along each axis, an int or two.
        stride: an int or two, in input pixels.
        padding: an int, two, pairs ((top, bottom), (left, right)), "same" or "valid", in input pixels.
        dilation: the distance between taps, an int or two, in input pixels.
        offset_groups: verified when given, else inferred from `offset`.
        boundary: "zeros" or "inside", as in `deformconv.deform_conv`.
        backend: "cpu", "gpu" or "portable"; None takes the first that can run the call.

    Returns:
        The output, shape (N, C, H_out, W_out), of the dtype and on the device of `input`, and in its memory format.

    Raises:
        ShapeError: a shape or a parameter's value does not fit.
        TypeError: an argument is no tensor, or not of the common floating-point dtype; only beside an `input` in half precision
            `offset` and `mask` may be float32.
        ValueError: `boundary` or `backend` is unknown, or the tensors are on different devices.
        BackendError: the named backend cannot run the call.

    Example:
        >>> import torch
        >>> from deformconv.torch import deform_aggregate2d
        >>> x = torch.rand(2, 64, 28, 28)
        >>> offset = torch.zeros(2, 4 * 18, 28, 28, requires_grad=True)     # 4 groups, each 9 taps of 2 axes
        >>> mask = torch.full((2, 4 * 9, 28, 28), 1 / 9)
        >>> y = deform_aggregate2d(x, offset, mask, padding=1)
        >>> torch.allclose(y, torch.nn.functional.avg_pool2d(x, 3, 1, 1), atol=1e-5)
        True
        >>> y.sum().backward()
        >>> offset.grad.shape
        torch.Size([2, 72, 28, 28])

    Papers: DCNv3, arXiv 2211.05778, equation 2; DCNv4, arXiv 2401.06197.
    """
    if unknown:
        raise unexpected(deform_aggregate2d, unknown)
    parameters = (kernel_size, stride, padding, dilation, offset_groups, boundary)
    return _call(deform_aggregate2d, 2, (input, offset, mask), parameters, backend)


def deform_aggregate1d(
    input: Tensor, offset: Tensor, mask: Tensor | None = None, kernel_size: Any = 3, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, *, offset_groups: int | None = None, boundary: str = "zeros", backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor:  # fmt: skip
    """`deform_aggregate2d` for signals: input (N, C, W), offset (N, offset_groups*K, W_out). All is explained there.

    Example:
        >>> import torch
        >>> from deformconv.torch import deform_aggregate1d
        >>> x, offset = torch.rand(4, 16, 200), torch.zeros(4, 2 * 5, 200)  # 2 groups of 5 taps
        >>> deform_aggregate1d(x, offset, kernel_size=5, padding=2).shape
        torch.Size([4, 16, 200])
    """
    if unknown:
        raise unexpected(deform_aggregate1d, unknown)
    parameters = (kernel_size, stride, padding, dilation, offset_groups, boundary)
    return _call(deform_aggregate1d, 1, (input, offset, mask), parameters, backend)


def deform_aggregate3d(
    input: Tensor, offset: Tensor, mask: Tensor | None = None, kernel_size: Any = 3, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, *, offset_groups: int | None = None, boundary: str = "zeros", backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor:  # fmt: skip
    """`deform_aggregate2d` for volumes: input (N, C, D, H, W); a tap's offsets are for depth, height, width.

    Example:
        >>> import torch
        >>> from deformconv.torch import deform_aggregate3d
        >>> x, offset = torch.rand(1, 4, 8, 16, 16), torch.zeros(1, 81, 8, 16, 16)  # 3 axes x 27 taps
        >>> deform_aggregate3d(x, offset, padding=1).shape
        torch.Size([1, 4, 8, 16, 16])
    """
    if unknown:
        raise unexpected(deform_aggregate3d, unknown)
    parameters = (kernel_size, stride, padding, dilation, offset_groups, boundary)
    return _call(deform_aggregate3d, 3, (input, offset, mask), parameters, backend)


def deform_aggregate(
    input: Tensor, offset: Tensor, mask: Tensor | None = None, kernel_size: Any = 3, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, *, offset_groups: int | None = None, boundary: str = "zeros", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`deformconv.deform_aggregate` on tensors: the rank is that of `input`."""
    parameters = (kernel_size, stride, padding, dilation, offset_groups, boundary)
    return _call(deform_aggregate, None, (input, offset, mask), parameters, backend)


def deform_aggregate_backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None = None, kernel_size: Any = 3, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, *, offset_groups: int | None = None, boundary: str = "zeros",
    backend: str | None = None, wanted: Collection[str] | None = None,
) -> Gradients:  # fmt: skip
    """`deformconv.deform_aggregate_backward` on tensors; its result has a gradient if a tensor requires one."""
    parameters, operands = (kernel_size, stride, padding, dilation, offset_groups, boundary), (input, offset, mask)
    found: Gradients = calls.backward(DEFORM_AGGREGATE, backend, parameters, grad_output, operands, wanted)
    return found


def _call(
    function: Callable[..., Tensor],
    rank: int | None,
    operands: tuple[Tensor, Tensor, Tensor | None],
    parameters: tuple[Any, ...],
    backend: str | None,
) -> Tensor:
    """What all public functions do; `function` is the one that was called."""
    if has_torch_function(operands):
        *window, offset_groups, boundary = parameters
        result: Tensor = handle_torch_function(
            function, operands, *operands, *window, offset_groups=offset_groups, boundary=boundary, backend=backend
        )
        return result
    return calls.call(DEFORM_AGGREGATE, rank, backend, parameters, operands)
