"""torchvision's registered operators, computed by ours: with its order of arguments and its stand-ins for None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deformconv.errors import BackendError
from deformconv.torch import run
from deformconv.torch.conv.functional import DEFORM_CONV
from deformconv.torch.run import Plan
from deformconv.torch.tensors import described, device_of

__all__ = ["dispatch_keys", "kernels"]

_FORWARD, _BACKWARD = "deform_conv2d", "_deform_conv2d_backward"
_REFUSED = (TypeError, ValueError, BackendError)


def dispatch_keys() -> tuple[str, ...]:
    """The kinds of devices whose kernels ours take the place of.

    On a GPU ours hand on whatever our own GPU kernels cannot run, so there PyTorch must be able to hand on: since 2.9.
    """
    return ("CPU", "CUDA") if hasattr(torch.library, "get_kernel") else ("CPU",)


def kernels(key: str) -> dict[str, Callable[..., Any]]:
    """A kernel for each of torchvision's operators, which hands on to torchvision's own what ours refuses."""
    theirs = {name: _kernel_of(name, key) for name in (_FORWARD, _BACKWARD)}
    # On a GPU torchvision's kernels are faster than PyTorch's operations, which a torchvision for CPUs alone leaves as the only
    # way where our kernels cannot run.
    backend = "gpu" if key == "CUDA" and _is_there(_FORWARD, key) else None

    def forward(keyset: Any, *arguments: Any) -> Tensor:
        try:
            plan, input, offset, weight, bias, mask = _call(backend, *arguments)
        except _REFUSED as error:
            result: Tensor = theirs[_FORWARD](error, keyset, *arguments)
            return result
        return run.forward(plan, input, offset, weight, bias, mask)

    def backward(keyset: Any, grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        try:
            plan, input, offset, weight, _, mask = _call(backend, *arguments)
        except _REFUSED as error:
            result: tuple[Tensor, ...] = theirs[_BACKWARD](error, keyset, grad_output, *arguments)
            return result
        wanted = tuple(plan.spec.shapes)
        found = run.backward(plan, grad_output, (input, offset, weight, mask), wanted)
        d_mask = torch.zeros_like(arguments[3]) if mask is None else found.mask
        return found.input, found.weight, found.offset, d_mask, found.bias

    return {_FORWARD: forward, _BACKWARD: backward}


def _is_there(name: str, key: str) -> bool:
    """Whether torchvision has a kernel of its own."""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", key)
    return found


def _kernel_of(name: str, key: str) -> Callable[..., Any]:
    """torchvision's own kernel, for what ours refused with an error."""
    if not hasattr(torch.library, "get_kernel") or not _is_there(name, key):  # PyTorch before 2.9; torchvision for CPUs alone

        def refuse(error: Exception, *arguments: Any) -> Any:
            raise RuntimeError(str(error)) from error

        return refuse
    kernel = torch.library.get_kernel(f"torchvision::{name}", key)
    return lambda error, *arguments: kernel.call_boxed(*arguments)


def _call(
    backend: str | None, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *parameters: Any
) -> tuple[Plan, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Our plan and arguments; TypeError, ValueError or BackendError for what ours refuses."""
    *numbers, groups, offset_groups, use_mask = parameters
    stride, padding, dilation = (tuple(map(int, numbers[i : i + 2])) for i in (0, 2, 4))
    masks = mask if use_mask else None
    operator, tensors = DEFORM_CONV.operator, (input, offset, weight, bias, masks)
    values = (stride, padding, dilation, int(groups), int(offset_groups), "zeros")
    spec = run.spec_of(operator, described(operator, tensors), dict(zip(operator.parameter_names, values, strict=True)), 2)
    return run.plan_for(DEFORM_CONV, spec, device_of(input), True, backend), input, offset, weight, bias, masks
