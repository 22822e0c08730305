"""Processes of one thread each that run jobs, and a parent that hands these out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from deformconv.studies.detection.plan import Budget, Job

__all__ = ["WorkerError", "run_jobs"]

# Two threads in one process wait for one another actively, and take many times as long where the machine has other work.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "DEFORMCONV_NUM_THREADS")}
_PATIENCE = 20.0  # seconds in which a process ends that is told to

Watch = Callable[[Job, float, str], None]
Duty = Callable[[Path, Budget, Job, Callable[[float, str], None]], dict[str, Any]]


class WorkerError(RuntimeError):
    """A job raised, or its process ended."""


def run_jobs(
    folder: Path, budget: Budget, jobs: Iterable[Job], done: Iterable[Job], *, workers: int, watch: Watch, duty: Duty
) -> None:
    """Run the jobs, each after those that it needs.

    Args:
        folder: where they keep what they find.
        budget: theirs.
        jobs: what to do, none of which is in `done`.
        done: what the folder has.
        workers: how many at a time, each in a process of its own.
        watch: called with a job, the share of it that is over (above 1 when it is finished), and what it does.
        duty: what a process does for a job; a function that it can import.

    Raises:
        ValueError: a job needs one that is neither in `done` nor among the jobs.
        WorkerError: a job raised, or its process ended. The others are stopped; a next run goes on from what they kept.
    """
    waiting, finished = list(jobs), set(done)
    with _started((folder, budget, duty), min(workers, len(waiting))) as processes:
        idle = list(processes)
        busy: dict[Connection, Job] = {}
        while waiting or busy:
            for connection in list(idle):
                ready = next((job for job in waiting if finished.issuperset(job.needs)), None)
                if ready is None:
                    break
                waiting.remove(ready)
                idle.remove(connection)
                try:
                    connection.send(ready)
                except ConnectionError:  # it ended while it had nothing to do
                    raise _lost(ready, processes[connection]) from None
                busy[connection] = ready
                watch(ready, 0.0, "begins")
            if not busy:
                raise ValueError(f"{waiting[0].name} needs a job that is neither done nor among those to do; expected it.")
            for connection in cast(list[Connection], wait(list(busy))):
                job = busy[connection]
                kind, share, text = _message(connection, job, processes[connection])
                if kind == "failed":
                    raise WorkerError(f"{job.name} failed:\n{text}")
                watch(job, share, text)
                if kind == "done":
                    finished.add(job)
                    del busy[connection]
                    idle.append(connection)


def _message(connection: Connection, job: Job, process: Any) -> tuple[str, float, str]:
    try:
        found: tuple[str, float, str] = connection.recv()
    except (EOFError, ConnectionError):
        raise _lost(job, process) from None
    return found


def _lost(job: Job, process: Any) -> WorkerError:
    process.join(_PATIENCE)
    return WorkerError(
        f"the process of {job.name} ended with {process.exitcode}; a negative number is the signal that ended it. The same "
        "command goes on from what is kept"
    )


@contextmanager
def _started(arguments: tuple[Path, Budget, Duty], count: int) -> Iterator[Mapping[Connection, Any]]:
    """Processes that wait for jobs, by the connections to them; they end with the block."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of the parent's libraries
    processes: dict[Connection, Any] = {}
    try:
        # What is set here is inherited: the number of threads is read when libraries are imported, and an interrupt from the
        # keyboard reaches all processes of a terminal, of which the parent alone answers.
        with _environment(_ONE_THREAD), _interrupts_ignored():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
                process.start()
                theirs.close()
                processes[ours] = process
        yield processes
    finally:
        for connection, process in processes.items():
            process.terminate()
            connection.close()
        for process in processes.values():
            process.join(_PATIENCE)
            if process.exitcode is None:
                process.kill()
                process.join()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, folder: Path, budget: Budget, duty: Duty) -> None:
    """A process: do the jobs that come, and tell how they go."""
    # To be told to end raises, so that files that are being written go away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    import torch

    import deformconv

    torch.set_num_threads(1)
    deformconv.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except (EOFError, ConnectionError):
            return  # the parent has ended

        def tell(share: float, text: str) -> None:
            connection.send(("progress", share, text))

        try:
            found = duty(folder, budget, job, tell)
            connection.send(("done", 2.0, f"AP {found['AP']:.1f}"))
        except BrokenPipeError:
            return
        except Exception:
            connection.send(("failed", 0.0, traceback.format_exc()))
