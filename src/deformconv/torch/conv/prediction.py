"""A layer's forward pass in one kernel, prediction included, where nothing looks at what lies between.

Elsewhere (gradients, compilers, tracers, hooks, other devices) a layer is its predictor, an activation and the operator. Both
ways compute the same, within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as nn_module
from torch.overrides import has_torch_function

from deformconv.ops.conv.layer import Predicted
from deformconv.ops.conv.spec import layer_spec
from deformconv.ops.operator import Operand
from deformconv.torch import modes, run
from deformconv.torch.conv.functional import DEFORM_CONV
from deformconv.torch.run import Plan
from deformconv.torch.tensors import PLAIN, dtype_name, memory_of, requires_grad, tensor_of

__all__ = ["forward", "is_plain"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_ALL = tuple(getattr(nn_module, f"_global{name}") for name in _HOOKS)  # a hook that is registered is put into these


def is_plain(predictor: Any) -> bool:
    """Whether a call of a module does nothing but its class's `forward`: no hook, nothing in the place of a method."""
    return not (any(getattr(predictor, name) for name in _HOOKS) or "forward" in vars(predictor) or any(_HOOKS_OF_ALL))


def forward(
    input: Tensor,
    weights: tuple[Tensor | None, ...],
    predicted: Predicted,
    window: tuple[Any, ...],
    activation: tuple[float, float | None],
    pack: Callable[..., Any] | None = None,
) -> Tensor | None:
    """The layer's output; None where this way is not open.

    `weights` are weight and bias of the layer and of the predictor, `window` (stride, padding, dilation, groups, offset groups,
    boundary), and `activation` the mask's scale and the bound of offsets. `pack` has the packed weights of layer and predictor,
    if they are packed already.
    """
    tensors = (input, *weights)
    if modes.active() or has_torch_function(tensors):
        return None
    given = [tensor for tensor in tensors if tensor is not None]
    if any(type(t) not in PLAIN or t.layout is not torch.strided or not t.is_cpu for t in given) or requires_grad(*given):
        return None
    plan = _plan(tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors), predicted, window)
    if plan is None:
        return None
    packed = None if pack is None else pack(plan, weights[0], weights[2])
    output = plan.module.forward_layer(plan.spec, *map(memory_of, tensors), activation, library="torch", packed=packed)
    return run.in_memory_format(tensor_of(output), input)


@lru_cache(maxsize=1024)
def _plan(keys: tuple[Any, ...], predicted: Predicted, window: tuple[Any, ...]) -> Plan | None:
    """The plan of a call, whose input and weight have been checked; None if no backend has a kernel for it."""
    input, weight, bias, predictor_weight, predictor_bias = (
        None if key is None else Operand(tuple(key[0]), dtype_name(key[1])) for key in keys
    )
    assert input is not None and weight is not None and predictor_weight is not None  # a layer has them
    given = [operand for operand in (input, weight, bias, predictor_weight, predictor_bias) if operand is not None]
    if len(input.shape) != len(weight.shape) or any(operand.dtype != input.dtype for operand in given):
        return None
    if predictor_weight.shape != (predicted.channels, input.shape[1], *weight.shape[2:]):
        return None
    spec = layer_spec(input, weight, bias, predicted.masks > 0, *window)
    plan = run.plan_for(DEFORM_CONV, spec, "cpu", False, None)
    return plan if plan.inner is spec and hasattr(plan.module, "forward_layer") else None
