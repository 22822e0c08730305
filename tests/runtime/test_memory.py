"""Memory that calls work in: aligned, used again, never by two at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from deformconv.runtime import memory


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    memory.release()


def address(array: np.ndarray) -> int:
    return array.ctypes.data


@pytest.mark.parametrize("size", [0, 1, 63, 64, 1000])
def test_arrays_are_aligned_and_apart(size: int) -> None:
    with memory.arena(memory.room(size, "float32") + memory.room(size, "float64")) as arena:
        first, second = arena.empty(size, "float32"), arena.empty(size, "float64")
        assert first.shape == second.shape == (size,)
        if size:  # else there is no address
            assert address(first) % memory.ALIGNMENT == address(second) % memory.ALIGNMENT == 0
        first[...], second[...] = 1, 2
        assert (first == 1).all()


def test_tests_find_no_memory_that_looks_written() -> None:
    """The fixture `poisoned_memory` reaches all that kernels get: a call's arena, and results."""
    for _ in range(2):  # fresh, and used again
        with memory.arena(1000) as arena:
            reals, integers = arena.empty((5, 10), "float64"), arena.empty(20, "int32")
            assert np.isnan(reals).all() and (integers > 2**29).all()
            reals[...], integers[...] = 1, 1
    for dtype in ("float32", "float64"):
        assert np.isnan(memory.aligned(800).view(dtype)).all()


def test_the_next_call_finds_the_same_memory() -> None:
    with memory.arena(1000) as arena:
        first = address(arena.empty(250, "float32"))
    with memory.arena(500) as arena:
        assert address(arena.empty(100, "float32")) == first
    memory.release()
    assert memory._kept == []


def test_a_larger_call_takes_other_memory_and_keeps_it() -> None:
    with memory.arena(1000):
        pass
    with memory.arena(5000) as arena:
        assert arena.empty(1250, "float32").size == 1250
    assert [kept.size for kept in memory._kept] == [5000]


def test_what_is_huge_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT", 999)
    with memory.arena(1000):
        pass
    assert memory._kept == []


def test_two_calls_at_once_have_memory_of_their_own() -> None:
    with memory.arena(1000) as arena:
        first = arena.empty(250, "float32")
        first[...] = 1
        other = threading.Thread(target=_fill, args=(2,))
        other.start()
        other.join()
        with memory.arena(1000) as inner:
            inner.empty(250, "float32")[...] = 3
        assert (first == 1).all()
    assert len(memory._kept) == 2  # as many as there were calls at once


def test_no_more_is_kept_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT", 2500)
    with memory.arena(1000), memory.arena(1000), memory.arena(1000):
        pass
    assert [kept.size for kept in memory._kept] == [1000, 1000]


def _fill(value: int) -> None:
    with memory.arena(1000) as arena:
        arena.empty(250, "float32")[...] = value


def test_memory_is_given_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="broken"), memory.arena(1000):
        raise RuntimeError("broken")
    assert len(memory._kept) == 1
