"""How far the kernels are from what the machine can do: `python -m deformconv.bench.roofline`, in the repository's folder.

It measures the peak of the micro-kernel and the speed of a copy, and sets the times of benchmarks/results.json beside them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from deformconv.bench.cases import Case, case_of, make
from deformconv.bench.figures import Row, layer, markdown
from deformconv.bench.readme import RESULTS
from deformconv.runtime.memory import aligned

__all__ = ["Machine", "floor", "measure", "table"]

# A product as kernels compute them: a tile of positions, a panel's depth, and operands that fit the second-level cache.
ROWS, DEPTH, COLUMNS = 192, 256, 128
COPIED = 256 << 20


class Machine(NamedTuple):
    """What all threads together reach."""

    operations: float  # floating-point operations a second in the micro-kernel
    bytes: float  # bytes a second, read and written, in copies that no cache holds


def measure(threads: int, seconds: float = 0.3, rounds: int = 7) -> Machine:
    """Measure the machine, by medians of some rounds."""
    import numba

    from deformconv.runtime.matmul import Factor, Panels, multiply
    from deformconv.runtime.simd import Rows

    @numba.njit(nogil=True)
    def products(a: Any, b: Any, c: Any, times: int) -> None:
        for _ in range(times):
            left, right = Factor(a, 0, DEPTH, 1, 0, DEPTH, 1), Panels(b, 0, DEPTH, 0, 0)
            multiply(left, ROWS, right, Rows(c, 0, COLUMNS), COLUMNS, True)

    def operands() -> list[Any]:
        arrays = [aligned(4 * size).view(np.float32) for size in (ROWS * DEPTH, DEPTH * COLUMNS, ROWS * COLUMNS)]
        for array in arrays:
            array[...] = 0
        return arrays

    sets = [operands() for _ in range(threads)]
    products(*sets[0], 1)
    once = _time([lambda: products(*sets[0], 100)]) / 100
    repeats = max(1, int(seconds / once))
    work = [lambda own=own: products(*own, repeats) for own in sets]
    operations = median(2.0 * ROWS * DEPTH * COLUMNS * repeats * threads / _time(work) for _ in range(rounds))
    pairs = [(np.ones(COPIED // threads, np.uint8), np.ones(COPIED // threads, np.uint8)) for _ in range(threads)]
    copies = [lambda pair=pair: np.copyto(*pair) for pair in pairs]
    return Machine(operations, median(2.0 * COPIED / _time(copies) for _ in range(rounds)))


def _time(works: Sequence[Callable[[], Any]]) -> float:
    """The seconds that some pieces of work take, each on a thread."""
    workers = [threading.Thread(target=work) for work in works]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


def floor(case: Case, direction: str, machine: Machine) -> tuple[float, float]:
    """The seconds that the products of a case take at the peak, and those that its arrays take to pass through memory once.

    Forward is one product, forward and backward three, of a multiplication and an addition for every weight at every position.
    """
    spec, arrays = make(case)
    products = 1 if direction == "forward" else 3
    operations = 2.0 * products * spec.batch * spec.positions * spec.taps * spec.in_channels * spec.out_channels / spec.groups
    read = sum(a.nbytes for name, a in arrays.items() if a is not None and name != "grad_output")
    output = arrays["grad_output"].nbytes
    # Backward reads all of them again, and the gradient of the output, and writes a gradient of each.
    moved = read + output if direction == "forward" else 3 * read + 2 * output
    return operations / machine.operations, moved / machine.bytes


def table(rows: Sequence[Row], machine: Machine) -> str:
    """The measured times beside the floors, as Markdown."""
    lines = []
    for row in rows:
        seconds = row["results"].get("deformconv", {}).get("milliseconds")
        if seconds is None:
            continue
        products, memory = (1000 * part for part in floor(case_of(row["layer"]), row["direction"], machine))
        share = f"{100 * products / seconds:.0f} %"
        lines.append(
            [layer(case_of(row["layer"])), row["direction"], f"{products:.2f}", f"{memory:.2f}", f"{seconds:.2f}", share]
        )
    return markdown(
        ["layer", "direction", "products at the peak", "arrays through memory once", "measured", "share of the peak"], lines
    )


def main() -> None:
    """Measure, and print the table in milliseconds."""
    speed = json.loads(Path(RESULTS).read_text())["speed"]
    machine = measure(speed["threads"])
    print(f"{machine.operations / 1e9:.0f} GFLOP/s, {machine.bytes / 1e9:.1f} GB/s with {speed['threads']} threads\n")
    print(table(speed["rows"], machine))


if __name__ == "__main__":
    main()
