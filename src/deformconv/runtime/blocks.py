"""Channels last, in blocks: the order in which kernels read and write images, and the copies in and out of it.

`rows` is flat, with the axes [block, n, p, c]. A block has `width` channels. Every `span` channels begin a new block, so that
the block before may have fewer. An image has `pitch` rows: one for each pixel, and then zeros. The caller's arrays are flat,
too. Their axes are (N, C, P), or (N, P, C) where `last` is set. They may hold half precision: blocks never do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from deformconv.runtime.cache import device
from deformconv.runtime.simd import INT, VECTOR_BYTES, Rows, emits, for_channels, for_each, read, transpose_block, write

__all__ = [
    "RUN", "SUMS", "Images", "Layout", "add_rows", "block_end", "block_of", "copy_in", "copy_out", "copy_rows",
    "copy_run_out", "sum_slots", "transpose", "zero",
]  # fmt: skip

RUN = 64  # positions that an item of a copy takes
SUMS = 8192  # sums that an item of `sum_slots` makes


class Layout(NamedTuple):
    """How channels lie in blocks: `width` in each, and a new block after every `span` channels.

    So a block's rows lie close together. Rows of all channels, often at a distance of a power of two, would compete for a few
    sets of the cache.
    """

    span: int
    width: int
    blocks: int
    pixels: int  # of an image
    pitch: int  # rows of an image, of zeros too


class Images(NamedTuple):
    """The caller's array of images, whose channels come last or second."""

    array: Any
    last: Any
    channels: Any
    positions: Any  # of an image


@device
def transpose(rows, columns, source, start, row, into, into_start, into_row, bias, bias_start):
    """into[c, r] = source[r, c] + bias[c], or without a bias if it is empty; element (r, c) at `start + r * row + c`."""
    lanes = VECTOR_BYTES // max(source.itemsize, bias.itemsize, into.itemsize)
    if bias.size > 0:
        _transpose_and_add(rows, columns, source, start, row, into, into_start, into_row, bias, bias_start)
        return
    if min(rows, columns) < lanes:
        for c in range(columns):
            for r in range(rows):
                write(into, into_start + c * into_row + r, read(source, start + r * row + c))
        return
    # Along the rows that lie further apart: a line that two blocks share is still in the cache when the second one comes.
    along_source = row > into_row
    outer, inner = (rows, columns) if along_source else (columns, rows)
    for i in range(0, outer, lanes):
        i = min(i, outer - lanes)  # a last block that is not whole begins within the one before
        for j in range(0, inner, lanes):
            j = min(j, inner - lanes)
            r, c = (i, j) if along_source else (j, i)
            transpose_block(
                source, start + r * row + c, row, into, into_start + c * into_row + r, into_row, bias, bias_start, False
            )  # fmt: skip


@device
def _transpose_and_add(rows, columns, source, start, row, into, into_start, into_row, bias, bias_start):
    lanes = VECTOR_BYTES // max(source.itemsize, into.itemsize)
    whole_rows, whole_columns = rows // lanes * lanes, columns // lanes * lanes
    along_source = row > into_row
    outer, inner = (whole_rows, whole_columns) if along_source else (whole_columns, whole_rows)
    for i in range(0, outer, lanes):
        for j in range(0, inner, lanes):
            r, c = (i, j) if along_source else (j, i)
            transpose_block(
                source, start + r * row + c, row, into, into_start + c * into_row + r, into_row, bias, bias_start + c, True
            )  # fmt: skip
    for c in range(columns):
        for r in range(whole_rows if c < whole_columns else 0, rows):
            write(into, into_start + c * into_row + r, read(source, start + r * row + c) + read(bias, bias_start + c))


@emits
def copy_rows(builder, scalar, source, into, count, width):
    """into[r, c] = source[r, c] for r < count and c < width; both are Rows."""

    def row(r, _):
        here, there = (builder.add(rows.start, builder.mul(r, rows.row)) for rows in (source, into))

        def channels(do, channel, _):
            do.store(do.load(source.array, builder.add(here, channel)), into.array, builder.add(there, channel))
            return []

        for_channels(builder, scalar, width, [], channels)
        return []

    for_each(builder, INT(0), count, 1, [], row)


@device
def block_of(layout, channel):
    """The block that a channel lies in, and the channel's number within it."""
    within = channel % layout.span
    blocks_a_span = (layout.span + layout.width - 1) // layout.width
    return channel // layout.span * blocks_a_span + within // layout.width, within % layout.width


@device
def block_end(start, channels, span, width):
    """Where the block of channels that begins at `start` ends."""
    return min(start + width, start // span * span + span, channels)


@device
def copy_in(item, array, last, channels, images, rows, layout, empty):
    """Copy a run of an image's positions into blocks; the last run also makes the zeros."""
    width, positions = layout.width, layout.pixels
    runs = (positions + RUN - 1) // RUN
    n, first = item // runs, item % runs * RUN
    count = min(RUN, positions - first)
    start, block = 0, 0
    while start < channels:
        end = block_end(start, channels, layout.span, width)
        image = (block * images + n) * layout.pitch * width
        if last:
            source = Rows(array, (n * positions + first) * channels + start, channels)
            copy_rows(source, Rows(rows, image + first * width, width), count, end - start)
        else:
            source = (n * channels + start) * positions + first
            transpose(end - start, count, array, source, positions, rows, image + first * width, width, empty, 0)
        if first + count == positions:
            for index in range(image + positions * width, image + layout.pitch * width):
                rows[index] = 0
        start, block = end, block + 1


@device
def copy_out(item, rows, layout, array, last, channels, images, empty):
    """Copy a run of an image's positions out of blocks."""
    width, positions = layout.width, layout.pixels
    runs = (positions + RUN - 1) // RUN
    n, first = item // runs, item % runs * RUN
    count = min(RUN, positions - first)
    start, block = 0, 0
    while start < channels:
        end = block_end(start, channels, layout.span, width)
        source = ((block * images + n) * layout.pitch + first) * width
        result = Images(array, last, channels, positions)
        copy_run_out(Rows(rows, source, width), count, end - start, result, n, start, first, empty)
        start, block = end, block + 1


@device
def copy_run_out(rows, count, width, images, n, channel, first, empty):
    """Copy `count` rows of `width` channels, those from `channel` on, to the positions of image `n` from `first` on."""
    channels, positions = images.channels, images.positions
    if images.last:
        copy_rows(rows, Rows(images.array, (n * positions + first) * channels + channel, channels), count, width)
    else:
        into = (n * channels + channel) * positions + first
        transpose(count, width, rows.array, rows.start, rows.row, images.array, into, positions, empty, 0)


@device
def add_rows(rows, into, source, size):
    """Add `size` numbers from `source` on to those from `into` on."""
    total, more = rows[into : into + size], rows[source : source + size]
    for index in range(total.size):
        total[index] += more[index]


@device
def sum_slots(item, slots, result):
    """A run of the sums of slots, one after the other in `slots`."""
    first = item * SUMS
    last = min(first + SUMS, result.size)
    for place in range(first, last):
        result[place] = slots[place]
    for start in range(result.size, slots.size, result.size):
        for place in range(first, last):
            result[place] += slots[start + place]


@device
def zero(array, start, end):
    """Make a part of an array zeros.

    Also where a product takes numbers along that nobody has written and nobody will read. As floating-point numbers what lay
    there before may be subnormal, as small integers are: a processor takes a hundred times as long to multiply them.
    """
    part = array[start:end]  # Numba would ask of each place in the array itself whether it counts from the end
    for place in range(part.size):
        part[place] = 0
