"""Sharing out the items of a kernel's work, to an OpenMP team or to threads of our own."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from deformconv.runtime import threads
from deformconv.runtime.memory import ALIGNMENT, Arena, room, up
from deformconv.runtime.openmp import Team

__all__ = ["COPY", "Share", "is_shared", "run", "share"]

# A rough estimate of work in time decides what is too small to share out, and how often to listen for Ctrl-C.
NANOSECONDS = 0.03  # of a multiply-add
COPY = 20  # multiply-adds that take as long as moving one number
SHARED_FROM = 100_000  # estimated nanoseconds, from which work is shared out
BURST = 60_000_000  # estimated nanoseconds between two moments of listening; a fast processor needs a third of them


class Share(NamedTuple):
    """How the items of a kernel's work are shared out."""

    items: int
    threads: int
    burst: int  # items that the caller takes before it listens for Ctrl-C
    reals: int  # real numbers of scratch memory that every thread needs
    integers: int  # int32 numbers of scratch memory that every thread needs
    bytes: int  # of all threads' scratch memory

    def scratch(self, memory: Arena, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Every thread's scratch memory: a row of reals and a row of int32 numbers."""
        return memory.empty((self.threads, self.reals), dtype), memory.empty((self.threads, self.integers), "int32")


def share(items: int, threads: int, multiplications: int, dtype: str, scratch: tuple[int, int] = (0, 0)) -> Share:
    """Share out `items` items of `multiplications` multiply-adds altogether.

    `scratch` is how many int32 numbers and how many reals a thread needs.
    """
    threads = max(1, min(threads, items)) if is_shared(multiplications) else 1
    burst = int(BURST * items / max(multiplications * NANOSECONDS, 1))
    integers, reals = (up(number, ALIGNMENT) for number in scratch)  # a thread's row begins at a cache line
    size = room(threads * reals, dtype) + room(threads * integers, "int32")
    return Share(items, threads, burst, reals, integers, size)


def is_shared(multiplications: int) -> bool:
    """Whether work takes longer than sharing it out."""
    return multiplications * NANOSECONDS > SHARED_FROM


@cache
def _launch() -> Any:
    """The module that runs kernels on teams; it loads Numba."""
    with threads.importing:
        from deformconv.runtime import launch
    return launch


def run(kernel: Any, arguments: tuple[Any, ...], share: Share, team: Team, kind: tuple[Any, ...]) -> None:
    """Do a kernel's work, on an OpenMP team or on threads of our own; `kind` determines the arguments' types."""
    if team.runtime is not None and share.threads > 1 and share.burst and not team.runtime.is_resting:
        _launch().run_on_team(kernel, arguments, kind, share.items, threads=share.threads, burst=share.burst, team=team)
        return

    def work(counter: np.ndarray, limit: int, thread: int) -> None:
        kernel(counter, limit, thread, *arguments)

    threads.run(work, share.items, threads=share.threads, burst=share.burst)
