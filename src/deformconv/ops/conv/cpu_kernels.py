"""The Numba kernels of deformable convolution: one forward, one backward, one that collects the results of the latter.

A kernel takes items of work until none is left, beside other threads that do the same. Everything is done tile by tile: a
tile's samples are written into a buffer of the thread's own as rows of (tap, channel) and multiplied at once, so no column
buffer of an image ever exists. All large arrays are flat; `cpu` prepares them, `blocks` and `cpu_pack` say in which order they
are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from deformconv.ops.conv.cpu_pack import (
    SUMS,
    pack_backward,
    pack_depthwise,
    pack_forward,
    sum_positions,
    sum_slots,
    unpack_weight,
    write_output,
)
from deformconv.runtime.atomics import fetch_add, wait_for
from deformconv.runtime.blocks import RUN, Layout, block_end, block_of, copy_in, copy_out
from deformconv.runtime.cache import device, kernel
from deformconv.runtime.matmul import FEW_ROWS, Factor, Panels, multiply
from deformconv.runtime.simd import VECTOR_BYTES, Rows, named, round_up
from deformconv.runtime.threads import BEGUN, ENDED, NEXT, STOP
from deformconv.sampling.corners import Table, blend, differentiate, pull_back, table_in
from deformconv.sampling.windows import INPUT, KERNEL, OUTPUT, place_tap, place_tile

__all__ = ["ForwardArrays", "ForwardCut", "Order", "Shape", "backward", "collect", "forward"]


class Shape(NamedTuple):
    """A call's numbers that follow from its shapes alone."""

    images: Any
    positions: Any  # of an image of the output
    taps: Any
    channels: Any
    outputs: Any  # output channels
    groups: Any
    group_channels: Any
    group_outputs: Any
    offset_groups: Any
    offset_channels: Any  # of an offset group
    depthwise: Any  # 1 where weight groups have a channel and an output each
    inside: Any  # 1 for the boundary "inside"


class Order(NamedTuple):
    """How the caller's arrays lie in memory: whether channels come last, and how many numbers apart images are."""

    input_last: Any
    weight_last: Any
    output_last: Any
    image_offset: Any
    image_mask: Any


class ForwardCut(NamedTuple):
    """How a forward pass is cut (`cpu_plan`)."""

    chunk: Any
    chunk_span: Any  # channels that are cut into chunks together
    taps_at_once: Any
    tile: Any
    tiles: Any  # of an image
    strands: Any
    strand: Any  # tiles
    group_row: Any  # numbers of a row of sums, those of one weight group
    panels: Any  # items that pack the weight
    copies: Any  # these, and those that copy the input


class ForwardArrays(NamedTuple):
    """The arrays of a forward pass, all flat.

    input (N, C, P); `x` room for it in blocks; offset and mask, an image's (offset_groups, K, D, P) and (offset_groups, K, P),
    mask empty for v1; weight (C_out, C / groups, K), `packed` room for it; bias (C_out,) or empty; output (N, C_out, P).
    """

    input: Any
    x: Any
    offset: Any
    mask: Any
    weight: Any
    packed: Any
    bias: Any
    output: Any
    empty: Any


class Samples(NamedTuple):
    """What a tap's samples are made of."""

    size: Any
    geometry: Any
    shape: Any
    order: Any
    layout: Any
    x: Any
    offset: Any
    mask: Any
    table: Any


class Tile(NamedTuple):
    """A run of an image's positions."""

    n: Any
    first: Any
    count: Any


class Chunk(NamedTuple):
    """Channels and taps that are sampled and multiplied at once."""

    start: Any
    end: Any
    first_tap: Any
    taps: Any


@device
def product(geometry, what):
    """The product of a row of the geometry."""
    result = 1
    for axis in range(geometry.shape[1]):
        result *= geometry[what, axis]
    return result


@device
def multiply_channelwise(column, count, width, weight, weight_start, sums, start, row):
    """sums[t, c] += column[t, c] * weight[c]: the product of a depthwise convolution."""
    for t in range(count):
        add_products(
            sums[start + t * row : start + t * row + width], column[t * width : (t + 1) * width],
            weight[weight_start : weight_start + width],
        )  # fmt: skip


@device
def add_products(total, a, b):
    for c in range(total.size):
        total[c] += a[c] * b[c]


@device
def store_products(total, a, b):
    for c in range(total.size):
        total[c] = a[c] * b[c]


@kernel
def forward(counter, limit, thread, plan, order, arrays, reals, integers):
    """One item is one tile of one image, after everybody together has copied the input and packed the weight.

    `plan` is (size, geometry, Shape, Layout, ForwardCut), the latter three as int64 arrays, `order` an Order and `arrays`
    ForwardArrays, both as tuples. `reals` and `integers` have a row of scratch memory for each thread.
    """
    shape, layout, cut = named(Shape, plan[2]), named(Layout, plan[3]), named(ForwardCut, plan[4])
    order, arrays = Order(*order), ForwardArrays(*arrays)
    table = table_in(plan[0], cut.tile, integers[thread], reals[thread])
    lanes = VECTOR_BYTES // reals.itemsize
    sums = reals[thread, round_up(table.weights.size, lanes) :]
    column = sums[round_up(cut.tile * shape.groups * cut.group_row, lanes) :]
    samples = Samples(plan[0], plan[1], shape, order, layout, arrays.x, arrays.offset, arrays.mask, table)
    copy_forward(counter, shape, order, layout, cut, arrays, sums)
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= cut.strands * cut.strand:
            return
        # Threads take items in turn: each of them gets mostly neighbours, whose samples it has in its caches.
        number = item % cut.strands * cut.strand + item // cut.strands
        if number < shape.images * cut.tiles:
            one_tile(samples, cut, arrays, sums, column, number // cut.tiles, number % cut.tiles * cut.tile)


@device
def zero(array, start, end):
    """Make a part of an array zeros, where a product takes numbers along that nobody has written and nobody will read.

    As floating-point numbers what lay there before may be subnormal, as small integers are: a processor takes a hundred times
    as long to multiply them.
    """
    for place in range(start, end):
        array[place] = 0


@device
def copy_forward(counter, shape, order, layout, cut, arrays, square):
    """Copy the input and pack the weight, everybody together; `square` is scratch of a vector's lanes squared."""
    item = fetch_add(counter, BEGUN)
    while item < cut.copies:
        if item >= cut.panels:
            copy_in(
                item - cut.panels, arrays.input, order.input_last, shape.channels, shape.images, arrays.x, layout, arrays.empty
            )  # fmt: skip
        elif shape.depthwise:
            pack_depthwise(arrays.weight, shape.channels, shape.taps, arrays.packed)
        else:
            pack_forward(
                item, arrays.weight, order.weight_last, shape.groups, shape.group_outputs, shape.group_channels, shape.taps,
                arrays.packed, square, arrays.empty,
            )  # fmt: skip
        fetch_add(counter, ENDED)
        item = fetch_add(counter, BEGUN)
    wait_for(counter, ENDED, cut.copies)


@device
def one_tile(samples, cut, arrays, sums, column, n, first):
    """Compute and write the output of one tile, chunk by chunk."""
    shape = samples.shape
    tile = Tile(n, first, min(cut.tile, shape.positions - first))
    place_tile(samples.size, samples.geometry, first, tile.count, samples.table)
    if shape.depthwise:
        zero(sums, 0, tile.count * shape.outputs)
    start = 0
    while start < shape.channels:
        end = block_end(start, shape.channels, cut.chunk_span, cut.chunk)
        for first_tap in range(0, shape.taps, cut.taps_at_once):
            chunk = Chunk(start, end, first_tap, min(cut.taps_at_once, shape.taps - first_tap))
            rows = Rows(column, 0, chunk.taps * (end - start))
            for tap in range(first_tap, first_tap + chunk.taps):
                sample_tap(samples, tile, chunk, tap, rows)
            # Rows that the product reads beyond the last sample: what lies there may be slow to multiply (see `zero`).
            zero(column, tile.count * rows.row, round_up(tile.count, FEW_ROWS) * rows.row)
            multiply_chunk(shape, cut.group_row, tile, chunk, rows, arrays.packed, sums)
        start = end
    write_output(
        sums, cut.group_row, shape.groups, shape.group_outputs, n, first, tile.count,
        arrays.output, samples.order.output_last, shape.positions, arrays.bias,
    )  # fmt: skip


@device
def sample_tap(samples, tile, chunk, tap, column):
    """Write a tap's samples of a chunk into its rows of (tap, channel)."""
    channels, layout = samples.shape.offset_channels, samples.layout
    shift = (tap - chunk.first_tap) * (chunk.end - chunk.start) - chunk.start
    c = chunk.start
    while c < chunk.end:
        group = c // channels
        end = min((group + 1) * channels, chunk.end)
        mask_start = place_group(samples, tile, tap, group)
        while c < end:  # block by block
            stop = min(c - block_of(layout, c)[1] + layout.width, c - c % layout.span + layout.span, end)
            blend(
                samples.size, samples.table, tile.count, pixels_of(samples, tile.n, c),
                samples.mask, mask_start, Rows(column.array, shift + c, column.row), stop - c,
            )  # fmt: skip
            c = stop


@device
def place_group(samples, tile, tap, group):
    """Fill the table with a tap's samples of an offset group at a tile's positions, and return where their masks begin."""
    shape, order = samples.shape, samples.order
    place = (group * shape.taps + tap) * shape.positions
    start = tile.n * order.image_offset + place * len(samples.size) + tile.first
    offset = Rows(samples.offset, start, shape.positions)
    place_tap(samples.size, samples.geometry, shape.inside != 0, tap, tile.count, offset, samples.table)
    return tile.n * order.image_mask + place + tile.first


@device
def pixels_of(samples, n, channel):
    """The pixels of an image from a channel on, until the end of its block."""
    layout = samples.layout
    block, within = block_of(layout, channel)
    return Rows(samples.x, (block * samples.shape.images + n) * layout.pitch * layout.width + within, layout.width)


@device
def multiply_chunk(shape, group_row, tile, chunk, column, packed, sums):
    """Multiply a chunk's samples by its weights, and add the products to the tile's sums, or write those of the first chunk."""
    width, sum_row = chunk.end - chunk.start, shape.groups * group_row
    if shape.depthwise:
        for tap in range(chunk.first_tap, chunk.first_tap + chunk.taps):
            weights = tap * shape.channels + chunk.start
            multiply_channelwise(column.array, tile.count, width, packed, weights, sums, chunk.start, sum_row)
        return
    group_channels, depth = shape.group_channels, shape.taps * shape.group_channels
    for group in range(chunk.start // group_channels, (chunk.end - 1) // group_channels + 1):
        c = max(chunk.start, group * group_channels)
        within = c - group * group_channels
        run, runs = min(group_channels, width), chunk.taps
        if run == width:  # the taps of the chunk lie side by side, in the column as in the weight
            run, runs = runs * run, 1
        multiply(
            Factor(column.array, c - chunk.start, column.row, 1, width, run, runs), tile.count,
            Panels(packed, group * group_row * depth, depth, 0, chunk.first_tap * group_channels + within),
            Rows(sums, group * group_row, sum_row), shape.group_outputs, chunk.first_tap + within > 0,
        )  # fmt: skip


@kernel
def backward(
    counter, limit, thread, size, geometry, inside, images, grad_output, output_last, d_output, input, input_last, x, x_span,
    x_width, offset, mask, image_offset, image_mask, weight, weight_last, packed, d_x, d_offset, d_mask, d_weight, d_bias,
    outputs, groups, offset_groups, channels, parts, lanes, d_weight_row, tile, taps_at_once, empty, all_reals, all_integers,
):  # fmt: skip
    """One item is a block of channels in every `lanes`-th part of an image: no two items write to the same place.

    Arguments as in `forward`; grad_output (N, C_out, P), d_output room for it with its channels last and a few rows more.
    Results, of size 0 if not wanted, all overwritten: d_x (parts, as x), d_offset (slots, N, offset_groups, K, D, P) and d_mask
    (slots, N, offset_groups, K, P) with a slot for each block that shares an offset group, d_weight (lanes, K, groups, rows of
    outputs, `d_weight_row` channels), d_bias (C_out,).
    """
    axes, corners = len(size), 1 << len(size)
    taps, positions, pitch = product(geometry, KERNEL), product(geometry, OUTPUT), product(geometry, INPUT) + 1
    layout, d_layout = Layout(x_span, x_width, 0, pitch - 1, pitch), Layout(outputs, outputs, 1, positions, positions)
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

    reals, integers = all_reals[thread], all_integers[thread]
    rows, weights = integers[: (corners + axes) * tile], reals[: (2 * corners + axes) * tile]
    table = Table(rows, weights, tile)
    column_row = round_up(x_width, vector) + vector
    column = reals[round_up(weights.size, vector) :]
    d_column = column[tile * column_row :]

    # Everybody together: the weight, the bias' gradient, both arrays with their channels last.
    packs, biases = 1 if depthwise else outputs, d_bias.size
    output_runs, input_runs = images * ((positions + RUN - 1) // RUN), images * ((pitch - 1 + RUN - 1) // RUN)
    copies = packs + biases + output_runs + input_runs
    item = fetch_add(counter, BEGUN)
    while item < copies:
        if item >= packs + biases + output_runs:
            run = item - packs - biases - output_runs
            copy_in(run, input, input_last, channels, images, x, layout, empty)
        elif item >= packs + biases:
            run = item - packs - biases
            copy_in(run, grad_output, output_last, outputs, images, d_output, d_layout, empty)
        elif item >= packs:
            o = item - packs
            d_bias[o] = sum_positions(o, grad_output, output_last, outputs, positions, images)
        elif depthwise:
            pack_depthwise(weight, channels, taps, packed)
        else:
            pack_backward(item, weight, weight_last, groups, group_outputs, group_channels, taps, packed, x_width)
        fetch_add(counter, ENDED)
        item = fetch_add(counter, BEGUN)
    wait_for(counter, ENDED, copies)

    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= blocks * lanes or not (for_samples or d_weight.size):
            return
        block, lane = item % blocks, item // blocks
        channel = block // blocks_a_span * x_span + block % blocks_a_span * x_width
        end = block_end(channel, channels, x_span, x_width)
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
                    place_tile(size, geometry, first, count, table)
                    begun = place > lane or first > part * part_size
                    for tap in range(first_tap, min(first_tap + taps_at_once, taps)):
                        if for_samples:
                            project_outputs(
                                d_output, n * positions + first, outputs, packed, tap, groups, packed_size, channel, end,
                                group_channels, group_outputs, depthwise, count, d_column, column_row,
                            )  # fmt: skip
                        c = channel
                        while c < end:
                            group = c // share
                            width, at = min((group + 1) * share, end) - c, c - channel
                            start = (group * taps + tap) * positions + first
                            masks = n * image_mask + start
                            offsets = n * image_offset + start * axes - first * (axes - 1)
                            place_tap(size, geometry, inside, tap, count, Rows(offset, offsets, positions), table)
                            x_start = (block * images + n) * image_size + at
                            pixels, samples = Rows(x, x_start, x_width), Rows(column, at, column_row)
                            if for_samples:
                                pull_back(
                                    size, table, count, pixels, mask, masks, samples, Rows(d_column, at, column_row),
                                    Rows(d_x, x_start + part * blocks * images * image_size, x_width), width,
                                )  # fmt: skip
                            else:
                                blend(size, table, count, pixels, mask, masks, samples, width)
                            if for_places:
                                within = group * share
                                first_block = within // x_span * blocks_a_span + within % x_span // x_width
                                sample = ((block - first_block) * slot_size) + n * offset_groups * taps * positions + start
                                slopes = Rows(d_offset, sample * axes - first * (axes - 1), positions)
                                differentiate(size, table, count, mask, masks, slopes, d_mask, sample)
                            c += width
                        if d_weight.size:
                            add_weight(
                                d_output, n * positions + first, outputs, column, column_row, d_weight,
                                (lane * taps + tap) * groups, sums_size, d_weight_row, channel, end,
                                group_channels, group_outputs, depthwise, count, begun,
                            )  # fmt: skip


@device
def project_outputs(
    d_output, position, outputs, weight, tap, groups, packed_size, channel, end, group_channels, group_outputs, depthwise,
    count, d_column, column_row,
):  # fmt: skip
    """d_column[t, c] = sum over o of d_output[position + t, o] * weight[o, c, tap], for the channels of a block."""
    if depthwise:
        for t in range(count):
            row, into = (position + t) * outputs, t * column_row
            store_products(
                d_column[into : into + end - channel], d_output[row + channel : row + end],
                weight[tap * groups + channel : tap * groups + end],
            )  # fmt: skip
        return
    # A group's last vector may run into the next group's columns, which are written after it.
    for group in range(channel // group_channels, (end - 1) // group_channels + 1):
        c = max(channel, group * group_channels)
        start = position * outputs + group * group_outputs
        within = c - group * group_channels
        multiply(
            Factor(d_output, start, outputs, 1, 0, group_outputs, 1), count,
            Panels(weight, (tap * groups + group) * packed_size + within * group_outputs, group_outputs, 0, 0),
            Rows(d_column, c - channel, column_row), min(end - c, group_channels), False,
        )  # fmt: skip


@device
def add_weight(
    d_output, position, outputs, column, column_row, d_weight, first_sum, sums_size, d_weight_row, channel, end,
    group_channels, group_outputs, depthwise, count, begun,
):  # fmt: skip
    """d_weight[o, c] (+)= sum over t of d_output[position + t, o] * column[t, c], for the channels of a block."""
    if depthwise:
        for c in range(first_sum + channel, first_sum + (channel if begun else end)):
            d_weight[c] = 0
        for t in range(count):
            row, samples = (position + t) * outputs, t * column_row
            add_products(
                d_weight[first_sum + channel : first_sum + end], d_output[row + channel : row + end],
                column[samples : samples + end - channel],
            )  # fmt: skip
        return
    for group in range(channel // group_channels, (end - 1) // group_channels + 1):
        c = max(channel, group * group_channels)
        into, start = (first_sum + group) * sums_size, position * outputs + group * group_outputs
        multiply(
            Factor(d_output, start, 1, outputs, 0, count, 1), group_outputs, Panels(column, c - channel, 1, column_row, 0),
            Rows(d_weight, into + c - group * group_channels, d_weight_row), min(end - c, group_channels), begun,
        )  # fmt: skip


@kernel
def collect(
    counter, limit, thread, d_x, x_span, x_width, pitch, parts, d_input, input_last, channels, images,
    sums, lanes, rows, row, groups, group_outputs, group_channels, taps, d_weight,
    offset_slots, d_offset, mask_slots, d_mask, empty,
):  # fmt: skip
    """Bring what `backward` has left into the caller's arrays, those of size 0 left out.

    An item is an output channel of d_weight, a run of d_input's positions, or a run of d_offset's or d_mask's sums.
    """
    weights = groups * group_outputs if d_weight.size else 0
    runs = images * ((pitch - 1 + RUN - 1) // RUN) if d_input.size else 0
    offsets, masks = (d_offset.size + SUMS - 1) // SUMS, (d_mask.size + SUMS - 1) // SUMS
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item < weights:
            unpack_weight(item, sums, lanes, rows, row, groups, group_outputs, group_channels, taps, d_weight)
        elif item < weights + runs:
            run = item - weights
            layout = Layout(x_span, x_width, 0, pitch - 1, pitch)
            copy_out(run, d_x, layout, parts, d_input, input_last, channels, images, empty)
        elif item < weights + runs + offsets:
            sum_slots(item - weights - runs, offset_slots, d_offset)
        elif item < weights + runs + offsets + masks:
            sum_slots(item - weights - runs - offsets, mask_slots, d_mask)
        else:
            return
