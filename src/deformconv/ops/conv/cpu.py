"""Deformable convolution on the CPU: how a call is cut into work for the kernels in `cpu_kernels`.

The input is copied once with its channels last, the weight once in panels for the matrix product; offsets, masks and the output
stay as they are. How the work is cut depends on shapes alone, and partial sums are added in a fixed order: a result is the same
bit for bit whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from itertools import pairwise, product
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deformconv.ops.conv.spec import ConvSpec, Gradients, Operand, conv_spec
from deformconv.runtime import threads

if TYPE_CHECKING:
    from deformconv.sampling.kernels import TableSizes, Window

__all__ = ["deform_conv", "deform_conv_backward", "reasons_against", "warmup"]

DTYPES = ("float32", "float64")
_PIXELS, _REACH = 2**31, 2**29  # `sampling.kernels` counts in int32; see REACH there
# A tile's buffers stay in the second-level cache, and within what a thread may take beside the arrays of the call.
_TILE = 96
_TILE_BYTES = 1 << 20
_DEPTH = 256  # rows of a panel that stay in the first-level cache
_BLOCK = 64  # channels of a block in the backward pass
_ITEMS = 4  # work for this many threads in the backward pass, if it takes separate sums to make it
# Nanoseconds of a multiply-add, roughly: to decide what is too small to share out, and how often to listen for Ctrl-C.
_NANOSECONDS = 0.03
_MOST_ITEMS = 32  # work for as many, where it costs no more than _SUM_BYTES
_SUM_BYTES = 4 << 20
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


class _Plan(NamedTuple):
    """How a call is cut, in both directions."""

    window: Window
    tile: int
    taps_at_once: int
    channels_at_once: int
    scratch: TableSizes
    edges: np.ndarray
    first_block: np.ndarray
    slots: int
    parts: int
    lanes: int
    backward_scratch: TableSizes


@lru_cache(maxsize=256)
def _plan(spec: ConvSpec) -> _Plan:
    from deformconv.runtime.vectors import ROWS, VECTOR_BYTES
    from deformconv.sampling.kernels import TableSizes, Window, table_sizes

    item = np.dtype(spec.dtype).itemsize
    vector = VECTOR_BYTES // item
    group_channels, group_outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    depthwise = group_channels == 1 and group_outputs == 1

    sum_row = spec.out_channels if depthwise else spec.groups * _up(group_outputs, vector)

    def forward_cut(taps_at_once: int) -> tuple[int, TableSizes]:
        """How many channels at once, and the scratch for ROWS positions."""
        channels = spec.in_channels if depthwise else group_channels
        channels_at_once = min(channels, 2 * _DEPTH if taps_at_once == 1 or depthwise else _DEPTH)
        depth = channels_at_once * (1 if depthwise else taps_at_once)
        sizes = table_sizes(spec.rank, spec.offset_groups * taps_at_once * ROWS, ROWS)
        return channels_at_once, sizes._replace(reals=sizes.reals + ROWS * (sum_row + depth))

    taps_at_once = spec.taps if depthwise else max(1, min(spec.taps, _DEPTH // group_channels))
    while taps_at_once > 1 and _bytes(forward_cut(taps_at_once)[1], item) > _TILE_BYTES:
        taps_at_once -= 1
    taps_at_once = ceil(spec.taps / ceil(spec.taps / taps_at_once))
    channels_at_once, row_scratch = forward_cut(taps_at_once)
    tile = min(_up(_TILE, ROWS), max(1, _TILE_BYTES // _bytes(row_scratch, item)) * ROWS)
    tile = _even(spec.positions, tile, ROWS)
    scratch = TableSizes(*(ceil(size * tile / ROWS) for size in row_scratch))

    edges = _block_edges(spec.in_channels, group_channels)
    share = spec.in_channels // spec.offset_groups
    touching = [
        [b for b in range(len(edges) - 1) if edges[b] < (g + 1) * share and edges[b + 1] > g * share]
        for g in range(spec.offset_groups)
    ]
    blocks = len(edges) - 1
    parts = max(1, min(ceil(_ITEMS / max(1, spec.batch * blocks)), spec.positions // (4 * _TILE)))
    # A lane has sums of the size of the weight: many lanes where that is little, few where it is much.
    affordable = _SUM_BYTES // max(1, spec.taps * group_channels * spec.out_channels * item)
    lanes = max(1, min(spec.batch * parts, max(ceil(_ITEMS / blocks), min(ceil(_MOST_ITEMS / blocks), affordable))))
    column_row = _up(max(b - a for a, b in pairwise(edges)), vector) + vector
    backward_scratch = table_sizes(spec.rank, tile, tile)
    buffers = tile * 2 * ((1 << spec.rank) + column_row)
    backward_scratch = backward_scratch._replace(reals=backward_scratch.reals + buffers)
    before = tuple(before for before, _ in spec.padding)
    inside = spec.boundary == "inside"
    return _Plan(
        Window(spec.input_size, spec.kernel_size, spec.stride, before, spec.dilation, spec.output_size, inside),
        tile, taps_at_once, channels_at_once, scratch,
        np.array(edges), np.array([blocks[0] for blocks in touching]), max(map(len, touching)),
        parts, lanes, backward_scratch,
    )  # fmt: skip


def _bytes(sizes: TableSizes, item: int) -> int:
    return sizes.reals * item + sizes.starts * 8 + sizes.integers * 4


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _even(positions: int, tile: int, rows: int) -> int:
    """A tile no larger than `tile` that cuts the positions into runs of about equal length."""
    return max(rows, min(tile, _up(ceil(positions / max(1, ceil(positions / tile))), rows)))


def _block_edges(channels: int, group_channels: int) -> list[int]:
    """Where the blocks of channels begin and end: parts of a weight group, or several whole ones."""
    if group_channels < _BLOCK:
        return [*range(0, channels, _BLOCK // group_channels * group_channels), channels]
    starts = (g + c for g in range(0, channels, group_channels) for c in range(0, group_channels, _BLOCK))
    return [*starts, channels]


def deform_conv(spec: ConvSpec, input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> np.ndarray:
    """The output (N, C_out, *O) for arrays that `spec` describes."""
    output = np.empty(spec.output_shape, spec.dtype)
    if output.size == 0:
        return output
    kernels = _kernels()

    plan = _plan(spec)
    x = _rows(spec, input)
    packed = _packed(spec, weight, forward=True)
    arguments = (
        plan.window, x, *_places(spec, offset, mask), packed,
        np.zeros(spec.out_channels, spec.dtype) if bias is None else _flat(bias, (spec.out_channels,)),
        output.reshape(spec.batch, spec.out_channels, spec.positions),
        spec.offset_groups, spec.in_channels // spec.groups, plan.tile, plan.taps_at_once, plan.channels_at_once,
    )  # fmt: skip
    items = spec.batch * ceil(spec.positions / plan.tile)
    _run(kernels.forward, arguments, items, _multiplications(spec), partial(_scratch, plan.scratch, spec.dtype))
    return output


def deform_conv_backward(
    spec: ConvSpec, grad_output: Any, input: Any, offset: Any, weight: Any, mask: Any, wanted: Collection[str]
) -> Gradients:
    """The wanted gradients; None for the others."""
    shapes = {"input": spec.input_shape, "offset": spec.offset_shape, "weight": spec.weight_shape}
    shapes |= {"bias": (spec.out_channels,)} if spec.biased else {}
    shapes |= {"mask": spec.mask_shape} if spec.masked else {}
    wanted = [name for name in shapes if name in wanted]
    results: dict[str, Any] = {}
    if "bias" in wanted:
        results["bias"] = _sum_positions(spec, grad_output)
    inner = [name for name in wanted if name != "bias"]
    if not inner:
        return Gradients(**results)
    if spec.batch * spec.positions * spec.in_channels * spec.out_channels * spec.pixels == 0:
        return Gradients(**results, **{name: np.zeros(shapes[name], spec.dtype) for name in inner})
    return Gradients(**results, **_sampled_gradients(spec, grad_output, input, offset, weight, mask, inner))


def _sampled_gradients(
    spec: ConvSpec, grad_output: Any, input: Any, offset: Any, weight: Any, mask: Any, wanted: Collection[str]
) -> dict[str, np.ndarray]:
    kernels = _kernels()

    plan = _plan(spec)
    N, K, P, C, D = spec.batch, spec.taps, spec.positions, spec.in_channels, spec.rank
    group_channels, group_outputs = C // spec.groups, spec.out_channels // spec.groups
    depthwise = group_channels == 1 and group_outputs == 1

    rows, vector = kernels.ROWS, kernels.VECTOR_BYTES // np.dtype(spec.dtype).itemsize
    group_row = 1 if depthwise else _up(group_outputs, rows)
    d_output = np.empty((N * P + rows, spec.groups * group_row), spec.dtype)
    _copy_channels_last(spec, _flat(grad_output, (N, spec.out_channels, P)), d_output, spec.groups, group_row)

    items = (len(plan.edges) - 1) * plan.lanes
    places = (N, spec.offset_groups, K)
    sums_shape = (1, 1) if depthwise else (_up(group_outputs, rows), _up(group_channels, vector))
    d_x = np.zeros((plan.parts * N * spec.pixels + items, C) if "input" in wanted else (0, C), spec.dtype)
    d_offset = np.zeros((plan.slots, *places, D, P) if "offset" in wanted else (1, 1, 1, 1, 1, 0), spec.dtype)
    d_mask = np.zeros((plan.slots, *places, P) if "mask" in wanted else (1, 1, 1, 1, 0), spec.dtype)
    d_weight = np.zeros((plan.lanes, K, spec.groups, *(sums_shape if "weight" in wanted else (0, 0))), spec.dtype)
    arguments = (
        plan.window, _rows(spec, input), *_places(spec, offset, mask), _packed(spec, weight, forward=False),
        d_output, d_x, d_offset, d_mask, d_weight, plan.edges, plan.first_block,
        N, spec.offset_groups, group_channels, group_outputs, plan.parts, plan.tile,
    )  # fmt: skip
    own = partial(_scratch, plan.backward_scratch, spec.dtype)
    _run(kernels.backward, arguments, items, 2 * _multiplications(spec), own)

    results = {}
    if "input" in wanted:
        results["input"] = np.empty(spec.input_shape, spec.dtype)
        runs = N * ceil(spec.pixels / kernels.RUN)
        _run(
            kernels.channels_first,
            (d_x[: plan.parts * N * spec.pixels], results["input"].reshape(N, C, spec.pixels)),
            runs,
            d_x.size * 20,
        )
    if "offset" in wanted:
        results["offset"] = _sum_slots(d_offset).reshape(spec.offset_shape)
    if "mask" in wanted:
        results["mask"] = _sum_slots(d_mask).reshape(spec.mask_shape)
    if "weight" in wanted:
        results["weight"] = np.empty(spec.weight_shape, spec.dtype)
        by_group = results["weight"].reshape(spec.groups, group_outputs, group_channels, K)
        _run(kernels.unpack_weight, (d_weight, by_group), spec.out_channels, d_weight.size * _COPY)
    return results


def _sum_slots(slots: np.ndarray) -> np.ndarray:
    return slots[0] if len(slots) == 1 else slots.sum(axis=0)


def _sum_positions(spec: ConvSpec, grad_output: Any) -> np.ndarray:
    by_position = _flat(grad_output, (spec.batch, spec.out_channels, spec.positions))
    return by_position.sum(axis=2).sum(axis=0)


def _multiplications(spec: ConvSpec) -> int:
    """Multiply-adds of a forward pass, those of the sampling counted as so many."""
    return spec.batch * spec.positions * spec.taps * spec.in_channels * (spec.out_channels // spec.groups + 4 * 2**spec.rank)


def _run(
    kernel: Any, arguments: tuple[Any, ...], items: int, multiplications: int, own: Callable[[], tuple[Any, ...]] = tuple
) -> None:
    """Share the items of a kernel out; `own` makes the arguments that every thread needs for itself."""
    nanoseconds = multiplications * _NANOSECONDS

    def work(counter: np.ndarray, limit: int) -> None:
        kernel(counter, limit, *arguments, *own())

    shared = threads.get_num_threads() if nanoseconds > _SHARED_FROM else 1
    burst = int(_BURST * items / max(nanoseconds, 1))
    threads.run(work, items, threads=shared, burst=burst)


def _scratch(sizes: TableSizes, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """This thread's memory for a kernel: reals, starts and integers."""
    reals = sizes.starts * 8
    integers = reals + sizes.reals * np.dtype(dtype).itemsize
    end = integers + sizes.integers * 4
    memory = threads.scratch(end)
    return memory[reals:integers].view(dtype), memory[:reals].view(np.int64), memory[integers:end].view(np.int32)


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
        return offset, np.empty(0, spec.dtype), image_offset, 0
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


def _rows(spec: ConvSpec, input: Any) -> np.ndarray:
    """The input with channels last, a row per pixel, and a row of zeros."""
    x = np.empty((spec.batch * spec.pixels + 1, spec.in_channels), spec.dtype)
    x[-1] = 0
    if input.flags.c_contiguous:
        _copy_channels_last(spec, _flat(input, (spec.batch, spec.in_channels, spec.pixels)), x, 1, spec.in_channels)
    else:
        x[:-1].reshape(spec.batch, *spec.input_size, spec.in_channels)[...] = np.moveaxis(input, 1, -1)
    return x


def _copy_channels_last(spec: ConvSpec, array: np.ndarray, rows: np.ndarray, groups: int, group_row: int) -> None:
    kernels = _kernels()

    runs = array.shape[0] * ceil(array.shape[2] / kernels.RUN)
    _run(kernels.channels_last, (array, rows, groups, group_row), runs, array.size * _COPY)


def _packed(spec: ConvSpec, weight: Any, *, forward: bool) -> np.ndarray:
    """The weight as the kernels read it: (K, C) for a depthwise convolution, else in panels."""
    kernels = _kernels()

    group_channels, group_outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    shape = (spec.groups, group_outputs, group_channels, spec.taps)
    if group_channels == 1 and group_outputs == 1:
        return np.ascontiguousarray(np.reshape(weight, (spec.groups, spec.taps)).T).reshape(-1)
    vector = kernels.VECTOR_BYTES // weight.itemsize
    rows, columns = (spec.in_channels, group_outputs) if forward else (spec.out_channels, group_channels)
    packed = np.empty(spec.taps * rows * _up(columns, vector), spec.dtype)
    pack = kernels.pack_forward if forward else kernels.pack_backward
    items = spec.groups * ceil(group_outputs / (kernels.VECTORS * vector)) if forward else spec.out_channels
    if weight.flags.c_contiguous or not forward:
        _run(pack, (_flat(weight, shape), packed), items, weight.size * _COPY)
        return packed
    # A weight with its channels last, say: a whole copy of it is too much, one of a panel's outputs is not.
    width, depth = kernels.VECTORS * vector, group_channels * spec.taps
    for group, first in product(range(spec.groups), range(0, group_outputs, width)):
        outputs = weight[group * group_outputs + first : group * group_outputs + min(first + width, group_outputs)]
        piece = _flat(outputs, (1, len(outputs), group_channels, spec.taps))
        start = (group * _up(group_outputs, vector) + first) * depth
        _run(pack, (piece, packed[start:]), 1, piece.size * _COPY)
    return packed


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
