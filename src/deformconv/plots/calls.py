"""Recorded calls of deformable layers, and of deformable attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from deformconv.ops.window import n_of

__all__ = ["AttentionCall", "Call", "Levels", "attention_table", "chosen", "table"]

Levels = tuple[tuple[int, int], ...]  # (height, width) of each


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded call of a deformable layer. Axes go depth, height, width.

    Attributes:
        layer: the layer's name in the model, "" if it is the model.
        index: which of the layer's calls within one forward pass of the model, from 0; counted in each thread by itself.
        forward: which forward pass of the model within the `with` block, from 0.
        kind: whose layer it is: "deformconv", "torchvision", "kornia" or "mmcv".
        input_size, output_size: of the maps, in cells.
        kernel_size, stride, dilation: one number for each axis.
        padding: (before, after) for each axis, in input pixels.
        offset_groups: how many groups of channels have offsets of their own.
        offset: (N, offset_groups*K*D, *O), input pixels of the layer, a copy without a graph.
        mask: (N, offset_groups*K, *O), or None for v1.
        padding_mode: what the input is padded with: "zeros", "reflect", "replicate" or "circular".
    """

    layer: str
    index: int
    forward: int
    kind: str
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    offset_groups: int
    offset: Tensor = field(repr=False)
    mask: Tensor | None = field(repr=False)
    padding_mode: str = "zeros"

    @property
    def D(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel_size)

    @property
    def K(self) -> int:
        """The number of taps of the kernel."""
        return prod(self.kernel_size)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One recorded call of multi-scale deformable attention.

    Attributes:
        layer, index, forward: as a `Call`'s.
        kind: whose layer it is: "deformconv" or "transformers".
        levels: the (height, width) of each level of the pyramid.
        locations: (N, Q, heads, levels, points, 2), x before y, from 0 to 1 over a level: as the operator takes them, copies
            without a graph.
        weights: (N, Q, heads, levels, points).
        reference: (N, Q, levels or 1, 2 or 4): the queries' reference points, or boxes (centre and size), x before y, from 0
            to 1; None where they are not known.
    """

    layer: str
    index: int
    forward: int
    kind: str
    levels: Levels
    locations: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    reference: Tensor | None = field(repr=False)


def chosen(found: Sequence[Any], name: str, index: int | None) -> Any:
    """Of a layer's calls the last, or the last with an index."""
    chosen = [call for call in found if index in (None, call.index)]
    if not chosen:
        times = n_of(max(call.index for call in found) + 1, "time")
        raise ValueError(f"layer {name!r} was called {times} in a forward pass; there is no call {index} (from 0).")
    return chosen[-1]


def table(calls: Sequence[Call]) -> list[str]:
    """Lines for a printed table, one a layer and index."""
    if not calls:
        return []
    rows: list[tuple[str, ...]] = [("layer", "call", "input", "output", "kernel", "groups", "largest offset", "mean mask")]
    for call in {(call.layer, call.index): call for call in calls}.values():
        by = ["x".join(map(str, sizes)) for sizes in (call.input_size, call.output_size, call.kernel_size)]
        largest = float(call.offset.abs().max()) if call.offset.numel() else 0.0
        mean = "-" if call.mask is None else f"{float(call.mask.float().mean()):.3f}"
        rows.append((call.layer or "(model)", str(call.index), *by, str(call.offset_groups), f"{largest:.3g} px", mean))
    return _aligned(rows)


def attention_table(calls: Sequence[AttentionCall]) -> list[str]:
    """The same of attention."""
    if not calls:
        return []
    rows: list[tuple[str, ...]] = [("attention", "call", "queries", "heads", "points", "levels")]
    for call in {(call.layer, call.index): call for call in calls}.values():
        queries, heads, _, points = call.weights.shape[1:]
        levels = ", ".join(f"{height}x{width}" for height, width in call.levels)
        rows.append((call.layer or "(model)", *map(str, (call.index, queries, heads, points)), levels))
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
