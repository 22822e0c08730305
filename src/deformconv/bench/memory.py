"""The peak memory of a call, as the system sees it: whatever a library allocates, wherever."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["peak"]

PROCESS = Path("/proc/self")


def peak(call: Callable[[], Any]) -> int:
    """The bytes by which a call makes this process larger, at the most."""
    gc.collect()
    # The allocator would use again what it has kept of freed memory, and the process would not grow.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (PROCESS / "clear_refs").write_text("5")  # VmHWM now begins anew: it is the peak since this moment
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except OSError as error:
        raise RuntimeError(f"peak memory is read from {PROCESS}, which Linux has: {error}") from None


def _status(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
