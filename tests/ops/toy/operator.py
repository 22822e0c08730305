"""A toy: output = input * mask**power + bias. What an operator has to say of itself, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from deformconv.errors import ShapeError
from deformconv.ops.operator import Argument, Line, Operand, Operator, Parameter
from deformconv.ops.window import count

__all__ = ["SCALE", "Gradients", "ScaleSpec"]


class Gradients(NamedTuple):
    """One gradient per argument."""

    input: Any = None
    mask: Any = None
    bias: Any = None


@dataclass(frozen=True)
class ScaleSpec:
    """A checked call."""

    batch: int
    channels: int
    size: int
    power: int
    biased: bool
    dtype: str

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, self.size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"input": self.output_shape, "mask": (self.batch, 1, self.size)}
        return found | ({"bias": (self.channels,)} if self.biased else {})

    def with_given(self, names: Collection[str]) -> ScaleSpec:
        return replace(self, biased=self.biased or "bias" in names)


def check(operands: Mapping[str, Operand | None], parameters: Mapping[str, Any], rank: int | None, cached: bool) -> ScaleSpec:
    input, mask, bias = (operands[name] for name in ("input", "mask", "bias"))
    assert input is not None and mask is not None
    batch, channels, size = input.shape
    if tuple(mask.shape) != (batch, 1, size):
        raise ShapeError(f"`mask` has shape {tuple(mask.shape)}; expected (N, 1, L) = ({batch}, 1, {size}).")
    if mask.dtype != input.dtype:
        raise TypeError(f"`mask` is {mask.dtype}; expected {input.dtype}.")
    return ScaleSpec(batch, channels, size, count("power", parameters["power"]), bias is not None, input.dtype)


SCALE = Operator(
    name="toy_scale",
    package="tests.ops.toy",
    arguments=(
        Argument("input", keeps_format=True),
        Argument("mask", precise=True, by_position=True),
        Argument("bias", optional=True, gradient=lambda grad: grad.sum(axis=(0, 2)), by_image=False),
    ),
    parameters=(Parameter("power", "int"),),
    backends=(Line("numbers"), Line("portable"), Line("native", by_name_only=True)),
    gradients=Gradients,
    check=check,
    pack=lambda spec: (spec.power,),
    unpack=lambda power: {"power": power},
    plain=lambda parameters, shapes: (parameters["power"],),
)
