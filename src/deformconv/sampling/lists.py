"""The gradient of a sampled input on a GPU: lists of samples by pixels, sorted by PyTorch, and collected by `triton_lists`.

Nothing that is collected is added by atomics, and no step waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import gcd, prod
from typing import Any, NamedTuple

from deformconv.runtime import tiles, toolchain

__all__ = ["LEVELS", "LevelLists", "Lists", "Rows", "collect", "entries", "packed", "room"]

Tensor = Any

LEVELS = 8  # maps of several sizes that kernels take at the most
_RUN = 256  # samples of one list that are summed apart from others


class Lists(NamedTuple):
    """The lists of an input whose groups of channels are sampled each at positions of their own."""

    images: int
    size: tuple[int, ...]
    groups: int  # of channels, one after the other
    channels: int  # of a group

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def each(self) -> int:
        """How many lists a group of an image has: along each axis one more than pixels."""
        return prod(size + 1 for size in self.size)

    @property
    def number(self) -> int:
        return self.images * self.groups * self.each


class LevelLists(NamedTuple):
    """The lists of an input of several maps, one after the other in each image."""

    images: int
    levels: tuple[tuple[int, int], ...]  # heights and widths
    groups: int
    channels: int

    @property
    def rank(self) -> int:
        return 2

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.levels)

    @property
    def each(self) -> int:
        return sum((height + 1) * (width + 1) for height, width in self.levels)

    @property
    def number(self) -> int:
        return self.images * self.groups * self.each


class Rows(NamedTuple):
    """Where the numbers lie, in the rows of a gradient, by which samples' shares are multiplied.

    Sample ((n * groups + group) * taps + tap) * positions + p begins at row * (n * positions + p) + tap_of_row * tap, and
    channel c of the input's gradient is c % together + column * (c // together) numbers on.
    """

    positions: int
    groups: int
    taps: int
    row: int
    tap_of_row: int
    together: int
    column: int
    span: int  # channels that surely lie together, at a multiple of so many numbers


@cache
def _kernels() -> Any:
    """The kernels' module, which loads Triton: the first call does it."""
    from deformconv.sampling import triton_lists

    return triton_lists


def packed(levels: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Maps' sizes as `triton_levels` has them."""
    return tuple((height << 32) + width for height, width in [*levels, *((1, 1),) * (LEVELS - len(levels))])


def room(input: Tensor, shape: tuple[int, ...], adds: bool) -> Tensor:
    """Room for the input's gradient, channels last: zeros, of float32 beside halves, if it is added up and not collected."""
    import torch

    return input.new_zeros(shape, dtype=torch.promote_types(input.dtype, torch.float32)) if adds else input.new_empty(shape)


def entries(lists: Lists | LevelLists, samples: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for each sample's list, and for its shares of pixels, for `triton_lists.store_entries`; `like` has the dtype."""
    import torch

    # Sorting takes half the time for half as many bits.
    dtype = next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if lists.number <= torch.iinfo(dtype).max)
    exact = torch.float64 if like.dtype is torch.float64 else torch.float32
    return like.new_empty(samples, dtype=dtype), like.new_empty(samples * 2**lists.rank, dtype=exact)


def collect(
    lists: Lists | LevelLists, rows: Rows, keys: Tensor, shares: Tensor, gradient: Tensor, to: Tensor, index: Any
) -> None:
    """Write the input's gradient (images, *size, channels): at each pixel the sum of the samples near it, in their order.

    `gradient` has the rows that shares are multiplied by, and numbers of elements are of `index`. Of several maps `to` is
    (images, pixels, channels); its memory may have more channels, and begins with the first of these.
    """
    import torch
    import triton.language as tl

    samples, corners = len(keys), 2**lists.rank
    ordered, order = torch.sort(keys, stable=True)
    numbers = torch.arange(lists.number + 1, dtype=keys.dtype, device=keys.device)
    start = torch.searchsorted(ordered, numbers, out_int32=samples < 2**31)
    begins = torch.empty_like(order, dtype=torch.int64 if index == tl.int64 else torch.int32)
    sorted_shares = torch.empty_like(shares)
    _kernels().arrange[(-(-samples // 256),)](
        order, shares, begins, sorted_shares, samples, rows.positions, rows.groups, rows.row, rows.tap_of_row,
        K=rows.taps, CORNERS=corners, INDEX=index, BE=256, num_warps=4,
    )  # fmt: skip
    # A program is one warp, whose threads load 16 bytes each: of a pixel's channels, or of several pixels'.
    block = min(512 // gradient.element_size(), tiles.power(lists.channels))
    blocks, spans = -(-lists.channels // block), {"SPAN": gcd(lists.channels, 16), "COLUMN_SPAN": rows.span}
    spans |= {"ACC": tl.float64 if shares.dtype is torch.float64 else tl.float32, "INDEX": index, "RUN": _RUN}
    runs = torch.empty(samples // _RUN * corners * lists.channels, dtype=shares.dtype, device=shares.device)
    layout = rows.together, lists.channels, lists.groups, rows.column
    if samples >= _RUN:
        _kernels().sum_runs[samples // _RUN, corners, blocks](
            gradient, begins, ordered, sorted_shares, runs, samples, lists.number, lists.each,
            *layout, CORNERS=corners, **spans, BE=min(16, _RUN), BC=block, num_warps=1,
        )  # fmt: skip
    _collect(lists, (gradient, begins, start, sorted_shares, runs, to), samples, layout, block, spans)


def _collect(
    lists: Lists | LevelLists, tensors: tuple[Tensor, ...], samples: int, layout: tuple[int, ...], block: int,
    constants: dict[str, Any],
) -> None:  # fmt: skip
    """Sum up each pixel's samples, which are in order."""
    tile = 64 if toolchain.is_interpreted() else max(1, 32 // block)
    if isinstance(lists, LevelLists):
        kernel, pixels, C = _kernels().collect_levels, lists.pixels, tensors[-1].stride(1)
        geometry: tuple[int, ...] = lists.each, *packed(lists.levels)
    else:
        kernel, pixels, C = _kernels().collect, prod(lists.size), lists.groups * lists.channels
        geometry, constants = (*(1,) * (3 - lists.rank), *lists.size), constants | {"RANK": lists.rank}
    places = lists.images * pixels
    kernel[-(-places // tile), lists.groups, -(-lists.channels // block)](
        *tensors, places, samples, pixels, C, *layout, *geometry, **constants, BP=tile, BE=32, BC=block, num_warps=1
    )
