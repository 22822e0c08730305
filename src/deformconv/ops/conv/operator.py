"""Deformable convolution as an operator: what it takes, and what can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deformconv.ops.conv.spec import ConvSpec, Gradients, check_grad_output, conv_spec
from deformconv.ops.operator import Argument, Line, Operand, Operator, Parameter
from deformconv.ops.window import flat, pairs, window_of

if TYPE_CHECKING:  # each of them is a backend
    from deformconv.ops.conv import cpu, gpu, portable, reference
    from deformconv.ops.operator import Backend

    _cpu: Backend = cpu
    _gpu: Backend = gpu
    _portable: Backend = portable
    _reference: Backend = reference

__all__ = ["DEFORM_CONV"]


def _check(
    operands: Mapping[str, Operand | None], parameters: Mapping[str, Any], rank: int | None = None, cached: bool = True
) -> ConvSpec:
    given: Any = operands
    return conv_spec(**given, **parameters, rank=rank, cached=cached)


def _pack(spec: ConvSpec) -> tuple[Any, ...]:
    return spec.stride, flat(spec.padding), spec.dilation, spec.groups, spec.offset_groups, spec.boundary


def _unpack(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int | None,
    offset_groups: int | None,
    boundary: str,
) -> dict[str, Any]:
    return {
        "stride": tuple(stride),
        "padding": pairs(padding),
        "dilation": tuple(dilation),
        "groups": groups,
        "offset_groups": offset_groups,
        "boundary": boundary,
    }


def _plain(parameters: Mapping[str, Any], shapes: Sequence[Any]) -> tuple[Any, ...]:
    """The parameters as plain integers. Of all sizes, which may be symbols, it reads the kernel's alone."""
    kernel_size = tuple(shapes[2][2:])
    window = window_of(parameters["stride"], parameters["padding"], parameters["dilation"], kernel_size)
    others = (parameters[name] for name in ("groups", "offset_groups", "boundary"))
    return window.stride, flat(window.padding), window.dilation, *others


def _sum_over_positions(grad_output: Any) -> Any:
    return grad_output.sum(axis=(0, *range(2, grad_output.ndim)))


def _has_batch(rank: int | None, axes: Sequence[int | None]) -> bool | None:
    """The weight says how many axes there are; one image may come without a batch axis, as nn.ConvNd takes it."""
    input, _, weight, *_ = axes
    assert input is not None and weight is not None  # neither may be left out
    if rank not in (None, weight - 2):
        return None
    return {weight: True, weight - 1: False}.get(input)


DEFORM_CONV = Operator(
    name="deform_conv",
    package="deformconv.ops.conv",
    arguments=(
        Argument("input", keeps_format=True),
        Argument("offset", by_position=True, precise=True),
        Argument("weight", by_image=False, keeps_format=True),
        Argument("bias", optional=True, gradient=_sum_over_positions, by_image=False),
        Argument("mask", optional=True, by_position=True, precise=True, leaves_out=True),
    ),
    parameters=(
        Parameter("stride", "int[]"),
        Parameter("padding", "int[]"),
        Parameter("dilation", "int[]"),
        Parameter("groups", "int?"),
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
    linear=(("input", "bias"), ("weight", "bias"), ("bias", "mask")),
)
