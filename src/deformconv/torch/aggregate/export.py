"""Deformable aggregation in ONNX: one standard GridSample node, between standard operators."""

from __future__ import annotations

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
    factors = None if mask is None else mask.to(input.dtype).reshape(images, taps, *spec.output_size)
    moves, base = offset.reshape(images, taps, rank, *spec.output_size), _base(spec, offset)
    sizes = torch.stack([torch.scalar_tensor(size, dtype=base.dtype, device=base.device) for size in spec.input_size])
    sizes = sizes.reshape(rank, *(1,) * rank)
    # Beyond there every sample is outside; GridSample knows no infinity.
    position = torch.minimum((base + moves).clamp(min=-2), sizes + 1)
    grid = ((2 * position + 1) / sizes - 1).movedim(2, -1).flip(-1)  # (N*offset_groups, K, *O, D), x first
    grid = F.pad(grid, (0, 1)) if rank == 1 else grid.flatten(1, 2)
    if spec.boundary == "inside":
        pixel = base + moves.floor()  # exact, as their sum is not
        within = ((pixel >= 0) & (pixel < sizes)).to(input.dtype).prod(2)
        factors = within if factors is None else factors * within
    mode = "zeros" if spec.boundary == "zeros" else "border"
    samples = F.grid_sample(pixels, grid, padding_mode=mode, align_corners=False)
    samples = samples.reshape(images, spec.group_channels, taps, *spec.output_size)
    samples = samples if factors is None else samples * factors[:, None]
    return samples.sum(2).reshape(spec.output_shape).to(dtype)


def _base(spec: AggregateSpec, like: Tensor) -> Tensor:
    """p*stride - padding + k*dilation along every axis, (K, D, *O)."""
    bases = []
    for axis, tap in enumerate(torch.unravel_index(torch.arange(spec.taps, device=like.device), spec.kernel_size)):
        position = torch.arange(spec.output_size[axis], device=like.device) * spec.stride[axis] - spec.padding[axis][0]
        base = (tap * spec.dilation[axis])[:, None] + position  # (K, O along the axis)
        around = [1] * spec.rank
        around[axis] = -1
        bases.append(base.reshape(spec.taps, *around).expand(-1, *spec.output_size))
    return torch.stack(bases, 1).to(like.dtype)


EXPORT = Export(deform_aggregate, first_opset=16)
