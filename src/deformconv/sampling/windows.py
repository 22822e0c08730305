"""Where a sliding window puts its taps, for the CPU: the positions that `sampling.corners` samples at."""

from __future__ import annotations

from numba.cpython.unsafe.tuple import tuple_setitem

from deformconv.runtime.cache import device
from deformconv.sampling.corners import place_samples

__all__ = ["BEFORE", "DILATION", "INPUT", "KERNEL", "OUTPUT", "STRIDE", "place_tap", "place_tile", "tap_shifts"]

# The rows of `geometry`, an int64 array of D columns.
INPUT, KERNEL, STRIDE, BEFORE, DILATION, OUTPUT = range(6)


@device
def place_tile(size, geometry, first, count, table):
    """Note in the table where each position of the tile has the origin of its window: position * stride - padding."""
    axes = len(size)
    rows, first_run, tile = table.rows, 1 << axes, table.tile
    places, rest = size, first
    for axis in range(axes - 1, -1, -1):
        places = tuple_setitem(places, axis, rest % geometry[OUTPUT, axis])
        rest //= geometry[OUTPUT, axis]
    for t in range(count):
        carry = 1
        for axis in range(axes - 1, -1, -1):
            place = places[axis]
            rows[(first_run + axis) * tile + t] = place * geometry[STRIDE, axis] - geometry[BEFORE, axis]
            place += carry
            carry = 1 if place == geometry[OUTPUT, axis] else 0
            places = tuple_setitem(places, axis, 0 if carry else place)


@device
def place_tap(size, geometry, inside, tap, count, offset, table):
    """Fill the table with one tap's samples; row `axis` of `offset` has the tap's offsets along that axis, one a position."""
    place_samples(size, tap_shifts(size, geometry, tap), inside, count, offset, table)


@device
def tap_shifts(size, geometry, tap):
    """Where a tap lies within its window along each axis."""
    shifts, rest = size, tap
    for axis in range(len(size) - 1, -1, -1):
        shifts = tuple_setitem(shifts, axis, rest % geometry[KERNEL, axis] * geometry[DILATION, axis])
        rest //= geometry[KERNEL, axis]
    return shifts
