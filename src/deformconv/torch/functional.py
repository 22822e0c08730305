"""The operator on PyTorch tensors: torchvision's signature, then this library's keywords."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from deformconv import dispatch
from deformconv.errors import BackendError
from deformconv.functional import wanted_gradients
from deformconv.ops.conv import portable
from deformconv.ops.conv.spec import ConvSpec, Gradients, Operand, check_grad_output, check_input, conv_spec
from deformconv.torch import autograd

_DTYPES = {getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "float64")}


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
) -> Tensor:
    """Convolve images with a kernel whose taps are moved by `offset` and, in v2, weighed by `mask`.

    `torchvision.ops.deform_conv2d` with the same arguments in the same order, and then more. On the CPU,
    float32 and float64 run compiled kernels, forward and backward; other devices and dtypes, higher
    derivatives and transforms run PyTorch operations. The formula is in `deformconv.deform_conv`.

    Args:
        input: shape (N, C_in, H, W).
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
        backend: "cpu" or "portable"; None takes the first that can run the call.

    Returns:
        The output, shape (N, C_out, H_out, W_out), of the dtype and on the device of `input`.

    Raises:
        ShapeError: a shape or a parameter's value does not fit.
        TypeError: an argument is no tensor, or not of the common floating-point dtype.
        ValueError: `boundary` or `backend` is unknown, or the tensors are on different devices.
        BackendError: the named backend cannot run the call, or it runs under `torch.jit.trace`.

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
    return _call(
        deform_conv2d, 2, input, offset, weight, bias, stride, padding, dilation, mask,
        groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
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
) -> Tensor:
    """`deform_conv2d`, which see, for signals: input (N, C_in, W), offset (N, offset_groups*K, W_out).

    Example:
        >>> import torch
        >>> from deformconv.torch import deform_conv1d
        >>> x, weight, offset = torch.rand(4, 16, 200), torch.rand(8, 16, 5), torch.zeros(4, 5, 200)
        >>> deform_conv1d(x, offset, weight, padding=2).shape
        torch.Size([4, 8, 200])
    """
    return _call(
        deform_conv1d, 1, input, offset, weight, bias, stride, padding, dilation, mask,
        groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
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
) -> Tensor:
    """`deform_conv2d`, which see, for volumes: input (N, C_in, D, H, W), offsets depth, height, width a tap.

    Example:
        >>> import torch
        >>> from deformconv.torch import deform_conv3d
        >>> x, weight = torch.rand(1, 4, 8, 16, 16), torch.rand(6, 4, 3, 3, 3)
        >>> offset = torch.zeros(1, 81, 8, 16, 16)                          # 3 axes x 27 taps
        >>> deform_conv3d(x, offset, weight, padding=1).shape
        torch.Size([1, 6, 8, 16, 16])
    """
    return _call(
        deform_conv3d, 3, input, offset, weight, bias, stride, padding, dilation, mask,
        groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
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
    **keywords: Any,
) -> Tensor:
    """`deformconv.deform_conv` on tensors: the rank is that of `weight`."""
    return _call(deform_conv, None, input, offset, weight, bias, stride, padding, dilation, mask, **keywords)


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
    _check_tensors(grad_output=grad_output, input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    spec = _spec(
        None, input, offset, weight, bias, stride, padding, dilation, mask,
        groups=groups, offset_groups=offset_groups, boundary=boundary,
    )  # fmt: skip
    check_grad_output(spec, _operand(grad_output))
    names = wanted_gradients(spec, wanted)
    operands = (grad_output, input, offset, weight, mask)
    module = _choose(spec, True, backend, *operands)
    if module is portable or _requires_grad(*operands):
        return portable.deform_conv_backward(spec, *operands, names)
    return autograd.compute_backward(module, spec, *operands, names)


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
    backend: str | None = None,
    **keywords: Any,
) -> str:
    """`deformconv.explain` for tensors."""
    _check_tensors(input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    spec = _spec(None, input, offset, weight, bias, stride, padding, dilation, mask, **keywords)
    return dispatch.explain(spec, "torch", _device(input), backend)


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
    *,
    backend: str | None = None,
    **keywords: Any,
) -> Tensor:
    """What the public functions, `function` among them, have in common."""
    operands = (input, offset, weight, bias, mask)
    if has_torch_function(operands):
        return handle_torch_function(
            function, operands, input, offset, weight, bias, stride, padding, dilation, mask,
            backend=backend, **keywords,
        )  # fmt: skip
    _check_tensors(input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    if _is_autocast(input.device.type):
        input, offset, weight, bias, mask = operands = _without_half(*operands)
    spec = _spec(rank, input, offset, weight, bias, stride, padding, dilation, mask, **keywords)
    differentiable = _requires_grad(*operands)
    module = _choose(spec, differentiable, backend, *operands)
    if module is portable:
        return module.deform_conv(spec, *operands)
    if differentiable:
        return autograd.DeformConvFunction.apply(module, spec, *operands)
    return autograd.compute(module, spec, *operands)


def _choose(spec: ConvSpec, backward: bool, backend: str | None, *tensors: Tensor | None) -> Any:
    """Choose the backend; where a NumPy view would lose something, it must be the portable one."""
    transformed = autograd.is_transformed(*tensors)
    if transformed and backend in (None, "portable"):
        return portable
    module = dispatch.choose(spec, "torch", _device(tensors[0]), backward, backend)
    if transformed:
        raise BackendError(
            f'backend="{backend}" cannot run under torch.func, torch.compile, forward-mode differentiation '
            'or a dispatch mode, nor on wrapped tensors; expected None or "portable".'
        )
    return module


def _spec(
    rank: int | None,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    mask: Tensor | None,
    **keywords: Any,
) -> ConvSpec:
    _refuse_tracing()
    return conv_spec(
        _operand(input),
        _operand(offset),
        _operand(weight),
        None if bias is None else _operand(bias),
        None if mask is None else _operand(mask),
        stride=stride, padding=padding, dilation=dilation, rank=rank, **keywords,
    )  # fmt: skip


def check_layer_input(input: Any, weight: Any, **window: Any) -> None:
    """Raise what the operator would for these two, before a layer predicts its offsets."""
    for operand in (input, weight):
        if not isinstance(operand, Tensor) and hasattr(operand, "__torch_function__"):
            return  # torch.fx's stand-in, which has no shape yet
    _check_tensors(input=input, weight=weight)
    _refuse_tracing()
    operands = [_operand(input), _operand(weight)]
    if input.dtype != weight.dtype and _is_autocast(input.device.type):
        operands = [o._replace(dtype="float32") if o.dtype in ("float16", "bfloat16") else o for o in operands]
    check_input(*operands, **window)


def _refuse_tracing() -> None:
    if torch._C._get_tracing_state() is not None:  # sizes are tensors then, and the kernels are not seen
        raise BackendError(
            "torch.jit.trace would record this call's sizes as constants; expected an eager call, or "
            "torch.compile or torch.export."
        )


def _operand(tensor: Tensor) -> Operand:
    dtype = _DTYPES.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.")
    return Operand(tuple(tensor.shape), dtype, _device(tensor))


def _device(tensor: Any) -> str:
    return "cpu" if tensor.is_cpu else str(tensor.device)


def _requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _without_half(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Autocast's rule for operators that need full precision: coordinates do."""
    half = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t is not None and t.dtype in half else t for t in tensors)


def _check_tensors(**operands: Any) -> None:
    for name, value in operands.items():
        if isinstance(value, Tensor):
            if value.layout is not torch.strided:
                raise TypeError(f"`{name}` has the layout {value.layout}; expected a dense tensor: `{name}.to_dense()`.")
        elif value is not None or name not in ("bias", "mask"):
            _raise_no_tensor(name, value, operands)


def _raise_no_tensor(name: str, value: Any, operands: dict[str, Any]) -> NoReturn:
    tensors = [f"`{other}`" for other, operand in operands.items() if isinstance(operand, Tensor)]
    expected = "a PyTorch tensor" + (f", as {' and '.join(tensors)} are." if tensors else ".")
    if value is None:
        raise TypeError(f"`{name}` is None; expected {expected}")
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    convert = "from_numpy" if kind == "numpy.ndarray" else "as_tensor"
    raise TypeError(f"`{name}` is a {kind}; expected {expected} Pass `torch.{convert}({name})`.")
