"""Where a box and its bins lie in the map: the three conventions, for NumPy and Python's numbers.

A box (x1, y1, x2, y2) is in pixels of an image, `spatial_scale` map pixels each. Along either axis, in map pixels:

    "aligned"     start = x1 * scale - 0.5, size = (x2 - x1) * scale                             mmcv, detectron2
    "unaligned"   start = x1 * scale, size = max((x2 - x1) * scale, 1)                           torchvision's detectors
    "rounded"     start = round(x1) * scale - 0.5, end = (round(x2) + 1) * scale - 0.5,
                  size = max(end - start, 0.1); halves are rounded away from zero                MXNet, the papers' authors

A bin is `size / output_size` long and has `count` samples along the axis: `sampling_ratio`, or, where that is 0, one for each
map pixel that the bin is long, begun ones too, and no more than the map has. Sample i of bin p lies at

    start + gamma * size * offset + p * bin + (i + 0.5) * bin / count           "aligned", "unaligned"
    start + gamma * size * offset + p * bin + i * bin / count                   "rounded"

A sample within `margin` of the map's outer pixels is moved onto the map, and its derivative by the offset is 0; what lies
beyond counts as 0 in the mean over the bin's samples, or is left out of it in "rounded". The margin is a pixel; in "rounded" it
is half a pixel.

A box that is not finite, in map pixels, is NaN in all its bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from deformconv.ops.roi_pool.spec import RoiSpec

__all__ = ["Side", "margin", "part_of", "sample_at", "sides"]


class Side(NamedTuple):
    """A box along one axis, in map pixels."""

    start: float
    size: float
    bin: float  # the length of a bin
    samples: int  # of a bin


def sides(spec: RoiSpec, box: Sequence[float]) -> tuple[Side, Side]:
    """The sides of a box (x1, y1, x2, y2) along height and width."""
    x1, y1, x2, y2 = box
    ends = ((y1, y2), (x1, x2))
    height, width = (_side(spec, axis, *pair) for axis, pair in enumerate(ends))
    ends_on_map = (corner * spec.spatial_scale for corner in box)
    if not all(map(math.isfinite, (*ends_on_map, *height[:2], *width[:2]))):
        nan = Side(math.nan, math.nan, math.nan, max(1, spec.sampling_ratio))
        return nan, nan
    return height, width


def _side(spec: RoiSpec, axis: int, low: float, high: float) -> Side:
    scale, bins = spec.spatial_scale, spec.output_size[axis]
    if spec.convention == "rounded":
        start = _round(low) * scale - 0.5
        size = max((_round(high) + 1) * scale - 0.5 - start, 0.1)
    elif spec.convention == "aligned":
        start = low * scale - 0.5
        size = high * scale - 0.5 - start
    else:
        start = low * scale
        size = max(high * scale - start, 1.0)
    count = spec.sampling_ratio
    if count == 0 and math.isfinite(size):
        count = max(0, min(math.ceil(min(size / bins, spec.input_size[axis])), spec.input_size[axis]))
    return Side(start, size, size / bins, count)


def _round(number: float) -> float:
    """To the nearest integer, halves away from zero."""
    return math.copysign(math.floor(abs(number) + 0.5), number) if math.isfinite(number) else number


def sample_at(spec: RoiSpec, side: Side, bin: int, sample: int, offset: float) -> float:
    """Where a sample lies along an axis."""
    within = sample if spec.convention == "rounded" else sample + 0.5
    count = max(1, side.samples)
    return side.start + spec.gamma * side.size * offset + bin * side.bin + within * (side.bin / count)


def margin(spec: RoiSpec) -> float:
    """How far from the map's outer pixels a sample may lie."""
    return 0.5 if spec.convention == "rounded" else 1.0


def part_of(bin: int, bins: int, parts: int) -> int:
    """Which of `parts` equal parts of a box a bin belongs to."""
    return bin * parts // bins
