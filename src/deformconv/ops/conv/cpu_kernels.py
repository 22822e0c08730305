"""The Numba kernels of deformable convolution: each takes items of work until none is left.

Inside, channels come last (see `sampling.kernels`), and everything is done tile by tile: a tile's samples are written into a
buffer of the thread's own as rows of (tap, channel) and multiplied at once, so no column buffer of an image ever exists.
`deform_conv` in `cpu` prepares the arrays and says what they hold.
"""

from __future__ import annotations

from deformconv.runtime.cache import device, kernel
from deformconv.runtime.vectors import ROWS, VECTOR_BYTES, VECTORS, fetch_add, multiply_packed, multiply_rows, round_up
from deformconv.sampling.kernels import blend, differentiate, make_table, place_tap, place_tile, project, scatter

_BLOCK = 16


@kernel
def channels_last(counter, limit, array, rows, groups, group_row):  # type: ignore[no-untyped-def]
    """rows[n * P + p, g * group_row + c] = array[n, g * group_channels + c, p]; an item is a run of positions of an image."""
    images, channels, positions = array.shape
    group_channels = channels // groups
    runs = (positions + _BLOCK - 1) // _BLOCK
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= images * runs:
            return
        n, first = item // runs, item % runs * _BLOCK
        last = min(first + _BLOCK, positions)
        for group in range(groups):
            for channel in range(0, group_channels, _BLOCK):
                end = min(channel + _BLOCK, group_channels)
                for p in range(first, last):
                    for c in range(channel, end):
                        rows[n * positions + p, group * group_row + c] = array[n, group * group_channels + c, p]


@kernel
def channels_first(counter, limit, rows, array):  # type: ignore[no-untyped-def]
    """array[n, c, p] = sum over copies of rows[(copy * N + n) * P + p, c]; an item is a run of positions of an image."""
    images, channels, positions = array.shape
    copies = rows.shape[0] // (images * positions)
    runs = (positions + _BLOCK - 1) // _BLOCK
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= images * runs:
            return
        n, first = item // runs, item % runs * _BLOCK
        last = min(first + _BLOCK, positions)
        for channel in range(0, channels, _BLOCK):
            for c in range(channel, min(channel + _BLOCK, channels)):
                for p in range(first, last):
                    total = rows[n * positions + p, c]
                    for copy in range(1, copies):
                        total += rows[(copy * images + n) * positions + p, c]
                    array[n, c, p] = total


@kernel
def pack_forward(counter, limit, weight, packed):  # type: ignore[no-untyped-def]
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
                packed[row + used : row + width] = 0


@kernel
def pack_backward(counter, limit, weight, packed):  # type: ignore[no-untyped-def]
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
                packed[row + used : row + width] = 0


@device
def _sample(table, entry, count, axes, share, x, first, channel, width, mask, tap, column, start, row, entries_a_group):  # type: ignore[no-untyped-def]
    """Blend channels [channel, channel + width) of one tap, which may belong to several offset groups of `share` channels."""
    c = channel
    while c < channel + width:
        group = c // share
        end = min((group + 1) * share, channel + width)
        scale = mask[group, tap, first : first + count] if mask.size else mask[0, 0]
        blend(table, entry + group * entries_a_group, count, axes, x, c, end - c, scale, column, start + c - channel, row)
        c = end


@kernel
def forward(  # type: ignore[no-untyped-def]
    counter, limit, x, offset, mask, weight, bias, output, group_channels, tile, taps_at_once, channels_at_once,
    input_size, kernel_size, stride, before, dilation, output_size, inside, reals, starts, integers,
):  # fmt: skip
    """One item is one tile of one image.

    x (rows, C), offset (N, offset_groups, K, D, P), mask (N, offset_groups, K, P) or (N, 1, 1, 0) for none, weight as
    `pack_forward` leaves it ((K, C) for a depthwise convolution), bias (C_out,), output (N, C_out, P).
    """
    images, outputs, positions = output.shape
    offset_groups, taps, axes = offset.shape[1], offset.shape[2], len(input_size)
    channels = x.shape[1]
    groups = channels // group_channels
    group_outputs = outputs // groups
    depthwise = group_channels == 1 and group_outputs == 1
    group_row = 1 if depthwise else round_up(group_outputs, VECTOR_BYTES // x.itemsize)
    sum_row = groups * group_row
    share = channels // offset_groups
    flat_x = x.reshape(x.size)
    pixels = (x.shape[0] - 1) // images
    entries = offset_groups * taps_at_once * tile
    used = ((1 << axes) + axes) * entries
    table = make_table(reals, starts, integers, axes, entries, tile)
    sums = reals[used : used + tile * sum_row]
    column = reals[used + tile * sum_row :]
    tiles = (positions + tile - 1) // tile
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= images * tiles:
            return
        n, first = item // tiles, item % tiles * tile
        count = min(tile, positions - first)
        place_tile(table, first, count, output_size, stride, before)
        for t in range(count):
            for group in range(groups):
                for o in range(group_outputs):
                    sums[t * sum_row + group * group_row + o] = bias[group * group_outputs + o]
        for tap in range(0, taps, taps_at_once):
            last_tap = min(tap + taps_at_once, taps)
            for offset_group in range(offset_groups):
                for k in range(tap, last_tap):
                    entry = (offset_group * taps_at_once + k - tap) * tile
                    place_tap(
                        table, entry, x, n * pixels, offset[n, offset_group], k, first, count,
                        kernel_size, dilation, input_size, inside,
                    )  # fmt: skip
            if depthwise:
                for k in range(tap, last_tap):
                    for channel in range(0, channels, channels_at_once):
                        width = min(channels_at_once, channels - channel)
                        _sample(table, (k - tap) * tile, count, input_size, share, flat_x, first, channel, width, mask[n], k, column, 0, width, taps_at_once * tile)  # noqa: E501
                        for t in range(count):
                            for c in range(width):
                                sums[t * sum_row + channel + c] += column[t * width + c] * weight[k * channels + channel + c]
                continue
            for group in range(groups):
                for channel in range(0, group_channels, channels_at_once):
                    # Either several taps of all channels, or some channels of one tap: both are a run of the weight's rows.
                    width = min(channels_at_once, group_channels - channel)
                    depth = (last_tap - tap) * width
                    for k in range(tap, last_tap):
                        _sample(
                            table, (k - tap) * tile, count, input_size, share, flat_x, first,
                            group * group_channels + channel, width, mask[n], k, column, (k - tap) * width, depth,
                            taps_at_once * tile,
                        )  # fmt: skip
                    multiply_packed(
                        column, 0, depth, 1, count,
                        weight, group * group_row * taps * group_channels, taps * group_channels, tap * group_channels + channel,
                        sums, group * group_row, sum_row, group_outputs, depth, True,
                    )  # fmt: skip
        for group in range(groups):
            for o in range(group_outputs):
                place = group * group_row + o
                for t in range(count):
                    output[n, group * group_outputs + o, first + t] = sums[t * sum_row + place]


@kernel
def backward(  # type: ignore[no-untyped-def]
    counter, limit, x, offset, mask, weight, d_output, d_x, d_offset, d_mask, d_weight, edges, first_block,
    group_channels, group_outputs, parts, tile,
    input_size, kernel_size, stride, before, dilation, output_size, inside, reals, starts, integers,
):  # fmt: skip
    """One item is a block of channels in every `lanes`-th part of an image, so no two items write to the same place.

    x, offset, mask as in `forward`; weight as `pack_backward` leaves it; d_output (N * P and a few rows, C_out, each group
    padded to whole block rows). Block b has the channels from edges[b] to edges[b + 1]; the first block that has channels of
    an offset group is `first_block` of it. Results, of size 0 if not wanted:
    d_x (parts * N * pixels rows, and one an item for what leads outside; C), d_offset (slots, N, offset_groups, K, D, P), d_mask (slots, N, offset_groups, K, P), a slot for
    each block that shares an offset group; d_weight (lanes, K, groups, rows of outputs, row of channels).
    """
    images, offset_groups, taps, axes, positions = offset.shape
    channels = x.shape[1]
    groups = channels // group_channels
    pixels = (x.shape[0] - 1) // images
    vector = VECTOR_BYTES // x.itemsize
    depthwise = group_channels == 1 and group_outputs == 1
    share = channels // offset_groups
    blocks, lanes = edges.size - 1, d_weight.shape[0]
    group_row = d_output.shape[1] // groups
    grads, flat_x, flat_d_x = d_output.reshape(d_output.size), x.reshape(x.size), d_x.reshape(d_x.size)
    weight_sums = d_weight.reshape(d_weight.size)
    weight_row = d_weight.shape[4]
    packed_size = round_up(group_channels, vector) * group_outputs
    column_row = 0
    for block in range(blocks):
        column_row = max(column_row, edges[block + 1] - edges[block])
    column_row = round_up(column_row, vector) + vector

    corners = 1 << axes
    at = (corners + axes) * tile
    table = make_table(reals, starts, integers, axes, tile, tile)
    corner_dot = reals[at : at + corners * tile].reshape(corners, tile)
    at += corners * tile
    partial = reals[at : at + corners * tile].reshape(corners, tile)
    at += corners * tile
    column = reals[at : at + tile * column_row]
    d_column = reals[at + tile * column_row : at + 2 * tile * column_row]
    part_size = round_up((positions + parts - 1) // parts, tile)
    to_places = d_offset.size > 0 or d_mask.size > 0
    outside = images * pixels * channels

    for _ in range(limit):
        item = fetch_add(counter)
        if item >= blocks * lanes:
            return
        block, lane = item % blocks, item // blocks
        channel, end = edges[block], edges[block + 1]
        dump = (parts * images * pixels + item) * channels
        first_group, last_group = channel // group_channels, (end - 1) // group_channels
        for tap in range(taps):
            for part in range(lane, images * parts, lanes):
                n = part // parts
                copy_row = part % parts * images * pixels
                begin = part % parts * part_size
                for first in range(begin, min(begin + part_size, positions), tile):
                    count = min(tile, positions - first)
                    place_tile(table, first, count, output_size, stride, before)
                    row = n * positions + first
                    if d_x.size or to_places:
                        for group in range(first_group, last_group + 1):
                            c = max(channel, group * group_channels)
                            if depthwise:
                                for t in range(count):
                                    d_column[t * column_row + c - channel] = grads[(row + t) * groups + c] * weight[tap * groups + c]
                                continue
                            # A group's last vector may run into the next group's columns, which are written after it.
                            multiply_packed(
                                grads, row * d_output.shape[1] + group * group_row, d_output.shape[1], 1, count,
                                weight, (tap * groups + group) * packed_size + (c - group * group_channels) * group_outputs,
                                group_outputs, 0,
                                d_column, c - channel, column_row, min(end - c, group_channels), group_outputs, False,
                            )  # fmt: skip
                    c = channel
                    while c < end:
                        offset_group = c // share
                        until = min((offset_group + 1) * share, end)
                        place_tap(
                            table, 0, x, n * pixels, offset[n, offset_group], tap, first, count,
                            kernel_size, dilation, input_size, inside,
                        )  # fmt: skip
                        scale = mask[n, offset_group, tap, first : first + count] if mask.size else mask[0, 0, 0]
                        if d_weight.size:
                            blend(table, 0, count, input_size, flat_x, c, until - c, scale, column, c - channel, column_row)
                        if to_places:
                            slot = block - first_block[offset_group]
                            project(table, 0, count, input_size, d_column, c - channel, column_row, flat_x, c, until - c, corner_dot)
                            to_offset = d_offset[slot, n, offset_group, tap, :, first : first + count]
                            to_mask = d_mask[slot, n, offset_group, tap, first : first + count]
                            differentiate(table, 0, count, corner_dot, scale, to_offset, to_mask, partial)
                        if d_x.size:
                            scatter(
                                table, 0, count, input_size, d_column, c - channel, column_row, scale,
                                flat_d_x, copy_row * channels, outside, dump, c, until - c,
                            )  # fmt: skip
                        c = until
                    if d_weight.size == 0:
                        continue
                    for group in range(first_group, last_group + 1):
                        c = max(channel, group * group_channels)
                        into = ((lane * taps + tap) * groups + group) * d_weight.shape[3] * weight_row
                        if depthwise:
                            for t in range(count):
                                weight_sums[into] += grads[(row + t) * groups + c] * column[t * column_row + c - channel]
                            continue
                        multiply_rows(
                            grads, row * d_output.shape[1] + group * group_row, 1, d_output.shape[1], group_outputs,
                            column, c - channel, column_row,
                            weight_sums, into + c - group * group_channels, weight_row,
                            min(end - c, group_channels), count, True,
                        )  # fmt: skip


@kernel
def unpack_weight(counter, limit, sums, d_weight):  # type: ignore[no-untyped-def]
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
