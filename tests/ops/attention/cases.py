"""The table of named cases of multi-scale deformable attention, and their numbers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deformconv.ops.attention.spec import AttentionSpec, attention_spec
from deformconv.ops.operator import Operand

Array = np.ndarray[Any, Any]
ARGUMENTS = ("value", "locations", "weights")


class Case(NamedTuple):
    """A call. Locations lie in the levels and, as far as `margin` says, beyond their edges."""

    name: str
    batch: int = 2
    levels: tuple[tuple[int, int], ...] = ((5, 7), (3, 4))
    heads: int = 2
    channels: int = 5
    queries: int = 6
    points: int = 3
    margin: float = 0.2

    def but(self, **changes: Any) -> Case:
        return self._replace(**changes)


class Call(NamedTuple):
    """A case's checked call and its arrays."""

    spec: AttentionSpec
    value: Array
    locations: Array
    weights: Array
    grad_output: Array

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.value, self.locations, self.weights

    def but(self, **arrays: Any) -> Call:
        return self._replace(**arrays)


CASES = [
    Case("two levels"),
    Case("one level", levels=((6, 5),), points=4),
    Case("four levels", levels=((8, 11), (4, 6), (2, 3), (1, 2)), heads=3, points=4, channels=8),
    Case("a level of one pixel", levels=((1, 1), (3, 3)), margin=0.8),
    Case("one of all", batch=1, levels=((1, 1),), heads=1, channels=1, queries=1, points=1),
    Case("far beyond the edges", margin=4.0),
    Case("one channel", channels=1),
    Case("32 channels", batch=1, channels=32, points=4, queries=9),
    Case("more channels than registers", batch=1, channels=203, queries=4),
    Case("more queries than an item has, and reads of a pixel", heads=3, queries=70, channels=19, levels=((3, 4), (2, 2))),
    Case("more samples than are placed at once", batch=1, heads=5, points=47, levels=((4, 4), (3, 2), (2, 2)), queries=3),
]


def spec_of(levels: Any, arrays: Sequence[Array]) -> AttentionSpec:
    return attention_spec(*(Operand(array.shape, str(array.dtype)) for array in arrays), spatial_shapes=levels)


def make(case: Case, dtype: str = "float64") -> Call:
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    tokens = sum(height * width for height, width in case.levels)
    shape = (case.batch, case.queries, case.heads, len(case.levels), case.points)
    arrays = (
        random.normal(size=(case.batch, tokens, case.heads, case.channels)).astype(dtype),
        random.uniform(-case.margin, 1 + case.margin, (*shape, 2)).astype(dtype),
        random.uniform(-0.5, 1, shape).astype(dtype),
    )
    spec = spec_of(case.levels, arrays)
    return Call(spec, *arrays, random.normal(size=spec.output_shape).astype(dtype))
