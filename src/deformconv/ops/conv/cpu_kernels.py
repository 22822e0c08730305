"""The Numba kernels of deformable convolution: one forward, one backward, one that collects the results of the latter.

A kernel takes items of work until none is left, beside other threads that do the same. Everything is done tile by tile: a
tile's samples are written into a buffer of the thread's own as rows of (tap, channel) and multiplied at once, so no column
buffer of an image ever exists. All large arrays are flat; `cpu` prepares them, `blocks` and `cpu_pack` say in which order they
are.
"""

from __future__ import annotations

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
from deformconv.runtime.blocks import RUN, block_end, copy_in, copy_out
from deformconv.runtime.cache import device, kernel
from deformconv.runtime.matmul import VECTORS, Factor, Panels, multiply
from deformconv.runtime.simd import VECTOR_BYTES, Rows, round_up
from deformconv.runtime.threads import BEGUN, ENDED, NEXT, STOP
from deformconv.sampling.corners import Table, blend, differentiate, pull_back
from deformconv.sampling.windows import INPUT, KERNEL, OUTPUT, place_tap, place_tile

__all__ = ["backward", "collect", "forward"]


@device
def product(geometry, what):
    """The product of a row of the geometry."""
    result = 1
    for axis in range(geometry.shape[1]):
        result *= geometry[what, axis]
    return result


@device
def _multiply_channelwise(column, count, width, weight, weight_start, sums, start, row):
    """sums[t, c] += column[t, c] * weight[c]: the product of a depthwise convolution."""
    for t in range(count):
        _add_products(
            sums[start + t * row : start + t * row + width], column[t * width : (t + 1) * width],
            weight[weight_start : weight_start + width],
        )  # fmt: skip


@device
def _add_products(total, a, b):
    for c in range(total.size):
        total[c] += a[c] * b[c]


@device
def _store_products(total, a, b):
    for c in range(total.size):
        total[c] = a[c] * b[c]


@kernel
def forward(
    counter, limit, thread, size, geometry, inside, images, input, input_last, x, x_span, x_width,
    offset, mask, image_offset, image_mask, weight, weight_last, packed, bias, output, output_last,
    outputs, groups, offset_groups, channels, chunk, tile, taps_at_once, strands, empty, all_reals, all_integers,
):  # fmt: skip
    """One item is one tile of one image, after everybody together has copied the input and packed the weight.

    The tiles are taken from `strands` runs of them in turn.

    input (N, C, P), its channels first or last; x room for it in blocks of `x_width` channels, those of every `x_span` on their
    own, with a row of zeros after each image; offset and mask flat, an image's (offset_groups, K, D, P) and (offset_groups, K,
    P) beginning `image_offset` and `image_mask` numbers after the one before it, mask empty for v1; weight (C_out, C / groups,
    K), its channels last if `weight_last`, and `packed` room for it; bias (C_out,) or empty; output (N, C_out, P), its channels
    first or last. `chunk` channels, of one weight group or several whole ones, and `taps_at_once` taps are sampled and
    multiplied at once. `all_reals` and `all_integers` have a row of scratch memory for each thread; `thread` is this one's.
    """
    axes, corners = len(size), 1 << len(size)
    taps, positions, pitch = product(geometry, KERNEL), product(geometry, OUTPUT), product(geometry, INPUT) + 1
    group_channels, group_outputs, share = channels // groups, outputs // groups, channels // offset_groups
    depthwise = group_channels == 1 and group_outputs == 1
    lanes = VECTOR_BYTES // x.itemsize
    group_row = 1 if depthwise else round_up(group_outputs, lanes)
    sum_row, blocks_a_span = groups * group_row, (x_span + x_width - 1) // x_width
    chunk_span = max(group_channels, chunk)
    reals, integers = all_reals[thread], all_integers[thread]
    rows, weights = integers[: (corners + axes) * tile], reals[: (2 * corners + axes) * tile]
    table = Table(rows, weights, tile)
    sums = reals[round_up(weights.size, lanes) :]
    column = sums[round_up(tile * sum_row, lanes) :]
    tiles = (positions + tile - 1) // tile
    strand = (images * tiles + strands - 1) // strands

    panels = 1 if depthwise else groups * ((group_outputs + VECTORS * lanes - 1) // (VECTORS * lanes))
    copies = panels + images * ((pitch - 1 + RUN - 1) // RUN)
    item = fetch_add(counter, BEGUN)
    while item < copies:
        if item >= panels:
            copy_in(item - panels, input, input_last, channels, pitch - 1, images, x, x_span, x_width, pitch, empty)
        elif depthwise:
            pack_depthwise(weight, channels, taps, packed)
        else:
            pack_forward(item, weight, weight_last, groups, group_outputs, group_channels, taps, packed, sums, empty)
        fetch_add(counter, ENDED)
        item = fetch_add(counter, BEGUN)
    wait_for(counter, ENDED, copies)

    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= strands * strand:
            return
        # Threads take items in turn: each of them gets mostly neighbours, whose samples it has in its caches.
        item = item % strands * strand + item // strands
        if item >= images * tiles:
            continue
        n, first = item // tiles, item % tiles * tile
        count = min(tile, positions - first)
        place_tile(size, geometry, first, count, table)
        if depthwise:
            for place in range(count * sum_row):
                sums[place] = 0
        chunk_start = 0
        while chunk_start < channels:
            chunk_end = block_end(chunk_start, channels, chunk_span, chunk)
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
                        start = n * image_offset + place * axes - first * (axes - 1)
                        place_tap(size, geometry, inside, tap, count, Rows(offset, start, positions), table)
                        end = min((group + 1) * share, chunk_end)
                        while c < end:
                            within = c % x_span
                            block = c // x_span * blocks_a_span + within // x_width
                            stop = min(c - within % x_width + x_width, c - within + x_span, end)
                            blend(
                                size, table, count, Rows(x, (block * images + n) * pitch * x_width + within % x_width, x_width),
                                mask, n * image_mask + place,
                                Rows(column, (tap - first_tap) * width + c - chunk_start, column_row), stop - c,
                            )  # fmt: skip
                            c = stop
                if depthwise:
                    for tap in range(first_tap, first_tap + taps_now):
                        _multiply_channelwise(
                            column, count, width, packed, tap * channels + chunk_start, sums, chunk_start, sum_row
                        )  # fmt: skip
                    continue
                for group in range(chunk_start // group_channels, (chunk_end - 1) // group_channels + 1):
                    c = max(chunk_start, group * group_channels)
                    run = min(group_channels, width)
                    whole = run == width  # the taps of the chunk lie side by side, in the column as in the weight
                    depth, within = taps * group_channels, c - group * group_channels
                    weight_row = first_tap * group_channels + within
                    run, runs = (taps_now * run, 1) if whole else (run, taps_now)
                    multiply(
                        Factor(column, c - chunk_start, column_row, 1, width, run, runs), count,
                        Panels(packed, group * group_row * depth, depth, 0, weight_row),
                        Rows(sums, group * group_row, sum_row), group_outputs, first_tap + within > 0,
                    )  # fmt: skip
            chunk_start = chunk_end
        write_output(sums, group_row, groups, group_outputs, n, first, count, output, output_last, positions, bias)


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
            copy_in(run, input, input_last, channels, pitch - 1, images, x, x_span, x_width, pitch, empty)
        elif item >= packs + biases:
            run = item - packs - biases
            copy_in(run, grad_output, output_last, outputs, positions, images, d_output, outputs, outputs, positions, empty)
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
                            _project_outputs(
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
    if depthwise:
        for t in range(count):
            row, into = (position + t) * outputs, t * column_row
            _store_products(
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
def _add_weight(
    d_output, position, outputs, column, column_row, d_weight, first_sum, sums_size, d_weight_row, channel, end,
    group_channels, group_outputs, depthwise, count, begun,
):  # fmt: skip
    """d_weight[o, c] (+)= sum over t of d_output[position + t, o] * column[t, c], for the channels of a block."""
    if depthwise:
        for c in range(first_sum + channel, first_sum + (channel if begun else end)):
            d_weight[c] = 0
        for t in range(count):
            row, samples = (position + t) * outputs, t * column_row
            _add_products(
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
            copy_out(run, d_x, x_span, x_width, pitch, parts, d_input, input_last, channels, pitch - 1, images, empty)
        elif item < weights + runs + offsets:
            sum_slots(item - weights - runs, offset_slots, d_offset)
        elif item < weights + runs + offsets + masks:
            sum_slots(item - weights - runs - offsets, mask_slots, d_mask)
        else:
            return
