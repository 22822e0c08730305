"""What benchmarks of operators other than convolution on a GPU do alike: one library's time, errors, memory and bits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from deformconv.bench import gpu_clock
from deformconv.bench.gpu_peers import Given, step

__all__ = ["OnDevice", "errors_of", "measured"]

INPUTS = 4  # that a library is called with in turn


class OnDevice:
    """A library on a GPU, where the host's threads compute nothing."""

    def __init__(self) -> None:
        self.torch = torch


def errors_of(found: Given, right: Given) -> dict[str, float]:
    """max|found - right| / max|right| of each result that is in `right`; of the first images, if it has fewer."""
    return {
        name: ((found[name][: len(expected)].double() - expected).abs().max() / expected.abs().max()).item()
        for name, expected in right.items()
    }


def measured(
    operate: Callable[..., Any], names: Collection[str], tensors: Given, direction: str, device: str, seconds: float,
    right: Callable[[], Given] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A call's time and memory, whether a second run gives the same bits, and its errors where it is said what is right."""
    sets = [
        {name: tensors[name].clone().requires_grad_(name != "grad_output") for name in names}
        for _ in range(1 if device == "cpu" else INPUTS)
    ]
    found, peak = gpu_clock.memory(lambda: step(operate, sets[0], direction), device)
    again = step(operate, sets[0], direction)
    result: dict[str, Any] = {} if peak is None else {"peak": peak}
    result["same bits"] = all(torch.equal(again[name], found[name]) for name in found)
    if right is not None:
        errors = errors_of(found, right())
        result |= {"errors": errors, "error": max(errors.values())}
    return result | gpu_clock.times(lambda number: step(operate, sets[number], direction), len(sets), device, seconds)
