"""A call of any operator on plain tensors: checked, given to a backend, and brought to the dtype and memory format expected.

All ways to an operator's kernels end here, so that they give the same bits. Half precision is handed to a backend that takes
it, or brought to the dtype that the backend asks for and rounded once, at the end. The output has the memory format of the
first argument, a gradient that of its argument: a channels_last weight beside a contiguous input gives a contiguous output;
nn.ConvNd gives a channels_last one. What an argument that keeps no format gives is contiguous.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from deformconv import dispatch
from deformconv.errors import ShapeError
from deformconv.ops.operator import HALF, Argument, Operand, Operator, Spec, checked_spec
from deformconv.runtime.lenders import Lender, lend
from deformconv.torch import modes, native
from deformconv.torch.tensors import array_of, in_dtype, memory_format, memory_of, tensor_of

__all__ = [
    "Plan", "backward", "checked", "forward", "in_memory_format", "plan_for", "plan_of", "raise_of_one_image",
    "second_backward", "spec_of", "with_small",
]  # fmt: skip

# PyTorch's number of threads is that of its OpenMP team, where it has been built with OpenMP.
lend("torch", Lender("PyTorch", torch._C.__file__, torch.get_num_threads))


class Plan(NamedTuple):
    """A checked call on plain tensors, and the backend that computes it."""

    op: Any  # the operator, as it is registered
    spec: Spec  # in the dtype of the first argument
    inner: Spec  # in the dtype that is computed in
    module: Any
    backend: str | None  # as it was asked for
    unbatched: bool = False
    small: Any = None  # what computes a small call's output from its tensors' addresses, if there is such a thing


def plan_of(
    op: Any,
    rank: int | None,
    backend: str | None,
    differentiable: bool,
    parameters: Mapping[str, Any],
    operands: Mapping[str, Operand | None],
) -> Plan:
    """Check a call and choose its backend."""
    spec, unbatched = checked(op.operator, rank, parameters, operands)
    device: Any = operands[op.operator.names[0]]
    return plan_for(op, spec, device.device, differentiable, backend)._replace(unbatched=unbatched)


def checked(
    operator: Operator, rank: int | None, parameters: Mapping[str, Any], operands: Mapping[str, Operand | None]
) -> tuple[Spec, bool]:
    """The checked call, with a batch axis, and whether it came without one."""
    axes = [None if operand is None else len(operand.shape) for operand in operands.values()]
    if operator.has_batch(rank, axes) is not False:
        return spec_of(operator, operands, parameters, rank), False
    first, *others = operator.arguments
    input: Any = operands[first.name]
    for argument in others:
        other = operands[argument.name]
        if argument.by_image and other is not None and len(other.shape) != len(input.shape):
            raise ShapeError(
                f"`{argument.name}` has {len(other.shape)} axes, shape {other.shape}, and `{first.name}` has "
                f"{len(input.shape)}, shape {input.shape}: one image; expected a batch axis in both, or in neither."
            )
    batched = {argument.name: _with_batch(operands[argument.name], argument.by_image) for argument in operator.arguments}
    try:
        return spec_of(operator, batched, parameters, rank), True
    except ShapeError as error:
        raise_of_one_image(error, first.name, input)


def raise_of_one_image(error: ShapeError, name: str, input: Operand) -> NoReturn:
    """Raise the error, and add that the input was taken for one image without a batch axis: that may be the mistake."""
    axes = len(input.shape)
    raise ShapeError(
        f"{error} (`{name}` has {axes} axes, shape {tuple(input.shape)}: a {axes - 1}-D call takes it as one image without a "
        "batch axis.)"
    ) from None


def with_batch(operand: Operand) -> Operand:
    """The operand with a batch axis before its own."""
    # PyTorch before 2.6 compiles no call of a named tuple's _replace.
    return Operand((1, *operand.shape), operand.dtype, operand.device)


def _with_batch(operand: Operand | None, by_image: bool) -> Operand | None:
    return with_batch(operand) if operand is not None and by_image else operand


def plan_for(op: Any, spec: Spec, device: str, differentiable: bool, backend: str | None) -> Plan:
    """Choose the backend of a checked call."""
    deterministic = modes.deterministic()
    module = dispatch.choose(op.operator, spec, "torch", device, differentiable, backend, deterministic)
    if deterministic is not None and not module.DETERMINISTIC:
        name = module.__name__.rpartition(".")[2]
        warnings.warn(
            f"{op.operator.name} runs on the backend {name!r}, whose results differ in their last bits each time, though "
            f"{deterministic.setting} is set: no deterministic backend can run the call.",
            stacklevel=2,
        )
    return Plan(op, spec, in_(spec, module.computes_in(spec.dtype, "torch")), module, backend)


def with_small(plan: Plan) -> Plan:
    """The plan, and what computes it from addresses, if it is small and its backend has such a thing."""
    small = getattr(plan.module, "small", None)
    return plan if small is None or plan.inner is not plan.spec else plan._replace(small=small(plan.spec))


def in_(spec: Spec, dtype: str) -> Spec:
    """The call in another dtype."""
    return spec if spec.dtype == dtype else replace(spec, dtype=dtype)


def spec_of(
    operator: Operator, operands: Mapping[str, Operand | None], parameters: Mapping[str, Any], rank: int | None = None
) -> Spec:
    """The checked call."""
    return checked_spec(operator, operands, parameters, rank, not modes.compiling())


def forward(plan: Plan, *operands: Tensor | None) -> Tensor:
    """The output, for plain tensors with a batch axis; without a graph."""
    op, spec, inner, module = plan[:4]
    first: Any = operands[0]
    if plan.small is not None and (addresses := _addresses(operands, first.element_size())):
        output: Tensor = first.new_empty(spec.output_shape)
        plan.small(output.data_ptr(), *addresses)
        return in_memory_format(output, first)
    if op.operator.has_values_to_check:
        _check_values(spec, op.operator.arguments, operands)
    if module.TAKES == "native":
        with torch.no_grad(), modes.without_autocast(first.device.type), modes.on_device_of(first):
            tensors = [_brought(*pair, inner) for pair in zip(op.operator.arguments, operands, strict=True)]
            output = native.forward_in_parts(op.operator, module, inner, tensors).to(first.dtype)
    elif inner is spec:
        output = tensor_of(module.forward(spec, *map(memory_of, operands), library="torch"))
    else:
        arrays: list[Any] = [array_of(inner.dtype, tensor) for tensor in operands]
        output = torch.from_numpy(module.forward(inner, *arrays, library="torch")).to(first.dtype)
    return in_memory_format(output, first) if op.operator.arguments[0].keeps_format else output.contiguous()


def _addresses(operands: Sequence[Tensor | None], size: int) -> list[int]:
    """Where the numbers of contiguous tensors begin, 0 for None; nothing if a tensor is anything else.

    An address is a multiple of `size`, that of a number, unless memory of another library begins anywhere.
    """
    found, together = [], 0
    for tensor in operands:
        if tensor is None:
            found.append(0)
            continue
        if not tensor.is_contiguous() or tensor.is_neg():
            return []
        address = tensor.data_ptr()
        if address == 0:  # PyTorch's zeros of forward-mode derivatives have no memory
            return []
        found.append(address)
        together |= address
    return found if together % size == 0 else []


def _check_values(spec: Spec, arguments: Sequence[Argument], operands: Sequence[Tensor | None]) -> None:
    for argument, tensor in zip(arguments, operands, strict=True):
        if argument.check_values is not None and tensor is not None and tensor.is_cpu:
            argument.check_values(spec, array_of(spec.dtype if spec.dtype not in HALF else "float32", tensor))


def in_memory_format(output: Tensor, first: Tensor) -> Tensor:
    """The output in the memory format of the call's first tensor."""
    # Only for speed: in a contiguous tensor of several channels and pixels, the stride of channels is 2 or more.
    if first.stride(1) != 1:
        return output.contiguous()
    form = memory_format(first)
    return output if output.is_contiguous(memory_format=form) else output.contiguous(memory_format=form)


def backward(plan: Plan, grad_output: Tensor, operands: Sequence[Tensor | None], wanted: Collection[str]) -> Any:
    """The wanted gradients, for plain tensors with a batch axis; without a graph."""
    op, spec, inner, module = plan[:4]
    operator: Operator = op.operator
    first: Any = operands[0]
    if operator.has_values_to_check:
        _check_values(spec, operator.in_backward, operands)
    arrays: list[Any]
    if module.TAKES == "native":
        with modes.without_autocast(first.device.type), modes.with_derivatives(), modes.on_device_of(first):
            grad = in_dtype(inner.dtype, grad_output)
            arrays = [_brought(*pair, inner) for pair in zip(operator.in_backward, operands, strict=True)]
            if hasattr(module, "backward"):
                found = module.backward(inner, grad, *arrays, wanted=wanted)
            else:
                found = native.backward_in_parts(operator, module, inner, grad, arrays, wanted)  # type: ignore[arg-type]
    else:
        if inner is spec:
            arrays = [memory_of(tensor) for tensor in (grad_output, *operands)]
        else:
            arrays = [array_of(inner.dtype, tensor) for tensor in (grad_output, *operands)]
        with np.errstate(invalid="ignore", over="ignore"):  # infinities and NaN are data here
            found = module.backward(inner, *arrays, wanted=wanted, library="torch")
        found = [None if array is None else tensor_of(array) for array in found]
    like = dict(zip((argument.name for argument in operator.in_backward), operands, strict=True))
    gradients = []
    for argument, gradient in zip(operator.arguments, found, strict=True):
        if gradient is not None:
            tensor = like.get(argument.name)
            tensor = first if tensor is None else tensor
            gradient = gradient if gradient.dtype is tensor.dtype else gradient.to(tensor.dtype)
            gradient = _formed(gradient, tensor) if argument.keeps_format else gradient.contiguous()
        gradients.append(gradient)
    return operator.gradients(*gradients)


def _brought(argument: Argument, tensor: Tensor | None, inner: Spec) -> Tensor | None:
    """The tensor in the dtype that is computed in, without a graph; positions keep float32 beside half precision."""
    if tensor is not None and argument.precise and inner.dtype in HALF and tensor.dtype is torch.float32:
        return tensor.detach()
    return in_dtype(inner.dtype, tensor)


def _formed(gradient: Tensor, like: Tensor) -> Tensor:
    if gradient.is_contiguous() and like.is_contiguous():  # true of most calls, and quick to ask
        return gradient
    return gradient.contiguous(memory_format=memory_format(like))


def second_backward(
    op: Any, spec: Spec, operands: Sequence[Any], wanted: Sequence[str], cotangents: Sequence[Tensor], needed: Sequence[int]
) -> dict[int, Tensor]:
    """The derivative of the gradients, on plain tensors, in the portable form."""
    portable = dispatch.load(op.operator, "portable")
    inner = in_(spec, portable.computes_in(spec.dtype, "torch"))
    with modes.without_autocast(operands[0].device.type):
        whole = [in_dtype(inner.dtype, tensor) for tensor in operands]
        given: list[Any] = [in_dtype(inner.dtype, tensor) for tensor in cotangents]
        results = native.second_backward_in_parts(op.operator, inner, whole, wanted, given, needed)
    return {index: result.to(operands[index].dtype) for index, result in results.items()}
