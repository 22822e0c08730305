"""The operator and its backward in PyTorch's registry, where compilers, exporters, tracers and modes see them.

`deformconv::deform_conv` and `deformconv::deform_conv_backward` have a kernel for every device, a fake kernel that
knows shapes alone, derivatives, a rule for vmap and a count of operations. Eager calls take a shorter way, past the
dispatcher, to the same `compute`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from deformconv.ops.conv.spec import GRADIENTS, ConvSpec, Gradients, check_grad_output
from deformconv.torch import compute, folding
from deformconv.torch.compute import Parameters

__all__ = ["backward", "forward"]

_PARAMETERS = "int[] stride, int[] padding, int[] dilation, int? groups, int? offset_groups, str boundary, str? backend"

library = torch.library.Library("deformconv", "DEF")
library.define(
    f"deform_conv(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, {_PARAMETERS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "deform_conv_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
    f"{_PARAMETERS}, bool[] wanted) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
forward_op = torch.ops.deformconv.deform_conv.default
backward_op = torch.ops.deformconv.deform_conv_backward.default


def forward(spec: ConvSpec, backend: str | None, *operands: Tensor | None) -> Tensor:
    """Call the operator: `operands` are input, offset, weight, bias and mask."""
    _let_modes_count()
    result: Tensor = forward_op(*operands, *_arguments(spec), backend)
    return result


def backward(
    spec: ConvSpec,
    backend: str | None,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    wanted: Collection[str],
) -> Gradients:
    """Call the backward operator, which returns what is wanted and nothing else."""
    flags = [name in wanted for name in GRADIENTS]
    found = backward_op(grad_output, input, offset, weight, mask, *_arguments(spec), backend, flags)
    return _gradients(flags, found)


def call(backend: str | None, parameters: Parameters, *operands: Tensor | None) -> Tensor:
    """Call the operator on unchecked tensors and on parameters that are plain integers."""
    if not torch.compiler.is_compiling():
        _let_modes_count()
    padding = [amount for pair in parameters.padding for amount in pair]
    _, _, _, groups, offset_groups, boundary = parameters
    result: Tensor = forward_op(
        *operands, parameters.stride, padding, parameters.dilation, groups, offset_groups, boundary, backend
    )
    return result


def _arguments(spec: ConvSpec) -> tuple[Any, ...]:
    padding = [amount for pair in spec.padding for amount in pair]
    return spec.stride, padding, spec.dilation, spec.groups, spec.offset_groups, spec.boundary


def _gradients(flags: list[bool], found: list[Tensor]) -> Gradients:
    results = iter(found)
    return Gradients(*(next(results) if flag else None for flag in flags))


def _parameters(
    stride: list[int], padding: list[int], dilation: list[int], groups: int | None, offset_groups: int | None, boundary: str
) -> Parameters:
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return Parameters(tuple(stride), pairs, tuple(dilation), groups, offset_groups, boundary)


def forward_spec(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *parameters: Any
) -> ConvSpec:
    operands: Any = [None if tensor is None else compute.operand(tensor) for tensor in (input, offset, weight, bias, mask)]
    return compute.spec_of(*(*operands, _parameters(*parameters)))


def backward_spec(
    grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *parameters: Any
) -> ConvSpec:
    """The checked call of a backward pass, which may be asked for a bias's gradient without the bias."""
    spec = replace(forward_spec(input, offset, weight, None, mask, *parameters), biased=True)
    check_grad_output(spec, compute.operand(grad_output))
    return spec


def _forward_kernel(*arguments: Any) -> Tensor:
    *operands, backend = arguments
    with untraced():
        plan = compute.plan_for(forward_spec(*operands), compute.device_of(operands[0]), False, backend)
        return compute.forward(plan, *operands[:5])


def _backward_kernel(*arguments: Any) -> list[Tensor]:
    *operands, backend, flags = arguments
    with untraced():
        spec = backward_spec(*operands)
        plan = compute.plan_for(spec, compute.device_of(operands[0]), True, backend)
        gradients = compute.backward(plan, *(*operands[:5], _names(flags)))
    return [gradient for gradient in gradients if gradient is not None]


def _forward_fake(*arguments: Any) -> Tensor:
    input, spec = arguments[0], forward_spec(*arguments[:-1])
    return _empty(input, spec.output_shape, input)


def _backward_fake(*arguments: Any) -> list[Tensor]:
    *operands, _, flags = arguments
    _, input, offset, weight, mask = operands[:5]
    spec = backward_spec(*operands)
    shapes = {
        "input": lambda: _empty(input, input.shape, input),
        "offset": lambda: offset.new_empty(offset.shape),
        "weight": lambda: _empty(weight, weight.shape, weight),
        "bias": lambda: input.new_empty((spec.out_channels,)),
        "mask": lambda: mask.new_empty(mask.shape),
    }
    return [shapes[name]() for name in _names(flags)]


def _empty(tensor: Tensor, shape: Any, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=compute.memory_format(like))


def _names(flags: list[bool]) -> list[str]:
    return [name for name, flag in zip(GRADIENTS, flags, strict=True) if flag]


@contextmanager
def untraced() -> Iterator[None]:
    """Sizes are plain numbers within: while torch.jit.trace records a call of ours, it needs nothing of its inside."""
    torch_c: Any = torch._C
    state = torch_c._get_tracing_state()
    if state is None:
        yield
        return
    torch_c._set_tracing_state(None)
    try:
        yield
    finally:
        torch_c._set_tracing_state(state)


def _forward_vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    operands, dims, backend = arguments[:5], in_dims[:5], arguments[-1]
    one: Any = [_without(*pair) for pair in zip(operands, dims, strict=True)]
    spec = forward_spec(*one, *arguments[5:-1])

    def run(spec: ConvSpec, *operands: Tensor | None) -> Tensor:
        return forward(spec, backend, *operands)

    return folding.fold_forward(run, spec, info.batch_size, dims, operands), 0


def _backward_vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
    operands, dims, backend, flags = arguments[:5], in_dims[:5], arguments[-2], arguments[-1]
    one: Any = [_without(*pair) for pair in zip(operands, dims, strict=True)]
    spec = backward_spec(*one, *arguments[5:-2])

    def run(spec: ConvSpec, *arguments: Any) -> Gradients:
        return backward(spec, backend, *arguments)

    gradients = folding.fold_backward(run, spec, info.batch_size, dims, operands, _names(flags))
    found = [gradient for gradient in gradients if gradient is not None]
    return found, [0] * len(found)


def _without(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """One of the tensors that a mapped one stands for."""
    return tensor if tensor is None or dim is None else tensor.select(dim, 0)


def _forward_flops(input: Any, offset: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Two for each multiply-add, as PyTorch counts a convolution: interpolation is left out."""
    return 2 * prod(weight) * out_shape[0] * prod(out_shape[2:])


def _backward_flops(grad_output: Any, input: Any, offset: Any, weight: Any, *arguments: Any, **_: Any) -> int:
    """A product for the samples' gradients and one for the weight's."""
    of_input, of_offset, of_weight, _, of_mask = arguments[-1]
    products = of_weight + (of_input or of_offset or of_mask)
    return 2 * products * prod(weight) * grad_output[0] * prod(grad_output[2:])


def _let_modes_count() -> None:
    """Tell PyTorch's counter of operations ours; only when somebody uses it, because it takes long to import."""
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None or forward_op.overloadpacket in counter.flop_registry:
        return
    for op, flops in ((forward_op, _forward_flops), (backward_op, _backward_flops)):
        counter.register_flop_formula(op.overloadpacket)(flops)
    for mode in _get_current_dispatch_mode_stack():  # each has copied the registry when it was made
        registry = getattr(getattr(mode, "counter", mode), "flop_registry", {})
        registry.update((op.overloadpacket, counter.flop_registry[op.overloadpacket]) for op in (forward_op, backward_op))


def _register() -> None:
    for op, kernel, fake, vmap in (
        (forward_op, _forward_kernel, _forward_fake, _forward_vmap),
        (backward_op, _backward_kernel, _backward_fake, _backward_vmap),
    ):
        name = op.name()
        library.impl(name.partition("::")[2], kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=library)
        if hasattr(torch.library, "register_vmap"):  # since PyTorch 2.5; before, vmap of the registered operators raises
            torch.library.register_vmap(name, vmap, lib=library)


_register()
