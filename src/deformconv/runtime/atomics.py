"""Atomic operations on counters that several threads share."""

from __future__ import annotations

from numba import types

from deformconv.runtime.cache import device
from deformconv.runtime.simd import INT, element, emits, emits_result
from deformconv.runtime.threads import BEGUN, ENDED

__all__ = ["all_together", "fetch_add", "wait_for"]


@emits_result(types.int64)
def fetch_add(builder, _, counters, which):
    """The next number of a shared counter, `counters[which]` of an int64 array, each given out once."""
    return builder.atomic_rmw("add", element(builder, counters, which), INT(1), "acq_rel")


@emits
def wait_for(builder, _, counters, which, number):
    """Wait, without sleeping, until other threads have brought a counter to `number`."""
    place = element(builder, counters, which)
    again, done = builder.append_basic_block("wait"), builder.append_basic_block("done")
    builder.branch(again)
    builder.position_at_end(again)
    builder.cbranch(builder.icmp_signed("<", builder.load_atomic(place, "acquire", 8), number), again, done)
    builder.position_at_end(done)


@device
def all_together(counter, items, do, context):
    """Call `do(item, context)` for each item below `items`, beside other threads that do the same, until all are done."""
    item = fetch_add(counter, BEGUN)
    while item < items:
        do(item, context)
        fetch_add(counter, ENDED)
        item = fetch_add(counter, BEGUN)
    wait_for(counter, ENDED, items)
