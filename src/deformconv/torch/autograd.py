"""Any operator's derivatives.

The forward pass saves its inputs only, and the backward pass computes again what it needs beside them. Gradients come from
the backend that computed the output. Derivatives of gradients come from PyTorch, which differentiates the portable form to
any order, and cost nothing until they are asked for. Forward mode runs the portable form as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from deformconv.errors import BackendError
from deformconv.ops.operator import Spec
from deformconv.torch import modes, native, run
from deformconv.torch.run import Plan
from deformconv.torch.tensors import device_of, requires_grad

__all__ = ["BackwardFunction", "EagerFunction", "OperatorFunction", "backward", "decomposed", "functions"]


class EagerFunction(torch.autograd.Function):
    """An operator on tensors whose memory a backend reads."""

    # `forward(ctx, ...)` and no setup_context: that costs another 20 to 40 microseconds a call.
    @staticmethod
    def forward(ctx: Any, plan: Plan, *operands: Tensor | None) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(*plan.op.saved(operands))
        return run.forward(plan, *operands)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        plan, operands = ctx.plan, ctx.saved_tensors
        wanted = _needed(plan.op, ctx.needs_input_grad[1:])
        if torch.is_grad_enabled() or modes.forward_mode() or modes.mapped(grad_output):
            return None, *_backward(plan.op, plan.spec, plan.backend, grad_output, operands, wanted)
        if modes.is_special(grad_output, *operands):
            return None, *plan.op.backward(plan.spec, plan.backend, grad_output, operands, wanted)
        if not plan.module.DETERMINISTIC and modes.deterministic() is not None:  # it may have been set since the forward pass
            plan = run.plan_for(plan.op, plan.spec, device_of(grad_output), True, plan.backend)
        return None, *run.backward(plan, grad_output, operands, wanted)


class OperatorFunction(torch.autograd.Function):
    """The registered operator's derivative: behind its Autograd key, and under torch.func's transforms.

    Transforms demand a Function whose forward, setup_context and vmap are separate methods.
    """

    @staticmethod
    def forward(op: Any, spec: Spec, backend: str | None, *operands: Tensor | None) -> Tensor:
        output: Tensor = op.forward(spec, backend, *operands)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, ctx.spec, ctx.backend, *operands = inputs
        ctx.save_for_backward(*ctx.op.saved(operands))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        wanted = _needed(ctx.op, ctx.needs_input_grad[3:])
        return None, None, None, *_backward(ctx.op, ctx.spec, ctx.backend, grad_output, ctx.saved_tensors, wanted)

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Any, spec: Spec, backend: str | None, *operands: Tensor | None) -> tuple[Tensor, int]:
        def one(spec: Spec, *operands: Tensor | None) -> Tensor:
            result: Tensor = op.function.apply(op, spec, backend, *operands)
            return result

        return op.fold_forward(one, spec, info.batch_size, in_dims[3:], operands), 0


class BackwardFunction(torch.autograd.Function):
    """The gradients as a function of what they are computed from, so that they can be differentiated.

    `operands` are grad_output and what gradients depend on. It returns the wanted gradients alone.
    """

    @staticmethod
    def forward(
        op: Any, spec: Spec, backend: str | None, wanted: tuple[str, ...], grad_output: Tensor, *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        gradients = op.backward(spec, backend, grad_output, operands, wanted)
        return tuple(gradient for gradient in gradients if gradient is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.spec, _, ctx.wanted, *operands = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        operands = ctx.saved_tensors
        differentiable = (True, *(argument.differentiable for argument in ctx.op.operator.in_backward))
        flags = zip(ctx.needs_input_grad[4:], differentiable, strict=True)
        needed = [index for index, flag in enumerate(flags) if all(flag)]
        plain = not modes.is_special(*operands, *cotangents) and not any(map(modes.mapped, cotangents))
        if plain and not torch.is_grad_enabled():
            found = run.second_backward(ctx.op, ctx.spec, operands, ctx.wanted, cotangents, needed)
        else:
            with modes.without_autocast(operands[0].device.type):
                found = native.second_backward(ctx.op.operator, ctx.spec, operands, ctx.wanted, cotangents, needed)
        return None, None, None, None, *(found.get(index) for index in range(len(operands)))

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, op: Any, spec: Spec, backend: str | None, wanted: tuple[str, ...], *operands: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def one(spec: Spec, grad_output: Tensor, operands: Sequence[Any], wanted: Collection[str]) -> Any:
            return _backward(op, spec, backend, grad_output, operands, wanted)

        gradients = op.fold_backward(one, spec, info.batch_size, in_dims[4:], operands, wanted)
        found = tuple(gradient for gradient in gradients if gradient is not None)
        return found, (0,) * len(found)


def functions(name: str) -> tuple[Any, Any, Any]:
    """An operator's own EagerFunction, OperatorFunction and BackwardFunction: a graph shows their names."""
    title = name.title().replace("_", "")
    bases = (f"{title}Function", EagerFunction), (f"{title}Function", OperatorFunction), (f"{title}Backward", BackwardFunction)
    eager, function, backward = (type(name, (base,), {}) for name, base in bases)
    return eager, function, backward


def backward(
    op: Any, spec: Spec, backend: str | None, grad_output: Tensor, operands: Sequence[Any], wanted: Collection[str]
) -> Any:
    """The gradients for tensors of any kind."""
    if modes.forward_mode() or requires_grad(grad_output, *operands) or modes.transformed():
        return _backward(op, spec, backend, grad_output, operands, wanted)
    if modes.is_special(grad_output, *operands):
        return op.backward(spec, backend, grad_output, operands, wanted)
    plan = run.plan_for(op, spec, device_of(grad_output), True, backend)
    return run.backward(plan, grad_output, operands, wanted)


def _backward(
    op: Any, spec: Spec, backend: str | None, grad_output: Tensor, operands: Sequence[Any], wanted: Collection[str]
) -> Any:
    """The gradients, which can be differentiated in turn."""
    mapped = modes.mapped(grad_output)
    if mapped and modes.map_level() == 1 and not modes.forward_mode():
        return _fold_mapped(op, spec, backend, grad_output, operands, wanted)
    if mapped or modes.forward_mode():
        with modes.without_autocast(grad_output.device.type):
            return native.backward(op.operator, spec, grad_output, operands, wanted)
    names = tuple(name for name in op.operator.names if name in wanted)
    found = op.backward_function.apply(op, spec, backend, names, grad_output, *operands)
    return op.operator.gradients(**dict(zip(names, found, strict=True)))


def _fold_mapped(
    op: Any, spec: Spec, backend: str | None, grad_output: Tensor, operands: Sequence[Any], wanted: Collection[str]
) -> Any:
    """One call for all the gradients of the output that autograd's own vmap goes through (`is_grads_batched`)."""
    grad_output = torch._remove_batch_dim(grad_output, 1, 1, 0)

    def one(spec: Spec, grad_output: Tensor, operands: Sequence[Any], wanted: Collection[str]) -> Any:
        return backward(op, spec, backend, grad_output, operands, wanted)

    dims = (0, *(None for _ in operands))
    names = [name for name in op.operator.names if name in wanted]
    found = op.fold_backward(one, spec, grad_output.shape[0], dims, (grad_output, *operands), names)
    return op.operator.gradients(*(None if g is None else torch._add_batch_dim(g, 0, 1) for g in found))


def decomposed(op: Any, spec: Spec, backend: str | None, *operands: Tensor | None) -> Tensor:
    """The output in PyTorch's own operations, which carry every derivative."""
    if backend not in (None, "portable"):
        raise BackendError(
            f'backend="{backend}" cannot run under forward-mode differentiation, nor under torch.func within '
            'torch.compile; expected None or "portable".'
        )
    first: Any = operands[0]
    with modes.without_autocast(first.device.type):
        return native.forward(op.operator, spec, *operands)


def _needed(op: Any, flags: Sequence[bool]) -> list[str]:
    pairs = zip(op.operator.arguments, flags, strict=True)
    return [argument.name for argument, needed in pairs if needed and argument.differentiable]
