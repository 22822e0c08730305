"""Memory that a call works in and gives back.

Fresh memory costs a page fault for every page that is touched, which for large arrays is more than what is computed in them. So
what a call needs beside its results comes from here. It holds whatever an earlier call left in it.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

__all__ = ["ALIGNMENT", "Arena", "aligned", "arena", "release", "room", "up"]

ALIGNMENT = 64  # bytes: a vector that crosses a cache line is loaded twice
KEPT = 256 << 20  # bytes that are kept for the next calls, all pieces together

_kept: list[np.ndarray] = []


def aligned(size: int) -> np.ndarray:
    """At least `size` bytes of fresh memory, aligned."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT
    return raw[start : start + size]


def release() -> None:
    """Give what is kept back to the system."""
    _kept.clear()


if hasattr(os, "register_at_fork"):
    # A child would copy the pages that it writes to, which costs what it should save.
    os.register_at_fork(after_in_child=release)


class Arena:
    """Uninitialised arrays, one after the other, out of one piece of memory."""

    def __init__(self, memory: np.ndarray) -> None:
        self.bytes, self._used = memory, 0

    def empty(self, shape: int | tuple[int, int], dtype: Any) -> np.ndarray:
        """An aligned array."""
        size = shape if isinstance(shape, int) else shape[0] * shape[1]
        first, self._used = self._used, self._used + room(size, dtype)
        return np.ndarray(shape, dtype, self.bytes, first)


def room(size: int, dtype: Any) -> int:
    """The bytes that an array of `size` numbers takes in an arena."""
    return up(size * np.dtype(dtype).itemsize, ALIGNMENT)


def up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


class arena:
    """An arena of a number of bytes, within a `with` block, which its arrays must not outlive."""

    # A class, since a generator's context takes a microsecond more, of the forty that the smallest call takes.
    def __init__(self, size: int) -> None:
        try:
            memory = _kept.pop()  # two threads never get the same one
        except IndexError:
            memory = np.empty(0, np.uint8)
        if memory.size < size:
            del memory
            memory = aligned(size)
        self._memory = memory

    def __enter__(self) -> Arena:
        return Arena(self._memory)

    def __exit__(self, *_: object) -> None:
        # In time there are as many pieces as there were calls at once, in a server with several threads for instance.
        memory = self._memory
        if memory.size + (sum(piece.size for piece in tuple(_kept)) if _kept else 0) <= KEPT:
            _kept.append(memory)
