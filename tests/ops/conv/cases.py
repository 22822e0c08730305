"""The named configurations of deformable convolution that every backend is tried on, and arrays for them.

`CASES` are configurations in which mistakes hide: sides padded differently, no images, a boundary of "inside". `PROBLEMS` are
the layers that benchmarks measure, made small. Those stay in a table of their own, `deformconv.bench.cases`, in the form that
result files keep and without what only some of the compared libraries can run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from deformconv.bench import cases as bench
from deformconv.ops.conv.spec import ConvSpec, Operand, conv_spec

Array = np.ndarray[Any, Any]
ARGUMENTS = ("input", "offset", "weight", "bias", "mask")


@dataclass(frozen=True)
class Case:
    """A configuration; what it does not say is the plainest choice."""

    name: str
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    batch: int = 2
    in_channels: int = 4
    out_channels: int = 6
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    offset_groups: int = 1
    masked: bool = True
    biased: bool = True
    boundary: str = "zeros"

    def but(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


CASES = [
    Case("1-D", (9,), (3,), padding=1),
    Case("1-D, all at once", (13,), (4,), stride=2, padding=((3, 1),), dilation=2, groups=2, offset_groups=2),
    Case("1-D, inside", (9,), (3,), padding=2, boundary="inside"),
    Case("1-D, 1333 pixels wide", (1333,), (3,), batch=1, padding=1),
    Case("2-D", (7, 8), (3, 3), padding=1),
    Case("2-D, v1", (7, 8), (3, 3), padding=1, masked=False),
    Case("2-D, v1 without bias", (6, 5), (3, 3), masked=False, biased=False),
    Case("2-D, v2 without bias", (6, 5), (3, 3), biased=False),
    Case("2-D, inside", (6, 5), (3, 3), padding=2, boundary="inside"),
    Case("2-D, inside, strided", (9, 7), (3, 2), stride=(2, 3), padding=(2, 1), boundary="inside"),
    Case("2-D, one tap", (5, 4), (1, 1)),
    Case("2-D, even kernel, same", (5, 6), (2, 4), padding="same", dilation=(1, 2)),
    Case("2-D, asymmetric kernel", (8, 6), (2, 5), padding=(1, 2)),
    Case("2-D, asymmetric stride", (9, 10), (3, 2), stride=(3, 2), padding=1),
    Case("2-D, asymmetric dilation", (9, 8), (3, 3), padding=2, dilation=(1, 3)),
    Case("2-D, padding pairs", (5, 6), (3, 3), padding=((0, 3), (2, 1))),
    Case("2-D, groups", (5, 6), (3, 3), groups=2, padding=1),
    Case("2-D, depthwise", (6, 5), (3, 3), in_channels=6, groups=6, padding=1),
    Case("2-D, depthwise, one filter of two", (5, 5), (3, 2), in_channels=3, groups=3),
    Case("2-D, offset groups", (5, 6), (3, 3), offset_groups=2, padding=1),
    Case("2-D, an offset group per channel", (5, 4), (2, 3), offset_groups=4, masked=False),
    Case("2-D, groups across offset groups", (5, 5), (3, 2), in_channels=6, groups=2, offset_groups=3),
    Case("2-D, groups finer than offset groups", (5, 5), (3, 2), in_channels=8, groups=4, offset_groups=2,
         out_channels=4),
    Case("2-D, all at once", (11, 9), (3, 2), stride=(2, 1), padding=((1, 2), (0, 3)), dilation=(2, 1),
         groups=2, offset_groups=2),
    Case("2-D, one output position", (3, 3), (3, 3)),
    Case("2-D, kernel over the padding", (1, 2), (3, 4), padding=2),
    Case("2-D, one channel", (6, 6), (3, 3), in_channels=1, out_channels=1, padding=1),
    Case("2-D, more channels than a vector", (5, 5), (3, 3), in_channels=37, out_channels=35, batch=1),
    Case("2-D, more positions than a tile", (13, 17), (2, 2), in_channels=2, out_channels=3, batch=1),
    Case("2-D, batch of 1", (6, 5), (3, 3), batch=1),
    Case("2-D, batch of 33", (4, 3), (2, 2), batch=33, offset_groups=2),
    Case("2-D, batch of 0", (6, 5), (3, 3), batch=0, groups=2, offset_groups=2),
    Case("2-D, batch of 0 without pixels", (0, 5), (3, 3), batch=0, padding=2),
    Case("3-D", (4, 3, 4), (2, 2, 3), padding=1, batch=1),
    Case("3-D, all at once", (4, 5, 6), (1, 3, 2), stride=(1, 2, 1), padding=((0, 0), (1, 0), (2, 1)),
         dilation=(1, 1, 2), groups=2, offset_groups=2),
    Case("3-D, inside", (3, 4, 3), (2, 2, 2), padding=1, batch=1, masked=False, boundary="inside"),
]  # fmt: skip


def shrunk(case: bench.Case) -> bench.Case:
    """A layer of the same kind, small enough for the reference: fewer pixels, images and channels, as many tails."""
    small = case._replace(batch=min(case.batch, 3), size=tuple(min(length, 13 - 2 * i) for i, length in enumerate(case.size)))
    channels = min(case.in_channels, 48)
    if case.groups == case.in_channels:
        return small._replace(in_channels=channels, out_channels=channels, groups=channels)
    if case.groups > 1:
        return small._replace(in_channels=64, out_channels=64, groups=4)
    return small._replace(in_channels=channels, out_channels=min(case.out_channels, 56))


def _problems() -> list[Case]:
    """The kinds of layers, each under the name of the first of its kind: layers that differ in size alone shrink to one."""
    kinds: dict[tuple[Any, ...], Case] = {}
    for case in map(shrunk, bench.CASES):
        fields = case._asdict()
        del fields["sigma"]
        kinds.setdefault(case[1:], Case(**fields))
    return list(kinds.values())


PROBLEMS = _problems()


@dataclass
class Call:
    """A checked call and its arrays; `grad_output` is what a backward pass receives."""

    spec: ConvSpec
    input: Array
    offset: Array
    weight: Array
    bias: Array | None
    mask: Array | None
    grad_output: Array

    def but(self, **arrays: Array | None) -> Call:
        """The same call with other arrays of the same shapes."""
        return dataclasses.replace(self, **arrays)

    @property
    def arrays(self) -> list[Array | None]:
        return [getattr(self, name) for name in ARGUMENTS]


def operand(array: Array) -> Operand:
    return Operand(array.shape, array.dtype.name)


def call_of(
    input: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    **parameters: Any,
) -> Call:
    """A call on these arrays, with ones as its `grad_output`."""
    operands = [None if array is None else operand(array) for array in (input, offset, weight, bias, mask)]
    spec = conv_spec(*operands, **parameters)
    return Call(spec, input, offset, weight, bias, mask, np.ones(spec.output_shape, spec.dtype))


def output_size(case: Case) -> tuple[int, ...]:
    """The output's spatial size, worked out apart from the library."""
    D = len(case.size)
    stride, dilation = np.broadcast_to(case.stride, D), np.broadcast_to(case.dilation, D)
    extent = dilation * (np.array(case.kernel) - 1) + 1
    if case.padding == "same":
        return case.size
    paired = np.ndim(case.padding) == 2
    added = np.sum(case.padding, axis=1) if paired else 2 * np.broadcast_to(case.padding, D)
    return tuple(int(n) for n in (np.array(case.size) + added - extent) // stride + 1)


def make(case: Case, dtype: str = "float64", away_from_kinks: bool = False, seed: int = 0) -> Call:
    """Random arrays for a case. Offsets reach a few pixels, so that some samples leave the map.

    Away from the kinks, positions keep a tenth of a pixel from the next integer.
    """
    random = np.random.default_rng(seed)
    N, C, C_out, G = case.batch, case.in_channels, case.out_channels, case.offset_groups
    D, K, size = len(case.size), int(np.prod(case.kernel)), output_size(case)
    offset = 1.5 * random.normal(size=(N, G * K * D, *size))
    if away_from_kinks:
        offset = np.floor(offset) + random.uniform(0.1, 0.9, offset.shape)
    call = call_of(
        input=random.normal(size=(N, C, *case.size)).astype(dtype),
        offset=offset.astype(dtype),
        weight=random.normal(size=(C_out, C // case.groups, *case.kernel)).astype(dtype),
        bias=random.normal(size=C_out).astype(dtype) if case.biased else None,
        mask=random.uniform(-0.5, 1.5, (N, G * K, *size)).astype(dtype) if case.masked else None,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
        offset_groups=case.offset_groups,
        boundary=case.boundary,
    )
    return call.but(grad_output=random.normal(size=(N, C_out, *size)).astype(dtype))
