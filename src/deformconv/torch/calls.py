"""How a call of a public function reaches an operator: at once where tensors are plain, else by the door that fits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from deformconv import dispatch
from deformconv.ops.operator import Operand, Operator, Spec
from deformconv.torch import autograd, modes, run, tensors
from deformconv.torch.registry import Registered
from deformconv.torch.run import Plan
from deformconv.torch.tensors import HALF, PLAIN, dtype_name, requires_grad, with_batch

__all__ = ["backward", "call", "explain"]

_STRIDED = torch.strided
_INTEGERS, _PAIRS = {int}, {tuple}


def call(
    op: Registered,
    rank: int | None,
    backend: str | None,
    parameters: tuple[Any, ...],
    operands: tuple[Tensor | None, ...],
    compute: Callable[..., Tensor] = run.forward,
) -> Tensor:
    """Check a call, of a function for `rank` axes, and compute it. Much of the time of a small call is spent here.

    `compute` is what computes on plain tensors where no gradient is recorded.
    """
    if modes.active():
        return _special_call(op, rank, backend, parameters, operands)
    keys: list[Any] = []
    differentiable = False
    tensor: Any
    try:
        for tensor in operands:
            if tensor is None:
                keys.append(None)
                continue
            if type(tensor) not in PLAIN or tensor.layout is not _STRIDED:
                return _special_call(op, rank, backend, parameters, operands)
            if tensor.requires_grad:
                differentiable = True
            keys.append((tensor.shape, tensor.dtype, tensor.is_cpu or tensor.device))
    except RuntimeError:  # PyTorch's: a nested tensor has no shape
        return _special_call(op, rank, backend, parameters, operands)
    types = tuple(map(type, parameters))
    if not _are_plain(op, types, parameters) or not (backend is None or type(backend) is str):
        return _special_call(op, rank, backend, parameters, operands)
    differentiable = differentiable and torch.is_grad_enabled()
    plan = _plan(op, rank, backend, differentiable, parameters, tuple(keys))
    if plan is None or (not plan.module.DETERMINISTIC and modes.deterministic() is not None):
        return _special_call(op, rank, backend, parameters, operands)
    return _plain_call(plan, differentiable, operands, compute)


def _plain_call(
    plan: Plan, differentiable: bool, operands: Sequence[Tensor | None], compute: Callable[..., Tensor] = run.forward
) -> Tensor:
    if plan.unbatched:
        operands = _batched(plan.op.operator, operands)
    if differentiable:
        output: Tensor = plan.op.eager_function.apply(plan, *operands)
    else:
        output = compute(plan, *operands)
    return output[0] if plan.unbatched else output


@lru_cache(maxsize=1024)
def _plan(
    op: Registered,
    rank: int | None,
    backend: str | None,
    differentiable: bool,
    parameters: tuple[Any, ...],
    keys: tuple[Any, ...],
) -> Plan | None:
    """The plan of a call from its tensors' shapes, dtypes and devices (`keys`); None if a required tensor is missing."""
    operands: dict[str, Operand | None] = {}
    for name, key in zip(op.operator.names, keys, strict=True):
        if key is None:
            if name not in op.operator.optional:
                return None
            operands[name] = None
            continue
        shape, dtype, device = key
        operands[name] = Operand(tuple(shape), dtype_name(dtype), "cpu" if device is True else str(device))
    return run.with_small(run.plan_of(op, rank, backend, differentiable, _named(op.operator, parameters), operands))


def _are_plain(op: Registered, types: tuple[type, ...], parameters: tuple[Any, ...]) -> bool:
    """Whether parameters may be the key of a plan: of the types expected, or tuples of integers or of pairs of integers.

    Other types may not, because a cache takes 1.0 and True for 1.
    """
    tuples = op.plain_types.get(types)
    if tuples is None:
        for expected, kind, value in zip(op.expected_types, types, parameters, strict=True):
            if not (kind in expected or kind is tuple or value is None):
                return False
        tuples = op.plain_types[types] = tuple(number for number, kind in enumerate(types) if kind is tuple)
    for number in tuples:
        kinds = set(map(type, parameters[number]))
        if kinds == _PAIRS:
            kinds = {type(amount) for pair in parameters[number] for amount in pair}
        if kinds != _INTEGERS:
            return False
    return True


def _special_call(
    op: Registered, rank: int | None, backend: str | None, parameters: tuple[Any, ...], operands: tuple[Tensor | None, ...]
) -> Tensor:
    """A call that a compiler or tracer sees, that is transformed or under autocast, or that is wrong."""
    operator = op.operator
    tensors.check_tensors(operator, **dict(zip(operator.names, operands, strict=True)))
    named = _named(operator, parameters)
    first: Any = operands[0]
    if modes.any_autocast() and modes.autocast(first.device.type):
        operands = _cast_for_autocast(operator, operands)
    door = modes.door(*operands)
    if door == "onnx":
        op.exporter()  # for its errors
    if door == "memory":
        differentiable = requires_grad(*operands)
        plan = run.plan_of(op, rank, backend, differentiable, named, tensors.described(operator, operands))
        return _plain_call(plan, differentiable, operands)
    has_batch = operator.has_batch(rank, [None if tensor is None else tensor.ndim for tensor in operands])
    if has_batch is not True:
        _spec(operator, rank, named, operands)  # for its errors, since what follows expects a batch axis
        operands = tuple(_batched(operator, operands))
    output = _through(door, op, rank, backend, named, operands)
    return output if has_batch else output[0]


def _through(
    door: modes.Door,
    op: Registered,
    rank: int | None,
    backend: str | None,
    parameters: Mapping[str, Any],
    operands: Sequence[Tensor | None],
) -> Tensor:
    if door == "registered":
        shapes = [None if tensor is None else tensor.shape for tensor in operands]
        return op.call(backend, op.operator.plain(parameters, shapes), *operands)
    spec = _spec(op.operator, rank, parameters, operands)
    if door == "onnx":
        return op.write_onnx(spec, *operands)
    if door == "decomposed":
        return autograd.decomposed(op, spec, backend, *operands)
    output: Tensor = op.function.apply(op, spec, backend, *operands)
    return output


def backward(
    op: Registered,
    backend: str | None,
    parameters: tuple[Any, ...],
    grad_output: Tensor,
    operands: tuple[Tensor | None, ...],
    wanted: Collection[str] | None,
) -> Any:
    """Check a call and compute the wanted gradients; None means all. They have a gradient if a tensor requires one."""
    operator = op.operator
    tensors.check_tensors(operator, grad_output=grad_output, **dict(zip(operator.names, operands, strict=True)))
    spec, unbatched = run.checked(operator, None, _named(operator, parameters), tensors.described(operator, operands))
    if unbatched:
        grad_output, operands = grad_output[None], tuple(_batched(operator, operands))
    operator.check_grad_output(spec, tensors.operand(grad_output))
    names = operator.wanted(spec, wanted)
    found = autograd.backward(op, spec, backend, grad_output, op.saved(operands), names)
    if not unbatched:
        return found
    pairs = zip(operator.arguments, found, strict=True)
    return operator.gradients(*(g[0] if g is not None and argument.by_image else g for argument, g in pairs))


def explain(op: Registered, backend: str | None, parameters: tuple[Any, ...], operands: tuple[Tensor | None, ...]) -> str:
    """Say which backend would run a call."""
    operator = op.operator
    tensors.check_tensors(operator, **dict(zip(operator.names, operands, strict=True)))
    spec = _spec(operator, None, _named(operator, parameters), operands)
    return dispatch.explain(operator, spec, "torch", tensors.device_of(operands[0]), backend, modes.deterministic())


def _named(operator: Operator, parameters: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(operator.parameter_names, parameters, strict=True))


def _spec(operator: Operator, rank: int | None, parameters: Mapping[str, Any], operands: Sequence[Tensor | None]) -> Spec:
    return run.checked(operator, rank, parameters, tensors.described(operator, operands))[0]


def _batched(operator: Operator, operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """One image as a batch of one."""
    return [with_batch(t) if argument.by_image else t for argument, t in zip(operator.arguments, operands, strict=True)]


def _cast_for_autocast(operator: Operator, operands: Sequence[Any]) -> tuple[Any, ...]:
    """Autocast's rule for convolutions; but positions and masks stay float32, since half precision is too coarse for them.

    An operator that is not for autocast keeps the dtype of its first tensor.
    """
    dtype = torch.get_autocast_dtype(operands[0].device.type) if operator.autocast else operands[0].dtype
    cast = []
    for argument, tensor in zip(operator.arguments, operands, strict=True):
        if tensor is not None and argument.precise:
            tensor = tensor.float() if tensor.dtype in HALF else tensor
        elif tensor is not None and tensor.dtype in (*HALF, torch.float32):
            tensor = tensor.to(dtype)
        cast.append(tensor)
    return tuple(cast)
