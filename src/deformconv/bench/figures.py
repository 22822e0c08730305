"""Ratios, geometric means and tables, from measured rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean
from typing import Any, NamedTuple

from deformconv.bench.cases import Case
from deformconv.bench.peers import PEERS

__all__ = ["GOALS", "Goal", "case_of", "goals", "markdown", "milliseconds", "ratio", "speed_table", "summary"]

Row = dict[str, Any]
INFERENCE = ("onnxruntime", "openvino")


def case_of(row: Row) -> Case:
    layer = {name: tuple(value) if isinstance(value, list) else value for name, value in row["layer"].items()}
    return Case(**layer)


def milliseconds(row: Row, *libraries: str) -> float | None:
    """The time of the fastest of some libraries; None if none of them has one."""
    times = [row["results"].get(name, {}).get("milliseconds") for name in libraries]
    return min((time for time in times if time is not None), default=None)


def ratio(row: Row, over: Sequence[str], under: Sequence[str]) -> float | None:
    a, b = milliseconds(row, *over), milliseconds(row, *under)
    return None if a is None or b is None else a / b


class Goal(NamedTuple):
    """A mean that matters: of which rows, of what over what."""

    name: str
    direction: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    cases: Callable[[Case], bool]


OURS = ("deformconv",)
GOALS = (
    Goal("faster than the faster of ONNX Runtime and OpenVINO", "forward", INFERENCE, OURS, lambda case: True),
    Goal(
        "times a plain convolution, C >= 128 and groups = 1", "forward", OURS, ("dense",),
        lambda case: case.in_channels >= 128 and case.groups == 1,
    ),
    Goal("faster than torchvision", "forward", ("torchvision",), OURS, lambda case: True),
    Goal("faster than torchvision", "forward+backward", ("torchvision",), OURS, lambda case: True),
    Goal(
        "times a plain convolution, 2-D and groups = 1", "forward+backward", OURS, ("dense",),
        lambda case: case.rank == 2 and case.groups == 1,
    ),
)  # fmt: skip


def goals(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Each goal's geometric mean, extremes and number of cases; those without any case are left out."""
    found = []
    rows = list(rows)
    for goal in GOALS:
        ratios = {
            row["case"]: value
            for row in rows
            if row["direction"] == goal.direction and goal.cases(case_of(row))
            if (value := ratio(row, goal.over, goal.under)) is not None
        }
        if ratios:
            found.append(
                {
                    "what": goal.name,
                    "direction": goal.direction,
                    "geometric mean": geometric_mean(ratios.values()),
                    "least": min(ratios.values()),
                    "least in": min(ratios, key=lambda name: ratios[name]),
                    "most": max(ratios.values()),
                    "most in": max(ratios, key=lambda name: ratios[name]),
                    "cases": len(ratios),
                }
            )
    return found


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, aligned so that it can be read as it is; the first `left` columns to the left."""
    body = [list(line) for line in lines]
    widths = [max(3, *(len(line[i]) for line in [list(head), *body])) for i in range(len(head))]

    def written(line: Sequence[str]) -> str:
        cells = (text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True)))
        return f"| {' | '.join(cells)} |"

    rule = "| " + " | ".join("-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([written(head), rule, *map(written, body)])


def _time(row: Row, name: str) -> str:
    value = milliseconds(row, name)
    if value is None:
        reason = row["results"].get(name, {}).get("reason", "")
        return reason.partition(" in ")[0] if reason.startswith("differs") else "failed" if reason.startswith("failed") else "-"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}" + ("*" if row["results"][name].get("as_2d") else "")


def _ratio(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits if value < 10 else 1}f}"


def speed_table(rows: Sequence[Row], direction: str) -> str:
    """One direction's times in milliseconds, and ratios."""
    chosen = [row for row in rows if row["direction"] == direction]
    timed = {name for row in chosen for name, result in row["results"].items() if "no gradients" not in result.get("reason", "")}
    names = [name for name in PEERS if name in timed]
    ratios: list[tuple[str, Sequence[str], Sequence[str]]] = []
    if set(INFERENCE) & timed:
        ratios.append(("faster than inference's best", INFERENCE, OURS))
    if "torchvision" in timed:
        ratios.append(("faster than torchvision", ("torchvision",), OURS))
    if "dense" in timed:
        ratios.append(("times a plain convolution", OURS, ("dense",)))
    if "deformconv" not in timed:
        ratios = []
    lines = []
    for row in chosen:
        case = case_of(row)
        layer = f"{case.shape}, {case.details}" if case.details else case.shape
        times = [_time(row, name) for name in names]
        lines.append([case.name, layer, *times, *(_ratio(ratio(row, over, under)) for _, over, under in ratios)])
    return markdown(["case", "layer", *(PEERS[n].title for n in names), *(title for title, _, _ in ratios)], lines, 2)


def summary(rows: Sequence[Row]) -> str:
    """The goals' means as a table."""
    lines = [
        [
            found["direction"], found["what"], _ratio(found["geometric mean"]),
            f"{_ratio(found['least'])} ({found['least in']})", f"{_ratio(found['most'])} ({found['most in']})",
            str(found["cases"]),
        ]
        for found in goals(rows)
    ]  # fmt: skip
    return markdown(["direction", "what", "geometric mean", "least", "most", "cases"], lines, 2) if lines else ""
