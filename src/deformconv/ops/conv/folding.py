"""vmap without a loop: a mapped axis becomes part of the batch, of the groups or of the output channels of one call.

- Images, offsets and masks that differ, and one weight: a larger batch.
- Weights that differ, over the same samples: more output channels, sampled once.
- Both: groups, each with its own offset groups. So are gradients of one weight for many outputs, which must not be
  added up.

`run` calls the operator on arrays without the mapped axis; in `deformconv.ops.folding` it is called `one`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from array_api_compat import array_namespace

from deformconv.ops.conv.spec import ConvSpec, Gradients
from deformconv.ops.folding import all_in_front, in_front, merged, split

__all__ = ["fold_backward", "fold_forward"]

Array = Any
Run = Callable[..., Any]


def fold_forward(run: Run, spec: ConvSpec, B: int, dims: Sequence[int | None], operands: Sequence[Array | None]) -> Array:
    """The output (B, N, C_out, *O); `run` takes a spec, and input, offset, weight, bias and mask."""
    input, offset, weight, bias, mask = map(in_front, operands, dims)
    of_samples = (dims[0], dims[1], dims[4])
    if dims[2] is None and dims[3] is None:
        folded = replace(spec, batch=B * spec.batch)
        x, o, m = (_into_batch(array, B, dim) for array, dim in zip((input, offset, mask), of_samples, strict=True))
        return split(run(folded, x, o, weight, bias, m), 0, B)
    weight = all_in_front(weight, B, dims[2])
    bias = None if bias is None else all_in_front(bias, B, dims[3])
    if of_samples == (None, None, None):
        folded = replace(spec, out_channels=B * spec.out_channels)
        bias = None if bias is None else _outputs(spec, bias)
        return _outputs_back(spec, B, run(folded, input, offset, _outputs(spec, weight), bias, mask), 1)
    x, o, m = (_into_channels(array, B, dim) for array, dim in zip((input, offset, mask), of_samples, strict=True))
    bias = None if bias is None else merged(bias, 0)
    return _from_channels(run(_in_groups(spec, B), x, o, merged(weight, 0), bias, m), B)


def fold_backward(
    run: Run, spec: ConvSpec, B: int, dims: Sequence[int | None], operands: Sequence[Array | None], wanted: Sequence[str]
) -> Gradients:
    """The gradients, each with B in front; `run` takes a spec, grad_output, (input, offset, weight, mask) and wanted."""
    grad_output, input, offset, weight, mask = operands = tuple(map(in_front, operands, dims))
    results = {}
    if "bias" in wanted:
        grad = all_in_front(grad_output, B, dims[0])  # (B, N, C_out, *O)
        results["bias"] = array_namespace(grad).sum(grad, axis=(1, *range(3, grad.ndim)))
    inner = [name for name in wanted if name != "bias"]
    if inner == ["weight"] and (dims[1], dims[2], dims[4]) == (None, None, None):
        folded = replace(spec, out_channels=B * spec.out_channels)
        grad = _moved(all_in_front(grad_output, B, dims[0]), 0, 1)  # (N, B, C_out, *O)
        grad = merged(_moved(split(grad, 2, spec.groups), 2, 1), 1, 3)  # (N, groups*B*(C_out/groups), *O)
        found = run(folded, grad, (input, offset, _outputs(spec, all_in_front(weight, B, dims[3])), mask), inner)
        results["weight"] = _outputs_back(spec, B, found.weight, 0)
    elif "weight" in inner or (inner and dims[3] is not None):
        g, x, o, m = (_into_channels(operands[i], B, dims[i]) for i in (0, 1, 2, 4))
        found = run(_in_groups(spec, B), g, (x, o, merged(all_in_front(weight, B, dims[3]), 0), m), inner)
        for name in inner:
            gradient = getattr(found, name)
            results[name] = split(gradient, 0, B) if name == "weight" else _from_channels(gradient, B)
    elif inner:
        g, x, o, m = (_into_batch(operands[i], B, dims[i]) for i in (0, 1, 2, 4))
        found = run(replace(spec, batch=B * spec.batch), g, (x, o, weight, m), inner)
        for name in inner:
            results[name] = split(getattr(found, name), 0, B)
    return Gradients(**results)


def _in_groups(spec: ConvSpec, B: int) -> ConvSpec:
    return replace(
        spec,
        in_channels=B * spec.in_channels,
        out_channels=B * spec.out_channels,
        groups=B * spec.groups,
        offset_groups=B * spec.offset_groups,
    )


def _moved(array: Array, source: int, destination: int) -> Array:
    return array_namespace(array).moveaxis(array, source, destination)


def _into_batch(array: Array | None, B: int, dim: int | None) -> Array | None:
    return None if array is None else merged(all_in_front(array, B, dim), 0)


def _into_channels(array: Array | None, B: int, dim: int | None) -> Array | None:
    """(B, N, C, ...) as (N, B*C, ...)."""
    return None if array is None else merged(_moved(all_in_front(array, B, dim), 0, 1), 1)


def _from_channels(array: Array, B: int) -> Array:
    return _moved(split(array, 1, B), 1, 0)


def _outputs(spec: ConvSpec, array: Array) -> Array:
    """(B, C_out, ...) as (B*C_out, ...), with the outputs of a group together."""
    return merged(_moved(split(array, 1, spec.groups), 0, 1), 0, 3)


def _outputs_back(spec: ConvSpec, B: int, array: Array, axis: int) -> Array:
    """The inverse of `_outputs` along an axis, B in front."""
    return merged(_moved(split(array, axis, spec.groups, B), axis + 1, 0), axis + 1)
