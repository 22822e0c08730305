"""What else is worth measuring: whole nets, other operators, kinds of offsets, small calls, scaling, memory, the first call.

Every report measures rows, which JSON keeps, and makes Markdown of rows alone.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from statistics import geometric_mean
from typing import Any, NamedTuple

import numpy as np

from deformconv.bench import aggregate as aggregates
from deformconv.bench import attention as attentions
from deformconv.bench import jax_rows, startup
from deformconv.bench.cases import Case, case_of, make, named
from deformconv.bench.figures import OURS, Row, digits, layer, markdown, ratio
from deformconv.bench.half import HALF_CASES, HALF_PEERS
from deformconv.bench.measure import Entry, Failure, Pace, Progress, compare, peer_of, processes
from deformconv.bench.nets import NET_PEERS, NETS, DeformconvNet, Net, TruthNet, net_of
from deformconv.bench.peers import DIRECTIONS, PEERS, RECORDED, Peer, Truth, missing
from deformconv.bench.rois import ROI_CASES, ROI_PEERS, roi_case_of

__all__ = ["REPORTS", "THEIRS", "NetMean", "Plan", "Report", "net_means", "slope"]

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
    nets: Sequence[Net] = NETS
    named: Sequence[str] = ()  # cases, nets and other operators' cases that alone are wanted; none if all are


class Report(NamedTuple):
    """How one report is measured, and how its rows are written."""

    title: str
    measure: Callable[[Plan, Progress], Rows]
    write: Callable[[Sequence[Row]], str]
    packages: tuple[str, ...] = ()  # without which it measures nothing
    extra: str | None = None  # of ours, which brings these alone; None for `bench`, which brings them with all others
    has_cases: bool = True  # some of which --case names


# Whole nets


def nets(plan: Plan, progress: Progress) -> Rows:
    """Nets with each library's deformable layers, beside the same nets of plain convolutions."""
    peers = [peer for name, peer in NET_PEERS.items() if name.removesuffix("-net") in plan.libraries]
    peers = [peer for peer in peers if not missing(peer.packages)]
    busy = [] if plan.quick else [net for net in plan.nets if max(net.size) <= LARGEST_BUSY]
    rows = []
    progress.begin((len(plan.nets) + len(busy)) * len(plan.directions))
    with processes([TruthNet.name, *(peer.name for peer in peers)], plan.threads) as (truth, *others):
        for net, direction in product(plan.nets, plan.directions):
            progress.step(f"{net.name}, {direction}")
            rows.append(_net_row(net, direction, "idle", compare(_entries(others, net), direction, truth, plan.pace)))
        others = [process for process in others if process.library in ("deformconv-net", "dense-net")]
        with _busy() if busy else nullcontext():
            for net, direction in product(busy, plan.directions):
                progress.step(f"{net.name}, {direction}, beside a busy process")
                rows.append(_net_row(net, direction, "busy", compare(_entries(others, net), direction, truth, plan.pace)))
    return rows


LARGEST_BUSY = 224  # pixels a side: with larger images a plain net's threads wait for one another for minutes


def _entries(others: Sequence[Any], net: Net) -> dict[str, Entry]:
    return {process.library.removesuffix("-net"): Entry(process, net) for process in others}


def _net_row(net: Net, direction: str, machine: str, results: dict[str, Any]) -> dict[str, Any]:
    return {"net": net._asdict(), "direction": direction, "machine": machine, "results": results}


@contextmanager
def _busy() -> Iterator[None]:
    """Another process computes on one processor meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


class NetMean(NamedTuple):
    """How many times a net of plain convolutions takes: the geometric mean over nets, and the most."""

    direction: str
    machine: str
    mean: float
    most: tuple[float, str]
    nets: int


def net_means(rows: Sequence[Row]) -> list[NetMean]:
    found = []
    for machine, direction in product(("idle", "busy"), DIRECTIONS):
        chosen = [row for row in rows if (row["machine"], row["direction"]) == (machine, direction)]
        values = [(ratio(row, OURS, ("dense",)), row["net"]["name"]) for row in chosen]
        ratios = [(value, name) for value, name in values if value is not None]
        if ratios:
            mean = geometric_mean(value for value, _ in ratios)
            found.append(NetMean(direction, machine, mean, max(ratios), len(ratios)))
    return found


def write_nets(rows: Sequence[Row]) -> str:
    parts = []
    for machine, title in (("idle", ""), ("busy", "Beside a process that keeps one processor busy")):
        chosen = [row for row in rows if row["machine"] == machine]
        if not chosen:
            continue
        names = [name for name in PEERS if any(name in row["results"] for row in chosen)]
        lines = []
        for row in chosen:
            net = net_of(row["net"])
            ratios = [digits(ratio(row, *pair)) for pair in ((OURS, ("dense",)), (("torchvision",), OURS))]
            lines.append([net.name, net.what, net.shape, row["direction"], *(_cell(row, name) for name in names), *ratios])
        titles = ["plain net" if name == "dense" else PEERS[name].title for name in names]
        head = ["net", "what", "images", "direction", *titles, "ours / plain", "torchvision / ours"]
        parts += [title, markdown(head, lines, 4)]
    means = [
        [found.direction, found.machine, digits(found.mean), f"{digits(found.most[0])} ({found.most[1]})", str(found.nets)]
        for found in net_means(rows)
    ]
    means_head = ["direction", "the machine else", "ours / plain, geometric mean", "most", "nets"]
    return "\n\n".join(part for part in [*parts, markdown(means_head, means, 2) if means else ""] if part)


# Other operators than convolution


class Other(NamedTuple):
    """Another operator than convolution: whose report it is, what is measured, and by whom."""

    word: str  # the report's name
    title: str
    cases: Sequence[Any]
    peers: Mapping[str, type[Peer]]
    read: Callable[[dict[str, Any]], Any]  # a case from its fields
    small: Any = None  # a case after which all code is loaded, if what training takes of memory is measured as well

    @property
    def others(self) -> dict[str, str]:
        """The titles of the other libraries, by their label."""
        titles = {name.rpartition("-")[0]: peer.title for name, peer in self.peers.items()}
        return {label: title for label, title in titles.items() if label not in ("deformconv", "truth")}

    def of(self, library: str) -> str:
        """The name of a library's peer."""
        return next(name for name in self.peers if name.rpartition("-")[0] == library)

    def chosen(self, plan: Plan) -> dict[str, str]:
        """The peers' names by their labels; a library that has no convolution is always among them."""
        labels = {name.rpartition("-")[0]: name for name, peer in self.peers.items() if not missing(peer.packages)}
        return {label: name for label, name in labels.items() if label in plan.libraries or label not in (*PEERS, "truth")}

    def absent(self) -> dict[str, str]:
        """What pip would install, by the titles of the libraries that have no convolution and are not installed."""
        peers = {label: self.peers[self.of(label)] for label in self.others if label not in PEERS}
        lacking = {label: missing(peer.packages) for label, peer in peers.items()}
        return {peers[label].title: peers[label].installs or " ".join(names) for label, names in lacking.items() if names}

    def wanted(self, plan: Plan) -> Sequence[Any]:
        """The cases that are to be measured."""
        cases = [case for case in self.cases if not plan.named or case.name in plan.named]
        return cases[:1] if plan.quick else cases


OTHERS = (
    Other("rois", "Pooling of boxes", ROI_CASES, ROI_PEERS, roi_case_of),
    Other(
        "attention", "Multi-scale deformable attention", attentions.ATTENTION_CASES, attentions.ATTENTION_PEERS,
        attentions.attention_case_of, attentions.TINY,
    ),
    Other(
        "aggregate", "Aggregation, as in DCNv3 and DCNv4", aggregates.AGGREGATE_CASES, aggregates.AGGREGATE_PEERS,
        aggregates.aggregate_case_of, aggregates.TINY,
    ),
)  # fmt: skip
THEIRS = frozenset(label for other in OTHERS for label in other.others) | jax_rows.PLAIN


def operator(other: Other, plan: Plan, progress: Progress) -> Rows:
    """Each case beside other libraries; the first with one thread beside two; and what training takes of memory."""
    word, cases, peers = other.word, other.wanted(plan), other.chosen(plan)
    truths, ours, rows = [other.of("truth")], [other.of("deformconv")], []
    progress.begin((len(cases) + 1) * len(plan.directions) + len(cases) * len(peers) * (other.small is not None))
    with processes([*truths, *peers.values()], plan.threads) as (truth, *others):
        for case, direction in product(cases, plan.directions):
            progress.step(f"{word}, {case.name}, {direction}")
            entries = {label: Entry(process, case) for label, process in zip(peers, others, strict=True)}
            results = compare(entries, direction, truth, plan.pace)
            rows.append({word: case._asdict(), "direction": direction, "results": results})
    with processes(truths, plan.threads) as (truth,), processes(ours, 1) as (one,), processes(ours, 2) as (two,):
        for direction in plan.directions:
            progress.step(f"{word}, threads, {direction}")
            entries = {"1": Entry(one, cases[0]), "2": Entry(two, cases[0])}
            results = compare(entries, direction, truth, plan.pace)
            rows.append({word: cases[0]._asdict(), "direction": direction, "results": results})
    for case in () if other.small is None else cases:
        results = {}
        for label, name in peers.items():
            progress.step(f"{word}, {case.name}, memory, {label}")
            with processes([name], plan.threads) as (process,):
                results[label] = _peak(process, other.small, case, DIRECTIONS[-1])
        rows.append({word: case._asdict(), "direction": DIRECTIONS[-1], "results": results})
    return rows


def write_operator(other: Other, rows: Sequence[Row]) -> str:
    """The tables of an operator."""
    beside, threads, peaks = [], [], []
    others = {name: title for name, title in other.others.items() if any(name in row["results"] for row in rows)}
    names = ("deformconv", *others)
    for row in rows:
        case = other.read(row[other.word])
        if "1" in row["results"]:
            one, two = _value(row, "1"), _value(row, "2")
            threads.append([case.name, row["direction"], _cell(row, "1"), _cell(row, "2"), _over(one, two)])
        elif any("bytes" in result for result in row["results"].values()):
            sizes = [row["results"].get(name, {}).get("bytes") for name in names]
            cells = ["-" if size is None else digits(size / MEGABYTE) for size in sizes]
            peaks.append([case.name, case.what, *cells, *(_over(sizes[0], size) for size in sizes[1:])])
        else:
            ours, *theirs = (_value(row, name) for name in names)
            ratios = [_over(value, ours) for value in theirs]
            beside.append([case.name, case.what, row["direction"], *(_cell(row, name) for name in names), *ratios])
    titles = ("deformconv", *others.values())
    head = ["case", "what", "direction", *titles, *(f"{name} / ours" for name in others)]
    threads_head = ["case", "direction", "1 thread, ms", "2 threads, ms", "faster"]
    parts = [markdown(head, beside, 3), markdown(threads_head, threads, 2)]
    if peaks:
        peaks_head = ["case", "what", *titles, *(f"ours / {name}" for name in others)]
        parts += ["Peak extra memory of forward and backward, in MiB", markdown(peaks_head, peaks, 2)]
    return "\n\n".join(parts)


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


# Half precision

SLOW = 3  # times as long as in float32: PyTorch has no kernel that is made for it
SLOW_NOTE = (
    "PyTorch's plain convolution takes many times as long in bfloat16 as in float32 on this processor, for which it has no "
    "kernel in bfloat16: the last column says nothing of deformconv."
)
HALF = ("deformconv-float32", "deformconv-bfloat16", "deformconv-float16", "dense-float32", "dense-bfloat16")


def half(plan: Plan, progress: Progress) -> Rows:
    """Some of the cases in half precision and in float32, beside a plain convolution.

    A row says whether this machine multiplies pairs of bfloat16.
    """
    from deformconv.ops.conv.cpu_plan import words  # which loads Numba

    pairs = words() is not None
    asked = {case.name for case in plan.cases}
    cases = [case for case in HALF_CASES if case.name in asked]
    libraries = [name for name in HALF if name.partition("-")[0] in plan.libraries]
    rows = []
    progress.begin(len(cases) * len(plan.directions))
    with processes(["truth-half", *libraries], plan.threads) as (truth, *others):
        for case, direction in product(cases, plan.directions):
            progress.step(f"half precision, {case.name}, {direction}")
            entries = {process.library: Entry(process, case) for process in others}
            rows.append(_row(case, direction, compare(entries, direction, truth, plan.pace)) | {"pairs": pairs})
    return rows


def write_half(rows: Sequence[Row]) -> str:
    ratios = {
        "bfloat16 / float32": ("deformconv-bfloat16", "deformconv-float32"),
        "float16 / float32": ("deformconv-float16", "deformconv-float32"),
        "bfloat16 / plain bfloat16": ("deformconv-bfloat16", "dense-bfloat16"),
    }
    lines = []
    for row in rows:
        values = [_over(*(_value(row, name) for name in pair)) for pair in ratios.values()]
        lines.append([_name(row), row["direction"], *(_cell(row, name) for name in HALF), *values])
    table = markdown(["case", "direction", *(HALF_PEERS[name].title for name in HALF), *ratios], lines, 2)
    pairs = [(_value(row, "dense-bfloat16"), _value(row, "dense-float32")) for row in rows]
    slow = any(brain > SLOW * single for brain, single in pairs if brain is not None and single is not None)
    return f"{table}\n\n{SLOW_NOTE}" if slow else table


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
                results[library] = _peak(process, named("c128-28")._replace(size=(7, 7)), case, direction)
        rows.append(_row(case, direction, results) | {"must exist": exist})
    return rows


def _peak(process: Any, small: Any, case: Any, direction: str) -> dict[str, Any]:
    """The bytes of one call, after calls of a small case."""
    reason = peer_of(process.library).reason_against(case, direction)
    if reason:
        return {"reason": reason}
    try:
        # Code that is loaded at the first call is no part of what later calls need.
        process.ask("prepare", case=small._asdict())
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


# Other front ends


def in_jax(plan: Plan, progress: Progress) -> Rows:
    """The operator on JAX's arrays, beside XLA's own convolution and NumPy's front end."""
    return jax_rows.measure_operator(plan.threads, plan.pace, progress)


def in_keras(plan: Plan, progress: Progress) -> Rows:
    """A net of Keras' layers, on each backend that is there, beside the same net of plain ones."""
    return jax_rows.measure_keras(plan.threads, plan.pace, progress)


REPORTS = {
    "net": Report("Whole nets, milliseconds", nets, write_nets, DeformconvNet.packages),
    **{
        other.word: Report(f"{other.title}, milliseconds", partial(operator, other), partial(write_operator, other))
        for other in OTHERS
    },
    "offsets": Report("Offsets of three kinds", offsets, write_offsets),
    "half": Report("Half precision, milliseconds", half, write_half),
    "small": Report("Small calls, all five tensors", small, write_small),
    "scaling": Report("Scaling", scaling, write_scaling),
    "memory": Report("Memory", memory, write_memory),
    "startup": Report("The first call, 2-D float32 forward and backward", start, startup.write),
    "jax": Report("In JAX, 2x64x56x56 -> 64", in_jax, jax_rows.operator_table, ("jax",), "jax", has_cases=False),
    "keras": Report(
        "In Keras, two layers with their predictors", in_keras, jax_rows.keras_table, ("keras",), "keras", has_cases=False
    ),
}
