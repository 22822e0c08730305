"""Time libraries side by side: a process for each, alternating blocks of calls, and no time for a wrong result.

Only one process computes at a time. Libraries that idle in one process with another slow it: their threads spin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple, cast

import numpy as np

from deformconv.accuracy import error
from deformconv.bench.aggregate import AGGREGATE_PEERS
from deformconv.bench.attention import ATTENTION_PEERS
from deformconv.bench.cases import Case
from deformconv.bench.half import HALF_PEERS
from deformconv.bench.jax_peers import JAX_PEERS
from deformconv.bench.keras_peers import KERAS_PEERS
from deformconv.bench.nets import NET_PEERS
from deformconv.bench.peers import PEERS, Peer, Truth
from deformconv.bench.rois import ROI_PEERS

__all__ = [
    "Entry", "Failure", "Pace", "Process", "Progress", "compare", "differences", "peer_of", "processes", "results_of", "speed",
]  # fmt: skip

MOST_CALLS = 1000  # in a block
LONG_CALL = 1.0  # seconds, beside which it counts little that another process had the caches


class Failure(RuntimeError):
    """What a process said when it could not do what was asked."""


class Pace(NamedTuple):
    """How long to measure: the number of blocks of each library, and about how many seconds a block takes."""

    blocks: int
    seconds: float


class Progress:
    """Hears what is being done; this one keeps it to itself."""

    def begin(self, steps: int) -> None:
        """A number of steps follows."""

    def step(self, what: str) -> None:
        """One step begins."""


class Process:
    """A worker process, in a folder and with variables of its environment if given, and the conversation with it."""

    def __init__(self, library: str, threads: int, folder: Path | None = None, **variables: str) -> None:
        self.library = library
        command = [sys.executable, "-m", "deformconv.bench.worker", library, str(threads)]
        # Libraries write hints and warnings there; what goes wrong is in the answers.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            cwd=folder, env={**os.environ, **variables},
        )  # fmt: skip
        self.requests = cast(IO[str], self.process.stdin)  # Popen makes both, since both are pipes
        self.answers = cast(IO[str], self.process.stdout)

    def ask(self, do: str, **request: Any) -> Any:
        with suppress(OSError):  # it has ended, and so have its answers
            self.requests.write(json.dumps({"do": do, **request}) + "\n")
            self.requests.flush()
        line = self.answers.readline()
        if not line:
            raise Failure(f"its process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        with suppress(OSError):
            self.requests.close()
        self.answers.close()
        self.process.wait()


@contextmanager
def processes(libraries: Sequence[str], threads: int) -> Iterator[list[Process]]:
    """A process for each; the same library may be there more than once."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Process(library, threads))) for library in libraries]


def peer_of(name: str) -> type[Peer]:
    """The library of that name, its layers in nets, or another operator of its."""
    found: dict[str, type[Peer]] = {
        **PEERS, **NET_PEERS, **ROI_PEERS, **ATTENTION_PEERS, **AGGREGATE_PEERS, **HALF_PEERS, **JAX_PEERS, **KERAS_PEERS,
    }  # fmt: skip
    return Truth if name == Truth.name else found[name]


class Entry(NamedTuple):
    """A process that has a case to run: a layer, or a net."""

    process: Any
    case: Any


def speed(
    cases: Sequence[Case], libraries: Sequence[str], directions: Sequence[str], threads: int, pace: Pace, progress: Progress
) -> list[dict[str, Any]]:
    """A row per case and direction: each library's times, or the reason why it has none."""
    rows = []
    progress.begin(len(cases) * len(directions))
    with processes([Truth.name, *libraries], threads) as (truth, *others):
        for case in cases:
            entries = {process.library: Entry(process, case) for process in others}
            for direction in directions:
                progress.step(f"{case.name}, {direction}")
                results = compare(entries, direction, truth, pace)
                rows.append({"layer": case._asdict(), "direction": direction, "results": results})
    return rows


def compare(entries: Mapping[str, Entry], direction: str, truth: Any, pace: Pace) -> dict[str, dict[str, Any]]:
    """Check every entry that can run this, and time those that are right, in alternating blocks."""
    expected: dict[Any, dict[str, Any]] = {}
    results = {}
    for label, (process, case) in entries.items():
        peer = peer_of(process.library)
        if reason := peer.reason_against(case, direction):
            results[label] = {"reason": reason}
            continue
        if peer.deforms and case not in expected:
            try:
                expected = {case: results_of(truth, case, direction)}  # of one case at a time, since they may be large
            except Failure as failure:
                raise Failure(f"what {case.name} should be could not be computed: {failure}") from None
        results[label] = _checked(process, case, direction, expected[case] if peer.deforms else None)
    right = {label: entries[label].process for label, result in results.items() if "reason" not in result}
    for label, times in _alternate(right, direction, pace).items():
        # A library that fails while it is timed is left out, like one that failed in the check.
        results[label] = times if "reason" in times else results[label] | times
    return results


def _checked(process: Any, case: Any, direction: str, expected: dict[str, Any] | None) -> dict[str, Any]:
    """The error of what an entry computes, and the reason why it may not be timed, if there is one."""
    peer = peer_of(process.library)
    try:
        found = results_of(process, case, direction)
    except Failure as failure:
        return {"reason": f"failed: {failure}"}
    if expected is None:  # a plain convolution
        return {}
    errors = differences(found, expected)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= case.tolerance:
        return {"reason": f"differs by {errors[worst]:.1e} in {worst}"}
    return {"error": errors[worst], **({"as 2-D": True} if peer.embeds(case) else {})}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The error of each result; one that is absent, misshapen or NaN is infinitely wrong."""
    errors = {}
    for name, right in expected.items():
        actual = found.get(name)
        if actual is None or actual.shape != right.shape:
            errors[name] = float("inf")
        else:
            difference = error(actual, right)
            errors[name] = float("inf") if np.isnan(difference) else difference
    return errors


def results_of(process: Any, case: Any, direction: str) -> dict[str, Any]:
    """The output that a process computes, and after a backward call the gradients by name."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.npz"
        process.ask("prepare", case=case._asdict())
        process.ask("results", direction=direction, file=str(file))
        return dict(np.load(file))


def _alternate(processes: Mapping[str, Any], direction: str, pace: Pace) -> dict[str, dict[str, Any]]:
    """The times of alternating blocks of calls."""
    calls: dict[str, int] = {}
    lasts: dict[str, float] = {}
    found: dict[str, list[list[float]]] = {}
    failed: dict[str, dict[str, Any]] = {}
    for label, process in processes.items():
        with _failures(failed, label):
            once = process.ask("time", direction=direction, calls=1)[0]
            # One call of a long case is measured well enough.
            if once < pace.seconds:
                once = median(process.ask("time", direction=direction, calls=3))
            calls[label] = max(1, min(MOST_CALLS, round(pace.seconds / once)))
            lasts[label], found[label] = once, []
    for block in range(pace.blocks):
        for label, count in calls.items():
            # Calls longer than a block vary little, and take long: fewer will do.
            if label in failed or (count == 1 and block >= max(3, pace.blocks // 2)):
                continue
            with _failures(failed, label):
                if count > 1 or lasts[label] < LONG_CALL:  # the caches and the clock belonged to another process
                    processes[label].ask("time", direction=direction, calls=max(1, count // 10))
                found[label].append(processes[label].ask("time", direction=direction, calls=count))
    return {label: failed.get(label) or _summary(found[label]) for label in processes}


@contextmanager
def _failures(failed: dict[str, dict[str, Any]], label: str) -> Iterator[None]:
    try:
        yield
    except Failure as failure:
        failed[label] = {"reason": f"failed: {failure}"}


def _summary(blocks: list[list[float]]) -> dict[str, Any]:
    """The median and the quartiles of the blocks' medians, in milliseconds."""
    medians = [1000 * median(times) for times in blocks]
    low, middle, high = np.quantile(medians, (0.25, 0.5, 0.75)).tolist()
    calls = sum(map(len, blocks))
    return {"milliseconds": middle, "quartiles": [low, high], "blocks": len(blocks), "calls": calls}
