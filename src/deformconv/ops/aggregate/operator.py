"""Deformable aggregation as an operator: what it takes, and what can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deformconv.ops.aggregate.spec import AggregateSpec, Gradients, aggregate_spec, check_grad_output
from deformconv.ops.operator import Argument, Line, Operand, Operator, Parameter
from deformconv.ops.window import flat, integers, pairs, window_of

if TYPE_CHECKING:  # each of them is a backend
    from deformconv.ops.aggregate import cpu, gpu, portable, reference
    from deformconv.ops.operator import Backend

    _cpu: Backend = cpu
    _gpu: Backend = gpu
    _portable: Backend = portable
    _reference: Backend = reference

__all__ = ["DEFORM_AGGREGATE"]


def _check(
    operands: Mapping[str, Operand | None], parameters: Mapping[str, Any], rank: int | None = None, cached: bool = True
) -> AggregateSpec:
    given: Any = operands
    return aggregate_spec(**given, **parameters, rank=rank, cached=cached)


def _pack(spec: AggregateSpec) -> tuple[Any, ...]:
    return spec.kernel_size, spec.stride, flat(spec.padding), spec.dilation, spec.offset_groups, spec.boundary


def _unpack(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_groups: int | None,
    boundary: str,
) -> dict[str, Any]:
    return {
        "kernel_size": tuple(kernel_size),
        "stride": tuple(stride),
        "padding": pairs(padding),
        "dilation": tuple(dilation),
        "offset_groups": offset_groups,
        "boundary": boundary,
    }


def _plain(parameters: Mapping[str, Any], shapes: Sequence[Any]) -> tuple[Any, ...]:
    """The parameters as plain integers; no size is read."""
    kernel_size = integers("kernel_size", parameters["kernel_size"], len(shapes[0]) - 2, 1)
    window = window_of(parameters["stride"], parameters["padding"], parameters["dilation"], kernel_size)
    others = (parameters[name] for name in ("offset_groups", "boundary"))
    return kernel_size, window.stride, flat(window.padding), window.dilation, *others


def _has_batch(rank: int | None, axes: Sequence[int | None]) -> bool | None:
    """The function's name says how many axes there are; one that takes any rank takes a batch."""
    return True if rank is None else {rank + 2: True, rank + 1: False}.get(axes[0] or 0)


DEFORM_AGGREGATE = Operator(
    name="deform_aggregate",
    package="deformconv.ops.aggregate",
    arguments=(
        Argument("input", keeps_format=True),
        Argument("offset", by_position=True, precise=True, keeps_format=True),
        Argument("mask", optional=True, by_position=True, precise=True, leaves_out=True, keeps_format=True),
    ),
    parameters=(
        Parameter("kernel_size", "int[]"),
        Parameter("stride", "int[]"),
        Parameter("padding", "int[]"),
        Parameter("dilation", "int[]"),
        Parameter("offset_groups", "int?"),
        Parameter("boundary", "str"),
    ),
    backends=(Line("cpu"), Line("gpu"), Line("portable"), Line("reference", by_name_only=True)),
    gradients=Gradients,
    check=_check,
    check_grad_output=check_grad_output,
    pack=_pack,
    unpack=_unpack,
    plain=_plain,
    has_batch=_has_batch,
)
