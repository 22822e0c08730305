"""Persistent worker threads that run kernels without the GIL.

Plain Python threads, because Numba's own layers abort when two threads enter a parallel kernel at once (workqueue) or do not
survive a fork (OpenMP). The caller works too: with one thread, or for a small call, nothing is handed over at all.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from deformconv.runtime.processors import get_num_threads

__all__ = ["BEGUN", "ENDED", "LEFT", "NEXT", "STOP", "YIELD", "Work", "counters", "importing", "run"]

# `work(counter, limit, thread)` does at most `limit` items and returns early when none is left. `thread` numbers the threads of
# a call from 0. `counter` is an int64 array. counter[NEXT] is the number of the next item, which threads take atomically.
# counter[STOP] is 1 once the call has failed; work whose items take long looks at it in between. counter[LEFT] is the first
# item that a pause has left undone (`launch`). counter[BEGUN] and counter[ENDED] begin at 0 and are for the work's own use.
# counter[YIELD] is the address of the system's function by which a thread that waits lends others its processor, or 0.
# Two of them are 128 bytes apart, wherever the array begins: they share no cache line, nor a pair of lines that a processor
# fetches together. Who waits for one of them does not disturb those who add to another.
NEXT, STOP, BEGUN, ENDED, LEFT, YIELD = range(0, 6 * 16, 16)
Work = Callable[[np.ndarray, int, int], Any]

IDLE = 10.0  # seconds without need of them, after which workers beyond the number that `set_num_threads` asks for end


def _address_of_yield() -> int:
    functions = ctypes.CDLL(None) if os.name == "posix" else getattr(ctypes, "windll", None)
    found = getattr(functions, "sched_yield", None) or getattr(getattr(functions, "kernel32", None), "SwitchToThread", None)
    return (ctypes.cast(found, ctypes.c_void_p).value or 0) if found is not None else 0


_YIELD = _address_of_yield()


def counters() -> np.ndarray:
    """The counters of a call that begins."""
    found = np.zeros(YIELD + 1, np.int64)
    found[YIELD] = _YIELD
    return found


def _end_work(counter: np.ndarray, items: int) -> None:
    """Leave no item to anybody, and say that the call has failed."""
    counter[NEXT] = items
    counter[STOP] = True


class _Job:
    """One worker's share of a call. It belongs to whoever takes it first: a worker, or the caller, which withdraws it.

    A signal's handler may raise between any two steps of the caller. So every step can be repeated.
    """

    __slots__ = ("work", "counter", "items", "thread", "taken", "ended", "done", "error")

    def __init__(self, work: Work, counter: np.ndarray, items: int, thread: int) -> None:
        self.work, self.counter, self.items, self.thread = work, counter, items, thread
        self.taken: dict[None, str] = {}
        self.ended, self.done = False, threading.Lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def take(self, who: str) -> bool:
        """Take the job for `who` if nobody has it, and return whether it is theirs."""
        return self.taken.setdefault(None, who) == who

    def run(self) -> None:
        try:
            self.work(self.counter, self.items, self.thread)
        except BaseException as error:  # the caller raises it
            self.error = error
            _end_work(self.counter, self.items)
        finally:
            self.ended = True
            self.done.release()

    def finish(self, wanted: bool = False) -> None:
        """Withdraw the job if no worker has begun it and it is not `wanted`, else wait for its end."""
        if wanted or not self.take("caller"):
            while not self.ended:
                # It times out where a signal's handler raised in an earlier wait, after that had acquired the lock.
                if self.done.acquire(timeout=0.1):
                    self.done.release()


class _Workers:
    """Daemon threads on one queue; they start when first needed, and stop before a fork and when fewer are asked for."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.leaving: list[threading.Thread] = []  # take no more jobs, but may not have ended yet
        self.all_needed = 0.0  # when a call last had a job for each of `threads`
        self.lock = threading.RLock()  # a signal's handler may run a kernel, or fork, while its thread is in `submit`

    def _loop(self, jobs: SimpleQueue[_Job | None]) -> None:
        while not self._leave():
            try:
                job = jobs.get(timeout=IDLE)
            except Empty:
                continue
            if job is None:
                return
            if job.take("worker"):
                job.run()
            del job  # its arrays must not live until the next one comes

    def _leave(self) -> bool:
        """Whether the calling worker is one too many, and has been for a while; if so, it is removed from `threads`.

        The time is counted for all workers together: the queue hands jobs to them in turn, so that none is idle for long.
        """
        if time.monotonic() - self.all_needed < IDLE:
            return False
        if not self.lock.acquire(blocking=False):  # `stop` has it, and waits for this worker
            return False
        try:
            # A job in the queue counts on the workers that there were when it came.
            if len(self.threads) < get_num_threads() or not self.jobs.empty():
                return False
            worker = threading.current_thread()
            self.threads.remove(worker)
            self.leaving = [*filter(threading.Thread.is_alive, self.leaving), worker]
            return True
        finally:
            self.lock.release()

    def submit(self, jobs: list[_Job], needed: bool) -> None:
        """Queue jobs and start workers for them. If no worker can be started, this raises where workers are `needed`."""
        with self.lock:
            for job in jobs:
                self.jobs.put(job)
            if len(jobs) >= len(self.threads):
                self.all_needed = time.monotonic()
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
        for thread in (*self.threads, *self.leaving):
            while thread.is_alive():
                thread.join(0.1)
                self.jobs.put(None)
        self.threads.clear()
        self.leaving.clear()
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
    counter = counters()
    first = 1 if burst else 0  # the caller is thread 0, where it works
    jobs = [_Job(work, counter, items, thread) for thread in range(first, min(threads, items))]
    try:
        if jobs:
            _workers.submit(jobs, needed=not burst)
        while burst and counter[NEXT] < items:
            work(counter, burst, 0)
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
            _end_work(counter, items)
            for job in jobs:
                job.finish()
            return
        except BaseException:  # a second Ctrl-C, or what another signal's handler raises: the first one is on its way already
            continue


# Held while the kernels' modules are imported, Numba among them.
importing = threading.RLock()


class _Fork:
    """What a fork must find: no import of kernels half done, no worker, and Numba's compiler idle.

    A child has the forking thread alone. Workers that it believes it has would never answer, and a lock of the import or of
    the compiler that another thread holds would never be released.
    """

    compiler: Any = None
    thread: int | None = None  # the one that forks

    def before(self) -> None:
        importing.acquire()
        _workers.lock.acquire()
        _workers.stop()
        module = sys.modules.get("numba.core.compiler_lock")
        self.compiler = getattr(module, "global_compiler_lock", None)
        if self.compiler is not None:
            self.compiler.acquire()
        self.thread = threading.get_ident()

    def after(self) -> None:
        if self.thread != threading.get_ident():
            return  # a fork that had begun when this module was imported, by another thread
        self.thread = None
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
