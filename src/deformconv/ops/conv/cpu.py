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
from math import ceil, prod
from typing import Any, Literal, NamedTuple

import numpy as np

from deformconv.ops.conv.spec import GRADIENTS, ConvSpec, Gradients, Operand, conv_spec
from deformconv.runtime import threads
from deformconv.runtime.memory import ALIGNMENT, Arena, aligned, arena, room
from deformconv.runtime.openmp import Team, team_for

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against", "warmup"]

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True
DTYPES, HALF = ("float32", "float64"), ("float16", "bfloat16")
_PIXELS, _REACH = 2**31 - 1, 2**29  # `sampling.kernels` counts in int32; see REACH there
_BLOCK_BYTES = 256  # a row of a block of channels
_DEPTH = 288  # samples of a position that are multiplied at once
_TILE, _SMALL_TILE = 208, 64  # positions
_TILES = 4  # tiles for a thread
_TILE_BYTES = 1 << 20  # a tile's buffers stay in the second-level cache, and within what a thread may take
_TAPS_BYTES = 1 << 19  # so do the weights and sums of the taps that the backward pass takes at once
_ITEMS = 4  # work for this many threads in the backward pass, if it takes separate sums to make it
_MOST_ITEMS = 32  # work for as many, where it costs no more than _SUM_BYTES
_SUM_BYTES = 4 << 20
# Nanoseconds of a multiply-add, roughly: to decide what is too small to share out, and how often to listen for Ctrl-C.
_NANOSECONDS = 0.03
_COPY = 20  # a number moved, in multiply-adds
_SHARED_FROM = 100_000
_BURST = 60_000_000  # nanoseconds by this estimate; a fast processor needs a third of it


def reasons_against(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    reasons = []
    if find_spec("numba") is None:
        reasons.append("Numba is not installed")
    if device != "cpu":
        reasons.append(f"its kernels run on the CPU and the arrays are on {device}")
    if library not in ("numpy", "torch"):
        reasons.append(f"it reads NumPy arrays and what shares memory with them, not {library}'s")
    if computes_in(spec.dtype, library) not in DTYPES:
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


def computes_in(dtype: str, library: str) -> str:
    """PyTorch's half precision is brought to float32 and rounded once, at the end."""
    return "float32" if dtype in HALF and library == "torch" else dtype


def how(spec: ConvSpec, library: str) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    if not _is_shared(_multiplications(spec)):
        return ["the caller's thread computes it alone, since it is small"]
    return [f"work is shared out to {team_for(library)}"]


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
    x_size: int
    forward_weight_size: int
    forward_bytes: int
    forward: _Share
    strands: int
    chunk: int
    tile: int
    taps_at_once: int
    backward_weight_size: int
    slots: int
    parts: int
    lanes: int
    sums_size: int
    sums_rows: int
    sums_row: int
    backward_tile: int
    backward_taps: int
    backward: _Share


@lru_cache(maxsize=256)
def _plan(spec: ConvSpec, number: int) -> _Plan:
    """The plan for so many threads. It matters to the forward pass alone, where no sum depends on how positions are cut."""
    kernels = _kernels()
    item = np.dtype(spec.dtype).itemsize
    vector, full = kernels.VECTOR_BYTES // item, _BLOCK_BYTES // item
    channels, outputs, taps = spec.in_channels, spec.out_channels, spec.taps
    group_channels, group_outputs = channels // spec.groups, outputs // spec.groups
    depthwise = group_channels == 1 and group_outputs == 1

    span = group_channels if group_channels >= full else channels
    # Parts of a group of channels that are about equal, or several whole groups.
    width = _up(ceil(span / ceil(span / full)), vector) if span == group_channels else full // group_channels * group_channels
    width = min(width, span)
    x = Layout(span, width, channels // span * ceil(span / width), spec.pixels + 1)

    # Parts of a large group that are about equal; of small ones as many as a block has, and all taps if possible.
    part = _up(ceil(span / ceil(span / _DEPTH)), vector)
    chunk, depth = (min(part, span), _DEPTH) if span == group_channels else (width, 2 * _DEPTH)
    taps_at_once = 1 if depthwise or chunk < min(group_channels, span) else max(1, min(taps, depth // chunk))
    taps_at_once = ceil(taps / ceil(taps / taps_at_once))
    sum_row = outputs if depthwise else spec.groups * _up(group_outputs, vector)

    def forward_scratch(tile: int) -> tuple[int, int]:
        integers, reals = kernels.table_sizes(spec.rank, tile)
        column = tile * chunk * taps_at_once
        return integers, _up(reals, vector) + max(_up(tile * sum_row, vector) + column, vector * vector)

    tile = _forward_tile(spec, number, kernels.FEW_ROWS)
    while tile > kernels.FEW_ROWS and forward_scratch(tile)[1] * item > _TILE_BYTES:
        tile = _up(tile // 2, kernels.FEW_ROWS)

    tiles = spec.batch * ceil(spec.positions / max(1, tile))
    strands = max(1, min(number, tiles))
    blocks, share = x.blocks, channels // spec.offset_groups
    slots = max(_block(x, (g + 1) * share - 1) - _block(x, g * share) + 1 for g in range(spec.offset_groups))
    backward_tile = _even(spec.positions, _TILE, kernels.FEW_ROWS)
    parts = max(1, min(ceil(_ITEMS / max(1, spec.batch * blocks)), spec.positions // (4 * kernels.FEW_ROWS)))
    backward_tile = min(backward_tile, _up(ceil(spec.positions / parts), kernels.FEW_ROWS))
    part = max(backward_tile, _up(ceil(spec.positions / parts), backward_tile))
    parts = max(1, ceil(spec.positions / part))
    # A lane has sums of the size of the weight: many lanes where that is little, few where it is much.
    affordable = _SUM_BYTES // max(1, taps * group_channels * outputs * item)
    lanes = max(1, min(spec.batch * parts, max(ceil(_ITEMS / blocks), min(ceil(_MOST_ITEMS / blocks), affordable))))
    integers, reals = kernels.table_sizes(spec.rank, backward_tile)
    column = backward_tile * (_up(width, vector) + vector)
    backward_taps = max(1, _TAPS_BYTES // max(1, 2 * width * group_outputs * item))
    before = [before for before, _ in spec.padding]
    geometry = [spec.input_size, spec.kernel_size, spec.stride, before, spec.dilation, spec.output_size]
    x_size = x.blocks * spec.batch * x.pitch * x.width
    packed = taps * channels * (1 if depthwise else _up(group_outputs, vector))
    sums_rows, sums_row = (1, 1) if depthwise else (_up(group_outputs, kernels.FEW_ROWS), _up(group_channels, vector))
    return _Plan(
        geometry=np.array(geometry, np.int64),
        x=x,
        x_size=x_size,
        forward_weight_size=packed,
        forward_bytes=room(x_size, spec.dtype) + room(packed, spec.dtype),
        forward=_share(spec, number, _up(tiles, strands), _multiplications(spec), forward_scratch(tile)),
        strands=strands,
        chunk=chunk,
        tile=tile,
        taps_at_once=taps_at_once,
        backward_weight_size=taps * (channels if depthwise else outputs * _up(group_channels, vector)),
        slots=slots,
        parts=parts,
        lanes=lanes,
        sums_size=taps * spec.groups * sums_rows * sums_row,
        sums_rows=sums_rows,
        sums_row=sums_row,
        backward_tile=backward_tile,
        backward_taps=min(taps, backward_taps),
        backward=_share(
            spec, number, x.blocks * lanes, 2 * _multiplications(spec), (integers, _up(reals, vector) + 2 * column)
        ),
    )


def _block(layout: Layout, channel: int) -> int:
    """The block that a channel lies in."""
    return channel // layout.span * ceil(layout.span / layout.width) + channel % layout.span // layout.width


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _forward_tile(spec: ConvSpec, number: int, rows: int) -> int:
    """Positions of a tile: a few tiles for each thread if they stay large, else one for each."""
    tiles = ceil(spec.positions / _TILE)
    while spec.batch * tiles < _TILES * number and spec.positions >= 2 * _SMALL_TILE * tiles:
        tiles += 1
    while spec.batch * tiles < number and spec.positions >= 2 * rows * tiles:
        tiles += 1
    return _even(spec.positions, ceil(spec.positions / tiles), rows)


def _even(positions: int, tile: int, rows: int) -> int:
    """A tile no larger than `tile` that cuts the positions into runs of about equal length."""
    return max(rows, min(_up(tile, rows), _up(ceil(positions / max(1, ceil(positions / tile))), rows)))


def forward(spec: ConvSpec, input: Any, offset: Any, weight: Any, bias: Any, mask: Any, library: str = "numpy") -> np.ndarray:
    """The output (N, C_out, *O) for arrays that `spec` describes; in memory its channels come last if the input's do.

    `library` is where the arrays came from: its threads, if it lends them, do the work.
    """
    input, input_last = _flat_channels(input)
    output, flat_output = _empty_channels(spec.output_shape, spec.dtype, input_last)
    if output.size == 0:
        return output
    team = team_for(library)
    plan = _plan(spec, team.threads)
    weight, weight_last = _flat_channels(weight)
    offset, mask, image_offset, image_mask = _places(spec, offset, mask)
    bias = _empty(spec) if bias is None else _flat(bias)
    with arena(plan.forward_bytes + plan.forward.bytes) as memory:
        arguments = (
            spec.input_size, plan.geometry, spec.boundary == "inside", spec.batch,
            input, input_last, memory.empty(plan.x_size, spec.dtype), plan.x.span, plan.x.width,
            offset, mask, image_offset, image_mask,
            weight, weight_last, memory.empty(plan.forward_weight_size, spec.dtype), bias, flat_output, input_last,
            spec.out_channels, spec.groups, spec.offset_groups, spec.in_channels,
            plan.chunk, plan.tile, plan.taps_at_once, plan.strands, _empty(spec), *plan.forward.scratch(memory, spec.dtype),
        )  # fmt: skip
        _run(_kernels().forward, arguments, plan.forward, team, spec)
    return output


def backward(
    spec: ConvSpec,
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    mask: Any,
    wanted: Collection[str],
    library: str = "numpy",
) -> Gradients:
    """The wanted gradients; None for the others. That of the input has its channels last in memory if the input does."""
    input, input_last = _flat_channels(input)
    results = {}
    if "input" in wanted:
        results["input"], d_input = _empty_channels(spec.input_shape, spec.dtype, input_last)
    else:
        d_input = _empty(spec)
    shapes = {"offset": spec.offset_shape, "weight": spec.weight_shape}
    shapes |= {"bias": (spec.out_channels,)} if spec.biased else {}
    shapes |= {"mask": spec.mask_shape} if spec.masked else {}
    results |= {name: _aligned_empty(shape, spec.dtype) for name, shape in shapes.items() if name in wanted}
    if not results:
        return Gradients()
    if spec.batch * spec.positions * spec.in_channels * spec.out_channels * spec.pixels == 0:
        for result in results.values():
            result[...] = 0
        if "bias" in results and grad_output.size:
            results["bias"][...] = grad_output.reshape(spec.batch, spec.out_channels, -1).sum(axis=(0, 2))
        return Gradients(**results)

    team, kernels = team_for(library), _kernels()
    plan = _plan(spec, team.threads)
    flat = {name: results[name].reshape(-1) if name in results else _empty(spec) for name in GRADIENTS[1:]}
    grad_output, output_last = _flat_channels(grad_output)
    weight, weight_last = _flat_channels(weight)
    flat_offset, flat_mask, image_offset, image_mask = _places(spec, offset, mask)
    sizes = {
        "x": plan.x_size,
        "packed": plan.backward_weight_size,
        "d_output": (spec.batch * spec.positions + kernels.FEW_ROWS) * spec.out_channels,
        "d_x": plan.parts * plan.x_size if "input" in results else 0,
        "sums": plan.lanes * plan.sums_size if "weight" in results else 0,
        # Where a gradient that blocks of channels share is summed, if there are several.
        "offset": plan.slots * flat["offset"].size if plan.slots > 1 else 0,
        "mask": plan.slots * flat["mask"].size if plan.slots > 1 else 0,
    }
    with arena(sum(room(size, spec.dtype) for size in sizes.values()) + plan.backward.bytes) as memory:
        own = {name: memory.empty(size, spec.dtype) for name, size in sizes.items()}
        own["d_output"][-kernels.FEW_ROWS * spec.out_channels :] = 0
        places = {name: own[name] if plan.slots > 1 else flat[name] for name in ("offset", "mask")}
        if plan.slots > 1:  # an offset group may have fewer blocks than another
            own["offset"][...] = own["mask"][...] = 0
        arguments = (
            spec.input_size, plan.geometry, spec.boundary == "inside", spec.batch,
            grad_output, output_last, own["d_output"], input, input_last, own["x"], plan.x.span, plan.x.width,
            flat_offset, flat_mask, image_offset, image_mask, weight, weight_last, own["packed"],
            own["d_x"], places["offset"], places["mask"], own["sums"], flat["bias"],
            spec.out_channels, spec.groups, spec.offset_groups, spec.in_channels,
            plan.parts, plan.lanes, plan.sums_row, plan.backward_tile, plan.backward_taps, _empty(spec),
            *plan.backward.scratch(memory, spec.dtype),
        )  # fmt: skip
        share = plan.backward if results.keys() != {"bias"} else plan.backward._replace(items=1)
        _run(kernels.backward, arguments, share, team, spec)
        sums = [_empty(spec)] * 4 if plan.slots == 1 else [own["offset"], flat["offset"], own["mask"], flat["mask"]]
        moves = (
            own["d_x"], plan.x.span, plan.x.width, plan.x.pitch, plan.parts, d_input, input_last, spec.in_channels, spec.batch,
            own["sums"], plan.lanes, plan.sums_rows, plan.sums_row,
            spec.groups, spec.out_channels // spec.groups, spec.in_channels // spec.groups, spec.taps, flat["weight"],
            *sums, _empty(spec),
        )  # fmt: skip
        items = spec.out_channels if "weight" in results else 0
        items += spec.batch * ceil(spec.pixels / kernels.RUN) if "input" in results else 0
        items += ceil(sums[1].size / kernels.SUMS) + ceil(sums[3].size / kernels.SUMS)
        moved = own["d_x"].size + own["sums"].size + sums[0].size + sums[2].size
        _run(kernels.collect, moves, _share(spec, team.threads, items, moved * _COPY), team, spec)
    return Gradients(**results)


def _multiplications(spec: ConvSpec) -> int:
    """Multiply-adds of a forward pass, those of the sampling counted as so many."""
    return spec.batch * spec.positions * spec.taps * spec.in_channels * (spec.out_channels // spec.groups + 4 * 2**spec.rank)


def _is_shared(multiplications: int) -> bool:
    """Whether it is more work than sharing it out costs."""
    return multiplications * _NANOSECONDS > _SHARED_FROM


class _Share(NamedTuple):
    """How the items of a kernel's work are shared out."""

    items: int
    threads: int
    burst: int  # items that the caller takes before it listens for Ctrl-C
    reals: int = 0  # that every thread needs for itself
    integers: int = 0  # int32 numbers, likewise
    bytes: int = 0  # of all threads' scratch memory

    def scratch(self, memory: Arena, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Every thread's scratch memory: a row of reals and a row of int32 numbers."""
        return memory.empty((self.threads, self.reals), dtype), memory.empty((self.threads, self.integers), "int32")


def _share(spec: ConvSpec, threads: int, items: int, multiplications: int, scratch: tuple[int, int] = (0, 0)) -> _Share:
    threads = max(1, min(threads, items)) if _is_shared(multiplications) else 1
    burst = int(_BURST * items / max(multiplications * _NANOSECONDS, 1))
    integers, reals = (_up(number, ALIGNMENT) for number in scratch)  # a thread's row begins at a cache line
    size = room(threads * reals, spec.dtype) + room(threads * integers, "int32")
    return _Share(items, threads, burst, reals, integers, size)


def _run(kernel: Any, arguments: tuple[Any, ...], share: _Share, team: Team, spec: ConvSpec) -> None:
    """Do a kernel's work, on an OpenMP team or on threads of our own."""
    if team.runtime is not None and share.threads > 1 and share.burst and not team.runtime.is_resting:
        kind = (spec.dtype, spec.rank)  # kernels are compiled for each
        _kernels().run_on_team(
            kernel, arguments, kind, share.items, threads=share.threads, burst=share.burst, team=team
        )  # fmt: skip
        return

    def work(counter: np.ndarray, limit: int, thread: int) -> None:
        kernel(counter, limit, thread, *arguments)

    threads.run(work, share.items, threads=share.threads, burst=share.burst)


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


def _flat(array: Any) -> np.ndarray:
    """The array's numbers in C order, aligned, in the machine's byte order, as kernels are compiled for."""
    if array.flags.carray and array.dtype.isnative:
        result: np.ndarray = array.reshape(-1)
        return result
    array = np.require(array, array.dtype.newbyteorder("="), ["C", "A"]).reshape(-1)
    return array if array.flags.writeable else np.asarray(_Memory(array, array.shape))


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
        return _flat(array), image
    step = step if len(array) > 1 else image
    return np.asarray(_Memory(array, (step * (len(array) - 1) + image,))), step


def _flat_channels(array: Any) -> tuple[np.ndarray, bool]:
    """An array (N, C, ...) flat, and whether its channels come last in memory; no copy if they do, or come second."""
    if not array.flags.c_contiguous and array.ndim > 2:
        moved = np.moveaxis(array, 1, -1)
        if moved.flags.c_contiguous:
            return _flat(moved), True
    return _flat(array), False


def _aligned_empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """As np.empty; where rows are whole cache lines, a vector that crosses two of them costs a fifth of a forward call."""
    size = prod(shape) * np.dtype(dtype).itemsize
    return aligned(size).view(dtype).reshape(shape)


def _empty_channels(shape: tuple[int, ...], dtype: str, last: bool) -> tuple[np.ndarray, np.ndarray]:
    """An uninitialised array (N, C, ...), with its channels last in memory if so wished, and the same flat."""
    array = _aligned_empty((shape[0], *shape[2:], shape[1]) if last else shape, dtype)
    return np.moveaxis(array, -1, 1) if last else array, array.reshape(-1)


def warmup(
    dtypes: Iterable[str] = ("float32",),
    ranks: Iterable[int] = (1, 2, 3),
    notify: Callable[[str], None] | None = None,
) -> None:
    """Compile, or load, every kernel that a forward and a backward call takes, for the given dtypes and ranks.

    `notify` is called with a line before each of them.
    """
    kernels = _kernels()
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
                y = forward(spec, x, offset, weight, None, mask)
                backward(spec, y, x, offset, weight, mask, ("input", "offset", "weight", "mask"))
            for kernel in (kernels.forward, kernels.backward, kernels.collect):
                kernels.compile_for_teams(kernel)
    finally:
        notice.announce = told
