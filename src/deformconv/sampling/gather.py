"""The sampling rule (see `deformconv.sampling.rule`) as gathers, for any array library.

The library itself can differentiate everything, to any order, and no step depends on the values of an offset.
Arrays have B images, C channels, D axes of `*S` pixels, and positions `*Q`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import product
from math import prod
from operator import add, and_, or_
from typing import Any

from array_api_compat import array_namespace
from array_api_compat import device as device_of

from deformconv.sampling.rule import REACH

__all__ = ["LIBRARIES", "REACH", "interpolate", "interpolate_at", "namespace"]

# The libraries that have the standard's functions; NumPy and torch are tested.
LIBRARIES = ("cupy", "jax", "numpy", "torch")

Array = Any


def namespace(array: Array, xp: Any) -> tuple[Any, dict[str, Any]]:
    """The standard's functions for an array, and where it is, as keywords for functions that make arrays.

    A caller whose arrays the standard does not know brings `xp`, and its functions make arrays where they have to be.
    """
    return (array_namespace(array), {"device": device_of(array)}) if xp is None else (xp, {})


def interpolate(
    pixels: Array,
    base: Sequence[Array],
    offset: Sequence[Array],
    boundary: str,
    image: Array | None = None,
    *,
    shape: Sequence[Any] | None = None,
    xp: Any = None,
) -> Array:
    """Sample `pixels` (B, C, *S) at base + offset, as (B, *Q, C).

    `base` holds an integer array (*Q) for each axis, `offset` a floating-point array (B, *Q), in pixels. If positions do not go
    through the images in turn, `image` has the number of each position's image, and no array an axis B. `shape` is that of
    `pixels`, for a library whose arrays do not know all of theirs while a program is written.
    """
    xp, here = namespace(pixels, xp)
    B, C, *size = pixels.shape if shape is None else shape
    outside = prod(size) * B  # the row of zeros at the end of the table
    rows = xp.reshape(xp.permute_dims(pixels, (0, *range(2, len(size) + 2), 1)), (outside, C))
    zeros = xp.zeros((1, C), dtype=pixels.dtype, **here)
    table = xp.concat([rows, zeros])  # a row of channels for each pixel; corners outside read zeros, which are constant

    if image is None:
        image = xp.arange(B, **here)
        image = xp.reshape(image, (B,) + (1,) * len(base[0].shape))
    counts, poison, axes = _corners(xp, here, base, offset, size, boundary)
    value = None
    for ends in product(*axes):
        pixel, inside = image, counts
        for (index, end_inside, _), axis_size in zip(ends, size, strict=True):
            pixel = pixel * axis_size + index
            inside = inside & end_inside
        weight = reduce(xp.multiply, [weight for _, _, weight in ends])
        if value is None:
            weight = weight + poison  # one corner's NaN makes the sum NaN
        row = xp.take(table, xp.reshape(xp.where(inside, pixel, outside), (-1,)), axis=0)
        term = weight[..., None] * xp.reshape(row, (*(weight.shape if shape is None else xp.shape(weight)), C))
        value = term if value is None else value + term
    return value


def interpolate_at(pixels: Array, position: Sequence[Array], boundary: str) -> Array:
    """Sample `pixels` (B, C, *S) at absolute positions, as (B, *Q, C): a floating-point array (B, *Q) for each axis."""
    xp, here = namespace(pixels, None)
    shape = (1,) * (len(position[0].shape) - 1)
    pixel_0 = xp.zeros(shape, dtype=xp.arange(0).dtype, **here)  # of the library's default integer
    return interpolate(pixels, [pixel_0] * len(position), position, boundary)


def _corners(
    xp: Any, here: dict[str, Any], base: Sequence[Array], offset: Sequence[Array], size: Sequence[int], boundary: str
) -> tuple[Array, Array, list[list[tuple[Array, Array, Array]]]]:
    """Which samples count; NaN where a coordinate is, else 0; and for each axis its two ends: (index, inside, weight)."""
    zero = xp.zeros((), dtype=offset[0].dtype, **here)
    # Comparisons with NaN are false. An offset out of reach is replaced before it is used. To replace results would not do:
    # the derivative of the branch that is not taken is 0 times infinity or NaN, which is NaN.
    counts = reduce(and_, [xp.abs(axis_offset) < REACH for axis_offset in offset])
    is_nan = reduce(or_, [xp.isnan(axis_offset) for axis_offset in offset])
    # It is 0 with derivative 0, but where a coordinate is NaN: there the square's derivative, 2 * NaN, reaches every axis.
    # As a weight it meets only the row of zeros there, so that the pixels' derivative stays free of NaN.
    poison = reduce(add, [xp.where(is_nan, axis_offset, zero) for axis_offset in offset]) ** 2

    axes = []
    for axis_base, axis_offset, axis_size in zip(base, offset, size, strict=True):
        safe_offset = xp.where(counts, axis_offset, zero)
        floor = xp.floor(safe_offset)
        low = axis_base + xp.astype(floor, axis_base.dtype)
        high = low + 1
        fraction = safe_offset - floor
        low_inside = (low >= 0) & (low < axis_size)
        high_inside = (high >= 0) & (high < axis_size)
        if boundary == "inside":
            is_last = low == axis_size - 1
            fraction = xp.where(is_last, zero, fraction)
            high = xp.where(is_last, low, high)
            high_inside = low_inside
        axes.append([(low, low_inside, 1 - fraction), (high, high_inside, fraction)])
    return counts, poison, axes
