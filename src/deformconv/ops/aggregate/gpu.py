"""Deformable aggregation on a GPU: a call's tensors, brought to the kernels of `gpu_kernels`.

One kernel samples and sums. The gradient of the input is collected, pixel by pixel, from samples that were sorted: nothing is
added by atomics, and results are the same bit for bit each time; only where offset groups have few channels it is added up by
atomics, as in `ops.conv.gpu`. No step waits for the GPU. Offsets and masks are read, and
their gradients written, where they lie, channels first or last.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache, lru_cache
from math import gcd, prod
from typing import Any, Literal, NamedTuple

from deformconv.ops import gpu as on_gpu
from deformconv.ops.aggregate.spec import AggregateSpec, Gradients, aggregate_spec
from deformconv.ops.backends import as_given as computes_in
from deformconv.ops.operator import Operand
from deformconv.ops.taps import gpu as on_taps
from deformconv.runtime import tiles, turned
from deformconv.sampling import lists

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against", "warmup"]

Tensor = Any

TAKES: Literal["native"] = "native"
DETERMINISTIC = True
_PIECE = 1 << 22  # samples at once of which the input's gradient is collected: lists take some 60 bytes for each


class _Plan(NamedTuple):
    """What both kernels of a call need."""

    sizes: tuple[int, ...]  # P, pixels, C, GC, G, Z, Y, X, OY, OX
    constants: dict[str, Any]
    row_span: int  # how many rows surely are of one image


def reasons_against(spec: AggregateSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    return on_taps.reasons_against(spec, library, device)


def how(spec: AggregateSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return ["one kernel samples and sums" + on_gpu.words_of_adding(backward and _adds(spec, device))]


def _adds(spec: AggregateSpec, device: str) -> bool:
    """Whether the input's gradient is added up by atomics."""
    return on_gpu.adds(spec.group_channels, device)


@cache
def _kernels() -> Any:
    """The kernels' module, which loads Triton: the first call does it."""
    from deformconv.ops.aggregate import gpu_kernels

    return gpu_kernels


@lru_cache(maxsize=256)
def _plan(spec: AggregateSpec) -> _Plan:
    return _Plan(
        sizes=(
            spec.positions, spec.pixels, spec.channels, spec.group_channels, spec.offset_groups, *on_taps.sizes(spec),
        ),
        constants={**on_taps.constants(spec, _largest(spec)), "SPAN": gcd(spec.group_channels, 16)},
        row_span=on_taps.row_span(spec),
    )  # fmt: skip


def _largest(spec: AggregateSpec) -> int:
    """The most numbers that an array of a call has, of those that kernels go through, or lists."""
    arrays = map(prod, (spec.input_shape, spec.offset_shape, spec.output_shape))
    images = _images_of_piece(spec)
    return max(*arrays, images * _samples(spec) * 2**spec.rank, _lists(spec, images).number)


def _samples(spec: AggregateSpec) -> int:
    """The samples of an image."""
    return spec.offset_groups * spec.taps * spec.positions


def forward(spec: AggregateSpec, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
    """The output (N, C, *O); in memory its channels come last if the input's do."""
    rows = input.new_empty(spec.batch, *spec.output_size, spec.channels)
    if rows.numel():
        plan, number = _plan(spec), spec.batch * spec.positions
        tile, block = tiles.tile(spec.group_channels)
        x, last, (offset, mask) = turned.rows(input), _last(offset, mask), _read(offset, mask)
        _kernels().aggregate[-(-number // tile) * spec.offset_groups * -(-spec.group_channels // block),](
            x, offset, x if mask is None else mask, rows, number, *plan.sizes, **plan.constants, LAST=last,
            ROW_SPAN=_row_span(plan, last, tile), BR=tile, BC=block, num_warps=4,
        )  # fmt: skip
    return turned.formed(rows, input)


def _read(*tensors: Tensor | None) -> list[Tensor | None]:
    """Offsets and masks as kernels read them: channels last if they are so, else first."""
    return [None if tensor is None else tensor.contiguous(memory_format=_form(tensor)) for tensor in tensors]


def _last(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Of offsets and masks whether their channels are last in memory."""
    import torch

    return tuple(tensor is not None and _form(tensor) is not torch.contiguous_format for tensor in tensors)


def _row_span(plan: _Plan, last: tuple[bool, ...], tile: int) -> int:
    """How many of a block's rows surely are of one image; where channels lie last nothing is gained by knowing it."""
    return 1 if last[0] else min(plan.row_span, tile)


def _form(tensor: Tensor) -> Any:
    from torch._prims_common import suggest_memory_format

    return suggest_memory_format(tensor)


def backward(
    spec: AggregateSpec, grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, wanted: Collection[str]
) -> Gradients:
    """The wanted gradients; None for the others. They lie in memory as their arguments do, channels last or first."""
    import torch

    given = {"input": input, "offset": offset} | ({} if mask is None else {"mask": mask})
    given = {name: tensor for name, tensor in given.items() if name in wanted}
    if spec.batch * spec.positions * spec.channels * spec.pixels == 0 or not given:
        return Gradients(**{name: torch.zeros_like(tensor) for name, tensor in given.items()})
    last, (offset, mask) = _last(offset, mask), _read(offset, mask)
    positions, adds = given.keys() & {"offset", "mask"}, "input" in given and _adds(spec, str(input.device))
    shape_of_rows = (spec.batch, *spec.input_size, spec.channels)
    whole = on_taps.Part(
        x=turned.rows(input),
        offset=offset,
        mask=mask,
        grad=turned.rows(grad_output),
        d_x=lists.room(input, shape_of_rows, adds) if "input" in given else None,
        d_offset=torch.empty_like(offset) if positions else None,
        d_mask=torch.empty_like(mask) if positions and mask is not None else None,
    )
    for part in on_taps.parts(whole, _images_of_piece(spec)):
        _backward_of(spec, part, last, adds)
    found = {"offset": whole.d_offset, "mask": whole.d_mask}
    if whole.d_x is not None:
        found["input"] = turned.formed(whole.d_x, input)
    return Gradients(**{name: found[name] for name in given})


def _images_of_piece(spec: AggregateSpec) -> int:
    """As many images as bound the memory of lists, one at the least."""
    return max(1, min(spec.batch, _PIECE // max(1, _samples(spec))))


def _lists(spec: AggregateSpec, images: int) -> lists.Lists:
    """The lists of samples, of which an offset group has its own."""
    return lists.Lists(images, spec.input_size, spec.offset_groups, spec.group_channels)


def _backward_of(spec: AggregateSpec, part: on_taps.Part, last: tuple[bool, ...], adds: bool) -> None:
    """Write the part's gradients."""
    plan, images, groups = _plan(spec), len(part.x), spec.offset_groups
    rows, own, keys, shares = images * spec.positions, _lists(spec, images), None, None
    if part.d_x is not None and not adds:
        keys, shares = lists.entries(own, images * _samples(spec), part.x)
    given = part.mask, part.d_offset, part.d_mask, keys, shares, part.d_x if adds else None
    mask, *arrays = (part.x if tensor is None else tensor for tensor in given)
    block = tiles.power(spec.group_channels)
    tile = max(1, min(128, 1024 // block))
    programs = -(-rows // tile) * groups
    taps = tiles.shared(spec.taps, programs)
    _kernels().aggregate_backward[programs, -(-spec.taps // taps)](
        part.x, part.offset, mask, part.grad, *arrays, rows, *plan.sizes, taps, **plan.constants, LAST=last,
        POSITIONS=part.d_offset is not None, ENTRIES=keys is not None, SCATTER=adds,
        ROW_SPAN=_row_span(plan, last, tile), BR=tile, BC=block, num_warps=4,
    )  # fmt: skip
    if keys is not None:
        C = spec.channels
        of_gradient = lists.Rows(spec.positions, groups, spec.taps, C, 0, C, 0, plan.constants["SPAN"])
        lists.collect(own, of_gradient, keys, shares, part.grad, part.d_x, plan.constants["INDEX"])


def warmup(dtypes: Collection[str], device: str) -> None:
    """Compile the kernels that InternImage's calls take on a device, forward and backward; Triton keeps them on disk."""
    import torch

    for name in dtypes:
        dtype, precise = getattr(torch, name), torch.float64 if name == "float64" else torch.float32
        x = torch.zeros(1, 64, 16, 16, device=device, dtype=dtype)
        offset, mask = (torch.zeros(1, channels, 16, 16, device=device, dtype=precise) for channels in (72, 36))
        x, offset, mask = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, offset, mask))
        operands = (Operand(tuple(tensor.shape), name) for tensor in (x, offset, mask))
        spec = aggregate_spec(*operands, padding=1)
        backward(spec, forward(spec, x, offset, mask), x, offset, mask, ("input", "offset", "mask"))
