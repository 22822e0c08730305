"""vmap without a loop: a mapped axis becomes part of the batch, of the groups or of the output channels of one call.

- Images, offsets and masks that differ, and one weight: a larger batch.
- Weights that differ, over the same samples: more output channels, sampled once.
- Both: groups, each with its own offset groups. So are gradients of one weight for many outputs, which must not be
  added up.

`run` calls the operator on tensors without the mapped axis; in the file `vmap` it is called `one`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from deformconv.ops.conv.spec import ConvSpec, Gradients
from deformconv.torch.vmap import all_in_front, in_front

__all__ = ["fold_backward", "fold_forward"]

Run = Callable[..., Any]


def fold_forward(run: Run, spec: ConvSpec, B: int, dims: Sequence[int | None], operands: Sequence[Tensor | None]) -> Tensor:
    """The output (B, N, C_out, *O); `run` takes a spec, and input, offset, weight, bias and mask."""
    input, offset, weight, bias, mask = map(in_front, operands, dims)
    of_samples = (dims[0], dims[1], dims[4])
    if dims[2] is None and dims[3] is None:
        folded = replace(spec, batch=B * spec.batch)
        x, o, m = (_into_batch(tensor, B, dim) for tensor, dim in zip((input, offset, mask), of_samples, strict=True))
        output: Tensor = run(folded, x, o, weight, bias, m)
        return output.unflatten(0, (B, spec.batch))
    weight = all_in_front(weight, B, dims[2])
    bias = None if bias is None else all_in_front(bias, B, dims[3])
    if of_samples == (None, None, None):
        folded = replace(spec, out_channels=B * spec.out_channels)
        bias = None if bias is None else _outputs(spec, bias)
        return _outputs_back(spec, B, run(folded, input, offset, _outputs(spec, weight), bias, mask), 1)
    x, o, m = (_into_channels(tensor, B, dim) for tensor, dim in zip((input, offset, mask), of_samples, strict=True))
    bias = None if bias is None else bias.flatten(0, 1)
    return _from_channels(run(_in_groups(spec, B), x, o, weight.flatten(0, 1), bias, m), B)


def fold_backward(
    run: Run, spec: ConvSpec, B: int, dims: Sequence[int | None], operands: Sequence[Tensor | None], wanted: Sequence[str]
) -> Gradients:
    """The gradients, each with B in front; `run` takes a spec, grad_output, (input, offset, weight, mask) and wanted."""
    grad_output, input, offset, weight, mask = operands = tuple(map(in_front, operands, dims))
    results = {}
    if "bias" in wanted:
        grad = all_in_front(grad_output, B, dims[0])  # (B, N, C_out, *O)
        results["bias"] = grad.sum(dim=(1, *range(3, grad.ndim)))
    inner = [name for name in wanted if name != "bias"]
    if inner == ["weight"] and (dims[1], dims[2], dims[4]) == (None, None, None):
        folded = replace(spec, out_channels=B * spec.out_channels)
        grad = all_in_front(grad_output, B, dims[0]).movedim(0, 1)  # (N, B, C_out, *O)
        grad = grad.unflatten(2, (spec.groups, spec.out_channels // spec.groups)).movedim(1, 2).flatten(1, 3)
        found = run(folded, grad, (input, offset, _outputs(spec, all_in_front(weight, B, dims[3])), mask), inner)
        results["weight"] = _outputs_back(spec, B, found.weight, 0)
    elif "weight" in inner or (inner and dims[3] is not None):
        g, x, o, m = (_into_channels(operands[i], B, dims[i]) for i in (0, 1, 2, 4))
        found = run(_in_groups(spec, B), g, (x, o, all_in_front(weight, B, dims[3]).flatten(0, 1), m), inner)
        for name in inner:
            gradient = getattr(found, name)
            weighs = name == "weight"
            results[name] = gradient.unflatten(0, (B, spec.out_channels)) if weighs else _from_channels(gradient, B)
    elif inner:
        g, x, o, m = (_into_batch(operands[i], B, dims[i]) for i in (0, 1, 2, 4))
        found = run(replace(spec, batch=B * spec.batch), g, (x, o, weight, m), inner)
        for name in inner:
            results[name] = getattr(found, name).unflatten(0, (B, spec.batch))
    return Gradients(**results)


def _in_groups(spec: ConvSpec, B: int) -> ConvSpec:
    return replace(
        spec,
        in_channels=B * spec.in_channels,
        out_channels=B * spec.out_channels,
        groups=B * spec.groups,
        offset_groups=B * spec.offset_groups,
    )


def _into_batch(tensor: Tensor | None, B: int, dim: int | None) -> Tensor | None:
    return None if tensor is None else all_in_front(tensor, B, dim).flatten(0, 1)


def _into_channels(tensor: Tensor | None, B: int, dim: int | None) -> Tensor | None:
    """(B, N, C, ...) as (N, B*C, ...)."""
    return None if tensor is None else all_in_front(tensor, B, dim).movedim(0, 1).flatten(1, 2)


def _from_channels(tensor: Tensor, B: int) -> Tensor:
    return tensor.unflatten(1, (B, tensor.shape[1] // B)).movedim(1, 0)


def _outputs(spec: ConvSpec, tensor: Tensor) -> Tensor:
    """(B, C_out, ...) as (B*C_out, ...), with the outputs of a group together."""
    return tensor.unflatten(1, (spec.groups, spec.out_channels // spec.groups)).movedim(0, 1).flatten(0, 2)


def _outputs_back(spec: ConvSpec, B: int, tensor: Tensor, axis: int) -> Tensor:
    """The inverse of `_outputs` along an axis, B in front."""
    sizes = (spec.groups, B, spec.out_channels // spec.groups)
    return tensor.unflatten(axis, sizes).movedim(axis + 1, 0).flatten(axis + 1, axis + 2)
