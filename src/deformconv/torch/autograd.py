"""PyTorch's derivative of the operator where a backend brings a backward of its own.

The backend runs on NumPy views of the tensors, which share their memory. Backward keeps the inputs only and
samples them again. Whatever is not a plain call (a graph of the gradients themselves, a transform's wrapped
tensors) runs the portable form, whose PyTorch operations every transform understands.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from deformconv.ops.conv import portable
from deformconv.ops.conv.spec import GRADIENTS, ConvSpec, Gradients


class DeformConvFunction(torch.autograd.Function):
    """The operator with a backend's own backward."""

    # `forward(ctx, ...)` and no setup_context: that costs another 20 to 40 microseconds a call.
    @staticmethod
    def forward(
        ctx: Any,
        backend: ModuleType,
        spec: ConvSpec,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.backend, ctx.spec = backend, spec
        ctx.save_for_backward(input, offset, weight, mask)
        return compute(backend, spec, input, offset, weight, bias, mask)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        wanted = [name for name, needed in zip(GRADIENTS, ctx.needs_input_grad[2:], strict=True) if needed]
        input, offset, weight, mask = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed(grad_output, input, offset, weight, mask):
            backward = portable.deform_conv_backward
        else:
            backward = partial(compute_backward, ctx.backend)
        return None, None, *backward(ctx.spec, grad_output, input, offset, weight, mask, wanted)


def compute(backend: ModuleType, spec: ConvSpec, *operands: Tensor | None) -> Tensor:
    """Run a NumPy backend forward: `operands` are input, offset, weight, bias and mask."""
    return torch.from_numpy(backend.deform_conv(spec, *map(_array, operands)))


def compute_backward(
    backend: ModuleType,
    spec: ConvSpec,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    wanted: Collection[str],
) -> Gradients:
    """Run a NumPy backend backward."""
    arrays = map(_array, (grad_output, input, offset, weight, mask))
    gradients = backend.deform_conv_backward(spec, *arrays, wanted)
    return Gradients(*(None if array is None else torch.from_numpy(array) for array in gradients))


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a tensor carries more than its memory shows, so that a NumPy view of it would lose something.

    That is: batched tensors and those of torch.func, fake and wrapped ones, any tensor under a dispatch mode,
    any under forward-mode differentiation, and all of them while a compiler traces.
    """
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or any(t is not None and torch._C._dispatch_isTensorSubclassLike(t) for t in tensors)
    )


def _array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().resolve_neg().numpy()
