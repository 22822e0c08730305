"""The Numba kernels of deformable convolution: each takes items of work until none is left.

Inside, channels come last (see `sampling.kernels`), and everything is done tile by tile: a tile's samples are written into a
buffer of the thread's own as rows of (tap, channel) and multiplied at once, so no column buffer of an image ever exists.
`deform_conv` in `cpu` prepares the arrays and says what they hold.
"""

from __future__ import annotations

from deformconv.runtime.cache import device, kernel
from deformconv.runtime.threads import STOP
from deformconv.runtime.vectors import ROWS, VECTOR_BYTES, VECTORS, fetch_add, multiply_packed, multiply_rows, round_up
from deformconv.sampling.kernels import (
    Tile,
    blend,
    differentiate,
    make_table,
    place_tap,
    place_tile,
    product,
    project,
    scatter,
)

__all__ = [
    "ROWS",
    "VECTOR_BYTES",
    "VECTORS",
    "backward",
    "channels_first",
    "channels_last",
    "forward",
    "pack_backward",
    "pack_forward",
    "unpack_weight",
]

# Positions or channels at a time in a copy that swaps them: both sides stay in the first-level cache.
RUN = 16


@kernel
def channels_last(counter, limit, array, rows, groups, group_row):
    """rows[n * P + p, g * group_row + c] = array[n, g * group_channels + c, p]; an item is a run of positions of an image."""
    images, channels, positions = array.shape
    group_channels = channels // groups
    runs = (positions + RUN - 1) // RUN
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= images * runs:
            return
        n, first = item // runs, item % runs * RUN
        last = min(first + RUN, positions)
        for group in range(groups):
            for channel in range(0, group_channels, RUN):
                end = min(channel + RUN, group_channels)
                for p in range(first, last):
                    for c in range(channel, end):
                        rows[n * positions + p, group * group_row + c] = array[n, group * group_channels + c, p]


@kernel
def channels_first(counter, limit, rows, array):
    """array[n, c, p] = sum over copies of rows[(copy * N + n) * P + p, c]; an item is a run of positions of an image."""
    images, channels, positions = array.shape
    copies = rows.shape[0] // (images * positions)
    runs = (positions + RUN - 1) // RUN
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= images * runs:
            return
        n, first = item // runs, item % runs * RUN
        last = min(first + RUN, positions)
        for channel in range(0, channels, RUN):
            for c in range(channel, min(channel + RUN, channels)):
                for p in range(first, last):
                    total = rows[n * positions + p, c]
                    for copy in range(1, copies):
                        total += rows[(copy * images + n) * positions + p, c]
                    array[n, c, p] = total


@kernel
def pack_forward(counter, limit, weight, packed):
    """Panels of output channels, rows (tap, channel): packed[g, panel, tap * C + c, lane] = weight[g, o, c, tap]."""
    groups, outputs, channels, taps = weight.shape
    flat = weight.reshape(weight.size)
    lanes = VECTOR_BYTES // weight.itemsize
    panel = VECTORS * lanes
    panels = (outputs + panel - 1) // panel
    depth = taps * channels
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= groups * panels:
            return
        group, first = item // panels, item % panels * panel
        width = lanes if outputs - first <= lanes else panel
        used = min(width, outputs - first)
        start = (group * round_up(outputs, lanes) + first) * depth
        source = (group * outputs + first) * depth
        for c in range(channels):
            for tap in range(taps):
                row = start + (tap * channels + c) * width
                for lane in range(used):
                    packed[row + lane] = flat[source + lane * depth + c * taps + tap]
                for lane in range(used, width):
                    packed[row + lane] = 0


@kernel
def pack_backward(counter, limit, weight, packed):
    """Panels of input channels, rows of output channels: packed[tap, g, panel, o, lane] = weight[g, o, c, tap]."""
    groups, outputs, channels, taps = weight.shape
    flat = weight.reshape(weight.size)
    lanes = VECTOR_BYTES // weight.itemsize
    panel = VECTORS * lanes
    size = round_up(channels, lanes) * outputs
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= groups * outputs:
            return
        group, o = item // outputs, item % outputs
        for first in range(0, channels, panel):
            width = lanes if channels - first <= lanes else panel
            used = min(width, channels - first)
            source = (item * channels + first) * taps
            for tap in range(taps):
                row = (tap * groups + group) * size + first * outputs + o * width
                for lane in range(used):
                    packed[row + lane] = flat[source + lane * taps + tap]
                for lane in range(used, width):
                    packed[row + lane] = 0


@device
def _mask_of(mask, start, tile):
    """The masks of one tap at a tile's positions; empty for v1."""
    return mask[start + tile.first : start + tile.first + tile.count] if mask.size else mask


@device
def _blend_channels(
    table, entries_a_group, tap_entry, window, tile, tap, taps, x, mask, image_mask, share, channel, width, column, start, row
):  # fmt: skip
    """Blend channels [channel, channel + width) of one tap, perhaps from several offset groups of `share` channels each."""
    c = channel
    while c < channel + width:
        group = c // share
        end = min((group + 1) * share, channel + width)
        scale = _mask_of(mask, image_mask + (group * taps + tap) * product(window.output_size), tile)
        entry = tap_entry + group * entries_a_group
        blend(table, entry, window, tile.count, x, c, end - c, scale, column, start + c - channel, row)
        c = end


@device
def _multiply_channelwise(column, count, width, weight, weight_start, sums, start, row):
    """sums[t, c] += column[t, c] * weight[c]: the product of a depthwise convolution."""
    for t in range(count):
        samples, filters = column[t * width : (t + 1) * width], weight[weight_start : weight_start + width]
        total = sums[start + t * row : start + t * row + width]
        for c in range(width):
            total[c] += samples[c] * filters[c]


@device
def _fill_with_bias(sums, count, groups, group_row, bias):
    group_outputs = bias.size // groups
    for t in range(count):
        for group in range(groups):
            start = (t * groups + group) * group_row
            for o in range(group_outputs):
                sums[start + o] = bias[group * group_outputs + o]


@device
def _write_output(sums, tile, groups, group_row, output):
    """output[n, o, first + t] = sums[t, o], without the sums' padding."""
    group_outputs, sum_row = output.shape[1] // groups, groups * group_row
    for group in range(groups):
        for o in range(group_outputs):
            place = group * group_row + o
            into = output[tile.image, group * group_outputs + o, tile.first : tile.first + tile.count]
            for t in range(tile.count):
                into[t] = sums[t * sum_row + place]


@kernel
def forward(
    counter, limit, window, x, offset, mask, image_offset, image_mask, weight, bias, output,
    offset_groups, group_channels, tile_size, taps_at_once, channels_at_once, reals, starts, integers,
):  # fmt: skip
    """One item is one tile of one image.

    x (rows, C); offset and mask flat, an image's (offset_groups, K, D, P) and (offset_groups, K, P) beginning `image_offset`
    and `image_mask` numbers after the one before it, mask empty for v1; weight as `pack_forward` leaves it ((K, C) for a
    depthwise convolution); bias (C_out,); output (N, C_out, P).
    """
    images, outputs, positions = output.shape
    channels, taps, axes = x.shape[1], product(window.kernel_size), len(window.kernel_size)
    groups = channels // group_channels
    group_outputs, share = outputs // groups, channels // offset_groups
    depthwise = group_channels == 1 and group_outputs == 1
    group_row = 1 if depthwise else round_up(group_outputs, VECTOR_BYTES // x.itemsize)
    sum_row = groups * group_row
    flat_x = x.reshape(x.size)
    tap_entries = taps_at_once * tile_size
    entries = offset_groups * tap_entries
    table = make_table(reals, starts, integers, axes, entries, tile_size)
    used = ((1 << axes) + axes) * entries
    sums, column = reals[used : used + tile_size * sum_row], reals[used + tile_size * sum_row :]
    tiles = (positions + tile_size - 1) // tile_size

    for _ in range(limit):
        item = fetch_add(counter)
        if item >= images * tiles:
            return
        first = item % tiles * tile_size
        tile = Tile(item // tiles, first, min(tile_size, positions - first))
        masks = tile.image * image_mask
        place_tile(table, window, tile)
        _fill_with_bias(sums, tile.count, groups, group_row, bias)
        for first_tap in range(0, taps, taps_at_once):
            last_tap = min(first_tap + taps_at_once, taps)
            for group in range(offset_groups):
                for tap in range(first_tap, last_tap):
                    entry = group * tap_entries + (tap - first_tap) * tile_size
                    start = tile.image * image_offset + (group * taps + tap) * axes * positions
                    place_tap(table, entry, window, tile, tap, x, offset, start)
            if depthwise:
                for tap in range(first_tap, last_tap):
                    entry = (tap - first_tap) * tile_size
                    for channel in range(0, channels, channels_at_once):
                        width = min(channels_at_once, channels - channel)
                        _blend_channels(
                            table, tap_entries, entry, window, tile, tap, taps, flat_x, mask, masks, share,
                            channel, width, column, 0, width,
                        )  # fmt: skip
                        _multiply_channelwise(
                            column, tile.count, width, weight, tap * channels + channel, sums, channel, sum_row
                        )  # fmt: skip
                continue
            for group in range(groups):
                for channel in range(0, group_channels, channels_at_once):
                    # Either several taps of all channels, or some channels of one tap: both are a run of the weight's rows.
                    width = min(channels_at_once, group_channels - channel)
                    depth = (last_tap - first_tap) * width
                    for tap in range(first_tap, last_tap):
                        _blend_channels(
                            table, tap_entries, (tap - first_tap) * tile_size, window, tile, tap, taps, flat_x,
                            mask, masks, share, group * group_channels + channel, width,
                            column, (tap - first_tap) * width, depth,
                        )  # fmt: skip
                    rows = taps * group_channels
                    multiply_packed(
                        column, 0, depth, 1, tile.count,
                        weight, group * group_row * rows, rows, first_tap * group_channels + channel,
                        sums, group * group_row, sum_row, group_outputs, depth, True,
                    )  # fmt: skip
        _write_output(sums, tile, groups, group_row, output)


@kernel
def backward(
    counter, limit, window, x, offset, mask, image_offset, image_mask, weight, d_output, d_x, d_offset, d_mask, d_weight,
    edges, first_block, images, offset_groups, group_channels, group_outputs, parts, tile_size, reals, starts, integers,
):  # fmt: skip
    """One item is a block of channels in every `lanes`-th part of an image: no two items write to the same place.

    x, offset, mask as in `forward`; weight as `pack_backward` leaves it; d_output (N * P and a few rows, C_out, each group
    padded to whole block rows). Block b has the channels from edges[b] to edges[b + 1]; `first_block` is the first one that
    has channels of an offset group. Results, of size 0 if not wanted: d_x (parts * N * pixels rows, and one an item for what
    leads outside; C), d_offset (slots, N, offset_groups, K, D, P) and d_mask (slots, N, offset_groups, K, P) with a slot for
    each block that shares an offset group, d_weight (lanes, K, groups, rows of outputs, row of channels).
    """
    taps, axes = product(window.kernel_size), len(window.kernel_size)
    positions, pixels = product(window.output_size), product(window.input_size)
    channels, corners = x.shape[1], 1 << axes
    groups, share = channels // group_channels, channels // offset_groups
    vector = VECTOR_BYTES // x.itemsize
    depthwise = group_channels == 1 and group_outputs == 1
    blocks, lanes = edges.size - 1, d_weight.shape[0]
    output_row, group_row = d_output.shape[1], d_output.shape[1] // groups
    packed_size = round_up(group_channels, vector) * group_outputs
    widest = 0
    for block in range(blocks):
        widest = max(widest, edges[block + 1] - edges[block])
    column_row = round_up(widest, vector) + vector
    flat_x, flat_d_x = x.reshape(x.size), d_x.reshape(d_x.size)
    flat_d_output, flat_d_weight = d_output.reshape(d_output.size), d_weight.reshape(d_weight.size)
    for_places = d_offset.size > 0 or d_mask.size > 0
    outside = images * pixels * channels
    part_size = round_up((positions + parts - 1) // parts, tile_size)

    table = make_table(reals, starts, integers, axes, tile_size, tile_size)
    used, size = (corners + axes) * tile_size, corners * tile_size
    corner_dot = reals[used : used + size].reshape(corners, tile_size)
    partial = reals[used + size : used + 2 * size].reshape(corners, tile_size)
    used, size = used + 2 * size, tile_size * column_row
    column, d_column = reals[used : used + size], reals[used + size : used + 2 * size]

    for _ in range(limit):
        item = fetch_add(counter)
        if item >= blocks * lanes:
            return
        block, lane = item % blocks, item // blocks
        channel, end = edges[block], edges[block + 1]
        dump = (parts * images * pixels + item) * channels
        # The taps outside and the tiles inside: a tap's weights and their gradient stay in the cache.
        for tap in range(taps):
            for place in range(lane, images * parts, lanes):
                n, part = place // parts, place % parts
                for first in range(part * part_size, min((part + 1) * part_size, positions), tile_size):
                    if counter[STOP]:
                        return
                    tile = Tile(n, first, min(tile_size, positions - first))
                    place_tile(table, window, tile)
                    d_row = (n * positions + first) * output_row
                    if d_x.size or for_places:
                        # A group's last vector may run into the next group's columns, which are written after it.
                        for group in range(channel // group_channels, (end - 1) // group_channels + 1):
                            c = max(channel, group * group_channels)
                            if depthwise:
                                for t in range(tile.count):
                                    value = flat_d_output[d_row + t * output_row + c] * weight[tap * channels + c]
                                    d_column[t * column_row + c - channel] = value
                                continue
                            multiply_packed(
                                flat_d_output, d_row + group * group_row, output_row, 1, tile.count,
                                weight, (tap * groups + group) * packed_size + (c - group * group_channels) * group_outputs,
                                group_outputs, 0, d_column, c - channel, column_row, min(end - c, group_channels),
                                group_outputs, False,
                            )  # fmt: skip
                    c = channel
                    while c < end:
                        group = c // share
                        width, at = min((group + 1) * share, end) - c, c - channel
                        start = (group * taps + tap) * positions
                        place_tap(table, 0, window, tile, tap, x, offset, n * image_offset + start * axes)
                        scale = _mask_of(mask, n * image_mask + start, tile)
                        if d_weight.size:
                            blend(table, 0, window, tile.count, flat_x, c, width, scale, column, at, column_row)
                        if for_places:
                            slot, last = block - first_block[group], first + tile.count
                            project(table, window, tile.count, d_column, at, column_row, flat_x, c, width, corner_dot)
                            differentiate(
                                table, tile.count, corner_dot, scale, d_offset[slot, n, group, tap, :, first:last],
                                d_mask[slot, n, group, tap, first:last], partial,
                            )  # fmt: skip
                        if d_x.size:
                            scatter(
                                table, window, tile.count, d_column, at, column_row, scale,
                                flat_d_x, part * images * pixels * channels, outside, dump, c, width,
                            )  # fmt: skip
                        c += width
                    if d_weight.size == 0:
                        continue
                    for group in range(channel // group_channels, (end - 1) // group_channels + 1):
                        c = max(channel, group * group_channels)
                        into = ((lane * taps + tap) * groups + group) * d_weight.shape[3] * d_weight.shape[4]
                        if depthwise:
                            for t in range(tile.count):
                                value = flat_d_output[d_row + t * output_row + c] * column[t * column_row + c - channel]
                                flat_d_weight[into] += value
                            continue
                        multiply_rows(
                            flat_d_output, d_row + group * group_row, 1, output_row, group_outputs,
                            column, c - channel, column_row,
                            flat_d_weight, into + c - group * group_channels, d_weight.shape[4],
                            min(end - c, group_channels), tile.count, True,
                        )  # fmt: skip


@kernel
def unpack_weight(counter, limit, sums, d_weight):
    """d_weight[g, o, c, tap] = sum over lanes of sums[lane, tap, g, o, c]; an item is one output channel."""
    groups, outputs, channels, taps = d_weight.shape
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= groups * outputs:
            return
        group, o = item // outputs, item % outputs
        for tap in range(taps):
            for c in range(channels):
                total = sums[0, tap, group, o, c]
                for lane in range(1, sums.shape[0]):
                    total += sums[lane, tap, group, o, c]
                d_weight[group, o, c, tap] = total
