"""Ratios, geometric means and tables, from measured rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import geometric_mean
from typing import Any, NamedTuple

from deformconv.bench.cases import Case, case_of
from deformconv.bench.peers import PEERS

__all__ = [
    "GOALS", "INFERENCE", "OURS", "Goal", "Mean", "digits", "goals", "layer", "markdown", "mean_of", "milliseconds", "notes",
    "ratio", "speed_table", "summary", "time",
]  # fmt: skip

Row = Mapping[str, Any]
OURS = ("deformconv",)
INFERENCE = ("onnxruntime", "openvino")


def milliseconds(row: Row, *libraries: str) -> float | None:
    """The time of the fastest of some libraries; None if none of them has one."""
    times = [row["results"].get(name, {}).get("milliseconds") for name in libraries]
    return min((time for time in times if time is not None), default=None)


def ratio(row: Row, over: Sequence[str], under: Sequence[str]) -> float | None:
    """The fastest time of some libraries over that of others; None if one of them is missing."""
    a, b = milliseconds(row, *over), milliseconds(row, *under)
    return None if a is None or b is None else a / b


class Goal(NamedTuple):
    """A mean that matters: over which cases, and of the ratio of which times."""

    what: str
    direction: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    counts: Callable[[Case], bool]


GOALS = (
    Goal("faster than the faster of ONNX Runtime and OpenVINO", "forward", INFERENCE, OURS, lambda case: True),
    Goal("faster than torchvision", "forward", ("torchvision",), OURS, lambda case: True),
    Goal("times a plain convolution, where C >= 128 and groups = 1", "forward", OURS, ("dense",),
         lambda case: case.in_channels >= 128 and case.groups == 1),
    Goal("faster than torchvision", "forward+backward", ("torchvision",), OURS, lambda case: True),
    Goal("times a plain convolution, where 2-D and groups = 1", "forward+backward", OURS, ("dense",),
         lambda case: case.rank == 2 and case.groups == 1),
)  # fmt: skip


class Mean(NamedTuple):
    """A goal's geometric mean, and the least and the greatest ratio with their cases."""

    goal: Goal
    mean: float
    least: tuple[float, str]
    most: tuple[float, str]
    cases: int


def goals(rows: Iterable[Row]) -> list[Mean]:
    """The mean of each goal that has a case."""
    rows = list(rows)
    return [found for goal in GOALS if (found := mean_of(goal, rows)) is not None]


def mean_of(goal: Goal, rows: Iterable[Row]) -> Mean | None:
    """A goal's mean; None if it has no case."""
    ratios = []
    for row in rows:
        case = case_of(row["layer"])
        value = ratio(row, goal.over, goal.under)
        if row["direction"] == goal.direction and goal.counts(case) and value is not None:
            ratios.append((value, case.name))
    return Mean(goal, geometric_mean(v for v, _ in ratios), min(ratios), max(ratios), len(ratios)) if ratios else None


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that can be read as it is; its first `left` columns are flush left."""
    body = [list(head), *map(list, lines)]
    widths = [max(3, *(len(line[i]) for line in body)) for i in range(len(head))]

    def written(line: Sequence[str]) -> str:
        cells = (text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True)))
        return f"| {' | '.join(cells)} |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([written(body[0]), written(rule), *map(written, body[1:])])


def digits(value: float | None, unit: str = "") -> str:
    """Three digits of a number."""
    if value is None:
        return "-"
    places = 3 if value < 0.9995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{places}f}{unit}"


def layer(case: Case) -> str:
    return f"{case.shape}, {case.details}" if case.details else case.shape


def time(row: Row, *libraries: str) -> str:
    """The time of the fastest of some libraries, or in a word why there is none; a star stands for a footnote."""
    found = milliseconds(row, *libraries)
    results = [row["results"][name] for name in libraries if name in row["results"]]
    if found is not None:
        return digits(found) + "*" * any(result.get("as 2-D", False) for result in results)
    reasons = [result.get("reason", "") for result in results]
    return next((word for word in ("differs", "failed") for reason in reasons if reason.startswith(word)), "-")


def speed_table(rows: Sequence[Row], direction: str) -> str:
    """One direction's times in milliseconds, and ratios of them."""
    chosen = [row for row in rows if row["direction"] == direction]
    able = {
        name for row in chosen for name, result in row["results"].items() if result.get("reason") != PEERS[name].no_gradients
    }
    names = [name for name in PEERS if name in able]
    ratios: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    if able & {*INFERENCE}:
        ratios.append(("inference's best / ours", INFERENCE, OURS))
    if "ncnn" in able:
        ratios.append(("ncnn / ours", ("ncnn",), OURS))
    if "torchvision" in able:
        ratios.append(("torchvision / ours", ("torchvision",), OURS))
    if "dense" in able:
        ratios.append(("ours / plain", OURS, ("dense",)))
    lines = []
    for row in chosen:
        case = case_of(row["layer"])
        values = [digits(ratio(row, over, under)) for _, over, under in ratios]
        lines.append([case.name, layer(case), *(time(row, name) for name in names), *values])
    return markdown(["case", "layer", *(PEERS[name].title for name in names), *(title for title, _, _ in ratios)], lines, 2)


def notes(rows: Sequence[Row]) -> list[str]:
    """What the tables' signs stand for, and why a time is missing."""
    found: dict[str, dict[str, None]] = {}  # with the order kept
    timed: dict[str, None] = {}
    for row in rows:
        name = case_of(row["layer"]).name
        for library, result in row["results"].items():
            title = PEERS[library].title
            if "milliseconds" in result:
                timed[library] = None
            if result.get("as 2-D"):
                found.setdefault("* as 2-D of height 1, with every dy 0", {})[name] = None
            elif "reason" in result and result["reason"] != PEERS[library].no_gradients:
                where = "" if result["reason"].startswith("has") else f", {row['direction']}"
                found.setdefault(f"{title} {result['reason']}{where}", {})[name] = None
    remarks = [f"{PEERS[name].title} {PEERS[name].remark}" for name in timed if PEERS[name].remark]
    return [*(f"{what} ({', '.join(names)})" for what, names in found.items()), *remarks]


def summary(rows: Sequence[Row]) -> str:
    """The goals' means as a table; empty if nothing can be compared."""
    lines = [
        [
            found.goal.direction, found.goal.what, digits(found.mean), *(
                f"{digits(value)} ({name})" for value, name in (found.least, found.most)
            ), str(found.cases),
        ]
        for found in goals(rows)
    ]  # fmt: skip
    return markdown(["direction", "what", "geometric mean", "least", "most", "cases"], lines, 2) if lines else ""
