"""Deformable convolution in the functions of the array-API standard: any array library, any device.

The library itself can differentiate it, to any order. It holds the samples of all taps at once, and an automatic
derivative holds a copy for each of the 2**D corners: memory is the price of running everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace, is_numpy_array
from array_api_compat import device as device_of

from deformconv.ops.backends import reasons_against_arrays
from deformconv.ops.conv.spec import ConvSpec
from deformconv.ops.operator import HALF
from deformconv.ops.operator import half_in_float32 as computes_in
from deformconv.sampling import gather

__all__ = ["DETERMINISTIC", "TAKES", "computes_in", "forward", "how", "parts", "reasons_against"]

Array = Any

TAKES: Literal["native"] = "native"
# On a GPU PyTorch adds up the input's gradient by atomics, unless torch.use_deterministic_algorithms(True) is set.
DETERMINISTIC = True
CHUNK = 1 << 24  # samples at once, where memory is to be bounded


def reasons_against(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run the call; none if it can."""
    return reasons_against_arrays("deform_conv", library, backward)


def how(spec: ConvSpec, library: str, device: str) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    if library != "torch":
        return []
    number = sum(1 for _ in parts(spec))
    way = "at once" if number == 1 else f"in {number} parts, one after the other, so that memory stays bounded"
    return [f"PyTorch's own operations compute the call {way}"]


def forward(spec: ConvSpec, input: Array, offset: Array, weight: Array, bias: Array | None, mask: Array | None) -> Array:
    """The output (N, C_out, *O), by the library's own operations."""
    if is_numpy_array(input):
        # Infinities are data here: 0 * inf is NaN by definition, and nothing to warn of.
        with np.errstate(invalid="ignore", over="ignore"):
            return _forward(spec, input, offset, weight, bias, mask)
    return _forward(spec, input, offset, weight, bias, mask)


def parts(spec: ConvSpec, whole_images: bool = False) -> Iterator[tuple[slice, slice, ConvSpec]]:
    """Cut a call into images, or an image along the output's first axis; yield each part's images, positions and call.

    A part takes CHUNK samples at the most, or as many as its image has pixels if those are more: it reads the whole image in
    any case. With `whole_images` it has one image at the least.
    """
    row = spec.taps * spec.in_channels * max(1, spec.positions // max(1, spec.output_size[0]))
    most = CHUNK if whole_images else max(CHUNK, spec.in_channels * spec.pixels)
    length = spec.output_size[0] if whole_images else min(spec.output_size[0], max(1, most // max(1, row)))
    images = max(1, most // max(1, row * spec.output_size[0])) if length == spec.output_size[0] else 1
    (before, after), *other_padding = spec.padding
    for image in range(0, spec.batch, images):
        batch = min(images, spec.batch - image)
        for start in range(0, spec.output_size[0], max(1, length)):
            count = min(length, spec.output_size[0] - start)
            part = replace(
                spec,
                batch=batch,
                output_size=(count, *spec.output_size[1:]),
                padding=((before - start * spec.stride[0], after), *other_padding),
            )
            yield slice(image, image + batch), slice(start, start + count), part


def _forward(spec: ConvSpec, input: Array, offset: Array, weight: Array, bias: Array | None, mask: Array | None) -> Array:
    xp = array_namespace(input)
    N, C, K, P, D = spec.batch, spec.in_channels, spec.taps, spec.positions, spec.rank
    groups, G = spec.groups, spec.offset_groups
    dtype = input.dtype
    if spec.dtype in HALF:
        input, offset, weight, bias, mask = (
            None if array is None else xp.astype(array, xp.float32) for array in (input, offset, weight, bias, mask)
        )

    pixels = xp.reshape(input, (N * G, C // G, *spec.input_size))
    offset = xp.reshape(offset, (N * G, K, D, P))
    samples = gather.interpolate(
        pixels, _base(xp, spec, device_of(input)), [offset[:, :, axis] for axis in range(D)], spec.boundary
    )  # (N*G, K, P, C/G)
    if mask is not None:
        samples = samples * xp.reshape(mask, (N * G, K, P, 1))

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


def _base(xp: Any, spec: ConvSpec, device: Any) -> list[Array]:
    """For each axis p*stride - padding + k*dilation, as integers (K, P)."""
    D = spec.rank
    bases = []
    for axis in range(D):
        tap = xp.arange(spec.kernel_size[axis], device=device) * spec.dilation[axis]
        position = xp.arange(spec.output_size[axis], device=device) * spec.stride[axis]
        position = position - spec.padding[axis][0]
        ones = (1,) * (D - 1 - axis)
        tap = xp.reshape(tap, (spec.kernel_size[axis], *ones) + (1,) * D)
        position = xp.reshape(position, (spec.output_size[axis], *ones))
        base = xp.broadcast_to(tap + position, (*spec.kernel_size, *spec.output_size))
        bases.append(xp.reshape(base, (spec.taps, spec.positions)))
    return bases
