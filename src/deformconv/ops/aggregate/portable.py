"""Deformable aggregation in the functions of the array-API standard: any array library, any device.

The library itself can differentiate it, to any order. It holds the samples of all taps at once, and an automatic
derivative holds a copy for each of the 2**D corners: memory is the price of running everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from array_api_compat import array_namespace

from deformconv.ops.aggregate.spec import AggregateSpec
from deformconv.ops.backends import reasons_against_arrays
from deformconv.ops.operator import half_in_float32 as computes_in
from deformconv.ops.taps import portable as taps

__all__ = ["DETERMINISTIC", "TAKES", "computes_in", "forward", "how", "parts", "reasons_against"]

Array = Any

TAKES: Literal["native"] = "native"
# On a GPU PyTorch adds up the input's gradient by atomics, unless torch.use_deterministic_algorithms(True) is set.
DETERMINISTIC = True


def reasons_against(spec: AggregateSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run the call; none if it can."""
    return reasons_against_arrays("deform_aggregate", library, backward)


def how(spec: AggregateSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return taps.in_words(sum(1 for _ in parts(spec)), library)


def forward(spec: AggregateSpec, input: Array, offset: Array, mask: Array | None) -> Array:
    """The output (N, C, *O), by the library's own operations."""
    return taps.quietly(_forward, spec, input, offset, mask)


def parts(spec: AggregateSpec, whole_images: bool = False) -> Iterator[tuple[slice, slice, AggregateSpec]]:
    """Cut a call into parts of bounded memory; yield each part's images, positions along the output's first axis, and call."""
    return taps.parts(spec, spec.channels, whole_images)


def _forward(spec: AggregateSpec, input: Array, offset: Array, mask: Array | None) -> Array:
    xp = array_namespace(input)
    dtype = input.dtype
    input, offset, mask = taps.widened(spec, input, offset, mask)
    total = xp.sum(taps.samples(spec, input, offset, mask), axis=1)  # (N*G, P, C/G)
    output = xp.reshape(xp.permute_dims(total, (0, 2, 1)), spec.output_shape)
    return xp.astype(output, dtype, copy=False)
