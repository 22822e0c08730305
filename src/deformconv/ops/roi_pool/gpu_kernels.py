"""Deformable RoI pooling's kernels for GPUs, in Triton: functions of pointers and integers, which know no framework.

Rows are the bins of all boxes, one after the other: row r is bin r % BINS of box r // BINS. The input has its channels last,
and those that a bin reads side by side, (N, pixels, groups, C_out); the output and its gradient are (rows, C_out). Boxes are
(R, 5), offsets (R, classes, 2, parts) and masks (R, BINS). A class has GC of the CO output channels.

Numbers of a call that are constants of a kernel are in SIZES: bins, groups and parts, each along y and x, and samples along an
axis of a bin. `ops.roi_pool.bins` says where boxes, bins and samples lie. All of that is computed in float64, as everywhere:
`scale` and `gamma` are the bits of float64 numbers, which Triton would take for float32. Interpolation and sums are of ACC,
float32 for half precision. Numbers of elements are of INDEX, int64 where an array is so large. SPAN says how many channels lie
one after the other, at a multiple of so many numbers, so that they are loaded and stored together.

Loops store nothing that a later turn loads, and no sum is made by atomics: results are the same bit for bit each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deformconv.sampling.triton import corner_of
from deformconv.sampling.triton_lists import channels_of, store_entries

__all__ = ["pool", "pool_backward"]


@triton.jit
def _round(number):
    """To the nearest integer, halves away from zero."""
    return tl.where(number < 0.0, -1.0, 1.0) * tl.floor(tl.abs(number) + 0.5)


@triton.jit
def _is_finite(number):
    return tl.abs(number) < float("inf")  # False for NaN


@triton.jit
def _side(low, high, scale, CONVENTION: tl.constexpr):
    """A box's start and size along one axis, in pixels of the map, and whether they are finite."""
    if CONVENTION == "rounded":
        start = _round(low) * scale - 0.5
        size = (_round(high) + 1.0) * scale - 0.5 - start
        size = tl.where(size < 0.1, tl.full(size.shape, 0.1, tl.float64), size)
    elif CONVENTION == "aligned":
        start = low * scale - 0.5
        size = high * scale - 0.5 - start
    else:
        start = low * scale
        size = high * scale - start
        size = tl.where(size < 1.0, 1.0, size)
    finite = _is_finite(low * scale) & _is_finite(high * scale) & _is_finite(start) & _is_finite(size)
    return start, size, finite


@triton.jit
def _boxes(boxes_ptr, box, there, images, scale, CONVENTION: tl.constexpr):
    """Each row's image, and start and size of its box along y and x: NaN where the box is not finite, or of no image."""
    at = boxes_ptr + box * 5
    number = tl.load(at, mask=there, other=0.0).to(tl.float64)
    x_low = tl.load(at + 1, mask=there, other=0.0).to(tl.float64)
    y_low = tl.load(at + 2, mask=there, other=0.0).to(tl.float64)
    x_high = tl.load(at + 3, mask=there, other=0.0).to(tl.float64)
    y_high = tl.load(at + 4, mask=there, other=0.0).to(tl.float64)
    known = (number >= 0.0) & (number < images) & (tl.floor(number) == number)
    y_start, y_size, y_finite = _side(y_low, y_high, scale, CONVENTION)
    x_start, x_size, x_finite = _side(x_low, x_high, scale, CONVENTION)
    poison = tl.where(known & y_finite & x_finite, 0.0, float("nan"))
    return tl.where(known, number, 0.0).to(tl.int32), y_start + poison, y_size, x_start + poison, x_size


@triton.jit
def _rows(rows, SIZES: tl.constexpr, INDEX: tl.constexpr, BR: tl.constexpr):
    """BR rows of one program: their numbers, which of them there are, their boxes, and their bins along y and x."""
    BINS: tl.constexpr = SIZES[0] * SIZES[1]
    row = tl.program_id(0).to(INDEX) * BR + tl.arange(0, BR)
    box = row // BINS
    bin = (row - box * BINS).to(tl.int32)
    return row, row < rows, box, bin // SIZES[1], bin % SIZES[1]


@triton.jit
def _place_bins(
    boxes_ptr, offset_ptr, box, bin_y, bin_x, there, group, images, G, scale, gamma,
    SIZES: tl.constexpr, CONVENTION: tl.constexpr, DEFORMED: tl.constexpr,
):  # fmt: skip
    """Each row's image; along y and x where its bin begins, how far its samples lie apart, what an offset of 1 moves it by."""
    PARTS: tl.constexpr = SIZES[4] * SIZES[5]
    scale = scale.to(tl.int64).to(tl.float64, bitcast=True)
    gamma = gamma.to(tl.int64).to(tl.float64, bitcast=True)
    image, y_start, y_size, x_start, x_size = _boxes(boxes_ptr, box, there, images, scale, CONVENTION)
    if DEFORMED:
        part = bin_y * SIZES[4] // SIZES[0] * SIZES[5] + bin_x * SIZES[5] // SIZES[1]
        at = offset_ptr + (box * G + group) * (2 * PARTS) + part
        y_start += gamma * y_size * tl.load(at + PARTS, mask=there, other=0.0).to(tl.float64)
        x_start += gamma * x_size * tl.load(at, mask=there, other=0.0).to(tl.float64)
    y_bin = y_size / SIZES[0]
    x_bin = x_size / SIZES[1]
    y_base, x_base = y_start + bin_y * y_bin, x_start + bin_x * x_bin
    return image, y_base, y_bin / SIZES[6], gamma * y_size, x_base, x_bin / SIZES[6], gamma * x_size


@triton.jit
def _on_map(base, step, sample, size, CONVENTION: tl.constexpr, ACC: tl.constexpr):
    """Along one axis: the pixel below a sample, the fraction and its derivative, whether an offset moves it, it counts, is NaN.

    A sample beyond the map's outer pixels is moved onto the map, and an offset does not move it there.
    """
    REACH: tl.constexpr = 0.5 if CONVENTION == "rounded" else 1.0
    WITHIN: tl.constexpr = 0.0 if CONVENTION == "rounded" else 0.5
    position = base + (sample + WITHIN) * step
    last = tl.cast(size - 1, tl.float64)
    near = (position >= -REACH) & (position <= last + REACH)  # False for NaN
    safe = tl.where(near, position, 0.0)  # what is far is no int32
    moved = tl.where(safe < 0.0, 0.0, tl.where(safe > last, last, safe))
    low = tl.floor(moved)
    slope = tl.where(low < last, 1.0, 0.0).to(ACC)
    return low.to(tl.int32), (moved - low).to(ACC), slope, moved == position, near, position != position


@triton.jit
def _place_sample(
    y_base, y_step, x_base, x_step, sample, there, Y, X,
    SAMPLES: tl.constexpr, CONVENTION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One sample of each row's bin: along y and x what `_on_map` says; whether it counts, and NaN where it is NaN."""
    y_low, y, y_slope, y_moves, y_near, y_odd = _on_map(y_base, y_step, sample // SAMPLES, Y, CONVENTION, ACC)
    x_low, x, x_slope, x_moves, x_near, x_odd = _on_map(x_base, x_step, sample % SAMPLES, X, CONVENTION, ACC)
    poison = tl.where(y_odd | x_odd, float("nan"), 0.0).to(ACC)
    return y_low, x_low, y, x, y_slope, x_slope, y_moves, x_moves, y_near & x_near & there, poison


@triton.jit
def _divisor(counted, SAMPLES: tl.constexpr, CONVENTION: tl.constexpr):
    """What a bin's sum is divided by, of whose samples so many count."""
    of_all = tl.full(counted.shape, 1.0 * SAMPLES * SAMPLES, counted.dtype)
    return tl.where(counted > 0.0, counted, 1.0) if CONVENTION == "rounded" else of_all


@triton.jit
def _group_of(bin_y, bin_x, SIZES: tl.constexpr):
    """The group of channels that each bin reads."""
    return bin_y * SIZES[2] // SIZES[0] * SIZES[3] + bin_x * SIZES[3] // SIZES[1]


@triton.jit(do_not_specialize=["rows", "images", "pixels", "Y", "X", "scale", "gamma"])
def pool(
    x_ptr, boxes_ptr, offset_ptr, mask_ptr, output_ptr, rows, images, pixels, C, CO, GC, G, Y, X, scale, gamma,
    SIZES: tl.constexpr, CONVENTION: tl.constexpr, DEFORMED: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr, SPAN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The output of BR bins, in BC channels of one class."""
    row, there, box, bin_y, bin_x = _rows(rows, SIZES, INDEX, BR)
    blocks = tl.cdiv(GC, BC)
    group = tl.program_id(1) // blocks
    channel, is_channel = channels_of(group, tl.program_id(1) % blocks * BC, GC, BC, SPAN)
    image, y_base, y_step, _y, x_base, x_step, _x = _place_bins(
        boxes_ptr, offset_ptr, box, bin_y, bin_x, there, group, images, G, scale, gamma, SIZES, CONVENTION, DEFORMED
    )
    begin = image.to(INDEX) * pixels
    first = _group_of(bin_y, bin_x, SIZES) * CO
    sums = tl.zeros((BR, BC), ACC)
    counted = tl.zeros((BR,), ACC)
    for sample in range(0, SIZES[6] * SIZES[6]):
        y_low, x_low, y, x, _y_slope, _x_slope, _y_moves, _x_moves, counts, poison = _place_sample(
            y_base, y_step, x_base, x_step, sample, there, Y, X, SIZES[6], CONVENTION, ACC
        )
        counted += tl.where(counts | (poison != poison), 1.0, 0.0).to(ACC)
        found = tl.zeros((BR, BC), ACC) + poison[:, None]
        for CORNER in tl.static_range(4):
            pixel, _inside, _weight, y_weight, x_weight = corner_of(
                y_low, y_low, x_low, y, y, x, Y, Y, X, CORNER, RANK=2, INSIDE=True
            )
            at = tl.multiple_of((begin + pixel) * C + first, SPAN)[:, None] + channel[None, :]
            value = tl.load(x_ptr + at, mask=counts[:, None] & is_channel[None, :], other=0.0)
            found += (y_weight * x_weight)[:, None] * value.to(ACC)
        sums += found
    sums = sums / _divisor(counted, SIZES[6], CONVENTION)[:, None]
    if MASKED:
        sums = sums * tl.load(mask_ptr + row, mask=there, other=0.0).to(ACC)[:, None]
    to = tl.multiple_of(row * CO, SPAN)[:, None] + channel[None, :]
    tl.store(output_ptr + to, sums.to(output_ptr.dtype.element_ty), mask=there[:, None] & is_channel[None, :])


@triton.jit
def _count(y_base, y_step, x_base, x_step, there, Y, X, SAMPLES: tl.constexpr, CONVENTION: tl.constexpr, ACC: tl.constexpr):
    """Of each row how many samples count, those that are NaN too, and NaN where one is NaN."""
    counted = tl.zeros(there.shape, ACC)
    poison = tl.zeros(there.shape, ACC)
    for sample in range(0, SAMPLES * SAMPLES):
        _y_low, _x_low, _y, _x, _y_slope, _x_slope, _y_moves, _x_moves, counts, odd = _place_sample(
            y_base, y_step, x_base, x_step, sample, there, Y, X, SAMPLES, CONVENTION, ACC
        )
        counted += tl.where(counts | (odd != odd), 1.0, 0.0).to(ACC)
        poison += odd
    return counted, poison


@triton.jit
def _store_samples(
    key_ptr, share_ptr, plane, bin, there, image, group, y_base, y_step, x_base, x_step, share, rows, images, G, Y, X,
    SIZES: tl.constexpr, CONVENTION: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each sample's list and its shares of pixels; `group` is of the input's channels, and `share` of each of a bin's samples.

    Samples are (boxes, classes, samples, bins), and `plane` is the number of a box and class.
    """
    BINS: tl.constexpr = SIZES[0] * SIZES[1]
    SAMPLES: tl.constexpr = SIZES[6] * SIZES[6]
    groups = tl.cast(G, INDEX) * (SIZES[2] * SIZES[3])
    lists = tl.cast(X + 1, INDEX) * (Y + 1)
    for sample in range(0, SAMPLES):
        y_low, x_low, y, x, _y_slope, _x_slope, _y_moves, _x_moves, counts, _odd = _place_sample(
            y_base, y_step, x_base, x_step, sample, there, Y, X, SIZES[6], CONVENTION, ACC
        )
        store_entries(
            key_ptr, share_ptr, (plane * SAMPLES + sample) * BINS + bin, tl.cast(rows, INDEX) * G * SAMPLES, there,
            (image * groups + group) * lists, y_low, y_low, x_low, y, y, x, share, counts, Y, Y, X, images * groups * lists,
            RANK=2, INSIDE=True,
        )  # fmt: skip


@triton.jit
def _pulled_back(
    x_ptr, begin, channel, is_channel, C, d_mean, y_low, x_low, y, x, counts, Y, X, ACC: tl.constexpr, SPAN: tl.constexpr
):
    """Of one sample of each row, the product of the mean's gradient with the value, and with its slopes along y and x."""
    value = tl.zeros(counts.shape, ACC)
    d_y = tl.zeros(counts.shape, ACC)
    d_x = tl.zeros(counts.shape, ACC)
    for CORNER in tl.static_range(4):
        pixel, _inside, _weight, y_weight, x_weight = corner_of(
            y_low, y_low, x_low, y, y, x, Y, Y, X, CORNER, RANK=2, INSIDE=True
        )
        at = tl.multiple_of(begin + pixel * tl.cast(C, begin.dtype), SPAN)[:, None] + channel[None, :]
        corner = tl.load(x_ptr + at, mask=counts[:, None] & is_channel[None, :], other=0.0).to(ACC)
        found = tl.sum(d_mean * corner, axis=1)
        value += y_weight * x_weight * found
        d_y += (x_weight if CORNER & 2 else -x_weight) * found
        d_x += (y_weight if CORNER & 1 else -y_weight) * found
    return value, d_y, d_x


@triton.jit(do_not_specialize=["rows", "images", "pixels", "Y", "X", "scale", "gamma"])
def pool_backward(
    x_ptr, boxes_ptr, offset_ptr, mask_ptr, grad_ptr, d_offset_ptr, d_mask_ptr, key_ptr, share_ptr,
    rows, images, pixels, C, CO, GC, G, Y, X, scale, gamma,
    SIZES: tl.constexpr, CONVENTION: tl.constexpr, DEFORMED: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr,
    POSITIONS: tl.constexpr, ENTRIES: tl.constexpr, INDEX: tl.constexpr, SPAN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All that the samples of BR bins are read for, for one class.

    POSITIONS: the gradients of offsets (R, classes, 2, BINS) and masks (R, classes, BINS), of each bin and class apart.
    ENTRIES: which samples the gradient of the input is to be collected from.
    """
    BINS: tl.constexpr = SIZES[0] * SIZES[1]
    SAMPLES: tl.constexpr = SIZES[6] * SIZES[6]
    row, there, box, bin_y, bin_x = _rows(rows, SIZES, INDEX, BR)
    group = tl.program_id(1)
    image, y_base, y_step, y_length, x_base, x_step, x_length = _place_bins(
        boxes_ptr, offset_ptr, box, bin_y, bin_x, there, group, images, G, scale, gamma, SIZES, CONVENTION, DEFORMED
    )
    counted, poison = _count(y_base, y_step, x_base, x_step, there, Y, X, SIZES[6], CONVENTION, ACC)
    factor = tl.where(counted > 0.0, 1.0, 0.0).to(ACC)
    if MASKED:  # but where no sample of a bin counts, since 0 * inf is NaN
        mask = tl.load(mask_ptr + row, mask=there, other=0.0).to(ACC)
        factor = tl.where(counted > 0.0, mask, 0.0)
    divisor = _divisor(counted, SIZES[6], CONVENTION)
    bin = bin_y * SIZES[1] + bin_x
    part_of_input = _group_of(bin_y, bin_x, SIZES)
    if ENTRIES:
        _store_samples(
            key_ptr, share_ptr, box * G + group, bin, there, image, part_of_input * G + group, y_base, y_step, x_base, x_step,
            factor / divisor, rows, images, G, Y, X, SIZES, CONVENTION, INDEX, ACC,
        )  # fmt: skip
    if POSITIONS:
        value, d_y, d_x = tl.zeros((BR,), ACC), tl.zeros((BR,), ACC), tl.zeros((BR,), ACC)
        begin = image.to(INDEX) * pixels * C + part_of_input * CO
        for start in range(0, GC, BC):
            channel, is_channel = channels_of(group, start, GC, BC, SPAN)
            at = tl.multiple_of(row * CO, SPAN)[:, None] + channel[None, :]
            d_mean = tl.load(grad_ptr + at, mask=there[:, None] & is_channel[None, :], other=0.0).to(ACC)
            for sample in range(0, SAMPLES):
                y_low, x_low, y, x, y_slope, x_slope, y_moves, x_moves, counts, _odd = _place_sample(
                    y_base, y_step, x_base, x_step, sample, there, Y, X, SIZES[6], CONVENTION, ACC
                )
                found, found_y, found_x = _pulled_back(
                    x_ptr, begin, channel, is_channel, C, d_mean, y_low, x_low, y, x, counts, Y, X, ACC, SPAN
                )
                value += found
                d_y += tl.where(y_moves, y_slope * found_y, 0.0)
                d_x += tl.where(x_moves, x_slope * found_x, 0.0)
        plane = (box * G + group) * BINS
        if DEFORMED:
            to = d_offset_ptr + 2 * plane + bin
            dtype = d_offset_ptr.dtype.element_ty
            # In float64, since a length may be no float32 where a derivative is 0.
            tl.store(to + BINS, ((d_y * factor / divisor).to(tl.float64) * y_length + poison).to(dtype), mask=there)
            tl.store(to, ((d_x * factor / divisor).to(tl.float64) * x_length + poison).to(dtype), mask=there)
        if MASKED:
            tl.store(d_mask_ptr + plane + bin, (value / divisor + poison).to(d_mask_ptr.dtype.element_ty), mask=there)
