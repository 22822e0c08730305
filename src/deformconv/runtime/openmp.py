"""Whose threads do a call's work: those of the library that its arrays came from, if it has an OpenMP team, or our own.

A library that shares its operations out with OpenMP keeps a team of threads, and after each operation they spin for some
milliseconds, in case the next one comes soon. Threads of our own would have to share the processors with them. So a call whose
arrays came from such a library does its work on that team, which is awake and has nothing else to do.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from deformconv.errors import BackendError
from deformconv.runtime.lenders import LENDERS, Lender
from deformconv.runtime.processors import binds_threads, chosen_threads, get_num_threads, most_threads

__all__ = ["Runtime", "Team", "runtime_of", "team_for"]

LATE = 1e-3  # seconds beyond an item's own length: on an idle machine a team's threads end within microseconds of one another
REST = 1.0  # seconds for which threads of our own do the work then


class Runtime:
    """An OpenMP runtime: the addresses of what a team takes, and where they were found.

    `GOMP_parallel` is libgomp's own entry, and LLVM's and Intel's runtimes have it too.
    """

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions  # keeps the library loaded
        self.parallel = _address(functions.GOMP_parallel)
        self.thread_number = _address(functions.omp_get_thread_num)
        self.clock = _address(functions.omp_get_wtime)
        self.file = _file_of(self.parallel)
        # libgomp waits in a forked child for threads that only its parent has. LLVM's and Intel's runtimes begin anew.
        other = getattr(functions, "__kmpc_fork_call", None)  # of one of those, but perhaps not of this one
        self.survives_fork = other is not None and _file_of(_address(other)) == self.file
        self._late, self._resting_until = 0.0, 0.0

    @property
    def name(self) -> str:
        """The name of its file, "libgomp.so.1" say."""
        return self.file.name

    def get_num_threads(self) -> int:
        """How many threads its next team has, for the calling thread."""
        return int(self._functions.omp_get_max_threads())

    def set_num_threads(self, n: int) -> None:
        """Set that number."""
        self._functions.omp_set_num_threads(n)

    @property
    def is_resting(self) -> bool:
        """Whether its teams have kept callers waiting lately, since other programs or threads have the processors.

        A team ends its work together: it waits for a thread that has no processor, where threads of our own go on without it.
        """
        return self._resting_until > 0 and time.monotonic() < self._resting_until

    def note(self, waited: float, item: float) -> None:
        """Hear how long a caller who had no work left has waited for its team, and how long an item takes, in seconds."""
        if waited <= LATE + item:
            self._late = max(0.0, self._late - 0.25)
            return
        self._late += 1
        if self._late >= 2:  # not for one accident
            self._late = 1.0
            self._resting_until = time.monotonic() + REST


_NEEDED = ("GOMP_parallel", "omp_get_max_threads", "omp_get_thread_num", "omp_get_wtime", "omp_set_num_threads")


@lru_cache(maxsize=16)
def runtime_of(lender: Lender) -> Runtime | str:
    """The OpenMP runtime that a library calls, or why there is none."""
    if os.name != "posix":
        return f"{lender.name}'s threads are used where its OpenMP runtime has GOMP_parallel, and on {os.name} none has"
    for functions in _loaded(lender.file):
        if not all(hasattr(functions, name) for name in _NEEDED):
            continue
        runtime = Runtime(functions)
        if _calls(lender, runtime):
            return runtime
    return f"{lender.name} has loaded no OpenMP runtime with GOMP_parallel"


def _calls(lender: Lender, runtime: Runtime) -> bool:
    """Whether this is the runtime that the library asks for its number of threads: there may be others in the process."""
    before, number = runtime.get_num_threads(), lender.get_num_threads()
    runtime.set_num_threads(number + 1)  # of this thread alone
    try:
        return lender.get_num_threads() == number + 1
    finally:
        runtime.set_num_threads(before)


def _loaded(file: str | None) -> Iterator[ctypes.CDLL]:
    """What the process finds names in: first everywhere, as a runtime that is preloaded comes first, then from a file on."""
    yield ctypes.CDLL(None)
    if file is not None:
        yield ctypes.CDLL(file)  # it is loaded already: this finds it, and names in what it depends on


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None  # a symbol that was found is somewhere
    return address


class _Found(ctypes.Structure):
    """`Dl_info` of <dlfcn.h>."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_of(address: int) -> Path:
    """The shared library that an address lies in."""
    found = _Found()
    ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(found))
    return Path(os.fsdecode(found.file or b"unknown"))


class Team(NamedTuple):
    """Who does a call's work: at most `threads` threads, the caller's among them."""

    threads: int
    runtime: Runtime | None = None  # None for threads of our own
    library: str = ""  # whose OpenMP threads they are
    reason: str = ""  # why they are our own
    started: int = 1  # how many of them the library's operations start

    @property
    def kind(self) -> str:
        """Whose threads they are: "own" or "openmp"."""
        return "own" if self.runtime is None else "openmp"

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        if self.runtime is None:
            return f"{threads} of its own, since {self.reason}" if self.reason else f"{threads} of its own"
        return f"{threads} of {self.library}'s OpenMP team ({self.runtime.name})"


_VARIABLE = "DEFORMCONV_THREADS"
_KINDS = ("auto", "own", "openmp")


def team_for(library: str) -> Team:
    """The threads for a call on arrays of a library.

    A team never has more threads than the library itself uses, so that it has no thread that the library would not have
    started. Where more were asked for, by `set_num_threads` or DEFORMCONV_NUM_THREADS, they are our own.

    Raises:
        ValueError: DEFORMCONV_THREADS is none of auto, own and openmp.
        BackendError: it is openmp, and there is no team.
    """
    lender = LENDERS.get(library)
    if lender is None:
        return _own(get_num_threads())
    return _team_of(lender, lender.get_num_threads(), chosen_threads(), get_num_threads())


@lru_cache(maxsize=1)
def _kind() -> str:
    """What DEFORMCONV_THREADS asks for. It is read once, at the first call: to read it takes longer than to choose a team."""
    kind = os.environ.get(_VARIABLE) or "auto"
    if kind not in _KINDS:
        raise ValueError(f"{_VARIABLE} is {kind!r}; expected one of {', '.join(_KINDS)}.")
    return kind


@lru_cache(maxsize=64)
def _own(threads: int) -> Team:
    _kind()  # a wrong name is an error here too
    return Team(threads)


@lru_cache(maxsize=64)
def _team_of(lender: Lender, theirs: int, chosen: int | None, ours: int) -> Team:
    kind = _kind()
    threads = chosen or min(theirs, most_threads() if binds_threads() else ours)
    found = runtime_of(lender)
    if kind == "own":
        reason = f"{_VARIABLE}=own"
    elif isinstance(found, str):
        reason = found
    elif lender.is_inherited and not found.survives_fork:
        reason = f"{found.name} does not survive a fork, and this process was forked from one that had loaded {lender.name}"
    elif threads > theirs:
        reason = f"{lender.name} uses {theirs}"
    else:
        return Team(threads, found, lender.name, started=theirs)
    if kind == "openmp":
        raise BackendError(f"{_VARIABLE} is 'openmp', but {reason}. Leave it unset, or set it to 'auto', for own threads.")
    return Team(chosen or min(theirs, ours), library=lender.name, reason=reason)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_team_of.cache_clear)  # it asks whether the lender is inherited
