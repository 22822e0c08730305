"""The libraries that lend the threads of their OpenMP teams. What a team is, `openmp` knows, which the first call loads."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable

__all__ = ["LENDERS", "Lender", "lend"]


class Lender:
    """A library that lends its OpenMP team, PyTorch say.

    Args:
        name: the library's name, for texts.
        file: a shared library of it; the OpenMP runtime is found among what that one depends on.
        get_num_threads: the number of threads that its operations use in this thread.
    """

    def __init__(self, name: str, file: str | None, get_num_threads: Callable[[], int]) -> None:
        self.name, self.file, self.get_num_threads = name, file, get_num_threads
        # Whether this process was forked from one that had loaded the library, and perhaps had a team.
        self.is_inherited = _is_forked()


LENDERS: dict[str, Lender] = {}


def lend(library: str, lender: Lender) -> None:
    """Let calls on arrays of `library` ("torch") work on that library's team."""
    LENDERS[library] = lender


def _is_forked() -> bool:
    """Whether this process was forked by multiprocessing."""
    fork = getattr(multiprocessing.context, "ForkProcess", None)  # not on Windows
    if fork is None or multiprocessing.parent_process() is None:
        return False
    process = multiprocessing.current_process()
    return isinstance(process, fork) or (
        type(process) is multiprocessing.Process and multiprocessing.get_start_method() == "fork"
    )


def _after_fork() -> None:
    for lender in LENDERS.values():
        lender.is_inherited = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
