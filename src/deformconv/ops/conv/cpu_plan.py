"""How a call is cut into work for the kernels, by its shapes alone.

The words of plan and kernels:

    tile      a run of output positions of one image, whose samples are made and multiplied at once
    chunk     channels, of one weight group or of several whole ones, that are sampled and multiplied at once
    block     channels that lie side by side in the copy of the input (`runtime.blocks`); `span`: those cut into blocks together
    strand    a run of tiles of the forward pass: threads take a tile of each strand in turn, so one gets mostly neighbours
    part      a run of an image's tiles that has a gradient of the input of its own in the backward pass; it holds what the
              part's samples read, and is added to those of the parts before
    replica   an independent copy of d_weight, so that threads never add to the same one
    slot      the gradients of offset and mask from one of the blocks that share an offset group
    panel     the weight's columns of a few vectors, side by side for all rows of the product; `lane`: a number of a vector

Products of bfloat16 may be made of pairs of neighbours along the depth (`runtime.pairs`). A weight group's channels are the
depth of the forward pass, its outputs that of the columns' gradient: both in pairs only if their number is even.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from deformconv.ops.conv.cpu_kernels import BackwardCut, ForwardCut, Shape
from deformconv.ops.conv.spec import ConvSpec
from deformconv.runtime.amx import are_permitted
from deformconv.runtime.blocks import RUN, SUMS, Layout
from deformconv.runtime.matmul import FEW_ROWS, VECTORS
from deformconv.runtime.memory import room, up
from deformconv.runtime.simd import MULTIPLIES_PAIRS, VECTOR_BYTES, host_processor
from deformconv.runtime.work import Share, share
from deformconv.sampling.corners import table_sizes

__all__ = [
    "Backward", "Forward", "LayerForward", "backward_plan", "collect_items", "forward_plan", "images_at_once", "in_pairs",
    "layer_plan", "words",
]  # fmt: skip

_BLOCK_BYTES = 256  # a row of a block of channels
_DEPTH = 288  # samples of a position that are multiplied at once
_TILE, _SMALL_TILE = 208, 64  # positions
_TILES = 4  # tiles for a thread
_TILE_BYTES = 1 << 20  # a tile's buffers stay in the second-level cache, and within what a thread may take
_TAPS_BYTES = 1 << 19  # so do the weights and sums of the taps that the backward pass takes at once
_ITEMS, _DEPTHWISE_ITEMS = 8, 4  # work for this many threads in an image's backward pass, if it takes parts to make it
_PART = 768  # positions that are worth a part: it clears and adds the rows around its own as well
_PART_BYTES = 5 << 20  # of the replicas that an image's parts take
_MOST_ITEMS = 32  # and in that of a batch with images enough, where it costs no more than _REPLICA_BYTES
_REPLICA_BYTES = 8 << 20
_BUNCH = 1024  # positions, of several images if need be, that are worth a replica or a look at the weight
_BATCH_BYTES = 24 << 20  # of copies of input and output's gradient, in which a backward pass goes through a batch


class Forward(NamedTuple):
    """How a forward pass is cut."""

    arguments: tuple[Any, ...]  # the kernel's `plan`
    x_size: int  # numbers of the input's copy
    weight_size: int  # of the packed weight, or words
    pairs: bool  # whether products are of pairs of bfloat16
    bytes: int  # of the copies of input and weight, and of scratch memory
    share: Share


class Backward(NamedTuple):
    """How a backward pass is cut."""

    arguments: tuple[Any, ...]  # the kernel's `plan`
    x_size: int  # numbers of the input's copy
    weight_size: int  # of the packed weight, or words
    pairs: bool  # whether products are of pairs of bfloat16
    output_size: int  # of the copy of the output's gradient, with rows for the product's last block
    output_pairs_size: int  # words of the copy in pairs of positions, likewise; 0 if there is none
    gradient_size: int  # numbers of the room for the input's gradient
    turns: int  # numbers that say how far parts have been added up; 0 if an item does all parts of its images
    slots: int
    replicas: int
    replica_size: int  # numbers of a replica
    share: Share


class LayerForward(NamedTuple):
    """How the forward pass of a layer that predicts its offsets is cut."""

    arguments: tuple[Any, ...]  # the kernel's `plan`
    x_size: int
    weight_size: int  # numbers of the packed weight, or words
    pairs: bool  # whether products are of pairs of bfloat16, but for the predictor's
    predictor_size: int  # of the predictor's packed weight
    predicted_size: int  # of the offsets and masks
    bytes: int  # of all these, and of scratch memory
    share: Share


@cache
def words() -> str | None:
    """The dtype of words of pairs of bfloat16, which says what multiplies them; None where its products are of float32.

    That is tiles, where the processor has them and the system grants them (`runtime.amx`), or vectors on AMD's processors,
    which multiply pairs twice as fast as float32. On Intel's (a Xeon of family 6, model 207) a call in pairs by vectors took
    1.4 times as long as in float32.
    """
    if are_permitted():
        return "int32"
    return "uint32" if MULTIPLIES_PAIRS and host_processor().startswith("znver") else None


def in_pairs(spec: ConvSpec) -> tuple[bool, bool]:
    """Whether the products of the forward and the backward pass can be of pairs of bfloat16."""
    _, _, channels, outputs, depthwise = _groups(spec)
    return not depthwise and channels % 2 == 0, not depthwise and outputs % 2 == 0


def forward_plan(spec: ConvSpec, threads: int, multiplications: int, pairs: bool) -> Forward:
    """The plan for a number of threads, on which no sum depends; `multiplications` are multiply-adds."""
    x_size, common = _common(spec, _layout(spec))
    product = _product(spec, pairs)
    cut, scratch = _cut_forward(spec, threads, product)
    packed = spec.taps * spec.in_channels * product.group_row // product.numbers
    shared = share(cut.strands * cut.strand, threads, multiplications, spec.dtype, scratch)
    size = room(x_size, spec.dtype) + room(packed, spec.dtype) + shared.bytes
    return Forward((*common, _numbers(cut)), x_size, packed, pairs, size, shared)


def images_at_once(spec: ConvSpec, threads: int) -> int:
    """How many images a backward pass takes at once: their copies are few bytes, and every thread has work."""
    x, blocks = _layout(spec), _wide_layout(spec).blocks
    size = (x.blocks * x.pitch * x.width + spec.positions * spec.out_channels) * np.dtype(spec.dtype).itemsize
    items = blocks * _backward_tile(spec, blocks)[1]
    most = max(1, _BATCH_BYTES // max(1, size), ceil(2 * threads / items))
    return ceil(spec.batch / max(1, ceil(spec.batch / most)))


def layer_plan(spec: ConvSpec, channels: int, threads: int, multiplications: int, pairs: bool) -> LayerForward:
    """The plan of a layer's forward pass; `channels` are those of the predictor."""
    # The predictor reads all channels of a pixel: its blocks stay wide.
    x = _wide_layout(spec)
    x_size, common = _common(spec, x)
    vector = VECTOR_BYTES // np.dtype(spec.dtype).itemsize
    product, row = _product(spec, pairs), up(channels, vector)
    cut, (integers, reals) = _cut_forward(spec, threads, product, row)
    taps_at_once = min(spec.taps, max(1, _DEPTH // x.width))
    predictor_cut = cut._replace(taps_at_once=taps_at_once, group_row=row, panels=ceil(channels / (VECTORS * vector)))
    predictor = _shape(replace(spec, out_channels=channels, groups=1))._replace(depthwise=False)
    weight_size = spec.taps * spec.in_channels * product.group_row // product.numbers
    predictor_size = spec.taps * spec.in_channels * row
    predicted_size = spec.batch * channels * spec.positions
    scratch = integers + taps_at_once * cut.tile, reals
    shared = share(cut.strands * cut.strand, threads, multiplications, spec.dtype, scratch)
    sizes = x_size, weight_size, predictor_size, predicted_size
    return LayerForward(
        arguments=(*common, _numbers(cut), _numbers(predictor), _numbers(predictor_cut)),
        x_size=x_size,
        weight_size=weight_size,
        pairs=pairs,
        predictor_size=predictor_size,
        predicted_size=predicted_size,
        bytes=sum(room(size, spec.dtype) for size in sizes) + shared.bytes,
        share=shared,
    )


def collect_items(spec: ConvSpec, images: int, d_input: int, d_weight: int, d_offset: int, d_mask: int) -> int:
    """The items of `collect` for results of these sizes, of some images."""
    weights = spec.out_channels if d_weight else 0
    runs = images * ceil(spec.pixels / RUN) if d_input else 0
    return weights + runs + ceil(d_offset / SUMS) + ceil(d_mask / SUMS)


def _common(spec: ConvSpec, x: Layout) -> tuple[int, tuple[Any, ...]]:
    """The size of the input's copy, which lies in memory as `x` says, and the beginning of every kernel's `plan`."""
    before = [before for before, _ in spec.padding]
    geometry = [spec.input_size, spec.kernel_size, spec.stride, before, spec.dilation, spec.output_size]
    x_size = x.blocks * spec.batch * x.pitch * x.width
    return x_size, (spec.input_size, _numbers(geometry), _numbers(_shape(spec)), _numbers(x))


def _numbers(values: Any) -> np.ndarray:
    return np.array(values, np.int64)


def _shape(spec: ConvSpec) -> Shape:
    group_channels, group_outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    return Shape(
        images=spec.batch,
        positions=spec.positions,
        taps=spec.taps,
        channels=spec.in_channels,
        outputs=spec.out_channels,
        groups=spec.groups,
        group_channels=group_channels,
        group_outputs=group_outputs,
        offset_groups=spec.offset_groups,
        offset_channels=spec.in_channels // spec.offset_groups,
        depthwise=group_channels == 1 and group_outputs == 1,
        inside=spec.boundary == "inside",
    )


def _layout(spec: ConvSpec) -> Layout:
    """How the input's copy lies in memory.

    Offset groups that are narrow have blocks of their own, some vectors wide: each of them reads other pixels, and what the
    pixels of wide blocks hold besides would take the cache's room.
    """
    wide, share = _wide_layout(spec), spec.in_channels // spec.offset_groups
    width = up(share, VECTOR_BYTES // np.dtype(spec.dtype).itemsize)
    if width >= wide.width or wide.width % width or width % share:
        return wide
    return wide._replace(width=width, blocks=spec.in_channels // wide.span * ceil(wide.span / width))


def _wide_layout(spec: ConvSpec) -> Layout:
    item, channels = np.dtype(spec.dtype).itemsize, spec.in_channels
    vector, full, group_channels = VECTOR_BYTES // item, _BLOCK_BYTES // item, channels // spec.groups
    span = group_channels if group_channels >= full else channels
    # Pieces of a group of channels that are about equal, or several whole groups.
    width = up(ceil(span / ceil(span / full)), vector) if span == group_channels else full // group_channels * group_channels
    width = min(width, span)
    return Layout(span, width, channels // span * ceil(span / width), spec.pixels, spec.pixels + 1)


class _Product(NamedTuple):
    """How the product of a tile's samples and a weight is cut into chunks, and the room that it takes."""

    chunk: int
    chunk_span: int
    taps_at_once: int
    group_row: int
    groups: int
    panels: int
    numbers: int  # in an element of the packed weight: 2 of a pair, else 1

    @property
    def row(self) -> int:
        """Numbers of a row of sums."""
        return self.groups * self.group_row


def _product(spec: ConvSpec, pairs: bool) -> _Product:
    x = _wide_layout(spec)
    vector, taps, group_channels, group_outputs, depthwise = _groups(spec)
    # Pieces of a large group that are about equal; of small ones as many as a block has, and all taps if possible.
    piece = up(ceil(x.span / ceil(x.span / _DEPTH)), vector)
    chunk, depth = (min(piece, x.span), _DEPTH) if x.span == group_channels else (x.width, 2 * _DEPTH)
    taps_at_once = 1 if depthwise or chunk < min(group_channels, x.span) else max(1, min(taps, depth // chunk))
    return _Product(
        chunk=chunk,
        chunk_span=max(group_channels, chunk),
        taps_at_once=ceil(taps / ceil(taps / taps_at_once)),
        group_row=1 if depthwise else up(group_outputs, vector),
        groups=spec.groups,
        panels=1 if depthwise else spec.groups * ceil(group_outputs / (VECTORS * vector)),
        numbers=2 if pairs else 1,
    )


def _cut_forward(spec: ConvSpec, threads: int, product: _Product, most_sums: int = 0) -> tuple[ForwardCut, tuple[int, int]]:
    """How a forward pass is cut, and the int32 numbers and reals of a thread's scratch memory.

    That has room for `most_sums` sums of a position, if these are more than the product's.
    """
    item = np.dtype(spec.dtype).itemsize
    vector = VECTOR_BYTES // item

    def scratch(tile: int) -> tuple[int, int]:
        integers, reals = table_sizes(spec.rank, tile)
        sums = up(tile * max(product.row, most_sums), vector)
        column = ceil(tile * product.chunk * product.taps_at_once / product.numbers)
        return integers, up(reals, vector) + max(sums + column, vector * vector)

    tile = _forward_tile(spec, threads)
    while tile > FEW_ROWS and scratch(tile)[1] * item > _TILE_BYTES:
        tile = up(tile // 2, FEW_ROWS)
    tiles = ceil(spec.positions / tile)
    strands = max(1, min(threads, spec.batch * tiles))
    cut = ForwardCut(
        chunk=product.chunk,
        chunk_span=product.chunk_span,
        taps_at_once=product.taps_at_once,
        tile=tile,
        tiles=tiles,
        strands=strands,
        strand=ceil(spec.batch * tiles / strands),
        group_row=product.group_row,
        panels=product.panels,
        copies=product.panels + spec.batch * ceil(spec.pixels / RUN),
    )
    return cut, scratch(tile)


def _forward_tile(spec: ConvSpec, threads: int) -> int:
    """Positions of a tile: a few tiles for each thread if they stay large, else one for each."""
    tiles = ceil(spec.positions / _TILE)
    while spec.batch * tiles < _TILES * threads and spec.positions >= 2 * _SMALL_TILE * tiles:
        tiles += 1
    while spec.batch * tiles < threads and spec.positions >= 2 * FEW_ROWS * tiles:
        tiles += 1

    def longest(tiles: int) -> int:
        """The positions of the thread that has most."""
        return ceil(spec.batch * tiles / threads) * _even(spec.positions, ceil(spec.positions / tiles))

    # A last round of tiles that has work for few threads costs as much as a whole one: much of a call of few rounds.
    if spec.positions and spec.batch * tiles < 20 * threads:
        best = min(range(max(1, tiles - tiles // 8), tiles + tiles // 8 + 1), key=longest)
        tiles = best if longest(best) < 0.95 * longest(tiles) else tiles
    return _even(spec.positions, ceil(spec.positions / tiles))


def backward_plan(spec: ConvSpec, batch: int, threads: int, multiplications: int, pairs: bool) -> Backward:
    """The plan of a backward pass through some images of a batch; its results do not depend on the number of threads."""
    x, blocks, item = _layout(spec), _wide_layout(spec), np.dtype(spec.dtype).itemsize
    x_size, common = _common(spec, x)
    vector, taps, group_channels, group_outputs, depthwise = _groups(spec)
    group_share = spec.in_channels // spec.offset_groups
    ends = [(g * group_share, (g + 1) * group_share - 1) for g in range(spec.offset_groups)]
    slots = max(_block(blocks, last) - _block(blocks, first) + 1 for first, last in ends)
    numbers = 2 if pairs else 1
    tile, parts = _backward_tile(spec, blocks.blocks)
    tile = up(tile, numbers)
    # A replica has the size of the weight: many of them where that is little, few where it is much.
    affordable = _REPLICA_BYTES // max(1, _weight_bytes(spec))
    worthwhile = min(ceil(_MOST_ITEMS / blocks.blocks), batch * spec.positions // _BUNCH)
    replicas = min(max(ceil(2 * _ITEMS / blocks.blocks), worthwhile), affordable)
    classes = max(1, min(batch, replicas // parts))  # of images
    whole = parts == 1 or blocks.blocks * min(classes, spec.batch) >= 2 * threads
    bunch = min(ceil(_BUNCH / max(1, spec.positions)), ceil(batch / classes))
    rows, row = (1, 1) if depthwise else (up(group_outputs, FEW_ROWS), up(group_channels, vector))
    cut = BackwardCut(
        block=blocks.width,
        blocks=blocks.blocks,
        taps_at_once=min(taps, max(1, _TAPS_BYTES // max(1, 2 * blocks.width * group_outputs * item))),
        tile=tile,
        parts=parts,
        part_size=up(ceil(spec.positions / parts), tile),
        replicas=classes * parts,
        whole=whole,
        bunch=bunch,
        row=row,
        sums=rows * row,
        column_row=up(blocks.width, vector) + vector,
        packed=up(group_channels, vector) * group_outputs // numbers,
        packs=1 if depthwise else spec.out_channels // numbers,
        batch=batch,
    )
    integers, reals = table_sizes(spec.rank, tile)
    scratch = integers + 2 * bunch, up(reals, vector) + 2 * tile * cut.column_row
    shared = share(blocks.blocks * classes * (1 if whole else parts), threads, 2 * multiplications, spec.dtype, scratch)
    rooms = shared.threads * bunch * (2 if whole and parts > 1 else 1)  # each for an item of an image
    return Backward(
        arguments=(*common, _numbers(cut)),
        x_size=x_size,
        weight_size=taps * (spec.in_channels if depthwise else spec.out_channels * up(group_channels, vector)) // numbers,
        pairs=pairs,
        output_size=(spec.batch * spec.positions + FEW_ROWS) * spec.out_channels,
        output_pairs_size=(spec.batch * spec.out_channels + FEW_ROWS) * ceil(spec.positions / 2) if pairs else 0,
        gradient_size=rooms * ceil(blocks.width / x.width) * x.pitch * x.width + (0 if whole else x_size),
        turns=0 if whole else blocks.blocks * spec.batch,
        slots=slots,
        replicas=classes * parts,
        replica_size=taps * spec.groups * cut.sums,
        share=shared,
    )


def _backward_tile(spec: ConvSpec, blocks: int) -> tuple[int, int]:
    """Positions of a tile, and the parts of an image: by an image's shape alone, since sums depend on them."""
    affordable = max(1 if blocks > 1 else 2, _PART_BYTES // max(1, _weight_bytes(spec)))
    # Two already where each is half as large as is worth it.
    most = max(spec.positions // _PART, 2 if spec.positions >= _PART else 1)
    # A depthwise convolution computes little beside clearing and adding.
    wanted = ceil((_DEPTHWISE_ITEMS if _groups(spec)[-1] else _ITEMS) / max(1, blocks))
    parts = max(1, min(wanted, affordable, most))
    tile = min(_even(spec.positions, _TILE), up(ceil(spec.positions / parts), FEW_ROWS))
    return tile, max(1, ceil(spec.positions / max(tile, up(ceil(spec.positions / parts), tile))))


def _weight_bytes(spec: ConvSpec) -> int:
    return spec.taps * (spec.in_channels // spec.groups) * spec.out_channels * np.dtype(spec.dtype).itemsize


def _groups(spec: ConvSpec) -> tuple[int, int, int, int, bool]:
    """Lanes of a vector, taps, input and output channels of a weight group, and whether both are one."""
    group_channels, group_outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    lanes = VECTOR_BYTES // np.dtype(spec.dtype).itemsize
    return lanes, spec.taps, group_channels, group_outputs, group_channels == 1 and group_outputs == 1


def _block(layout: Layout, channel: int) -> int:
    """The block that a channel lies in."""
    return channel // layout.span * ceil(layout.span / layout.width) + channel % layout.span // layout.width


def _even(positions: int, tile: int) -> int:
    """A tile no larger than `tile` that cuts the positions into runs of about equal length."""
    return max(FEW_ROWS, min(up(tile, FEW_ROWS), up(ceil(positions / max(1, ceil(positions / tile))), FEW_ROWS)))
