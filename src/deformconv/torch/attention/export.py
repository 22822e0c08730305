"""Multi-scale deformable attention in ONNX: a standard GridSample node for each level, between standard operators."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from deformconv.ops.attention.spec import AttentionSpec
from deformconv.torch.registry import Export
from deformconv.torch.tensors import HALF

__all__ = ["EXPORT", "deform_attention"]


def deform_attention(spec: AttentionSpec, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The call as PyTorch's operations, which the exporter knows; half precision in float32, as this library computes it."""
    dtype = value.dtype
    value, locations, weights = (tensor.float() if tensor.dtype in HALF else tensor for tensor in (value, locations, weights))
    values = value.flatten(2).transpose(1, 2)  # (N, heads*d, L)
    grid = 2 * locations.transpose(1, 2).flatten(0, 1) - 1  # (N*heads, Q, levels, points, 2), from -1 to 1
    factors = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (N*heads, 1, Q, levels, points)
    sums = []
    for level, (start, (height, width)) in enumerate(zip(spec.starts, spec.levels, strict=True)):
        pixels = values[..., start : start + height * width].reshape(-1, spec.channels, height, width)
        samples = F.grid_sample(pixels, grid[:, :, level], padding_mode="zeros", align_corners=False)
        sums.append((samples * factors[:, :, :, level]).sum(-1))  # (N*heads, d, Q)
    output = sum(sums[1:], sums[0]).reshape(-1, spec.heads * spec.channels, spec.queries)
    return output.transpose(1, 2).to(dtype)


EXPORT = Export(deform_attention, first_opset=16)
