"""Deformable RoI pooling in the functions of the array-API standard: any array library, any device.

The library itself can differentiate it, to any order. It holds the samples of all bins at once, and an automatic derivative
holds a copy for each of four corners: memory is the price of running everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import and_, or_
from typing import Any, Literal, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_numpy_array
from array_api_compat import device as device_of

from deformconv.ops.backends import reasons_against_arrays
from deformconv.ops.operator import half_in_float32 as computes_in
from deformconv.ops.roi_pool.bins import margin, part_of
from deformconv.ops.roi_pool.spec import RoiSpec
from deformconv.sampling import gather

__all__ = ["DETERMINISTIC", "TAKES", "computes_in", "forward", "how", "reasons_against"]

Array = Any

TAKES: Literal["native"] = "native"
# On a GPU PyTorch adds up the input's gradient by atomics, unless torch.use_deterministic_algorithms(True) is set.
DETERMINISTIC = True


def reasons_against(spec: RoiSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run the call; none if it can."""
    return reasons_against_arrays("deform_roi_pool", library, backward)


def how(spec: RoiSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return ["PyTorch's own operations compute the call at once"] if library == "torch" else []


def forward(spec: RoiSpec, input: Array, boxes: Array, offset: Array | None, mask: Array | None) -> Array:
    """The output (R, C_out, PH, PW), by the library's own operations.

    Boxes of an image that is not there have NaN, where nobody has looked at their values before.
    """
    if is_numpy_array(input):
        # Infinities are data here: 0 * inf is NaN by definition, and nothing to warn of.
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            return _forward(spec, input, boxes, offset, mask)
    return _forward(spec, input, boxes, offset, mask)


class _Axis(NamedTuple):
    """Where the samples lie along an axis, (R, classes, PH, PW, ...) with the axis' samples last but one or last."""

    position: Array
    is_sample: Array  # whether the bin has so many samples


def _forward(spec: RoiSpec, input: Array, boxes: Array, offset: Array | None, mask: Array | None) -> Array:
    xp = array_namespace(input)
    R, (PH, PW), classes = spec.boxes, spec.output_size, spec.classes
    (GH, GW), per = spec.group_size, spec.class_channels
    dtype = input.dtype
    pixels = xp.reshape(input, (spec.batch, spec.out_channels, GH * GW, *spec.input_size))
    pixels = xp.reshape(xp.permute_dims(pixels, (0, 2, 1, 3, 4)), (-1, per, *spec.input_size))

    exact = _exact(xp, input)
    wide = xp.astype(boxes, exact)
    number, known = _image(xp, spec, wide)
    sides = [_side(xp, spec, axis, wide) for axis in (0, 1)]
    finite = _finite(xp, spec, wide, sides)
    axes = [_axis(xp, spec, axis, sides[axis], finite, offset) for axis in (0, 1)]
    is_nan = reduce(or_, [xp.isnan(axis.position) for axis in axes])
    is_sample = axes[0].is_sample & axes[1].is_sample
    out = (reduce(or_, [_is_out(spec, *pair) for pair in enumerate(axes)]) & ~is_nan) | ~is_sample
    image = (xp.reshape(number, (R, 1, 1, 1, 1, 1)) * (GH * GW) + _groups(xp, spec, input)) * classes
    image = image + xp.reshape(xp.arange(classes, device=device_of(input)), (1, classes, 1, 1, 1, 1))
    nowhere = xp.asarray(2 * gather.REACH, dtype=dtype, device=device_of(input))
    bases, fractions = [], []
    for number_of_axis, axis in enumerate(axes):
        base, fraction = _on_map(xp, spec.input_size[number_of_axis] - 1, axis.position, is_nan)
        bases.append(xp.broadcast_to(base, out.shape))
        fractions.append(xp.where(out, nowhere, xp.astype(fraction, dtype)))
    samples = gather.interpolate(pixels, bases, fractions, "inside", xp.broadcast_to(image, out.shape))

    one = xp.ones((), dtype=dtype, device=device_of(input))
    counts = ~out if spec.convention == "rounded" else xp.broadcast_to(is_sample, out.shape)
    counted = xp.astype(counts, dtype).sum(axis=(4, 5))
    divisor = xp.where(counted > 0, counted, one)
    output = samples.sum(axis=(4, 5)) / divisor[..., None]  # (R, classes, PH, PW, C_out / classes)
    output = xp.reshape(xp.permute_dims(output, (0, 1, 4, 2, 3)), (R, spec.out_channels, PH, PW))
    if mask is not None:
        output = output * mask
    nan = xp.asarray(float("nan"), dtype=dtype, device=device_of(input))
    return output + xp.where(known, xp.zeros_like(nan), nan)


def _exact(xp: Any, input: Array) -> Any:
    """The dtype that positions are computed in: float32 is too coarse for them, where the device knows another."""
    return input.dtype if str(device_of(input)).startswith("mps") else xp.float64


def _image(xp: Any, spec: RoiSpec, boxes: Array) -> tuple[Array, Array]:
    """The number of each box's image, and whether there is such an image, (R, 1, 1, 1)."""
    number = boxes[:, 0]
    known = (number >= 0) & (number < spec.batch) & (xp.floor(number) == number)
    number = xp.astype(xp.where(known, number, xp.zeros_like(number)), xp.int64)
    return number, xp.reshape(known, (-1, 1, 1, 1))


def _groups(xp: Any, spec: RoiSpec, input: Array) -> Array:
    """The group of channels that a bin reads, (1, 1, PH, PW, 1, 1)."""
    group_y, group_x = (_parts(xp, spec, axis, spec.group_size[axis], input) for axis in (0, 1))
    return group_y * spec.group_size[1] + group_x


def _parts(xp: Any, spec: RoiSpec, axis: int, parts: int, like: Array) -> Array:
    """Which part each bin along an axis belongs to, as integers (1, 1, PH, 1, 1, 1) or (1, 1, 1, PW, 1, 1)."""
    bins = spec.output_size[axis]
    found = xp.asarray([part_of(bin, bins, parts) for bin in range(bins)], dtype=xp.int64, device=device_of(like))
    return xp.reshape(found, (1, 1, bins, 1, 1, 1) if axis == 0 else (1, 1, 1, bins, 1, 1))


def _side(xp: Any, spec: RoiSpec, axis: int, boxes: Array) -> tuple[Array, Array, Array]:
    """The start, the size and the samples of a bin of each box along an axis, (R, 1, 1, 1, 1, 1) each."""
    low, high = (xp.reshape(boxes[:, column], (-1, 1, 1, 1, 1, 1)) for column in ((2, 4) if axis == 0 else (1, 3)))
    scale, ones = spec.spatial_scale, xp.ones_like(low)
    if spec.convention == "rounded":
        start = _round(xp, low) * scale - 0.5
        size = (_round(xp, high) + 1) * scale - 0.5 - start
        size = xp.where(size < 0.1, 0.1 * ones, size)
    elif spec.convention == "aligned":
        start = low * scale - 0.5
        size = high * scale - 0.5 - start
    else:
        start = low * scale
        size = high * scale - start
        size = xp.where(size < 1, ones, size)
    if spec.sampling_ratio:
        return start, size, ones * spec.sampling_ratio
    most = spec.input_size[axis]
    count = xp.ceil(size / spec.output_size[axis])
    count = xp.where(count > most, most * ones, xp.where(count > 0, count, 0 * ones))  # 0 where it is NaN, too
    return start, size, xp.where(xp.isfinite(size), count, ones)


def _round(xp: Any, number: Array) -> Array:
    """To the nearest integer, halves away from zero."""
    return xp.sign(number) * xp.floor(xp.abs(number) + 0.5)


def _finite(xp: Any, spec: RoiSpec, boxes: Array, sides: Sequence[tuple[Array, Array, Array]]) -> Array:
    """Whether a box is finite in map pixels, (R, 1, 1, 1, 1, 1)."""
    corners = xp.all(xp.isfinite(boxes[:, 1:] * spec.spatial_scale), axis=1)
    return reduce(
        and_, [xp.isfinite(number) for side in sides for number in side[:2]], xp.reshape(corners, (-1, 1, 1, 1, 1, 1))
    )


def _most_samples(xp: Any, spec: RoiSpec, axis: int, count: Array) -> int:
    if spec.sampling_ratio or str(device_of(count)) == "meta":  # where there are no values, and shapes do not depend on them
        return max(1, spec.sampling_ratio)
    return max(1, int(xp.max(count))) if spec.boxes else 1  # the boxes decide: their values are read


def _axis(xp: Any, spec: RoiSpec, axis: int, side: tuple[Array, Array, Array], finite: Array, offset: Array | None) -> _Axis:
    start, size, count = side
    bins, device, exact = spec.output_size[axis], device_of(start), start.dtype
    number = _most_samples(xp, spec, axis, count)
    sample = xp.reshape(xp.arange(number, device=device), (1, 1, 1, 1, number, 1) if axis == 0 else (1, 1, 1, 1, 1, number))
    bin = xp.reshape(xp.arange(bins, device=device), (1, 1, bins, 1, 1, 1) if axis == 0 else (1, 1, 1, bins, 1, 1))
    sample, bin = xp.astype(sample, exact), xp.astype(bin, exact)
    within = sample if spec.convention == "rounded" else sample + 0.5
    length = size / bins
    some = xp.where(count > 0, count, xp.ones_like(count))
    if offset is not None:
        start = start + spec.gamma * size * _shift(xp, spec, axis, offset, exact)
    position = start + bin * length + within * (length / some)
    nan = xp.asarray(float("nan"), dtype=exact, device=device)
    position = position + xp.where(finite, xp.zeros_like(nan), nan)  # a sum, so that offsets reach it
    return _Axis(position, sample < xp.where(finite, count, some))


def _is_out(spec: RoiSpec, axis: int, along: _Axis) -> Array:
    """Whether a sample lies beyond the margin."""
    last, reach = spec.input_size[axis] - 1, margin(spec)
    return (along.position < -reach) | (along.position > last + reach)


def _on_map(xp: Any, last: int, position: Array, is_nan: Array) -> tuple[Array, Array]:
    """The pixel below a position and the rest; positions beyond are moved onto the map without a derivative."""
    zeros = xp.zeros_like(position)
    moved = xp.where(position < 0, zeros, xp.where(position > last, zeros + last, position))
    floor = xp.floor(xp.where(is_nan, zeros, moved))
    return xp.astype(floor, xp.int64), xp.where(is_nan, position, moved) - floor


def _shift(xp: Any, spec: RoiSpec, axis: int, offset: Array, exact: Any) -> Array:
    """The offsets along an axis, (R, classes, PH, PW, 1, 1)."""
    (PH, PW), (parts_y, parts_x) = spec.output_size, spec.part_size
    offsets = xp.reshape(xp.astype(offset, exact), (spec.boxes, spec.classes, 2, parts_y, parts_x))[:, :, 1 - axis]
    if spec.part_size != spec.output_size:
        rows, columns = (_parts(xp, spec, along, spec.part_size[along], offset) for along in (0, 1))
        offsets = xp.take(offsets, xp.reshape(rows, (-1,)), axis=2)
        offsets = xp.take(offsets, xp.reshape(columns, (-1,)), axis=3)
    return xp.reshape(offsets, (spec.boxes, spec.classes, PH, PW, 1, 1))
