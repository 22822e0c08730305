"""Deformable convolution on a GPU: a call's tensors, brought to the kernels of `gpu_kernels` and to PyTorch's products.

Columns are written a piece at a time, and PyTorch multiplies them: that is faster than a kernel that makes a tile's columns and
multiplies them at once (docs/performance.md). Where each channel is a group there is no product to make. The gradient of the
input is collected, pixel by pixel, from samples that were sorted: nothing is added by atomics, and results are the same bit for
bit each time. Only where offset groups have few channels, so that there are many samples to sort, it is added up by atomics, if
PyTorch is not told to be deterministic. No step waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache, lru_cache
from itertools import product as product_of
from math import gcd, prod
from typing import Any, Literal, NamedTuple

from deformconv.ops import gpu as on_gpu
from deformconv.ops.backends import as_given as computes_in
from deformconv.ops.conv.spec import ConvSpec, Gradients, Operand, conv_spec
from deformconv.ops.taps import gpu as on_taps
from deformconv.runtime import product, tiles, turned
from deformconv.sampling import lists

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against", "warmup"]

Tensor = Any

TAKES: Literal["native"] = "native"
DETERMINISTIC = True
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_PIECE = 256 << 20  # bytes of columns at once, or of the columns' gradient: larger products are faster, smaller take less room


class _Plan(NamedTuple):
    """What all kernels of a call need."""

    sizes: tuple[int, ...]  # Z, Y, X, OY, OX
    constants: dict[str, Any]
    row_span: int  # how many rows surely are of one image
    span: int  # how many channels lie together in an image
    column_span: int  # and in a row of columns
    group: int  # how far two groups lie apart in a row of columns
    tap: int  # and two taps


def reasons_against(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    return on_taps.reasons_against(spec, library, device)


def how(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    multiplies = "PyTorch multiplies"
    if _multiplies(spec, device, backward):
        multiplies = "another multiplies, by TF32 and as exactly as float32"
    if not backward:
        if _is_depthwise(spec):
            return ["each channel is a group: one kernel samples and sums"]
        pieces = -(-spec.batch * spec.positions // _rows_of_piece(spec))
        return [f"a kernel samples, and {multiplies}{_in_pieces(pieces)}"]
    end = _in_pieces(-(-spec.batch // _images_of_piece(spec))) + on_gpu.words_of_adding(_adds(spec, device))
    if _is_depthwise(spec):
        multiplies += " and sums"
    elif _multiplies(spec, device, backward):
        multiplies += ", but for the weight's gradient, which PyTorch multiplies"
    return [f"a kernel samples, and {multiplies}{end}"]


def _in_pieces(pieces: int) -> str:
    return f", {pieces} pieces one after the other" if pieces > 1 else ""


@cache
def _kernels() -> Any:
    """The kernels' module, which loads Triton: the first call does it."""
    from deformconv.ops.conv import gpu_kernels

    return gpu_kernels


@lru_cache(maxsize=256)
def _plan(spec: ConvSpec) -> _Plan:
    own, of_offsets = spec.in_channels // spec.groups, spec.in_channels // spec.offset_groups
    depthwise = _is_depthwise(spec)
    return _Plan(
        sizes=on_taps.sizes(spec),
        constants={**on_taps.constants(spec, _largest(spec)), "LAST": (False, False)},
        row_span=on_taps.row_span(spec),
        span=gcd(of_offsets, 16),
        column_span=gcd(of_offsets, 16) if depthwise else gcd(own, of_offsets, 16),
        group=1 if depthwise else spec.taps * own,
        tap=spec.in_channels if depthwise else own,
    )


def _largest(spec: ConvSpec) -> int:
    """The most numbers that an array of a call has, of those that kernels go through."""
    samples = spec.batch * spec.positions * spec.taps
    sizes = map(prod, (spec.input_shape, spec.offset_shape, spec.weight_shape, spec.output_shape))
    return max(*sizes, samples * spec.in_channels, samples * spec.offset_groups * 2**spec.rank)


def forward(spec: ConvSpec, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """The output (N, C_out, *O); in memory its channels come last if the input's do."""
    rows = input.new_empty(spec.batch, *spec.output_size, spec.out_channels)
    if spec.in_channels == 0:
        rows.zero_() if bias is None else rows.copy_(bias)
    elif rows.numel():
        x, offset, mask = turned.rows(input), offset.contiguous(), None if mask is None else mask.contiguous()
        if _is_depthwise(spec):
            _convolve_depthwise(spec, x, offset, weight, bias, mask, rows)
        else:
            _convolve(spec, x, offset, turned.rows(weight), bias, mask, rows.reshape(-1, spec.out_channels))
    return turned.formed(rows, input)


def _convolve(
    spec: ConvSpec, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, output: Tensor
) -> None:
    """Write the output's rows, as many at a time as a piece of the columns has."""
    import torch

    groups, most, ours = spec.groups, _rows_of_piece(spec), _multiplies(spec, str(x.device), False)
    matrix = weight.reshape(groups, spec.out_channels // groups, -1)
    room = x.new_empty(min(most, len(output)), groups, matrix.shape[2])
    for first in range(0, len(output), most):
        to = output[first : first + most].reshape(-1, groups, matrix.shape[1])
        columns = room[: len(to)]
        _sample(spec, x, offset, mask, columns, first)
        if ours:
            product.multiply(columns, matrix, bias, to)
        elif groups == 1 and bias is not None:
            torch.addmm(bias, columns[:, 0], matrix[0].t(), out=to[:, 0])
        else:
            given = to if bias is None else bias.reshape(groups, -1).expand_as(to)
            torch.baddbmm(
                given.transpose(0, 1), columns.transpose(0, 1), matrix.transpose(1, 2), beta=0 if bias is None else 1,
                out=to.transpose(0, 1),
            )  # fmt: skip


def _multiplies(spec: ConvSpec, device: str, backward: bool) -> bool:
    """Whether products are made by a kernel of ours: the output's, or backward the columns' gradient's."""
    outputs, columns = spec.out_channels // spec.groups, spec.taps * spec.in_channels // spec.groups
    depth, across = (outputs, columns) if backward else (columns, outputs)
    return product.pays(spec.dtype, device, depth, across)


def _adds(spec: ConvSpec, device: str) -> bool:
    """Whether the input's gradient is added up by atomics."""
    return on_gpu.adds(spec.in_channels // spec.offset_groups, device)


def _rows_of_piece(spec: ConvSpec) -> int:
    """How many rows of columns are multiplied at a time."""
    bytes_of_row = max(1, spec.taps * spec.in_channels * _BYTES[spec.dtype])
    return max(1, _PIECE // bytes_of_row // 128) * 128


def _sample(spec: ConvSpec, x: Tensor, offset: Tensor, mask: Tensor | None, columns: Tensor, first: int) -> None:
    """Write the columns of as many rows as these have, from the row `first` on."""
    plan, rows = _plan(spec), len(columns)
    C, CG, GC, G = _channels(spec)
    tile, block = tiles.tile(GC)
    programs = -(-rows // tile) * G * -(-GC // block)
    taps = tiles.shared(spec.taps, programs)
    _kernels().sample[programs, -(-spec.taps // taps)](
        x, offset, x if mask is None else mask, columns, first, rows, spec.positions, spec.pixels, C, CG, GC, G,
        plan.group, plan.tap, *plan.sizes, taps, **plan.constants, ROW_SPAN=plan.row_span, SPAN=plan.span,
        COLUMN_SPAN=plan.column_span, BR=tile, BC=block, num_warps=4,
    )  # fmt: skip


def _convolve_depthwise(
    spec: ConvSpec, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, output: Tensor
) -> None:
    plan, rows = _plan(spec), spec.batch * spec.positions
    C, _, GC, G = _channels(spec)
    block = min(64, tiles.power(GC))
    _kernels().convolve_depthwise[-(-rows // 32) * G * -(-GC // block),](
        x, offset, x if mask is None else mask, weight.reshape(C, -1).t().contiguous(), x if bias is None else bias, output,
        rows, spec.positions, spec.pixels, C, GC, G, *plan.sizes, **plan.constants, BIASED=bias is not None,
        ROW_SPAN=plan.row_span, SPAN=plan.span, BR=32, BC=block, num_warps=4,
    )  # fmt: skip


def backward(
    spec: ConvSpec, grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None,
    wanted: Collection[str],
) -> Gradients:  # fmt: skip
    """The wanted gradients; None for the others. That of the input has its channels last in memory if the input does."""
    import torch

    found: dict[str, Any] = {}
    summed = "bias" in wanted and spec.biased
    given = {"input": input, "offset": offset, "weight": weight} | ({} if mask is None else {"mask": mask})
    given = {name: value for name, value in given.items() if name in wanted}
    if spec.batch * spec.positions * spec.in_channels * spec.out_channels * spec.pixels == 0 or not given:
        if summed:
            found["bias"] = grad_output.sum(dim=(0, *range(2, spec.rank + 2)))
        return Gradients(**found, **{name: torch.zeros_like(value) for name, value in given.items()})
    positions, adds = given.keys() & {"offset", "mask"}, "input" in given and _adds(spec, str(input.device))
    shape_of_rows = (spec.batch, *spec.input_size, spec.in_channels)
    whole = on_taps.Part(
        x=turned.rows(input),
        offset=offset.contiguous(),
        mask=None if mask is None else mask.contiguous(),
        grad=turned.rows(grad_output),
        d_x=lists.room(input, shape_of_rows, adds) if "input" in given else None,
        d_offset=torch.empty_like(offset, memory_format=torch.contiguous_format) if positions else None,
        d_mask=torch.empty_like(mask, memory_format=torch.contiguous_format) if positions and mask is not None else None,
    )
    if summed:  # of rows, in a quarter of the time that PyTorch takes for planes
        found["bias"] = whole.grad.flatten(0, -2).sum(dim=0)
    matrix, d_weight = turned.rows(weight), None
    for part in on_taps.parts(whole, _images_of_piece(spec)):
        of_part = _backward_of(spec, part, matrix, "weight" in given, adds)
        d_weight = of_part if d_weight is None or of_part is None else d_weight + of_part
    if d_weight is not None:
        found["weight"] = turned.formed(d_weight.to(weight.dtype).reshape(matrix.shape), weight)
    found |= {"offset": whole.d_offset} if "offset" in given else {}
    found |= {"mask": whole.d_mask} if "mask" in given else {}
    found |= {"input": turned.formed(whole.d_x, input)} if "input" in given else {}
    return Gradients(**found)


def _images_of_piece(spec: ConvSpec) -> int:
    """As many images as bound the memory of the columns' gradient, one at the least."""
    return max(1, _PIECE // max(1, spec.positions * spec.taps * spec.in_channels * _BYTES[spec.dtype]))


def _backward_of(spec: ConvSpec, part: on_taps.Part, weight: Tensor, weight_wanted: bool, adds: bool) -> Tensor | None:
    """Write the part's gradients, and return the weight's of these images, (C_out, K*C_in/groups), if it is wanted."""
    import torch

    rows, groups, depthwise = len(part.x) * spec.positions, spec.groups, _is_depthwise(spec)
    grad = part.grad.reshape(rows, groups, -1)
    shape = (rows, spec.taps, spec.in_channels) if depthwise else (rows, groups, spec.taps * spec.in_channels // groups)
    d_columns = columns = None
    if part.d_x is not None or part.d_offset is not None:
        d_columns = part.x.new_empty(shape)
        if depthwise:
            torch.mul(grad.reshape(rows, 1, -1), weight.reshape(spec.in_channels, spec.taps).t(), out=d_columns)
        else:
            matrix = weight.reshape(groups, spec.out_channels // groups, -1)
            if _multiplies(spec, str(grad.device), True):
                product.multiply(grad, matrix.transpose(1, 2).contiguous(), None, d_columns)
            else:
                torch.bmm(grad.transpose(0, 1), matrix, out=d_columns.transpose(0, 1))
    if weight_wanted:
        columns = part.x.new_empty(shape)
    keys, shares = _sample_backward(spec, part, d_columns, columns, adds)
    if part.d_x is not None and not adds:
        _collect(spec, part, d_columns, keys, shares)
    if columns is None:
        return None
    exact = torch.float32 if columns.element_size() == 2 else columns.dtype
    if depthwise:
        return (columns * grad.reshape(rows, 1, -1)).sum(0, dtype=exact).t()
    return torch.bmm(grad.permute(1, 2, 0), columns.transpose(0, 1)).to(exact)


def _sample_backward(
    spec: ConvSpec, part: on_taps.Part, d_columns: Tensor | None, columns: Tensor | None, adds: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Write columns and the gradients of offsets and masks; add up the input's, or return each sample's list and shares."""
    plan, rows = _plan(spec), len(part.x) * spec.positions
    C, CG, GC, G = _channels(spec)
    keys = shares = None
    if part.d_x is not None and not adds:
        keys, shares = lists.entries(_lists(spec, part), rows * G * spec.taps, part.x)
    none = part.x
    given = part.mask, d_columns, columns, part.d_offset, part.d_mask, keys, shares, part.d_x if adds else None
    arrays = [none if tensor is None else tensor for tensor in given]
    tile, block = tiles.tile(GC)
    _kernels().sample_backward[-(-rows // tile) * G, spec.taps](
        part.x, part.offset, *arrays, rows, spec.positions, spec.pixels, C, CG, GC, G, plan.group, plan.tap, *plan.sizes,
        **plan.constants, COLUMNS=columns is not None, POSITIONS=part.d_offset is not None, ENTRIES=keys is not None,
        SCATTER=adds, ROW_SPAN=plan.row_span, SPAN=plan.span, COLUMN_SPAN=plan.column_span, BR=tile, BC=block, num_warps=4,
    )  # fmt: skip
    return keys, shares


def _lists(spec: ConvSpec, part: on_taps.Part) -> lists.Lists:
    """The lists of a part's samples, of which an offset group has its own."""
    return lists.Lists(len(part.x), spec.input_size, spec.offset_groups, spec.in_channels // spec.offset_groups)


def _collect(spec: ConvSpec, part: on_taps.Part, d_columns: Any, keys: Any, shares: Any) -> None:
    """Sum the input's gradient at each pixel from the samples near it."""
    plan = _plan(spec)
    C, CG, _, G = _channels(spec)
    rows = lists.Rows(spec.positions, G, spec.taps, spec.taps * C, plan.tap, CG, plan.group, plan.column_span)
    lists.collect(_lists(spec, part), rows, keys, shares, d_columns, part.d_x, plan.constants["INDEX"])


def _channels(spec: ConvSpec) -> tuple[int, int, int, int]:
    """All channels, those of a group, those of an offset group, and how many offset groups there are."""
    C = spec.in_channels
    return C, C // spec.groups, C // spec.offset_groups, spec.offset_groups


def _is_depthwise(spec: ConvSpec) -> bool:
    return spec.groups == spec.in_channels == spec.out_channels


def warmup(dtypes: Collection[str], device: str) -> None:
    """Compile the kernels that 3 x 3 layers of a ResNet take on a device, forward and backward; Triton keeps them on disk.

    Kernels differ by how many rows surely are of one image, so by three kinds of sizes, and by few channels or many.
    """
    for name, stride, masked, channels, size in product_of(dtypes, (1, 2), (False, True), (64, 256), (16, 18, 15)):
        _warm(name, stride, masked, channels, size, device)


def _warm(name: str, stride: int, masked: bool, channels: int, size: int, device: str) -> None:
    """Call both directions once, with a bias and without."""
    import torch

    dtype, precise, to = getattr(torch, name), torch.float64 if name == "float64" else torch.float32, (size - 1) // stride + 1
    x, weight, grad_output, bias = (
        torch.zeros(shape, device=device, dtype=dtype)
        for shape in ((1, channels, size, size), (channels, channels, 3, 3), (1, channels, to, to), (channels,))
    )
    offset, mask = (torch.zeros(1, planes, to, to, device=device, dtype=precise) for planes in (18, 9))
    of_x, of_offset, of_weight, of_mask = (Operand(tuple(tensor.shape), name) for tensor in (x, offset, weight, mask))
    spec = conv_spec(of_x, of_offset, of_weight, mask=of_mask if masked else None, stride=stride, padding=1)
    for given in (None, bias):
        forward(spec, x, offset, weight, given, mask if masked else None)
    wanted = ("input", "offset", "weight", "mask") if masked else ("input", "offset", "weight")
    backward(spec, grad_output, x, offset, weight, mask if masked else None, wanted)
