"""The named configurations of deformable aggregation that every backend is tried on, and arrays for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from tests.ops.conv import cases as conv
from tests.ops.conv.cases import operand, output_size

from deformconv.ops.aggregate.spec import AggregateSpec, aggregate_spec

Array = np.ndarray[Any, Any]
ARGUMENTS = ("input", "offset", "mask")


@dataclass(frozen=True)
class Case:
    """A configuration; what it does not say is the plainest choice."""

    name: str
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    batch: int = 2
    channels: int = 4
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    offset_groups: int = 1
    masked: bool = True
    boundary: str = "zeros"

    def but(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


CASES = [
    Case("1-D", (9,), (3,), padding=1),
    Case("1-D, all at once", (13,), (4,), stride=2, padding=((3, 1),), dilation=2, offset_groups=2),
    Case("1-D, inside", (9,), (3,), padding=2, boundary="inside"),
    Case("1-D, 1333 pixels wide", (1333,), (3,), batch=1, stride=31, padding=1),
    Case("2-D, groups of 16 channels, as InternImage has", (5, 4), (3, 3), channels=32, padding=1, offset_groups=2),
    Case("2-D, without a mask", (7, 5), (3, 3), padding=1, masked=False),
    Case("2-D, inside, strided", (9, 7), (3, 2), stride=(2, 3), padding=(2, 1), boundary="inside", offset_groups=2),
    Case("2-D, one tap", (5, 4), (1, 1)),
    Case("2-D, even kernel, same", (5, 6), (2, 4), padding="same", dilation=(1, 2)),
    Case("2-D, asymmetric kernel and padding", (8, 6), (2, 5), padding=((0, 3), (2, 1))),
    Case("2-D, a group per channel", (5, 4), (2, 3), channels=3, offset_groups=3, masked=False),
    Case("2-D, groups of 3 channels", (5, 4), (3, 3), channels=6, padding=1, offset_groups=2),
    Case("2-D, all at once", (11, 9), (3, 2), stride=(2, 1), padding=((1, 2), (0, 3)), dilation=(2, 1), offset_groups=2),
    Case("2-D, one output position", (3, 3), (3, 3)),
    Case("2-D, kernel over the padding", (1, 2), (3, 4), padding=2),
    Case("2-D, one channel", (6, 5), (3, 3), channels=1, padding=1),
    Case("2-D, more channels than a vector", (4, 3), (3, 3), channels=37, batch=1, padding=1),
    Case("2-D, more channels than registers", (2, 3), (2, 2), channels=203, batch=1),
    Case("2-D, more positions than a tile", (13, 17), (2, 2), channels=2, batch=1),
    Case("2-D, batch of 33", (3, 3), (2, 2), batch=33, channels=2, offset_groups=2),
    Case("2-D, batch of 0", (6, 5), (3, 3), batch=0, offset_groups=2),
    Case("2-D, batch of 0 without pixels", (0, 5), (3, 3), batch=0, padding=2),
    Case("3-D", (4, 3, 4), (2, 2, 3), padding=1, batch=1),
    Case("3-D, all at once", (4, 5, 6), (1, 3, 2), stride=(1, 2, 1), padding=((0, 0), (1, 0), (2, 1)), dilation=(1, 1, 2),
         offset_groups=2),
    Case("3-D, inside", (3, 4, 3), (2, 2, 2), padding=1, batch=1, masked=False, boundary="inside"),
]  # fmt: skip


@dataclass
class Call:
    """A checked call and its arrays; `grad_output` is what a backward pass receives."""

    spec: AggregateSpec
    input: Array
    offset: Array
    mask: Array | None
    grad_output: Array

    def but(self, **arrays: Array | None) -> Call:
        """The same call with other arrays of the same shapes."""
        return dataclasses.replace(self, **arrays)

    @property
    def arrays(self) -> list[Array | None]:
        return [getattr(self, name) for name in ARGUMENTS]


def call_of(input: Array, offset: Array, mask: Array | None = None, **parameters: Any) -> Call:
    """A call on these arrays, with ones as its `grad_output`."""
    operands = [None if array is None else operand(array) for array in (input, offset, mask)]
    spec = aggregate_spec(*operands, **parameters)
    return Call(spec, input, offset, mask, np.ones(spec.output_shape, spec.dtype))


def parameters(case: Case) -> dict[str, Any]:
    """A case's parameters, by the names of the public functions."""
    names = ("stride", "padding", "dilation", "offset_groups", "boundary")
    return {"kernel_size": case.kernel, **{name: getattr(case, name) for name in names}}


def make(case: Case, dtype: str = "float64", away_from_kinks: bool = False, seed: int = 0) -> Call:
    """Random arrays for a case. Offsets reach a few pixels, so that some samples leave the map.

    Away from the kinks, positions keep a tenth of a pixel from the next integer.
    """
    random = np.random.default_rng(seed)
    N, C, G = case.batch, case.channels, case.offset_groups
    D, K, size = len(case.size), int(np.prod(case.kernel)), output_size(case)
    offset = 1.5 * random.normal(size=(N, G * K * D, *size))
    if away_from_kinks:
        offset = np.floor(offset) + random.uniform(0.1, 0.9, offset.shape)
    call = call_of(
        random.normal(size=(N, C, *case.size)).astype(dtype),
        offset.astype(dtype),
        random.uniform(-0.5, 1.5, (N, G * K, *size)).astype(dtype) if case.masked else None,
        **parameters(case),
    )
    return call.but(grad_output=random.normal(size=(N, C, *size)).astype(dtype))


def as_convolution(call: Call) -> conv.Call:
    """The call as a depthwise deformable convolution, whose weights are ones."""
    spec = call.spec
    weight = np.ones((spec.channels, 1, *spec.kernel_size), call.input.dtype)
    found = conv.call_of(
        call.input, call.offset, weight, None, call.mask, stride=spec.stride, padding=spec.padding, dilation=spec.dilation,
        groups=spec.channels, offset_groups=spec.offset_groups, boundary=spec.boundary,
    )  # fmt: skip
    return found.but(grad_output=call.grad_output)
