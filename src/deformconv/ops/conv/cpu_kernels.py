"""The Numba kernels of deformable convolution: each takes items of work until none is left.

Everything is done tile by tile: a tile's samples are written into a buffer of the thread's own as rows of (tap, channel) and
multiplied at once, so no column buffer of an image ever exists. All large arrays are flat. `cpu` prepares them and says what
they hold; its `Layout` says how channels lie in blocks.
"""

from __future__ import annotations

from deformconv.runtime.cache import device, kernel
from deformconv.runtime.product import FEW_ROWS, VECTORS, multiply
from deformconv.runtime.threads import STOP
from deformconv.runtime.vectors import VECTOR_BYTES, fetch_add, round_up, transpose_block
from deformconv.sampling.kernels import (
    INPUT,
    KERNEL,
    OUTPUT,
    blend,
    differentiate,
    place_tap,
    place_tile,
    pull_back,
)

__all__ = [
    "FEW_ROWS",
    "RUN",
    "VECTORS",
    "VECTOR_BYTES",
    "backward",
    "channels_first",
    "channels_last",
    "forward",
    "pack_backward",
    "pack_forward",
    "sum_positions",
    "unpack_weight",
]

# Positions that an item of a copy moves.
RUN = 64


@device
def product(geometry, what):
    """The product of a row of the geometry."""
    result = 1
    for axis in range(geometry.shape[1]):
        result *= geometry[what, axis]
    return result


@device
def _transpose(rows, columns, source, start, row, into, into_start, into_row, bias, bias_start):
    """into[c, r] = source[r, c] + bias[c], or without a bias if it is empty; element (r, c) at `start + r * row + c`."""
    lanes = VECTOR_BYTES // source.itemsize
    for r in range(0, rows - lanes + 1, lanes):
        for c in range(0, columns - lanes + 1, lanes):
            transpose_block(
                source, start + r * row + c, row, into, into_start + c * into_row + r, into_row, bias, bias_start + c
            )  # fmt: skip
    whole_rows, whole_columns = rows // lanes * lanes, columns // lanes * lanes
    for c in range(columns):
        added = bias[bias_start + c] if bias.size else source.dtype.type(0)
        for r in range(whole_rows if c < whole_columns else 0, rows):
            into[into_start + c * into_row + r] = source[start + r * row + c] + added


@kernel
def channels_last(counter, limit, array, rows, span, width, pitch, empty):
    """rows[block, n, p, c] = array[n, channel, p], and zeros from p = P to `pitch`; an item is a run of positions of an image.

    A block has `width` channels, the last one of every `span` what is left.
    """
    images, channels, positions = array.shape
    flat = array.reshape(array.size)
    runs = (positions + RUN - 1) // RUN
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= images * runs:
            return
        n, first = item // runs, item % runs * RUN
        count = min(RUN, positions - first)
        start, block = 0, 0
        while start < channels:
            end = min(start + width, start // span * span + span)
            into = (block * images + n) * pitch * width
            source = (n * channels + start) * positions + first
            _transpose(end - start, count, flat, source, positions, rows, into + first * width, width, empty, 0)
            if first + count == positions:
                for place in range(into + positions * width, into + pitch * width):
                    rows[place] = 0
            start, block = end, block + 1


@kernel
def channels_first(counter, limit, rows, array, span, width, pitch, parts, empty):
    """array[n, channel, p] = sum over parts of rows[part, block, n, p, c]; an item is a run of positions of an image."""
    images, channels, positions = array.shape
    flat = array.reshape(array.size)
    runs = (positions + RUN - 1) // RUN
    part_size = rows.size // parts
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= images * runs:
            return
        n, first = item // runs, item % runs * RUN
        count = min(RUN, positions - first)
        start, block = 0, 0
        while start < channels:
            end = min(start + width, start // span * span + span)
            source = ((block * images + n) * pitch + first) * width
            for part in range(1, parts):
                total, more = rows[source : source + count * width], rows[part * part_size + source :]
                for i in range(total.size):
                    total[i] += more[i]
            into = (n * channels + start) * positions + first
            _transpose(count, end - start, rows, source, width, flat, into, positions, empty, 0)
            start, block = end, block + 1


@kernel
def pack_forward(counter, limit, weight, packed, empty, square, integers):
    """Panels of output channels, rows (tap, channel): packed[g, panel, tap * C + c, lane] = weight[g, o, c, tap].

    An item is a panel; `square` is scratch of a vector's lanes squared.
    """
    groups, outputs, channels, taps = weight.shape
    flat = weight.reshape(weight.size)
    lanes = VECTOR_BYTES // weight.itemsize
    panel, depth = VECTORS * lanes, taps * channels
    panels = (outputs + panel - 1) // panel
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= groups * panels:
            return
        group, first = item // panels, item % panels * panel
        width = lanes if outputs - first <= lanes else panel
        start = (group * round_up(outputs, lanes) + first) * depth
        for vector in range(0, width, lanes):
            source = (group * outputs + first + vector) * depth
            used = max(0, min(lanes, outputs - first - vector))
            whole = depth // lanes * lanes if used == lanes else 0
            for step in range(0, whole, lanes):
                transpose_block(flat, source + step, depth, square, 0, lanes, empty, 0)
                for i in range(lanes):
                    c, tap = (step + i) // taps, (step + i) % taps
                    row = start + (tap * channels + c) * width + vector
                    for lane in range(lanes):
                        packed[row + lane] = square[i * lanes + lane]
            for step in range(whole, depth):
                c, tap = step // taps, step % taps
                row = start + (tap * channels + c) * width + vector
                for lane in range(used):
                    packed[row + lane] = flat[source + lane * depth + step]
                for lane in range(used, lanes):
                    packed[row + lane] = 0


@kernel
def pack_backward(counter, limit, weight, packed, width):
    """Panels of input channels, rows of output channels: packed[tap, g, block, panel, o, lane] = weight[g, o, c, tap].

    A block has `width` channels of a group, the last one what is left. An item is an output channel.
    """
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
        for block in range(0, channels, width):
            end = min(block + width, channels)
            for first in range(block, end, panel):
                row_size = lanes if end - first <= lanes else panel
                used = min(row_size, end - first)
                source = (item * channels + first) * taps
                for tap in range(taps):
                    row = (tap * groups + group) * size + first * outputs + o * row_size
                    for lane in range(used):
                        packed[row + lane] = flat[source + lane * taps + tap]
                    for lane in range(used, row_size):
                        packed[row + lane] = 0


@kernel
def sum_positions(counter, limit, array, sums):
    """sums[o] = sum over n and p of array[n, o, p]; an item is an o."""
    images, outputs, positions = array.shape
    flat = array.reshape(array.size)
    for _ in range(limit):
        item = fetch_add(counter)
        if item >= outputs:
            return
        total = array.dtype.type(0)
        for n in range(images):
            start = (n * outputs + item) * positions
            # Sums of sums: an error that grows with the root of the positions and not with the positions.
            for first in range(start, start + positions, 512):
                part = array.dtype.type(0)
                for place in range(first, min(first + 512, start + positions)):
                    part += flat[place]
                total += part
        sums[item] = total


@device
def _multiply_channelwise(column, count, width, weight, weight_start, sums, start, row):
    """sums[t, c] += column[t, c] * weight[c]: the product of a depthwise convolution."""
    for t in range(count):
        samples, filters = column[t * width : (t + 1) * width], weight[weight_start : weight_start + width]
        total = sums[start + t * row : start + t * row + width]
        for c in range(width):
            total[c] += samples[c] * filters[c]


@kernel
def forward(
    counter, limit, size, geometry, inside, images, x, x_span, x_width, offset, mask, image_offset, image_mask, weight, bias,
    output, outputs, groups, offset_groups, channels, chunk, tile, taps_at_once, reals, integers,
):  # fmt: skip
    """One item is one tile of one image.

    x in blocks of `x_width` channels, those of every `x_span` on their own, with a row of zeros after each image; offset and
    mask flat, an image's (offset_groups, K, D, P) and (offset_groups, K, P) beginning `image_offset` and `image_mask` numbers
    after the one before it, mask empty for v1; weight as `pack_forward` leaves it ((K, C) for a depthwise convolution); bias
    (C_out,) or empty; output (N, C_out, P). `chunk` channels, of one weight group or several whole ones, and `taps_at_once`
    taps are sampled and multiplied at once.
    """
    axes, corners = len(size), 1 << len(size)
    taps, positions, pitch = product(geometry, KERNEL), product(geometry, OUTPUT), product(geometry, INPUT) + 1
    group_channels, group_outputs, share = channels // groups, outputs // groups, channels // offset_groups
    depthwise = group_channels == 1 and group_outputs == 1
    lanes = VECTOR_BYTES // x.itemsize
    group_row = 1 if depthwise else round_up(group_outputs, lanes)
    sum_row, blocks_a_span = groups * group_row, (x_span + x_width - 1) // x_width
    chunk_span = max(group_channels, chunk)
    rows, weights = integers[: (corners + axes) * tile], reals[: (2 * corners + axes) * tile]
    sums = reals[round_up(weights.size, lanes) :]
    column = sums[round_up(tile * sum_row, lanes) :]
    tiles = (positions + tile - 1) // tile

    for _ in range(limit):
        item = fetch_add(counter)
        if item >= images * tiles:
            return
        n, first = item // tiles, item % tiles * tile
        count = min(tile, positions - first)
        place_tile(size, geometry, first, count, rows, tile)
        if depthwise:
            for place in range(count * sum_row):
                sums[place] = 0
        chunk_start = 0
        while chunk_start < channels:
            chunk_end = min(chunk_start + chunk, chunk_start // chunk_span * chunk_span + chunk_span, channels)
            width = chunk_end - chunk_start
            for first_tap in range(0, taps, taps_at_once):
                taps_now = min(taps_at_once, taps - first_tap)
                column_row = taps_now * width
                for tap in range(first_tap, first_tap + taps_now):
                    c = chunk_start
                    while c < chunk_end:
                        # As far as the samples' places are the same, then as far as a block of x goes.
                        group = c // share
                        place = (group * taps + tap) * positions + first
                        place_tap(
                            size, geometry, inside, tap, count, offset, n * image_offset + place * axes - first * (axes - 1),
                            positions, rows, weights, tile,
                        )  # fmt: skip
                        end = min((group + 1) * share, chunk_end)
                        while c < end:
                            within = c % x_span
                            block = c // x_span * blocks_a_span + within // x_width
                            stop = min(c - within % x_width + x_width, c - within + x_span, end)
                            blend(
                                size, rows, weights, tile, count,
                                x, (block * images + n) * pitch * x_width + within % x_width, x_width,
                                mask, n * image_mask + place,
                                column, (tap - first_tap) * width + c - chunk_start, column_row, stop - c,
                            )  # fmt: skip
                            c = stop
                if depthwise:
                    for tap in range(first_tap, first_tap + taps_now):
                        _multiply_channelwise(
                            column, count, width, weight, tap * channels + chunk_start, sums, chunk_start, sum_row
                        )  # fmt: skip
                    continue
                for group in range(chunk_start // group_channels, (chunk_end - 1) // group_channels + 1):
                    c = max(chunk_start, group * group_channels)
                    run = min(group_channels, width)
                    whole = run == width  # the taps of the chunk lie side by side, in the column as in the weight
                    depth, within = taps * group_channels, c - group * group_channels
                    weight_row = first_tap * group_channels + within
                    multiply(
                        column, c - chunk_start, column_row, 1, width,
                        taps_now * run if whole else run, 1 if whole else taps_now, count,
                        weight, group * group_row * depth, depth, 0, weight_row,
                        sums, group * group_row, sum_row, group_outputs, first_tap + within > 0,
                    )  # fmt: skip
            chunk_start = chunk_end
        for group in range(groups):
            into = (n * outputs + group * group_outputs) * positions + first
            _transpose(
                count, group_outputs, sums, group * group_row, sum_row, output, into, positions, bias, group * group_outputs
            )  # fmt: skip


@kernel
def backward(
    counter, limit, size, geometry, inside, images, x, x_span, x_width, offset, mask, image_offset, image_mask, weight,
    d_output, d_x, d_offset, d_mask, d_weight, outputs, groups, offset_groups, channels, parts, lanes, d_weight_row,
    tile, taps_at_once, reals, integers,
):  # fmt: skip
    """One item is a block of channels in every `lanes`-th part of an image: no two items write to the same place.

    x, offset, mask as in `forward`; weight as `pack_backward` leaves it; d_output (N * P and a few rows, C_out). Results, of
    size 0 if not wanted, all overwritten: d_x (parts, as x), d_offset (slots, N, offset_groups, K, D, P) and d_mask (slots, N,
    offset_groups, K, P) with a slot for each block that shares an offset group, d_weight (lanes, K, groups, rows of outputs,
    `d_weight_row` channels).
    """
    axes, corners = len(size), 1 << len(size)
    taps, positions, pitch = product(geometry, KERNEL), product(geometry, OUTPUT), product(geometry, INPUT) + 1
    group_channels, group_outputs, share = channels // groups, outputs // groups, channels // offset_groups
    depthwise = group_channels == 1 and group_outputs == 1
    vector = VECTOR_BYTES // x.itemsize
    blocks_a_span = (x_span + x_width - 1) // x_width
    blocks = channels // x_span * blocks_a_span
    packed_size = round_up(group_channels, vector) * group_outputs
    sums_size = d_weight.size // (lanes * taps * groups)
    for_places = d_offset.size > 0 or d_mask.size > 0
    for_samples = for_places or d_x.size > 0
    slot_size = images * offset_groups * taps * positions
    part_size = round_up((positions + parts - 1) // parts, tile)
    image_size = pitch * x_width

    rows, weights = integers[: (corners + axes) * tile], reals[: (2 * corners + axes) * tile]
    column_row = round_up(x_width, vector) + vector
    column = reals[round_up(weights.size, vector) :]
    d_column = column[tile * column_row :]

    for _ in range(limit):
        item = fetch_add(counter)
        if item >= blocks * lanes:
            return
        block, lane = item % blocks, item // blocks
        channel = block // blocks_a_span * x_span + block % blocks_a_span * x_width
        end = min(channel + x_width, channel // x_span * x_span + x_span)
        if d_x.size:
            for place in range(lane, images * parts, lanes):
                start = ((place % parts * blocks + block) * images + place // parts) * image_size
                for i in range(start, start + image_size):
                    d_x[i] = 0
        # Some taps, so that their weights and sums stay in the cache; then all tiles, and for each of them those taps.
        for first_tap in range(0, taps, taps_at_once):
            for place in range(lane, images * parts, lanes):
                n, part = place // parts, place % parts
                for first in range(part * part_size, min((part + 1) * part_size, positions), tile):
                    if counter[STOP]:
                        return
                    count = min(tile, positions - first)
                    place_tile(size, geometry, first, count, rows, tile)
                    begun = place > lane or first > part * part_size
                    for tap in range(first_tap, min(first_tap + taps_at_once, taps)):
                        if for_samples:
                            _project_outputs(
                                d_output, n * positions + first, outputs, weight, tap, groups, packed_size, channel, end,
                                group_channels, group_outputs, depthwise, count, d_column, column_row,
                            )  # fmt: skip
                        c = channel
                        while c < end:
                            group = c // share
                            width, at = min((group + 1) * share, end) - c, c - channel
                            start = (group * taps + tap) * positions + first
                            masks = n * image_mask + start
                            place_tap(
                                size, geometry, inside, tap, count,
                                offset, n * image_offset + start * axes - first * (axes - 1), positions, rows, weights, tile,
                            )  # fmt: skip
                            x_start = (block * images + n) * image_size + at
                            if for_samples:
                                pull_back(
                                    size, rows, weights, tile, count, x, x_start, x_width, mask, masks,
                                    column, d_column, at, column_row,
                                    d_x, x_start + part * blocks * images * image_size, d_x.size > 0, width,
                                )  # fmt: skip
                            else:
                                blend(
                                    size, rows, weights, tile, count, x, x_start, x_width, mask, masks,
                                    column, at, column_row, width,
                                )  # fmt: skip
                            if for_places:
                                within = group * share
                                first_block = within // x_span * blocks_a_span + within % x_span // x_width
                                sample = ((block - first_block) * slot_size) + n * offset_groups * taps * positions + start
                                differentiate(
                                    size, weights, tile, count, mask, masks,
                                    d_offset, sample * axes - first * (axes - 1), positions, d_mask, sample,
                                )  # fmt: skip
                            c += width
                        if d_weight.size:
                            _add_weight(
                                d_output, n * positions + first, outputs, column, column_row, d_weight,
                                (lane * taps + tap) * groups, sums_size, d_weight_row, channel, end,
                                group_channels, group_outputs, depthwise, count, begun,
                            )  # fmt: skip


@device
def _project_outputs(
    d_output, position, outputs, weight, tap, groups, packed_size, channel, end, group_channels, group_outputs, depthwise,
    count, d_column, column_row,
):  # fmt: skip
    """d_column[t, c] = sum over o of d_output[position + t, o] * weight[o, c, tap], for the channels of a block."""
    # A group's last vector may run into the next group's columns, which are written after it.
    for group in range(channel // group_channels, (end - 1) // group_channels + 1):
        c = max(channel, group * group_channels)
        start = position * outputs + group * group_outputs
        if depthwise:
            for t in range(count):
                d_column[t * column_row + c - channel] = d_output[start + t * outputs] * weight[tap * groups + c]
            continue
        within = c - group * group_channels
        multiply(
            d_output, start, outputs, 1, 0, group_outputs, 1, count,
            weight, (tap * groups + group) * packed_size + within * group_outputs, group_outputs, 0, 0,
            d_column, c - channel, column_row, min(end - c, group_channels), False,
        )  # fmt: skip


@device
def _add_weight(
    d_output, position, outputs, column, column_row, d_weight, first_sum, sums_size, d_weight_row, channel, end,
    group_channels, group_outputs, depthwise, count, begun,
):  # fmt: skip
    """d_weight[o, c] (+)= sum over t of d_output[position + t, o] * column[t, c], for the channels of a block."""
    for group in range(channel // group_channels, (end - 1) // group_channels + 1):
        c = max(channel, group * group_channels)
        into, start = (first_sum + group) * sums_size, position * outputs + group * group_outputs
        if depthwise:
            total = d_weight[into] if begun else d_weight.dtype.type(0)
            for t in range(count):
                total += d_output[start + t * outputs] * column[t * column_row + c - channel]
            d_weight[into] = total
            continue
        multiply(
            d_output, start, 1, outputs, 0, count, 1, group_outputs,
            column, c - channel, 1, column_row, 0,
            d_weight, into + c - group * group_channels, d_weight_row, min(end - c, group_channels), begun,
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
