"""What the GPU kernels of an operator with a window are told of a call, see `gpu_kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

from deformconv.ops import gpu as on_gpu
from deformconv.ops.taps.reach import reasons_against_int32
from deformconv.ops.taps.spec import WindowSpec

__all__ = ["Part", "constants", "parts", "reasons_against", "row_span", "sizes"]

Tensor = Any

_LIMIT = 2**31 - 2**12  # of what programs count in 32 bits, with room for the last block


def reasons_against(spec: WindowSpec, library: str, device: str) -> list[str]:
    """Why kernels cannot run a call, as sentences; none if they can."""
    reasons = on_gpu.reasons_against(spec.dtype, library, device) + reasons_against_int32(spec)
    of_image = prod(size + 1 for size in spec.input_size)  # lists of samples, from which the input's gradient is collected
    counted = ("output positions", spec.batch * spec.positions), ("pixels", max(of_image, spec.batch * spec.pixels))
    reasons += [f"a batch of {number} {what} exceeds its 32-bit numbers" for what, number in counted if number >= _LIMIT]
    return reasons


def constants(spec: WindowSpec, largest: int) -> dict[str, Any]:
    """The constants of all kernels, where no array that they go through has more numbers than `largest`."""
    import triton.language as tl

    before = tuple(amount for amount, _ in spec.padding)
    return {
        "WINDOW": (_three(spec.kernel_size, 1), _three(spec.stride, 1), _three(before, 0), _three(spec.dilation, 1)),
        "RANK": spec.rank,
        "MASKED": spec.masked,
        "INSIDE": spec.boundary == "inside",
        "ACC": tl.float64 if spec.dtype == "float64" else tl.float32,
        "INDEX": tl.int32 if largest < 2**31 else tl.int64,
    }


def row_span(spec: WindowSpec) -> int:
    """How many rows surely are of one image; few numbers, since a kernel is compiled for each."""
    return next(span for span in (16, 4, 1) if spec.positions % span == 0)


def sizes(spec: WindowSpec) -> tuple[int, ...]:
    """Z, Y, X, OY, OX."""
    return *_three(spec.input_size, 1), *_three(spec.output_size, 1)[1:]


class Part(NamedTuple):
    """Some images of a backward pass: what it reads, channels last but for offsets and masks, and where results go."""

    x: Tensor
    offset: Tensor
    mask: Tensor | None
    grad: Tensor
    d_x: Tensor | None
    d_offset: Tensor | None
    d_mask: Tensor | None


def parts(whole: Part, images: int) -> Iterator[Part]:
    """So many images at a time, and the rest of them at the end."""
    for first in range(0, len(whole.x), images):
        yield Part(*(None if tensor is None else tensor[first : first + images] for tensor in whole))


def _three(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    """Numbers along (z, y, x)."""
    return (fill,) * (3 - len(values)) + tuple(values)
