"""Deformable convolution's kernels for GPUs, in Triton: functions of pointers and integers, which know no framework.

Rows are the positions of all images, one after the other: row r is position r % P of image r // P. The input has its channels
last, (N, pixels, C). Columns are (rows, groups, K, C / groups), so that a group's are a matrix, or (rows, K, C) where each
channel is a group: GROUP and TAP say how far groups and taps lie apart. Offsets and masks stay as they are, (N, channels, P).

A kernel's geometry is the constant WINDOW: kernel size, stride, padding before and dilation, each along (z, y, x). Spans say
how many rows surely are of one image, and how many channels lie one after the other in an image and in columns, so that they
are loaded and stored together; no block is smaller than they are. Numbers of elements are of INDEX, int64 where an array is so
large. Interpolation and sums are of ACC, float32 for half precision.

Programs that go through the same rows are neighbours in the grid, since what they write lies side by side.

Loops store nothing that a later turn loads. No sum is made by atomics, and results are the same bit for bit each time, but for
the input's gradient where SCATTER asks for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deformconv.ops.taps.gpu_kernels import mask_of, place_tap, pulled_back, rows_of, sampled, store_positions
from deformconv.sampling.triton import corner_of
from deformconv.sampling.triton_lists import channels_of, column_of, store_entries

__all__ = ["convolve_depthwise", "sample", "sample_backward"]


@triton.jit(do_not_specialize=["first", "rows", "P", "pixels", "Z", "Y", "X", "OY", "OX", "taps"])
def sample(
    x_ptr, offset_ptr, mask_ptr, columns_ptr, first, rows, P, pixels, C, CG, GC, G, GROUP, TAP, Z, Y, X, OY, OX, taps,
    WINDOW: tl.constexpr, RANK: tl.constexpr, MASKED: tl.constexpr, INSIDE: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, ROW_SPAN: tl.constexpr, SPAN: tl.constexpr, COLUMN_SPAN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Columns of the rows from `first` on: BR rows, BC channels of one offset group, and `taps` taps a program."""
    K: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    blocks = tl.cdiv(GC, BC)
    part = tl.program_id(0) % (G * blocks)
    group = part // blocks
    own_row, there, image, position = rows_of(tl.program_id(0) // (G * blocks), first, rows, P, BR, INDEX, ROW_SPAN)
    channel, is_channel = channels_of(group, part % blocks * BC, GC, BC, SPAN)
    for tap in range(tl.program_id(1) * taps, tl.minimum(tl.program_id(1) * taps + taps, K)):
        found = sampled(
            x_ptr, offset_ptr, mask_ptr, image, position, there, channel, is_channel, group, tap, P, pixels, C, G,
            Z, Y, X, OY, OX, WINDOW, RANK, MASKED, INSIDE, LAST, ACC, SPAN,
        )  # fmt: skip
        row_of_tap = tl.multiple_of(own_row * (K * C) + tap * TAP, COLUMN_SPAN)
        at = row_of_tap[:, None] + column_of(channel, CG, GROUP, COLUMN_SPAN)[None, :]
        tl.store(columns_ptr + at, found.to(columns_ptr.dtype.element_ty), mask=there[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=["rows", "P", "pixels", "Z", "Y", "X", "OY", "OX"])
def convolve_depthwise(
    x_ptr, offset_ptr, mask_ptr, weight_ptr, bias_ptr, output_ptr, rows, P, pixels, C, GC, G, Z, Y, X, OY, OX,
    WINDOW: tl.constexpr, RANK: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, INSIDE: tl.constexpr,
    LAST: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, ROW_SPAN: tl.constexpr, SPAN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The output of BR rows and BC channels where each channel is a group of its own; the weight is (K, C)."""
    K: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    blocks = tl.cdiv(GC, BC)
    part = tl.program_id(0) % (G * blocks)
    group = part // blocks
    own_row, there, image, position = rows_of(tl.program_id(0) // (G * blocks), 0, rows, P, BR, INDEX, ROW_SPAN)
    channel, is_channel = channels_of(group, part % blocks * BC, GC, BC, SPAN)
    sums = tl.zeros((BR, BC), ACC)
    for tap in range(0, K):
        found = sampled(
            x_ptr, offset_ptr, mask_ptr, image, position, there, channel, is_channel, group, tap, P, pixels, C, G,
            Z, Y, X, OY, OX, WINDOW, RANK, MASKED, INSIDE, LAST, ACC, SPAN,
        )  # fmt: skip
        sums += found * tl.load(weight_ptr + tap * C + channel, mask=is_channel, other=0.0).to(ACC)[None, :]
    if BIASED:
        sums += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(ACC)[None, :]
    to = own_row[:, None] * C + channel[None, :]
    tl.store(output_ptr + to, sums.to(output_ptr.dtype.element_ty), mask=there[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=["rows", "P", "pixels", "Z", "Y", "X", "OY", "OX"])
def sample_backward(
    x_ptr, offset_ptr, mask_ptr, d_columns_ptr, columns_ptr, d_offset_ptr, d_mask_ptr, key_ptr, share_ptr, d_x_ptr,
    rows, P, pixels, C, CG, GC, G, GROUP, TAP, Z, Y, X, OY, OX,
    WINDOW: tl.constexpr, RANK: tl.constexpr, MASKED: tl.constexpr, INSIDE: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr, ENTRIES: tl.constexpr, SCATTER: tl.constexpr,
    INDEX: tl.constexpr, ROW_SPAN: tl.constexpr, SPAN: tl.constexpr, COLUMN_SPAN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All that is read at one tap's samples of BR rows and one offset group.

    COLUMNS: the columns again. POSITIONS: the gradients of offsets and masks, from that of the columns. ENTRIES: which samples
    the gradient of the input is to be collected from. SCATTER: that gradient itself, added to an array of ACC's numbers.
    """
    K: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    own_row, there, image, position = rows_of(tl.program_id(0) // G, 0, rows, P, BR, INDEX, ROW_SPAN)
    tap = tl.program_id(1)
    group = tl.program_id(0) % G
    z_low, y_low, x_low, z, y, x, z_slope, y_slope, x_slope, counts, poison = place_tap(
        offset_ptr, image, position, there, group, tap, P, G, Z, Y, X, OY, OX, WINDOW, RANK, INSIDE, LAST, ACC
    )
    mask = tl.full((BR,), 1.0, ACC)
    if MASKED:
        mask = mask_of(mask_ptr, image, position, there, group, tap, P, G, K, LAST, ACC)
    if ENTRIES:
        entry = ((image * G + group) * K + tap) * P + position
        lists = tl.cast(X + 1, INDEX) * (Y + 1 if RANK >= 2 else 1) * (Z + 1 if RANK == 3 else 1)
        store_entries(
            key_ptr, share_ptr, entry, tl.cast(rows, INDEX) * G * K, there, (image * G + group) * lists,
            z_low, y_low, x_low, z, y, x, mask, counts, Z, Y, X, (rows // P) * G * lists, RANK, INSIDE,
        )  # fmt: skip
    if COLUMNS or POSITIONS or SCATTER:
        value, d_z, d_y, d_x = tl.zeros((BR,), ACC), tl.zeros((BR,), ACC), tl.zeros((BR,), ACC), tl.zeros((BR,), ACC)
        for start in range(0, GC, BC):
            channel, is_channel = channels_of(group, start, GC, BC, SPAN)
            row_of_tap = tl.multiple_of(own_row * (K * C) + tap * TAP, COLUMN_SPAN)
            at = row_of_tap[:, None] + column_of(channel, CG, GROUP, COLUMN_SPAN)[None, :]
            stored = there[:, None] & is_channel[None, :]
            if POSITIONS or SCATTER:
                d_column = tl.load(d_columns_ptr + at, mask=stored, other=0.0).to(ACC)
            column = tl.zeros((BR, BC), ACC)
            for CORNER in tl.static_range(2**RANK):
                pixel, inside, z_weight, y_weight, x_weight = corner_of(
                    z_low, y_low, x_low, z, y, x, Z, Y, X, CORNER, RANK, INSIDE
                )
                of = tl.multiple_of((image * pixels + pixel) * C, SPAN)[:, None] + channel[None, :]
                read = (inside & counts)[:, None] & is_channel[None, :]
                if SCATTER:
                    share = (z_weight * y_weight * x_weight * mask)[:, None] * d_column
                    tl.atomic_add(d_x_ptr + of, share, mask=read, sem="relaxed")
                if COLUMNS or POSITIONS:
                    corner = tl.load(x_ptr + of, mask=read, other=0.0).to(ACC)
                if COLUMNS:
                    column += (z_weight * y_weight * x_weight)[:, None] * corner
                if POSITIONS:
                    found = tl.sum(d_column * corner, axis=1)
                    value, d_z, d_y, d_x = pulled_back(
                        value, d_z, d_y, d_x, found, z_weight, y_weight, x_weight, CORNER
                    )  # fmt: skip
            if COLUMNS:
                column = (column + poison[:, None]) * mask[:, None]
                tl.store(columns_ptr + at, column.to(columns_ptr.dtype.element_ty), mask=stored)
        if POSITIONS:
            store_positions(
                d_offset_ptr, d_mask_ptr, image, position, there, group, tap, P, G, value, d_z * z_slope, d_y * y_slope,
                d_x * x_slope, mask, poison, K, RANK, MASKED, LAST,
            )  # fmt: skip
