"""The operator on PyTorch tensors: torchvision's signature, then this library's keywords."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from deformconv.errors import ShapeError
from deformconv.ops.conv import folding, operator
from deformconv.ops.conv.spec import Gradients, Operand, check_input
from deformconv.ops.operator import HALF
from deformconv.ops.words import unexpected
from deformconv.torch import calls, modes, run
from deformconv.torch.conv import export
from deformconv.torch.registry import Registered
from deformconv.torch.tensors import PLAIN, check_tensors, dtype_name, operand


def _forward_flops(shapes: Sequence[Any], output: Any) -> int:
    """Two operations for each multiply-add, as PyTorch counts a convolution's; interpolation is left out."""
    return 2 * prod(shapes[2]) * output[0] * prod(output[2:])


def _backward_flops(grad_output: Any, shapes: Sequence[Any], wanted: Collection[str]) -> int:
    """A product for the samples' gradients and one for the weight's."""
    products = ("weight" in wanted) + any(name in wanted for name in ("input", "offset", "mask"))
    return 2 * products * prod(shapes[2]) * grad_output[0] * prod(grad_output[2:])


DEFORM_CONV = Registered(
    operator.DEFORM_CONV,
    fold_forward=folding.fold_forward,
    fold_backward=folding.fold_backward,
    export=export.EXPORT,
    flops=(_forward_flops, _backward_flops),
)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Tensor | None = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """Convolve images with a kernel whose taps are moved by `offset` and, in v2, weighed by `mask`.

    `torchvision.ops.deform_conv2d` with the same arguments in the same order, and then more. On the CPU and on
    GPUs it runs compiled kernels, forward and backward, also under `torch.compile` and `torch.func`; other
    devices, higher derivatives and forward mode run PyTorch operations. The formula is in
    `deformconv.deform_conv`.

    Args:
        input: shape (N, C_in, H, W). Or (C_in, H, W), one image, with `offset` and `mask` without N as well.
        offset: shape (N, offset_groups*2*K, H_out, W_out), in input pixels, for the K taps of the kernel;
            group-major, then tap (row-major), then dy before dx.
        weight: shape (C_out, C_in/groups, *kernel).
        bias: shape (C_out,), or None.
        stride: an int or two, in input pixels.
        padding: an int, two, pairs ((top, bottom), (left, right)), "same" or "valid", in input pixels.
        dilation: the distance between taps, an int or two, in input pixels.
        mask: shape (N, offset_groups*K, H_out, W_out), a factor for every sample; None for v1.
        groups: verified when given, else inferred from `input` and `weight`.
        offset_groups: verified when given, else inferred from `offset`.
        boundary: "zeros" or "inside", as in `deformconv.deform_conv`.
        backend: "cpu", "gpu" or "portable"; None takes the first that can run the call.

    Returns:
        The output, shape (N, C_out, H_out, W_out), of the dtype and on the device of `input`.

    Raises:
        ShapeError: a shape or a parameter's value does not fit.
        TypeError: an argument is no tensor, or not of the common floating-point dtype; only beside an `input`
            in half precision `offset` and `mask` may be float32.
        ValueError: `boundary` or `backend` is unknown, or the tensors are on different devices.
        BackendError: the named backend cannot run the call.

    Example:
        >>> import torch
        >>> from deformconv.torch import deform_conv2d
        >>> x, weight = torch.rand(10, 3, 100, 100), torch.rand(5, 3, 3, 3)
        >>> offset = torch.zeros(10, 18, 100, 100, requires_grad=True)      # 2 axes x 9 taps
        >>> y = deform_conv2d(x, offset, weight, padding=1)                 # v1
        >>> torch.allclose(y, torch.conv2d(x, weight, padding=1), atol=1e-4)
        True
        >>> mask = torch.rand(10, 9, 100, 100)                              # 9 taps
        >>> y = deform_conv2d(x, offset, weight, padding=1, mask=mask)      # v2
        >>> y.sum().backward()
        >>> offset.grad.shape
        torch.Size([10, 18, 100, 100])

    Papers: v1, arXiv 1703.06211, equations 2 and 3; v2, arXiv 1811.11168, equation 1.
    """
    if unknown:
        raise unexpected(deform_conv2d, unknown)
    return _call(
        deform_conv2d, 2, input, offset, weight, bias, stride, padding, dilation, mask,
        groups, offset_groups, boundary, backend,
    )  # fmt: skip


def deform_conv1d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Tensor | None = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """`deform_conv2d` for signals: input (N, C_in, W), offset (N, offset_groups*K, W_out). All arguments are explained there.

    Example:
        >>> import torch
        >>> from deformconv.torch import deform_conv1d
        >>> x, weight, offset = torch.rand(4, 16, 200), torch.rand(8, 16, 5), torch.zeros(4, 5, 200)
        >>> deform_conv1d(x, offset, weight, padding=2).shape
        torch.Size([4, 8, 200])
    """
    if unknown:
        raise unexpected(deform_conv1d, unknown)
    return _call(
        deform_conv1d, 1, input, offset, weight, bias, stride, padding, dilation, mask,
        groups, offset_groups, boundary, backend,
    )  # fmt: skip


def deform_conv3d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Tensor | None = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """`deform_conv2d` for volumes: input (N, C_in, D, H, W); a tap's offsets are for depth, height, width. The rest is there.

    Example:
        >>> import torch
        >>> from deformconv.torch import deform_conv3d
        >>> x, weight = torch.rand(1, 4, 8, 16, 16), torch.rand(6, 4, 3, 3, 3)
        >>> offset = torch.zeros(1, 81, 8, 16, 16)                          # 3 axes x 27 taps
        >>> deform_conv3d(x, offset, weight, padding=1).shape
        torch.Size([1, 6, 8, 16, 16])
    """
    if unknown:
        raise unexpected(deform_conv3d, unknown)
    return _call(
        deform_conv3d, 3, input, offset, weight, bias, stride, padding, dilation, mask,
        groups, offset_groups, boundary, backend,
    )  # fmt: skip


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Tensor | None = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
) -> Tensor:
    """`deformconv.deform_conv` on tensors: the rank is that of `weight`."""
    return _call(
        deform_conv, None, input, offset, weight, bias, stride, padding, dilation, mask,
        groups, offset_groups, boundary, backend,
    )  # fmt: skip


def deform_conv_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Tensor | None = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    wanted: Collection[str] | None = None,
) -> Gradients:
    """`deformconv.deform_conv_backward` on tensors; its result has a gradient if a tensor requires one."""
    parameters = (stride, padding, dilation, groups, offset_groups, boundary)
    operands = (input, offset, weight, bias, mask)
    found: Gradients = calls.backward(DEFORM_CONV, backend, parameters, grad_output, operands, wanted)
    return found


def explain(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Tensor | None = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
) -> str:
    """`deformconv.explain` for tensors."""
    parameters = (stride, padding, dilation, groups, offset_groups, boundary)
    return calls.explain(DEFORM_CONV, backend, parameters, (input, offset, weight, bias, mask))


def _call(
    function: Callable[..., Tensor],
    rank: int | None,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    mask: Tensor | None,
    groups: int | None,
    offset_groups: int | None,
    boundary: str,
    backend: str | None,
) -> Tensor:
    """What all public functions do; `function` is the one that was called."""
    operands = (input, offset, weight, bias, mask)
    if has_torch_function(operands):
        return handle_torch_function(
            function, operands, input, offset, weight, bias, stride, padding, dilation, mask,
            groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
        )  # fmt: skip
    parameters = (stride, padding, dilation, groups, offset_groups, boundary)
    return calls.call(DEFORM_CONV, rank, backend, parameters, operands)


def check_layer_input(
    input: Any, weight: Any, stride: Any, padding: Any, dilation: Any, groups: int, rank: int, in_channels: int
) -> None:
    """Raise what the operator would raise for this input and weight, before a layer predicts its offsets."""
    # A compiler is asked about first: PyTorch's of 2.6 does not read whether a type is in a set.
    special = (
        modes.compiling() or type(input) not in PLAIN or type(weight) not in PLAIN or modes.traced() or modes.any_autocast()
    )
    if not special:
        try:
            return _check_plain_layer_input(
                input.shape, input.dtype, input.layout, input.is_cpu or input.device,
                weight.shape, weight.dtype, weight.layout, weight.is_cpu or weight.device,
                stride, padding, dilation, groups, rank, in_channels,
            )  # fmt: skip
        except (TypeError, RuntimeError):
            pass  # a nested tensor, for instance, has no shape: the checks below find it again, and say it
    _check_layer_input(
        input, weight, stride=stride, padding=padding, dilation=dilation, groups=groups, rank=rank, in_channels=in_channels
    )


@lru_cache(maxsize=1024)
def _check_plain_layer_input(*call: Any) -> None:
    """Raise what is wrong with a call, once for its shapes and dtypes; TypeError where the tensors must be looked at."""
    operands = []
    for shape, dtype, layout, device in (call[:4], call[4:8]):
        if layout is not torch.strided:
            raise TypeError
        operands.append(Operand(tuple(shape), dtype_name(dtype), "cpu" if device is True else str(device)))
    names = ("stride", "padding", "dilation", "groups", "rank", "in_channels")
    _check_layer_operands(operands, dict(zip(names, call[8:], strict=True)))


def _check_layer_input(input: Any, weight: Any, **window: Any) -> None:
    for value in (input, weight):
        if not isinstance(value, Tensor) and hasattr(value, "__torch_function__"):
            return  # torch.fx's stand-in, which has no shape yet
    check_tensors(operator.DEFORM_CONV, input=input, weight=weight)
    if modes.traced():
        return  # sizes are tensors then
    operands = [operand(input), operand(weight)]
    if input.dtype != weight.dtype and modes.autocast(input.device.type):
        operands = [Operand(o.shape, "float32", o.device) if o.dtype in HALF else o for o in operands]
    _check_layer_operands(operands, window)


def _check_layer_operands(operands: list[Operand], window: dict[str, Any]) -> None:
    window["cached"] = not modes.compiling()
    axes = [len(operands[0].shape), None, len(operands[1].shape)]
    if operator.DEFORM_CONV.has_batch(window["rank"], axes) is not False:
        check_input(*operands, **window)
        return
    input = operands[0]
    operands[0] = run.with_batch(input)
    try:
        check_input(*operands, **window)
    except ShapeError as error:
        run.raise_of_one_image(error, "input", input)
