"""Deformable RoI pooling on a GPU: a call's tensors, brought to the kernels of `gpu_kernels`.

One kernel samples and averages. The gradient of the input is collected, pixel by pixel, from samples that were sorted: nothing
is added by atomics, and results are the same bit for bit each time. No step waits for the GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from itertools import pairwise
from math import gcd, prod
from typing import Any, Literal, NamedTuple

from deformconv.ops import gpu as on_gpu
from deformconv.ops.backends import as_given as computes_in
from deformconv.ops.operator import Operand
from deformconv.ops.roi_pool.spec import Gradients, RoiSpec, roi_spec
from deformconv.runtime import tiles, turned
from deformconv.sampling import lists

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against", "warmup"]

Tensor = Any

TAKES: Literal["native"] = "native"
DETERMINISTIC = True
_PIECE = 1 << 22  # samples at once of which the input's gradient is collected: lists take some 60 bytes for each


class _Plan(NamedTuple):
    """What both kernels of a call need."""

    sizes: tuple[int, ...]  # N, pixels, C, C_out, a class' channels, classes, Y, X
    factors: tuple[int, int]  # spatial_scale and gamma, as bits
    constants: dict[str, Any]


def reasons_against(spec: RoiSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    reasons = on_gpu.reasons_against(spec.dtype, library, device)
    if spec.sampling_ratio == 0:
        reasons.append("with sampling_ratio=0 boxes decide how many samples there are, and to ask them is to wait for the GPU")
    if prod(size + 1 for size in spec.input_size) >= 2**31:
        reasons.append(f"a map of {spec.pixels} pixels exceeds its 32-bit pixel numbers")
    return reasons


def how(spec: RoiSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return ["one kernel samples and averages"]


@cache
def _kernels() -> Any:
    """The kernels' module, which loads Triton: the first call does it."""
    from deformconv.ops.roi_pool import gpu_kernels

    return gpu_kernels


@lru_cache(maxsize=256)
def _plan(spec: RoiSpec) -> _Plan:
    import triton.language as tl

    return _Plan(
        sizes=(
            spec.batch, spec.pixels, spec.channels, spec.out_channels, spec.class_channels, spec.classes, *spec.input_size,
        ),
        factors=(_bits(spec.spatial_scale), _bits(spec.gamma)),
        constants={
            "SIZES": (*spec.output_size, *spec.group_size, *spec.part_size, spec.sampling_ratio),
            "CONVENTION": spec.convention,
            "DEFORMED": spec.deformed,
            "MASKED": spec.masked,
            "ACC": tl.float64 if spec.dtype == "float64" else tl.float32,
            "INDEX": tl.int32 if _largest(spec) < 2**31 else tl.int64,
            "SPAN": gcd(spec.class_channels, 16),
        },
    )  # fmt: skip


def _bits(number: float) -> int:
    """The bits of a float64 number, as an integer with a sign."""
    found: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return found


def _largest(spec: RoiSpec) -> int:
    """The most numbers that an array of a call has, of those that kernels go through, or lists."""
    arrays = map(prod, (spec.input_shape, spec.output_shape, spec.offset_shape))
    of_bins = 2 * spec.boxes * spec.classes * spec.bins
    of_samples = 4 * min(spec.boxes, _boxes_of_piece(spec)) * spec.classes * spec.bins * spec.sampling_ratio**2
    return max(*arrays, 5 * spec.boxes, of_bins, of_samples, _lists(spec).number)


def forward(spec: RoiSpec, input: Tensor, boxes: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
    """The output (R, C_out, PH, PW); in memory its channels come last if the input's do.

    Boxes of an image that is not there have NaN, where nobody has looked at their values before.
    """
    output = input.new_empty(spec.boxes, *spec.output_size, spec.out_channels)
    if output.numel():
        plan, rows = _plan(spec), spec.boxes * spec.bins
        x = turned.rows(_by_group(spec, input))
        tile, block = tiles.tile(spec.class_channels)
        _kernels().pool[-(-rows // tile), spec.classes * -(-spec.class_channels // block)](
            x, *_contiguous(x, boxes, offset, mask), output, rows, *plan.sizes, *plan.factors, **plan.constants,
            BR=tile, BC=block, **_OPTIONS,
        )  # fmt: skip
    return turned.formed(output, input)


# A product and a sum are rounded apart, as everywhere else: where a sample lies is the same bit for bit then, and on which side
# of a pixel, or of what counts.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def _contiguous(none: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Tensors as kernels read them; those that are not given stand for nothing."""
    return [none if tensor is None else tensor.contiguous() for tensor in tensors]


def _by_group(spec: RoiSpec, input: Tensor) -> Tensor:
    """The input with the channels of a group side by side; a copy if there are several groups."""
    groups = prod(spec.group_size)
    if groups == 1:
        return input
    apart = input.reshape(spec.batch, spec.out_channels, groups, *spec.input_size)
    return apart.swapaxes(1, 2).reshape(spec.input_shape)


def _as_channels(spec: RoiSpec, d_input: Tensor) -> Tensor:
    """The input's gradient in the order of its channels."""
    groups = prod(spec.group_size)
    if groups == 1:
        return d_input
    apart = d_input.reshape(spec.batch, groups, spec.out_channels, *spec.input_size)
    return apart.swapaxes(1, 2).reshape(spec.input_shape)


def backward(
    spec: RoiSpec, grad_output: Tensor, input: Tensor, boxes: Tensor, offset: Tensor | None, mask: Tensor | None,
    wanted: Collection[str],
) -> Gradients:  # fmt: skip
    """The wanted gradients; None for the others. That of the input has its channels last in memory if the input does."""
    import torch

    given = {"input": input, "offset": offset, "mask": mask}
    given = {name: tensor for name, tensor in given.items() if tensor is not None and name in wanted}
    if spec.boxes * spec.batch == 0 or not given:
        return Gradients(**{name: torch.zeros_like(tensor) for name, tensor in given.items()})
    exact = torch.float64 if spec.dtype == "float64" else torch.float32
    by_bin, positions = (spec.boxes, spec.classes, 2, *spec.output_size), given.keys() & {"offset", "mask"}
    d_offset = input.new_empty(by_bin, dtype=exact) if positions and spec.deformed else None
    d_mask = input.new_empty(by_bin[:2] + by_bin[3:], dtype=exact) if positions and spec.masked else None
    x = turned.rows(_by_group(spec, input))
    boxes, offset, mask = _contiguous(x, boxes, offset, mask)
    call = _Call(x, boxes, offset, mask, turned.rows(grad_output), d_offset, d_mask)
    found: dict[str, Any] = {}
    d_x = _whole_backward(spec, call, "input" in given)
    if d_x is not None:
        found["input"] = _as_channels(spec, turned.formed(d_x.to(input.dtype), input))
    if "offset" in given:
        found["offset"] = _by_part(spec, d_offset).reshape(spec.offset_shape).to(given["offset"].dtype)
    if d_mask is not None and "mask" in given:
        found["mask"] = d_mask.sum(1, keepdim=True).to(given["mask"].dtype)
    return Gradients(**found)


class _Call(NamedTuple):
    """What a backward pass reads, and where results of boxes go."""

    x: Tensor  # (N, Y, X, groups * C_out)
    boxes: Tensor
    offset: Tensor
    mask: Tensor
    grad: Tensor  # (R, PH, PW, C_out)
    d_offset: Tensor | None  # (R, classes, 2, PH, PW)
    d_mask: Tensor | None  # (R, classes, PH, PW)


def _whole_backward(spec: RoiSpec, call: _Call, of_input: bool) -> Tensor | None:
    """Write the gradients of boxes, and return the input's (N, Y, X, groups * C_out), if it is wanted."""
    d_x: Tensor | None = None
    for piece in _pieces(spec):
        part = replace(spec, boxes=piece.stop - piece.start)
        own = _Call(call.x, *(None if t is None else t if t is call.x else t[piece] for t in call[1:]))
        entries = _sample_backward(part, own, of_input)
        if entries is not None:
            found = _collect(part, own, *entries, exact=part.boxes < spec.boxes)
            d_x = found if d_x is None else d_x.add_(found)
    return d_x


def _pieces(spec: RoiSpec) -> Iterator[slice]:
    """As many boxes at a time as bound the memory of lists, one at the least."""
    each = _boxes_of_piece(spec)
    for first in range(0, spec.boxes, each):
        yield slice(first, min(first + each, spec.boxes))


def _boxes_of_piece(spec: RoiSpec) -> int:
    return max(1, _PIECE // (spec.classes * spec.bins * max(1, spec.sampling_ratio) ** 2))


def _sample_backward(spec: RoiSpec, call: _Call, of_input: bool) -> tuple[Tensor, Tensor] | None:
    """Write the gradients of boxes, and return each sample's list and its shares of pixels, if they are asked for."""
    plan, rows, none = _plan(spec), spec.boxes * spec.bins, call.x
    entries = None
    if of_input:
        entries = lists.entries(_lists(spec), rows * spec.classes * spec.sampling_ratio**2, none)
    arrays = [none if tensor is None else tensor for tensor in (call.d_offset, call.d_mask, *(entries or (None, None)))]
    tile, block = tiles.tile(spec.class_channels)
    _kernels().pool_backward[-(-rows // tile), spec.classes](
        *call[:5], *arrays, rows, *plan.sizes, *plan.factors, **plan.constants,
        POSITIONS=call.d_offset is not None or call.d_mask is not None, ENTRIES=entries is not None,
        BR=tile, BC=block, **_OPTIONS,
    )  # fmt: skip
    return entries


def _lists(spec: RoiSpec) -> lists.Lists:
    """The lists of samples, of which each class of each group has its own."""
    return lists.Lists(spec.batch, spec.input_size, prod(spec.group_size) * spec.classes, spec.class_channels)


def _collect(spec: RoiSpec, call: _Call, keys: Tensor, shares: Tensor, exact: bool) -> Tensor:
    """The input's gradient, (N, Y, X, groups * C_out): at each pixel the sum of the samples near it."""
    import torch

    d_x = torch.empty_like(call.x, dtype=shares.dtype if exact else call.x.dtype)
    out_channels, samples = spec.out_channels, spec.sampling_ratio**2
    rows = lists.Rows(spec.bins, spec.classes, samples, out_channels, 0, out_channels, 0, gcd(spec.class_channels, 16))
    lists.collect(_lists(spec), rows, keys, shares, call.grad, d_x, _plan(spec).constants["INDEX"])
    return d_x


def _by_part(spec: RoiSpec, d_offset: Tensor) -> Tensor:
    """The offsets' gradient, summed over the bins of each part, which follow one another along an axis."""
    import torch

    for axis, (bins, parts) in zip((3, 4), zip(spec.output_size, spec.part_size, strict=True), strict=True):
        if bins != parts:
            firsts = [-(-part * bins // parts) for part in range(parts + 1)]
            sums = [d_offset.narrow(axis, first, end - first).sum(axis) for first, end in pairwise(firsts)]
            d_offset = torch.stack(sums, axis)
    return d_offset


def warmup(dtypes: Collection[str], device: str) -> None:
    """Compile the kernels that a detector's calls take on a device, forward and backward; Triton keeps them on disk."""
    import torch

    for name in dtypes:
        for masked in (False, True):
            for convention in ("aligned", "unaligned"):
                dtype = getattr(torch, name)
                precise = torch.float64 if name == "float64" else torch.float32
                x, grad_output = torch.zeros(1, 256, 16, 16), torch.zeros(2, 256, 7, 7)
                boxes, offset, mask = torch.zeros(2, 5), torch.zeros(2, 2, 7, 7), torch.ones(2, 1, 7, 7)
                x, grad_output = (tensor.to(device, dtype) for tensor in (x, grad_output))
                precise_ones = [tensor.to(device, precise) for tensor in (boxes, offset, mask)[: 2 + masked]]
                shapes = [Operand(tuple(tensor.shape), name) for tensor in (x, *precise_ones)]
                spec = roi_spec(*shapes, convention=convention)
                given: tuple[Any, ...] = (*precise_ones, None)[:3]
                forward(spec, x, *given)
                backward(spec, grad_output, x, given[0], given[1], given[2], ("input", "offset", "mask"))
