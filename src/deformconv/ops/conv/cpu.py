"""Deformable convolution on the CPU: how a call is cut into work for the kernels in `cpu_kernels`.

The input is copied once with its channels last, in blocks, the weight once in panels for the matrix product; offsets, masks and
the output stay as they are. How the work is cut depends on shapes alone, and partial sums are added in a fixed order: a result
is the same bit for bit whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import product
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from deformconv.ops.conv.spec import ConvSpec, Gradients, Operand, conv_spec
from deformconv.runtime import threads
from deformconv.runtime.memory import Arena, arena, room

__all__ = ["deform_conv", "deform_conv_backward", "reasons_against", "warmup"]

DTYPES = ("float32", "float64")
_PIXELS, _REACH = 2**31 - 1, 2**29  # `sampling.kernels` counts in int32; see REACH there
_BLOCK_BYTES = 256  # a row of a block of channels
_DEPTH = 576  # samples of a position that are multiplied at once
_TILE = 192  # positions
_TILE_BYTES = 1 << 20  # a tile's buffers stay in the second-level cache, and within what a thread may take
_TAPS_BYTES = 1 << 19  # so do the weights and sums of the taps that the backward pass takes at once
_ITEMS = 4  # work for this many threads in the backward pass, if it takes separate sums to make it
_MOST_ITEMS = 32  # work for as many, where it costs no more than _SUM_BYTES
_SUM_BYTES = 4 << 20
# Nanoseconds of a multiply-add, roughly: to decide what is too small to share out, and how often to listen for Ctrl-C.
_NANOSECONDS = 0.03
_COPY = 20  # a number moved, in multiply-adds
_SHARED_FROM = 100_000
_BURST = 20_000_000


def reasons_against(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    reasons = []
    if find_spec("numba") is None:
        reasons.append("Numba is not installed")
    if device != "cpu":
        reasons.append(f"its kernels run on the CPU and the arrays are on {device}")
    if library not in ("numpy", "torch"):
        reasons.append(f"it reads NumPy arrays and what shares memory with them, not {library}'s")
    if spec.dtype not in DTYPES:
        reasons.append(f"it computes in float32 and float64, not {spec.dtype}")
    if spec.pixels >= _PIXELS:
        reasons.append(f"an image of {spec.pixels} pixels exceeds its 32-bit pixel numbers")
    for axis in range(spec.rank):
        reach = (
            spec.input_size[axis] + sum(spec.padding[axis]) + spec.dilation[axis] * spec.kernel_size[axis] + spec.stride[axis]
        )
        if reach >= _REACH:
            reasons.append(
                f"axis {axis} spans {reach} pixels with padding, window and stride, and its positions are 32-bit numbers"
            )
    return reasons


@cache
def _kernels() -> Any:
    """The kernels' module; it loads Numba, so the first call does it and not the import of this file."""
    with threads.importing:
        from deformconv.ops.conv import cpu_kernels
    return cpu_kernels


class Layout(NamedTuple):
    """Channels last, in blocks: block, image, pixel, channel.

    A block has `width` channels; the last one of every `span` channels has what is left of them. So a block's rows fill whole
    cache lines wherever they lie, which those of all channels together do not when their distance is a power of two.
    """

    span: int
    width: int
    blocks: int
    pitch: int  # rows of an image


class _Plan(NamedTuple):
    """How a call is cut, in both directions."""

    geometry: np.ndarray
    x: Layout
    d_output: Layout
    chunk: int
    tile: int
    taps_at_once: int
    scratch: tuple[int, int]
    slots: int
    parts: int
    lanes: int
    backward_tile: int
    backward_taps: int
    backward_scratch: tuple[int, int]


@lru_cache(maxsize=256)
def _plan(spec: ConvSpec) -> _Plan:
    from deformconv.runtime.product import FEW_ROWS
    from deformconv.runtime.vectors import VECTOR_BYTES
    from deformconv.sampling.kernels import table_sizes

    item = np.dtype(spec.dtype).itemsize
    vector, full = VECTOR_BYTES // item, _BLOCK_BYTES // item
    channels, outputs, taps = spec.in_channels, spec.out_channels, spec.taps
    group_channels, group_outputs = channels // spec.groups, outputs // spec.groups
    depthwise = group_channels == 1 and group_outputs == 1

    span = group_channels if group_channels >= full else channels
    # Parts of a group of channels that are about equal, or several whole groups.
    width = _up(ceil(span / ceil(span / full)), vector) if span == group_channels else full // group_channels * group_channels
    width = min(width, span)
    x = Layout(span, width, channels // span * ceil(span / width), spec.pixels + 1)

    chunk = min(group_channels, _DEPTH) if span == group_channels else width
    taps_at_once = 1 if depthwise or chunk < min(group_channels, span) else max(1, min(taps, _DEPTH // chunk))
    taps_at_once = ceil(taps / ceil(taps / taps_at_once))
    sum_row = outputs if depthwise else spec.groups * _up(group_outputs, vector)

    def forward_scratch(tile: int) -> tuple[int, int]:
        integers, reals = table_sizes(spec.rank, tile)
        column = tile * chunk * taps_at_once
        return integers, _up(reals, vector) + _up(tile * sum_row, vector) + _up(column, vector)

    tile = _even(spec.positions, _TILE, FEW_ROWS)
    while tile > FEW_ROWS and forward_scratch(tile)[1] * item > _TILE_BYTES:
        tile = _up(tile // 2, FEW_ROWS)

    blocks, share = x.blocks, channels // spec.offset_groups
    slots = max(_block(x, (g + 1) * share - 1) - _block(x, g * share) + 1 for g in range(spec.offset_groups))
    backward_tile = _even(spec.positions, _TILE, FEW_ROWS)
    parts = max(1, min(ceil(_ITEMS / max(1, spec.batch * blocks)), spec.positions // (4 * FEW_ROWS)))
    backward_tile = min(backward_tile, _up(ceil(spec.positions / parts), FEW_ROWS))
    part = max(backward_tile, _up(ceil(spec.positions / parts), backward_tile))
    parts = max(1, ceil(spec.positions / part))
    # A lane has sums of the size of the weight: many lanes where that is little, few where it is much.
    affordable = _SUM_BYTES // max(1, taps * group_channels * outputs * item)
    lanes = max(1, min(spec.batch * parts, max(ceil(_ITEMS / blocks), min(ceil(_MOST_ITEMS / blocks), affordable))))
    integers, reals = table_sizes(spec.rank, backward_tile)
    column = backward_tile * (_up(width, vector) + vector)
    backward_taps = max(1, _TAPS_BYTES // max(1, 2 * width * group_outputs * item))
    before = [before for before, _ in spec.padding]
    geometry = [spec.input_size, spec.kernel_size, spec.stride, before, spec.dilation, spec.output_size]
    return _Plan(
        np.array(geometry, np.int64), x, Layout(outputs, outputs, 1, spec.positions),
        chunk, tile, taps_at_once, forward_scratch(tile),
        slots, parts, lanes, backward_tile, min(taps, backward_taps), (integers, _up(reals, vector) + 2 * column),
    )  # fmt: skip


def _block(layout: Layout, channel: int) -> int:
    """The block that a channel lies in."""
    return channel // layout.span * ceil(layout.span / layout.width) + channel % layout.span // layout.width


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _even(positions: int, tile: int, rows: int) -> int:
    """A tile no larger than `tile` that cuts the positions into runs of about equal length."""
    return max(rows, min(_up(tile, rows), _up(ceil(positions / max(1, ceil(positions / tile))), rows)))


def deform_conv(spec: ConvSpec, input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> np.ndarray:
    """The output (N, C_out, *O) for arrays that `spec` describes."""
    output = np.empty(spec.output_shape, spec.dtype)
    if output.size == 0:
        return output
    kernels, plan = _kernels(), _plan(spec)
    x_shape, weight_shape = _x_shape(spec, plan), _packed_shape(spec, forward=True)
    with arena(room(x_shape, spec.dtype) + room(weight_shape, spec.dtype)) as memory:
        x = memory.empty(x_shape, spec.dtype)
        packed = memory.empty(weight_shape, spec.dtype)
        _fill_rows(spec, input, x, plan.x)
        _pack(spec, weight, packed, forward=True)
        offset, mask, image_offset, image_mask = _places(spec, offset, mask)
        arguments = (
            spec.input_size, plan.geometry, spec.boundary == "inside", spec.batch, x, plan.x.span, plan.x.width,
            offset, mask, image_offset, image_mask, packed, _empty(spec) if bias is None else _flat(bias, (spec.out_channels,)),
            output.reshape(-1), spec.out_channels, spec.groups, spec.offset_groups, spec.in_channels,
            plan.chunk, plan.tile, plan.taps_at_once,
        )  # fmt: skip
        items = spec.batch * ceil(spec.positions / plan.tile)
        _run(kernels.forward, arguments, items, _multiplications(spec), plan.scratch, spec.dtype)
    return output


def deform_conv_backward(
    spec: ConvSpec, grad_output: Any, input: Any, offset: Any, weight: Any, mask: Any, wanted: Collection[str]
) -> Gradients:
    """The wanted gradients; None for the others."""
    shapes = {"input": spec.input_shape, "offset": spec.offset_shape, "weight": spec.weight_shape}
    shapes |= {"bias": (spec.out_channels,)} if spec.biased else {}
    shapes |= {"mask": spec.mask_shape} if spec.masked else {}
    results = {name: np.empty(shape, spec.dtype) for name, shape in shapes.items() if name in wanted}
    if not results:
        return Gradients()
    if spec.batch * spec.positions * spec.in_channels * spec.out_channels * spec.pixels == 0:
        for result in results.values():
            result[...] = 0
        if "bias" in results and grad_output.size:
            results["bias"][...] = grad_output.reshape(spec.batch, spec.out_channels, -1).sum(axis=(0, 2))
        return Gradients(**results)
    grad_output = _flat(grad_output, (spec.batch, spec.out_channels, spec.positions))
    if "bias" in results:
        _run(_kernels().sum_positions, (grad_output, results["bias"]), spec.out_channels, grad_output.size)
    if results.keys() - {"bias"}:
        _sampled_gradients(spec, grad_output, input, offset, weight, mask, results)
    return Gradients(**results)


def _sampled_gradients(
    spec: ConvSpec, grad_output: np.ndarray, input: Any, offset: Any, weight: Any, mask: Any, results: dict[str, np.ndarray]
) -> None:
    kernels, plan = _kernels(), _plan(spec)
    N, K, P, C, D = spec.batch, spec.taps, spec.positions, spec.in_channels, spec.rank
    group_channels, group_outputs = C // spec.groups, spec.out_channels // spec.groups
    depthwise = group_channels == 1 and group_outputs == 1
    vector = kernels.VECTOR_BYTES // np.dtype(spec.dtype).itemsize

    x_shape = _x_shape(spec, plan)
    sums = (1, 1) if depthwise else (_up(group_outputs, kernels.FEW_ROWS), _up(group_channels, vector))
    shapes: dict[str, tuple[int, ...]] = {
        "x": x_shape,
        "weight": _packed_shape(spec, forward=False),
        "d_output": ((N * P + kernels.FEW_ROWS) * spec.out_channels,),
        "d_x": (plan.parts * x_shape[0],) if "input" in results else (0,),
        "d_weight": (plan.lanes, K, spec.groups, *sums) if "weight" in results else (0,),
        "d_offset": (plan.slots, N * spec.offset_groups * K * D * P) if "offset" in results and plan.slots > 1 else (0,),
        "d_mask": (plan.slots, N * spec.offset_groups * K * P) if "mask" in results and plan.slots > 1 else (0,),
    }
    with arena(sum(room(shape, spec.dtype) for shape in shapes.values())) as memory:
        arrays = {name: memory.empty(shape, spec.dtype) for name, shape in shapes.items()}
        x, packed, d_output, d_x, d_weight = (arrays[name] for name in ("x", "weight", "d_output", "d_x", "d_weight"))
        _fill_rows(spec, input, x, plan.x)
        _fill_rows(spec, grad_output, d_output, plan.d_output)
        d_output[N * P * spec.out_channels :] = 0
        _pack(spec, weight, packed, forward=False)
        places = {name: _slots(plan, results.get(name), arrays[f"d_{name}"]) for name in ("offset", "mask")}
        flat_offset, flat_mask, image_offset, image_mask = _places(spec, offset, mask)
        arguments = (
            spec.input_size, plan.geometry, spec.boundary == "inside", N, x, plan.x.span, plan.x.width,
            flat_offset, flat_mask, image_offset, image_mask, packed, d_output,
            d_x, places["offset"].reshape(-1), places["mask"].reshape(-1), d_weight.reshape(-1),
            spec.out_channels, spec.groups, spec.offset_groups, C,
            plan.parts, plan.lanes, sums[1], plan.backward_tile, plan.backward_taps,
        )  # fmt: skip
        items = plan.x.blocks * plan.lanes
        _run(kernels.backward, arguments, items, 2 * _multiplications(spec), plan.backward_scratch, spec.dtype)

        if "input" in results:
            by_pixel = results["input"].reshape(N, C, spec.pixels)
            layout = (plan.x.span, plan.x.width, plan.x.pitch, plan.parts)
            runs = N * ceil(spec.pixels / kernels.RUN)
            _run(kernels.channels_first, (d_x, by_pixel, *layout, _empty(spec)), runs, d_x.size * _COPY)
        for name, slots in places.items():
            if slots.ndim == 2:
                slots.sum(axis=0, out=results[name].reshape(-1))
        if "weight" in results:
            by_group = results["weight"].reshape(spec.groups, group_outputs, group_channels, K)
            _run(kernels.unpack_weight, (d_weight, by_group), spec.out_channels, d_weight.size * _COPY)


def _slots(plan: _Plan, result: np.ndarray | None, slots: np.ndarray) -> np.ndarray:
    """Where a gradient that blocks of channels share is summed: in the result, or in a slot for each block."""
    if result is None or plan.slots == 1:
        return slots if result is None else result.reshape(-1)
    slots[...] = 0  # an offset group may have fewer blocks than another
    return slots


def _multiplications(spec: ConvSpec) -> int:
    """Multiply-adds of a forward pass, those of the sampling counted as so many."""
    return spec.batch * spec.positions * spec.taps * spec.in_channels * (spec.out_channels // spec.groups + 4 * 2**spec.rank)


def _run(
    kernel: Any,
    arguments: tuple[Any, ...],
    items: int,
    multiplications: int,
    sizes: tuple[int, int] | None = None,
    dtype: str = "",
) -> None:
    """Share the items of a kernel out; `sizes` are the int32 numbers and the reals that every thread needs for itself."""
    nanoseconds = multiplications * _NANOSECONDS

    def work(counter: np.ndarray, limit: int) -> None:
        if sizes is None:
            kernel(counter, limit, *arguments)
        else:
            kernel(counter, limit, *arguments, *_scratch(*sizes, dtype))

    shared = threads.get_num_threads() if nanoseconds > _SHARED_FROM else 1
    burst = int(_BURST * items / max(nanoseconds, 1))
    threads.run(work, items, threads=shared, burst=burst)


def _scratch(integers: int, reals: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """This thread's memory for a kernel: reals and int32 numbers."""
    end = reals * np.dtype(dtype).itemsize
    memory = threads.scratch(end + integers * 4)
    return memory[:end].view(dtype), memory[end : end + integers * 4].view(np.int32)


@cache
def _empty_of(dtype: str) -> np.ndarray:
    return np.empty(0, dtype)


def _empty(spec: ConvSpec) -> np.ndarray:
    """What stands for an array that there is none of."""
    return _empty_of(spec.dtype)


class _Memory:
    """An array's memory as a flat, writable array, so that a read-only one does not take kernels of its own.

    Nothing writes to it.
    """

    def __init__(self, array: np.ndarray, shape: tuple[int, ...]) -> None:
        self.array = array  # keeps the memory
        place = (array.ctypes.data, False)
        self.__array_interface__ = {"shape": shape, "typestr": array.dtype.str, "data": place, "version": 3}


def _flat(array: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The array in C order, aligned, in the machine's byte order, as kernels are compiled for."""
    if array.flags.carray and array.dtype.isnative:
        result: np.ndarray = array.reshape(shape)
        return result
    array = np.require(array, array.dtype.newbyteorder("="), ["C", "A"]).reshape(shape)
    return array if array.flags.writeable else np.asarray(_Memory(array, shape))


def _places(spec: ConvSpec, offset: Any, mask: Any) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Offsets and masks as flat arrays, the latter empty for v1, and how many numbers apart their images are."""
    offset, image_offset = _images(offset)
    if mask is None:
        return offset, _empty(spec), image_offset, 0
    mask, image_mask = _images(mask)
    return offset, mask, image_offset, image_mask


def _images(array: Any) -> tuple[np.ndarray, int]:
    """A flat array of all images, and the distance between two; no copy if an image has no gaps, as in a slice of channels."""
    image = array.size // len(array)
    step, rest = divmod(array.strides[0], array.itemsize)
    flags = array[0].flags
    if not (flags.c_contiguous and flags.aligned and array.dtype.isnative) or rest or step < 0:
        return _flat(array, (array.size,)), image
    step = step if len(array) > 1 else image
    return np.asarray(_Memory(array, (step * (len(array) - 1) + image,))), step


def _x_shape(spec: ConvSpec, plan: _Plan) -> tuple[int]:
    return (plan.x.blocks * spec.batch * plan.x.pitch * plan.x.width,)


def _fill_rows(spec: ConvSpec, array: Any, rows: np.ndarray, layout: Layout) -> None:
    """Copy an array (N, channels, ...) in the layout of blocks, with zeros between the images."""
    images, channels = array.shape[:2]
    positions = array.size // (images * channels)
    if not array.flags.c_contiguous:  # with its channels last, say
        moved = np.moveaxis(array, 1, -1)
        by_pixel = rows.reshape(layout.blocks, images, layout.pitch, layout.width)
        for block, first in enumerate(_block_starts(layout, channels)):
            last = min(first + layout.width, first // layout.span * layout.span + layout.span)
            into = by_pixel[block, :, :positions, : last - first]
            into.reshape(images, *array.shape[2:], last - first)[...] = moved[..., first:last]
            by_pixel[block, :, positions:] = 0
        return
    runs = images * ceil(positions / _kernels().RUN)
    arguments = (_flat(array, (images, channels, positions)), rows, layout.span, layout.width, layout.pitch, _empty(spec))
    _run(_kernels().channels_last, arguments, runs, array.size * _COPY)


def _block_starts(layout: Layout, channels: int) -> list[int]:
    return [start + first for start in range(0, channels, layout.span) for first in range(0, layout.span, layout.width)]


def _packed_shape(spec: ConvSpec, *, forward: bool) -> tuple[int]:
    vector = _kernels().VECTOR_BYTES // np.dtype(spec.dtype).itemsize
    group_channels, group_outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    if group_channels == 1 and group_outputs == 1:
        return (spec.taps * spec.in_channels,)
    rows, columns = (spec.in_channels, group_outputs) if forward else (spec.out_channels, group_channels)
    return (spec.taps * rows * _up(columns, vector),)


def _pack(spec: ConvSpec, weight: Any, packed: np.ndarray, *, forward: bool) -> None:
    """Copy the weight as the kernels read it: (K, C) for a depthwise convolution, else in panels."""
    kernels = _kernels()

    group_channels, group_outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    shape = (spec.groups, group_outputs, group_channels, spec.taps)
    if group_channels == 1 and group_outputs == 1:
        packed.reshape(spec.taps, spec.groups)[...] = np.reshape(weight, (spec.groups, spec.taps)).T
        return
    if not forward:
        arguments = (_flat(weight, shape), packed, _plan(spec).x.width)
        _run(kernels.pack_backward, arguments, spec.out_channels, weight.size * _COPY)
        return
    vector = kernels.VECTOR_BYTES // packed.itemsize
    width, depth = kernels.VECTORS * vector, group_channels * spec.taps
    panels = spec.groups * ceil(group_outputs / width)
    if weight.flags.c_contiguous:
        _run(kernels.pack_forward, (_flat(weight, shape), packed, _empty(spec)), panels, weight.size * _COPY, *_square(vector, spec))
        return
    # A weight with its channels last, say: a whole copy of it is too much, one of a panel's outputs is not.
    for group, first in product(range(spec.groups), range(0, group_outputs, width)):
        outputs = weight[group * group_outputs + first : group * group_outputs + min(first + width, group_outputs)]
        piece = _flat(outputs, (1, len(outputs), group_channels, spec.taps))
        start = (group * _up(group_outputs, vector) + first) * depth
        _run(kernels.pack_forward, (piece, packed[start:], _empty(spec)), 1, piece.size * _COPY, *_square(vector, spec))


def _square(vector: int, spec: ConvSpec) -> tuple[tuple[int, int], str]:
    return (0, vector * vector), spec.dtype


def warmup(
    dtypes: Iterable[str] = ("float32",),
    ranks: Iterable[int] = (1, 2, 3),
    notify: Callable[[str], None] | None = None,
) -> None:
    """Compile, or load, every kernel that a forward and a backward call takes, for the given dtypes and ranks.

    `notify` is called with a line before each of them.
    """
    _kernels()
    from deformconv.runtime.cache import notice

    told, notice.announce = notice.announce, None
    try:
        for dtype, rank in product(dtypes, ranks):
            if notify is not None:
                notify(f"{dtype}, {rank}-D")
            ones = (1,) * rank
            shapes = [(1, 1, *ones), (1, rank, *ones), (1, 1, *ones), (1, 1, *ones)]
            x, offset, depthwise, mask = (np.zeros(shape, dtype) for shape in shapes)
            for weight in (depthwise, np.zeros((2, 1, *ones), dtype)):
                x_, offset_, weight_, mask_ = (Operand(array.shape, dtype) for array in (x, offset, weight, mask))
                spec = conv_spec(x_, offset_, weight_, mask=mask_)
                y = deform_conv(spec, x, offset, weight, None, mask)
                deform_conv_backward(spec, y, x, offset, weight, mask, ("input", "offset", "weight", "mask"))
    finally:
        notice.announce = told
