"""The Numba kernels of deformable RoI pooling: one forward, one backward, one that collects the results of the latter.

Samples are placed in runs: a run is some samples of a box, bin by bin, all of them if they are few. `bins` says where they lie;
here the same is computed in float64, each operation rounded by itself. The input's copy has its channels last, in blocks, group
by group of channels if bins have channels of their own, and class by class.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from deformconv.runtime.atomics import all_together, fetch_add
from deformconv.runtime.blocks import RUN, SUMS, Layout, copy_in, copy_out, sum_slots, transpose, zero
from deformconv.runtime.cache import as_written, device, kernel
from deformconv.runtime.simd import VECTOR_BYTES, Rows, named, round_up
from deformconv.runtime.threads import NEXT, STOP
from deformconv.sampling.corners import (
    add_samples,
    blend_samples,
    differentiate,
    place_samples,
    pull_back_samples,
    table_in,
)  # fmt: skip

__all__ = ["BackwardArrays", "CollectArrays", "ForwardArrays", "Shape", "backward", "collect", "forward"]


class Shape(NamedTuple):
    """A call's numbers that follow from its shapes and parameters."""

    images: Any
    boxes: Any
    bins_y: Any
    bins_x: Any
    groups_y: Any
    groups_x: Any
    parts_y: Any
    parts_x: Any
    classes: Any
    class_channels: Any  # of the output
    sampling: Any  # samples of a bin along an axis, or 0
    rounded: Any  # 1 for this convention
    aligned: Any  # 1 for that one
    deformed: Any  # whether there are offsets
    tile: Any  # samples that are placed at once


class Box(NamedTuple):
    """A box along height and width, in map pixels (`bins.Side`), NaN where it is not finite."""

    start_y: Any
    start_x: Any
    size_y: Any
    size_x: Any
    bin_y: Any  # the length of a bin
    bin_x: Any
    count_y: Any  # samples of a bin
    count_x: Any
    step_y: Any  # between them
    step_x: Any


class Places(NamedTuple):
    """The samples of a run, in flat arrays that no other thread uses, each a few runs of `tile` numbers."""

    table: Any
    fractions: Any  # along each axis, then: whether an offset moves the sample along each axis
    scales: Any  # each sample's factor; then room for the derivatives by its position, along each axis, and by its mask
    divisors: Any  # of each bin of a box: how many samples its mean is of


@as_written
def _round(number):
    """To the nearest integer, halves away from zero."""
    return math.copysign(math.floor(abs(number) + 0.5), number)


@as_written
def _side(shape, factors, low, high):
    """The start and the size of a box along an axis."""
    scale = factors[0]
    if shape.rounded:
        start = _round(low) * scale - 0.5
        return start, max((_round(high) + 1.0) * scale - 0.5 - start, 0.1)
    if shape.aligned:
        start = low * scale - 0.5
        return start, high * scale - 0.5 - start
    start = low * scale
    return start, max(high * scale - start, 1.0)


@as_written
def _count(shape, bin, most):
    """The samples of a bin of that length along an axis."""
    if shape.sampling:
        return shape.sampling
    wanted = min(bin, float(most))
    return max(0, min(math.ceil(wanted), most)) if wanted > 0 else 0


@as_written
def box_at(shape, factors, size, boxes, r):
    """A box from its row of `boxes`."""
    x1, y1 = float(boxes[r * 5 + 1]), float(boxes[r * 5 + 2])
    x2, y2 = float(boxes[r * 5 + 3]), float(boxes[r * 5 + 4])
    start_y, size_y, start_x, size_x, scale = math.nan, math.nan, math.nan, math.nan, factors[0]
    if math.isfinite(x1 * scale) and math.isfinite(y1 * scale) and math.isfinite(x2 * scale) and math.isfinite(y2 * scale):
        start_y, size_y = _side(shape, factors, y1, y2)
        start_x, size_x = _side(shape, factors, x1, x2)
    if not (math.isfinite(start_y) and math.isfinite(size_y) and math.isfinite(start_x) and math.isfinite(size_x)):
        count = max(1, shape.sampling)
        nan = math.nan
        return Box(nan, nan, nan, nan, nan, nan, count, count, nan, nan)
    bin_y, bin_x = size_y / shape.bins_y, size_x / shape.bins_x
    count_y, count_x = _count(shape, bin_y, size[0]), _count(shape, bin_x, size[1])
    step_y, step_x = bin_y / max(1, count_y), bin_x / max(1, count_x)
    return Box(start_y, start_x, size_y, size_x, bin_y, bin_x, count_y, count_x, step_y, step_x)


@as_written
def bin_start(start, size, gamma, offset, bin, length):
    """Where a bin begins along an axis."""
    return start + gamma * size * offset + bin * length


@as_written
def sample_in(shape, start, step, sample):
    """Where a sample of a bin lies along an axis; its samples are `step` apart."""
    return start + (float(sample) if shape.rounded else sample + 0.5) * step


@as_written
def is_on_map(shape, position, length):
    """Whether a sample counts, as far as one axis tells; a NaN does."""
    margin = 0.5 if shape.rounded else 1.0
    return not (position < -margin or position > length - 1 + margin)


@as_written
def counted(shape, start, step, count, length):
    """How many samples of a bin count, as far as one axis tells."""
    number = 0
    for sample in range(count):
        number += is_on_map(shape, sample_in(shape, start, step, sample), length)
    return number


@as_written
def place_axis(position, length, places, axis, t):
    """Write where a sample lies along an axis: moved onto the map, as the pixel below it and the rest."""
    tile = places.table.tile
    moved = min(max(position, 0.0), length - 1.0)
    pixel = int(moved)
    places.table.rows[(4 + axis) * tile + t] = pixel
    places.fractions[axis * tile + t] = moved - pixel
    places.fractions[(2 + axis) * tile + t] = 1.0 if moved == position else 0.0


@device
def place_nowhere(value, places, t):
    """Write a sample that reads no pixel: infinite, with the value 0, or NaN."""
    tile = places.table.tile
    for axis in range(2):
        places.table.rows[(4 + axis) * tile + t] = 0
        places.fractions[axis * tile + t] = value
        places.fractions[(2 + axis) * tile + t] = 1


@device
def offset_at(shape, r, number, y, x):
    """Where the offset of a bin along height lies in `offset`; that along width lies a class' parts before."""
    if shape.parts_y != shape.bins_y or shape.parts_x != shape.bins_x:
        y, x = y * shape.parts_y // shape.bins_y, x * shape.parts_x // shape.bins_x
    return (((r * shape.classes + number) * 2 + 1) * shape.parts_y + y) * shape.parts_x + x


@as_written
def place_bin(work, box, r, number, y, x, first, end, t):
    """Write the samples of a bin from number `first` to `end`, the first of them as sample `t` of the run; and its divisor."""
    shape, size, places, offset = work.shape, work.size, work.places, work.arrays.offset
    shift_y, shift_x = 0.0, 0.0
    if shape.deformed:
        at = offset_at(shape, r, number, y, x)
        shift_y, shift_x = float(offset[at]), float(offset[at - shape.parts_y * shape.parts_x])
    start_y = bin_start(box.start_y, box.size_y, work.factors[1], shift_y, y, box.bin_y)
    start_x = bin_start(box.start_x, box.size_x, work.factors[1], shift_x, x, box.bin_x)
    is_nan = math.isnan(start_y) or math.isnan(start_x)
    samples = box.count_y * box.count_x
    if shape.rounded and not is_nan:
        samples = counted(shape, start_y, box.step_y, box.count_y, size[0])
        samples *= counted(shape, start_x, box.step_x, box.count_x, size[1])
    places.divisors[y * shape.bins_x + x] = max(1, samples)
    i, j = first // box.count_x, first % box.count_x
    for place in range(t, t + end - first):
        down = sample_in(shape, start_y, box.step_y, i)
        across = sample_in(shape, start_x, box.step_x, j)
        if is_nan:
            place_nowhere(math.nan, places, place)
        elif is_on_map(shape, down, size[0]) and is_on_map(shape, across, size[1]):
            place_axis(down, size[0], places, 0, place)
            place_axis(across, size[1], places, 1, place)
        else:
            place_nowhere(math.inf, places, place)
        j += 1
        if j == box.count_x:
            i, j = i + 1, 0


class Run(NamedTuple):
    """Some samples of a box: where they begin, and how many they are; and how many a bin has."""

    bin: Any
    sample: Any
    count: Any
    inside: Any


@device
def place_run(work, box, r, number, bin, sample):
    """Fill the table with samples of a class of a box, as many as it holds, from a sample of a bin on."""
    shape, inside = work.shape, box.count_y * box.count_x
    first_bin, first_sample, t = bin, sample, 0
    y, x = bin // shape.bins_x, bin % shape.bins_x
    while y < shape.bins_y and t < shape.tile:
        end = min(inside, sample + shape.tile - t)
        place_bin(work, box, r, number, y, x, sample, end, t)
        t, sample = t + end - sample, end
        if sample == inside:
            sample, x = 0, x + 1
            if x == shape.bins_x:
                y, x = y + 1, 0
    split_places(work.size, work.places, t)
    return Run(first_bin, first_sample, t, inside)


@device
def after(run):
    """The bin and the sample of it that follow a run."""
    place = run.sample + run.count
    return run.bin + place // run.inside, place % run.inside


@device
def split_places(size, places, count):
    """Fill the table with the corners of a run's samples."""
    place_samples(size, (0, 0), True, count, Rows(places.fractions, 0, places.table.tile), places.table)


@device
def group_at(shape, bin):
    """The group of channels that a bin reads."""
    if shape.groups_y * shape.groups_x == 1:
        return 0
    y, x = bin // shape.bins_x, bin % shape.bins_x
    return y * shape.groups_y // shape.bins_y * shape.groups_x + x * shape.groups_x // shape.bins_x


class ForwardArrays(NamedTuple):
    """The arrays of a forward pass, all flat.

    input (N, groups * C_out, P), group by group; `x` room for it in blocks; boxes (R, 5); offset (R, classes, 2, parts) and
    mask (R, bins), empty if there are none; output (R, C_out, bins).
    """

    input: Any
    x: Any
    boxes: Any
    offset: Any
    mask: Any
    output: Any
    empty: Any


class Work(NamedTuple):
    """What all items have in common."""

    size: Any
    shape: Any
    factors: Any
    layout: Any  # of the input's copy
    arrays: Any
    places: Any


@device
def places_in(size, shape, reals, integers):
    """A run's memory, and what is left of a thread's scratch memory."""
    table = table_in(size, shape.tile, integers, reals)
    start = round_up(table.weights.size, VECTOR_BYTES // reals.itemsize)
    fractions, scales = reals[start : start + 4 * shape.tile], reals[start + 4 * shape.tile : start + 8 * shape.tile]
    rest = reals[start + 8 * shape.tile :]
    bins = shape.bins_y * shape.bins_x
    return Places(table, fractions, scales, rest[:bins]), rest[round_up(bins, VECTOR_BYTES // reals.itemsize) :]


@device
def copy_input(item, context):
    """Copy a run of the input's positions."""
    shape, layout, arrays = context
    channels = shape.groups_y * shape.groups_x * shape.classes * shape.class_channels
    copy_in(item, arrays.input, False, channels, shape.images, arrays.x, layout, arrays.empty)


@kernel
def forward(counter, limit, thread, plan, arrays, reals, integers):
    """One item is one class of one box, after everybody together has copied the input.

    `plan` is (size, Shape, Layout, (spatial_scale, gamma)), the two in the middle as int64 arrays. `arrays` are ForwardArrays
    as a tuple. `reals` and `integers` have a row of scratch memory for each thread.
    """
    size, shape, layout, factors = plan[0], named(Shape, plan[1]), named(Layout, plan[2]), plan[3]
    arrays = ForwardArrays(*arrays)
    places, sums = places_in(size, shape, reals[thread], integers[thread])
    work = Work(size, shape, factors, layout, arrays, places)
    all_together(counter, shape.images * ((layout.pixels + RUN - 1) // RUN), copy_input, (shape, layout, arrays))
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= shape.boxes * shape.classes:
            return
        pool_box(work, item // shape.classes, item % shape.classes, sums)


@device
def pool_box(work, r, number, sums):
    """Compute and write the output of a class of a box, block by block; `sums` has a row of a block's channels for each bin."""
    shape, arrays, layout = work.shape, work.arrays, work.layout
    box = box_at(shape, work.factors, work.size, arrays.boxes, r)
    bins, inside = shape.bins_y * shape.bins_x, box.count_y * box.count_x
    fits = 0 < bins * inside <= shape.tile
    run = place_run(work, box, r, number, 0, 0) if fits else Run(0, 0, 0, inside)
    for c in range(0, shape.class_channels, layout.width):
        width = min(layout.width, shape.class_channels - c)
        if inside == 0:
            zero(sums, 0, bins * width)
        bin, sample = 0, 0
        while bin < bins and inside > 0:
            if not fits:
                run = place_run(work, box, r, number, bin, sample)
            sum_run(work, int(arrays.boxes[r * 5]), number, c, width, run, sums)
            bin, sample = after(run)
        for b in range(bins if inside > 0 else 0):
            scale_row(sums[b * width : (b + 1) * width], factor_of(work, r * bins + b, b))
        into = ((r * shape.classes + number) * shape.class_channels + c) * bins
        transpose(bins, width, sums, 0, width, arrays.output, into, bins, arrays.empty, 0)


@device
def factor_of(work, place, b):
    """What the sum of a bin's samples is multiplied by: its mask, at `place`, over their number."""
    mask, divisors = work.arrays.mask, work.places.divisors
    return (mask[place] if mask.size else divisors.dtype.type(1)) / divisors[b]


@device
def scale_row(row, factor):
    for c in range(row.size):
        row[c] *= factor


@device
def sum_run(work, image, number, c, width, run, sums):
    """Add a run's samples to the sums of their bins, for the block of a class' channels that begins at channel c."""
    shape, layout = work.shape, work.layout
    blocks = (layout.span + layout.width - 1) // layout.width
    block = number * blocks + c // layout.width
    b, t, first = run.bin, 0, run.sample
    while t < run.count:
        end = min(run.count, t + run.inside - first)
        x = pixels_of(work, image, group_at(shape, b) * shape.classes * blocks + block)
        row = Rows(sums, b * width, 0)
        if first == 0:
            blend_samples(work.size, work.places.table, t, end, x, row, width)
        else:
            add_samples(work.size, work.places.table, t, end, x, row, width)
        b, t, first = b + 1, end, 0


@device
def pixels_of(work, image, block):
    """The pixels of an image in a block of channels."""
    layout = work.layout
    return Rows(work.arrays.x, (block * work.shape.images + image) * layout.pitch * layout.width, layout.width)


class BackwardArrays(NamedTuple):
    """The arrays of a backward pass, all flat; results that are not wanted are empty, the others overwritten.

    As ForwardArrays, and grad_output (R, C_out, bins); `order`, the numbers of all boxes, image by image, and where each
    image's begin in it; d_x, as `x`; d_offset (blocks of a class, R, classes, 2, parts) and d_mask (blocks of all classes, R,
    bins), all zeros.
    """

    grad_output: Any
    input: Any
    x: Any
    boxes: Any
    offset: Any
    mask: Any
    order: Any
    starts: Any
    d_x: Any
    d_offset: Any
    d_mask: Any
    empty: Any


@kernel
def backward(counter, limit, thread, plan, arrays, reals, integers):
    """One item is a block of the output's channels in one image, so that no two threads add to the same number.

    Arguments as in `forward`, with BackwardArrays. At first everybody together has copied the input.
    """
    size, shape, layout, factors = plan[0], named(Shape, plan[1]), named(Layout, plan[2]), plan[3]
    arrays = BackwardArrays(*arrays)
    places, rows = places_in(size, shape, reals[thread], integers[thread])
    work = Work(size, shape, factors, layout, arrays, places)
    blocks = shape.classes * ((layout.span + layout.width - 1) // layout.width)
    all_together(counter, shape.images * ((layout.pixels + RUN - 1) // RUN), copy_input, (shape, layout, arrays))
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= shape.images * blocks:
            return
        one_image(counter, work, item // blocks, item % blocks, rows)


@device
def one_image(counter, work, image, block, rows):
    """Do the work of a block of channels for all boxes of an image; `rows` is scratch for a box's bins and one row more."""
    shape, arrays, layout = work.shape, work.arrays, work.layout
    blocks_of_class = (layout.span + layout.width - 1) // layout.width
    blocks = shape.classes * blocks_of_class
    if arrays.d_x.size:
        for group in range(shape.groups_y * shape.groups_x):
            start = pixels_of(work, image, group * blocks + block).start
            zero(arrays.d_x, start, start + layout.pitch * layout.width)
    width = min(layout.width, shape.class_channels - block % blocks_of_class * layout.width)
    for place in range(arrays.starts[image], arrays.starts[image + 1]):
        if counter[STOP]:
            return
        one_box(work, image, arrays.order[place], block, blocks_of_class, width, rows)


@device
def one_box(work, image, r, block, blocks_of_class, width, rows):
    """Add what a box contributes to all wanted gradients."""
    shape, arrays = work.shape, work.arrays
    number, bins = block // blocks_of_class, shape.bins_y * shape.bins_x
    box = box_at(shape, work.factors, work.size, arrays.boxes, r)
    channel = number * shape.class_channels + block % blocks_of_class * work.layout.width
    source = (r * shape.classes * shape.class_channels + channel) * bins
    transpose(width, bins, arrays.grad_output, source, bins, rows, 0, width, arrays.empty, 0)
    bin, sample = 0, 0
    while bin < bins and box.count_y * box.count_x > 0:
        run = place_run(work, box, r, number, bin, sample)
        pull_back_run(work, image, r, block, run, width, rows)
        if arrays.d_offset.size + arrays.d_mask.size > 0:
            add_places(work, box, r, number, block, blocks_of_class, run)
        bin, sample = after(run)


@device
def pull_back_run(work, image, r, block, run, width, rows):
    """Add a run's samples to d_x, and leave in the table, and in `scales`, what the other gradients need."""
    shape, arrays, layout, places = work.shape, work.arrays, work.layout, work.places
    blocks = shape.classes * ((layout.span + layout.width - 1) // layout.width)
    bins = shape.bins_y * shape.bins_x
    column = Rows(rows, bins * width, 0)
    b, t, first = run.bin, 0, run.sample
    while t < run.count:
        end = min(run.count, t + run.inside - first)
        x = pixels_of(work, image, group_at(shape, b) * blocks + block)
        scale = factor_of(work, r * bins + b, b)
        for index in range(t, end):
            places.scales[index] = scale
        pull_back_samples(
            work.size, places.table, t, end, x, scale, column, Rows(rows, b * width, 0),
            Rows(arrays.d_x, x.start, layout.width), width,
        )  # fmt: skip
        b, t, first = b + 1, end, 0


@device
def add_places(work, box, r, number, block, blocks_of_class, run):
    """Add a run's samples to the gradients of offset and mask."""
    shape, arrays, places = work.shape, work.arrays, work.places
    tile, bins, parts = shape.tile, shape.bins_y * shape.bins_x, shape.parts_y * shape.parts_x
    scales = places.scales
    by_mask = scales[3 * tile :]
    differentiate(work.size, places.table, run.count, scales, 0, Rows(scales, tile, tile), by_mask, 0)
    slot = block % blocks_of_class * (arrays.d_offset.size // blocks_of_class)
    mask_slot = block * (arrays.d_mask.size // (shape.classes * blocks_of_class))
    length_y, length_x = work.factors[1] * box.size_y, work.factors[1] * box.size_x
    b, t, first = run.bin, 0, run.sample
    y, x = b // shape.bins_x, b % shape.bins_x
    while t < run.count:
        end = min(run.count, t + run.inside - first)
        d_y, d_x, d_mask = 0.0, 0.0, 0.0
        for s in range(t, end):
            d_y += moved(places, scales, 0, s)
            d_x += moved(places, scales, 1, s)
            d_mask += by_mask[s]
        if arrays.d_offset.size:
            at = slot + offset_at(shape, r, number, y, x)
            arrays.d_offset[at] += d_y * length_y
            arrays.d_offset[at - parts] += d_x * length_x
        if arrays.d_mask.size:
            arrays.d_mask[mask_slot + r * bins + b] += d_mask / places.divisors[b]
        b, t, first, x = b + 1, end, 0, x + 1
        if x == shape.bins_x:
            y, x = y + 1, 0


@device
def moved(places, scales, axis, s):
    """The derivative by a sample's position along an axis; 0 where it was moved onto the map."""
    tile = places.table.tile
    return scales[(1 + axis) * tile + s] if places.fractions[(2 + axis) * tile + s] != 0 else scales.dtype.type(0)


class CollectArrays(NamedTuple):
    """What `backward` has left, and the caller's arrays for it, all flat and empty where there is nothing to do."""

    d_x: Any
    d_input: Any
    offset_slots: Any
    d_offset: Any
    mask_slots: Any
    d_mask: Any
    empty: Any


@kernel
def collect(counter, limit, thread, numbers, arrays):
    """Bring what `backward` has left into the caller's arrays.

    An item is a run of d_input's positions, or a run of d_offset's or d_mask's sums. `numbers` are (Shape, Layout), as int64
    arrays, and `arrays` CollectArrays as a tuple.
    """
    shape, layout = named(Shape, numbers[0]), named(Layout, numbers[1])
    a = CollectArrays(*arrays)
    channels = shape.groups_y * shape.groups_x * shape.classes * shape.class_channels
    offsets = shape.images * ((layout.pixels + RUN - 1) // RUN) if a.d_input.size else 0
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
        else:
            copy_out(item, a.d_x, layout, a.d_input, False, channels, shape.images, a.empty)
