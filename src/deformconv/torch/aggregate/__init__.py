"""Deformable aggregation, registered with PyTorch: who loads a saved program may call no function of ours."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import Any

from deformconv.ops.aggregate import operator
from deformconv.torch.aggregate.export import EXPORT
from deformconv.torch.registry import Registered

__all__ = ["DEFORM_AGGREGATE"]


def _forward_flops(shapes: Sequence[Any], output: Any) -> int:
    """As PyTorch counts a depthwise convolution's: two operations for each channel's sample; interpolation is left out."""
    return 2 * prod(shapes[3]) * prod(output)


def _backward_flops(grad_output: Any, shapes: Sequence[Any], wanted: Collection[str]) -> int:
    """As many for the input's gradient, and as many for those of the samples' places and factors."""
    products = ("input" in wanted) + any(name in wanted for name in ("offset", "mask"))
    return 2 * products * prod(shapes[3]) * prod(grad_output)


DEFORM_AGGREGATE = Registered(operator.DEFORM_AGGREGATE, export=EXPORT, flops=(_forward_flops, _backward_flops))
