"""torchvision's registered operators, computed by ours: with its order of arguments and its stand-ins for None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deformconv.torch import run
from deformconv.torch.conv.functional import DEFORM_CONV
from deformconv.torch.run import Plan
from deformconv.torch.tensors import described

__all__ = ["kernels"]

_FORWARD, _BACKWARD = "deform_conv2d", "_deform_conv2d_backward"


def kernels() -> dict[str, Callable[..., Any]]:
    """A kernel for each of torchvision's operators, which hands on to torchvision's own what ours refuses."""
    theirs = {name: _kernel_of(name) for name in (_FORWARD, _BACKWARD)}

    def forward(keyset: Any, *arguments: Any) -> Tensor:
        try:
            plan, input, offset, weight, bias, mask = _call(*arguments)
        except (TypeError, ValueError) as error:
            result: Tensor = theirs[_FORWARD](error, keyset, *arguments)
            return result
        return run.forward(plan, input, offset, weight, bias, mask)

    def backward(keyset: Any, grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        try:
            plan, input, offset, weight, _, mask = _call(*arguments)
        except (TypeError, ValueError) as error:
            result: tuple[Tensor, ...] = theirs[_BACKWARD](error, keyset, grad_output, *arguments)
            return result
        wanted = tuple(plan.spec.shapes)
        found = run.backward(plan, grad_output, (input, offset, weight, mask), wanted)
        d_mask = torch.zeros_like(arguments[3]) if mask is None else found.mask
        return found.input, found.weight, found.offset, d_mask, found.bias

    return {_FORWARD: forward, _BACKWARD: backward}


def _kernel_of(name: str) -> Callable[..., Any]:
    """torchvision's own kernel, for what ours refused with an error."""
    if not hasattr(torch.library, "get_kernel"):  # PyTorch before 2.9

        def refuse(error: Exception, *arguments: Any) -> Any:
            raise RuntimeError(str(error)) from error

        return refuse
    kernel = torch.library.get_kernel(f"torchvision::{name}", "CPU")
    return lambda error, *arguments: kernel.call_boxed(*arguments)


def _call(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *parameters: Any
) -> tuple[Plan, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Our plan and arguments; TypeError or ValueError for what ours refuses."""
    *numbers, groups, offset_groups, use_mask = parameters
    stride, padding, dilation = (tuple(map(int, numbers[i : i + 2])) for i in (0, 2, 4))
    masks = mask if use_mask else None
    operator, tensors = DEFORM_CONV.operator, (input, offset, weight, bias, masks)
    values = (stride, padding, dilation, int(groups), int(offset_groups), "zeros")
    spec = run.spec_of(operator, described(operator, tensors), dict(zip(operator.parameter_names, values, strict=True)), 2)
    return run.plan_for(DEFORM_CONV, spec, "cpu", True, None), input, offset, weight, bias, masks
