"""Time libraries side by side: a process for each, alternating blocks of calls, and no time for a wrong result.

Only one process computes at a time. Libraries that idle in one process with another slow it: their threads spin.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import IO, Any, cast

import numpy as np

from deformconv.bench.cases import Case
from deformconv.bench.peers import DIRECTIONS, PEERS, Truth

__all__ = ["TOLERANCE", "Failure", "Process", "alternate", "differences", "measure", "summary_of_blocks", "tolerance"]

TOLERANCE = 1e-4  # of float32 against float64
MOST_CALLS = 1000  # in a block
Notify = Callable[[str], None]


class Failure(Exception):
    """What a library said when it could not do what was asked."""


class Process:
    """A worker process and the conversation with it."""

    def __init__(self, library: str, threads: int) -> None:
        self.library = library
        command = [sys.executable, "-m", "deformconv.bench.worker", library, str(threads)]
        # Libraries write hints and warnings there; what goes wrong is in the answers.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.requests = cast(IO[str], self.process.stdin)  # Popen makes both, since both are pipes
        self.answers = cast(IO[str], self.process.stdout)

    def ask(self, do: str, **request: Any) -> Any:
        try:
            self.requests.write(json.dumps({"do": do, **request}) + "\n")
            self.requests.flush()
        except OSError:
            raise Failure("its process has ended") from None
        line = self.answers.readline()
        if not line:
            raise Failure(f"its process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        self.answers.close()
        try:
            self.requests.close()
        except OSError:
            pass  # it has ended
        self.process.wait()


def differences(found: dict[str, Any], truth: dict[str, Any]) -> dict[str, float]:
    """The error of each result, max|a - b| / max|b|; a missing or misshapen one is infinitely wrong."""
    errors = {}
    for name, expected in truth.items():
        actual = found.get(name)
        if actual is None or actual.shape != expected.shape:
            errors[name] = float("inf")
            continue
        error = float(abs(actual - expected).max() / (abs(expected).max() or 1.0))
        errors[name] = error if error == error else float("inf")
    return errors


def tolerance(case: Case) -> float:
    """How far a right library may be from the truth: those that add positions in float32 round them to size * 2**-23 pixels."""
    return max(TOLERANCE, max(case.size) * 2.0**-23)


def measure(
    cases: Sequence[Case],
    libraries: Sequence[str],
    directions: Sequence[str] = DIRECTIONS,
    *,
    threads: int,
    blocks: int,
    seconds: float,
    notify: Notify = lambda line: None,
) -> list[dict[str, Any]]:
    """A row per case and direction: each library's times, or the reason why it has none."""
    rows = []
    with ExitStack() as stack:
        processes = {name: stack.enter_context(closing(Process(name, threads))) for name in (*libraries, Truth.name)}
        truth = processes.pop(Truth.name)
        for case in cases:
            for direction in directions:
                rows.append(row(case, direction, processes, truth, blocks, seconds, notify))
    return rows


def row(
    case: Case, direction: str, processes: dict[str, Any], truth: Any, blocks: int, seconds: float, notify: Notify
) -> dict[str, Any]:
    """Check every library that can run this, and time those that are right."""
    what = f"{case.name}, {direction}"
    notify(f"{what}: checking")
    results: dict[str, dict[str, Any]] = {}
    expected = _results(truth, case, direction)
    for name, process in processes.items():
        peer = PEERS[name]
        reason = peer.reason_against(case, direction)
        if reason is not None:
            results[name] = {"reason": reason}
            continue
        try:
            found = _results(process, case, direction)
        except Failure as failure:
            results[name] = {"reason": f"failed: {failure}"}
            continue
        results[name] = {}
        if peer.deforms:
            errors = differences(found, expected)
            worst = max(errors, key=lambda key: errors[key])
            results[name] = {"error": errors[worst]} | ({"as_2d": True} if peer.embeds(case) else {})
            if not errors[worst] <= tolerance(case):
                results[name] = {"reason": f"differs by {errors[worst]:.1e} in {worst}"}
    notify(f"{what}: measuring")
    right = {name: process for name, process in processes.items() if "reason" not in results[name]}
    for name, times in alternate(right, direction, blocks, seconds).items():
        results[name] |= times if "reason" in times else summary_of_blocks(times["blocks"])
    return {"case": case.name, "layer": case._asdict(), "direction": direction, "results": results}


def _results(process: Any, case: Case, direction: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.npz"
        process.ask("prepare", case=case._asdict())
        process.ask("results", direction=direction, file=str(file))
        return dict(np.load(file))


def alternate(processes: dict[str, Any], direction: str, blocks: int, seconds: float) -> dict[str, dict[str, Any]]:
    """The seconds of alternating blocks of calls, each block about `seconds` long."""
    calls: dict[str, int] = {}
    found: dict[str, dict[str, Any]] = {name: {"blocks": []} for name in processes}

    def attempt(name: str, count: int) -> list[float]:
        try:
            times: list[float] = processes[name].ask("time", direction=direction, calls=count)
            return times
        except Failure as failure:
            found[name] = {"reason": f"failed: {failure}"}
            return []

    for name in processes:
        if times := attempt(name, 1):
            # A long call needs no repetition to be known well enough for this.
            once = times[0] if times[0] > seconds else median(attempt(name, 3) or times)
            calls[name] = max(1, min(MOST_CALLS, round(seconds / once)))
    for block in range(blocks):
        for name in processes:
            if "reason" in found[name]:
                continue
            if calls[name] > 1:
                attempt(name, max(1, calls[name] // 10))  # the caches and the clock belonged to another process
            elif block >= max(3, blocks // 2):
                continue  # calls longer than a block are few, and vary little
            if times := attempt(name, calls[name]):
                found[name]["blocks"].append(times)
    return found


def summary_of_blocks(blocks: list[list[float]]) -> dict[str, Any]:
    """The median and the quartiles of the blocks' medians, in milliseconds."""
    medians = [1000 * median(times) for times in blocks]
    low, middle, high = np.quantile(medians, (0.25, 0.5, 0.75)).tolist()
    return {
        "milliseconds": middle,
        "quartiles": [low, high],
        "blocks": len(blocks),
        "calls": sum(map(len, blocks)),
    }
