"""The Numba kernel of a layer that predicts its offsets: tile by tile, predictor, activation and convolution at once.

The predictor is a convolution over the same window of the same input. Both read one copy of it, and a tile's offsets and masks
are used while they are in the cache of the thread that has computed them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from deformconv.ops.conv.cpu_kernels import (
    ForwardArrays,
    ForwardCut,
    Order,
    Samples,
    Shape,
    copy_item,
    one_tile,
    pack_panel,
    pixels_of,
    tile_of,
)
from deformconv.ops.conv.cpu_pack import write_output
from deformconv.runtime.activations import scale_sigmoid
from deformconv.runtime.atomics import all_together, fetch_add
from deformconv.runtime.blocks import Layout, block_end
from deformconv.runtime.cache import device, kernel
from deformconv.runtime.matmul import FEW_ROWS, Panels
from deformconv.runtime.simd import VECTOR_BYTES, Rows, named, round_up
from deformconv.runtime.threads import NEXT
from deformconv.runtime.window_product import multiply_pixels, place_pixels
from deformconv.sampling.corners import table_in
from deformconv.sampling.windows import place_tile, tap_shifts

__all__ = ["PredictorArrays", "forward"]


class PredictorArrays(NamedTuple):
    """The predictor's arrays, all flat: weight (channels, C, K), `packed` room for it, bias (channels,) or empty."""

    weight: Any
    packed: Any
    bias: Any


@kernel
def forward(counter, limit, thread, plan, order, arrays, activation, reals, integers):
    """As `cpu_kernels.forward`, of offsets and masks that are predicted.

    `plan` is (size, geometry, Shape, Layout, ForwardCut, the predictor's Shape, the predictor's ForwardCut), `arrays` are
    ForwardArrays and PredictorArrays as tuples. The former's `offset` and `mask` are room for what is predicted: one array
    (N, channels, P), and the same from its first mask on. `activation` are two reals, a and b: masks are a*sigmoid(raw), and
    offsets b*tanh(raw/b), or raw where b is 0.
    """
    shape, layout, cut = named(Shape, plan[2]), named(Layout, plan[3]), named(ForwardCut, plan[4])
    predictor_shape, predictor_cut = named(Shape, plan[5]), named(ForwardCut, plan[6])
    order, given, predictor = Order(*order), ForwardArrays(*arrays[0]), PredictorArrays(*arrays[1])
    lanes = VECTOR_BYTES // reals.itemsize
    table = table_in(plan[0], cut.tile, integers[thread], reals[thread])
    places = integers[thread, table.rows.size :]
    sums = reals[thread, round_up(table.weights.size, lanes) :]
    widest = max(shape.groups * cut.group_row, predictor_cut.group_row)
    column = sums[round_up(cut.tile * widest, lanes) :].view(given.samples.dtype)
    samples = Samples(plan[0], plan[1], shape, order, layout, given.x, given.offset, given.mask, table)
    pixels = Samples(plan[0], plan[1], predictor_shape, order, layout, given.x, given.empty, given.empty, table)
    copies, panels = (shape, order, layout, cut, given, sums), predictor_cut.panels
    all_together(counter, panels + cut.copies, copy_for_layer, (predictor_shape, panels, predictor, copies))
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= cut.strands * cut.strand:
            return
        tile = tile_of(item, shape, cut)
        if tile.n < shape.images:
            place_tile(plan[0], plan[1], tile.first, tile.count, table)
            predict(pixels, predictor_cut, predictor.packed, sums, places, tile)
            write_prediction(predictor_shape, predictor_cut, tile, sums, predictor.bias, given)
            activate(shape, tile, len(plan[0]), given, activation)
            one_tile(samples, cut, given, sums, column, tile)


@device
def copy_for_layer(item, context):
    """Pack a panel of the predictor's weight, or what `copy_item` does."""
    predictor_shape, panels, predictor, copies = context
    if item < panels:
        given, square = copies[4], copies[5]
        pack_panel(item, predictor_shape, predictor.weight, False, predictor.packed, square, given.empty)
    else:
        copy_item(item - panels, copies)


@device
def predict(pixels, cut, packed, sums, places, tile):
    """sums[t, o] = the predictor's products, without its bias, block by block of the input's copy and some taps at a time."""
    shape, layout, table = pixels.shape, pixels.layout, pixels.table
    origins = table.rows[(1 << len(pixels.size)) * table.tile :]
    rows = round_up(tile.count, FEW_ROWS)
    start = 0
    while start < shape.channels:
        end = block_end(start, shape.channels, layout.span, layout.width)
        for first_tap in range(0, shape.taps, cut.taps_at_once):
            taps = min(cut.taps_at_once, shape.taps - first_tap)
            for tap in range(taps):
                shifts = tap_shifts(pixels.size, pixels.geometry, first_tap + tap)
                place_pixels(pixels.size, shifts, tile.count, origins, table.tile, places, tap * table.tile)
                for t in range(tile.count, rows):  # the product's last rows, which nobody reads: any pixel will do
                    places[tap * table.tile + t] = 0
            multiply_pixels(
                pixels_of(pixels, tile.n, start), end - start, Rows(places, 0, table.tile), taps, rows,
                Panels(packed, 0, shape.taps * shape.channels, 0, first_tap * shape.channels + start), shape.channels,
                Rows(sums, 0, cut.group_row), shape.outputs, start + first_tap > 0,
            )  # fmt: skip
        start = end


@device
def write_prediction(shape, cut, tile, sums, bias, given):
    """Write a tile's predicted numbers, before their activation, where the convolution reads them."""
    write_output(
        sums, cut.group_row, 1, shape.outputs, tile.n, tile.first, tile.count, given.offset, False, shape.positions, bias
    )  # fmt: skip


@device
def activate(shape, tile, axes, given, activation):
    """Make offsets and masks of a tile's predicted numbers."""
    masks = shape.offset_groups * shape.taps
    offsets = masks * axes
    channels = offsets + masks if given.mask.size else offsets
    mask_scale, max_offset = activation[0], activation[1]
    for channel in range(channels if given.mask.size or max_offset > 0 else 0):
        start = (tile.n * channels + channel) * shape.positions + tile.first
        if channel >= offsets:
            scale_sigmoid(given.offset, start, tile.count, mask_scale, 1, 0)
        elif max_offset > 0:
            scale_sigmoid(given.offset, start, tile.count, 2 * max_offset, 2 / max_offset, -max_offset)
