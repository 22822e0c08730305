"""The table of named cases of deformable RoI pooling, and their numbers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deformconv.ops.operator import Operand
from deformconv.ops.roi_pool.spec import CONVENTIONS, RoiSpec, roi_spec

Array = np.ndarray[Any, Any]
ARGUMENTS = ("input", "boxes", "offset", "mask")


class Case(NamedTuple):
    """A call. Boxes are in pixels of an image; some are within it, some reach over its border."""

    name: str
    channels: int = 5
    size: tuple[int, int] = (9, 12)
    batch: int = 2
    boxes: int = 4
    output_size: tuple[int, int] = (3, 2)
    scale: float = 0.5
    sampling: int = 2
    convention: str = "aligned"
    gamma: float = 0.1
    position_sensitive: bool = False
    part_size: tuple[int, int] | None = None
    classes: int = 1
    deformed: bool = True
    masked: bool = True
    spread: float = 1.5  # of offsets

    def but(self, **changes: Any) -> Case:
        return self._replace(**changes)


class Call(NamedTuple):
    """A case's checked call and its arrays."""

    spec: RoiSpec
    input: Array
    boxes: Array
    offset: Array | None
    mask: Array | None
    grad_output: Array

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self.input, self.boxes, self.offset, self.mask

    def but(self, **arrays: Any) -> Call:
        return self._replace(**arrays)


_VARIANTS = [
    Case("v2"),
    Case("v1", masked=False),
    Case("plain", deformed=False, masked=False),
    Case("mask alone", deformed=False),
    Case("one sample", sampling=1),
    Case("samples not square with bins", output_size=(2, 4), sampling=3, channels=19),
    Case("position-sensitive", channels=24, output_size=(2, 3), position_sensitive=True),
    Case("parts", output_size=(4, 3), part_size=(2, 2)),
    Case("classes", channels=6, classes=3),
    Case(
        "classes, parts, position-sensitive", channels=36, output_size=(3, 3), position_sensitive=True, classes=2,
        part_size=(2, 3),
    ),
    Case("more channels than a block", channels=150, boxes=3),
    Case("large offsets", spread=20.0),
]  # fmt: skip
CASES = [
    case.but(name=f"{case.name}, {convention}", convention=convention) for convention in CONVENTIONS for case in _VARIANTS
] + [
    Case("boxes decide, aligned", sampling=0),
    Case("boxes decide, unaligned", sampling=0, convention="unaligned", size=(20, 16), scale=1.0),
    Case("more samples than are placed at once", sampling=0, size=(40, 60), scale=4.0, output_size=(1, 2), boxes=2, channels=3),
]


def boxes_of(random: np.random.Generator, case: Case) -> Array:
    """Boxes (R, 5); the first images have more of them than the last, which has none if there is one box."""
    height, width = (length / case.scale for length in case.size)
    rows = []
    for number in range(case.boxes):
        x, y = random.uniform(-0.2 * width, 0.8 * width), random.uniform(-0.2 * height, 0.8 * height)
        rows.append((number * number % case.batch, x, y, x + random.uniform(2, width), y + random.uniform(2, height)))
    return np.array(rows).reshape(-1, 5)


def parameters(case: Case) -> dict[str, Any]:
    """The public functions' arguments that are no arrays."""
    return {
        "output_size": case.output_size, "spatial_scale": case.scale, "sampling_ratio": case.sampling,
        "convention": case.convention, "gamma": case.gamma, "position_sensitive": case.position_sensitive,
        "part_size": case.part_size,
    }  # fmt: skip


def spec_of(case: Case, arrays: Sequence[Array | None]) -> RoiSpec:
    operands = [None if array is None else Operand(array.shape, str(array.dtype)) for array in arrays]
    named = parameters(case)
    named["group_size"] = case.output_size if named.pop("position_sensitive") else 1
    return roi_spec(*operands, **named)  # type: ignore[arg-type]


def make(case: Case, dtype: str = "float64") -> Call:
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    part_size = case.part_size or case.output_size
    input = random.normal(size=(case.batch, case.channels, *case.size)).astype(dtype)
    boxes = boxes_of(random, case).astype(dtype)
    offset = random.normal(scale=case.spread, size=(case.boxes, 2 * case.classes, *part_size)).astype(dtype)
    mask = random.uniform(0, 2, (case.boxes, 1, *case.output_size)).astype(dtype)
    arrays = (input, boxes, offset if case.deformed else None, mask if case.masked else None)
    spec = spec_of(case, arrays)
    return Call(spec, *arrays, random.normal(size=spec.output_shape).astype(dtype))
