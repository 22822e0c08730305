"""How many processors this process may use, and how many threads a call takes."""

from __future__ import annotations

import functools
import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = [
    "available_processors",
    "binds_threads",
    "chosen_threads",
    "get_num_threads",
    "most_threads",
    "set_num_threads",
]


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The processors' worth of time that the control group allows, if it sets a limit (version 2, then version 1)."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / file).read_text() for file in files).split()
            return float(quota) / float(period) if quota not in ("max", "-1") else None
        except (OSError, ValueError):
            continue
    return None


def available_processors() -> int:
    """How many processors this process may use: its affinity and its control group's quota, at least 1."""
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        processors = os.cpu_count() or 1
    return _allowed(processors)


def _allowed(processors: int) -> int:
    """A number of processors, or the control group's quota if that is less; at least 1."""
    quota = _quota()
    return max(1, processors if quota is None else min(processors, int(quota + 0.5)))


def binds_threads() -> bool:
    """Whether an OpenMP runtime has been told to keep each thread on a processor of its own.

    Then the affinity of the thread that calls us says nothing about how many processors its team has.
    """
    binding = os.environ.get("OMP_PROC_BIND", "false").lower() not in ("", "false")
    return binding or any(os.environ.get(name) for name in ("GOMP_CPU_AFFINITY", "KMP_AFFINITY"))


class _Numbers(NamedTuple):
    """Numbers of threads."""

    asked: int | None  # by DEFORMCONV_NUM_THREADS
    default: int
    most: int  # the default where the affinity of this thread does not count


@functools.lru_cache(maxsize=1)
def _from_environment(process: int) -> _Numbers:
    asked, openmp = (_number(os.environ.get(name, "")) for name in ("DEFORMCONV_NUM_THREADS", "OMP_NUM_THREADS"))
    given = asked or openmp
    if given is None and multiprocessing.current_process().daemon:
        # A daemon is one of many: a DataLoader's worker, or a pool's. They share the processors between them already.
        given = 1
    return _Numbers(asked, given or available_processors(), given or _allowed(os.cpu_count() or 1))


def _number(value: str) -> int | None:
    return int(value) if value.isdecimal() and int(value) > 0 else None


_chosen_threads: int | None = None


def chosen_threads() -> int | None:
    """The number of threads that was asked for, by `set_num_threads` or DEFORMCONV_NUM_THREADS; None if none was."""
    return _chosen_threads or _from_environment(os.getpid()).asked


def get_num_threads() -> int:
    """How many threads a large call uses, the caller's among them."""
    return _chosen_threads or _from_environment(os.getpid()).default


def most_threads() -> int:
    """As `get_num_threads`, for a team that found out what processors there are before its threads were bound to them."""
    return _chosen_threads or _from_environment(os.getpid()).most


def set_num_threads(n: int) -> None:
    """Use `n` threads for large calls, the caller's among them; results do not depend on it.

    Raises:
        TypeError: if `n` is not an integer.
        ValueError: if `n` is below 1.

    Example:
        >>> import deformconv
        >>> deformconv.set_num_threads(2)
        >>> deformconv.get_num_threads()
        2
    """
    global _chosen_threads
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"`n` is {n!r}; the number of threads is an integer of at least 1")
    if n < 1:
        raise ValueError(f"`n` is {n}; the number of threads is an integer of at least 1")
    _chosen_threads = int(n)
