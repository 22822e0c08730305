"""The Numba kernels of deformable attention: one forward, one backward.

A head's channels lie side by side in the caller's value. It is read where it lies, or, if each pixel is read many times, copied
once, head by head: the rows of one head, at the distance of a power of two, would compete for a few sets of the cache. The
samples of some queries are placed before the first of them is read, in float64, where the product of a float32 location and a
size is exact. A corner outside of its level has the pixel -1: it is read from a row of zeros, and its gradient goes to a row
that nobody reads.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from deformconv.runtime.atomics import all_together, fetch_add
from deformconv.runtime.blocks import RUN, Layout, copy_in, zero
from deformconv.runtime.cache import device, kernel
from deformconv.runtime.simd import (
    INT,
    Lanes,
    add_lanes,
    call_vector,
    element,
    emits,
    emits_result,
    for_channels,
    for_chunks,
    for_each,
    for_usual_widths,
    lanes_of,
    named,
    prefetch,
)
from deformconv.runtime.threads import NEXT, STOP

__all__ = ["BackwardArrays", "ForwardArrays", "Shape", "backward", "forward", "scratch_sizes"]

_PIXEL = ir.IntType(32)
_AHEAD = 16  # queries for whose numbers in a head memory is asked ahead, as they lie too far apart for a processor to guess
_LINE = 64  # bytes


class Shape(NamedTuple):
    """A call's numbers that follow from its shapes."""

    images: Any
    tokens: Any
    heads: Any
    channels: Any  # of a head
    queries: Any
    samples: Any  # of a query in a head: points of all levels
    copied: Any  # whether each head is copied
    row: Any  # how far apart the tokens, the images and the heads of the value are that is read, or of the copy
    image: Any
    head: Any
    together: Any  # queries whose samples are placed at once
    block: Any  # queries of an item
    blocks: Any  # of a head's channels, in each of which one item adds up the value's gradient
    width: Any  # channels of such a block


class Table(NamedTuple):
    """The samples of some queries in a head, in flat arrays that no other thread uses, each a few runs of `tile` numbers.

    Corners count in binary, as in `sampling.corners`: the upper left one, the upper right one, the lower ones.
    """

    pixels: Any  # int32: each corner's pixel, among those of all levels; -1 where it lies outside of its level
    factors: Any  # each corner's weight, times that of the sample
    fractions: Any  # along height and width; NaN along both where a coordinate is NaN
    dots: Any  # the products of each corner's channels with the output's gradient
    nothing: Any  # a row of zeros
    tile: Any


def scratch_sizes(tile: int, channels: int) -> tuple[int, int]:
    """The number of int32 numbers and the number of reals in the table for `tile` samples, with a row that nobody reads."""
    return 4 * tile, 10 * tile + 2 * channels


@device
def table_in(shape, integers, reals):
    """A table in a thread's memory, a row that nobody reads, and what is left."""
    tile, channels = shape.together * shape.samples, shape.channels
    nothing, rest = reals[10 * tile : 10 * tile + channels], reals[10 * tile + channels :]
    zero(nothing, 0, channels)
    zero(rest, 0, channels)
    table = Table(
        integers[: 4 * tile], reals[: 4 * tile], reals[4 * tile : 6 * tile], reals[6 * tile : 10 * tile], nothing, tile
    )
    return table, rest[:channels], rest[channels:]


def _for_samples(builder, scalar, count, step):
    """Emit `step(lanes, t)` for t < count: whole vectors of samples, then a quarter of a vector or one at a time."""
    whole, t = lanes_of(scalar), INT(0)
    for lanes in sorted({whole, max(1, whole // 4), 1}, reverse=True):

        def body(do, t, _):
            step(do, t)
            return []

        (t,) = for_each(builder, t, count, lanes, [], partial(body, Lanes(builder, scalar, lanes)))


@emits
def place(builder, scalar, locations, weights, first, count, geometry, folded, table, into):
    """Fill the table from `into` on with a query's samples, whose locations and weights begin at sample `first`.

    `geometry` has for each of them the width and the height of its level, and its first pixel. Unless `folded`, the factors are
    those of the corners alone.
    """
    add, times = builder.add, builder.mul

    def step(do, t):
        sample, place = add(first, t), add(into, t)
        exact = Lanes(builder, ir.DoubleType(), do.width)
        width, height, start = (exact.load(geometry, add(times(INT(run), count), t)) for run in range(3))
        position_x, position_y = (
            builder.fsub(builder.fmul(_exact(do, exact, coordinate), size), exact.constant(0.5))
            for coordinate, size in zip(_pairs(do, locations, sample), (width, height), strict=True)
        )
        low_x, low_y = (call_vector(builder, "llvm.floor", position) for position in (position_x, position_y))
        counts = builder.and_(_is_near(exact, low_x, width), _is_near(exact, low_y, height))
        is_nan = builder.fcmp_unordered("uno", position_x, position_y)
        fractions = []
        for run, position, low in ((0, position_y, low_y), (1, position_x, low_x)):
            fraction = builder.select(counts, builder.fsub(position, low), exact.zero)
            fraction = _rounded(do, builder.select(is_nan, exact.constant(float("nan")), fraction))
            do.store(fraction, table.fractions, add(times(INT(run), table.tile), place))
            fractions.append((builder.fsub(do.constant(1.0), fraction), fraction))
        low_x, low_y = (builder.select(counts, low, exact.zero) for low in (low_x, low_y))
        upper = builder.fadd(builder.fadd(builder.fmul(low_y, width), low_x), start)
        weight = builder.select(folded, do.load(weights, sample), do.constant(1.0))
        for corner in range(4):
            y, x = corner >> 1, corner & 1
            inside = builder.and_(counts, builder.and_(_is_inside(exact, low_y, y, height), _is_inside(exact, low_x, x, width)))
            pixel = builder.fadd(upper, builder.fadd(width, exact.constant(float(x))) if y else exact.constant(float(x)))
            whole = Lanes(builder, _PIXEL, do.width)
            pixel = builder.select(inside, builder.fptosi(pixel, whole.type), whole.constant(-1))
            index = add(times(INT(corner), table.tile), place)
            whole.store(pixel, table.pixels, index)
            do.store(builder.fmul(builder.fmul(fractions[0][y], fractions[1][x]), weight), table.factors, index)

    _for_samples(builder, scalar, count, step)


def _pairs(do, locations, sample):
    """The first and the second numbers of pairs."""
    width, index = do.width, do.builder.mul(sample, INT(2))
    parts = do.load(locations, index), do.load(locations, do.builder.add(index, INT(width)))
    lanes = ir.VectorType(ir.IntType(32), width)
    return [
        do.builder.shuffle_vector(*parts, ir.Constant(lanes, [2 * lane + number for lane in range(width)])) for number in (0, 1)
    ]


def _exact(do, exact, value):
    return value if do.type == exact.type else do.builder.fpext(value, exact.type)


def _rounded(do, value):
    return value if do.type == value.type else do.builder.fptrunc(value, do.type)


def _is_near(exact, low, size):
    """Whether one of the pixels `low` and `low + 1` lies within a level; no NaN does."""
    builder = exact.builder
    return builder.and_(builder.fcmp_ordered(">=", low, exact.constant(-1.0)), builder.fcmp_ordered("<", low, size))


def _is_inside(exact, low, end, size):
    """Of a pair of which one is near, whether the lower pixel lies within the level, or the upper one."""
    builder = exact.builder
    if end:
        return builder.fcmp_ordered("<", builder.fadd(low, exact.constant(1.0)), size)
    return builder.fcmp_ordered(">=", low, exact.zero)


@emits_result(types.boolean)
def has_infinity(builder, scalar, weights, first, count):
    """Whether some of the weights are not finite."""
    found, t = None, INT(0)
    for lanes in (lanes_of(scalar), 1):
        do = Lanes(builder, scalar, lanes)

        def step(do, t, sums):
            weight = do.load(weights, builder.add(first, t))
            return [builder.fadd(sums[0], builder.fmul(weight, do.zero))]

        t, total = for_each(builder, t, count, lanes, [do.zero], partial(step, do))
        (total,) = add_lanes(builder, [total])
        found = total if found is None else builder.fadd(found, total)
    return builder.fcmp_unordered("uno", found, found)


def _corner_rows(builder, table, t, rows, start, row, outside):
    """For one sample, the address of each corner's row of channels, and its factor."""
    found = []
    for corner in range(4):
        index = builder.add(builder.mul(INT(corner), table.tile), t)
        pixel = builder.load(element(builder, table.pixels, index))
        place = element(builder, rows, builder.add(start, builder.mul(builder.sext(pixel, INT), row)))
        is_outside = builder.icmp_signed("<", pixel, _PIXEL(0))
        found.append((builder.select(is_outside, outside, place), builder.load(element(builder, table.factors, index))))
    return found


@emits
def sum_samples(builder, scalar, value, start, row, table, first, end, output, into, width):
    """output[into + c] = sum over the samples from `first` to `end` and their corners of factor * value[corner, c]."""

    def chunk(do, vectors, channel):
        def step(t, sums):
            sums = list(sums)
            for corner, (place, factor) in enumerate(_corner_rows(builder, table, t, value, start, row, table.nothing)):
                factor = do.spread(factor)
                for vector in range(vectors):
                    number = 2 * vector + corner % 2  # two sums, since one would have to wait for itself
                    read = do.load(place, builder.add(channel, INT(vector * do.lanes)))
                    sums[number] = do.multiply_add(factor, read, sums[number])
            return sums

        _, *sums = for_each(builder, first, end, 1, [do.zero] * (2 * vectors), step)
        for vector in range(vectors):
            total = builder.fadd(sums[2 * vector], sums[2 * vector + 1])
            do.store(total, output, builder.add(into, builder.add(channel, INT(vector * do.lanes))))

    for_chunks(builder, scalar, width, chunk)


@emits
def scatter_samples(builder, scalar, d_value, start, row, table, first, end, unread, grad, source, width):
    """d_value[corner, c] += factor * grad[source + c], for the samples from `first` to `end` and their corners."""

    def chunk(do, vectors, channel):
        places = [builder.add(channel, INT(vector * do.lanes)) for vector in range(vectors)]
        gradients = [do.load(grad, builder.add(source, place)) for place in places]

        def step(t, _):
            # In turn, each read after the one before is written: several corners may be the row that nobody reads.
            for into, factor in _corner_rows(builder, table, t, d_value, start, row, unread):
                factor = do.spread(factor)
                for place, gradient in zip(places, gradients, strict=True):
                    do.store(do.multiply_add(factor, gradient, do.load(into, place)), into, place)
            return []

        for_each(builder, first, end, 1, [], step)

    for_chunks(builder, scalar, width, chunk)


@emits
def multiply_samples(builder, scalar, value, start, row, table, first, end, grad, source, width):
    """Write the products of each corner's channels with grad[source + c] into the table."""
    whole = lanes_of(scalar)

    def samples(vectors):
        def step(t, _):
            places = [place for place, _ in _corner_rows(builder, table, t, value, start, row, table.nothing)]

            def channels(do, channel, dots):
                gradient = do.load(grad, builder.add(source, channel))
                return [
                    do.multiply_add(gradient, do.load(place, channel), dot) for place, dot in zip(places, dots, strict=True)
                ]

            do = Lanes(builder, scalar, whole)
            dots = [do.zero] * 4
            for vector in range(vectors):
                dots = channels(do, INT(vector * whole), dots)
            if not vectors:
                dots = for_channels(builder, scalar, width, dots, channels)
            for corner, dot in enumerate(add_lanes(builder, dots)):
                index = builder.add(builder.mul(INT(corner), table.tile), t)
                builder.store(dot, element(builder, table.dots, index))
            return []

        for_each(builder, first, end, 1, [], step)

    for_usual_widths(builder, whole, width, samples)


@emits
def differentiate(
    builder, scalar, weights, first, count, geometry, table, source, d_locations, has_locations, d_weights, has_weights
):  # fmt: skip
    """The gradients of a query's locations and weights, which begin at sample `first`, from the table's numbers at `source`."""
    add, times = builder.add, builder.mul

    def step(do, t):
        sample, place = add(first, t), add(source, t)
        upper_left, upper_right, lower_left, lower_right = (
            do.load(table.dots, add(times(INT(corner), table.tile), place)) for corner in range(4)
        )
        y, x = (do.load(table.fractions, add(times(INT(run), table.tile), place)) for run in (0, 1))
        rest_y, rest_x = (builder.fsub(do.constant(1.0), fraction) for fraction in (y, x))

        def between(rest, low, fraction, high):
            return do.multiply_add(fraction, high, do.multiply(rest, low))

        with builder.if_then(has_weights):
            upper, lower = between(rest_x, upper_left, x, upper_right), between(rest_x, lower_left, x, lower_right)
            do.store(between(rest_y, upper, y, lower), d_weights, sample)
        with builder.if_then(has_locations):
            weight = do.load(weights, sample)
            exact = Lanes(builder, ir.DoubleType(), do.width)
            sizes = [_rounded(do, exact.load(geometry, add(times(INT(run), count), t))) for run in (0, 1)]
            slopes = (
                between(rest_y, builder.fsub(upper_right, upper_left), y, builder.fsub(lower_right, lower_left)),
                between(rest_x, builder.fsub(lower_left, upper_left), x, builder.fsub(lower_right, upper_right)),
            )
            _store_pairs(
                do,
                [do.multiply(do.multiply(weight, slope), size) for slope, size in zip(slopes, sizes, strict=True)],
                d_locations,
                sample,
            )

    _for_samples(builder, scalar, count, step)


def _store_pairs(do, numbers, array, sample):
    width, index = do.width, do.builder.mul(sample, INT(2))
    lanes = ir.VectorType(ir.IntType(32), width)
    for part in (0, 1):
        order = [(part * width + lane) // 2 + (part * width + lane) % 2 * width for lane in range(width)]
        pairs = do.builder.shuffle_vector(*numbers, ir.Constant(lanes, order))
        do.store(pairs, array, do.builder.add(index, INT(part * width)))


class ForwardArrays(NamedTuple):
    """The arrays of a forward pass, all flat: those of the caller, and the output.

    Where the value is to be copied, `value` is room for it, and `source` is the caller's; else `source` is empty.
    """

    source: Any
    value: Any
    locations: Any
    weights: Any
    output: Any
    empty: Any


class Work(NamedTuple):
    """What all items have in common."""

    shape: Any
    geometry: Any
    arrays: Any
    table: Any


@device
def copy_value(item, context):
    """Copy a run of the value's tokens."""
    shape, arrays = context
    layout = Layout(shape.channels, shape.channels, shape.heads, shape.tokens, shape.tokens)
    copy_in(item, arrays.source, True, shape.heads * shape.channels, shape.images, arrays.value, layout, arrays.empty)


@device
def copy_together(counter, shape, arrays):
    """Copy the value, if that is to be done, beside all other threads."""
    items = shape.images * ((shape.tokens + RUN - 1) // RUN) if arrays.source.size else 0
    all_together(counter, items, copy_value, (shape, arrays))


@kernel
def forward(counter, limit, thread, plan, arrays, reals, integers):
    """One item is a block of an image's queries in a head, after everybody together has copied the value.

    `plan` is (Shape as an int64 array, the geometry of a query's samples in a head). `arrays` are ForwardArrays as a tuple.
    `reals` and `integers` have a row of scratch memory for each thread.
    """
    shape, arrays = named(Shape, plan[0]), ForwardArrays(*arrays)
    table, _, _ = table_in(shape, integers[thread], reals[thread])
    work = Work(shape, plan[1], arrays, table)
    copy_together(counter, shape, arrays)
    blocks = (shape.queries + shape.block - 1) // shape.block
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= shape.heads * shape.images * blocks:
            return
        head, image, first = item // blocks // shape.images, item // blocks % shape.images, item % blocks * shape.block
        for query in range(first, min(first + shape.block, shape.queries), shape.together):
            attend(work, image, head, query, min(query + shape.together, first + shape.block, shape.queries))


@device
def ask_for(array, start, count):
    """Ask for the cache lines of some numbers, which may lie beyond an array's end: nothing is read."""
    for index in range(start, start + count, _LINE // array.itemsize):
        prefetch(array, index)


@device
def place_queries(work, image, head, first, end, folded):
    """Fill the table with the samples of some queries of an image in a head, one query after the other.

    Unless all are `folded`, only a query's whose weights are finite are.
    """
    shape, arrays = work.shape, work.arrays
    for query in range(first, end):
        number = (image * shape.queries + query) * shape.heads + head
        samples, ahead = number * shape.samples, number + _AHEAD * shape.heads
        ask_for(arrays.locations, 2 * ahead * shape.samples, 2 * shape.samples)
        ask_for(arrays.weights, ahead * shape.samples, shape.samples)
        finite = folded or not has_infinity(arrays.weights, samples, shape.samples)
        place(
            arrays.locations, arrays.weights, samples, shape.samples, work.geometry, finite, work.table,
            (query - first) * shape.samples,
        )  # fmt: skip


@device
def attend(work, image, head, first, end):
    """Compute and write the output of some queries of an image in a head."""
    shape, arrays = work.shape, work.arrays
    place_queries(work, image, head, first, end, False)
    start = image * shape.image + head * shape.head
    for query in range(first, end):
        number, t = (image * shape.queries + query) * shape.heads + head, (query - first) * shape.samples
        into = number * shape.channels
        if has_infinity(arrays.weights, number * shape.samples, shape.samples):
            sum_products(work, start, number * shape.samples, t, into)
        else:
            sum_samples(arrays.value, start, shape.row, work.table, t, t + shape.samples, arrays.output, into, shape.channels)


@device
def sum_products(work, start, weights, first, into):
    """As `sum_samples`, for factors without the samples' weights: an infinite one must not turn a factor of 0 into NaN."""
    arrays, table = work.arrays, work.table
    for c in range(work.shape.channels):
        total = arrays.output.dtype.type(0)
        for t in range(first, first + work.shape.samples):
            found = arrays.output.dtype.type(0)
            for corner in range(4):
                pixel, factor = table.pixels[corner * table.tile + t], table.factors[corner * table.tile + t]
                found += factor * (arrays.value[start + pixel * work.shape.row + c] if pixel >= 0 else table.nothing[c])
            total += arrays.weights[weights + t - first] * found
        arrays.output[into + c] = total


class BackwardArrays(NamedTuple):
    """The arrays of a backward pass, as ForwardArrays; results that are not wanted are empty, the others overwritten."""

    grad_output: Any
    source: Any
    value: Any
    locations: Any
    weights: Any
    d_value: Any
    d_locations: Any
    d_weights: Any
    empty: Any


@kernel
def backward(counter, limit, thread, plan, arrays, reals, integers):
    """One item adds up d_value in a block of a head's channels in an image; one computes the rest for a block of queries.

    No two of them write to the same number. Arguments as in `forward`, with BackwardArrays; where heads are copied, scratch
    memory has room for d_value in such a block of channels.
    """
    shape, arrays = named(Shape, plan[0]), BackwardArrays(*arrays)
    table, unread, room = table_in(shape, integers[thread], reals[thread])
    work = Work(shape, plan[1], arrays, table)
    copy_together(counter, shape, arrays)
    blocks = (shape.queries + shape.block - 1) // shape.block
    sums = shape.images * shape.heads * shape.blocks if arrays.d_value.size else 0
    others = shape.heads * shape.images * blocks if arrays.d_locations.size + arrays.d_weights.size else 0
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= sums + others:
            return
        if item < sums:
            head = item // shape.blocks
            add_up(counter, work, head // shape.heads, head % shape.heads, item % shape.blocks, unread, room)
            continue
        item -= sums
        head, image, first = item // blocks // shape.images, item // blocks % shape.images, item % blocks * shape.block
        for query in range(first, min(first + shape.block, shape.queries), shape.together):
            pull_back(work, image, head, query, min(query + shape.together, first + shape.block, shape.queries))


@device
def add_up(counter, work, image, head, block, unread, room):
    """Add up d_value in a block of a head's channels in an image, query by query."""
    shape, arrays = work.shape, work.arrays
    row, first = shape.heads * shape.channels, head * shape.channels + block * shape.width
    width = min(shape.width, shape.channels - block * shape.width)
    start = image * shape.tokens * row + first
    if not shape.copied:
        for token in range(shape.tokens):
            zero(arrays.d_value, start + token * row, start + token * row + width)
        add_queries(counter, work, image, head, arrays.d_value, start, row, unread, first, width)
        return
    zero(room, 0, shape.tokens * width)
    add_queries(counter, work, image, head, room, 0, width, unread, first, width)
    for token in range(shape.tokens):
        for c in range(width):
            arrays.d_value[start + token * row + c] = room[token * width + c]


@device
def add_queries(counter, work, image, head, d_value, start, row, unread, channel, width):
    """Add what an image's queries give a block of channels, whose rows in `d_value` begin at `start`."""
    shape, arrays = work.shape, work.arrays
    for first in range(0, shape.queries, shape.together):
        if counter[STOP]:
            return
        end = min(first + shape.together, shape.queries)
        place_queries(work, image, head, first, end, True)
        for query in range(first, end):
            source, t = (
                (image * shape.queries + query) * shape.heads * shape.channels + channel,
                (query - first) * shape.samples,
            )
            ask_for(arrays.grad_output, source + _AHEAD * shape.heads * shape.channels, width)
            scatter_samples(d_value, start, row, work.table, t, t + shape.samples, unread, arrays.grad_output, source, width)


@device
def pull_back(work, image, head, first, end):
    """Compute the gradients of the locations and the weights of some queries of an image in a head."""
    shape, arrays, table = work.shape, work.arrays, work.table
    place_queries(work, image, head, first, end, True)
    start = image * shape.image + head * shape.head
    for query in range(first, end):
        number, t = (image * shape.queries + query) * shape.heads + head, (query - first) * shape.samples
        source = number * shape.channels
        ask_for(arrays.grad_output, source + _AHEAD * shape.heads * shape.channels, shape.channels)
        multiply_samples(
            arrays.value, start, shape.row, table, t, t + shape.samples, arrays.grad_output, source, shape.channels
        )
    for query in range(first, end):
        samples = ((image * shape.queries + query) * shape.heads + head) * shape.samples
        differentiate(
            arrays.weights, samples, shape.samples, work.geometry, table, (query - first) * shape.samples,
            arrays.d_locations, arrays.d_locations.size > 0, arrays.d_weights, arrays.d_weights.size > 0,
        )  # fmt: skip
