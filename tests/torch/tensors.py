"""The cases of an operator's suite as PyTorch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.ops.conv.cases import ARGUMENTS, CASES, Case, make

from deformconv.torch import deform_conv1d, deform_conv2d, deform_conv3d

FUNCTIONS = {1: deform_conv1d, 2: deform_conv2d, 3: deform_conv3d}
PLAIN = next(case for case in CASES if case.name == "2-D")


def keywords(case: Case) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups", "offset_groups", "boundary")
    return {name: getattr(case, name) for name in names}


def tensors(call: Any, requires_grad: bool = False, names: Sequence[str] = ARGUMENTS) -> dict[str, torch.Tensor | None]:
    """A call's arrays, copied."""
    arrays = {name: getattr(call, name) for name in names}
    return {
        name: None if array is None else torch.from_numpy(array.copy()).requires_grad_(requires_grad)
        for name, array in arrays.items()
    }


def call_of(case: Case = PLAIN, dtype: str = "float64", requires_grad: bool = False, **how: Any) -> Any:
    """The function for a case's rank, its tensors, its other arguments, and a gradient of its output."""
    call = make(case, dtype, **how)
    return (
        FUNCTIONS[len(case.size)],
        tensors(call, requires_grad),
        keywords(case),
        torch.from_numpy(call.grad_output),
    )
