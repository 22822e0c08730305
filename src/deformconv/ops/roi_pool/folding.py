"""vmap without a loop: a mapped axis becomes part of the boxes of one call, and of its images if these are mapped, too.

`run` calls the operator on arrays without the mapped axis; in `deformconv.ops.folding` it is called `one`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from array_api_compat import array_namespace
from array_api_compat import device as device_of

from deformconv.ops.folding import all_in_front, in_front, merged, split
from deformconv.ops.operator import HALF
from deformconv.ops.roi_pool.spec import Gradients, RoiSpec

__all__ = ["fold_backward", "fold_forward"]

Array = Any
Run = Callable[..., Any]


def fold_forward(run: Run, spec: RoiSpec, B: int, dims: Sequence[int | None], operands: Sequence[Array | None]) -> Array:
    """The output (B, R, C_out, PH, PW); `run` takes a spec, and input, boxes, offset and mask."""
    folded, x, boxes, *others = _folded(spec, B, dims, operands, dims[0] is not None)
    return split(run(folded, x, boxes, *others), 0, B)


def fold_backward(
    run: Run, spec: RoiSpec, B: int, dims: Sequence[int | None], operands: Sequence[Array | None], wanted: Sequence[str]
) -> Gradients:
    """The gradients, each with B in front; `run` takes a spec, grad_output, (input, boxes, offset, mask) and wanted."""
    by_image = dims[1] is not None or "input" in wanted
    grad_output = merged(all_in_front(in_front(operands[0], dims[0]), B, dims[0]), 0)
    folded, *others = _folded(spec, B, dims[1:], operands[1:], by_image)
    found = run(folded, grad_output, others, wanted)
    return Gradients(**{name: split(getattr(found, name), 0, B) for name in wanted})


def _folded(
    spec: RoiSpec, B: int, dims: Sequence[int | None], operands: Sequence[Any], by_image: bool
) -> tuple[RoiSpec, Array, Array, Array | None, Array | None]:
    """One call for all: its spec and operands; `by_image` if each of the B calls gets images of its own."""
    x, boxes, *others = (in_front(array, dim) for array, dim in zip(operands, dims, strict=True))
    boxes = all_in_front(boxes, B, dims[1])
    if by_image:
        xp = array_namespace(boxes)
        x = merged(all_in_front(x, B, dims[0]), 0)
        boxes = xp.astype(boxes, xp.float32, copy=False) if spec.dtype in HALF else boxes  # it could not count so many images
        before = xp.reshape(xp.arange(B, dtype=boxes.dtype, device=device_of(boxes)), (B, 1, 1)) * spec.batch
        number = boxes[..., :1]
        is_there = (number >= 0) & (number < spec.batch)  # else it might be another call's
        number = xp.where(is_there, number + before, xp.full_like(number, -1))
        boxes = xp.concat([number, boxes[..., 1:]], axis=-1)
    offset, mask = (
        None if array is None else merged(all_in_front(array, B, dim), 0) for array, dim in zip(others, dims[2:], strict=True)
    )
    folded = replace(spec, batch=B * spec.batch if by_image else spec.batch, boxes=B * spec.boxes)
    return folded, x, merged(boxes, 0), offset, mask
