"""Atomic operations on counters that several threads share."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from deformconv.runtime.simd import INT, data_and_type, element

__all__ = ["fetch_add", "wait_for"]


@intrinsic
def fetch_add(typing, counters, which):
    """The next number of a shared counter, `counters[which]` of an int64 array, each given out once."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, _ = data_and_type(context, builder, signature.args[0], arguments[0])
        return builder.atomic_rmw("add", element(builder, data, arguments[1]), INT(1), "acq_rel")

    return types.int64(counters, types.int64), emit


@intrinsic
def wait_for(typing, counters, which, number):
    """Wait, without sleeping, until other threads have brought a counter to `number`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counters, which, number = arguments
        data, _ = data_and_type(context, builder, signature.args[0], counters)
        place = element(builder, data, which)
        again, done = builder.append_basic_block("wait"), builder.append_basic_block("done")
        builder.branch(again)
        builder.position_at_end(again)
        builder.cbranch(builder.icmp_signed("<", builder.load_atomic(place, "acquire", 8), number), again, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(counters, types.int64, types.int64), emit
