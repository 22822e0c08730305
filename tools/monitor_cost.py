"""What deformconv.plots.OffsetMonitor adds to a step of training: one net, watched in every other block of steps.

    python tools/monitor_cost.py [--rounds 40] [--nets block-c64-56 block-c128-28 resnet18-224]

The nets are those of `deformconv bench`. It needs a quiet machine, and no limits on threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median, quantiles
from typing import Any

import torch

from deformconv.bench.nets import NETS, DeformconvNet, Net, _step
from deformconv.plots.monitor import OffsetMonitor

FIRST = 20  # steps of a block that are not measured: the monitor's lattices are made in the first 16


def blocks(net: Net, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds per step without the monitor and with it, a block of steps after the other."""
    made = DeformconvNet(torch.get_num_threads()).make(net, torch.float32)
    made.net.train()
    began = time.perf_counter()
    for _ in range(5):
        _step(*made)
    steps = max(3, round(seconds * 5 / (time.perf_counter() - began)))
    found: tuple[list[float], list[float]] = ([], [])
    written: list[Any] = []
    for number in range(rounds):
        for watched in (False, True) if number % 2 else (True, False):
            with OffsetMonitor(made.net, lambda step, values: written.append(values)) if watched else nullcontext():
                for _ in range(FIRST):
                    _step(*made)
                began = time.perf_counter()
                for _ in range(steps):
                    _step(*made)
                found[watched].append((time.perf_counter() - began) / steps)
    assert len(written) == rounds * (FIRST + steps)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="blocks without the monitor, and with it (default: 40)")
    parser.add_argument("--seconds", type=float, default=0.3, help="that are measured of a block (default: 0.3)")
    parser.add_argument("--nets", nargs="+", default=["block-c64-56", "block-c128-28", "resnet18-224"])
    options = parser.parse_args(arguments)
    for net in NETS:
        if net.name in options.nets:
            plain, watched = blocks(net, options.rounds, options.seconds)
            low, middle, high = quantiles([w / p - 1 for p, w in zip(plain, watched, strict=True)], n=4)
            print(
                f"{net.name}, {net.shape}: {median(plain) * 1e3:.2f} ms a step, watched {median(watched) * 1e3:.2f} ms: "
                f"{median(watched) / median(plain) - 1:+.1%}; fastest blocks {min(watched) / min(plain) - 1:+.1%}; of pairs of "
                f"blocks the median {middle:+.1%}, half between {low:+.1%} and {high:+.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
