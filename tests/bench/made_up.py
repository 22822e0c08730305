"""Made-up measurements, with ratios that are known."""

from __future__ import annotations

from typing import Any

import numpy as np

from deformconv.bench.cases import CASES, Case
from deformconv.bench.measure import Failure, Progress
from deformconv.bench.nets import Net
from deformconv.bench.peers import DIRECTIONS, PEERS


class Counting(Progress):
    """Hears which steps are announced, and which are taken."""

    def __init__(self) -> None:
        self.expected = 0
        self.steps: list[str] = []

    def begin(self, steps: int) -> None:
        self.expected = steps

    def step(self, what: str) -> None:
        self.steps.append(what)


RIGHT = {"output": np.ones(3), "weight": np.array([1.0, 2.0, 4.0])}


class Fake:
    """A process that saves what it is told to, and whose calls take what they are told to."""

    def __init__(self, library: str, results: dict[str, Any], seconds: float = 1e-3, log: list[str] | None = None) -> None:
        self.library, self.saved, self.seconds = library, results, seconds
        self.log = [] if log is None else log
        self.fails: str | None = None

    def ask(self, do: str, **request: Any) -> Any:
        if do == self.fails:
            raise Failure("SomeError: it cannot")
        if do == "results":
            np.savez(request["file"], **self.saved)
        if do == "time":
            self.log += [self.library] * request["calls"]
            return [self.seconds] * request["calls"]
        return None


# Milliseconds: every ratio of the goals is a power of two.
FORWARD = {
    "deformconv": 4.0, "onnxruntime": 16.0, "openvino": 8.0, "ncnn": 32.0, "torchvision": 64.0, "kornia": 128.0, "dense": 2.0,
}  # fmt: skip
TRAINING = {"deformconv": 10.0, "torchvision": 320.0, "kornia": 80.0, "dense": 20.0}

MACHINE: dict[str, Any] = {
    "processor": "A Processor",
    "vector features": ["avx2", "fma"],
    "cores": 2,
    "packages": {"torch": "2.9", "onnxruntime": "1.30"},
    "python": "3.11.7",
}


def result(milliseconds: float, **more: Any) -> dict[str, Any]:
    quartiles = [0.9 * milliseconds, 1.2 * milliseconds]
    return {"milliseconds": milliseconds, "quartiles": quartiles, "blocks": 7, "calls": 70, **more}


def row(case: Case, direction: str = "forward", **milliseconds: float) -> dict[str, Any]:
    results = {name: result(time) for name, time in milliseconds.items()}
    return {"layer": case._asdict(), "direction": direction, "results": results}


def rows() -> list[dict[str, Any]]:
    """Every case in both directions; times grow from case to case, ratios stay."""
    found = []
    for number, case in enumerate(CASES):
        for direction, times in zip(DIRECTIONS, (FORWARD, TRAINING), strict=True):
            one = row(case, direction, **{name: (number + 1) * time for name, time in times.items()})
            for name, peer in PEERS.items():
                if reason := peer.reason_against(case, direction):
                    one["results"][name] = {"reason": reason}
                elif peer.embeds(case):
                    one["results"][name]["as 2-D"] = True
            found.append(one)
    return found


BLOCK = Net("tiny", 2, (9, 8), 4)
RESNET = Net("small", 1, (64, 64), depth=18)


def net_rows() -> list[dict[str, Any]]:
    """Two nets on an idle machine, one on a busy one."""

    def one(net: Net, machine: str, **milliseconds: float) -> dict[str, Any]:
        results = {name: result(time) for name, time in milliseconds.items()}
        return {"net": net._asdict(), "direction": "forward", "machine": machine, "results": results}

    return [
        one(BLOCK, "idle", deformconv=4.0, torchvision=64.0, dense=2.0),
        one(RESNET, "idle", deformconv=8.0, torchvision=64.0, dense=1.0),
        one(BLOCK, "busy", deformconv=4.0, dense=16.0),
    ]


def section(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {"date": "2026-11-01", "threads": 2, "blocks": 7, "seconds a block": 0.3, "rows": found}


def document() -> dict[str, Any]:
    return {"machine": MACHINE, "speed": section(rows())}
