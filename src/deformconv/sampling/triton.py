"""The sampling rule (see `deformconv.sampling.rule`) for GPUs: functions that Triton compiles into an operator's kernels.

A position has the axes z, y and x whatever the rank: of a 2-D call every z is 0, and no corner lies beyond it. Positions are
counted in int32, so the caller refuses axes of 2**29 pixels and more; an offset of 2**30 and more is outside any of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["corner_of", "offsets_of", "place", "place_axis"]


@triton.jit
def offsets_of(offset_ptr, plane, there, RANK: tl.constexpr, ACC: tl.constexpr):
    """A tap's offsets along z, y and x; `offset_ptr` points to its first, and the next axis lies `plane` numbers on."""
    x = tl.load(offset_ptr + (RANK - 1) * plane, mask=there, other=0.0).to(ACC)
    y = tl.zeros_like(x)
    z = tl.zeros_like(x)
    if RANK >= 2:
        y = tl.load(offset_ptr + (RANK - 2) * plane, mask=there, other=0.0).to(ACC)
    if RANK == 3:
        z = tl.load(offset_ptr, mask=there, other=0.0).to(ACC)
    return z, y, x


@triton.jit
def place_axis(base, offset, size, INSIDE: tl.constexpr):
    """Along one axis: the low corner, the fraction, the fraction's derivative, whether the sample counts, and its NaN or 0."""
    # A comparison with NaN is false. An offset out of reach is replaced before it becomes an integer, which GPUs and the
    # interpreter would each make another number of.
    near = tl.abs(offset) < 1073741824.0
    safe = tl.where(near, offset, 0.0)
    floor = tl.floor(safe)
    fraction = safe - floor
    low = base + floor.to(tl.int32)
    slope = tl.full(fraction.shape, 1.0, fraction.dtype)
    if INSIDE:
        near = near & (low >= 0) & (low < size)
        last = low == size - 1
        fraction = tl.where(last, 0.0, fraction)
        slope = tl.where(last, 0.0, slope)
    return low, fraction, slope, near, tl.where(offset != offset, float("nan"), 0.0).to(offset.dtype)


@triton.jit
def place(
    z_base, y_base, x_base, z_offset, y_offset, x_offset, there, Z, Y, X, RANK: tl.constexpr, INSIDE: tl.constexpr
):  # fmt: skip
    """Of each position: low corners, fractions and their derivatives (z, y, x), whether it counts, and NaN where it is NaN."""
    x_low, x_fraction, x_slope, counts, poison = place_axis(x_base, x_offset, X, INSIDE)
    counts = counts & there
    y_low, y_fraction, y_slope = tl.zeros_like(x_low), tl.zeros_like(x_fraction), tl.zeros_like(x_fraction)
    z_low, z_fraction, z_slope = tl.zeros_like(x_low), tl.zeros_like(x_fraction), tl.zeros_like(x_fraction)
    if RANK >= 2:
        y_low, y_fraction, y_slope, y_counts, y_poison = place_axis(y_base, y_offset, Y, INSIDE)
        counts = counts & y_counts
        poison = poison + y_poison
    if RANK == 3:
        z_low, z_fraction, z_slope, z_counts, z_poison = place_axis(z_base, z_offset, Z, INSIDE)
        counts = counts & z_counts
        poison = poison + z_poison
    return z_low, y_low, x_low, z_fraction, y_fraction, x_fraction, z_slope, y_slope, x_slope, counts, poison


@triton.jit
def _end(low, fraction, size, HIGH: tl.constexpr, INSIDE: tl.constexpr):
    """Along one axis, one of the two pixels that a position lies between: its number, whether it is inside, and its weight."""
    pixel = low
    weight = 1.0 - fraction
    if HIGH:
        pixel = low + 1
        weight = fraction
        if INSIDE:
            pixel = tl.minimum(pixel, size - 1)
    return pixel, (pixel >= 0) & (pixel < size), weight


@triton.jit
def corner_of(
    z_low, y_low, x_low, z_fraction, y_fraction, x_fraction, Z, Y, X,
    CORNER: tl.constexpr, RANK: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """One corner of each position, CORNER having a bit for each axis: its pixel, whether it is inside, its weights (z, y, x)."""
    pixel, inside, x_weight = _end(x_low, x_fraction, X, CORNER & 1, INSIDE)
    y_weight = tl.full(x_weight.shape, 1.0, x_weight.dtype)
    z_weight = tl.full(x_weight.shape, 1.0, x_weight.dtype)
    if RANK >= 2:
        y_pixel, y_inside, y_weight = _end(y_low, y_fraction, Y, CORNER & 2, INSIDE)
        if RANK == 3:
            z_pixel, z_inside, z_weight = _end(z_low, z_fraction, Z, CORNER & 4, INSIDE)
            y_pixel = z_pixel * Y + y_pixel
            inside = inside & z_inside
        pixel = y_pixel * X + pixel
        inside = inside & y_inside
    return pixel, inside, z_weight, y_weight, x_weight
