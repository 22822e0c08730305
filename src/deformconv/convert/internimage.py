"""The order in which InternImage's and DCNv4's authors predict offsets and masks, and their numbers in this library's order.

Theirs is group, tap with the width outermost, x before y; DCNv3 has offsets and masks apart, DCNv4 a group's offsets before its
masks and rows of nothing at the end. Ours is group, tap with the height outermost, y before x. No other file knows theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Taps", "mask_rows", "offset_rows", "packed", "unpacked"]

MULTIPLE = 8  # of DCNv4's rows, for the tensor cores of GPUs


class Taps(NamedTuple):
    """The taps that a layer predicts: of a square kernel in each group, with or without the one in the middle."""

    group: int
    kernel_size: int
    remove_center: bool

    @property
    def each(self) -> int:
        """A group's taps that are predicted."""
        return self.kernel_size**2 - self.remove_center

    @property
    def offsets(self) -> int:
        return self.group * self.each * 2

    @property
    def masks(self) -> int:
        return self.group * self.each


def offset_rows(rows: Tensor, taps: Taps) -> Tensor:
    """Rows (offsets, ...) of a projection to offsets, in our order, (G*K*2, ...). A tap that was removed has offset 0."""
    rows = _whole(rows.unflatten(0, (taps.group, taps.each, 2)), taps, 0.0)  # (G, K, 2, ...)
    rows = rows.unflatten(1, (taps.kernel_size, taps.kernel_size))  # (G, width, height, 2, ...)
    return rows.transpose(1, 2).flip(3).flatten(0, 3)


def mask_rows(rows: Tensor, taps: Taps, center: float = 0.0) -> Tensor:
    """Rows (masks, ...) of a projection to masks, in our order, (G*K, ...). `center` is the row of a tap that was removed."""
    rows = _whole(rows.unflatten(0, (taps.group, taps.each)), taps, center)  # (G, K, ...)
    rows = rows.unflatten(1, (taps.kernel_size, taps.kernel_size))  # (G, width, height, ...)
    return rows.transpose(1, 2).flatten(0, 2)


def packed(taps: Taps) -> int:
    """The rows of DCNv4's projection to offsets and masks."""
    return -(-(taps.offsets + taps.masks) // MULTIPLE) * MULTIPLE


def unpacked(rows: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """The rows of offsets and those of masks among the rows (packed, ...) of DCNv4's projection, in our order."""
    rows = rows[: taps.offsets + taps.masks].unflatten(0, (taps.group, 3 * taps.each))  # (G, 3*K, ...)
    offsets, masks = rows.split((2 * taps.each, taps.each), 1)
    return offset_rows(offsets.flatten(0, 1), taps), mask_rows(masks.flatten(0, 1), taps)


def _whole(rows: Tensor, taps: Taps, center: float) -> Tensor:
    """Rows (G, taps, ...) with one for the tap in the middle, where it was removed."""
    if not taps.remove_center:
        return rows
    before, after = rows.split(taps.each // 2, 1)
    return torch.cat([before, torch.full_like(before[:, :1], center), after], 1)
