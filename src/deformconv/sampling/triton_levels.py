"""Maps of several sizes, one after the other in an image, for GPUs: functions that Triton compiles into kernels.

A map's height and width are one integer of 64 bits, the height in its upper half, and a kernel gets eight of them: as numbers,
since a table in memory would have to be brought to the GPU first. Those beyond the last map are never asked for.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["before", "level_of", "size_of"]


@triton.jit
def _unpacked(size):
    return (size >> 32).to(tl.int32), (size & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def size_of(level, sizes):
    """The height and the width of the map `level`, a number."""
    found = sizes[0]
    for other in tl.static_range(1, 8):
        found = tl.where(level == other, sizes[other], found)
    return _unpacked(found)


@triton.jit
def before(level, sizes):
    """How many pixels, and how many lists of samples, the maps before the map `level` have."""
    tokens = level * 0
    lists = level * 0
    for other in tl.static_range(0, 8):
        height, width = _unpacked(sizes[other])
        tokens += tl.where(other < level, height * width, 0)
        lists += tl.where(other < level, (height + 1) * (width + 1), 0)
    return tokens, lists


@triton.jit
def level_of(token, sizes):
    """Of the map that each token, a pixel of an image, is of: its width, its first token and its first list of samples."""
    height, width = _unpacked(sizes[0])
    found, first_token, first_list = token * 0 + width, token * 0, token * 0
    tokens, lists = height * width, (height + 1) * (width + 1)
    for level in tl.static_range(1, 8):
        height, width = _unpacked(sizes[level])
        is_later = token >= tokens
        found = tl.where(is_later, width, found)
        first_token = tl.where(is_later, tokens, first_token)
        first_list = tl.where(is_later, lists, first_list)
        tokens += height * width
        lists += (height + 1) * (width + 1)
    return found, first_token, first_list
