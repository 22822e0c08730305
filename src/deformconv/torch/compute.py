"""A call on plain tensors: checked, given to a backend, and brought to the dtype and memory format that PyTorch expects.

Both doors of the operator, eager functions and registered operators, end here, so that they give the same bits.
Half precision is computed in float32 and rounded once, at the end. The output and the input's gradient have the
input's memory format, the weight's gradient has the weight's: a channels_last weight with a contiguous input gives a
contiguous output, where nn.ConvNd gives a channels_last one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from deformconv import dispatch
from deformconv.errors import ShapeError
from deformconv.ops.conv import portable
from deformconv.ops.conv.spec import ConvSpec, Gradients, Operand, conv_spec
from deformconv.runtime import openmp

__all__ = [
    "Parameters",
    "Plan",
    "backward",
    "device_of",
    "forward",
    "memory_format",
    "is_autocast",
    "is_unbatched",
    "operand",
    "plan_for",
    "plan_of",
    "spec_of",
    "without_autocast",
]

# PyTorch's number of threads is that of its OpenMP team, where it has been built with OpenMP.
openmp.lend("torch", openmp.Library("PyTorch", torch._C.__file__, torch.get_num_threads))

HALF = (torch.float16, torch.bfloat16)
_DTYPES = {getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "float64")}


class Parameters(NamedTuple):
    """The arguments that are no tensors."""

    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int | None = None
    offset_groups: int | None = None
    boundary: str = "zeros"


class Plan(NamedTuple):
    """A checked call on plain tensors, and the backend that computes it."""

    spec: ConvSpec  # in the dtype of the input
    inner: ConvSpec  # in the dtype that is computed in
    module: Any
    backend: str | None  # as it was asked for
    unbatched: bool = False


def plan_of(
    rank: int | None,
    backend: str | None,
    differentiable: bool,
    parameters: Parameters,
    input: Operand,
    offset: Operand,
    weight: Operand,
    bias: Operand | None,
    mask: Operand | None,
) -> Plan:
    """Check a call and choose its backend."""
    spec, unbatched = checked(rank, parameters, input, offset, weight, bias, mask)
    return plan_for(spec, input.device, differentiable, backend)._replace(unbatched=unbatched)


def checked(
    rank: int | None,
    parameters: Parameters,
    input: Operand,
    offset: Operand,
    weight: Operand,
    bias: Operand | None,
    mask: Operand | None,
) -> tuple[ConvSpec, bool]:
    """The checked call, with a batch axis, and whether it came without one."""
    unbatched = is_unbatched(rank, len(input.shape), len(weight.shape))
    if unbatched:
        others = {"offset": offset} if mask is None else {"offset": offset, "mask": mask}
        for name, other in others.items():
            if len(other.shape) != len(input.shape):
                raise ShapeError(
                    f"`{name}` has {len(other.shape)} axes, shape {other.shape}, and `input` has {len(input.shape)}, "
                    f"shape {input.shape}: one image; expected a batch axis in both, or in neither."
                )
        input, offset = _with_batch(input), _with_batch(offset)
        mask = None if mask is None else _with_batch(mask)
        try:
            return spec_of(input, offset, weight, bias, mask, parameters, rank), True
        except ShapeError as error:
            raise_of_one_image(error, input)
    return spec_of(input, offset, weight, bias, mask, parameters, rank), False


def raise_of_one_image(error: ShapeError, input: Operand) -> NoReturn:
    """Say what an input without a batch axis was taken for, in case that is the mistake."""
    shape, D = tuple(input.shape[1:]), len(input.shape) - 2
    raise ShapeError(
        f"{error} (`input` has {D + 1} axes, shape {shape}: a {D}-D call takes it as one image without a batch axis.)"
    ) from None


def plan_for(spec: ConvSpec, device: str, differentiable: bool, backend: str | None) -> Plan:
    """Choose the backend of a checked call."""
    inner = inner_spec(spec)
    return Plan(spec, inner, dispatch.choose(inner, "torch", device, differentiable, backend), backend)


def is_unbatched(rank: int | None, input_axes: int, weight_axes: int) -> bool:
    """Whether the input is one image without a batch axis, as nn.ConvNd takes it."""
    return input_axes == weight_axes - 1 and rank in (None, weight_axes - 2)


def _with_batch(operand: Operand) -> Operand:
    return operand._replace(shape=(1, *operand.shape))


def spec_of(
    input: Operand,
    offset: Operand,
    weight: Operand,
    bias: Operand | None,
    mask: Operand | None,
    parameters: Parameters,
    rank: int | None = None,
) -> ConvSpec:
    """The checked call. Beside half precision offsets and masks may be float32: bfloat16 knows a position of 20 to 0.125."""
    if input.dtype in portable.HALF:
        offset = _beside(input, offset)
        mask = None if mask is None else _beside(input, mask)
    cached = not torch.compiler.is_compiling()
    return conv_spec(input, offset, weight, bias, mask, rank=rank, cached=cached, **parameters._asdict())


def _beside(input: Operand, other: Operand) -> Operand:
    return other._replace(dtype=input.dtype) if other.dtype == "float32" else other


def inner_spec(spec: ConvSpec) -> ConvSpec:
    """The call in the dtype that it is computed in."""
    return replace(spec, dtype="float32") if spec.dtype in portable.HALF else spec


def operand(tensor: Tensor) -> Operand:
    """What the checks need to know of a tensor."""
    return Operand(tuple(tensor.shape), dtype_name(tensor.dtype), device_of(tensor))


def dtype_name(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def device_of(tensor: Any) -> str:
    return "cpu" if tensor.is_cpu else str(tensor.device)


def forward(plan: Plan, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """The output, for plain tensors with a batch axis; without a graph."""
    spec, inner, module = plan[:3]
    # A contiguous tensor of several channels and pixels has channels 2 pixels or more apart: the check is for speed.
    form = memory_format(input) if input.stride(1) == 1 else torch.contiguous_format
    if module is portable:
        with torch.no_grad(), without_autocast(input.device.type):
            operands = [_in(inner, tensor) for tensor in (input, offset, weight, bias, mask)]
            output = portable.deform_conv_in_chunks(inner, *operands)
    elif inner is spec:
        output = torch.from_numpy(
            module.deform_conv(
                spec,
                input.numpy(force=True),
                offset.numpy(force=True),
                weight.numpy(force=True),
                None if bias is None else bias.numpy(force=True),
                None if mask is None else mask.numpy(force=True),
                library="torch",
            )
        )
    else:
        arrays = (_array(inner, tensor) for tensor in (input, offset, weight, bias, mask))
        output = torch.from_numpy(module.deform_conv(inner, *arrays, library="torch"))
    if inner is not spec:
        output = output.to(input.dtype)
    return output if output.is_contiguous(memory_format=form) else output.contiguous(memory_format=form)


def backward(
    plan: Plan,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    wanted: Collection[str],
) -> Gradients:
    """The wanted gradients, for plain tensors with a batch axis; without a graph."""
    spec, inner, module = plan[:3]
    tensors = (grad_output, input, offset, weight, mask)
    if module is portable:
        with without_autocast(input.device.type), _with_derivatives():
            operands: list[Any] = [_in(inner, tensor) for tensor in tensors]
            gradients = portable.deform_conv_backward_in_chunks(inner, *(*operands, wanted))
    else:
        if inner is spec:
            arrays = [None if tensor is None else tensor.numpy(force=True) for tensor in tensors]
        else:
            arrays = [_array(inner, tensor) for tensor in tensors]
        with np.errstate(invalid="ignore", over="ignore"):  # infinities and NaN are data here
            found = module.deform_conv_backward(inner, *arrays, wanted, library="torch")
        gradients = Gradients(*[None if array is None else torch.from_numpy(array) for array in found])
    if inner is not spec:
        like = (input, offset, weight, input, input if mask is None else mask)
        gradients = Gradients(*[None if g is None else g.to(t.dtype) for g, t in zip(gradients, like, strict=True)])
    d_input, d_offset, d_weight, d_bias, d_mask = gradients
    return Gradients(
        _formed(d_input, input),
        None if d_offset is None else d_offset.contiguous(),
        _formed(d_weight, weight),
        d_bias,
        None if d_mask is None else d_mask.contiguous(),
    )


def _formed(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    if gradient is None or (gradient.is_contiguous() and like.is_contiguous()):  # the case of most calls, said quickly
        return gradient
    return gradient.contiguous(memory_format=memory_format(like))


def second_backward(
    spec: ConvSpec, operands: Sequence[Any], wanted: Sequence[str], cotangents: Sequence[Tensor], needed: Sequence[int]
) -> dict[int, Tensor]:
    """`portable.second_backward` on plain tensors, some images at a time."""
    inner = inner_spec(spec)
    with without_autocast(operands[0].device.type):
        whole = [_in(inner, tensor) for tensor in operands]
        given: list[Any] = [_in(inner, tensor) for tensor in cotangents]
        results = {index: torch.zeros_like(whole[index]) for index in needed}  # type: ignore[arg-type]
        by_image = [name in ("input", "offset", "mask") for name in wanted]
        for images, part in portable.images(inner):
            mine = [t if t is None or index == 3 else t[images] for index, t in enumerate(whole)]
            theirs = [t[images] if flag else t for t, flag in zip(given, by_image, strict=True)]
            for index, found in portable.second_backward(part, mine, wanted, theirs, needed).items():
                results[index][... if index == 3 else images] += found
    return {index: result.to(operands[index].dtype) for index, result in results.items()}


def explain(spec: ConvSpec, device: str, backend: str | None) -> str:
    """What `deformconv.explain` says of a call on tensors."""
    inner = inner_spec(spec)
    text = dispatch.explain(inner, "torch", device, backend)
    if inner is not spec:
        text = text.replace("; float32,", f"; {spec.dtype} computed in float32,", 1)
    return text


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The memory format of what is computed from a tensor, as convolutions have it."""
    return suggest_memory_format(tensor)


def without_autocast(device: str) -> Any:
    """A context in which autocast does not reach the operations that make up ours."""
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()


def _with_derivatives() -> Any:
    """A context in which PyTorch can differentiate, as the portable form needs it, also within a kernel of an operator.

    There the dispatcher has left out whatever comes before kernels, if a compiler or a mode called it.
    """
    if not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode):
        return nullcontext()
    excluded = torch._C._dispatch_tls_local_exclude_set() & _AUTOCAST
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _autocast_keys() -> Any:
    first, *others = (key for name, key in torch._C.DispatchKey.__members__.items() if name.startswith("Autocast"))
    keys = torch._C.DispatchKeySet(first)
    for key in others:
        keys = keys.add(key)
    return keys


_AUTOCAST = _autocast_keys()


def is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _in(spec: ConvSpec, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(getattr(torch, spec.dtype))


def _array(spec: ConvSpec, tensor: Tensor | None) -> np.ndarray | None:
    """The tensor's memory, or its numbers in the dtype that is computed in."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype is not getattr(torch, spec.dtype):
        tensor = tensor.to(getattr(torch, spec.dtype))
    array: np.ndarray = tensor.numpy(force=True)
    return array
