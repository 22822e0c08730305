"""`python -m deformconv.bench.handover`: what handing work over to many threads costs, and what they gain.

Threads that only count, more of them than processors too, show the cost of the hand-over itself; then come the shared counter
that gives out items, how many items the named cases have, and the speed of the first five on 1 to all processors.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from importlib.util import find_spec
from itertools import product
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from deformconv.bench import document
from deformconv.bench.cases import CASES, Case, case_of, named, spec_of
from deformconv.bench.figures import digits, markdown
from deformconv.bench.measure import Entry, Pace, Progress, compare, processes
from deformconv.bench.peers import DIRECTIONS, Truth
from deformconv.bench.readme import replaced
from deformconv.ops.conv import cpu
from deformconv.runtime import threads
from deformconv.runtime.atomics import fetch_add, wait_for
from deformconv.runtime.cache import kernel
from deformconv.runtime.processors import available_processors
from deformconv.runtime.threads import BEGUN, NEXT

__all__ = ["estimates", "items", "measure", "tables", "write"]

RESULTS, EXPLAINED = "benchmarks/handover.json", "docs/performance.md"
MARKS = "<!-- handover:begin -->\n", "\n<!-- handover:end -->"
PENDING = "Not measured yet on an idle machine: `python -m deformconv.bench.handover --write .` fills in this place."

THREADS = (1, 2, 4, 8, 16, 32, 64)
MODELLED = (16, 64)
KINDS = ("own", "openmp")
FEW, ITEM = 256, 4e-6  # items of a call that has some work, and the seconds that one is to take
ADDITIONS = 200_000
FIRST = CASES[:5]
BUSY = 0.3  # of the processors, at the beginning: from here on nothing is written into documents

Figures = Mapping[str, Any]
Call = Callable[[Any, tuple[Any, ...], int, int], None]  # kernel, arguments, items, threads


# What the threads do


@kernel
def count(counter, limit, thread, items, steps, seen):
    """Take items and do nothing in them, or go through `steps` numbers of which each needs the one before."""
    number = np.int64(thread)
    for _ in range(limit):
        if fetch_add(counter, NEXT) >= items:
            break
        for _ in range(steps):
            number = number * 6364136223846793005 + 1442695040888963407
    seen[16 * thread] = number


@kernel
def meet(counter, limit, thread, items):
    """Take one item, and end when every other is taken too."""
    if fetch_add(counter, NEXT) < items:
        fetch_add(counter, BEGUN)
        wait_for(counter, BEGUN, items)


@kernel
def add(counter, limit, thread, items, numbers, apart):
    """Add 1 to a number of one's own many times; two threads' numbers are `apart` numbers from one another."""
    if fetch_add(counter, NEXT) < items:
        fetch_add(counter, BEGUN)
        wait_for(counter, BEGUN, items)
        for _ in range(ADDITIONS):
            fetch_add(numbers, thread * apart)


def _on_own(kernel: Any, arguments: tuple[Any, ...], items: int, number: int) -> None:
    def work(counter: np.ndarray, limit: int, thread: int) -> None:
        kernel(counter, limit, thread, *arguments)

    threads.run(work, items, threads=number, burst=items)


def _on_team() -> Call | None:
    """The same on PyTorch's OpenMP team, as large as need be; None where there is none."""
    if find_spec("torch") is None:
        return None
    import torch

    import deformconv.torch  # noqa: F401  it lends the team
    from deformconv.runtime.launch import run_on_team
    from deformconv.runtime.lenders import LENDERS
    from deformconv.runtime.openmp import Team, runtime_of

    runtime = runtime_of(LENDERS["torch"])
    if isinstance(runtime, str):
        return None

    def run(kernel: Any, arguments: tuple[Any, ...], items: int, number: int) -> None:
        torch.set_num_threads(number)
        team = Team(number, runtime, "PyTorch", started=number)
        run_on_team(kernel, arguments, (), items, threads=number, burst=items, team=team)

    return run


# What is measured


def _seconds(call: Callable[[], None], rounds: int) -> list[float]:
    call()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


def _steps() -> int:
    """The steps of an item that takes about ITEM on this machine."""
    seen, steps = np.zeros(16, np.int64), 100_000
    alone = min(_seconds(lambda: count(threads.counters(), 2, 0, 1, steps, seen), 5))
    return max(1, round(steps * ITEM / alone))


def _handover(kind: str, call: Call, numbers: Sequence[int], rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Microseconds of a call without work, of one with some, and of one that ends when all threads are there."""
    for number in numbers:
        seen = np.zeros(16 * number, np.int64)
        tried = {
            "nothing": partial(call, count, (number, 0, seen), number, number),
            "some": partial(call, count, (FEW, steps, seen), FEW, number),
            "all there": partial(call, meet, (number,), number, number),
        }
        found = {name: [1e6 * second for second in _seconds(one, rounds)] for name, one in tried.items()}
        yield {
            "kind": kind, "threads": number,
            **{name: {"least": min(times), "median": median(times)} for name, times in found.items()},
        }  # fmt: skip


def _counter(numbers: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Nanoseconds of an addition: all threads to one number, each to its own, in one cache line and in lines of their own."""
    for number in numbers:
        seen = np.zeros(16 * number, np.int64)
        line = np.zeros(max(16, number) + 16, np.int64)
        shared = _seconds(lambda: _on_own(count, (ADDITIONS, 0, seen), ADDITIONS, number), rounds)  # noqa: B023
        beside, own = (
            _seconds(lambda: _on_own(add, (number, place, apart), number, number), rounds)  # noqa: B023
            for place, apart in ((line, 1), (seen, 16))
        )
        yield {
            "threads": number,
            "one number": 1e9 * min(shared) / ADDITIONS,
            "side by side": 1e9 * min(beside) / ADDITIONS,
            "apart": 1e9 * min(own) / ADDITIONS,
        }


def items(case: Case, direction: str, number: int) -> list[int]:
    """How many items a call is cut into for a number of threads; backward, those of each of the batch's parts."""
    spec = spec_of(case)
    if direction != DIRECTIONS[0]:
        return [int(plan.share.items) for _, _, plan in cpu._backward_plans(spec, number)]
    tile = _tile(cpu._forward_plan(spec, number).arguments[-1])
    return [spec.batch * ceil(spec.positions / tile)]


def _tile(cut: np.ndarray) -> int:
    from deformconv.ops.conv.cpu_kernels import ForwardCut

    return int(cut[ForwardCut._fields.index("tile")])


def _items() -> Iterator[dict[str, Any]]:
    for case, direction in product(CASES, DIRECTIONS):
        cut = {str(number): items(case, direction, number) for number in MODELLED}
        yield {"case": case.name, "direction": direction, "items": cut}


def _speed(cases: Sequence[Case], most: int, pace: Pace, progress: Progress) -> Iterator[dict[str, Any]]:
    """Each case on 1, 2, 4 ... threads, a process for each number, in alternating blocks of calls."""
    numbers = sorted({number for number in THREADS if number <= most} | {most})
    with processes([Truth.name], most) as (truth,):
        for case, direction in product(cases, DIRECTIONS):
            progress.step(f"{case.name}, {direction}")
            entries, stack = {}, []
            for number in numbers:
                stack.append(processes(["deformconv"], number))
                entries[str(number)] = Entry(stack[-1].__enter__()[0], case)
            try:
                yield {"layer": case._asdict(), "direction": direction, "results": compare(entries, direction, truth, pace)}
            finally:
                for one in stack:
                    one.__exit__(None, None, None)


class _Told(Progress):
    def step(self, what: str) -> None:
        print(what, file=sys.stderr)


def measure(
    numbers: Sequence[int] = THREADS,
    rounds: int = 100,
    cases: Sequence[Case] = FIRST,
    pace: Pace = Pace(7, 0.3),  # noqa: B008  a tuple
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything that the tables are made of. Our own threads come first, while PyTorch is not loaded and none of its spin."""
    progress = progress or Progress()
    load, steps, most = _load(), _steps(), available_processors()
    progress.step("threads that count, of our own")
    handed = list(_handover("own", _on_own, numbers, rounds, steps))
    progress.step("the shared counter")
    counter = list(_counter([number for number in numbers if number <= most], max(3, rounds // 10)))
    if team := _on_team():
        progress.step("threads that count, of an OpenMP team")
        handed += _handover("openmp", team, numbers, rounds, steps)
    return {
        "date": date.today().isoformat(),
        "machine": document.machine(),
        "load": load,
        "item": 1e6 * ITEM,
        "handover": handed,
        "counter": counter,
        "items": list(_items()),
        "speed": list(_speed(cases, most, pace, progress)),
    }


def _load() -> float:
    """How many processors other programs have kept busy in the last minute; 0 where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


# What is said of it


def _bound(parts: Sequence[int], number: int) -> float:
    """How many times as fast `number` threads are at the most with so many equal items, part after part: whole rounds."""
    return sum(parts) / sum(ceil(count / number) for count in parts)


def estimates(figures: Figures) -> list[dict[str, Any]]:
    """The speed-up of the measured cases on more threads than there are, by the model of docs/performance.md.

    A call takes its time on one thread, over what its items allow, and the time until all threads are there besides, as
    measured here: of threads of both kinds, so on more processors it will be less.
    """
    there = {(row["kind"], row["threads"]): row["all there"]["median"] / 1000 for row in figures["handover"]}
    cut = {(row["case"], row["direction"]): row["items"] for row in figures["items"]}
    found = []
    for row, number in product(figures["speed"], MODELLED):
        name, direction = case_of(row["layer"]).name, row["direction"]
        alone = row["results"].get("1", {}).get("milliseconds")
        bound = _bound(cut[name, direction][str(number)], number)
        times = {kind: there.get((kind, number)) for kind in KINDS}
        found.append(
            {
                "case": name, "direction": direction, "threads": number, "bound": bound,
                **{
                    kind: None if alone is None or late is None else alone / (alone / bound + late)
                    for kind, late in times.items()
                },
            }
        )  # fmt: skip
    return found


def tables(figures: Figures) -> str:
    """What docs/performance.md quotes."""
    machine = figures["machine"]
    where = f"{machine['cores']} processors of {machine['processor']}, {figures['date']}, load {figures['load']:.1f} before."
    parts = [
        f"Measured on {where} Microseconds of a call, least and median; an item takes {figures['item']:.0f}:",
        _handover_table(figures),
        "Nanoseconds of an addition: to one number, of all threads together; to numbers of their own, of each thread:",
        _counter_table(figures),
        "Measured, milliseconds:" if figures["speed"] else "",
        _speed_table(figures),
        "Items, and by how much 16 and 64 threads can be faster with so many; with hand-over as measured above, an estimate:",
        _items_table(figures),
    ]
    return "\n\n".join(part for part in parts if part)


def _handover_table(figures: Figures) -> str:
    names = {"own": "own", "openmp": "OpenMP"}
    rows = [
        [
            str(row["threads"]), names[row["kind"]],
            *(f"{digits(row[what][which])}" for what in ("nothing", "some", "all there") for which in ("least", "median")),
        ]
        for row in figures["handover"]
    ]  # fmt: skip
    titles = ("no work", f"{FEW} items", "all threads there")
    return markdown(["threads", "whose", *(f"{t}, {which}" for t in titles for which in ("least", "median"))], rows, 2)


def _counter_table(figures: Figures) -> str:
    whats = ("one number", "side by side", "apart")
    rows = [[str(row["threads"]), *(digits(row[what]) for what in whats)] for row in figures["counter"]]
    return markdown(["threads", "one number for all", "own numbers in one line", "own numbers, 128 bytes apart"], rows)


def _speed_table(figures: Figures) -> str:
    if not figures["speed"]:
        return ""
    numbers = list(figures["speed"][0]["results"])
    rows = []
    for row in figures["speed"]:
        times = [row["results"][number].get("milliseconds") for number in numbers]
        faster = None if None in (times[0], times[-1]) else times[0] / times[-1]
        rows.append([case_of(row["layer"]).name, row["direction"], *map(digits, times), digits(faster)])
    return markdown(["case", "direction", *(f"{number} threads" for number in numbers), "faster"], rows, 2)


def _items_table(figures: Figures) -> str:
    modelled = {(row["case"], row["direction"], row["threads"]): row for row in estimates(figures)}
    rows = []
    for row in figures["items"]:
        cells = []
        for number in MODELLED:
            parts, estimate = row["items"][str(number)], modelled.get((row["case"], row["direction"], number), {})
            cells += ["+".join(map(str, parts)), digits(_bound(parts, number)), *(digits(estimate.get(kind)) for kind in KINDS)]
        rows.append([row["case"], row["direction"], *cells])
    head = [f"{what}, {number}" for number in MODELLED for what in ("items", "at most", "own", "OpenMP")]
    return markdown(["case", "direction", *head], rows, 2)


def write(figures: Figures, folder: Path) -> None:
    """Keep the figures in a repository, and quote them in its document.

    Raises:
        ValueError: the machine was busy when they were measured, or the folder is no repository's.
    """
    processors = figures["machine"]["cores"]
    if figures["load"] > BUSY * processors:
        raise ValueError(
            f"other programs kept {figures['load']:.1f} of {processors} processors busy before this was measured; figures for "
            f"documents need a load below {BUSY * processors:.1f}. Nothing is written: end them, wait a minute, measure again."
        )
    try:
        text = replaced((folder / EXPLAINED).read_text(encoding="utf-8"), tables(figures), MARKS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a repository's folder: {error}") from None
    (folder / EXPLAINED).write_text(text, encoding="utf-8")
    (folder / RESULTS).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deformconv.bench.handover",
        description="What handing work over to many threads costs, and what they gain.",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS, help="numbers of threads that count")
    parser.add_argument("--rounds", type=int, default=100, help="calls of each kind (default: 100)")
    parser.add_argument("--case", nargs="*", default=[case.name for case in FIRST], help="cases whose speed-up is measured")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write them into the repository in this folder")
    options = parser.parse_args()
    known = [case.name for case in CASES]
    if unknown := [name for name in options.case if name not in known]:
        parser.error(f"there is no case {unknown[0]!r}; there are {', '.join(known)}")
    if min(options.threads) < 1 or options.rounds < 1:
        parser.error("--threads and --rounds are at least 1")
    figures = measure(options.threads, options.rounds, [named(name) for name in options.case], progress=_Told())
    print(tables(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.write:
        try:
            write(figures, options.write)
        except ValueError as error:
            parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
