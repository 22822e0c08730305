"""Counters that threads share: each number is given out once, and who waits sees what was written before."""

from __future__ import annotations

import functools
import threading

import numba
import numpy as np

from deformconv.runtime import cache
from deformconv.runtime.atomics import all_together, fetch_add, wait_for
from deformconv.runtime.threads import BEGUN, ENDED

compiled = numba.njit(**cache.OPTIONS)


@compiled
def take(counters, which, taken):
    for index in range(taken.size):
        taken[index] = fetch_add(counters, which)


@compiled
def wait_then_read(counters, number, values, seen):
    wait_for(counters, 1, number)
    seen[0] = values[0]


def test_each_number_of_a_counter_is_given_out_once() -> None:
    counters = np.array([5, 100, 5])
    taken = [np.empty(20_000, np.int64) for _ in range(4)]
    take(counters, 1, taken[0][:0])  # compiled before the threads race
    threads = [threading.Thread(target=functools.partial(take, counters, 1, part)) for part in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.tolist() == [5, 80_100, 5]
    assert np.array_equal(np.sort(np.concatenate(taken)), np.arange(100, 80_100))
    assert all((np.diff(part) > 0).all() for part in taken)


def test_who_waits_sees_what_was_written_before_the_counter_rose() -> None:
    counters, values, seen, one = np.zeros(2, np.int64), np.zeros(1), np.zeros(1), np.empty(1, np.int64)
    wait_then_read(counters, 0, values, seen)  # there already: returns at once, and is compiled
    take(counters, 0, one)
    waiting = threading.Thread(target=wait_then_read, args=(counters, 3, values, seen), daemon=True)
    waiting.start()
    for _ in range(2):
        take(counters, 1, one)
    waiting.join(timeout=0.1)  # long enough to be wrong in
    assert waiting.is_alive()
    values[0] = 7
    take(counters, 1, one)
    waiting.join(timeout=60)
    assert not waiting.is_alive() and seen[0] == 7


@cache.device
def square_into(item, context):
    values, offset = context
    values[item] += item * item + offset


@compiled
def squares(counters, values):
    all_together(counters, values.size, square_into, (values, 1))


def test_all_together_each_item_is_done_once_and_nobody_leaves_before_the_last() -> None:
    counters, values = np.zeros(8, np.int64), np.zeros(50_000, np.int64)
    squares(np.zeros(8, np.int64), values[:0])  # compiled before the threads race
    seen = []

    def work() -> None:
        squares(counters, values)
        seen.append(int((values != 0).sum()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(values, np.arange(values.size) ** 2 + 1) and seen == [values.size] * 4
    assert counters[ENDED] == values.size and counters[BEGUN] >= values.size
