"""Deformable attention's kernels for GPUs, in Triton: functions of pointers and integers, which know no framework.

Rows are the queries of all images, one after the other: row r is query r % Q of image r // Q. A program has a head, so that
queries which are neighbours read the same pixels: the value is (N, tokens, H, D), of which a program reads D numbers together.
Locations are (rows, H, samples, 2) and weights (rows, H, samples), where a level has `points` samples. The sizes of levels are
packed, see `sampling.triton_levels`. Numbers of elements are of INDEX, int64 where an array is so large; interpolation and
sums are of ACC, float32 for half precision. SPAN says how many channels lie one after the other, at a multiple of so many
numbers, so that they are loaded and stored together.

A product and a sum are rounded apart unless a line says `fma`: where a sample lies depends on it.

Loops store nothing that a later turn loads, and no sum is made by atomics: results are the same bit for bit each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deformconv.sampling.triton import corner_of
from deformconv.sampling.triton_levels import before, size_of
from deformconv.sampling.triton_lists import channels_of, store_entries

__all__ = ["attend", "attend_backward"]

_SIZES = ("s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7")


@triton.jit
def _axis(coordinate, size):
    """Along one axis: the pixel below a location of a level, the fraction, whether it is within reach, and its NaN or 0."""
    numbers = tl.cast(size, coordinate.dtype)
    product = coordinate * numbers
    near = tl.abs(product) < 1073741824.0  # False for NaN; what is far is no int32
    safe = tl.where(near, product, 0.0)
    # What the product lost by rounding, so that the fraction is as exact in a large level as in a small one.
    rest = tl.where(near, tl.fma(coordinate, numbers, -product), 0.0)
    position = safe - 0.5
    low = tl.floor(position)
    fraction = position - low + rest
    below = fraction < 0.0
    pixel = low.to(tl.int32) - below.to(tl.int32)
    return pixel, tl.where(below, fraction + 1.0, fraction), near, tl.where(coordinate != coordinate, float("nan"), 0.0)


@triton.jit
def _place(location_ptr, sample, there, height, width, ACC: tl.constexpr):
    """Where each row's sample lies in a level: low corners and fractions (y, x), whether it counts, and NaN where it is NaN."""
    at = location_ptr + sample * 2
    x_low, x, x_near, x_poison = _axis(tl.load(at, mask=there, other=0.0).to(ACC), width)
    y_low, y, y_near, y_poison = _axis(tl.load(at + 1, mask=there, other=0.0).to(ACC), height)
    return y_low, x_low, y, x, y_near & x_near & there, (y_poison + x_poison).to(ACC)


@triton.jit
def _corner(
    value_ptr, begin, y_low, x_low, y, x, counts, height, width, C, channel, is_channel,
    CORNER: tl.constexpr, ACC: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One corner of each row's sample: the numbers there, and its weights along y and x; a level's pixels follow `begin`."""
    pixel, inside, _z_weight, y_weight, x_weight = corner_of(
        y_low, y_low, x_low, y, y, x, height, height, width, CORNER, RANK=2, INSIDE=False
    )
    at = tl.multiple_of((begin + pixel) * C, SPAN)[:, None] + channel[None, :]
    value = tl.load(value_ptr + at, mask=(inside & counts)[:, None] & is_channel[None, :], other=0.0)
    return value.to(ACC), y_weight, x_weight


@triton.jit(do_not_specialize=["rows", "Q", "tokens", "levels", "points", *_SIZES])
def attend(
    value_ptr, location_ptr, weight_ptr, output_ptr, rows, Q, tokens, H, D, levels, points, s0, s1, s2, s3, s4, s5, s6, s7,
    ACC: tl.constexpr, INDEX: tl.constexpr, SPAN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The output of BR rows in one head."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    there = row < rows
    head = tl.program_id(1)
    channel, is_channel = channels_of(head, 0, D, BC, SPAN)
    begin = (row // Q).to(INDEX) * tokens
    sample = (row.to(INDEX) * H + head) * (levels * points)
    sums = tl.zeros((BR, BC), ACC)
    for level in range(0, levels):
        height, width = size_of(level, (s0, s1, s2, s3, s4, s5, s6, s7))
        for point in range(0, points):
            at = sample + level * points + point
            y_low, x_low, y, x, counts, poison = _place(location_ptr, at, there, height, width, ACC)
            found = tl.zeros((BR, BC), ACC) + poison[:, None]
            for CORNER in tl.static_range(4):
                value, y_weight, x_weight = _corner(
                    value_ptr, begin, y_low, x_low, y, x, counts, height, width, H * D, channel, is_channel, CORNER, ACC, SPAN
                )
                found = tl.fma((y_weight * x_weight)[:, None], value, found)
            # Last, since an infinite weight times a corner's weight of 0 is NaN.
            sums = tl.fma(tl.load(weight_ptr + at, mask=there, other=0.0).to(ACC)[:, None], found, sums)
        begin += height * width
    to = tl.multiple_of(row.to(INDEX) * (H * D), SPAN)[:, None] + channel[None, :]
    tl.store(output_ptr + to, sums.to(output_ptr.dtype.element_ty), mask=there[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=["rows", "Q", "tokens", "heads", "levels", "points", "lists", *_SIZES])
def attend_backward(
    value_ptr, location_ptr, weight_ptr, grad_ptr, d_location_ptr, d_weight_ptr, key_ptr, share_ptr,
    rows, Q, tokens, heads, H, D, levels, points, lists, s0, s1, s2, s3, s4, s5, s6, s7,
    POSITIONS: tl.constexpr, ENTRIES: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, SPAN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All that is read at one level's samples of BR rows, in one of `heads` heads of the H that there are in memory.

    POSITIONS: the gradients of locations and weights. ENTRIES: which samples the gradient of the value is to be collected
    from; a head of an image has `lists` lists, and samples are (images, heads, levels, points, Q).
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    there = row < rows
    level = tl.program_id(1)
    head = tl.program_id(2)
    image = row // Q
    sizes = (s0, s1, s2, s3, s4, s5, s6, s7)
    height, width = size_of(level, sizes)
    tokens_before, lists_before = before(level, sizes)
    begin = image.to(INDEX) * tokens + tokens_before
    plane = (image.to(INDEX) * heads + head) * lists
    samples = tl.cast(rows, INDEX) * heads * (levels * points)
    if POSITIONS:
        channel, is_channel = channels_of(head, 0, D, BC, SPAN)
        of = tl.multiple_of(row.to(INDEX) * (H * D), SPAN)[:, None] + channel[None, :]
        grad = tl.load(grad_ptr + of, mask=there[:, None] & is_channel[None, :], other=0.0).to(ACC)
    for point in range(0, points):
        at = (row.to(INDEX) * H + head) * (levels * points) + level * points + point
        y_low, x_low, y, x, counts, poison = _place(location_ptr, at, there, height, width, ACC)
        weight = tl.load(weight_ptr + at, mask=there, other=0.0).to(ACC)
        if ENTRIES:
            of_sample = (image.to(INDEX) * heads + head) * (levels * points) + level * points + point
            store_entries(
                key_ptr, share_ptr, of_sample * Q + (row - image * Q), samples, there, plane + lists_before,
                y_low, y_low, x_low, y, y, x, weight, counts, height, height, width,
                tl.cast(rows // Q, INDEX) * heads * lists, RANK=2, INSIDE=False,
            )  # fmt: skip
        if POSITIONS:
            found, d_y, d_x = tl.zeros((BR,), ACC), tl.zeros((BR,), ACC), tl.zeros((BR,), ACC)
            for CORNER in tl.static_range(4):
                value, y_weight, x_weight = _corner(
                    value_ptr, begin, y_low, x_low, y, x, counts, height, width, H * D, channel, is_channel, CORNER, ACC, SPAN
                )
                product = tl.sum(grad * value, axis=1)
                found += y_weight * x_weight * product
                d_y += (x_weight if CORNER & 2 else -x_weight) * product
                d_x += (y_weight if CORNER & 1 else -y_weight) * product
            dtype = d_location_ptr.dtype.element_ty
            to = d_location_ptr + at * 2
            tl.store(to, (d_x * weight * width + poison).to(dtype), mask=there)
            tl.store(to + 1, (d_y * weight * height + poison).to(dtype), mask=there)
            tl.store(d_weight_ptr + at, (found + poison).to(d_weight_ptr.dtype.element_ty), mask=there)
