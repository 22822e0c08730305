"""A weight that is packed once for many forward passes, and how a pass is cut that finds it packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deformconv.ops.conv.cpu_kernels import ForwardCut, Shape, pack_panel
from deformconv.runtime import arrays
from deformconv.runtime.cache import kernel
from deformconv.runtime.simd import VECTOR_BYTES, named

__all__ = ["pack", "without_panels"]


def pack(weight: Any, packed: np.ndarray, dtype: str, shape: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Fill `packed` with a weight's panels, as a forward pass in a dtype makes them whose Shape and ForwardCut these are."""
    flat, last = arrays.flat_channels(weight)
    square = np.empty((VECTOR_BYTES // packed.itemsize) ** 2, dtype)
    _pack(shape, ForwardCut(*cut.tolist()).panels, arrays.bits(flat), last, packed, square, arrays.none_of(dtype))
    return packed


@kernel
def _pack(shape, panels, weight, last, packed, square, none):
    """Pack all panels of a weight; `shape` is a Shape as an int64 array, `square` scratch of a vector's lanes squared."""
    shape = named(Shape, shape)
    for item in range(panels):
        pack_panel(item, shape, weight, last, packed, square, none)


def without_panels(arguments: Sequence[Any], cuts: Sequence[int]) -> tuple[Any, ...]:
    """A kernel's `plan` for a weight that is packed already; `cuts` are the places of its ForwardCuts."""
    changed, panels_at, copies_at = list(arguments), ForwardCut._fields.index("panels"), ForwardCut._fields.index("copies")
    for place in cuts:
        changed[place] = changed[place].copy()
        changed[place][copies_at] -= changed[place][panels_at]
        changed[place][panels_at] = 0
    return tuple(changed)
