"""What a sampling position means: the conventions that every backend keeps, in words and in NumPy.

**Position.** A tap reads the input at `q = base + offset`: D numbers in input pixels, pixel centres at
integers. `base` (from output position, stride, padding, tap, dilation) is an integer, the offset is a float,
and the two are never added: near pixel 1333 a float32 sum is off by 1e-4. Instead

    corner = base + floor(offset)        an integer
    fraction = offset - floor(offset)    in [0, 1]

so that every question about the map's border is one about integers.

**Absolute position.** Where no window gives an integer base (a bin of a box, a location that a network predicts),
`q` is one float. It is an offset from pixel 0: corner = floor(q), fraction = q - floor(q), and all that is said
here of an offset holds for it. Its precision is that of its dtype, so the caller computes it with care.

**Value.** Multilinear interpolation between the 2**D pixels at `corner` or `corner + 1` along each axis, with
the weights `1 - fraction` and `fraction`. A pixel of weight 0 is still read: 0 * inf is NaN.

**Boundary.** "zeros": a corner outside the map has the value 0. "inside": a sample counts only if
0 <= corner < size along every axis, and is 0 otherwise; between the last pixel and the end of the map
(corner = size - 1) both corners are that pixel and the fraction is 0.

**Derivative.** That of the piece to the right: a fraction of 0 belongs to its pixel and the next one. Where
"inside" sets the fraction to 0, the derivative along that axis is 0.

**Not a finite number.** NaN along any axis: the value is NaN, so are the derivatives by the tap's offset
(along every axis) and mask, and the input's gradient gets nothing. Else, if infinite or at least 2**40 along
any axis: outside, with value and derivatives 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

__all__ = ["BOUNDARIES", "REACH", "Corner", "base", "check_boundary", "corners", "interpolate", "interpolate_at", "split"]

BOUNDARIES = ("zeros", "inside")  # the one list: operators, layers and converters check against it
REACH = 2.0**40  # the first offset that is out of reach; base + floor(offset) below it fits 64-bit integers


class Corner(NamedTuple):
    """A pixel that a position interpolates between."""

    pixel: tuple[int, ...]
    weight: float
    d_weight: tuple[float, ...]  # the weight's derivative along each axis


def check_boundary(boundary: Any, others: str = "") -> None:
    """Raise ValueError unless this is a boundary's name; `others` are words for what the caller takes beside."""
    if boundary not in BOUNDARIES:
        raise ValueError(f"`boundary` is {boundary!r}; expected {' or '.join(map(repr, BOUNDARIES))}{others}.")


def base(position: int, tap: int, stride: int, padding_before: int, dilation: int) -> int:
    """Where a tap stands before its offset, along one axis."""
    return position * stride - padding_before + tap * dilation


def split(base: int, offset: float) -> tuple[int, float]:
    """The corner and the fraction of a position along one axis; of an absolute position where `base` is 0."""
    floor = math.floor(offset)
    return base + floor, offset - floor


def corners(base: Sequence[int], offset: Sequence[float], size: Sequence[int], boundary: str) -> list[Corner]:
    """The corners of a position that are inside the map; none if the sample does not count, or is NaN."""
    if not all(abs(o) < REACH for o in offset):
        return []
    per_axis = []  # for each axis its two ends: (pixel, weight, d_weight)
    for axis_base, axis_offset, axis_size in zip(base, offset, size, strict=True):
        corner, fraction = split(axis_base, axis_offset)
        ends = [(corner, 1 - fraction, -1.0), (corner + 1, fraction, 1.0)]
        if boundary == "inside":
            if not 0 <= corner < axis_size:
                return []
            if corner == axis_size - 1:
                ends = [(corner, 1.0, 0.0), (corner, 0.0, 0.0)]
        per_axis.append([end for end in ends if 0 <= end[0] < axis_size])
    return [
        Corner(
            pixel=tuple(pixel for pixel, _, _ in ends),
            weight=math.prod(weight for _, weight, _ in ends),
            d_weight=tuple(
                math.prod(end[2] if other == axis else end[1] for other, end in enumerate(ends)) for axis in range(len(ends))
            ),
        )
        for ends in product(*per_axis)
    ]


def interpolate(
    pixels: np.ndarray[Any, Any], base: Sequence[int], offset: Sequence[float], boundary: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The value (C,) of `pixels` (C, *size) at base + offset, and its derivatives (D, C) along the axes."""
    C, D = pixels.shape[0], len(offset)
    if any(map(math.isnan, offset)):
        return np.full(C, np.nan), np.full((D, C), np.nan)
    value, d_value = np.zeros(C), np.zeros((D, C))
    for corner in corners(base, offset, pixels.shape[1:], boundary):
        at: Any = (slice(None), *corner.pixel)
        value += corner.weight * pixels[at]
        d_value += np.multiply.outer(corner.d_weight, pixels[at])
    return value, d_value


def interpolate_at(
    pixels: np.ndarray[Any, Any], position: Sequence[float], boundary: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The same at an absolute position, D numbers in pixels."""
    return interpolate(pixels, (0,) * len(position), position, boundary)
