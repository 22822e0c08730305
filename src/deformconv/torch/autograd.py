"""The operator's derivatives.

Backward keeps the inputs only and samples them again. Gradients are computed by the backend that computed the output;
derivatives of gradients by PyTorch's own differentiation of the portable form, which has all orders and costs nothing
until it is asked for. Forward mode runs the portable form as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deformconv.errors import BackendError
from deformconv.ops.conv import portable
from deformconv.ops.conv.spec import GRADIENTS, ConvSpec, Gradients
from deformconv.torch import compute, folding, operator
from deformconv.torch.compute import Plan

__all__ = ["DeformConvFunction", "TransformedFunction", "decomposed", "is_special", "requires_grad"]


class DeformConvFunction(torch.autograd.Function):
    """The operator of eager calls, and behind the registered operator's Autograd key, where the plan has no module."""

    # `forward(ctx, ...)` and no setup_context: that costs another 20 to 40 microseconds a call.
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(input, offset, weight, mask)
        if plan.module is None:
            return operator.forward(plan.spec, plan.backend, input, offset, weight, bias, mask)
        return compute.forward(plan, input, offset, weight, bias, mask)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        plan = ctx.plan
        wanted = [name for name, needed in zip(GRADIENTS, ctx.needs_input_grad[1:], strict=True) if needed]
        operands = (grad_output, *ctx.saved_tensors)
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or _is_mapped(grad_output):
            return None, *_backward(plan.spec, plan.backend, operands, wanted)
        if plan.module is None or is_special(*operands):
            return None, *operator.backward(plan.spec, plan.backend, *(*operands, wanted))
        return None, *compute.backward(plan, *(*operands, wanted))


class TransformedFunction(torch.autograd.Function):
    """The operator under torch.func's grad, vjp and vmap, which ask for a Function in three parts."""

    @staticmethod
    def forward(
        spec: ConvSpec,
        backend: str | None,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        return operator.forward(spec, backend, input, offset, weight, bias, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.spec, ctx.backend, input, offset, weight, _, mask = inputs
        ctx.save_for_backward(input, offset, weight, mask)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        wanted = [name for name, needed in zip(GRADIENTS, ctx.needs_input_grad[2:], strict=True) if needed]
        return None, None, *_backward(ctx.spec, ctx.backend, (grad_output, *ctx.saved_tensors), wanted)

    @staticmethod
    def vmap(info: Any, in_dims: Any, spec: ConvSpec, backend: str | None, *operands: Tensor | None) -> tuple[Tensor, int]:
        def run(spec: ConvSpec, *operands: Tensor | None) -> Tensor:
            result: Tensor = TransformedFunction.apply(spec, backend, *operands)
            return result

        return folding.fold_forward(run, spec, info.batch_size, in_dims[2:], operands), 0


class BackwardFunction(torch.autograd.Function):
    """The gradients as a function of what they are computed from, so that they can be differentiated.

    It returns the wanted ones only.
    """

    @staticmethod
    def forward(
        spec: ConvSpec,
        backend: str | None,
        wanted: tuple[str, ...],
        grad_output: Tensor,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        gradients = operator.backward(spec, backend, grad_output, input, offset, weight, mask, wanted)
        return tuple(gradient for gradient in gradients if gradient is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, _, ctx.wanted, *operands = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        operands = ctx.saved_tensors
        needed = [index for index, flag in enumerate(ctx.needs_input_grad[3:]) if flag]
        plain = not is_special(*operands, *cotangents) and not any(map(_is_mapped, cotangents))
        if plain and not torch.is_grad_enabled():
            found = compute.second_backward(ctx.spec, operands, ctx.wanted, cotangents, needed)
        else:
            with compute.without_autocast(operands[0].device.type):
                found = portable.second_backward(ctx.spec, operands, ctx.wanted, cotangents, needed)
        return None, None, None, *(found.get(index) for index in range(5))

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, spec: ConvSpec, backend: str | None, wanted: tuple[str, ...], *operands: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def run(spec: ConvSpec, *arguments: Any) -> Gradients:
            *operands, wanted = arguments
            return _backward(spec, backend, operands, wanted)

        gradients = folding.fold_backward(run, spec, info.batch_size, in_dims[3:], operands, wanted)
        found = tuple(gradient for gradient in gradients if gradient is not None)
        return found, (0,) * len(found)


def backward(spec: ConvSpec, backend: str | None, operands: Sequence[Any], wanted: Collection[str]) -> Gradients:
    """The gradients for tensors of any kind: grad_output, input, offset, weight and mask."""
    if forward_ad._current_level >= 0 or requires_grad(*operands) or torch._C._are_functorch_transforms_active():
        return _backward(spec, backend, operands, wanted)
    if is_special(*operands):
        return operator.backward(spec, backend, *(*operands, wanted))
    plan = compute.plan_for(spec, compute.device_of(operands[0]), True, backend)
    return compute.backward(plan, *(*operands, wanted))


def _backward(spec: ConvSpec, backend: str | None, operands: Sequence[Any], wanted: Collection[str]) -> Gradients:
    """The gradients, which can be differentiated in turn."""
    mapped = _is_mapped(operands[0])
    if mapped and _map_level() == 1 and forward_ad._current_level < 0:
        return _fold_mapped(spec, backend, operands, wanted)
    if mapped or forward_ad._current_level >= 0:
        with compute.without_autocast(operands[0].device.type):
            return portable.deform_conv_backward(spec, *(*operands, wanted))
    names = tuple(name for name in GRADIENTS if name in wanted)
    results = dict(zip(names, BackwardFunction.apply(spec, backend, names, *operands), strict=True))
    return Gradients(**results)


def decomposed(spec: ConvSpec, backend: str | None, *operands: Tensor | None) -> Tensor:
    """The portable form as it is, whose operations carry every derivative."""
    if backend not in (None, "portable"):
        raise BackendError(
            f'backend="{backend}" cannot run under forward-mode differentiation, nor under torch.func within '
            'torch.compile; expected None or "portable".'
        )
    with compute.without_autocast(operands[0].device.type):  # type: ignore[union-attr]
        return portable.deform_conv(spec, *operands)


def is_special(*tensors: Tensor | None) -> bool:
    """Whether a call is more than its tensors' memory: traced, transformed, under a mode, or on wrapped tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or any(type(t) not in PLAIN and t is not None for t in tensors)
    )


def _is_mapped(grad_output: Tensor) -> bool:
    """Whether autograd runs backward for many gradients at once (`is_grads_batched`), by a vmap of its own."""
    return (
        type(grad_output) is Tensor
        and torch._C._dispatch_isTensorSubclassLike(grad_output)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _map_level() -> int:
    """How many of autograd's own vmaps are within each other here."""
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def _fold_mapped(spec: ConvSpec, backend: str | None, operands: Sequence[Any], wanted: Collection[str]) -> Gradients:
    """The gradients for many gradients of the output at once, in one call."""
    grad_output = torch._remove_batch_dim(operands[0], 1, 1, 0)

    def run(spec: ConvSpec, *arguments: Any) -> Gradients:
        *tensors, names = arguments
        return backward(spec, backend, tensors, names)

    dims = (0, None, None, None, None)
    names = [name for name in GRADIENTS if name in wanted]
    found = folding.fold_backward(run, spec, grad_output.shape[0], dims, (grad_output, *operands[1:]), names)
    return Gradients(*(None if gradient is None else torch._add_batch_dim(gradient, 0, 1) for gradient in found))


PLAIN = frozenset((Tensor, torch.nn.Parameter))


def requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _forward_autograd(keyset: Any, *arguments: Any) -> Tensor:
    """Behind the Autograd key of the registered operator."""
    operands, parameters, backend = arguments[:5], arguments[5:-1], arguments[-1]
    # Here a transform is one that a compiler records, which the Function cannot be part of.
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return decomposed(operator.forward_spec(*operands, *parameters), backend, *operands)
    if requires_grad(*operands):
        with operator.untraced():
            spec = operator.forward_spec(*operands, *parameters)
        plan = Plan(spec, compute.inner_spec(spec), None, backend)
        result: Tensor = DeformConvFunction.apply(plan, *operands)
        return result
    result = operator.forward_op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
    return result


def _backward_autograd(keyset: Any, *arguments: Any) -> list[Tensor]:
    operands, parameters, backend, flags = arguments[:5], arguments[5:-2], arguments[-2], arguments[-1]
    if forward_ad._current_level >= 0 or requires_grad(*operands):
        wanted = [name for name, flag in zip(GRADIENTS, flags, strict=True) if flag]
        gradients = _backward(operator.backward_spec(*operands, *parameters), backend, operands, wanted)
        return [gradient for gradient in gradients if gradient is not None]
    found: list[Tensor] = operator.backward_op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
    return found


operator.library.impl("deform_conv", _forward_autograd, "Autograd", with_keyset=True)
operator.library.impl("deform_conv_backward", _backward_autograd, "Autograd", with_keyset=True)
