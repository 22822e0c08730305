"""The time and the memory of calls on a GPU, what its kernels take, and the most that it can do.

The time of a call is that of the GPU alone: some calls, on inputs in turn, are recorded as one CUDA graph, which is replayed.
What the host takes to issue a call is measured apart. On a CPU there is the clock on the wall, for smoke runs.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

import deformconv
from deformconv.bench import document
from deformconv.bench.gpu_peers import DTYPES, allow_tf32

__all__ = ["ceilings", "clear", "kernels", "machine", "memory", "of_one_call", "times"]

PACKAGES = ("numpy", "torch", "triton", "torchvision", "deformops")
COPIED, SIDE = 1 << 30, 8192  # bytes of a copy, and the side of the square matrices of a product
BLOCK, LEAST, MOST = 4e-3, 5, 40  # seconds of a block of replays, and the numbers of blocks

Call = Callable[[int], Any]  # of the number of an input


def times(call: Call, inputs: int, device: str, seconds: float) -> dict[str, Any]:
    """The median and the quartiles of one call's milliseconds, how they were measured, and the milliseconds to issue one.

    `call` is called with the numbers of the inputs in turn; all that is compiled or tuned at a first call is so before.
    """
    if device == "cpu":
        return _summary([_wall(partial(call, number)) for number in (*range(inputs), 0, 0)]) | {"by": "wall"}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a graph is recorded on a stream of its own, whose libraries may prepare themselves too
        for number in range(inputs):
            call(number)
    torch.cuda.synchronize()
    issue = _issue(call, inputs)
    graph, why = _recorded(call, inputs)
    found = _blocks(graph.replay if graph is not None else lambda: [call(number) for number in range(inputs)], inputs, seconds)
    return _summary(found) | {"issue": 1000 * issue, "by": "events" if graph is None else "graph", **why}


def _wall(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _summary(seconds: Iterable[float]) -> dict[str, Any]:
    low, middle, high = np.quantile([1000 * one for one in seconds], (0.25, 0.5, 0.75)).tolist()
    return {"milliseconds": middle, "quartiles": [low, high]}


def _issue(call: Call, inputs: int, rounds: int = 5) -> float:
    """The seconds that the host takes for a call of which nothing waits for the GPU."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        found += [_wall(partial(call, number)) for number in range(inputs)]
    torch.cuda.synchronize()
    return median(found)


def _recorded(call: Call, inputs: int) -> tuple[Any, dict[str, str]]:
    """A CUDA graph of a call on each input; or None, and why there is none."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for number in range(inputs):
                call(number)
    except Exception as error:  # of whatever kind: a call that waits for the GPU, for one
        with suppress(RuntimeError):
            torch.cuda.synchronize()
        return None, {"not recorded": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:150]}"}
    return graph, {}


def _blocks(run: Callable[[], Any], inputs: int, seconds: float) -> list[float]:
    """The seconds of a call, by the GPU's own clock, in blocks of runs; a run is a call on each input."""
    run()
    torch.cuda.synchronize()
    once = max(_elapsed(run, 1), 1e-6)
    repeats = max(1, min(200, round(BLOCK / once)))
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < LEAST or (len(found) < MOST and time.perf_counter() - began < seconds):
        found.append(_elapsed(run, repeats) / repeats / inputs)
    return found


def _elapsed(run: Callable[[], Any], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def memory(call: Callable[[], Any], device: str) -> tuple[Any, int | None]:
    """What a second call returns, and the bytes that it takes at the most beyond those before the first, results included.

    What is compiled or tuned at a first call does not count, what is kept from one call to the next does.
    """
    if device == "cpu":
        return call(), None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found = call()
    torch.cuda.synchronize()
    return found, torch.cuda.max_memory_allocated() - before


def clear(device: str) -> None:
    """Give back what a measurement took; RuntimeError if the GPU no longer answers."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def ceilings(seconds: float = 0.5) -> dict[str, float]:
    """The most that the GPU does: bytes a second of a copy, and operations a second of a product in each dtype."""
    found = {"copy": _copied(seconds)}
    clear("cuda")
    for label in DTYPES:
        found[label] = _multiplied(label, seconds)
        clear("cuda")
    return found


def _copied(seconds: float) -> float:
    source, target = (torch.zeros(COPIED, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2e3 * COPIED / float(times(lambda _: target.copy_(source), 1, "cuda", seconds)["milliseconds"])


def _multiplied(label: str, seconds: float) -> float:
    to = getattr(torch, DTYPES[label].name)
    left, right = (torch.randn(SIDE, SIDE, device="cuda").to(to) for _ in range(2))
    allow_tf32(DTYPES[label].tf32)
    # With a bias too, before anything is measured: what cuBLAS keeps for itself is no library's memory.
    torch.addmm(left[0], left, right)
    return 2e3 * SIDE**3 / float(times(lambda _: left @ right, 1, "cuda", seconds)["milliseconds"])


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on apart from the code."""
    packages = {"deformconv": deformconv.__version__, **document.packages(PACKAGES)}
    found: dict[str, Any] = {"python": platform.python_version(), "packages": packages}
    if device == "cpu":
        return {"device": "cpu", **found}
    card = torch.cuda.get_device_properties(0)
    return {
        "device": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory": f"{round(card.total_memory / 2**30)} GiB",
        "L2 cache": f"{round(getattr(card, 'L2_cache_size', 0) / 2**20)} MiB",
        "driver": _driver(),
        "CUDA": torch.version.cuda or f"none, HIP {torch.version.hip}",
        **found,
    }


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    ran = subprocess.run(asked, capture_output=True, text=True, check=False)
    return (ran.stdout.strip().splitlines() or ["unknown"])[0]


def kernels(call: Call, inputs: int) -> list[dict[str, Any]]:
    """The GPU's kernels of one call: name, microseconds and number, the longest first; copies and fills are among them."""
    from torch.profiler import ProfilerActivity, profile

    for number in range(inputs):
        call(number)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for number in range(inputs):
            call(number)
        torch.cuda.synchronize()
    return of_one_call(profiled.key_averages(), inputs)


def of_one_call(averages: Iterable[Any], calls: int) -> list[dict[str, Any]]:
    """What a profiler counted on the GPU in some calls, for one of them."""
    found = [
        {"kernel": one.key, "microseconds": one.self_device_time_total / calls, "times": one.count / calls}
        for one in averages
        if one.device_type.name != "CPU" and one.self_device_time_total > 0
    ]
    return sorted(found, key=lambda one: -one["microseconds"])
