"""Atomic operations on counters that several threads share."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from deformconv.runtime.cache import device
from deformconv.runtime.simd import INT, element, emits, emits_result
from deformconv.runtime.threads import BEGUN, ENDED, STOP, YIELD

__all__ = ["all_together", "fetch_add", "wait_for", "wait_for_turn"]

_LOOKS = 4096  # at a counter, some microseconds, before who waits for it lends its processor to others


@emits_result(types.int64)
def fetch_add(builder, _, counters, which):
    """The next number of a shared counter, `counters[which]` of an int64 array, each given out once."""
    return builder.atomic_rmw("add", element(builder, counters, which), INT(1), "acq_rel")


@emits
def wait_for(builder, _, counters, which, number):
    """Wait until other threads have brought a counter to `number`; `counters` are those of `threads.counters`.

    It does not sleep. But after some microseconds it offers its processor, after each look, to threads that have none.
    """
    _wait(builder, counters, element(builder, counters, which), number, None)


@emits
def wait_for_turn(builder, _, counters, turns, which, number):
    """As `wait_for`, of another array's number; it also ends once the call has failed, when nobody may bring it there."""
    _wait(builder, counters, element(builder, turns, which), number, element(builder, counters, INT(STOP)))


def _wait(builder, counters, place, number, stop):
    lend = builder.load(element(builder, counters, INT(YIELD)))
    begin = builder.block
    blocks = [builder.append_basic_block(f"wait.{name}") for name in ("look", "again", "long", "lend", "done")]
    look, again, long, lending, done = blocks
    builder.branch(look)
    builder.position_at_end(look)
    looks = builder.phi(INT)
    looks.add_incoming(INT(0), begin)
    builder.cbranch(builder.icmp_signed("<", builder.load_atomic(place, "acquire", 8), number), again, done)
    builder.position_at_end(again)
    if stop is not None:
        unstopped = builder.append_basic_block("wait.unstopped")
        builder.cbranch(builder.icmp_signed("==", builder.load_atomic(stop, "acquire", 8), INT(0)), unstopped, done)
        builder.position_at_end(unstopped)
    more = builder.add(looks, INT(1))
    looks.add_incoming(more, builder.block)
    builder.cbranch(builder.icmp_signed("<", more, INT(_LOOKS)), look, long)
    builder.position_at_end(long)
    looks.add_incoming(more, long)
    builder.cbranch(builder.icmp_signed("==", lend, INT(0)), look, lending)
    builder.position_at_end(lending)
    looks.add_incoming(more, lending)
    builder.call(builder.inttoptr(lend, ir.FunctionType(ir.IntType(32), []).as_pointer()), [])
    builder.branch(look)
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
