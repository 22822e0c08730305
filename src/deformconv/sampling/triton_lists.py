"""The gradient of an input that was sampled, for GPUs, without atomics: samples are sorted by pixels, and pixels collect them.

What every operator does alike, in Triton. The input's gradient has its channels last, (N, pixels, C), and its channels are of
groups, which have positions of their own. Each sample is in a list, that of its image, group and low corner, with a share of
each corner's pixel; once lists are in order, a pixel's sum goes through those that it is a corner of. What the shares are
multiplied by are rows of a gradient, of which a kernel is told how far rows, groups and taps lie apart there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deformconv.sampling.triton import corner_of
from deformconv.sampling.triton_levels import level_of

__all__ = ["arrange", "channels_of", "collect", "collect_levels", "column_of", "store_entries", "sum_runs"]


@triton.jit
def channels_of(group, first, size, BC: tl.constexpr, SPAN: tl.constexpr):
    """BC channels of a group of `size` channels from its channel `first` on, and which of them there are."""
    own = first + tl.arange(0, BC)
    there = tl.max_constancy(own < size, SPAN)
    return tl.max_contiguous(tl.multiple_of(group * size + own, SPAN), SPAN), there


@triton.jit
def column_of(channel, CG, GROUP, COLUMN_SPAN: tl.constexpr):
    """Where a channel's sample of the first tap lies within a row of columns."""
    group = channel // CG
    return tl.max_contiguous(tl.multiple_of(group * GROUP + (channel - group * CG), COLUMN_SPAN), COLUMN_SPAN)


@triton.jit
def store_entries(
    key_ptr, share_ptr, entry, samples, there, list_of, z_low, y_low, x_low, z, y, x, mask, counts, Z, Y, X, none,
    RANK: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """For each sample the list that it is in, and its share of each corner's pixel, a plane of shares for each corner.

    A list is of the samples whose low corner is one pixel, or next to the map before its first one along an axis: along each
    axis there is one list more than pixels. Samples that reach no pixel are in the list `none`.
    """
    reaches = counts & (x_low >= -1) & (x_low < X)
    number = x_low + 1
    if RANK >= 2:
        reaches = reaches & (y_low >= -1) & (y_low < Y)
        number += (y_low + 1) * (X + 1)
    if RANK == 3:
        reaches = reaches & (z_low >= -1) & (z_low < Z)
        number += (z_low + 1) * ((X + 1) * (Y + 1))
    tl.store(key_ptr + entry, tl.where(reaches, list_of + number, none).to(key_ptr.dtype.element_ty), mask=there)
    for CORNER in tl.static_range(2**RANK):
        _pixel, _inside, z_weight, y_weight, x_weight = corner_of(z_low, y_low, x_low, z, y, x, Z, Y, X, CORNER, RANK, INSIDE)
        tl.store(share_ptr + tl.cast(samples, entry.dtype) * CORNER + entry, z_weight * y_weight * x_weight * mask, mask=there)


@triton.jit(do_not_specialize=["samples", "P"])
def arrange(
    order_ptr, share_ptr, row_ptr, sorted_share_ptr, samples, P, G, ROW, TAP,
    K: tl.constexpr, CORNERS: tl.constexpr, INDEX: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """In the order of the lists, where each sample's row of the gradient begins, and its shares.

    Sample ((n * G + group) * K + tap) * P + p is of row n * P + p: rows lie ROW numbers apart, and taps within them TAP.
    """
    at = tl.program_id(0).to(INDEX) * BE + tl.arange(0, BE)
    there = at < samples
    entry = tl.load(order_ptr + at, mask=there, other=0).to(INDEX)
    plane = entry // P
    row = plane // K // G * P + (entry - plane * P)
    tl.store(row_ptr + at, row * ROW + plane % K * TAP, mask=there)
    for CORNER in tl.static_range(CORNERS):
        plane_of_corner = tl.cast(samples, INDEX) * CORNER
        share = tl.load(share_ptr + plane_of_corner + entry, mask=there, other=0.0)
        tl.store(sorted_share_ptr + plane_of_corner + at, share, mask=there)


@triton.jit(do_not_specialize=["samples", "none"])
def sum_runs(
    d_rows_ptr, row_ptr, key_ptr, share_ptr, run_ptr, samples, none, lists, CG, GC, G, GROUP,
    CORNERS: tl.constexpr, SPAN: tl.constexpr, COLUMN_SPAN: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    RUN: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What RUN samples one after the other, if they are of one list, give one of their corners, in BC channels of its group.

    So that a pixel which very many samples are near is not summed by one program alone.
    """
    run = tl.program_id(0).to(INDEX)
    corner = tl.program_id(1).to(INDEX)
    key = tl.load(key_ptr + run * RUN).to(INDEX)
    last = tl.load(key_ptr + run * RUN + RUN - 1).to(INDEX)
    group = key // lists % G
    channel, is_channel = channels_of(group, tl.program_id(2) * BC, GC, BC, SPAN)
    column = column_of(channel, CG, GROUP, COLUMN_SPAN)
    sums = tl.zeros((BC,), ACC)
    for start in range(0, tl.where((key == last) & (key != none), RUN, 0), BE):
        at = run * RUN + start + tl.arange(0, BE)
        share = tl.load(share_ptr + corner * samples + at)
        row = tl.multiple_of(tl.load(row_ptr + at), COLUMN_SPAN)
        d_row = tl.load(d_rows_ptr + row[:, None] + column[None, :], mask=is_channel[None, :], other=0.0)
        sums += tl.sum(share[:, None] * d_row.to(ACC), axis=0)
    tl.store(run_ptr + (run * CORNERS + corner) * GC + (channel - group * GC), sums, mask=is_channel)


@triton.jit
def _corners(RANK: tl.constexpr, BE: tl.constexpr):
    """Of BE samples that are read at a time which corner a pixel is of them, and the how manieth of that corner they are."""
    entry = tl.arange(0, BE)
    return (entry % 2**RANK)[None, :], (entry // 2**RANK)[None, :]


@triton.jit
def _sums(
    d_rows_ptr, row_ptr, start_ptr, share_ptr, run_ptr, number, is_place, group, channel, is_channel, samples, CG, GC, GROUP,
    RANK: tl.constexpr, COLUMN_SPAN: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, RUN: tl.constexpr,
    BP: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sums of BP pixels in BC channels of a group, of the samples of 2**RANK lists, of all of which BE are read at a time.

    `number` (BP, BE) is the list of each, `row` and `share` are of the samples of all lists one after the other, and `start` is
    where each list begins there. Of a list that has whole runs of RUN samples these are summed already, by `sum_runs`.
    """
    CORNERS: tl.constexpr = 2**RANK
    corner, step = _corners(RANK, BE)
    column = column_of(channel, CG, GROUP, COLUMN_SPAN)
    first = tl.load(start_ptr + number, mask=is_place, other=0)
    end = tl.load(start_ptr + number + 1, mask=is_place, other=0)
    first_run = tl.cdiv(first, RUN)
    runs = tl.maximum(end // RUN - first_run, 0)
    sums = tl.zeros((BP, BC), ACC)
    count = end - first - runs * RUN
    for turn in range(0, tl.max(tl.max(count, axis=1), axis=0), BE // CORNERS):
        at = first + turn + step
        there = turn + step < count
        at += tl.where((at >= first_run * RUN) & (runs > 0), runs * RUN, 0)
        share = tl.load(share_ptr + corner.to(INDEX) * samples + at, mask=there, other=0.0)
        row = tl.multiple_of(tl.load(row_ptr + at, mask=there, other=0), [COLUMN_SPAN, COLUMN_SPAN])
        stored = there[:, :, None] & is_channel[None, None, :]
        d_row = tl.load(d_rows_ptr + row[:, :, None] + column[None, None, :], mask=stored, other=0.0)
        sums += tl.sum(share[:, :, None] * d_row.to(ACC), axis=1)
    for turn in range(0, tl.max(tl.max(runs, axis=1), axis=0), BE // CORNERS):
        at = (first_run + turn + step).to(INDEX) * CORNERS + corner
        stored = (turn + step < runs)[:, :, None] & is_channel[None, None, :]
        run = tl.load(run_ptr + at[:, :, None] * GC + (channel - group * GC)[None, None, :], mask=stored, other=0.0)
        sums += tl.sum(run, axis=1)
    return sums


@triton.jit(do_not_specialize=["places", "samples", "pixels", "Z", "Y", "X"])
def collect(
    d_rows_ptr, row_ptr, start_ptr, share_ptr, run_ptr, d_x_ptr, places, samples, pixels, C, CG, GC, G, GROUP, Z, Y, X,
    RANK: tl.constexpr, SPAN: tl.constexpr, COLUMN_SPAN: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    RUN: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The input's gradient at BP pixels, in BC channels of one group: samples' shares, always in the same order."""
    place_of = tl.program_id(0) * BP + tl.arange(0, BP)
    group = tl.program_id(1)
    channel, is_channel = channels_of(group, tl.program_id(2) * BC, GC, BC, SPAN)
    image = (place_of // pixels).to(INDEX)
    pixel = (place_of % pixels)[:, None]
    corner, _step = _corners(RANK, BE)
    lists = tl.cast(X + 1, INDEX) * (Y + 1 if RANK >= 2 else 1) * (Z + 1 if RANK == 3 else 1)
    number = ((image * G + group) * lists)[:, None] + pixel % X + 1 - corner % 2
    if RANK >= 2:
        number += (pixel // X % Y + 1 - corner // 2 % 2) * (X + 1)
    if RANK == 3:
        number += (pixel // X // Y + 1 - corner // 4) * ((X + 1) * (Y + 1))
    is_place = (place_of < places)[:, None]
    sums = _sums(
        d_rows_ptr, row_ptr, start_ptr, share_ptr, run_ptr, number, is_place, group, channel, is_channel, samples, CG, GC,
        GROUP, RANK, COLUMN_SPAN, ACC, INDEX, RUN, BP, BE, BC,
    )  # fmt: skip
    to = ((image * pixels)[:, None] + pixel) * C + channel[None, :]
    tl.store(d_x_ptr + to, sums.to(d_x_ptr.dtype.element_ty), mask=is_place & is_channel[None, :])


@triton.jit(do_not_specialize=["places", "samples", "tokens", "lists", "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"])
def collect_levels(
    d_rows_ptr, row_ptr, start_ptr, share_ptr, run_ptr, d_x_ptr, places, samples, tokens, C, CG, GC, G, GROUP,
    lists, s0, s1, s2, s3, s4, s5, s6, s7,
    SPAN: tl.constexpr, COLUMN_SPAN: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    RUN: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same of an input of several maps, one after the other in each image, whose sizes are packed in `s0` to `s7`.

    A group of an image has `lists` lists, those of its first map first.
    """
    place_of = tl.program_id(0) * BP + tl.arange(0, BP)
    group = tl.program_id(1)
    channel, is_channel = channels_of(group, tl.program_id(2) * BC, GC, BC, SPAN)
    image = (place_of // tokens).to(INDEX)
    token = place_of % tokens
    X, first_token, first_list = level_of(token, (s0, s1, s2, s3, s4, s5, s6, s7))
    y = (token - first_token) // X
    x = token - first_token - y * X
    corner, _step = _corners(2, BE)
    number = ((image * G + group) * lists + first_list + (y + 1) * (X + 1) + x + 1)[:, None]
    number = number - corner // 2 * (X + 1)[:, None] - corner % 2
    is_place = (place_of < places)[:, None]
    sums = _sums(
        d_rows_ptr, row_ptr, start_ptr, share_ptr, run_ptr, number, is_place, group, channel, is_channel, samples, CG, GC,
        GROUP, 2, COLUMN_SPAN, ACC, INDEX, RUN, BP, BE, BC,
    )  # fmt: skip
    to = tl.multiple_of((image * tokens + token) * C, SPAN)[:, None] + channel[None, :]
    tl.store(d_x_ptr + to, sums.to(d_x_ptr.dtype.element_ty), mask=is_place & is_channel[None, :])
