"""Deformable RoI pooling as an operator: what it takes, and what can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deformconv.ops.operator import Argument, Line, Operand, Operator, Parameter
from deformconv.ops.roi_pool.spec import Gradients, RoiSpec, check_boxes, roi_spec
from deformconv.ops.window import integers

if TYPE_CHECKING:  # each of them is a backend
    from deformconv.ops.operator import Backend
    from deformconv.ops.roi_pool import cpu, gpu, portable, reference

    _cpu: Backend = cpu
    _gpu: Backend = gpu
    _portable: Backend = portable
    _reference: Backend = reference

__all__ = ["DEFORM_ROI_POOL"]

_PARAMETERS = (
    Parameter("output_size", "int[]"),
    Parameter("spatial_scale", "float"),
    Parameter("sampling_ratio", "int"),
    Parameter("convention", "str"),
    Parameter("gamma", "float"),
    Parameter("group_size", "int[]"),
    Parameter("part_size", "int[]"),
)


def _check(
    operands: Mapping[str, Operand | None], parameters: Mapping[str, Any], rank: int | None = None, cached: bool = True
) -> RoiSpec:
    given: Any = operands
    return roi_spec(**given, **parameters, cached=cached)


def _pack(spec: RoiSpec) -> tuple[Any, ...]:
    return tuple(getattr(spec, parameter.name) for parameter in _PARAMETERS)


def _unpack(*values: Any) -> dict[str, Any]:
    named = {parameter.name: value for parameter, value in zip(_PARAMETERS, values, strict=True)}
    return named | {name: tuple(named[name]) for name in ("output_size", "group_size", "part_size")}


def _plain(parameters: Mapping[str, Any], shapes: Sequence[Any]) -> tuple[Any, ...]:
    """The parameters as plain numbers; no size is read."""
    output_size = integers("output_size", parameters["output_size"], 2, 1)
    group_size = integers("group_size", parameters["group_size"], 2, 1)
    part_size = parameters["part_size"]
    part_size = output_size if part_size is None else integers("part_size", part_size, 2, 1)
    plain = {**parameters, "output_size": output_size, "group_size": group_size, "part_size": part_size}
    return tuple(plain[parameter.name] for parameter in _PARAMETERS)


DEFORM_ROI_POOL = Operator(
    name="deform_roi_pool",
    package="deformconv.ops.roi_pool",
    arguments=(
        Argument("input", keeps_format=True),
        Argument("boxes", by_image=False, precise=True, differentiable=False, check_values=check_boxes),
        Argument("offset", optional=True, by_image=False, precise=True),
        Argument("mask", optional=True, by_image=False, precise=True, leaves_out=True),
    ),
    parameters=_PARAMETERS,
    backends=(Line("cpu"), Line("gpu"), Line("portable"), Line("reference", by_name_only=True)),
    gradients=Gradients,
    check=_check,
    pack=_pack,
    unpack=_unpack,
    plain=_plain,
    autocast=False,
)
