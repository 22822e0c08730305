"""Other people's operators in the place of mmcv's: torchvision's convolution, and RoI pooling by PyTorch's grid_sample."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional

__all__ = ["deform_conv2d", "deform_roi_pool", "in_place_of_mmcvs", "modulated_deform_conv2d", "roi_align"]


def deform_conv2d(
    input: Tensor, offset: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    deform_groups: int = 1, bias: bool = False, im2col_step: int = 32,
) -> Tensor:  # fmt: skip
    """mmcv.ops.deform_conv2d by torchvision, which takes the groups from the shapes."""
    assert (
        not bias and weight.shape[1] * groups == input.shape[1] and offset.shape[1] == deform_groups * 2 * weight[0, 0].numel()
    )
    found: Tensor = torchvision.ops.deform_conv2d(input, offset, weight, None, stride, padding, dilation)
    return found


def modulated_deform_conv2d(
    input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1, deform_groups: int = 1,
) -> Tensor:  # fmt: skip
    """mmcv.ops.modulated_deform_conv2d by torchvision."""
    assert weight.shape[1] * groups == input.shape[1] and mask.shape[1] == deform_groups * weight[0, 0].numel()
    found: Tensor = torchvision.ops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    return found


def deform_roi_pool(
    input: Tensor, rois: Tensor, offset: Tensor | None, output_size: tuple[int, int], spatial_scale: float = 1.0,
    sampling_ratio: int = 0, gamma: float = 0.1,
) -> Tensor:  # fmt: skip
    """mmcv.ops.deform_roi_pool: one call of grid_sample for each box, whose derivatives are PyTorch's."""
    size = input.shape[-2:]
    found = []
    for row, box in enumerate(rois):
        start, end = (box[[2, 1]] * spatial_scale - 0.5), (box[[4, 3]] * spatial_scale - 0.5)  # y, x
        side = end - start
        positions, inside = [], []
        for axis in (0, 1):
            bins = output_size[axis]
            samples = sampling_ratio if sampling_ratio > 0 else max(ceil(float(side[axis]) / bins), 1)
            within = (torch.arange(samples, dtype=input.dtype) + 0.5) / samples
            steps = (torch.arange(bins)[:, None] + within) * side[axis] / bins
            # Bins and samples of this axis, beside those of the other one.
            steps = steps[:, None, :, None] if axis == 0 else steps[None, :, None, :]
            moved = 0 if offset is None else gamma * side[axis] * offset[row, 1 - axis][:, :, None, None]
            position = start[axis] + moved + steps
            positions.append(position)
            inside.append((position >= -1) & (position <= size[axis]))
        y, x = torch.broadcast_tensors(*positions)
        grid = torch.stack([2 * x / (size[1] - 1) - 1, 2 * y / (size[0] - 1) - 1], dim=-1).reshape(1, 1, -1, 2)
        image = input[int(box[0])][None]
        values = functional.grid_sample(image, grid, padding_mode="border", align_corners=True).reshape(-1, *y.shape)
        found.append((values * (inside[0] & inside[1])).mean((-1, -2)))
    return torch.stack(found) if found else input.new_zeros(0, input.shape[1], *output_size)


def roi_align(
    input: Tensor, rois: Tensor, output_size: Any, spatial_scale: float = 1.0, sampling_ratio: int = 0, pool_mode: str = "avg",
    aligned: bool = True,
) -> Tensor:  # fmt: skip
    """mmcv.ops.roi_align by torchvision."""
    assert pool_mode == "avg"
    found: Tensor = torchvision.ops.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned)
    return found


@contextmanager
def in_place_of_mmcvs() -> Iterator[None]:
    """These functions in the modules of mmcv.ops, where its layers look them up."""
    with pytest.MonkeyPatch.context() as patch:
        for module, function in (
            ("deform_conv", deform_conv2d),
            ("modulated_deform_conv", modulated_deform_conv2d),
            ("deform_roi_pool", deform_roi_pool),
            ("roi_align", roi_align),
        ):
            patch.setattr(sys.modules[f"mmcv.ops.{module}"], function.__name__, function)
        yield
