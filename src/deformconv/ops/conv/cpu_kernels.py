"""The Numba kernels of deformable convolution: one forward, one backward, one that collects the results of the latter.

A kernel takes items of work until none is left, beside other threads that do the same. Everything is done tile by tile: a
tile's samples are written into a buffer of the thread's own as rows of (tap, channel) and multiplied at once, so no column
buffer of an image ever exists. All large arrays are flat; `cpu` prepares them, `blocks` and `cpu_pack` say in which order they
are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from deformconv.ops.conv.cpu_pack import (
    pack_backward,
    pack_depthwise,
    pack_forward,
    pair_positions,
    sum_positions,
    unpack_weight,
    write_output,
)
from deformconv.runtime.atomics import all_together, fetch_add, wait_for_turn
from deformconv.runtime.blocks import (
    RUN,
    SUMS,
    Images,
    Layout,
    add_rows,
    block_end,
    block_of,
    copy_in,
    copy_out,
    copy_run_out,
    sum_slots,
    zero,
)
from deformconv.runtime.cache import device, kernel
from deformconv.runtime.matmul import FEW_ROWS, Factor, Panels, multiply
from deformconv.runtime.simd import VECTOR_BYTES, Rows, named, numbers_in, round_up, write
from deformconv.runtime.threads import NEXT, STOP
from deformconv.sampling.corners import blend, blend_products, differentiate, pull_back, rows_between, table_in
from deformconv.sampling.windows import place_tap, place_tile

__all__ = [
    "BackwardArrays",
    "BackwardCut",
    "BackwardOrder",
    "CollectArrays",
    "ForwardArrays",
    "ForwardCut",
    "Order",
    "Shape",
    "backward",
    "collect",
    "forward",
]


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
    mask empty for v1; weight (C_out, C / groups, K), `packed` room for it; bias (C_out,) or empty; output (N, C_out, P). Input,
    weight, bias and output may hold half precision (`runtime.half`): all others are float32 then, `empty` too. But products may
    be of pairs of bfloat16 (`runtime.pairs`): then `packed` are words, and `samples`, an empty array of the type that samples
    are multiplied in, is one of bfloat16.
    """

    input: Any
    x: Any
    offset: Any
    mask: Any
    weight: Any
    packed: Any
    bias: Any
    output: Any
    samples: Any
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
    column = sums[round_up(cut.tile * shape.groups * cut.group_row, lanes) :].view(arrays.samples.dtype)
    samples = Samples(plan[0], plan[1], shape, order, layout, arrays.x, arrays.offset, arrays.mask, table)
    all_together(counter, cut.copies, copy_item, (shape, order, layout, cut, arrays, sums))
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= cut.strands * cut.strand:
            return
        tile = tile_of(item, shape, cut)
        if tile.n < shape.images:
            place_tile(plan[0], plan[1], tile.first, tile.count, table)
            one_tile(samples, cut, arrays, sums, column, tile)


@device
def copy_item(item, context):
    """Pack a panel of the weight, or copy a run of the input; the last of `context` is scratch of a vector's lanes squared."""
    shape, order, layout, cut, arrays, square = context
    if item < cut.panels:
        pack_panel(item, shape, arrays.weight, order.weight_last, arrays.packed, square, arrays.empty)
        return
    copy_in(
        item - cut.panels, arrays.input, order.input_last, shape.channels, shape.images, arrays.x, layout, arrays.empty
    )  # fmt: skip


@device
def pack_panel(item, shape, weight, last, packed, square, empty):
    """Pack a panel of a weight for the product of the forward pass."""
    if shape.depthwise:
        pack_depthwise(weight, shape.channels, shape.taps, packed)
        return
    pack_forward(
        item, weight, last, shape.groups, shape.group_outputs, shape.group_channels, shape.taps, packed, square, empty
    )  # fmt: skip


@device
def tile_of(item, shape, cut):
    """The tile that an item of a forward pass is; the last strand's last items may be of an image that is not there."""
    # Threads take items in turn: each of them gets mostly neighbours, whose samples it has in its caches.
    number = item % cut.strands * cut.strand + item // cut.strands
    first = number % cut.tiles * cut.tile
    return Tile(number // cut.tiles, first, min(cut.tile, shape.positions - first))


@device
def one_tile(samples, cut, arrays, sums, column, tile):
    """Compute and write the output of one tile, chunk by chunk."""
    shape = samples.shape
    if shape.depthwise:
        zero(sums, 0, tile.count * shape.outputs)
    start = 0
    while start < shape.channels:
        end = block_end(start, shape.channels, cut.chunk_span, cut.chunk)
        for tap in range(shape.taps if shape.depthwise else 0):
            weights = arrays.packed.view(arrays.empty.dtype)
            sample_tap(samples, tile, Chunk(start, end, tap, 1), tap, Rows(sums, start, shape.outputs), weights)
        for first_tap in range(0, 0 if shape.depthwise else shape.taps, cut.taps_at_once):
            chunk = Chunk(start, end, first_tap, min(cut.taps_at_once, shape.taps - first_tap))
            rows = Rows(column, 0, chunk.taps * (end - start))
            for tap in range(first_tap, first_tap + chunk.taps):
                sample_tap(samples, tile, chunk, tap, rows, arrays.empty)
            # Rows that the product reads beyond the last sample: what lies there may be slow to multiply (see `zero`).
            zero(column, tile.count * rows.row, round_up(tile.count, FEW_ROWS) * rows.row)
            multiply_chunk(shape, cut.group_row, tile, chunk, rows, arrays.packed, sums)
        start = end
    write_output(
        sums, cut.group_row, shape.groups, shape.group_outputs, tile.n, tile.first, tile.count,
        arrays.output, samples.order.output_last, shape.positions, arrays.bias,
    )  # fmt: skip


@device
def sample_tap(samples, tile, chunk, tap, column, depthwise):
    """Write a tap's samples of a chunk into its rows of (tap, channel).

    With the weights of a depthwise convolution, (tap, channel), it adds their products to the rows.
    """
    channels, layout = samples.shape.offset_channels, samples.layout
    shift = (tap - chunk.first_tap) * (chunk.end - chunk.start) - chunk.start
    c = chunk.start
    while c < chunk.end:
        group = c // channels
        end = min((group + 1) * channels, chunk.end)
        mask_start = place_group(samples, tile, tap, group)
        while c < end:  # block by block
            stop = min(c - block_of(layout, c)[1] + layout.width, c - c % layout.span + layout.span, end)
            pixels, rows = pixels_of(samples, tile.n, c), Rows(column.array, column.start + shift + c, column.row)
            if depthwise.size > 0:
                blend_products(
                    samples.size, samples.table, tile.count, pixels, samples.mask, mask_start,
                    depthwise, tap * samples.shape.channels + c, rows, stop - c,
                )  # fmt: skip
            else:
                blend(samples.size, samples.table, tile.count, pixels, samples.mask, mask_start, rows, stop - c)
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
    numbers, group_channels = numbers_in(packed), shape.group_channels
    depth = shape.taps * group_channels // numbers
    for group in range(chunk.start // group_channels, (chunk.end - 1) // group_channels + 1):
        c = max(chunk.start, group * group_channels)
        within = c - group * group_channels
        run, runs = min(group_channels, width), chunk.taps
        if run == width:  # the taps of the chunk lie side by side, in the column as in the weight
            run, runs = runs * run, 1
        multiply(
            Factor(column.array, c - chunk.start, column.row, numbers, width, run // numbers, runs), tile.count,
            Panels(packed, group * group_row * depth, depth, 0, (chunk.first_tap * group_channels + within) // numbers),
            Rows(sums, group * group_row, sum_row), shape.group_outputs, chunk.first_tap + within > 0,
        )  # fmt: skip


class BackwardCut(NamedTuple):
    """How a backward pass is cut (`cpu_plan`)."""

    block: Any  # channels of an item, one or several blocks of the input's copy
    blocks: Any
    taps_at_once: Any
    tile: Any
    parts: Any  # of an image, each with a gradient of the input that is added to those before
    part_size: Any  # positions
    replicas: Any
    whole: Any  # whether an item does all parts of its images
    bunch: Any  # images that an item goes through for some taps before it takes the next taps
    row: Any  # numbers of a row of a replica: the input channels of a weight group
    sums: Any  # numbers of a replica for one tap and weight group
    column_row: Any
    packed: Any  # numbers of the packed weight for one tap and weight group
    packs: Any  # items that pack the weight
    batch: Any  # images of the whole call


class BackwardOrder(NamedTuple):
    """As Order; where the images lie in the batch, if the kernel gets some of them at a time; the input's gradient.

    And the output's gradient as a factor of the weight's: how many elements apart images, positions and outputs are.
    """

    input_last: Any
    weight_last: Any
    output_last: Any
    image_offset: Any
    image_mask: Any
    first_image: Any
    gradient_last: Any
    factor_image: Any
    factor_position: Any
    factor_output: Any
    factor_apart: Any  # whether it is a copy for this product alone


class BackwardArrays(NamedTuple):
    """The arrays of a backward pass, all flat; results that are not wanted are empty, the others overwritten.

    As ForwardArrays, and grad_output (N, C_out, P); d_output, room for it with its channels last and a few rows more;
    d_output_factor, what the weight's gradient is multiplied from: one of both, or, where products are of pairs of bfloat16,
    words of two positions, grad_output's own or (N, C_out, pairs); d_x, room for the input's gradient (`gradient_of`), from
    which it goes into d_input (N, C, P) here, if items do whole images, or in `collect`; turns (blocks, N), how many parts of
    an image's gradient have been added up, zeros at first; d_offset (slots, N, offset_groups, K, D, P) and d_mask (slots, N,
    offset_groups, K, P), with a slot for each item that shares an offset group; d_weight (replicas, K, groups, rows of outputs,
    `row` channels); d_bias (C_out,). Beside half precision grad_output, d_input and d_bias hold it, too.
    """

    grad_output: Any
    d_output: Any
    d_output_factor: Any
    input: Any
    x: Any
    offset: Any
    mask: Any
    weight: Any
    packed: Any
    d_x: Any
    turns: Any
    d_input: Any
    d_offset: Any
    d_mask: Any
    d_weight: Any
    d_bias: Any
    empty: Any


class Task(NamedTuple):
    """What all items of a backward pass have in common."""

    samples: Any
    cut: Any
    arrays: Any
    thread: Any
    column: Any  # a tap's samples of a block at a tile's positions, or at pairs of them
    d_column: Any  # and their gradients
    covered: Any  # which runs of pixels the thread's gradients of the input hold, two numbers for each image of a bunch
    for_samples: Any  # whether a gradient through the samples is wanted
    for_places: Any  # that of offset or mask


class Block(NamedTuple):
    """An item's channels."""

    number: Any
    start: Any
    end: Any


class Place(NamedTuple):
    """Where an item is: a part of an image, and the replica of d_weight that its sums go to."""

    n: Any
    room: Any  # the image's of those that a thread has for the input's gradient
    part: Any
    replica: Any
    begun: Any  # whether the replica holds sums of another image


@kernel
def backward(counter, limit, thread, plan, order, arrays, reals, integers):
    """One item is a block of channels in some images, or in one part of each.

    Parts are copies of d_x and replicas are copies of d_weight, so that no two threads add to the same number.

    Arguments as in `forward`, with a BackwardCut, BackwardOrder and BackwardArrays. At first everybody together makes the
    copies.
    """
    shape, layout, cut = named(Shape, plan[2]), named(Layout, plan[3]), named(BackwardCut, plan[4])
    order, arrays = BackwardOrder(*order), BackwardArrays(*arrays)
    table = table_in(plan[0], cut.tile, integers[thread], reals[thread])
    covered = integers[thread, table.rows.size :]
    column = reals[thread, round_up(table.weights.size, VECTOR_BYTES // reals.itemsize) :]
    d_column = Rows(column[cut.tile * cut.column_row :], 0, cut.column_row)
    column = column[: cut.tile * cut.column_row].view(arrays.d_output_factor.dtype)
    zero(column, 0, column.size)  # its rows have numbers beyond the channels, which products read
    samples = Samples(plan[0], plan[1], shape, order, layout, arrays.x, arrays.offset, arrays.mask, table)
    for_places = arrays.d_offset.size > 0 or arrays.d_mask.size > 0
    for_samples = for_places or arrays.d_x.size > 0
    task = Task(samples, cut, arrays, thread, Rows(column, 0, cut.column_row), d_column, covered, for_samples, for_places)
    copies = backward_copies(shape, order, layout, cut, arrays)[3]
    all_together(counter, copies, copy_for_backward, (shape, order, layout, cut, arrays))
    classes = cut.replicas // cut.parts if cut.whole else cut.replicas
    items = cut.blocks * classes if for_samples or arrays.d_weight.size > 0 else 0
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= items:
            return
        one_block(counter, task, item % cut.blocks, item // cut.blocks)


@device
def backward_copies(shape, order, layout, cut, arrays):
    """Where the items of `copy_for_backward` begin that sum for the bias, copy grad_output and copy the input; the end.

    The weight is packed and the bias' gradient summed with the first images.
    """
    packs = cut.packs if order.first_image == 0 else 0
    outputs = packs + arrays.d_bias.size
    inputs = outputs + shape.images * ((shape.positions + RUN - 1) // RUN)
    return packs, outputs, inputs, inputs + shape.images * ((layout.pixels + RUN - 1) // RUN)


@device
def copy_for_backward(item, context):
    """Pack the weight, sum the bias' gradient, or copy a run of one of both arrays with their channels last."""
    shape, order, layout, cut, arrays = context
    biases, outputs, inputs, _ = backward_copies(shape, order, layout, cut, arrays)
    if item >= inputs:
        copy_in(
            item - inputs, arrays.input, order.input_last, shape.channels, shape.images, arrays.x, layout, arrays.empty
        )  # fmt: skip
    elif item >= outputs:
        copy_output(item - outputs, shape, order, arrays)
    elif item >= biases:
        o = item - biases
        total = sum_positions(
            o, arrays.grad_output, order.output_last, shape.outputs, shape.positions, cut.batch, arrays.empty.dtype.type(0)
        )  # fmt: skip
        write(arrays.d_bias, o, total)
    elif shape.depthwise:
        pack_depthwise(arrays.weight, shape.channels, shape.taps, arrays.packed)
    else:
        pack_backward(
            item, arrays.weight, order.weight_last, shape.groups, shape.group_outputs, shape.group_channels, shape.taps,
            arrays.packed, cut.block,
        )  # fmt: skip


@device
def copy_output(item, shape, order, arrays):
    """Copy a run of an image's positions of the output's gradient with its channels last, and in pairs if these are copied."""
    outputs, positions = shape.outputs, shape.positions
    layout = Layout(outputs, outputs, 1, positions, positions)
    copy_in(
        item, arrays.grad_output, order.output_last, outputs, shape.images, arrays.d_output, layout, arrays.empty
    )  # fmt: skip
    if numbers_in(arrays.d_output_factor) > 1 and order.factor_apart:
        pair_positions(item, arrays.grad_output, order.output_last, outputs, positions, arrays.d_output_factor)


@device
def one_block(counter, task, number, item):
    """Do a block's work in some images: every `replicas / parts`-th of the batch, in all parts or in one."""
    shape, layout, cut = task.samples.shape, task.samples.layout, task.cut
    blocks_a_span = (layout.span + cut.block - 1) // cut.block
    start = number // blocks_a_span * layout.span + number % blocks_a_span * cut.block
    block = Block(number, start, block_end(start, shape.channels, layout.span, cut.block))
    step, before = cut.replicas // cut.parts, task.samples.order.first_image
    # Images are counted from the first of the batch, so that it does not matter how many of them the kernel gets at once.
    first, first_part, parts = (item, 0, cut.parts) if cut.whole else (item // cut.parts, item % cut.parts, 1)
    images = shape.images
    for n in range((first - before) % step, images, step * cut.bunch):
        last = min(n + step * cut.bunch, images)
        for part in range(first_part, first_part + parts):
            for image in range(n, last, step):
                begin_gradient(task, block, Place(image, (image - n) // step, part, 0, False))
            # Some taps, so that their weights and sums stay in the cache; then all tiles, and for each of them those taps.
            for first_tap in range(0, shape.taps, cut.taps_at_once):
                last_tap = min(first_tap + cut.taps_at_once, shape.taps)
                for image in range(n, last, step):
                    place = Place(image, (image - n) // step, part, first * cut.parts + part, before + image >= step)
                    one_part(counter, task, block, place, first_tap, last_tap)
            for image in range(n, last, step):
                if counter[STOP]:
                    return
                end_gradient(counter, task, block, Place(image, (image - n) // step, part, 0, False))


@device
def gradient_of(task, block, place):
    """Where a part's gradient of the input begins in d_x for an item's channels, and how far apart its blocks are.

    That of the first part is what the others are added to. If an item does all of an image's parts, each thread has room for
    it and for one more part, of each image of a bunch; else it lies as x does, before the threads' rooms for the other parts.
    """
    shape, layout, cut = task.samples.shape, task.samples.layout, task.cut
    size = layout.pitch * layout.width
    room = (cut.block + layout.width - 1) // layout.width * size
    if cut.whole:
        rooms = task.thread * min(cut.parts, 2) + min(place.part, 1)
        return (rooms * cut.bunch + place.room) * room, size
    if place.part > 0:
        return layout.blocks * shape.images * size + (task.thread * cut.bunch + place.room) * room, size
    return (block_of(layout, block.start)[0] * shape.images + place.n) * size, shape.images * size


@device
def zero_runs(task, block, place, first, last):
    """Make zeros of the runs of pixels from `first` to `last` of a part's gradient of the input."""
    layout = task.samples.layout
    start, step = gradient_of(task, block, place)
    for _ in range(block.start, block.end if first < last else block.start, layout.width):
        zero(task.arrays.d_x, start + first * RUN * layout.width, start + min(last * RUN, layout.pixels) * layout.width)
        start += step


@device
def begin_gradient(task, block, place):
    """Begin a part's gradient of the input, if it is wanted: it covers no pixel but the one that stands for all outside."""
    layout = task.samples.layout
    start, step = gradient_of(task, block, place)
    task.covered[2 * place.room] = task.covered[2 * place.room + 1] = 0
    for _ in range(block.start, block.end if task.arrays.d_x.size > 0 else block.start, layout.width):
        zero(task.arrays.d_x, start + layout.pixels * layout.width, start + layout.pitch * layout.width)
        start += step


@device
def cover(task, block, place, count):
    """Make zeros of what a table's samples are the first to be added to in a part's gradient of the input."""
    layout, table = task.samples.layout, task.samples.table
    low, high = rows_between(task.samples.size, table, count, layout.pixels)
    first, last = low // RUN, (high + RUN - 1) // RUN
    begin, end = task.covered[2 * place.room], task.covered[2 * place.room + 1]
    if low >= high or (begin <= first and last <= end):
        return
    if begin == end:
        begin, end = first, first
    zero_runs(task, block, place, first, begin)
    zero_runs(task, block, place, end, last)
    task.covered[2 * place.room], task.covered[2 * place.room + 1] = min(first, begin), max(last, end)


@device
def end_gradient(counter, task, block, place):
    """Add a part's gradient of the input to those of the parts before, in their order."""
    layout, cut, arrays = task.samples.layout, task.cut, task.arrays
    if arrays.d_x.size == 0:
        return
    turn = block.number * task.samples.shape.images + place.n
    first, last = task.covered[2 * place.room], task.covered[2 * place.room + 1]
    if place.part == 0:
        zero_runs(task, block, place, 0, first)
        zero_runs(task, block, place, last, (layout.pixels + RUN - 1) // RUN)
    else:
        if not cut.whole:
            wait_for_turn(counter, arrays.turns, turn, place.part)
            if counter[STOP]:
                return
        source, source_step = gradient_of(task, block, place)
        into, into_step = gradient_of(task, block, Place(place.n, place.room, 0, 0, False))
        start, end = first * RUN * layout.width, min(last * RUN, layout.pixels) * layout.width
        for _ in range(block.start, block.end, layout.width):
            add_rows(arrays.d_x, into + start, source + start, end - start)
            source, into = source + source_step, into + into_step
    if not cut.whole:
        fetch_add(arrays.turns, turn)
    elif place.part == cut.parts - 1:
        write_gradient(task, block, place)


@device
def write_gradient(task, block, place):
    """Bring an image's gradient of the input into the result."""
    shape, layout, arrays = task.samples.shape, task.samples.layout, task.arrays
    start, step = gradient_of(task, block, Place(place.n, place.room, 0, 0, False))
    images = Images(arrays.d_input, task.samples.order.gradient_last, shape.channels, layout.pixels)
    for c in range(block.start, block.end, layout.width):
        width = block_end(c, block.end, layout.span, layout.width) - c
        for first in range(0, layout.pixels, RUN):
            rows = Rows(arrays.d_x, start + first * layout.width, layout.width)
            copy_run_out(rows, min(RUN, layout.pixels - first), width, images, place.n, c, first, arrays.empty)
        start += step


@device
def one_part(counter, task, block, place, first_tap, last_tap):
    """Do a block's work for some taps in one part of an image."""
    samples, cut = task.samples, task.cut
    start = place.part * cut.part_size
    end = min(start + cut.part_size, samples.shape.positions)
    for first in range(start, end, cut.tile):
        if counter[STOP]:
            return
        tile = Tile(place.n, first, min(cut.tile, samples.shape.positions - first))
        place_tile(samples.size, samples.geometry, first, tile.count, samples.table)
        for tap in range(first_tap, last_tap):
            one_tap(task, block, place, tile, tap, place.begun or first > start)


@device
def one_tap(task, block, place, tile, tap, begun):
    """Add what a tap contributes at a tile's positions to all wanted gradients."""
    shape = task.samples.shape
    if task.for_samples:
        project_outputs(task, block, tile, tap)
    c = block.start
    while c < block.end:
        group = c // shape.offset_channels
        end = min((group + 1) * shape.offset_channels, block.end)
        sample_group(task, block, place, tile, tap, group, c, end - c)
        c = end
    if task.arrays.d_weight.size > 0:
        add_weight(task, block, place.replica, tile, tap, begun)


@device
def sample_group(task, block, place, tile, tap, group, channel, width):
    """Sample the channels of an offset group, forwards and, if it is wanted, backwards."""
    samples, arrays = task.samples, task.arrays
    size, shape, layout, table = samples.size, samples.shape, samples.layout, samples.table
    mask_start = place_group(samples, tile, tap, group)
    at = channel - block.start
    column, d_column = Rows(task.column.array, at, task.column.row), Rows(task.d_column.array, at, task.d_column.row)
    pixels = pixels_of(samples, tile.n, channel)
    if task.for_samples:
        if arrays.d_x.size > 0:
            cover(task, block, place, tile.count)
        start, step = gradient_of(task, block, place)
        start += (block_of(layout, channel)[0] - block_of(layout, block.start)[0]) * step + block_of(layout, channel)[1]
        d_x = Rows(arrays.d_x, start, layout.width)
        pull_back(size, table, tile.count, pixels, samples.mask, mask_start, column, d_column, d_x, width)
    else:
        blend(size, table, tile.count, pixels, samples.mask, mask_start, column, width)
    if task.for_places:
        slot = block.number - block_of(work_layout(task), group * shape.offset_channels)[0]
        row = (((slot * shape.images + tile.n) * shape.offset_groups + group) * shape.taps + tap) * shape.positions
        d_offset = Rows(arrays.d_offset, row * len(size) + tile.first, shape.positions)
        differentiate(size, table, tile.count, samples.mask, mask_start, d_offset, arrays.d_mask, row + tile.first)


@device
def work_layout(task):
    """The input's layout, if each item were a block of it."""
    layout, cut = task.samples.layout, task.cut
    return Layout(layout.span, cut.block, cut.blocks, layout.pixels, layout.pitch)


@device
def project_outputs(task, block, tile, tap):
    """d_column[t, c] = sum over o of d_output[t, o] * weight[o, c, tap], for the channels of a block."""
    shape, cut, arrays, d_column = task.samples.shape, task.cut, task.arrays, task.d_column
    position, outputs = tile.n * shape.positions + tile.first, shape.outputs
    if shape.depthwise:
        weights = arrays.packed[tap * outputs + block.start : tap * outputs + block.end]
        for t in range(tile.count):
            row, into = (position + t) * outputs, t * d_column.row
            store_products(
                d_column.array[into : into + weights.size], arrays.d_output[row + block.start : row + block.end], weights
            )  # fmt: skip
        return
    # A group's last vector may run into the next group's columns, which are written after it.
    group_channels, group_outputs, numbers = shape.group_channels, shape.group_outputs, numbers_in(arrays.packed)
    depth = group_outputs // numbers
    for group in range(block.start // group_channels, (block.end - 1) // group_channels + 1):
        c = max(block.start, group * group_channels)
        weights = (tap * shape.groups + group) * cut.packed + (c - group * group_channels) * depth
        multiply(
            Factor(arrays.d_output, position * outputs + group * group_outputs, outputs, numbers, 0, depth, 1), tile.count,
            Panels(arrays.packed, weights, depth, 0, 0),
            Rows(d_column.array, c - block.start, d_column.row), min(block.end - c, group_channels), False,
        )  # fmt: skip


@device
def add_weight(task, block, replica, tile, tap, begun):
    """d_weight[o, c] (+)= sum over t of d_output[t, o] * column[t, c], for the channels of a block."""
    shape, cut, arrays, column = task.samples.shape, task.cut, task.arrays, task.column
    position, outputs = tile.n * shape.positions + tile.first, shape.outputs
    first = (replica * shape.taps + tap) * shape.groups
    if shape.depthwise:
        sums = arrays.d_weight[first + block.start : first + block.end]
        zero(sums, 0, 0 if begun else sums.size)
        for t in range(tile.count):
            row, source = (position + t) * outputs, t * column.row
            add_products(
                sums, arrays.d_output[row + block.start : row + block.end], column.array[source : source + sums.size]
            )  # fmt: skip
        return
    numbers, order = numbers_in(column.array), task.samples.order
    start = tile.n * order.factor_image + tile.first // numbers * order.factor_position
    depth = (tile.count + numbers - 1) // numbers
    group_channels, group_outputs = shape.group_channels, shape.group_outputs
    for group in range(block.start // group_channels, (block.end - 1) // group_channels + 1):
        c = max(block.start, group * group_channels)
        into = (first + group) * cut.sums + c - group * group_channels
        multiply(
            Factor(
                arrays.d_output_factor, start + group * group_outputs * order.factor_output, order.factor_output,
                order.factor_position, 0, depth, 1,
            ), group_outputs,
            Panels(column.array, c - block.start, 1, column.row, 0),
            Rows(arrays.d_weight, into, cut.row), min(block.end - c, group_channels), begun,
        )  # fmt: skip


class CollectArrays(NamedTuple):
    """What `backward` has left, and the caller's arrays for it, all flat and empty where there is nothing to do.

    `d_input` and `d_weight` may hold half precision.
    """

    d_x: Any
    d_input: Any
    replicas: Any
    d_weight: Any
    offset_slots: Any
    d_offset: Any
    mask_slots: Any
    d_mask: Any
    empty: Any


@kernel
def collect(counter, limit, thread, numbers, input_last, arrays):
    """Bring what `backward` has left into the caller's arrays.

    An item is an output channel of d_weight, a run of d_input's positions, or a run of d_offset's or d_mask's sums. `numbers`
    are (Shape, Layout, BackwardCut), as int64 arrays, and `arrays` CollectArrays as a tuple.
    """
    shape, layout, cut = named(Shape, numbers[0]), named(Layout, numbers[1]), named(BackwardCut, numbers[2])
    a = CollectArrays(*arrays)
    inputs = shape.outputs if a.d_weight.size else 0
    offsets = inputs + (shape.images * ((layout.pixels + RUN - 1) // RUN) if a.d_input.size else 0)
    masks = offsets + (a.d_offset.size + SUMS - 1) // SUMS
    end = masks + (a.d_mask.size + SUMS - 1) // SUMS
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= end:
            return
        if item >= masks:
            sum_slots(item - masks, a.mask_slots, a.d_mask)
        elif item >= offsets:
            sum_slots(item - offsets, a.offset_slots, a.d_offset)
        elif item >= inputs:
            copy_out(item - inputs, a.d_x, layout, a.d_input, input_last, shape.channels, shape.images, a.empty)
        else:
            unpack_weight(
                item, a.replicas, cut.replicas, cut.sums // cut.row, cut.row, shape.groups, shape.group_outputs,
                shape.group_channels, shape.taps, a.d_weight,
            )  # fmt: skip
