"""What else is worth measuring: kinds of offsets, small calls, scaling, memory, the first call.

Every report measures rows, which JSON keeps, and makes Markdown of rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from deformconv.bench import startup
from deformconv.bench.cases import Case, case_of, make, named
from deformconv.bench.figures import Row, digits, layer, markdown
from deformconv.bench.measure import Entry, Failure, Pace, Progress, compare, processes
from deformconv.bench.peers import DIRECTIONS, PEERS, RECORDED, Truth

__all__ = ["REPORTS", "Plan", "Report", "slope"]

Rows = list[dict[str, Any]]
MEGABYTE = 2**20


class Plan(NamedTuple):
    """What was asked for."""

    cases: Sequence[Case]
    libraries: Sequence[str]
    directions: Sequence[str]
    threads: int
    pace: Pace
    quick: bool = False


class Report(NamedTuple):
    """How one report is measured, and how its rows are written."""

    title: str
    measure: Callable[[Plan, Progress], Rows]
    write: Callable[[Sequence[Row]], str]


# Offsets of three kinds

SIGMAS = {"zero": 0.0, "sigma 2": 2.0, "sigma 20": 20.0}


def offsets(plan: Plan, progress: Progress) -> Rows:
    """Each case with offsets that are zero, of a trained net's size, and all over the place."""
    rows = []
    progress.begin(len(plan.cases) * len(plan.directions))
    with processes([Truth.name, *["deformconv"] * len(SIGMAS)], plan.threads) as (truth, *ours):
        for case, direction in product(plan.cases, plan.directions):
            progress.step(f"offsets, {case.name}, {direction}")
            kinds = zip(SIGMAS.items(), ours, strict=True)
            entries = {kind: Entry(process, case._replace(sigma=sigma)) for (kind, sigma), process in kinds}
            rows.append(_row(case, direction, compare(entries, direction, truth, plan.pace)))
    return rows


def _row(case: Case, direction: str, results: dict[str, Any]) -> dict[str, Any]:
    return {"layer": case._asdict(), "direction": direction, "results": results}


def _value(row: Row, label: str) -> float | None:
    value: float | None = row["results"].get(label, {}).get("milliseconds")
    return value


def _cell(row: Row, label: str, factor: float = 1.0) -> str:
    value = _value(row, label)
    return str(row["results"].get(label, {}).get("reason", "-")) if value is None else digits(factor * value)


def _over(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else digits(a / b)


def write_offsets(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        ratios = [_over(_value(row, kind), _value(row, "sigma 2")) for kind in ("zero", "sigma 20")]
        lines.append([_name(row), row["direction"], *(_cell(row, kind) for kind in SIGMAS), *ratios])
    head = ["case", "direction", *(f"{kind}, ms" for kind in SIGMAS), "zero / sigma 2", "sigma 20 / sigma 2"]
    return markdown(head, lines, 2)


def _name(row: Row) -> str:
    return case_of(row["layer"]).name


# Small calls


def small_cases(quick: bool) -> list[Case]:
    """From 1x8x8x8 upwards."""
    batches, channels, sizes = ((1,), (8, 32), (8, 16)) if quick else ((1, 4), (8, 16, 32, 64), (8, 16, 32))
    return [Case(f"{n}x{c}x{s}x{s}", n, c, c, (s, s)) for n, c, s in product(batches, channels, sizes)]


def small(plan: Plan, progress: Progress) -> Rows:
    """What a call costs when there is little to compute, without and with a gradient recorded."""
    cases, directions = small_cases(plan.quick), ("forward", RECORDED)
    libraries = [name for name in plan.libraries if name in ("deformconv", "torchvision")]
    rows = []
    progress.begin(len(cases) * len(directions))
    with processes([Truth.name, *libraries], plan.threads) as (truth, *others):
        for case, direction in product(cases, directions):
            progress.step(f"small calls, {case.name}, {direction}")
            entries = {process.library: Entry(process, case) for process in others}
            rows.append(_row(case, direction, compare(entries, direction, truth, plan.pace)))
    return rows


def write_small(rows: Sequence[Row]) -> str:
    head = ["call", "direction", "deformconv, µs", "torchvision, µs", "torchvision / ours"]
    lines = [
        [
            _name(row), row["direction"], *(_cell(row, name, 1000) for name in ("deformconv", "torchvision")),
            _over(_value(row, "torchvision"), _value(row, "deformconv")),
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines, 2)


# Scaling

_BASE = Case("", 2, 128, 128, (28, 28))
SCALES: dict[str, tuple[Case, ...]] = {
    "batch": tuple(_BASE._replace(batch=n) for n in (2, 4, 8, 16)),
    "positions": tuple(_BASE._replace(size=(s, s)) for s in (28, 40, 56, 80)),
    "taps": tuple(_BASE._replace(kernel=(h, w), padding=(h // 2, w // 2)) for h, w in ((3, 3), (3, 5), (5, 5), (5, 7), (7, 7))),
    "C*O": tuple(_BASE._replace(in_channels=c, out_channels=c) for c in (128, 192, 256, 384, 512)),
}
LEAST = 1.0  # milliseconds, below which a call's own cost shows


def _amount(case: Case, axis: str) -> int:
    """By how much work the cases of an axis differ."""
    amounts = {
        "batch": case.batch, "positions": math.prod(case.size), "taps": math.prod(case.kernel),
        "C*O": case.in_channels * case.out_channels,
    }  # fmt: skip
    return amounts[axis]


def slope(amounts: Sequence[float], times: Sequence[float | None]) -> float | None:
    """The slope of log time against log amount, by least squares, where calls take at least a millisecond."""
    points = [(math.log(a), math.log(t)) for a, t in zip(amounts, times, strict=True) if t is not None and t >= LEAST]
    if len(points) < 2:
        return None
    x, y = np.transpose(points)
    return float(np.polyfit(x, y, 1)[0])


def scaling(plan: Plan, progress: Progress) -> Rows:
    """How time grows with the work, and shrinks with a second thread."""
    scales = {axis: cases[:: len(cases) - 1] if plan.quick else cases for axis, cases in SCALES.items()}
    rows = []
    progress.begin((len(scales) + len(plan.cases)) * len(plan.directions))
    with processes([Truth.name, *["deformconv"] * max(map(len, scales.values()))], plan.threads) as (truth, *ours):
        for (axis, cases), direction in product(scales.items(), plan.directions):
            progress.step(f"scaling, {axis}, {direction}")
            entries = {str(_amount(case, axis)): Entry(process, case) for case, process in zip(cases, ours, strict=False)}
            rows.append({"axis": axis, "direction": direction, "results": compare(entries, direction, truth, plan.pace)})
    alone, paired = processes(["deformconv"], 1), processes(["deformconv"], 2)
    with processes([Truth.name], plan.threads) as (truth,), alone as (one,), paired as (two,):
        for case, direction in product(plan.cases, plan.directions):
            progress.step(f"threads, {case.name}, {direction}")
            entries = {"1": Entry(one, case), "2": Entry(two, case)}
            rows.append(_row(case, direction, compare(entries, direction, truth, plan.pace)))
    return rows


def write_scaling(rows: Sequence[Row]) -> str:
    slopes, threads = [], []
    for row in rows:
        if "axis" in row:
            amounts = list(row["results"])
            times = [_value(row, amount) for amount in amounts]
            cells = ", ".join(f"{amount}: {_cell(row, amount)}" for amount in amounts)
            slopes.append([row["axis"], row["direction"], cells, digits(slope([float(a) for a in amounts], times))])
        else:
            one, two = _value(row, "1"), _value(row, "2")
            threads.append([_name(row), row["direction"], _cell(row, "1"), _cell(row, "2"), _over(one, two)])
    return "\n\n".join(
        [
            markdown(["work", "direction", "milliseconds", "slope"], slopes, 3),
            markdown(["case", "direction", "1 thread, ms", "2 threads, ms", "faster"], threads, 2),
        ]
    )


# Memory


def memory(plan: Plan, progress: Progress) -> Rows:
    """The peak memory of forward and backward, each in a fresh process."""
    largest = named("primes") if plan.quick else named("c256-100")
    growing = [] if plan.quick else [named("c256-56")._replace(name=f"batch {n}", batch=n) for n in (1, 2, 4, 8)]
    cases = [largest, *growing]
    libraries = [name for name in plan.libraries if name in ("deformconv", "torchvision")]
    rows = []
    progress.begin(len(cases) * len(libraries))
    direction = DIRECTIONS[-1]
    for case in cases:
        # The output and the gradients are as large as what `make` makes.
        exist = sum(array.nbytes for array in make(case)[1].values() if array is not None)
        results: dict[str, Any] = {}
        for library in libraries:
            progress.step(f"memory, {case.name}, {library}")
            with processes([library], plan.threads) as (process,):
                results[library] = _peak(process, case, direction)
        rows.append(_row(case, direction, results) | {"must exist": exist})
    return rows


def _peak(process: Any, case: Case, direction: str) -> dict[str, Any]:
    reason = PEERS[process.library].reason_against(case, direction)
    if reason:
        return {"reason": reason}
    try:
        # Code that is loaded at the first call is no part of what later calls need.
        process.ask("prepare", case=named("c128-28")._replace(size=(7, 7))._asdict())
        process.ask("time", direction=direction, calls=2)
        process.ask("prepare", case=case._asdict())
        return {"bytes": process.ask("peak", direction=direction)}
    except Failure as failure:
        return {"reason": f"failed: {failure}"}


def write_memory(rows: Sequence[Row]) -> str:
    def size(value: float | None) -> str:
        return "-" if value is None else digits(value / MEGABYTE)

    lines = []
    for row in rows:
        peaks = [row["results"].get(name, {}).get("bytes") for name in ("deformconv", "torchvision")]
        beyond = None if peaks[0] is None else max(0, peaks[0] - row["must exist"])
        ratio = None if None in peaks else peaks[0] / peaks[1]
        case = case_of(row["layer"])
        lines.append([case.name, layer(case), size(row["must exist"]), *map(size, (*peaks, beyond)), digits(ratio)])
    head = ["case", "layer", "output and gradients", "ours", "torchvision", "ours beyond them", "ours / torchvision"]
    return "Peak extra memory of forward and backward, in MiB\n\n" + markdown(head, lines, 2)


# The first call


def start(plan: Plan, progress: Progress) -> Rows:
    """What the first forward and backward of a process costs, with and without machine code on disk."""
    progress.begin(1 if plan.quick else 3)
    return startup.measure(progress.step, warm=3 if plan.quick else 7, cold=not plan.quick)


REPORTS = {
    "offsets": Report("Offsets of three kinds", offsets, write_offsets),
    "small": Report("Small calls, all five tensors", small, write_small),
    "scaling": Report("Scaling", scaling, write_scaling),
    "memory": Report("Memory", memory, write_memory),
    "startup": Report("The first call, 2-D float32 forward and backward", start, startup.write),
}
