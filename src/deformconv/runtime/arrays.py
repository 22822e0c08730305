"""Any array as the flat memory that kernels read, and memory for their results."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import numpy as np

from deformconv.runtime.memory import aligned

__all__ = [
    "aligned_empty", "bits", "empty_channels", "flat", "flat_axes", "flat_channels", "flat_images", "narrowed", "none_of",
    "result", "result_channels", "widened",
]  # fmt: skip


def bits(array: np.ndarray) -> np.ndarray:
    """The array as `runtime.half` has it: half precision as its bits. bfloat16, which NumPy has not, may come as uint16."""
    return array if array.itemsize > 2 else array.view(np.int16 if array.dtype == np.float16 else np.uint16)


def widened(array: np.ndarray) -> np.ndarray:
    """Half precision in float32, anything else as it is."""
    if array.itemsize > 2:
        return array
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrowed(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Float32 rounded to half precision as NumPy holds it; as it is for any other dtype."""
    if dtype.itemsize > 2:
        return array
    if dtype == np.float16:
        return array.astype(np.float16)
    words = array.view(np.uint32)
    rounded = words + (0x7FFF + (words >> 16 & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16).view(dtype)


@cache
def none_of(dtype: Any) -> np.ndarray:
    """An empty array, which kernels take for an array that was not given."""
    return np.empty(0, dtype)


class _Memory:
    """An array's memory, declared flat and writable, though nothing writes to it.

    Numba would compile kernels a second time for read-only arrays.
    """

    def __init__(self, array: np.ndarray, shape: tuple[int, ...]) -> None:
        self.array = array  # keeps the memory
        data = (array.ctypes.data, False)  # the address, and whether it is read-only
        self.__array_interface__ = {"shape": shape, "typestr": array.dtype.str, "data": data, "version": 3}


def flat(array: Any) -> np.ndarray:
    """The array's numbers in C order, aligned and in the machine's byte order, which kernels are compiled for."""
    if array.flags.carray and array.dtype.isnative:
        result: np.ndarray = array.reshape(-1)
        return result
    array = np.require(array, array.dtype.newbyteorder("="), ["C", "A"]).reshape(-1)
    return array if array.flags.writeable else np.asarray(_Memory(array, array.shape))


def flat_images(array: Any) -> tuple[np.ndarray, int]:
    """A flat array of all images, and the distance between two of them, in numbers.

    It is no copy if each image is contiguous, as in a slice of channels.
    """
    image = array.size // len(array)
    if array.flags.carray and array.dtype.isnative:  # the usual case, which must be fast
        return array.reshape(-1), image
    step, rest = divmod(array.strides[0], array.itemsize)
    flags = array[0].flags
    if not (flags.c_contiguous and flags.aligned and array.dtype.isnative) or rest or step < 0:
        return flat(array), image
    step = step if len(array) > 1 else image
    return np.asarray(_Memory(array, (step * (len(array) - 1) + image,))), step


# The axes of an array with its channels second and with its channels last, by their number: np.moveaxis takes microseconds.
_LAST = [(0, *range(2, axes), 1) for axes in range(8)]
_SECOND = [(0, axes - 1, *range(1, axes - 1)) for axes in range(8)]


def flat_channels(array: Any) -> tuple[np.ndarray, bool]:
    """An array (N, C, ...) flat, and whether its channels come last in memory; no copy if they do, or come second."""
    if not array.flags.c_contiguous and array.ndim > 2:
        moved = array.transpose(_LAST[array.ndim])
        if moved.flags.c_contiguous:
            return flat(moved), True
    return flat(array), False


def flat_axes(array: Any) -> tuple[np.ndarray, tuple[int, int, int]]:
    """An array (N, C, *P) flat, and how far apart its images, its channels and its positions are, in numbers.

    It is no copy if its channels or its positions lie side by side, and the others at one distance, as in a slice of channels.
    """
    channels, positions = array.shape[1], prod(array.shape[2:])
    if array.dtype.isnative:  # the usual cases, which must be fast
        if array.flags.carray:
            return array.reshape(-1), (channels * positions, positions, 1)
        moved = array.transpose(_LAST[array.ndim])
        if moved.flags.carray:
            return moved.reshape(-1), (channels * positions, 1, channels)
    found = _even_distances(array)
    if found is None:
        return flat(array), (channels * positions, positions, 1)
    size = 1 + sum((count - 1) * distance for count, distance in zip((len(array), channels, positions), found, strict=True))
    return np.asarray(_Memory(array, (size,))), found


def _even_distances(array: np.ndarray) -> tuple[int, int, int] | None:
    """How far apart the images, the channels and the positions of an array are; None if kernels cannot read it so."""
    strides, item = array.strides, array.itemsize
    if array.size == 0 or not (array.flags.aligned and array.dtype.isnative) or any(stride % item for stride in strides):
        return None
    image, channel, *others = (stride // item for stride in strides)
    position, expected = 1, None
    for size, distance in zip(reversed(array.shape[2:]), reversed(others), strict=True):
        if size > 1:
            position = distance if expected is None else position
            if distance != (distance if expected is None else expected):
                return None
            expected = distance * size
    channel = channel if array.shape[1] > 1 else 1
    return (image, channel, position) if 1 in (channel, position) and min(image, channel, position) >= 0 else None


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """np.empty at the beginning of a cache line. Vectors that cross cache lines can cost a fifth of a forward call."""
    size = prod(shape) * np.dtype(dtype).itemsize
    return aligned(size).view(dtype).reshape(shape)


def empty_channels(shape: tuple[int, ...], dtype: Any, last: bool) -> tuple[np.ndarray, np.ndarray]:
    """An uninitialised array (N, C, ...), with its channels last in memory if so wished, and the same flat."""
    numbers = aligned_empty((prod(shape),), dtype)
    if not last:
        return numbers.reshape(shape), numbers
    return numbers.reshape((shape[0], *shape[2:], shape[1])).transpose(_SECOND[len(shape)]), numbers


def result(shape: tuple[int, ...], dtype: Any, out: np.ndarray | None = None) -> np.ndarray:
    """The array that a call writes into: the caller's `out`, or a new one."""
    if out is None:
        return aligned_empty(shape, dtype)
    _check_out(out, shape, dtype)
    if not out.flags.carray:
        raise ValueError(_LAYOUT.format("in C order"))
    return out


def result_channels(shape: tuple[int, ...], dtype: Any, last: bool, out: Any = None) -> tuple[np.ndarray, np.ndarray, bool]:
    """As `result`, of an array (N, C, ...), the same flat, and whether its channels come last in memory.

    `last` says so for a new array; the caller's has them where it has them.
    """
    if out is None:
        return *empty_channels(shape, dtype, last), last
    _check_out(out, shape, dtype)
    if out.flags.carray:
        return out, out.reshape(-1), False
    moved = out.transpose(_LAST[out.ndim])
    if not moved.flags.carray:
        raise ValueError(_LAYOUT.format("in C order, or with its channels last in memory"))
    return out, moved.reshape(-1), True


_LAYOUT = "`out` does not lie side by side in writable memory; expected an array {}, as `numpy.empty` makes it."


def _check_out(out: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"`out` has shape {out.shape}, {out.dtype}; expected the result's, {shape}, {dtype}.")
