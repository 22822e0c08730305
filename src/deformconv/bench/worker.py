"""One library in a process of its own: it prepares a case, shows its results, and times blocks of calls on request.

Requests and answers are lines of JSON on standard input and output; an answer is {"answer": ...} or {"error": "..."}.
Their form must stay: `deformconv bench --base` sends today's requests to an older commit's worker.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

from deformconv.bench import memory
from deformconv.bench.measure import peer_of


class Worker:
    """What this process can be asked."""

    def __init__(self, library: str, threads: int) -> None:
        self.peer = peer_of(library)(threads)

    def prepare(self, case: dict[str, Any]) -> None:
        """Make the case's arrays."""
        self.peer.prepare(self.peer.read(case))

    def results(self, direction: str, file: str) -> None:
        """Save the output and, of a backward call, every gradient."""
        np.savez(file, **self.peer.results(direction))

    def time(self, direction: str, calls: int) -> list[float]:
        """The seconds that each of some calls took, one after the other."""
        with self.peer.context(direction):
            call, seconds = self.peer.call_of(direction), []
            for _ in range(calls):
                began = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - began)
        return seconds

    def peak(self, direction: str) -> int:
        """The bytes by which one call made this process larger, at the most."""
        with self.peer.context(direction):
            return memory.peak(self.peer.call_of(direction))


def main() -> None:
    # Libraries may print what they like: it goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = Worker(sys.argv[1], int(sys.argv[2]))
            answer = {"answer": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:  # what a library cannot do is a result of the comparison
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
