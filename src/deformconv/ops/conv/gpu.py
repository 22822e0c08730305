"""Deformable convolution on a GPU: which of the kernels of `gpu_kernels` compute a call, and with PyTorch's products.

Two ways lead to the output. One kernel makes the columns of a tile and multiplies them at once, where that is what the card's
matrix units are for; else columns are written a piece at a time, so small that a piece stays in the card's cache, and PyTorch
multiplies them. Where each channel is a group there is no product to make. The gradient of the input is collected, pixel by
pixel, from samples that were sorted: nothing is added by atomics, and results are the same bit for bit each time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache, lru_cache
from math import gcd, prod
from typing import Any, Literal, NamedTuple

from deformconv.ops import gpu as on_gpu
from deformconv.ops.backends import as_given as computes_in
from deformconv.ops.conv.reach import reasons_against_int32
from deformconv.ops.conv.spec import ConvSpec, Gradients
from deformconv.ops.operator import HALF
from deformconv.runtime import toolchain

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against", "tile", "warmup"]

Tensor = Any

TAKES: Literal["native"] = "native"
DETERMINISTIC = True
_PIECE = 32 << 20  # bytes of columns at once, which caches of 40 MiB and more keep
_IMAGES = 256 << 20  # bytes of the columns' gradient at once; the input's gradient is collected from whole images


class Tile(NamedTuple):
    """How much of the output one program of the kernel `convolve` computes, and how it is compiled."""

    rows: int
    outputs: int
    channels: int  # of a tap at a time
    warps: int
    stages: int


class _Plan(NamedTuple):
    """What all kernels of a call need, in the order and by the names of their parameters."""

    pixels: tuple[int, ...]  # Z, Y, X, OY, OX
    constants: dict[str, Any]
    row_span: int
    span: int
    column_span: int
    group: int  # how far two groups lie apart in a row of columns
    tap: int


def reasons_against(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    return on_gpu.reasons_against(spec.dtype, library, device) + reasons_against_int32(spec)


def how(spec: ConvSpec, library: str, device: str) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    if _is_depthwise(spec):
        return ["each channel is a group: one kernel samples and sums"]
    if tile(spec, _capability(device), _allows_tf32()) is not None:
        return ["one kernel samples and multiplies"]
    pieces = sum(1 for _ in _pieces(spec, 2 if spec.dtype in HALF else 8 if spec.dtype == "float64" else 4))
    return ["a kernel samples, and PyTorch multiplies" + (f", {pieces} times in turn" if pieces > 1 else "")]


@cache
def _capability(device: str) -> tuple[int, int]:
    """The compute capability of a device; (0, 0) of AMD's and of those that are not here, (8, 0) of the interpreter."""
    if toolchain.is_interpreted():
        return 8, 0
    card = on_gpu.card(device)
    return (0, 0) if card is None or card.capability is None else card.capability


def _allows_tf32() -> bool:
    """Whether PyTorch's products of float32 may be rounded to TF32 now."""
    import torch

    matmul = torch.backends.cuda.matmul
    # After the newer setting was used, PyTorch raises where the older one is read.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def tile(spec: ConvSpec, capability: tuple[int, int], tf32: bool) -> Tile | None:
    """The tile of the one kernel that samples and multiplies; None if columns are written, which PyTorch multiplies."""
    outputs = spec.out_channels // spec.groups
    common = gcd(spec.in_channels // spec.groups, spec.in_channels // spec.offset_groups)
    multiplied = spec.dtype in HALF or (spec.dtype == "float32" and tf32)
    if not multiplied or capability < (8, 0) or common == 0 or common % 16 or outputs < 16:
        return None
    most = 64 if capability[0] in (9, 10) else 32
    channels = min(most if spec.dtype in HALF else 32, common & -common)
    if outputs > 128 and spec.batch * spec.positions >= 64 * 128:
        return Tile(64, 256, channels, 8, 2)
    return Tile(64, min(128, max(16, _power(outputs))), channels, 4, 2 if most == 64 else 3)


@cache
def _kernels() -> Any:
    """The kernels' module, which loads Triton: the first call does it."""
    from deformconv.ops.conv import gpu_kernels

    return gpu_kernels


@lru_cache(maxsize=256)
def _plan(spec: ConvSpec) -> _Plan:
    import triton.language as tl

    own, of_offsets = spec.in_channels // spec.groups, spec.in_channels // spec.offset_groups
    depthwise = _is_depthwise(spec)
    before = tuple(amount for amount, _ in spec.padding)
    window = (_three(spec.kernel_size, 1), _three(spec.stride, 1), _three(before, 0), _three(spec.dilation, 1))
    return _Plan(
        pixels=(*_three(spec.input_size, 1), *_three(spec.output_size, 1)[1:]),
        constants={
            "WINDOW": window,
            "RANK": spec.rank,
            "MASKED": spec.masked,
            "INSIDE": spec.boundary == "inside",
            "ACC": tl.float64 if spec.dtype == "float64" else tl.float32,
            "INDEX": tl.int32 if _largest(spec) < 2**31 else tl.int64,
        },
        row_span=gcd(spec.positions, 16),
        span=gcd(of_offsets, 16),
        column_span=gcd(of_offsets, 16) if depthwise else gcd(own, of_offsets, 16),
        group=1 if depthwise else spec.taps * own,
        tap=spec.in_channels if depthwise else own,
    )


def _largest(spec: ConvSpec) -> int:
    """The most numbers that an array of a call has, of those that kernels go through; less of a piece of it."""
    corners, samples = 2**spec.rank, spec.batch * spec.positions * spec.taps
    sizes = map(prod, (spec.input_shape, spec.offset_shape, spec.weight_shape, spec.output_shape))
    return max(*sizes, samples * spec.in_channels, samples * spec.offset_groups * corners)


def forward(spec: ConvSpec, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """The output (N, C_out, *O); in memory its channels come last if the input's do."""
    import torch

    from deformconv.torch.tensors import memory_format

    form = memory_format(input)
    output = torch.empty(spec.output_shape, dtype=input.dtype, device=input.device, memory_format=form)
    if output.numel() == 0:
        return output
    if spec.in_channels == 0:
        return output.zero_() if bias is None else output.copy_(bias.reshape(-1, *(1,) * spec.rank))
    last = form is not torch.contiguous_format
    x, offset, mask = _rows(input), offset.contiguous(), None if mask is None else mask.contiguous()
    if _is_depthwise(spec):
        _depthwise(spec, x, offset, weight, bias, mask, output, last)
        return output
    tile_ = tile(spec, _capability(str(input.device)), _allows_tf32())
    if tile_ is None:
        _by_columns(spec, x, offset, _rows(weight), bias, mask, output, last)
    else:
        _at_once(spec, tile_, x, offset, _rows(weight), bias, mask, output, last)
    return output


def _at_once(
    spec: ConvSpec, tile: Tile, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    output: Tensor, last: bool,
) -> None:  # fmt: skip
    plan, rows, outputs = _plan(spec), spec.batch * spec.positions, spec.out_channels // spec.groups
    constants = {name: value for name, value in plan.constants.items() if name != "ACC"}
    grid = -(-rows // tile.rows), spec.groups * -(-outputs // tile.outputs)
    _kernels().convolve[grid](
        x, offset, x if mask is None else mask, weight, x if bias is None else bias, output,
        rows, spec.positions, spec.pixels, *_channels(spec), outputs, spec.out_channels, *plan.pixels,
        **constants, BIASED=bias is not None, LAST=last, PRECISION=_precision(spec.dtype), WIDE=toolchain.is_interpreted(),
        ROW_SPAN=plan.row_span, BR=tile.rows, BO=tile.outputs, BC=tile.channels, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _precision(dtype: str) -> str:
    return "tf32" if dtype == "float32" else "ieee"


def _by_columns(
    spec: ConvSpec, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, output: Tensor,
    last: bool,
) -> None:  # fmt: skip
    import torch

    groups, outputs = spec.groups, spec.out_channels // spec.groups
    matrix = weight.reshape(groups, outputs, -1)
    beta = 0 if bias is None else 1
    for images, positions in _pieces(spec, x.element_size()):
        count, length = images.stop - images.start, positions.stop - positions.start
        columns = x.new_empty(count * length, groups, matrix.shape[2])
        _sample(spec, x, offset, mask, columns, images.start * spec.positions + positions.start)
        if last:
            first = images.start * spec.positions + positions.start
            to = output.movedim(1, -1).reshape(-1, groups, outputs)[first : first + count * length].transpose(0, 1)
            given = to if bias is None else bias.reshape(groups, 1, outputs).expand_as(to)
            torch.baddbmm(given, columns.transpose(0, 1), matrix.transpose(1, 2), beta=beta, out=to)
            continue
        whole = output.reshape(spec.batch, groups, outputs, -1)[images, :, :, positions]
        columns = columns.reshape(count, length, groups, -1).permute(2, 0, 3, 1)
        # The images of a group, or the groups of an image, are multiplied together: a batch has one axis.
        pairs = ((whole[:, g], matrix[g].expand(count, -1, -1), columns[g]) for g in range(groups))
        if count < groups:
            pairs = ((whole[n], matrix, columns[:, n]) for n in range(count))
        biases = None if bias is None else bias.reshape(groups, 1, outputs, 1)
        for number, (to, left, right) in enumerate(pairs):
            given = to
            if biases is not None:
                given = (biases[:, 0] if count < groups else biases[number]).expand_as(to)
            torch.baddbmm(given, left, right, beta=beta, out=to)


def _pieces(spec: ConvSpec, bytes_of_number: int) -> Iterator[tuple[slice, slice]]:
    """Images and positions, of as many columns as a piece may have: several images, or a part of one."""
    most = max(128, _PIECE // (spec.taps * spec.in_channels * bytes_of_number))
    images = max(1, most // spec.positions)
    length = spec.positions if most >= spec.positions else most // 128 * 128
    for image in range(0, spec.batch, images):
        for first in range(0, spec.positions, length):
            yield slice(image, min(image + images, spec.batch)), slice(first, min(first + length, spec.positions))


def _sample(spec: ConvSpec, x: Tensor, offset: Tensor, mask: Tensor | None, columns: Tensor, first: int) -> None:
    """Write the columns of as many rows as these have, from the row `first` on."""
    plan, rows, of_offsets = _plan(spec), len(columns), spec.in_channels // spec.offset_groups
    block = min(64, _power(of_offsets))
    tile = 64 if block >= 32 else 128
    programs = -(-rows // tile) * spec.offset_groups * -(-of_offsets // block)
    parts = min(spec.taps, -(-_PROGRAMS // programs))  # few programs share out taps as well
    taps = -(-spec.taps // parts)
    grid = -(-rows // tile), spec.offset_groups * -(-of_offsets // block), -(-spec.taps // taps)
    _kernels().sample[grid](
        x, offset, x if mask is None else mask, columns, first, rows, spec.positions, spec.pixels, *_channels(spec),
        plan.group, plan.tap, *plan.pixels, taps, **plan.constants, ROW_SPAN=plan.row_span, SPAN=plan.span,
        COLUMN_SPAN=plan.column_span, BR=tile, BC=block, num_warps=4,
    )  # fmt: skip


_PROGRAMS = 528  # four for each of a large card's 132 multiprocessors


def _depthwise(
    spec: ConvSpec, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, output: Tensor,
    last: bool,
) -> None:  # fmt: skip
    plan, rows, of_offsets = _plan(spec), spec.batch * spec.positions, spec.in_channels // spec.offset_groups
    block = min(64, _power(of_offsets))
    C, _, GC, G = _channels(spec)
    _kernels().convolve_depthwise[-(-rows // 32), G * -(-GC // block)](
        x, offset, x if mask is None else mask, weight.reshape(C, -1).t().contiguous(), x if bias is None else bias, output,
        rows, spec.positions, spec.pixels, C, GC, G, *plan.pixels, **plan.constants, BIASED=bias is not None, LAST=last,
        ROW_SPAN=plan.row_span, SPAN=plan.span, BR=32, BC=block, num_warps=4,
    )  # fmt: skip


def backward(
    spec: ConvSpec, grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None,
    wanted: Collection[str],
) -> Gradients:  # fmt: skip
    """The wanted gradients; None for the others. That of the input has its channels last in memory if the input does."""
    import torch

    from deformconv.torch.tensors import memory_format

    found: dict[str, Any] = {}
    if "bias" in wanted:
        found["bias"] = grad_output.sum(dim=(0, *range(2, spec.rank + 2)))
    shapes = {"input": input, "offset": offset, "weight": weight} | ({} if mask is None else {"mask": mask})
    sampled = {name: value for name, value in shapes.items() if name in wanted}
    if not sampled:
        return Gradients(**found)
    if spec.batch * spec.positions * spec.in_channels * spec.out_channels * spec.pixels == 0:
        return Gradients(**found, **{name: torch.zeros_like(value) for name, value in sampled.items()})
    x, offset, mask = _rows(input), offset.contiguous(), None if mask is None else mask.contiguous()
    grad, matrix = _rows(grad_output), _rows(weight)
    d_input = torch.empty_like(x) if "input" in sampled else None
    d_offset = torch.empty_like(offset) if sampled.keys() & {"offset", "mask"} else None
    d_mask = None if d_offset is None or mask is None else torch.empty_like(mask)
    d_weight = None
    for images in _whole_images(spec, x.element_size()):
        part = _Part(*(None if t is None else t[images] for t in (x, offset, mask, grad, d_input, d_offset, d_mask)))
        of_part = _backward_of(spec, part, matrix, "weight" in sampled)
        d_weight = of_part if d_weight is None else d_weight + of_part
    if d_input is not None:
        found["input"] = d_input.movedim(-1, 1) if memory_format(input) is not torch.contiguous_format else _planes(d_input)
    if "offset" in sampled:
        found["offset"] = d_offset
    if "mask" in sampled:
        found["mask"] = d_mask
    if d_weight is not None:
        found["weight"] = d_weight.to(weight.dtype).reshape(matrix.shape).movedim(-1, 1)
    return Gradients(**found)


class _Part(NamedTuple):
    """Some images of a backward pass: rows of the input and of the output's gradient, and where results go."""

    x: Tensor
    offset: Tensor
    mask: Tensor | None
    grad: Tensor
    d_x: Tensor | None
    d_offset: Tensor | None
    d_mask: Tensor | None


def _whole_images(spec: ConvSpec, bytes_of_number: int) -> Iterator[slice]:
    each = spec.positions * spec.taps * spec.in_channels * bytes_of_number
    images = max(1, _IMAGES // each)
    for image in range(0, spec.batch, images):
        yield slice(image, min(image + images, spec.batch))


def _backward_of(spec: ConvSpec, part: _Part, weight: Tensor, weight_wanted: bool) -> Tensor | None:
    """Write the part's gradients, and return the weight's of these images, as rows."""
    import torch

    rows, groups = len(part.x) * spec.positions, spec.groups
    grad = part.grad.reshape(rows, groups, -1)
    entries, positions = part.d_x is not None, part.d_offset is not None
    depthwise = _is_depthwise(spec)
    shape = (rows, spec.taps, spec.in_channels) if depthwise else (rows, groups, spec.taps * (spec.in_channels // groups))
    d_columns = columns = None
    if entries or positions:
        d_columns = part.x.new_empty(shape)
        if depthwise:
            torch.mul(grad.reshape(rows, 1, -1), weight.reshape(spec.in_channels, spec.taps).t(), out=d_columns)
        else:
            matrix = weight.reshape(groups, spec.out_channels // groups, -1)
            torch.bmm(grad.transpose(0, 1), matrix, out=d_columns.transpose(0, 1))
    if weight_wanted:
        columns = part.x.new_empty(shape)
    keys, shares = _sample_backward(spec, part, d_columns, columns)
    if part.d_x is not None:
        _collect(spec, part, d_columns, keys, shares)
    if columns is None:
        return None
    exact = torch.float32 if columns.dtype in (torch.float16, torch.bfloat16) else columns.dtype
    if depthwise:
        return (columns * grad.reshape(rows, 1, -1)).sum(0, dtype=exact).t()
    return torch.bmm(grad.permute(1, 2, 0), columns.transpose(0, 1)).to(exact)


def _sample_backward(
    spec: ConvSpec, part: _Part, d_columns: Tensor | None, columns: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Write columns and the gradients of offsets and masks, and return each sample's list and its shares of pixels."""
    import torch

    plan, rows = _plan(spec), len(part.x) * spec.positions
    C, CG, GC, G = _channels(spec)
    keys = shares = None
    if part.d_x is not None:
        samples, exact = (
            len(part.x) * G * spec.taps * spec.positions,
            torch.float64 if spec.dtype == "float64" else torch.float32,
        )
        lists = len(part.x) * G * prod(size + 1 for size in spec.input_size)
        keys = part.x.new_empty(samples, dtype=torch.int32 if lists < 2**31 else torch.int64)
        shares = part.x.new_empty(samples * 2**spec.rank, dtype=exact)
    block = min(64, _power(GC))
    tile = 32 if block >= 32 else 128
    none = part.x
    arrays = [none if t is None else t for t in (part.mask, d_columns, columns, part.d_offset, part.d_mask, keys, shares)]
    _kernels().sample_backward[-(-rows // tile), spec.taps, G](
        part.x, part.offset, *arrays, rows, spec.positions, spec.pixels, C, CG, GC, G, plan.group, plan.tap, *plan.pixels,
        **plan.constants, COLUMNS=columns is not None, POSITIONS=part.d_offset is not None, ENTRIES=keys is not None,
        ROW_SPAN=plan.row_span, SPAN=plan.span, COLUMN_SPAN=plan.column_span, BR=tile, BC=block, num_warps=4,
    )  # fmt: skip
    return keys, shares


def _collect(spec: ConvSpec, part: _Part, d_columns: Any, keys: Any, shares: Any) -> None:
    """Sum the input's gradient at each pixel from the samples near it, in the order of their numbers."""
    import torch
    import triton.language as tl

    plan, images = _plan(spec), len(part.x)
    C, CG, GC, G = _channels(spec)
    lists = images * G * prod(size + 1 for size in spec.input_size)
    ordered, order = torch.sort(keys, stable=True)
    numbers = torch.arange(lists + 1, dtype=keys.dtype, device=keys.device)
    start = torch.searchsorted(ordered, numbers, out_int32=len(keys) < 2**31)
    samples, exact, index = len(keys), plan.constants["ACC"], plan.constants["INDEX"]
    rows, sorted_shares = torch.empty_like(order if index == tl.int64 else keys), torch.empty_like(shares)
    _kernels().arrange[(-(-samples // 256),)](
        order, shares, rows, sorted_shares, samples, spec.positions, C, G, plan.tap,
        K=spec.taps, CORNERS=2**spec.rank, INDEX=index, BE=256, num_warps=4,
    )  # fmt: skip
    # A program is one warp, whose threads load 16 bytes each: of a pixel's channels, or of several pixels'.
    block = min(512 // part.x.element_size(), _power(GC))
    tile = 64 if toolchain.is_interpreted() else max(1, 32 // block)
    places = images * spec.pixels
    _kernels().collect[-(-places // tile), G, -(-GC // block)](
        d_columns, rows, start, sorted_shares, part.d_x, places, samples, spec.pixels, C, CG, GC, G, plan.group,
        *plan.pixels[:3], RANK=spec.rank, SPAN=plan.span, COLUMN_SPAN=plan.column_span, ACC=exact, INDEX=index,
        BP=tile, BE=16, BC=block, num_warps=1,
    )  # fmt: skip


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its second axis last, in memory too."""
    if not tensor.is_contiguous() or tensor.numel() == 0:
        return tensor.movedim(1, -1).contiguous()
    N, A, *others = tensor.shape
    rows = tensor.new_empty(N, *others, A)
    _transpose(tensor, rows, N, A, prod(others))
    return rows


def _planes(rows: Tensor) -> Tensor:
    """The tensor, whose last axis is to be the second, so in memory too."""
    N, *others, A = rows.shape
    planes = rows.new_empty(N, A, *others)
    _transpose(rows, planes, N, prod(others), A)
    return planes


def _transpose(given: Tensor, to: Tensor, N: int, A: int, B: int) -> None:
    """Write (N, A, B) as (N, B, A)."""
    import triton.language as tl

    if min(A, B) == 1:
        to.copy_(given.reshape(to.shape))
        return
    index = tl.int32 if given.numel() < 2**31 else tl.int64
    _kernels().transpose[N * -(-B // 64), -(-A // 64)](given, to, A, B, INDEX=index, BA=64, BB=64, num_warps=4)


def _channels(spec: ConvSpec) -> tuple[int, int, int, int]:
    """All channels, those of a group, those of an offset group, and how many offset groups there are."""
    C = spec.in_channels
    return C, C // spec.groups, C // spec.offset_groups, spec.offset_groups


def _is_depthwise(spec: ConvSpec) -> bool:
    return spec.groups == spec.in_channels == spec.out_channels


def _three(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    """Numbers along (z, y, x)."""
    return (fill,) * (3 - len(values)) + tuple(values)


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()


def warmup(dtypes: Collection[str], device: str) -> None:
    """Compile the kernels that usual 3 x 3 calls take on a device, forward and backward; Triton keeps them on disk."""
    import torch

    from deformconv.torch import deform_conv2d

    for name in dtypes:
        for stride in (1, 2):
            for masked in (False, True):
                made = [
                    torch.zeros(shape, device=device, dtype=getattr(torch, name)) for shape in ((1, 64, 16, 16), (64, 64, 3, 3))
                ]
                x, weight = (tensor.requires_grad_() for tensor in made)
                size = 16 // stride
                offset = torch.zeros(1, 18, size, size, device=device, requires_grad=True)
                mask = torch.ones(1, 9, size, size, device=device, requires_grad=True) if masked else None
                y = deform_conv2d(x, offset, weight, mask=mask, stride=stride, padding=1, backend="gpu")
                y.sum().backward()
