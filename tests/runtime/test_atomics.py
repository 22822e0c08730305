"""Counters that threads share: each number is given out once, and who waits sees what was written before."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time

import numba
import numpy as np
import pytest

from deformconv.runtime import cache, threads
from deformconv.runtime.atomics import all_together, fetch_add, wait_for, wait_for_turn
from deformconv.runtime.threads import BEGUN, ENDED, LEFT, NEXT, STOP, YIELD

compiled = numba.njit(**cache.OPTIONS)


@compiled
def take(counters, which, taken):
    for index in range(taken.size):
        taken[index] = fetch_add(counters, which)


@compiled
def wait_then_read(counters, number, values, seen):
    wait_for(counters, ENDED, number)
    seen[0] = values[0]


def test_each_number_of_a_counter_is_given_out_once() -> None:
    counters = np.array([5, 100, 5])
    taken = [np.empty(20_000, np.int64) for _ in range(4)]
    take(counters, 1, taken[0][:0])  # compiled before the threads race
    takers = [threading.Thread(target=functools.partial(take, counters, 1, part)) for part in taken]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert counters.tolist() == [5, 80_100, 5]
    assert np.array_equal(np.sort(np.concatenate(taken)), np.arange(100, 80_100))
    assert all((np.diff(part) > 0).all() for part in taken)


def test_who_waits_sees_what_was_written_before_the_counter_rose() -> None:
    counters, values, seen, one = threads.counters(), np.zeros(1), np.zeros(1), np.empty(1, np.int64)
    wait_then_read(counters, 0, values, seen)  # there already: returns at once, and is compiled
    take(counters, 0, one)
    waiting = threading.Thread(target=wait_then_read, args=(counters, 3, values, seen), daemon=True)
    waiting.start()
    for _ in range(2):
        take(counters, ENDED, one)
    waiting.join(timeout=0.1)  # long enough to be wrong in
    assert waiting.is_alive()
    values[0] = 7
    take(counters, ENDED, one)
    waiting.join(timeout=60)
    assert not waiting.is_alive() and seen[0] == 7


@compiled
def wait_for_one(counters, turns, number):
    wait_for_turn(counters, turns, 1, number)


@pytest.mark.parametrize("ends", ["its turn", "a failure"])
def test_who_waits_for_a_turn_waits_no_longer_once_the_call_has_failed(ends: str) -> None:
    counters, turns, one = threads.counters(), np.zeros(3, np.int64), np.empty(1, np.int64)
    wait_for_one(counters, turns, 0)  # there already: returns at once, and is compiled
    take(turns, 0, one)
    waiting = threading.Thread(target=wait_for_one, args=(counters, turns, 1), daemon=True)
    waiting.start()
    waiting.join(timeout=0.1)  # long enough to be wrong in
    assert waiting.is_alive()
    take(*((turns, 1, one) if ends == "its turn" else (counters, STOP, one)))
    waiting.join(timeout=60)
    assert not waiting.is_alive()


@cache.device
def square_into(item, context):
    values, offset = context
    values[item] += item * item + offset


@compiled
def squares(counters, values):
    all_together(counters, values.size, square_into, (values, 1))


def test_all_together_each_item_is_done_once_and_nobody_leaves_before_the_last() -> None:
    counters, values = threads.counters(), np.zeros(50_000, np.int64)
    squares(threads.counters(), values[:0])  # compiled before the threads race
    seen = []

    def work() -> None:
        squares(counters, values)
        seen.append(int((values != 0).sum()))

    takers = [threading.Thread(target=work) for _ in range(4)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert np.array_equal(values, np.arange(values.size) ** 2 + 1) and seen == [values.size] * 4
    assert counters[ENDED] == values.size and counters[BEGUN] >= values.size


@compiled
def wait_until_all_are_here(counters, number):
    fetch_add(counters, BEGUN)
    wait_for(counters, BEGUN, number)


@pytest.mark.parametrize("lends", [True, False])
def test_many_more_threads_than_processors_wait_for_one_another(lends: bool) -> None:
    """Also where the system has no function to lend a processor by."""
    number = 32 if lends else 4
    wait_until_all_are_here(threads.counters(), 1)  # compiled before the threads wait
    for _ in range(20 if lends else 3):
        counters = threads.counters()
        counters[YIELD] *= lends
        waiting = [
            threading.Thread(target=wait_until_all_are_here, args=(counters, number), daemon=True) for _ in range(number)
        ]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in waiting) and counters[BEGUN] == number


@pytest.mark.skipif(os.name != "posix", reason="needs a function of this kind to call")
def test_who_waits_long_lends_its_processor() -> None:
    """What the counters name is called, and not while a wait is short."""
    called: list[float] = []
    function = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: called.append(time.monotonic()) or 0)
    counters, one = threads.counters(), np.empty(1, np.int64)
    assert counters[YIELD] != 0
    counters[YIELD] = ctypes.cast(function, ctypes.c_void_p).value
    take(counters, BEGUN, one)
    wait_until_all_are_here(counters, 2)  # there already
    assert not called
    waiting = threading.Thread(target=wait_until_all_are_here, args=(counters, 4), daemon=True)
    waiting.start()
    end = time.monotonic() + 60
    while len(called) < 3 and time.monotonic() < end:
        time.sleep(0.001)
    take(counters, BEGUN, one)
    waiting.join(timeout=60)
    assert not waiting.is_alive() and len(called) >= 3


def test_counters_share_no_cache_line() -> None:
    places = np.array([NEXT, STOP, BEGUN, ENDED, LEFT, YIELD]) * 8  # bytes
    assert NEXT == 0 and np.diff(places).min() >= 128
    assert threads.counters().size > max(places) // 8 and not threads.counters()[:YIELD].any()
