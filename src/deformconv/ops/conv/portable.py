"""Deformable convolution in the functions of the array-API standard: any array library, any device.

The library itself can differentiate it, to any order. It holds the samples of all taps at once, and an automatic
derivative holds a copy for each of the 2**D corners: memory is the price of running everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from array_api_compat import array_namespace

from deformconv.ops.backends import reasons_against_arrays
from deformconv.ops.conv.spec import ConvSpec
from deformconv.ops.operator import half_in_float32 as computes_in
from deformconv.ops.taps import portable as taps

__all__ = ["DETERMINISTIC", "TAKES", "computes_in", "forward", "how", "parts", "reasons_against"]

Array = Any

TAKES: Literal["native"] = "native"
# On a GPU PyTorch adds up the input's gradient by atomics, unless torch.use_deterministic_algorithms(True) is set.
DETERMINISTIC = True


def reasons_against(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run the call; none if it can."""
    return reasons_against_arrays("deform_conv", library, backward)


def how(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return taps.in_words(sum(1 for _ in parts(spec)), library)


def forward(
    spec: ConvSpec, input: Array, offset: Array, weight: Array, bias: Array | None, mask: Array | None, xp: Any = None
) -> Array:
    """The output (N, C_out, *O), by the library's own operations; `xp` has them for arrays that the standard does not know.

    With `xp` a spec's batch and sizes may be numbers that a program computes later.
    """
    if xp is not None:
        return _forward(spec, input, offset, weight, bias, mask, xp)
    return taps.quietly(_forward, spec, input, offset, weight, bias, mask)


def parts(spec: ConvSpec, whole_images: bool = False) -> Iterator[tuple[slice, slice, ConvSpec]]:
    """Cut a call into parts of bounded memory; yield each part's images, positions along the output's first axis, and call."""
    return taps.parts(spec, spec.in_channels, whole_images)


def _forward(
    spec: ConvSpec, input: Array, offset: Array, weight: Array, bias: Array | None, mask: Array | None, own: Any = None
) -> Array:
    xp = array_namespace(input) if own is None else own
    N, C, K, P, D = spec.batch, spec.in_channels, spec.taps, spec.positions, spec.rank
    groups, G = spec.groups, spec.offset_groups
    dtype = input.dtype
    input, offset, weight, bias, mask = taps.widened(spec, input, offset, weight, bias, mask)
    samples = taps.samples(spec, input, offset, mask, own)  # (N*G, K, P, C/G)

    # Offset groups and groups cut the channels differently: together first, then apart.
    columns = xp.permute_dims(xp.reshape(samples, (N, G, K, P, C // G)), (0, 3, 2, 1, 4))
    columns = xp.reshape(columns, (N, P, K, groups, C // groups))
    columns = xp.permute_dims(columns, (0, 3, 2, 4, 1))
    columns = xp.reshape(columns, (N, groups, K * C // groups, P))
    matrix = xp.reshape(weight, (groups, spec.out_channels // groups, C // groups, K))
    matrix = xp.permute_dims(matrix, (0, 1, 3, 2))
    matrix = xp.reshape(matrix, (1, groups, spec.out_channels // groups, K * C // groups))
    output = xp.reshape(xp.matmul(matrix, columns), spec.output_shape)
    if bias is not None:
        output = output + xp.reshape(bias, (1, spec.out_channels) + (1,) * D)
    return xp.astype(output, dtype, copy=False)
