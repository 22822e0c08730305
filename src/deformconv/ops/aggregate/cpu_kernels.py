"""The Numba kernels of deformable aggregation: one forward, one backward.

A tile is a few output positions of an image, and a group means an offset group. All samples of a tile and a group are placed at
once, a vector of positions at a time; then, position by position, sums over all taps are made in registers. The input is copied
once, group by group, with its channels last: each pixel is read many times, and the rows of one group, at the distance of a
power of two, would compete for a few sets of the cache. Behind an image's pixels there are rows of zeros for corners outside of
the map, one for each of a sample's corners; where gradients are added up, these need not wait for one another there. Offsets,
masks and results stay where they are: of those that have their channels last, a tile's numbers are turned in a thread's memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from deformconv.runtime.atomics import all_together, fetch_add
from deformconv.runtime.blocks import RUN, Layout, copy_in, copy_rows, transpose, zero
from deformconv.runtime.cache import device, kernel
from deformconv.runtime.simd import (
    INT,
    Lanes,
    Rows,
    add_lanes,
    element,
    emits,
    for_channels,
    for_chunks,
    for_each,
    for_positions,
    for_usual_widths,
    lanes_of,
    named,
)
from deformconv.runtime.threads import NEXT, STOP
from deformconv.sampling.corners import Samples, slope
from deformconv.sampling.windows import place_windows

__all__ = [
    "TILE", "Axes", "BackwardArrays", "BackwardOrder", "ForwardArrays", "ForwardOrder", "Shape", "backward", "forward",
    "scratch_sizes",
]  # fmt: skip

PIXEL = ir.IntType(32)
TILE = 32  # positions, whole vectors of them


class Shape(NamedTuple):
    """A call's numbers that follow from its shapes, and how it is cut."""

    images: Any
    positions: Any  # of an image of the output
    pixels: Any
    taps: Any
    channels: Any
    groups: Any
    inside: Any  # 1 for the boundary "inside"
    run: Any  # positions of an item, whole tiles
    bunch: Any  # groups of an item
    width: Any  # channels in which one item adds up the input's gradient
    both: Any  # whether the same item computes the other gradients


class Axes(NamedTuple):
    """How far apart in memory an array's images, channels and positions are; the channels or the positions lie side by side."""

    image: Any
    channel: Any
    position: Any


class Table(NamedTuple):
    """The samples of a tile and a group, in flat arrays that no other thread uses.

    A run is TILE numbers, one for each position. For each tap there are 2^D runs of rows and of weights, one for each corner
    (`sampling.corners`), 2^D dot products for each position, and D runs of fractions.
    """

    rows: Any  # uint32 in an array of int32: which number of an image the corner's first channel is
    origins: Any  # int32, D runs: where a position's window begins
    weights: Any
    fractions: Any  # of the position along each axis
    dots: Any  # products of the corners' channels with the output's gradient


class Memory(NamedTuple):
    """A thread's own memory."""

    table: Any
    offset: Any  # planes of a tile's offsets and masks, and of their gradients
    mask: Any  # ones if the call has no masks
    d_offset: Any
    d_mask: Any
    channels: Any  # those of a group at a tile's positions
    room: Any  # the input's gradient in some channels


def scratch_sizes(axes: int, taps: int, channels: int) -> tuple[int, int]:
    """The int32 numbers and the reals of a thread's memory, without room for the input's gradient."""
    corners = 1 << axes
    return (taps * corners + axes) * TILE, (2 * taps * (corners + 1) + 3 * taps * axes + channels) * TILE


@device
def memory_in(size, taps, channels, integers, reals):
    """A thread's memory, with masks of 1."""
    axes, runs = len(size), taps * (1 << len(size)) * TILE
    planes, masks = taps * axes * TILE, taps * TILE
    fractions, dots, offset = runs, runs + planes, 2 * runs + planes
    d_offset, mask = offset + planes, offset + 2 * planes
    d_mask, rows = mask + masks, mask + 2 * masks
    room = rows + channels * TILE
    table = Table(
        integers[:runs], integers[runs : runs + axes * TILE], reals[:fractions], reals[fractions:dots], reals[dots:offset]
    )
    for index in range(mask, d_mask):
        reals[index] = 1
    return Memory(
        table, reals[offset:d_offset], reals[mask:d_mask], reals[d_offset:mask], reals[d_mask:rows], reals[rows:room],
        reals[room:],
    )  # fmt: skip


@emits
def place(builder, scalar, size, shifts, inside, taps, count, offset, row, table):
    """Fill the table with the samples of a tile's positions, for an image whose pixels are `row` numbers apart.

    `shifts` has D numbers for each tap: where it lies in its window. A row (tap, axis) of `offset` is a number a position.
    """
    axes, add, times = len(size), builder.add, builder.mul
    corners, run, pixels = 1 << axes, INT(TILE), size[0]
    for length in size[1:]:
        pixels = times(pixels, length)

    def one_tap(tap, _):
        plane = times(tap, INT(axes))
        of_tap = [builder.load(element(builder, shifts, add(plane, INT(axis)))) for axis in range(axes)]

        def step(do, t):
            samples = Samples(do, inside, size)
            whole = samples.whole
            for axis in range(axes):
                along = add(plane, INT(axis))
                value = do.load(offset.array, add(add(offset.start, times(along, offset.row)), t))
                origin = whole.load(table.origins, add(INT(axis * TILE), t))
                do.store(samples.split(axis, origin, of_tap[axis], value), table.fractions, add(times(along, run), t))
            distance = whole.spread(builder.trunc(row, PIXEL))
            for corner, (pixel, lacks, weight) in enumerate(samples.corners):
                index = add(times(add(times(tap, INT(corners)), INT(corner)), run), t)
                zeros = whole.spread(builder.trunc(times(add(pixels, INT(corner)), row), PIXEL))
                counts = builder.icmp_signed("==", lacks, whole.zero)
                whole.store(builder.select(counts, builder.mul(pixel, distance), zeros), table.rows, index)
                do.store(weight, table.weights, index)

        for_positions(builder, scalar, count, step)
        return []

    for_each(builder, INT(0), taps, 1, [], one_tap)


class _Sample:
    """Emits what a sample is read from: the rows and the weights of its corners, and its mask."""

    def __init__(self, builder, table, corners, mask, tap, t):
        self.builder, self.table, self.corners, self.mask, self.tap, self.t = builder, table, corners, mask, tap, t
        self.first = builder.add(builder.mul(tap, INT(corners * TILE)), t)

    def rows(self):
        """The numbers of each corner's first channel."""
        return [self.builder.zext(number, INT) for number in self._numbers(self.table.rows)]

    def weights(self):
        return self._numbers(self.table.weights)

    def scale(self):
        """The mask."""
        add, mask = self.builder.add, self.mask
        index = add(mask.start, add(self.builder.mul(self.tap, mask.row), self.t))
        return self.builder.load(element(self.builder, mask.array, index))

    def _numbers(self, array):
        indices = [self.builder.add(self.first, INT(corner * TILE)) for corner in range(self.corners)]
        return [self.builder.load(element(self.builder, array, index)) for index in indices]


@emits
def sum_taps(builder, scalar, size, taps, count, table, mask, x, output, width):
    """output[t, c] = sum over taps of mask * (sum over corners of weight * x[corner, c]), for c < width.

    `mask` and `output` are Rows, of taps and of positions. The mask multiplies the sum and not the weights: an infinite mask
    must not turn a weight of 0 into NaN.
    """
    add = builder.add

    def chunk(do, vectors, channel):
        start = element(builder, x.array, add(x.start, channel))

        def position(t, _):
            def tap(k, totals):
                sample = _Sample(builder, table, 1 << len(size), mask, k, t)
                corners = list(zip(sample.rows(), map(do.spread, sample.weights()), strict=True))
                scale, found = do.spread(sample.scale()), []
                for vector, total in enumerate(totals):
                    value = None
                    for row, weight in corners:
                        read = do.load(start, add(row, INT(vector * do.lanes)))
                        value = do.multiply(weight, read) if value is None else do.multiply_add(weight, read, value)
                    found.append(do.multiply_add(scale, value, total))
                return found

            _, *totals = for_each(builder, INT(0), taps, 1, [do.zero] * vectors, tap)
            into = add(add(output.start, builder.mul(t, output.row)), channel)
            for vector, total in enumerate(totals):
                do.store(total, output.array, add(into, INT(vector * do.lanes)))
            return []

        for_each(builder, INT(0), count, 1, [], position)

    for_chunks(builder, scalar, width, chunk)


@emits
def pull_back(builder, scalar, size, taps, count, table, mask, grad, x, d_x, width, multiplies, scatters):
    """The backward pass of some positions, in one pass over the corners' rows.

    If it `multiplies`, it writes the dot product of grad[t] with each corner's row of `x` into the table. If it `scatters`, it
    adds mask * weight * grad[t] to the corners' rows of `d_x`. `mask` and `grad` are Rows, of taps and of positions.
    """
    add, whole = builder.add, lanes_of(scalar)
    do = Lanes(builder, scalar, whole)
    read, written = (element(builder, rows.array, rows.start) for rows in (x, d_x))

    def positions(vectors):
        def position(t, _):
            source = element(builder, grad.array, add(grad.start, builder.mul(t, grad.row)))
            gradients = [do.load(source, INT(vector * whole)) for vector in range(vectors)]

            def tap(k, _):
                sample = _Sample(builder, table, 1 << len(size), mask, k, t)
                with builder.if_then(multiplies):
                    _multiply(sample, scalar, read, source, width, gradients)
                with builder.if_then(scatters):
                    _scatter(sample, scalar, written, source, width, gradients)
                return []

            for_each(builder, INT(0), taps, 1, [], tap)
            return []

        for_each(builder, INT(0), count, 1, [], position)

    for_usual_widths(builder, whole, width, positions)


def _for_gradients(builder, scalar, source, width, gradients, sums, step):
    """Emit `step(lanes, channel, gradient, sums) -> sums`; `gradients` are those of all channels if that is a few vectors.

    Then the first sums are None, and otherwise `sums`.
    """
    if not gradients:
        return for_channels(builder, scalar, width, sums, lambda do, c, sums: step(do, c, do.load(source, c), sums))
    do, sums = Lanes(builder, scalar, lanes_of(scalar)), [None] * len(sums)
    for vector, gradient in enumerate(gradients):
        sums = step(do, INT(vector * do.width), gradient, sums)
    return sums


def _multiply(sample, scalar, x, source, width, gradients):
    """Write a sample's dot products."""
    builder, corners, rows = sample.builder, sample.corners, sample.rows()

    def step(do, channel, gradient, dots):
        values = [do.load(x, builder.add(row, channel)) for row in rows]
        return [
            do.multiply(gradient, value) if dot is None else do.multiply_add(gradient, value, dot)
            for value, dot in zip(values, dots, strict=True)
        ]

    zeros = [Lanes(builder, scalar, lanes_of(scalar)).zero] * corners
    dots = _for_gradients(builder, scalar, source, width, gradients, zeros, step)
    together = ir.Constant(ir.VectorType(scalar, corners), ir.Undefined)
    for corner, dot in enumerate(add_lanes(builder, dots)):
        together = builder.insert_element(together, dot, PIXEL(corner))
    index = builder.mul(builder.add(builder.mul(sample.tap, INT(TILE)), sample.t), INT(corners))
    Lanes(builder, scalar, corners).store(together, sample.table.dots, index)


def _scatter(sample, scalar, d_x, source, width, gradients):
    """Add what a sample gives to the input's gradient."""
    builder, rows, weights, scale = sample.builder, sample.rows(), sample.weights(), sample.scale()

    def step(do, channel, gradient, _):
        scaled = do.multiply(do.spread(scale), gradient)
        # In turn, each read after the one before is written: two corners may be the same row.
        for row, weight in zip(rows, weights, strict=True):
            place = builder.add(row, channel)
            do.store(do.multiply_add(do.spread(weight), scaled, do.load(d_x, place)), d_x, place)
        return []

    _for_gradients(builder, scalar, source, width, gradients, [], step)


@emits
def differentiate(builder, scalar, size, taps, count, table, mask, d_offset, has_offset, d_mask, has_mask):
    """The gradients of offsets and masks from the table; `d_offset` are Rows of (tap, axis), `mask` and `d_mask` of taps."""
    axes, add, times = len(size), builder.add, builder.mul
    corners = 1 << axes

    def one_tap(tap, _):
        plane = times(tap, INT(axes))

        def step(do, t):
            def at(rows, number):
                return add(add(rows.start, times(number, rows.row)), t)

            first = times(add(times(tap, INT(TILE)), t), INT(corners))
            dots = _dealt([do.load(table.dots, add(first, INT(number * do.width))) for number in range(corners)], do)
            with builder.if_then(has_mask):
                weights = Rows(table.weights, INT(0), INT(TILE))
                total = None
                for corner, dot in enumerate(dots):
                    weight = do.load(weights.array, at(weights, add(times(tap, INT(corners)), INT(corner))))
                    total = do.multiply(weight, dot) if total is None else do.multiply_add(weight, dot, total)
                do.store(total, d_mask.array, at(d_mask, tap))
            with builder.if_then(has_offset):
                scale = do.load(mask.array, at(mask, tap))
                runs = Rows(table.fractions, INT(0), INT(TILE))
                fractions = [do.load(runs.array, at(runs, add(plane, INT(axis)))) for axis in range(axes)]
                for along in range(axes):
                    gradient = do.multiply(slope(do, dots, fractions, along), scale)
                    do.store(gradient, d_offset.array, at(d_offset, add(plane, INT(along))))

        for_positions(builder, scalar, count, step)
        return []

    for_each(builder, INT(0), taps, 1, [], one_tap)


def _dealt(vectors, do):
    """The n-th number of every so many, as a vector for each n: as many as there are vectors."""
    if len(vectors) == 1:
        return vectors
    kind = ir.VectorType(PIXEL, do.width)
    hands = []
    for first in (0, 1):
        order = ir.Constant(kind, [2 * lane + first for lane in range(do.width)])
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        hands.append(_dealt([do.builder.shuffle_vector(*pair, order) for pair in pairs], do))
    return [vector for pair in zip(*hands, strict=True) for vector in pair]


@device
def start_of(axes, n, channel, position):
    """Where an image's channel begins, at a position."""
    return n * axes.image + channel * axes.channel + position * axes.position


@device
def planes_of(array, axes, n, channel, channels, first, count, own, empty):
    """Some channels of an image at a tile's positions, as Rows of channels; turned into memory `own` if channels come last."""
    start = start_of(axes, n, channel, first)
    if axes.position == 1:
        return Rows(array, start, axes.channel)
    transpose(count, channels, array, start, axes.position, own, 0, TILE, empty, 0)
    return Rows(own, 0, TILE)


@device
def planes_for(array, axes, n, channel, first, own):
    """Where results go that will be `array`'s: there, or to memory `own` if they are to be turned, by `turn_back`."""
    if axes.position == 1:
        return Rows(array, start_of(axes, n, channel, first), axes.channel)
    return Rows(own, 0, TILE)


@device
def turn_back(array, axes, n, channel, channels, first, count, own, empty):
    """Bring what `planes_for` had in memory `own` into `array`."""
    if array.size > 0 and axes.position != 1:
        transpose(channels, count, own, 0, TILE, array, start_of(axes, n, channel, first), axes.position, empty, 0)


class ForwardArrays(NamedTuple):
    """The arrays of a forward pass, all flat: those of the caller, `mask` empty if there is none, and the output.

    `x` is room for a copy of the input.
    """

    input: Any
    x: Any
    offset: Any
    mask: Any
    output: Any
    empty: Any


class ForwardOrder(NamedTuple):
    """The Axes of a forward pass' arrays."""

    input: Any
    offset: Any
    mask: Any
    output: Any


class Work(NamedTuple):
    """What all items have in common."""

    size: Any
    geometry: Any
    shifts: Any
    shape: Any
    order: Any
    arrays: Any
    memory: Any


@device
def copy_together(counter, size, shape, order, arrays):
    """Copy the input, if there is room for a copy, beside all other threads."""
    runs = (shape.pixels + RUN - 1) // RUN if arrays.x.size else 0
    all_together(counter, shape.images * runs, copy_input, (shape, 1 << len(size), order.input.channel == 1, arrays))


@device
def copy_input(item, context):
    """Copy a run of the input's pixels."""
    shape, corners, last, arrays = context
    width = shape.channels // shape.groups
    layout = Layout(width, width, shape.groups, shape.pixels, shape.pixels + corners)
    copy_in(item, arrays.input, last, shape.channels, shape.images, arrays.x, layout, arrays.empty)


@device
def items_of(shape):
    """How many items there are that take a run of an image's positions in some groups: of an image, and in all."""
    bunches = (shape.groups + shape.bunch - 1) // shape.bunch
    of_image = (shape.positions + shape.run - 1) // shape.run * bunches
    return of_image, of_image * shape.images


@device
def for_tiles(item, work, do):
    """Call `do(work, image, group, first position, positions)` for the tiles of such an item."""
    shape = work.shape
    bunches = (shape.groups + shape.bunch - 1) // shape.bunch
    n, item = item // items_of(shape)[0], item % items_of(shape)[0]
    start, first_group = item // bunches * shape.run, item % bunches * shape.bunch
    end = min(start + shape.run, shape.positions)
    for first in range(start, end, TILE):
        count = min(TILE, end - first)
        place_windows(work.size, work.geometry, first, count, Rows(work.memory.table.origins, 0, TILE))
        for group in range(first_group, min(first_group + shape.bunch, shape.groups)):
            do(work, n, group, first, count)


@kernel
def forward(counter, limit, thread, plan, order, arrays, reals, integers):
    """One item is a run of an image's positions in some groups, after everybody together has copied the input.

    `plan` is (size, geometry, shifts of the taps, Shape as an int64 array), `order` a ForwardOrder of Axes and `arrays`
    ForwardArrays, as tuples. `reals` and `integers` have a row of scratch memory for each thread.
    """
    size, geometry, shifts, numbers = plan
    shape, arrays = named(Shape, numbers), ForwardArrays(*arrays)
    order = ForwardOrder(Axes(*order[0]), Axes(*order[1]), Axes(*order[2]), Axes(*order[3]))
    memory = memory_in(size, shape.taps, shape.channels // shape.groups, integers[thread], reals[thread])
    work = Work(size, geometry, shifts, shape, order, arrays, memory)
    copy_together(counter, size, shape, order, arrays)
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= items_of(shape)[1]:
            return
        for_tiles(item, work, aggregate)


@device
def pixels_of(work, n, channel):
    """An image's rows of channels, from one on, in the copy of the input."""
    shape = work.shape
    width = shape.channels // shape.groups
    image = (shape.pixels + (1 << len(work.size))) * width
    return Rows(work.arrays.x, (channel // width * shape.images + n) * image + channel % width, width)


@device
def place_group(work, n, group, first, count, row):
    """Fill the table with a group's samples at a tile's positions, and return Rows of its masks."""
    shape, order, arrays, memory = work.shape, work.order, work.arrays, work.memory
    planes = shape.taps * len(work.size)
    offset = planes_of(arrays.offset, order.offset, n, group * planes, planes, first, count, memory.offset, arrays.empty)
    place(work.size, work.shifts, shape.inside != 0, shape.taps, count, offset, row, memory.table)
    if arrays.mask.size == 0:
        return Rows(memory.mask, 0, TILE)
    return planes_of(arrays.mask, order.mask, n, group * shape.taps, shape.taps, first, count, memory.mask, arrays.empty)


@device
def aggregate(work, n, group, first, count):
    """Compute and write a group's output at a tile's positions."""
    shape, arrays, memory, axes = work.shape, work.arrays, work.memory, work.order.output
    width = shape.channels // shape.groups
    channel = group * width
    into, x = start_of(axes, n, channel, first), pixels_of(work, n, channel)
    mask = place_group(work, n, group, first, count, width)
    if axes.channel == 1:
        sum_taps(work.size, shape.taps, count, memory.table, mask, x, Rows(arrays.output, into, axes.position), width)
        return
    sum_taps(work.size, shape.taps, count, memory.table, mask, x, Rows(memory.channels, 0, width), width)
    transpose(count, width, memory.channels, 0, width, arrays.output, into, axes.channel, arrays.empty, 0)


class BackwardArrays(NamedTuple):
    """The arrays of a backward pass, as ForwardArrays; results that are not wanted are empty, the others overwritten.

    `x` is empty if only d_input is wanted.
    """

    grad_output: Any
    input: Any
    x: Any
    offset: Any
    mask: Any
    d_input: Any
    d_offset: Any
    d_mask: Any
    empty: Any


class BackwardOrder(NamedTuple):
    """The Axes of a backward pass' arrays."""

    grad_output: Any
    input: Any
    offset: Any
    mask: Any
    d_input: Any
    d_offset: Any
    d_mask: Any


@kernel
def backward(counter, limit, thread, plan, order, arrays, reals, integers):
    """One item adds up d_input in some channels of an image; one computes the rest, for a run of positions in some groups.

    Or, if shape.both says so, one does both for a group of an image. No two items write to the same number. Arguments as in
    `forward`, with a BackwardOrder and BackwardArrays; scratch memory has room for d_input in an item's channels.
    """
    size, geometry, shifts, numbers = plan
    shape, arrays = named(Shape, numbers), BackwardArrays(*arrays)
    order = BackwardOrder(
        Axes(*order[0]), Axes(*order[1]), Axes(*order[2]), Axes(*order[3]), Axes(*order[4]), Axes(*order[5]), Axes(*order[6])
    )
    width = shape.channels // shape.groups
    memory = memory_in(size, shape.taps, width, integers[thread], reals[thread])
    work = Work(size, geometry, shifts, shape, order, arrays, memory)
    copy_together(counter, size, shape, order, arrays)
    blocks = (width + shape.width - 1) // shape.width
    sums = shape.images * shape.groups * blocks if arrays.d_input.size else 0
    others = 0 if shape.both or arrays.d_offset.size + arrays.d_mask.size == 0 else items_of(shape)[1]
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= sums + others:
            return
        if item < sums:
            # Threads take items in turn. Neighbouring groups share cache lines of offsets, and of gradients that are written.
            number, start = item // blocks % shape.groups, item % blocks * shape.width
            group = number % 2 * ((shape.groups + 1) // 2) + number // 2
            add_up(counter, work, item // blocks // shape.groups, group, start, min(shape.width, width - start))
        else:
            for_tiles(item - sums, work, multiply)


@device
def add_up(counter, work, n, group, start, width):
    """Add up d_input in `width` channels of a group from its channel `start` on, position by position."""
    shape, arrays, memory, axes = work.shape, work.arrays, work.memory, work.order.d_input
    channel, room = group * (shape.channels // shape.groups) + start, Rows(memory.room, 0, width)
    zero(room.array, 0, (shape.pixels + (1 << len(work.size))) * width)
    for first in range(0, shape.positions, TILE):
        if counter[STOP]:
            return
        count = min(TILE, shape.positions - first)
        place_windows(work.size, work.geometry, first, count, Rows(memory.table.origins, 0, TILE))
        mask = place_group(work, n, group, first, count, width)
        grad = gradients_of(work, n, channel, width, first, count)
        both = shape.both != 0
        x = pixels_of(work, n, channel)
        pull_back(work.size, shape.taps, count, memory.table, mask, grad, x, room, width, both, True)
        if both:
            write_places(work, n, group, first, count, mask)
    into = start_of(axes, n, channel, 0)
    if axes.channel == 1:
        copy_rows(room, Rows(arrays.d_input, into, axes.position), shape.pixels, width)
    else:
        transpose(shape.pixels, width, room.array, 0, width, arrays.d_input, into, axes.channel, arrays.empty, 0)


@device
def multiply(work, n, group, first, count):
    """Compute and write the gradients of a group's offsets and masks at a tile's positions."""
    shape, memory = work.shape, work.memory
    width = shape.channels // shape.groups
    mask = place_group(work, n, group, first, count, width)
    grad, x = gradients_of(work, n, group * width, width, first, count), pixels_of(work, n, group * width)
    pull_back(work.size, shape.taps, count, memory.table, mask, grad, x, x, width, True, False)
    write_places(work, n, group, first, count, mask)


@device
def gradients_of(work, n, channel, width, first, count):
    """The output's gradient in some channels at a tile's positions, as Rows of positions."""
    arrays, own, axes = work.arrays, work.memory.channels, work.order.grad_output
    start = start_of(axes, n, channel, first)
    if axes.channel == 1:
        return Rows(arrays.grad_output, start, axes.position)
    transpose(width, count, arrays.grad_output, start, axes.channel, own, 0, width, arrays.empty, 0)
    return Rows(own, 0, width)


@device
def write_places(work, n, group, first, count, mask):
    """Write the gradients of a group's offsets and masks at a tile's positions from the table's dot products."""
    shape, order, arrays, memory = work.shape, work.order, work.arrays, work.memory
    planes, of_masks = shape.taps * len(work.size), group * shape.taps
    of_offsets = of_masks * len(work.size)
    d_offset = planes_for(arrays.d_offset, order.d_offset, n, of_offsets, first, memory.d_offset)
    d_mask = planes_for(arrays.d_mask, order.d_mask, n, of_masks, first, memory.d_mask)
    differentiate(
        work.size, shape.taps, count, memory.table, mask, d_offset, arrays.d_offset.size > 0, d_mask, arrays.d_mask.size > 0
    )  # fmt: skip
    turn_back(arrays.d_offset, order.d_offset, n, of_offsets, planes, first, count, memory.d_offset, arrays.empty)
    turn_back(arrays.d_mask, order.d_mask, n, of_masks, shape.taps, first, count, memory.d_mask, arrays.empty)
