"""PyTorch's own operations as a backend: the portable form of an operator, which PyTorch differentiates to any order.

Where no graph is recorded, it computes a part of the call at a time, so that memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deformconv import dispatch
from deformconv.ops.operator import Argument, Operator, Spec

__all__ = ["backward", "backward_in_parts", "forward", "forward_in_parts", "second_backward", "second_backward_in_parts"]


def forward(operator: Operator, spec: Spec, *operands: Any) -> Tensor:
    """The output, by operations that carry every derivative; in the dtype that the portable form computes in, then back."""
    portable = dispatch.load(operator, "portable")
    pairs = zip(operator.arguments, operands, strict=True)
    operands = tuple(t if argument.differentiable or t is None else t.detach() for argument, t in pairs)
    dtype = portable.computes_in(spec.dtype, "torch")
    if dtype == spec.dtype:
        output: Tensor = portable.forward(spec, *operands)
        return output
    inner = [None if tensor is None else tensor.to(getattr(torch, dtype)) for tensor in operands]
    output = portable.forward(replace(spec, dtype=dtype), *inner)
    return output.to(operands[0].dtype)


def backward(
    operator: Operator,
    spec: Spec,
    grad_output: Tensor,
    operands: Sequence[Tensor | None],
    wanted: Collection[str],
    compute: Callable[..., Any] | None = None,
) -> Any:
    """The wanted gradients of sum(grad_output * output), for the operands that gradients depend on."""
    from torch.func import vjp

    call: dict[str, Any] = dict.fromkeys(operator.names)
    call |= zip((argument.name for argument in operator.in_backward), operands, strict=True)
    gradients = {
        argument.name: argument.gradient(grad_output)
        for argument in operator.arguments
        if argument.gradient is not None and argument.name in wanted and argument.name in spec.shapes
    }
    names = [name for name, value in call.items() if name in wanted and value is not None]
    if not names:
        return operator.gradients(**gradients)
    run = compute or partial(forward, operator)

    def output(*tensors: Tensor) -> Tensor:
        found: Tensor = run(spec, *(call | dict(zip(names, tensors, strict=True))).values())
        return found

    pull_back = vjp(output, *(call[name] for name in names))[1]
    return operator.gradients(**gradients, **dict(zip(names, pull_back(grad_output), strict=True)))


def second_backward(
    operator: Operator, spec: Spec, operands: Sequence[Any], wanted: Sequence[str], cotangents: Sequence[Tensor],
    needed: Sequence[int],
) -> dict[int, Tensor]:  # fmt: skip
    """The derivative of sum(cotangents * gradients), where `gradients` are the wanted results of `backward`.

    `operands` are grad_output and the operands that gradients depend on; `needed` are the numbers of those to derive by.
    """
    from torch.func import vjp

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        grad_output, *call = [tensors[needed.index(i)] if i in needed else value for i, value in enumerate(operands)]
        found = backward(operator, spec, grad_output, call, wanted)
        return tuple(gradient for gradient in found if gradient is not None)

    pull_back = vjp(gradients, *(operands[index] for index in needed))[1]
    return dict(zip(needed, pull_back(tuple(cotangents)), strict=True))


def forward_in_parts(operator: Operator, module: Any, spec: Spec, operands: Sequence[Tensor | None]) -> Tensor:
    """`forward` without a derivative, a part of the output at a time."""
    output: Tensor
    parts = _parts(module, spec)
    if parts is None:
        output = module.forward(spec, *operands)
        return output
    first: Any = operands[0]
    output = first.new_empty(spec.output_shape)
    for where, part in parts:
        mine = [where.of(*pair) for pair in zip(operator.arguments, operands, strict=True)]
        output[where.in_output] = module.forward(part, *mine)
    return output


def backward_in_parts(
    operator: Operator, module: Any, spec: Spec, grad_output: Tensor, operands: Sequence[Tensor | None], wanted: Collection[str]
) -> Any:
    """`backward` without a derivative of its own, a part of the output at a time."""
    parts = _parts(module, spec)
    if parts is None:
        return backward(operator, spec, grad_output, operands, wanted, module.forward)
    given = spec.shapes
    arguments = [argument for argument in operator.arguments if argument.name in wanted and argument.name in given]
    results = {argument.name: grad_output.new_zeros(given[argument.name]) for argument in arguments}
    for where, part in parts:
        mine = [where.of(*pair) for pair in zip(operator.in_backward, operands, strict=True)]
        found = backward(operator, part, grad_output[where.in_output], mine, wanted, module.forward)
        for argument in arguments:
            results[argument.name][where.within(argument)] += getattr(found, argument.name)
    return operator.gradients(**results)


def second_backward_in_parts(
    operator: Operator, spec: Spec, operands: Sequence[Any], wanted: Sequence[str], cotangents: Sequence[Tensor],
    needed: Sequence[int],
) -> dict[int, Tensor]:  # fmt: skip
    """`second_backward` without a derivative of its own, some images at a time."""
    parts = _parts(dispatch.load(operator, "portable"), spec, whole_images=True)
    if parts is None:
        return second_backward(operator, spec, operands, wanted, cotangents, needed)
    arguments = [Argument("grad_output"), *operator.in_backward]
    by_name = {argument.name: argument for argument in operator.arguments}
    results = {index: torch.zeros_like(operands[index]) for index in needed}
    for where, part in parts:
        mine = [where.of(*pair) for pair in zip(arguments, operands, strict=True)]
        theirs = [where.of(by_name[name], value) for name, value in zip(wanted, cotangents, strict=True)]
        for index, found in second_backward(operator, part, mine, wanted, theirs, needed).items():  # type: ignore[arg-type]
            results[index][where.within(arguments[index])] += found
    return results


class _Where:
    """Where a part of a call lies in the whole's arrays: some images, and some positions along the output's first axis."""

    def __init__(self, images: slice, rows: slice) -> None:
        self.images, self.in_output = images, (images, slice(None), rows)

    def within(self, argument: Argument) -> Any:
        if not argument.by_image:
            return ...
        return self.in_output if argument.by_position else self.images

    def of(self, argument: Argument, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[self.within(argument)]


def _parts(module: Any, spec: Spec, whole_images: bool = False) -> Iterator[tuple[_Where, Any]] | None:
    """The parts that a backend cuts a call into, where it cuts calls."""
    if not hasattr(module, "parts"):
        return None
    return ((_Where(images, rows), part) for images, rows, part in module.parts(spec, whole_images))
