"""Many calls of any operator as one: their images are a larger batch, and where that cannot be, a loop.

It is what vmap of PyTorch and of JAX need. The rules get arrays, the mapped axis of each (`dims`, None where an array is not
mapped), and `one`, which calls the operator on arrays without that axis. They return results with the mapped axis in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from array_api_compat import array_namespace

from deformconv.ops.operator import Argument, Operator, Spec

__all__ = ["all_in_front", "fold_backward", "fold_forward", "in_front", "merged", "split"]

Array = Any


def fold_forward(
    operator: Operator,
    one: Callable[..., Array],
    spec: Spec,
    B: int,
    dims: Sequence[int | None],
    operands: Sequence[Array | None],
) -> Array:
    """The output (B, ...); `one` takes a spec and the operands."""
    if _are_images(operator.arguments, dims):
        folded = [_into_batch(*triple, B) for triple in zip(operator.arguments, operands, dims, strict=True)]
        return split(one(replace(spec, batch=B * spec.batch), *folded), 0, B)
    return _stacked([one(spec, *(_at(a, dim, b) for a, dim in zip(operands, dims, strict=True))) for b in range(B)])


def fold_backward(
    operator: Operator,
    one: Callable[..., Any],
    spec: Spec,
    B: int,
    dims: Sequence[int | None],
    operands: Sequence[Array | None],
    wanted: Sequence[str],
) -> Any:
    """The gradients, each with B in front; `one` takes a spec, grad_output, the other operands and wanted."""
    arguments = (Argument("grad_output"), *operator.in_backward)
    sums = [argument.name for argument in operator.arguments if not argument.by_image and argument.name in wanted]
    if not sums and _are_images(arguments, dims):
        grad_output, *others = (_into_batch(*triple, B) for triple in zip(arguments, operands, dims, strict=True))
        found = one(replace(spec, batch=B * spec.batch), grad_output, others, wanted)
        return operator.gradients(*(None if g is None else split(g, 0, B) for g in found))
    parts = []
    for b in range(B):
        grad_output, *others = (_at(a, dim, b) for a, dim in zip(operands, dims, strict=True))
        parts.append(one(spec, grad_output, others, wanted))
    return operator.gradients(*(None if g[0] is None else _stacked(g) for g in zip(*parts, strict=True)))


def in_front(array: Array | None, dim: int | None) -> Array | None:
    """A mapped array with the mapped axis in front; another as it is."""
    return array if array is None or dim is None else array_namespace(array).moveaxis(array, dim, 0)


def all_in_front(array: Any, B: int, dim: int | None) -> Array:
    """An array (B, ...), from one whose mapped axis is in front, or from one that is the same for all."""
    return array_namespace(array).broadcast_to(array, (B, *array.shape)) if dim is None else array


def merged(array: Array, axis: int, number: int = 2) -> Array:
    """The array with a number of neighbouring axes as one, the first of them at `axis`."""
    shape, end = tuple(array.shape), axis + number
    size = 1
    for length in shape[axis:end]:
        size = size * length
    return array_namespace(array).reshape(array, (*shape[:axis], size, *shape[end:]))


def split(array: Array, axis: int, *sizes: int) -> Array:
    """The array with an axis cut into several: of these sizes, and of what is left for the last."""
    shape, rest = tuple(array.shape), array.shape[axis]
    for size in sizes:
        rest = rest // size
    return array_namespace(array).reshape(array, (*shape[:axis], *sizes, rest, *shape[axis + 1 :]))


def _are_images(arguments: Sequence[Argument], dims: Sequence[int | None]) -> bool:
    """Whether all that is mapped has a batch axis."""
    return all(argument.by_image or dim is None for argument, dim in zip(arguments, dims, strict=True))


def _into_batch(argument: Argument, array: Array | None, dim: int | None, B: int) -> Array | None:
    if array is None or not argument.by_image:
        return array
    return merged(all_in_front(in_front(array, dim), B, dim), 0)


def _at(array: Array | None, dim: int | None, b: int) -> Array | None:
    return array if array is None or dim is None else array[(slice(None),) * dim + (b,)]


def _stacked(arrays: Sequence[Array]) -> Array:
    return array_namespace(arrays[0]).stack(arrays)
