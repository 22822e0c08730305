"""The operator on PyTorch tensors: torchvision's signature, then this library's keywords."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from deformconv.errors import ShapeError
from deformconv.functional import wanted_gradients
from deformconv.ops.conv.spec import Gradients, Operand, check_grad_output, check_input
from deformconv.ops.window import integers, paddings, same_padding
from deformconv.torch import autograd, compute, export, operator
from deformconv.torch.autograd import DeformConvFunction, TransformedFunction
from deformconv.torch.compute import Parameters, Plan


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

    `torchvision.ops.deform_conv2d` with the same arguments in the same order, and then more. On the CPU it
    runs compiled kernels, forward and backward, also under `torch.compile` and `torch.func`; other devices,
    higher derivatives and forward mode run PyTorch operations. The formula is in `deformconv.deform_conv`.

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
        backend: "cpu" or "portable"; None takes the first that can run the call.

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
    _check_tensors(grad_output=grad_output, input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    parameters = Parameters(stride, padding, dilation, groups, offset_groups, boundary)
    spec = _spec(None, parameters, input, offset, weight, bias, mask)
    unbatched = compute.is_unbatched(None, input.ndim, weight.ndim)
    if unbatched:
        grad_output, input, offset, mask = map(_with_batch, (grad_output, input, offset, mask))
    check_grad_output(spec, compute.operand(grad_output))
    names = wanted_gradients(spec, wanted)
    found = autograd.backward(spec, backend, (grad_output, input, offset, weight, mask), names)
    if not unbatched:
        return found
    return Gradients(*(g if g is None or name in ("weight", "bias") else g[0] for name, g in found._asdict().items()))


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
    _check_tensors(input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    parameters = Parameters(stride, padding, dilation, groups, offset_groups, boundary)
    return compute.explain(_spec(None, parameters, input, offset, weight, bias, mask), compute.device_of(input), backend)


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
    """What the public functions, `function` among them, have in common. A small call takes as long as this text does."""
    if has_torch_function((input, offset, weight, bias, mask)):
        return handle_torch_function(
            function, (input, offset, weight, bias, mask), input, offset, weight, bias, stride, padding, dilation, mask,
            groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
        )  # fmt: skip
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    ):
        return _special_call(
            rank, backend, Parameters(stride, padding, dilation, groups, offset_groups, boundary),
            input, offset, weight, bias, mask,
        )  # fmt: skip
    try:
        # To a hash, 1.0 and True are 1.
        if not (type(stride) is int and type(padding) is int and type(dilation) is int):
            _check_plain(stride, padding, dilation)
        if not ((groups is None or type(groups) is int) and (offset_groups is None or type(offset_groups) is int)):
            raise TypeError
        differentiable = torch.is_grad_enabled() and (
            input.requires_grad
            or offset.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (mask is not None and mask.requires_grad)
        )
        plan = _plan(
            rank, backend, differentiable, stride, padding, dilation, groups, offset_groups, boundary,
            type(input), input.shape, input.dtype, input.layout, input.is_cpu or input.device,
            type(offset), offset.shape, offset.dtype, offset.layout, offset.is_cpu or offset.device,
            type(weight), weight.shape, weight.dtype, weight.layout, weight.is_cpu or weight.device,
            None if bias is None else (type(bias), bias.shape, bias.dtype, bias.layout, bias.is_cpu or bias.device),
            None if mask is None else (type(mask), mask.shape, mask.dtype, mask.layout, mask.is_cpu or mask.device),
        )  # fmt: skip
    except (AttributeError, TypeError, RuntimeError):
        plan = None  # of what is no tensor, or has no hash; whatever is wrong is found again
    if plan is None:
        return _special_call(
            rank, backend, Parameters(stride, padding, dilation, groups, offset_groups, boundary),
            input, offset, weight, bias, mask,
        )  # fmt: skip
    return _plain_call(plan, differentiable, input, offset, weight, bias, mask)


def _plain_call(
    plan: Plan,
    differentiable: bool,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    if plan.unbatched:
        input, offset, mask = input[None], offset[None], _with_batch(mask)
    if differentiable:
        output: Tensor = DeformConvFunction.apply(plan, input, offset, weight, bias, mask)
    else:
        output = compute.forward(plan, input, offset, weight, bias, mask)
    return output[0] if plan.unbatched else output


@lru_cache(maxsize=1024)
def _plan(
    rank: int | None,
    backend: str | None,
    differentiable: bool,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int | None,
    offset_groups: int | None,
    boundary: str,
    *tensors: Any,
) -> Plan:
    """The plan of a call that it takes no look at the tensors for; TypeError where it does take one."""
    operands: list[Any] = []
    for tensor in (tensors[:5], tensors[5:10], tensors[10:15], *tensors[15:]):
        if tensor is None:
            operands.append(None)
            continue
        kind, shape, dtype, layout, device = tensor
        if kind not in autograd.PLAIN or layout is not torch.strided:
            raise TypeError
        operands.append(Operand(tuple(shape), compute.dtype_name(dtype), "cpu" if device is True else str(device)))
    parameters = Parameters(stride, padding, dilation, groups, offset_groups, boundary)
    return compute.plan_of(rank, backend, differentiable, parameters, *operands)


def _check_plain(*parameters: Any) -> None:
    """Raise unless these are integers, strings, or tuples of such or of pairs of them."""
    for value in parameters:
        if type(value) is tuple:
            kinds = set(map(type, value))
            if kinds == {tuple}:
                kinds = {type(part) for pair in value for part in pair}
            if kinds != {int}:
                raise TypeError
        elif type(value) not in (int, str):
            raise TypeError


def _special_call(
    rank: int | None,
    backend: str | None,
    parameters: Parameters,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """A call that a compiler or tracer sees, that is transformed or under autocast, or that is wrong."""
    _check_tensors(input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    if torch._C._is_any_autocast_enabled() and compute.is_autocast(input.device.type):
        input, offset, weight, bias, mask = _cast_for_autocast(input, offset, weight, bias, mask)
    if not autograd.is_special(input, offset, weight, bias, mask) and forward_ad._current_level < 0:
        operands = [_operand(tensor) for tensor in (input, offset, weight, bias, mask)]
        differentiable = autograd.requires_grad(input, offset, weight, bias, mask)
        plan = compute.plan_of(rank, backend, differentiable, parameters, *operands)  # type: ignore[arg-type]
        return _plain_call(plan, differentiable, input, offset, weight, bias, mask)
    exporting = export.is_exporting()  # first, since it raises where sizes are no numbers
    unbatched = compute.is_unbatched(rank, input.ndim, weight.ndim)
    if unbatched or input.ndim != weight.ndim or rank not in (None, weight.ndim - 2):
        _spec(rank, parameters, input, offset, weight, bias, mask)  # for its errors: the rest expects these axes
    if unbatched:
        input, offset, mask = input[None], offset[None], _with_batch(mask)
    output = _traced_call(exporting, rank, backend, parameters, input, offset, weight, bias, mask)
    return output[0] if unbatched else output


def _traced_call(exporting: bool, rank: int | None, backend: str | None, parameters: Parameters, *operands: Any) -> Tensor:
    if exporting:
        return export.deform_conv(_spec(rank, parameters, *operands), *operands)
    # A compiler takes the registered operator, which finds out for itself.
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return autograd.decomposed(_spec(rank, parameters, *operands), backend, *operands)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        result: Tensor = TransformedFunction.apply(_spec(rank, parameters, *operands), backend, *operands)
        return result
    D = operands[2].ndim - 2
    stride = integers("stride", parameters.stride, D, 1)
    dilation = integers("dilation", parameters.dilation, D, 1)
    padding = paddings(parameters.padding, D)
    if isinstance(padding, str):
        kernel_size = tuple(operands[2].shape[2:])
        padding = same_padding(kernel_size, stride, dilation) if padding == "same" else ((0, 0),) * D
    parameters = parameters._replace(stride=stride, padding=padding, dilation=dilation)
    return operator.call(backend, parameters, *operands)


def _spec(
    rank: int | None,
    parameters: Parameters,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Any:
    operands = [_operand(tensor) for tensor in (input, offset, weight, bias, mask)]
    return compute.checked(rank, parameters, *operands)[0]  # type: ignore[arg-type]


def _operand(tensor: Tensor | None) -> Operand | None:
    return None if tensor is None else compute.operand(tensor)


def _with_batch(tensor: Any) -> Any:
    return None if tensor is None else tensor[None]


def check_layer_input(input: Any, weight: Any, stride: Any, padding: Any, dilation: Any, groups: int, rank: int) -> None:
    """Raise what the operator would for these two, before a layer predicts its offsets."""
    special = (
        type(input) not in autograd.PLAIN
        or type(weight) not in autograd.PLAIN
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._is_any_autocast_enabled()
    )
    if not special:
        try:
            return _check_plain_layer_input(
                input.shape, input.dtype, input.layout, input.is_cpu or input.device,
                weight.shape, weight.dtype, weight.layout, weight.is_cpu or weight.device,
                stride, padding, dilation, groups, rank,
            )  # fmt: skip
        except (TypeError, RuntimeError):
            pass  # a layout, say, or a nested tensor, which has no shape; whatever is wrong is found again
    _check_layer_input(input, weight, stride=stride, padding=padding, dilation=dilation, groups=groups, rank=rank)


@lru_cache(maxsize=1024)
def _check_plain_layer_input(*call: Any) -> None:
    """Raise what is wrong with a call, once for its shapes and dtypes; TypeError where the tensors must be looked at."""
    operands = []
    for shape, dtype, layout, device in (call[:4], call[4:8]):
        if layout is not torch.strided:
            raise TypeError
        operands.append(Operand(tuple(shape), compute.dtype_name(dtype), "cpu" if device is True else str(device)))
    _check_layer_operands(operands, dict(zip(("stride", "padding", "dilation", "groups", "rank"), call[8:], strict=True)))


def _check_layer_input(input: Any, weight: Any, **window: Any) -> None:
    for operand in (input, weight):
        if not isinstance(operand, Tensor) and hasattr(operand, "__torch_function__"):
            return  # torch.fx's stand-in, which has no shape yet
    _check_tensors(input=input, weight=weight)
    if torch._C._get_tracing_state() is not None:
        return  # sizes are tensors then
    operands = [compute.operand(input), compute.operand(weight)]
    if input.dtype != weight.dtype and compute.is_autocast(input.device.type):
        operands = [o._replace(dtype="float32") if o.dtype in ("float16", "bfloat16") else o for o in operands]
    _check_layer_operands(operands, window)


def _check_layer_operands(operands: list[Operand], window: dict[str, Any]) -> None:
    window["cached"] = not torch.compiler.is_compiling()
    if not compute.is_unbatched(window["rank"], len(operands[0].shape), len(operands[1].shape)):
        check_input(*operands, **window)
        return
    operands[0] = operands[0]._replace(shape=(1, *operands[0].shape))
    try:
        check_input(*operands, **window)
    except ShapeError as error:
        compute.raise_of_one_image(error, operands[0])


def _cast_for_autocast(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> tuple[Any, ...]:
    """Autocast's rule for convolutions; but coordinates and masks are float32, which half precision is too coarse for."""
    dtype = torch.get_autocast_dtype(input.device.type)
    input, weight, bias = (
        t.to(dtype) if t is not None and t.dtype in (*compute.HALF, torch.float32) else t for t in (input, weight, bias)
    )
    offset, mask = (t.float() if t is not None and t.dtype in compute.HALF else t for t in (offset, mask))
    return input, offset, weight, bias, mask


def _check_tensors(**operands: Any) -> None:
    for name, value in operands.items():
        if isinstance(value, Tensor):
            if value.is_nested:
                raise TypeError(f"`{name}` is a nested tensor; expected a dense one: `{name}.to_padded_tensor(0)`.")
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
