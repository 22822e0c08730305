"""Deformable aggregation's kernels for GPUs, in Triton: functions of pointers and integers, which know no framework.

Rows, offsets, masks and constants are those of `ops.taps.gpu_kernels`; the input, the output and its gradient have their
channels last, (rows, C), and an offset group has GC of the C channels. Sums are of ACC. Numbers of elements are of INDEX, int64
where an array is so large.

Programs that go through the same rows are neighbours in the grid, since what they read and write lies side by side.

Loops store nothing that a later turn loads. No sum is made by atomics, and results are the same bit for bit each time, but for
the input's gradient where SCATTER asks for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deformconv.ops.taps.gpu_kernels import mask_of, place_tap, pulled_back, rows_of, sampled, store_positions
from deformconv.sampling.triton import corner_of
from deformconv.sampling.triton_lists import channels_of, store_entries

__all__ = ["aggregate", "aggregate_backward"]


@triton.jit(do_not_specialize=["rows", "P", "pixels", "Z", "Y", "X", "OY", "OX"])
def aggregate(
    x_ptr, offset_ptr, mask_ptr, output_ptr, rows, P, pixels, C, GC, G, Z, Y, X, OY, OX,
    WINDOW: tl.constexpr, RANK: tl.constexpr, MASKED: tl.constexpr, INSIDE: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, ROW_SPAN: tl.constexpr, SPAN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The output of BR rows and BC channels of one offset group."""
    K: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    blocks = tl.cdiv(GC, BC)
    part = tl.program_id(0) % (G * blocks)
    group = part // blocks
    row, there, image, position = rows_of(tl.program_id(0) // (G * blocks), 0, rows, P, BR, INDEX, ROW_SPAN)
    channel, is_channel = channels_of(group, part % blocks * BC, GC, BC, SPAN)
    sums = tl.zeros((BR, BC), ACC)
    for tap in range(0, K):
        sums += sampled(
            x_ptr, offset_ptr, mask_ptr, image, position, there, channel, is_channel, group, tap, P, pixels, C, G,
            Z, Y, X, OY, OX, WINDOW, RANK, MASKED, INSIDE, LAST, ACC, SPAN,
        )  # fmt: skip
    to = tl.multiple_of(row * C, SPAN)[:, None] + channel[None, :]
    tl.store(output_ptr + to, sums.to(output_ptr.dtype.element_ty), mask=there[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=["rows", "P", "pixels", "Z", "Y", "X", "OY", "OX", "taps"])
def aggregate_backward(
    x_ptr, offset_ptr, mask_ptr, grad_ptr, d_offset_ptr, d_mask_ptr, key_ptr, share_ptr, d_x_ptr,
    rows, P, pixels, C, GC, G, Z, Y, X, OY, OX, taps,
    WINDOW: tl.constexpr, RANK: tl.constexpr, MASKED: tl.constexpr, INSIDE: tl.constexpr, LAST: tl.constexpr,
    POSITIONS: tl.constexpr, ENTRIES: tl.constexpr, SCATTER: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, ROW_SPAN: tl.constexpr, SPAN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All that is read at `taps` taps' samples of BR rows and one offset group.

    POSITIONS: the gradients of offsets and masks. ENTRIES: which samples the gradient of the input is to be collected from.
    SCATTER: that gradient itself, added to an array of ACC's numbers.
    """
    K: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    row, there, image, position = rows_of(tl.program_id(0) // G, 0, rows, P, BR, INDEX, ROW_SPAN)
    group = tl.program_id(0) % G
    lists = tl.cast(X + 1, INDEX) * (Y + 1 if RANK >= 2 else 1) * (Z + 1 if RANK == 3 else 1)
    if POSITIONS or SCATTER:
        channel, is_channel = channels_of(group, 0, GC, BC, SPAN)
        of = tl.multiple_of(row * C, SPAN)[:, None] + channel[None, :]
        grad = tl.load(grad_ptr + of, mask=there[:, None] & is_channel[None, :], other=0.0).to(ACC)
    for tap in range(tl.program_id(1) * taps, tl.minimum(tl.program_id(1) * taps + taps, K)):
        z_low, y_low, x_low, z, y, x, z_slope, y_slope, x_slope, counts, poison = place_tap(
            offset_ptr, image, position, there, group, tap, P, G, Z, Y, X, OY, OX, WINDOW, RANK, INSIDE, LAST, ACC
        )
        mask = tl.full((BR,), 1.0, ACC)
        if MASKED:
            mask = mask_of(mask_ptr, image, position, there, group, tap, P, G, K, LAST, ACC)
        if ENTRIES:
            store_entries(
                key_ptr, share_ptr, ((image * G + group) * K + tap) * P + position, tl.cast(rows, INDEX) * G * K, there,
                (image * G + group) * lists, z_low, y_low, x_low, z, y, x, mask, counts, Z, Y, X, (rows // P) * G * lists,
                RANK, INSIDE,
            )  # fmt: skip
        if POSITIONS or SCATTER:
            value, d_z, d_y, d_x = tl.zeros((BR,), ACC), tl.zeros((BR,), ACC), tl.zeros((BR,), ACC), tl.zeros((BR,), ACC)
            for CORNER in tl.static_range(2**RANK):
                pixel, inside, z_weight, y_weight, x_weight = corner_of(
                    z_low, y_low, x_low, z, y, x, Z, Y, X, CORNER, RANK, INSIDE
                )
                at = tl.multiple_of((image * pixels + pixel) * C, SPAN)[:, None] + channel[None, :]
                read = (inside & counts)[:, None] & is_channel[None, :]
                if SCATTER:
                    share = (z_weight * y_weight * x_weight * mask)[:, None] * grad
                    tl.atomic_add(d_x_ptr + at, share, mask=read, sem="relaxed")
                if POSITIONS:
                    corner = tl.load(x_ptr + at, mask=read, other=0.0).to(ACC)
                    found = tl.sum(grad * corner, axis=1)
                    value, d_z, d_y, d_x = pulled_back(value, d_z, d_y, d_x, found, z_weight, y_weight, x_weight, CORNER)
            if POSITIONS:
                store_positions(
                    d_offset_ptr, d_mask_ptr, image, position, there, group, tap, P, G, value, d_z * z_slope, d_y * y_slope,
                    d_x * x_slope, mask, poison, K, RANK, MASKED, LAST,
                )  # fmt: skip
