"""Multi-scale deformable attention on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import handle_torch_function, has_torch_function

from deformconv.ops.attention.spec import Gradients, level_sizes
from deformconv.ops.words import unexpected
from deformconv.torch import calls
from deformconv.torch.attention import DEFORM_ATTENTION

__all__ = ["deform_attention", "deform_attention_backward"]


def deform_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    locations: Tensor,
    weights: Tensor,
    *,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """Attend to a few points in each level of a feature pyramid: for every query and head the weighted sum of their values.

    What Deformable DETR and the detectors after it call multi-scale deformable attention, between its projections. Values are
    interpolated as by `torch.nn.functional.grid_sample` with align_corners=False and zeros outside of a level.

    Args:
        value: shape (N, L, heads, d), the pixels of all levels, row by row, one level after the other.
        spatial_shapes: the levels' sizes (height, width): a sequence of pairs, or an integer tensor (levels, 2), whose numbers
            are read, for which a GPU is waited for, and of which torch.export knows none: pass pairs there. The sum of the
            products is L.
        locations: shape (N, Q, heads, levels, points, 2), x before y, from 0 at a level's left and upper edge to 1 at its
            right and lower one: x is column x * width - 0.5.
        weights: shape (N, Q, heads, levels, points), the factor of each point; a softmax over levels and points, as a rule.
        backend: "cpu", "gpu" or "portable"; None takes the first that can run the call.

    Returns:
        The output, shape (N, Q, heads*d), of the dtype and on the device of `value`.

    Raises:
        ShapeError: a shape does not fit, or the levels have not L pixels.
        TypeError: an argument is no tensor, or not of the common floating-point dtype; only beside a `value` in half precision
            the others may be float32.
        ValueError: `backend` is unknown; the tensors are on different devices.
        BackendError: the named backend cannot run the call.

    Example:
        >>> import torch
        >>> from deformconv.torch import deform_attention
        >>> levels = [(8, 12), (4, 6)]
        >>> value = torch.rand(1, 8 * 12 + 4 * 6, 2, 16)                       # 2 heads of 16 channels
        >>> locations = torch.full((1, 5, 2, 2, 4, 2), 0.5).requires_grad_()   # 5 queries, 4 points in each level
        >>> weights = torch.full((1, 5, 2, 2, 4), 1 / 8)
        >>> y = deform_attention(value, levels, locations, weights)
        >>> y.shape
        torch.Size([1, 5, 32])
        >>> y.sum().backward()
        >>> locations.grad.shape
        torch.Size([1, 5, 2, 2, 4, 2])

    Paper: arXiv 2010.04159, equation 3.
    """
    if unknown:
        raise unexpected(deform_attention, unknown)
    operands = (value, locations, weights)
    if has_torch_function(operands):
        result: Tensor = handle_torch_function(
            deform_attention, operands, value, spatial_shapes, locations, weights, backend=backend
        )
        return result
    return calls.call(DEFORM_ATTENTION, None, backend, (_sizes(spatial_shapes),), operands)


def deform_attention_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    locations: Tensor,
    weights: Tensor,
    *,
    backend: str | None = None,
    wanted: Collection[str] | None = None,
) -> Gradients:
    """`deformconv.deform_attention_backward` on tensors; its result has a gradient if a tensor requires one."""
    parameters, operands = (_sizes(spatial_shapes),), (value, locations, weights)
    found: Gradients = calls.backward(DEFORM_ATTENTION, backend, parameters, grad_output, operands, wanted)
    return found


def _sizes(spatial_shapes: Any) -> tuple[tuple[int, int], ...]:
    """The levels' sizes; a tensor must have numbers."""
    if isinstance(spatial_shapes, Tensor) and (spatial_shapes.is_meta or isinstance(spatial_shapes, FakeTensor)):
        raise TypeError(
            "`spatial_shapes` is a tensor without numbers, as on meta and in torch.export; expected a pair of integers for "
            "each level: pass `[(height, width), ...]`."
        )
    return level_sizes(spatial_shapes)
