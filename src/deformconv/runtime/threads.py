"""Persistent worker threads that run kernels without the GIL.

Plain Python threads, because Numba's own layers abort when two threads enter a parallel kernel at once (workqueue) or do not
survive a fork (OpenMP). The caller works too: with one thread, or for a small call, nothing is handed over at all.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from deformconv.runtime.memory import aligned

# `work(counter, limit)` takes at most `limit` items and returns early when none is left. `counter` is int64: at NEXT the number
# of the next item, taken atomically; at STOP 1 once the call has failed, for work whose items take long to look at. The others
# are 0 at first and the work's own.
NEXT, STOP, BEGUN, ENDED = range(4)
Work = Callable[[np.ndarray, int], Any]


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
    quota = _quota()
    return max(1, processors if quota is None else min(processors, int(quota + 0.5)))


@functools.lru_cache(maxsize=1)
def _default_threads(process: int) -> int:
    chosen = os.environ.get("DEFORMCONV_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    # One of many: a DataLoader's worker, or a pool's. They share the processors between them already.
    if multiprocessing.current_process().daemon:
        return 1
    return available_processors()


_chosen_threads: int | None = None


def get_num_threads() -> int:
    """How many threads a large call uses, the caller's among them."""
    return _chosen_threads or _default_threads(os.getpid())


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


class _Job:
    """One worker's share of a call; the first who takes it, a worker or the caller who no longer needs it, has it.

    A signal's handler may raise between any two steps of the caller. So each step can be taken again.
    """

    __slots__ = ("work", "counter", "items", "taken", "ended", "done", "error")

    def __init__(self, work: Work, counter: np.ndarray, items: int) -> None:
        self.work, self.counter, self.items = work, counter, items
        self.taken: dict[None, str] = {}
        self.ended, self.done = False, threading.Lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def take(self, who: str) -> bool:
        """Whether the job is theirs, now or since before."""
        return self.taken.setdefault(None, who) == who

    def run(self) -> None:
        try:
            self.work(self.counter, self.items)
        except BaseException as error:  # the caller raises it
            self.error = error
            self.counter[: STOP + 1] = self.items, True
        finally:
            self.ended = True
            self.done.release()

    def finish(self, wanted: bool = False) -> None:
        """Withdraw the job if no worker has begun it and it is not `wanted`, else wait for its end."""
        if wanted or not self.take("caller"):
            while not self.ended:
                if self.done.acquire(timeout=0.1):  # in vain if a wait that a signal ended has it
                    self.done.release()


class _Workers:
    """Daemon threads on one queue; they start when first needed and stop before a fork."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.lock = threading.RLock()  # a signal's handler may run a kernel, or fork, while its thread is in `submit`

    def _loop(self, jobs: SimpleQueue[_Job | None]) -> None:
        while (job := jobs.get()) is not None:
            if job.take("worker"):
                job.run()
            del job  # its arrays must not live until the next one comes

    def submit(self, jobs: list[_Job], needed: bool) -> None:
        """Queue jobs, and start workers for them; without any worker a caller may go on alone unless they are `needed`."""
        with self.lock:
            for job in jobs:
                self.jobs.put(job)
            while len(self.threads) < len(jobs):
                thread = threading.Thread(target=self._loop, args=(self.jobs,), name="deformconv", daemon=True)
                self.threads.append(thread)  # before it starts: `stop` must know of every worker that lives
                try:
                    thread.start()
                except RuntimeError:  # no more threads are allowed
                    self.threads.remove(thread)
                    if needed and not self.threads:
                        raise
                    return

    def stop(self) -> None:
        """Let every worker finish what it has begun and end; `lock` is held by the caller."""
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            while thread.is_alive():
                thread.join(0.1)
                self.jobs.put(None)
        self.threads.clear()
        left, self.jobs = self.jobs, SimpleQueue()
        while not left.empty():
            if (job := left.get()) is not None:
                self.jobs.put(job)


_workers = _Workers()


def run(work: Work, items: int, *, threads: int, burst: int) -> None:
    """Do `items` items of work on `threads` threads, and raise whatever any of them raised.

    The caller takes `burst` items at a time: between two bursts Python can handle a signal, so Ctrl-C is heard. With a
    `burst` of 0, where a single item takes long, the caller leaves all of them to workers and only listens.
    """
    counter = np.zeros(4, np.int64)
    helpers = min(threads, items) - (1 if burst else 0)
    jobs = [_Job(work, counter, items) for _ in range(helpers)]
    try:
        if jobs:
            _workers.submit(jobs, needed=not burst)
        while burst and counter[NEXT] < items:
            work(counter, burst)
        for job in jobs:
            job.finish(wanted=not burst)
    except BaseException:
        # The workers still write into the call's arrays: end them before anybody frees those.
        _end(jobs, counter, items)
        raise
    for job in jobs:
        if job.error is not None:
            raise job.error


def _end(jobs: list[_Job], counter: np.ndarray, items: int) -> None:
    while True:
        try:
            counter[: STOP + 1] = items, True
            for job in jobs:
                job.finish()
            return
        except BaseException:  # a second Ctrl-C, or what another signal's handler raises: the first one is on its way already
            continue


class _Scratch(threading.local):
    memory = np.empty(0, np.uint8)


_scratch = _Scratch()
_KEPT = 8 << 20


def scratch(size: int) -> np.ndarray:
    """At least `size` bytes of this thread's own memory, aligned to 64, uninitialised; valid until the next call."""
    memory = _scratch.memory
    if memory.size < size:
        memory = aligned(size)
        if size <= _KEPT:  # pages once touched are cheap to use again; a rare giant is not worth keeping
            _scratch.memory = memory
    return memory


# Held while the kernels' modules are imported, Numba among them.
importing = threading.RLock()


class _Fork:
    """What a fork must find: no import of kernels half done, no worker, and Numba's compiler idle.

    A child has the forking thread alone. Workers that it believes it has would never answer, and a lock of the import or of
    the compiler that another thread holds would never be released.
    """

    compiler: Any = None

    def before(self) -> None:
        importing.acquire()
        _workers.lock.acquire()
        _workers.stop()
        module = sys.modules.get("numba.core.compiler_lock")
        self.compiler = getattr(module, "global_compiler_lock", None)
        if self.compiler is not None:
            self.compiler.acquire()

    def after(self) -> None:
        if self.compiler is not None:
            self.compiler.release()
        _workers.lock.release()
        importing.release()


if hasattr(os, "register_at_fork"):
    # Hooks run last registered first. Those of `logging`, which take its lock, must come after ours: a worker that we wait
    # for may be compiling, and Numba's compiler logs.
    import logging  # noqa: F401

    _fork = _Fork()
    os.register_at_fork(before=_fork.before, after_in_parent=_fork.after, after_in_child=_fork.after)
