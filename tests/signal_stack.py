"""The stack on which signals' handlers run (man sigaltstack): a library under test leaves it where it has unmapped memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class SignalStack(ctypes.Structure):
    """`stack_t` of <signal.h> on Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def current() -> SignalStack:
    """That of the calling thread."""
    found = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found


@contextmanager
def kept() -> Iterator[None]:
    """A context after which the calling thread has the signal stack again that it had before.

    Each `openvino.Core` that has loaded the CPU plugin puts a stack of its own there, and when it goes it puts back the one
    that it found: another Core's, perhaps, which has been unmapped. The next signal with a handler then ends the process by a
    segmentation fault, of which faulthandler, whose handler runs on that stack too, says nothing.
    """
    if sys.platform != "linux":
        yield
        return
    before = current()
    try:
        yield
    finally:
        if current().start != before.start:
            assert ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None) == 0
