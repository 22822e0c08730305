"""The named cases that benchmarks measure, and arrays for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from deformconv.ops.conv.spec import ConvSpec, Operand, conv_spec

__all__ = ["CASES", "Case", "make"]


class Case(NamedTuple):
    """A layer on a batch; `sigma` is the standard deviation of the offsets, in input pixels."""

    name: str
    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = (3, 3)
    stride: int = 1
    padding: int = 1
    groups: int = 1
    offset_groups: int = 1
    masked: bool = True
    sigma: float = 2.0

    @property
    def shape(self) -> str:
        """The shape as it is written in papers: N x C x H x W -> C_out."""
        sizes = "x".join(map(str, (self.batch, self.in_channels, *self.size)))
        return f"{sizes} -> {self.out_channels}"


# The 3x3 layers of a ResNet at 224 pixels and up, each on two images.
CASES = (
    Case("c64-56", 2, 64, 64, (56, 56)),
    Case("c128-28", 2, 128, 128, (28, 28)),
    Case("c256-56", 2, 256, 256, (56, 56)),
    Case("c512-14", 2, 512, 512, (14, 14)),
    Case("c256-100", 2, 256, 256, (100, 100)),
)


def make(case: Case, dtype: str = "float32") -> tuple[ConvSpec, dict[str, Any]]:
    """The case's checked call and its arrays, `grad_output` among them; the same in every process."""
    rng = np.random.default_rng(0)
    input_shape = (case.batch, case.in_channels, *case.size)
    weight_shape = (case.out_channels, case.in_channels // case.groups, *case.kernel)
    taps, rank = int(np.prod(case.kernel)), len(case.kernel)
    size = tuple((s + 2 * case.padding - k) // case.stride + 1 for s, k in zip(case.size, case.kernel, strict=True))
    shapes: dict[str, tuple[int, ...]] = {
        "input": input_shape,
        "offset": (case.batch, case.offset_groups * rank * taps, *size),
        "weight": weight_shape,
        "bias": (case.out_channels,),
        "mask": (case.batch, case.offset_groups * taps, *size),
        "grad_output": (case.batch, case.out_channels, *size),
    }
    arrays: dict[str, Any] = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    arrays["offset"] *= case.sigma
    arrays["weight"] /= np.sqrt(np.prod(weight_shape[1:])).astype(dtype)
    arrays["mask"] = rng.random(shapes["mask"]).astype(dtype) if case.masked else None
    input, offset, weight, bias = (Operand(arrays[name].shape, dtype) for name in ("input", "offset", "weight", "bias"))
    mask = Operand(shapes["mask"], dtype) if case.masked else None
    spec = conv_spec(
        input, offset, weight, bias, mask,
        stride=case.stride, padding=case.padding, groups=case.groups, offset_groups=case.offset_groups,
    )  # fmt: skip
    return spec, arrays
