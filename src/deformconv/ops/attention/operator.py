"""Multi-scale deformable attention as an operator: what it takes, and what can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from deformconv.ops.attention.spec import AttentionSpec, Gradients, attention_spec, level_sizes
from deformconv.ops.operator import Argument, Line, Operand, Operator, Parameter

if TYPE_CHECKING:  # each of them is a backend
    from deformconv.ops.attention import cpu, gpu, portable, reference
    from deformconv.ops.operator import Backend

    _cpu: Backend = cpu
    _gpu: Backend = gpu
    _portable: Backend = portable
    _reference: Backend = reference

__all__ = ["DEFORM_ATTENTION"]


def _check(
    operands: Mapping[str, Operand | None], parameters: Mapping[str, Any], rank: int | None = None, cached: bool = True
) -> AttentionSpec:
    given: Any = operands
    return attention_spec(**given, **parameters, cached=cached)


def _unpack(numbers: Sequence[int]) -> dict[str, Any]:
    return {"spatial_shapes": tuple(zip(numbers[::2], numbers[1::2], strict=True))}


def _plain(parameters: Mapping[str, Any], shapes: Sequence[Any]) -> tuple[Any, ...]:
    """The levels as the registry keeps them, height and width in turn."""
    return (tuple(chain(*level_sizes(parameters["spatial_shapes"]))),)


DEFORM_ATTENTION = Operator(
    name="deform_attention",
    package="deformconv.ops.attention",
    arguments=(
        Argument("value"),
        Argument("locations", precise=True),
        Argument("weights", precise=True, leaves_out=True),
    ),
    parameters=(Parameter("spatial_shapes", "int[]"),),
    backends=(Line("cpu"), Line("gpu"), Line("portable"), Line("reference", by_name_only=True)),
    gradients=Gradients,
    check=_check,
    pack=lambda spec: (tuple(chain(*spec.levels)),),
    unpack=_unpack,
    plain=_plain,
    autocast=False,
)
