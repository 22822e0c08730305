"""The gate before Python's functions: what C gets of it, open and closed."""

from __future__ import annotations

import ctypes
import threading
import time
from ctypes import c_int64

import pytest

from deformconv.jax import gate

REFUSED = 77
FUNCTION = ctypes.CFUNCTYPE(c_int64, c_int64)


class Inner(ctypes.Structure):
    """A table of functions; that which makes a refusal is its second."""

    _fields_ = [("first", c_int64), ("refuse", c_int64)]


class Outer(ctypes.Structure):
    """What a function is called with."""

    _fields_ = [("number", c_int64), ("table", c_int64)]


@pytest.fixture
def opened():
    """The gate of this process, which is open again afterwards."""
    yield
    gate._state[gate._CLOSED] = 0


@pytest.fixture
def through():
    """Calls a function as C does, through a gate of its own, and returns what C gets and what the refusal was made of."""
    made = []
    refuse = FUNCTION(lambda address: made.append(Outer.from_address(address).number) or REFUSED)
    table = Inner(0, ctypes.cast(refuse, ctypes.c_void_p).value)
    argument = Outer(5, ctypes.addressof(table))

    def call(function):
        address = gate.gate(function, (Outer.table.offset, Inner.refuse.offset), Outer(6, 0))
        return lambda: (FUNCTION(address)(ctypes.addressof(argument)), made)

    yield call  # and not return: what it is called with must live


def test_what_a_function_returns(through):
    seen = []
    assert through(lambda address: seen.append(Outer.from_address(address).number) or gate.DONE)() == (0, [])
    assert seen == [5]
    assert through(lambda address: address)()[0] > 1000  # an error of the function's own


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_function_that_has_not_returned_is_a_refusal(through):
    def interrupted(address):
        raise KeyboardInterrupt

    assert through(interrupted)() == (REFUSED, [6])


def test_nobody_enters_a_closed_gate(through, opened):
    seen = []
    call = through(lambda address: seen.append(address) or gate.DONE)
    gate.close()
    assert call() == (REFUSED, [6]) and not seen


def test_closing_waits_for_those_inside(through, opened):
    began, seen = threading.Event(), []

    def slow(address):
        began.set()
        time.sleep(0.2)
        seen.append("done")
        return gate.DONE

    thread = threading.Thread(target=through(slow))
    thread.start()
    began.wait()
    gate.close()
    assert seen == ["done"]
    thread.join()
