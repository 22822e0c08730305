"""The named cases that benchmarks measure and tests read, and arrays for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from deformconv.ops.conv.spec import ConvSpec, Operand, conv_spec
from deformconv.ops.window import by, positions_along

__all__ = ["CASES", "QUICK", "TOLERANCE", "Case", "away_from_integers", "case_of", "make", "named", "shapes_of", "spec_of"]

TOLERANCE = 1e-4  # of another library in float32, which adds up thousands of numbers in its own order


class Case(NamedTuple):
    """A layer on a batch; `sigma` is the standard deviation of the offsets, in input pixels."""

    name: str
    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    masked: bool = True
    sigma: float = 2.0

    @property
    def rank(self) -> int:
        """D, the number of spatial axes."""
        return len(self.kernel)

    @property
    def shape(self) -> str:
        """The shape as it is written in papers: N x C x H x W -> C_out."""
        sizes = "x".join(map(str, (self.batch, self.in_channels, *self.size)))
        return f"{sizes} -> {self.out_channels}"

    @property
    def tolerance(self) -> float:
        """How far a right library may be from the truth.

        Those that add positions in float32 round them to size * 2**-23 pixels.
        """
        return max(TOLERANCE, max(self.size) * 2.0**-23)

    @property
    def details(self) -> str:
        """What is not a 3x3 layer's usual way: kernel, stride, dilation, groups, version."""
        words = []
        if self.kernel != (3, 3):
            words.append(f"kernel {by(self.kernel)}")
        if set(self.stride) != {1}:
            words.append(f"stride {by(self.stride)}")
        if set(self.dilation) != {1}:
            words.append(f"dilation {by(self.dilation)}")
        if self.groups > 1:
            words.append("depthwise" if self.groups == self.in_channels else f"{self.groups} groups")
        if self.offset_groups > 1:
            words.append(f"{self.offset_groups} offset groups")
        if not self.masked:
            words.append("v1")
        return ", ".join(words)


def _versions(case: Case) -> tuple[Case, Case]:
    return case._replace(name=f"{case.name}-v1", masked=False), case._replace(name=f"{case.name}-v2")


CASES = (
    # The 3x3 layers of a ResNet at 224 pixels and up, each on two images.
    Case("c64-56", 2, 64, 64, (56, 56)),
    Case("c128-28", 2, 128, 128, (28, 28)),
    Case("c256-56", 2, 256, 256, (56, 56)),
    Case("c512-14", 2, 512, 512, (14, 14)),
    Case("c256-100", 2, 256, 256, (100, 100)),
    # A detector's ResNet-50 on one image of 800x1333, and its ResNeXt (32 groups of 16 channels).
    *_versions(Case("resnet-c3", 1, 128, 128, (100, 168))),
    *_versions(Case("resnet-c4", 1, 256, 256, (50, 84))),
    *_versions(Case("resnet-c5", 1, 512, 512, (25, 42))),
    Case("resnext-c4", 1, 512, 512, (50, 84), groups=32),
    # Video restoration; segmentation; text detection.
    Case("edvr", 1, 64, 64, (180, 320), offset_groups=8),
    Case("birefnet-aspp", 1, 64, 256, (64, 64), (7, 7), padding=(3, 3)),
    Case("dbnet", 1, 128, 128, (92, 160), stride=(2, 2)),
    # What other libraries seldom have.
    Case("signal-1d", 4, 64, 64, (4096,), (9,), (1,), (4,), (1,)),
    Case("volume-3d", 1, 32, 32, (16, 28, 28), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    Case("depthwise", 2, 256, 256, (56, 56), groups=256),
    Case("batch-8", 8, 128, 128, (28, 28)),
    Case("primes", 3, 37, 53, (41, 29), (5, 3), (2, 1), (2, 1)),
)
QUICK = ("c64-56", "c128-28", "primes")  # small enough for every library


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def case_of(fields: dict[str, Any]) -> Case:
    """A case from its fields as JSON keeps them."""
    return Case._make(tuple(value) if isinstance(value, list) else value for value in fields.values())


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    """The shapes of the case's arrays, with that of a mask also where the case has none."""
    taps = int(np.prod(case.kernel))
    paddings = [(amount, amount) for amount in case.padding]
    size = tuple(map(positions_along, case.size, case.kernel, case.stride, paddings, case.dilation))
    return {
        "input": (case.batch, case.in_channels, *case.size),
        "offset": (case.batch, case.offset_groups * case.rank * taps, *size),
        "weight": (case.out_channels, case.in_channels // case.groups, *case.kernel),
        "bias": (case.out_channels,),
        "mask": (case.batch, case.offset_groups * taps, *size),
        "grad_output": (case.batch, case.out_channels, *size),
    }


def spec_of(case: Case, dtype: str = "float32") -> ConvSpec:
    """The case's checked call, without its arrays."""
    shapes = shapes_of(case)
    input, offset, weight, bias = (Operand(shapes[name], dtype) for name in ("input", "offset", "weight", "bias"))
    mask = Operand(shapes["mask"], dtype) if case.masked else None
    return conv_spec(
        input, offset, weight, bias, mask, stride=case.stride, padding=case.padding, dilation=case.dilation,
        groups=case.groups, offset_groups=case.offset_groups,
    )  # fmt: skip


def make(case: Case, dtype: str = "float32") -> tuple[ConvSpec, dict[str, Any]]:
    """The case's checked call and its arrays, `grad_output` among them; the same in every process."""
    rng = np.random.default_rng(0)
    shapes = shapes_of(case)
    arrays: dict[str, Any] = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    arrays["offset"] = away_from_integers(arrays["offset"] * case.sigma) if case.sigma else np.zeros_like(arrays["offset"])
    arrays["weight"] /= np.sqrt(np.prod(shapes["weight"][1:])).astype(dtype)
    arrays["mask"] = rng.random(shapes["mask"]).astype(dtype) if case.masked else None
    return spec_of(case, dtype), arrays


def away_from_integers(offset: Any) -> Any:
    """The offsets with fractions in [0.01, 0.99].

    The gradient of an offset jumps at integer positions. Libraries that add a position's integer and its offset in float32
    would fall on the other side of the jump for some of a million offsets, and a comparison would call a right library wrong.
    """
    whole = np.floor(offset)
    return whole + offset.dtype.type(0.01) + offset.dtype.type(0.98) * (offset - whole)
