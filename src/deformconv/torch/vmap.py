"""vmap for any operator: mapped images are a larger batch, and anything else is a loop.

The rules get tensors, the mapped axis of each (`dims`, None where a tensor is not mapped), and `one`, which calls the operator
on tensors without that axis. They return results with the mapped axis in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deformconv.ops.operator import Argument, Operator, Spec

__all__ = ["all_in_front", "fold_backward", "fold_forward", "in_front"]


def fold_forward(
    operator: Operator,
    one: Callable[..., Tensor],
    spec: Spec,
    B: int,
    dims: Sequence[int | None],
    operands: Sequence[Tensor | None],
) -> Tensor:
    """The output (B, ...); `one` takes a spec and the operands."""
    if _are_images(operator.arguments, dims):
        folded = [_into_batch(*triple, B) for triple in zip(operator.arguments, operands, dims, strict=True)]
        return one(replace(spec, batch=B * spec.batch), *folded).unflatten(0, (B, spec.batch))
    return torch.stack([one(spec, *(_at(t, dim, b) for t, dim in zip(operands, dims, strict=True))) for b in range(B)])


def fold_backward(
    operator: Operator,
    one: Callable[..., Any],
    spec: Spec,
    B: int,
    dims: Sequence[int | None],
    operands: Sequence[Tensor | None],
    wanted: Sequence[str],
) -> Any:
    """The gradients, each with B in front; `one` takes a spec, grad_output, the other operands and wanted."""
    arguments = (Argument("grad_output"), *operator.in_backward)
    sums = [argument.name for argument in operator.arguments if not argument.by_image and argument.name in wanted]
    if not sums and _are_images(arguments, dims):
        grad_output, *others = (_into_batch(*triple, B) for triple in zip(arguments, operands, dims, strict=True))
        found = one(replace(spec, batch=B * spec.batch), grad_output, others, wanted)
        return operator.gradients(*(None if g is None else g.unflatten(0, (B, spec.batch)) for g in found))
    parts = []
    for b in range(B):
        grad_output, *others = (_at(t, dim, b) for t, dim in zip(operands, dims, strict=True))
        parts.append(one(spec, grad_output, others, wanted))
    return operator.gradients(*(None if g[0] is None else torch.stack(g) for g in zip(*parts, strict=True)))


def in_front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """A mapped tensor with the mapped axis in front; another as it is."""
    return tensor if tensor is None or dim is None else tensor.movedim(dim, 0)


def all_in_front(tensor: Any, B: int, dim: int | None) -> Tensor:
    """A tensor (B, ...), from one whose mapped axis is in front, or from one that is the same for all."""
    result: Tensor = tensor.expand(B, *tensor.shape) if dim is None else tensor
    return result


def _are_images(arguments: Sequence[Argument], dims: Sequence[int | None]) -> bool:
    """Whether all that is mapped has a batch axis."""
    return all(argument.by_image or dim is None for argument, dim in zip(arguments, dims, strict=True))


def _into_batch(argument: Argument, tensor: Tensor | None, dim: int | None, B: int) -> Tensor | None:
    if tensor is None or not argument.by_image:
        return tensor
    return all_in_front(in_front(tensor, dim), B, dim).flatten(0, 1)


def _at(tensor: Tensor | None, dim: int | None, b: int) -> Tensor | None:
    return tensor if tensor is None or dim is None else tensor.select(dim, b)
