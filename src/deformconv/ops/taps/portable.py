"""The portable form of operators whose taps have offsets and masks: samples in array-API functions, and parts of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from array_api_compat import array_namespace, is_numpy_array

from deformconv.ops.operator import HALF
from deformconv.ops.taps.spec import WindowSpec
from deformconv.sampling import gather

__all__ = ["CHUNK", "in_words", "parts", "quietly", "samples", "widened"]

Array = Any
S = TypeVar("S", bound=WindowSpec)

CHUNK = 1 << 24  # samples at once, where memory is to be bounded


def in_words(number: int, library: str) -> list[str]:
    """What there is to say of a call that is computed in a number of parts, as sentences."""
    if library != "torch":
        return []
    way = "at once" if number == 1 else f"in {number} parts, one after the other, so that memory stays bounded"
    return [f"PyTorch's own operations compute the call {way}"]


def parts(spec: S, channels: int, whole_images: bool = False) -> Iterator[tuple[slice, slice, S]]:
    """Cut a call into images, or an image along the output's first axis; yield each part's images, positions and call.

    A part takes CHUNK samples of the input's `channels` at the most, or as many as its image has pixels if those are more: it
    reads the whole image in any case. With `whole_images` it has one image at the least.
    """
    row = spec.taps * channels * max(1, spec.positions // max(1, spec.output_size[0]))
    most = CHUNK if whole_images else max(CHUNK, channels * spec.pixels)
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


def quietly(compute: Callable[..., Array], spec: WindowSpec, input: Array, *others: Array | None) -> Array:
    """The result of a function of these; NumPy does not warn of infinities, which are data: 0 * inf is NaN by definition."""
    if is_numpy_array(input):
        with np.errstate(invalid="ignore", over="ignore"):
            return compute(spec, input, *others)
    return compute(spec, input, *others)


def widened(spec: WindowSpec, *arrays: Array | None) -> list[Any]:
    """The arrays in the dtype that a call is computed in: half precision in float32."""
    if spec.dtype not in HALF:
        return list(arrays)
    xp = array_namespace(arrays[0])
    return [None if array is None else xp.astype(array, xp.float32) for array in arrays]


def samples(spec: WindowSpec, input: Array, offset: Array, mask: Array | None, xp: Any = None) -> Array:
    """mask * interp for every tap and position, (N*offset_groups, K, P, channels of a group).

    Where the caller brings the standard's functions as `xp`, sizes in `spec` may be numbers that a program computes later.
    """
    own, (xp, here) = xp, gather.namespace(input, xp)
    N, C, K, P, D, G = spec.batch, input.shape[1], spec.taps, spec.positions, spec.rank, spec.offset_groups
    shape = (N * G, C // G, *spec.input_size)
    pixels = xp.reshape(input, shape)
    offset = xp.reshape(offset, (N * G, K, D, P))
    found = gather.interpolate(
        pixels, _base(xp, spec, here), [offset[:, :, axis] for axis in range(D)], spec.boundary,
        shape=None if own is None else shape, xp=own,
    )  # fmt: skip
    return found if mask is None else found * xp.reshape(mask, (N * G, K, P, 1))


def _base(xp: Any, spec: WindowSpec, here: dict[str, Any]) -> list[Array]:
    """For each axis p*stride - padding + k*dilation, as integers (K, P)."""
    D = spec.rank
    bases = []
    for axis in range(D):
        tap = xp.arange(spec.kernel_size[axis], **here) * spec.dilation[axis]
        position = xp.arange(spec.output_size[axis], **here) * spec.stride[axis]
        position = position - spec.padding[axis][0]
        ones = (1,) * (D - 1 - axis)
        tap = xp.reshape(tap, (spec.kernel_size[axis], *ones) + (1,) * D)
        position = xp.reshape(position, (spec.output_size[axis], *ones))
        base = xp.broadcast_to(tap + position, (*spec.kernel_size, *spec.output_size))
        bases.append(xp.reshape(base, (spec.taps, spec.positions)))
    return bases
