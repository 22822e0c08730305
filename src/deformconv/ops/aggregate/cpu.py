"""Deformable aggregation on the CPU: a call's arrays, brought to the kernels of `cpu_kernels`, and how the work is cut.

Offsets, masks, the output and all gradients are read and written where they lie, channels first or last; the input is copied
once, with the channels of a group side by side. Every number is a sum in an order that the shapes of one image alone determine:
results are the same bit for bit whatever the number of threads, and whatever other images there are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache, lru_cache, partial
from itertools import product
from math import ceil, prod
from typing import Any, Literal, NamedTuple

import numpy as np

from deformconv.ops import cpu as on_cpu
from deformconv.ops.aggregate.spec import AggregateSpec, Gradients, aggregate_spec
from deformconv.ops.operator import Operand
from deformconv.ops.operator import half_in_float32 as computes_in
from deformconv.ops.taps.reach import reasons_against_int32
from deformconv.runtime import arrays, threads
from deformconv.runtime.memory import arena, room, up
from deformconv.runtime.openmp import team_for
from deformconv.runtime.work import Share, run, share

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against", "warmup"]

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True
_PER_SAMPLE = 40  # multiply-adds that take as long as placing a sample
_ITEMS = 8  # of a thread, if there is enough to do
_ITEM = 250_000  # multiply-adds that an item should have
_WIDTH = 256  # bytes of a row of channels, the most in which one item adds up the input's gradient
_LEAST = 8  # channels, the least
_NOTHING = (0, 0, 1)  # the distances in an array that is not there
_NUMBERS = 2**32  # of an image in a group, from which on the tables' numbers of rows do not suffice


def reasons_against(spec: AggregateSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    reasons = on_cpu.reasons_against(spec.dtype, library, device) + reasons_against_int32(spec)
    if (spec.pixels + 2**spec.rank) * spec.group_channels >= _NUMBERS:
        reasons.append(f"{spec.pixels} pixels of {spec.group_channels} channels a group exceed its 32-bit numbers")
    return reasons


def how(spec: AggregateSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return on_cpu.how(_multiplications(spec), library)


@cache
def _kernels() -> Any:
    """The kernels' module; it loads Numba, so the first call does it and not the import of this file."""
    with threads.importing:
        from deformconv.ops.aggregate import cpu_kernels
    return cpu_kernels


def _multiplications(spec: AggregateSpec) -> int:
    """Multiply-adds of a forward pass; to sample a corner counts as one."""
    samples = spec.batch * spec.positions * spec.taps * spec.offset_groups
    return samples * (2**spec.rank * spec.group_channels + _PER_SAMPLE)


class Plan(NamedTuple):
    """How a call is cut, in both directions."""

    arguments: tuple[Any, ...]  # the kernels' `plan`
    together: tuple[Any, ...] | None  # and that of a backward pass whose items compute all gradients; None if that is slower
    copy: int  # numbers of the input's copy
    forward: Share
    sums: tuple[int, int]  # items that add up the input's gradient, and the numbers of scratch memory that one needs
    scratch: tuple[int, int]


@lru_cache(maxsize=256)
def _plan(spec: AggregateSpec, number: int) -> Plan:
    kernels, width, images, groups = _kernels(), spec.group_channels, spec.batch, spec.offset_groups
    work = _multiplications(spec)
    wanted = max(1, min(_ITEMS * number, work // _ITEM))
    tiles = ceil(spec.positions / kernels.TILE)
    length = ceil(tiles / min(tiles, ceil(wanted / images)))
    runs = ceil(tiles / length)
    bunch = ceil(groups / min(groups, ceil(wanted / (images * runs))))
    # A backward pass is shorter if one item computes all gradients, but there are only so many of these.
    most = _WIDTH // np.dtype(spec.dtype).itemsize
    is_even = ceil(images * groups / number) * number <= 1.3 * images * groups
    blocks = 1 if width <= most and is_even else max(ceil(width / most), ceil(2 * number / (images * groups)))
    block = min(width, up(ceil(width / blocks), _LEAST))
    shape = kernels.Shape(
        images=images,
        positions=spec.positions,
        pixels=spec.pixels,
        taps=spec.taps,
        channels=spec.channels,
        groups=groups,
        inside=spec.boundary == "inside",
        run=length * kernels.TILE,
        bunch=bunch,
        width=block,
        both=False,
    )
    before = [before for before, _ in spec.padding]
    geometry = [spec.input_size, spec.kernel_size, spec.stride, before, spec.dilation, spec.output_size]
    shifts = np.array(list(np.ndindex(spec.kernel_size)), np.int64) * np.array(spec.dilation)
    common = spec.input_size, np.array(geometry, np.int64), shifts.reshape(-1)
    pitch = spec.pixels + 2**spec.rank
    scratch = kernels.scratch_sizes(spec.rank, spec.taps, width)
    return Plan(
        arguments=(*common, np.array(shape, np.int64)),
        together=(*common, np.array(shape._replace(both=True), np.int64)) if width <= most and is_even else None,
        copy=images * pitch * spec.channels,
        forward=share(images * runs * ceil(groups / bunch), number, work, spec.dtype, scratch),
        sums=(images * groups * ceil(width / block), pitch * block),
        scratch=scratch,
    )


@lru_cache(maxsize=256)
def _backward_plan(spec: AggregateSpec, number: int, sums: bool, others: bool) -> tuple[tuple[Any, ...], int, Share]:
    """The kernel's `plan`, the numbers of the input's copy, and how the work is shared out.

    `sums` says whether it is for the input's gradient, `others` whether for the others.
    """
    plan = _plan(spec, number)
    (integers, reals), (items, own) = plan.scratch, plan.sums if sums else (0, 0)
    arguments = plan.together if sums and others and plan.together is not None else plan.arguments
    if others and arguments is not plan.together:
        items += plan.forward.items
    work = _multiplications(spec) * (sums + others)
    shared = share(items, number, work, spec.dtype, (integers, reals + own))
    return arguments, plan.copy if others else 0, shared


def forward(spec: AggregateSpec, input: Any, offset: Any, mask: Any, library: str = "numpy") -> np.ndarray:
    """The output (N, C, *O) for arrays that `spec` describes; in memory its channels come last if the input's do."""
    input, last = arrays.flat_channels(input)
    output, flat_output = arrays.empty_channels(spec.output_shape, spec.dtype, last)
    if output.size == 0:
        return output
    team = team_for(library)
    plan = _plan(spec, team.threads)
    offset, of_offset = arrays.flat_axes(offset)
    mask, of_mask = _mask(spec, mask)
    order = _dense(spec.input_shape, last), of_offset, of_mask, _dense(spec.output_shape, last)
    with arena(room(plan.copy, spec.dtype) + plan.forward.bytes) as memory:
        x = memory.empty(plan.copy, spec.dtype)
        given = _kernels().ForwardArrays(input, x, offset, mask, flat_output, arrays.none_of(spec.dtype))
        arguments = plan.arguments, order, tuple(given), *plan.forward.scratch(memory, spec.dtype)
        run(_kernels().forward, arguments, plan.forward, team, (spec.dtype, spec.rank))
    return output


def _mask(spec: AggregateSpec, mask: Any) -> tuple[np.ndarray, tuple[int, int, int]]:
    return (arrays.none_of(spec.dtype), _NOTHING) if mask is None else arrays.flat_axes(mask)


def _dense(shape: tuple[int, ...], last: bool) -> tuple[int, int, int]:
    """How far apart the images, the channels and the positions of an array of either order are."""
    _, channels, *sizes = shape
    positions = prod(sizes)
    return (channels * positions, 1, channels) if last else (channels * positions, positions, 1)


def backward(
    spec: AggregateSpec,
    grad_output: Any,
    input: Any,
    offset: Any,
    mask: Any,
    wanted: Collection[str],
    library: str = "numpy",
) -> Gradients:
    """The wanted gradients; None for the others. In memory each has its channels last if its argument does."""
    input, input_last = arrays.flat_channels(input)
    grad_output, of_grad = arrays.flat_axes(grad_output)
    offset, of_offset = arrays.flat_axes(offset)
    mask, of_mask = _mask(spec, mask)
    is_last = {"input": input_last, "offset": of_offset[2] != 1, "mask": of_mask[2] != 1}
    shapes = {name: shape for name, shape in spec.shapes.items() if name in wanted}
    made = {name: arrays.empty_channels(shape, spec.dtype, is_last[name]) for name, shape in shapes.items()}
    found = Gradients(**{name: result for name, (result, _) in made.items()})
    if not made:
        return found
    if spec.batch * spec.positions * spec.pixels == 0:
        for _, numbers in made.values():
            numbers[...] = 0
        return found
    none, team = arrays.none_of(spec.dtype), team_for(library)
    cut, size, shared = _backward_plan(spec, team.threads, "input" in made, bool({"offset", "mask"} & made.keys()))
    results = Gradients(*(made[name][1] if name in made else none for name in Gradients._fields))
    order = Gradients(*(_dense(shapes[name], is_last[name]) if name in made else _NOTHING for name in Gradients._fields))
    with arena(room(size, spec.dtype) + shared.bytes) as memory:
        x = memory.empty(size, spec.dtype) if size else none
        given = _kernels().BackwardArrays(grad_output, input, x, offset, mask, *results, none)
        distances = of_grad, _dense(spec.input_shape, input_last), of_offset, of_mask, *order
        arguments = cut, distances, tuple(given), *shared.scratch(memory, spec.dtype)
        run(_kernels().backward, arguments, shared, team, (spec.dtype, spec.rank))
    return found


def warmup(
    dtypes: Iterable[str] = ("float32",),
    ranks: Iterable[int] = (1, 2, 3),
    notify: Callable[[str], None] | None = None,
) -> None:
    """Compile, or load, every kernel that calls take, for the given dtypes and ranks.

    `notify` gets a line before each of them.
    """
    kernels = _kernels()
    calls = ((f"{dtype}, {rank}-D, aggregation", partial(_warm, dtype, rank)) for dtype, rank in product(dtypes, ranks))
    on_cpu.warm(calls, (kernels.forward, kernels.backward), notify)


def _warm(dtype: str, rank: int) -> None:
    """A call in both directions."""
    ones = (1,) * rank
    shapes = (1, 1, *ones), (1, rank, *ones), (1, 1, *ones)
    input, offset, mask = (np.zeros(shape, dtype) for shape in shapes)
    spec = aggregate_spec(*(Operand(shape, dtype) for shape in shapes), kernel_size=1)
    y = forward(spec, input, offset, mask)
    backward(spec, y, input, offset, mask, ("input", "offset", "mask"))
