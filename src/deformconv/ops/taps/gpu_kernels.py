"""What a window's taps sample, for GPUs: functions that Triton compiles into the kernels of operators that have a window.

Rows are the positions of all images, one after the other: row r is position r % P of image r // P. The input has its channels
last, (N, pixels, C). Offsets and masks are read where they lie, (N, channels, P), or (N, P, channels) where LAST, which is of
offsets and of masks, says so. Geometry is the constant WINDOW: kernel size, stride, padding before and dilation, each along
(z, y, x). ROW_SPAN is how many rows surely are of one image, SPAN how many channels lie one after the other, at a multiple of
so many numbers, so that they are loaded together. Interpolation is of ACC, float32 for half precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deformconv.sampling.triton import corner_of, offsets_of, place

__all__ = ["mask_of", "place_tap", "pulled_back", "rows_of", "sampled", "store_positions"]


@triton.jit
def rows_of(block, first, rows, P, BR: tl.constexpr, INDEX: tl.constexpr, ROW_SPAN: tl.constexpr):
    """The BR rows of a block: their numbers from `first` on, which of them there are, their images and positions there."""
    own_row = block * BR + tl.arange(0, BR)
    there = tl.max_constancy(own_row < rows, ROW_SPAN)
    image = tl.max_constancy((first + own_row) // P, ROW_SPAN)
    position = tl.max_contiguous(tl.multiple_of(first + own_row - image * P, ROW_SPAN), ROW_SPAN)
    return own_row.to(INDEX), there, image.to(INDEX), position


@triton.jit
def _channel_at(image, position, channel, P, channels, LAST: tl.constexpr):
    """Where a channel's number of each position lies, and how far the next channel's is, channels first or LAST in memory."""
    plane = tl.cast(P, image.dtype)
    if LAST:
        at = (image * P + position) * channels + channel
        plane = tl.cast(1, image.dtype)
    else:
        at = (image * channels + channel) * plane + position
    return at, plane


@triton.jit
def place_tap(
    offset_ptr, image, position, there, group, tap, P, G, Z, Y, X, OY, OX,
    WINDOW: tl.constexpr, RANK: tl.constexpr, INSIDE: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Where one tap samples at each position, as `sampling.triton.place` says it."""
    K: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
    x_base = position % OX * WINDOW[1][2] - WINDOW[2][2] + tap % WINDOW[0][2] * WINDOW[3][2]
    y_base = position // OX % OY * WINDOW[1][1] - WINDOW[2][1] + tap // WINDOW[0][2] % WINDOW[0][1] * WINDOW[3][1]
    z_base = position // OX // OY * WINDOW[1][0] - WINDOW[2][0] + tap // (WINDOW[0][2] * WINDOW[0][1]) * WINDOW[3][0]
    at, plane = _channel_at(image, position, (group * K + tap) * RANK, P, G * (K * RANK), LAST[0])
    z_offset, y_offset, x_offset = offsets_of(offset_ptr + at, plane, there, RANK, ACC)
    return place(z_base, y_base, x_base, z_offset, y_offset, x_offset, there, Z, Y, X, RANK, INSIDE)


@triton.jit
def mask_of(
    mask_ptr, image, position, there, group, tap, P, G, K: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    at, _plane = _channel_at(image, position, group * K + tap, P, G * K, LAST[1])
    return tl.load(mask_ptr + at, mask=there, other=0.0).to(ACC)


@triton.jit
def sampled(
    x_ptr, offset_ptr, mask_ptr, image, position, there, channel, is_channel, group, tap, P, pixels, C, G, Z, Y, X, OY, OX,
    WINDOW: tl.constexpr, RANK: tl.constexpr, MASKED: tl.constexpr, INSIDE: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One tap's samples (positions, channels), times their masks; each image has its channels last."""
    z_low, y_low, x_low, z_fraction, y_fraction, x_fraction, _z, _y, _x, counts, poison = place_tap(
        offset_ptr, image, position, there, group, tap, P, G, Z, Y, X, OY, OX, WINDOW, RANK, INSIDE, LAST, ACC
    )
    found = tl.zeros((counts.shape[0], channel.shape[0]), ACC) + poison[:, None]
    for CORNER in tl.static_range(2**RANK):
        pixel, inside, z, y, x = corner_of(
            z_low, y_low, x_low, z_fraction, y_fraction, x_fraction, Z, Y, X, CORNER, RANK, INSIDE
        )
        at = tl.multiple_of((image * pixels + pixel) * C, SPAN)[:, None] + channel[None, :]
        value = tl.load(x_ptr + at, mask=(inside & counts)[:, None] & is_channel[None, :], other=0.0)
        found += (z * y * x)[:, None] * value.to(ACC)
    if MASKED:
        K: tl.constexpr = WINDOW[0][0] * WINDOW[0][1] * WINDOW[0][2]
        found = found * mask_of(mask_ptr, image, position, there, group, tap, P, G, K, LAST, ACC)[:, None]
    return found


@triton.jit
def pulled_back(value, d_z, d_y, d_x, found, z_weight, y_weight, x_weight, CORNER: tl.constexpr):
    """The products of a gradient with a sample's value and slopes (z, y, x), after one corner whose own product is `found`."""
    value += z_weight * y_weight * x_weight * found
    d_x += (z_weight * y_weight if CORNER & 1 else -z_weight * y_weight) * found
    d_y += (z_weight * x_weight if CORNER & 2 else -z_weight * x_weight) * found
    d_z += (y_weight * x_weight if CORNER & 4 else -y_weight * x_weight) * found
    return value, d_z, d_y, d_x


@triton.jit
def store_positions(
    d_offset_ptr, d_mask_ptr, image, position, there, group, tap, P, G, value, d_z, d_y, d_x, mask, poison,
    K: tl.constexpr, RANK: tl.constexpr, MASKED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tap's offsets and masks, which lie as these do."""
    at, plane = _channel_at(image, position, (group * K + tap) * RANK, P, G * (K * RANK), LAST[0])
    dtype = d_offset_ptr.dtype.element_ty
    tl.store(d_offset_ptr + at + (RANK - 1) * plane, ((d_x + poison) * mask).to(dtype), mask=there)
    if RANK >= 2:
        tl.store(d_offset_ptr + at + (RANK - 2) * plane, ((d_y + poison) * mask).to(dtype), mask=there)
    if RANK == 3:
        tl.store(d_offset_ptr + at, ((d_z + poison) * mask).to(dtype), mask=there)
    if MASKED:
        of_mask, _plane = _channel_at(image, position, group * K + tap, P, G * K, LAST[1])
        tl.store(d_mask_ptr + of_mask, (value + poison).to(d_mask_ptr.dtype.element_ty), mask=there)
