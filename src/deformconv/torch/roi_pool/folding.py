"""vmap without a loop: a mapped axis becomes part of the boxes of one call, and of its images if these are mapped, too.

`run` calls the operator on tensors without the mapped axis; in the file `vmap` it is called `one`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deformconv.ops.roi_pool.spec import Gradients, RoiSpec
from deformconv.torch.tensors import HALF
from deformconv.torch.vmap import all_in_front, in_front

__all__ = ["fold_backward", "fold_forward"]

Run = Callable[..., Any]


def fold_forward(run: Run, spec: RoiSpec, B: int, dims: Sequence[int | None], operands: Sequence[Tensor | None]) -> Tensor:
    """The output (B, R, C_out, PH, PW); `run` takes a spec, and input, boxes, offset and mask."""
    folded, x, boxes, *others = _folded(spec, B, dims, operands, dims[0] is not None)
    output: Tensor = run(folded, x, boxes, *others)
    return output.unflatten(0, (B, spec.boxes))


def fold_backward(
    run: Run, spec: RoiSpec, B: int, dims: Sequence[int | None], operands: Sequence[Tensor | None], wanted: Sequence[str]
) -> Gradients:
    """The gradients, each with B in front; `run` takes a spec, grad_output, (input, boxes, offset, mask) and wanted."""
    by_image = dims[1] is not None or "input" in wanted
    grad_output = all_in_front(in_front(operands[0], dims[0]), B, dims[0]).flatten(0, 1)
    folded, *others = _folded(spec, B, dims[1:], operands[1:], by_image)
    found = run(folded, grad_output, others, wanted)
    rows = {"input": spec.batch, "offset": spec.boxes, "mask": spec.boxes}
    return Gradients(**{name: getattr(found, name).unflatten(0, (B, rows[name])) for name in wanted})


def _folded(
    spec: RoiSpec, B: int, dims: Sequence[int | None], operands: Sequence[Any], by_image: bool
) -> tuple[RoiSpec, Tensor, Tensor, Tensor | None, Tensor | None]:
    """One call for all: its spec and operands; `by_image` if each of the B calls gets images of its own."""
    x, boxes, *others = (in_front(tensor, dim) for tensor, dim in zip(operands, dims, strict=True))
    boxes = all_in_front(boxes, B, dims[1])
    if by_image:
        x = all_in_front(x, B, dims[0]).flatten(0, 1)
        boxes = boxes.float() if boxes.dtype in HALF else boxes  # which cannot count so many images
        before = torch.arange(B, dtype=boxes.dtype, device=boxes.device).reshape(B, 1, 1) * spec.batch
        number = boxes[..., :1]
        is_there = (number >= 0) & (number < spec.batch)  # else it might be another call's
        boxes = torch.cat([torch.where(is_there, number + before, torch.full_like(number, -1)), boxes[..., 1:]], dim=-1)
    offset, mask = (
        None if tensor is None else all_in_front(tensor, B, dim).flatten(0, 1)
        for tensor, dim in zip(others, dims[2:], strict=True)
    )
    folded = replace(spec, batch=B * spec.batch if by_image else spec.batch, boxes=B * spec.boxes)
    assert x is not None  # it is not optional
    return folded, x, boxes.flatten(0, 1), offset, mask
