"""Deformable aggregation in ONNX: one standard GridSample node, between standard operators."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from deformconv.ops.aggregate.spec import AggregateSpec
from deformconv.torch.registry import Export, check_opset
from deformconv.torch.tensors import HALF

__all__ = ["EXPORT", "deform_aggregate"]


def deform_aggregate(spec: AggregateSpec, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
    """The call as PyTorch's operations, which the exporter knows; half precision in float32, as this library computes it.

    1-D is 2-D of height 1. Beyond the edge GridSample's "zeros" fades as ours does; for "inside" it continues the last pixel,
    and what is not within the map is multiplied by 0.
    """
    check_opset(*((20, "GridSample over 3 axes") if spec.rank == 3 else (EXPORT.first_opset, "GridSample")))
    dtype = input.dtype
    input, offset = (tensor.float() if tensor.dtype in HALF else tensor for tensor in (input, offset))
    images, taps, rank = spec.batch * spec.offset_groups, spec.taps, spec.rank
    pixels = input.reshape(images, spec.group_channels, *((1,) if rank == 1 else ()), *spec.input_size)
    moves = offset.reshape(images, taps, rank, *spec.output_size)
    factors = None if mask is None else mask.to(input.dtype).reshape(images, 1, taps, *spec.output_size)
    places = []
    for axis, size in enumerate(spec.input_size):
        base, move = _base(spec, axis, offset), moves[:, :, axis]
        # Beyond there every sample is outside; GridSample knows no infinity.
        places.append((2 * (base + move).clamp(-2, size + 1) + 1) / size - 1)
        if spec.boundary == "inside":
            pixel = (base + move.floor())[:, None]  # exact, as their sum is not: (N*offset_groups, 1, K, *O)
            within = ((pixel >= 0) & (pixel <= size - 1)).to(input.dtype)
            factors = within if factors is None else factors * within
    if rank == 1:
        places.insert(0, torch.zeros_like(places[0]))
    grid = torch.stack(places[::-1], -1)  # (N*offset_groups, K, *O, 2 or 3), x first
    grid = grid if rank == 1 else grid.flatten(1, 2)
    mode = "zeros" if spec.boundary == "zeros" else "border"
    samples = F.grid_sample(pixels, grid, padding_mode=mode, align_corners=False)
    samples = samples.reshape(images, spec.group_channels, taps, *spec.output_size)
    samples = samples if factors is None else samples * factors
    return samples.sum(2).reshape(spec.output_shape).to(dtype)


def _base(spec: AggregateSpec, axis: int, like: Tensor) -> Tensor:
    """p*stride - padding + k*dilation along an axis, (K, *O) with 1 for the other axes."""
    tap = torch.arange(spec.taps, device=like.device) // prod(spec.kernel_size[axis + 1 :]) % spec.kernel_size[axis]
    position = torch.arange(spec.output_size[axis], device=like.device) * spec.stride[axis] - spec.padding[axis][0]
    tap = (tap * spec.dilation[axis]).reshape(-1, *(1,) * spec.rank)
    return (tap + position.reshape(-1, *(1,) * (spec.rank - 1 - axis))).to(like.dtype)


EXPORT = Export(deform_aggregate, first_opset=16)
