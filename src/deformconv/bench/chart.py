"""A chart of times relative to ours, a line per case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from deformconv.bench.cases import case_of
from deformconv.bench.figures import Row, digits, layer, milliseconds
from deformconv.bench.peers import DIRECTIONS, PEERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["draw", "relative", "save"]

# Told apart by everybody (Okabe and Ito's colours), and by their shapes.
LOOKS = {
    "onnxruntime": ("#0072B2", "o"),
    "openvino": ("#56B4E9", "s"),
    "ncnn": ("#E69F00", "X"),
    "torchvision": ("#D55E00", "D"),
    "kornia": ("#CC79A7", "^"),
    "dense": ("#000000", "|"),
    # On a GPU.
    "dense-channels-last": ("#666666", "|"),
    "deformops": ("#0072B2", "v"),
    "portable": ("#CC79A7", "P"),
}
TITLES = {
    **{name: peer.title for name, peer in PEERS.items()},
    "dense-channels-last": "plain, channels last",
    "deformops": "deformops",
    "portable": "PyTorch's operations",
}
OURS = "#009E73"
MEANS = 0.65  # how much further down than a case
INK, GREY, PALE = "#222222", "#666666", "#dddddd"


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Draw a document's speed into a file whose suffix chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    speed, machine = document["speed"], document["machine"]
    rows = speed["rows"]
    cases = {case_of(row["layer"]).name for row in rows}
    figure = Figure(figsize=(13.0, 1.7 + 0.4 * (len(cases) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    caption = (
        f"{machine['processor']}, {speed['threads']} threads, float32, {speed['date']}. Left of 1x is faster than deformconv. "
        "Medians of alternating blocks of calls, a process for each library; bars: quartiles."
    )
    draw(figure, rows, caption)
    figure.savefig(path, dpi=120)


def draw(figure: Figure | SubFigure, rows: Sequence[Row], caption: str) -> None:
    """Draw both directions side by side, with the geometric means at the bottom."""
    panels = [direction for direction in DIRECTIONS if any(relative([r for r in rows if r["direction"] == direction]))]
    axes = figure.subplots(1, len(panels) or 1, sharey=True, squeeze=False)[0]
    cases = list(dict.fromkeys(case_of(row["layer"]) for row in rows))
    handles: dict[str, Any] = {}
    for panel, direction in zip(axes, panels, strict=False):
        chosen = {case_of(row["layer"]): row for row in rows if row["direction"] == direction}
        _panel(panel, [chosen.get(case) for case in cases], direction, handles)
    height = len(cases)
    labels = [*(f"{case.name}\n" for case in cases), "geometric mean"]
    axes[0].set_yticks([*range(height), height + MEANS], labels, fontweight="bold")
    for y, case in enumerate(cases):
        axes[0].annotate(
            layer(case), (0, y), (-3.5, -7.5), xycoords=axes[0].get_yaxis_transform(), textcoords="offset points", ha="right",
            va="center", fontsize=8, color=GREY, annotation_clip=False,
        )  # fmt: skip
    axes[0].set_ylim(height + 1.35, -0.7)
    names = [name for name in ("deformconv", *LOOKS) if name in handles]
    figure.legend(
        [handles[name] for name in names], [TITLES[name] for name in names],
        loc="outside upper center", ncols=len(names), frameon=False, fontsize=11, handletextpad=0.4, columnspacing=1.8,
    )  # fmt: skip
    figure.supxlabel(caption, fontsize=8.5, color=GREY)


def relative(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """Every other library's time over ours."""
    found = []
    for row in rows:
        ours = milliseconds(row, "deformconv")
        times = [(name, milliseconds(row, name)) for name in LOOKS]
        found += [(name, time / ours) for name, time in times if ours is not None and time is not None]
    return found


def _panel(axes: Axes, rows: Sequence[Row | None], direction: str, handles: dict[str, Any]) -> None:
    values = [value for _, value in relative([row for row in rows if row is not None])]
    right = max([2.0, *values]) * 1.35
    left = min([0.7, *values]) / 1.25
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.axvspan(left, 1, color=OURS, alpha=0.07, linewidth=0)
    axes.annotate(
        "deformconv", (1.01, 1), (0, 2), xycoords="axes fraction", textcoords="offset points", fontsize=8.5, color=OURS,
        fontweight="bold", annotation_clip=False,
    )  # fmt: skip
    handles["deformconv"] = axes.axvline(1, color=OURS, linewidth=2.6, zorder=2)
    for y, row in enumerate(rows):
        axes.axhline(y, color=PALE, linewidth=0.7, zorder=0)
        if row is None:
            continue
        ours = milliseconds(row, "deformconv")
        if ours is None:
            continue
        for name, value in relative([row]):
            colour, marker = LOOKS[name]
            low, high = (quartile / ours for quartile in row["results"][name]["quartiles"])
            axes.plot([low, high], [y, y], color=colour, linewidth=1.2, zorder=3)
            handles[name] = _point(axes, value, y, colour, marker)
        axes.annotate(
            f"{digits(ours)} ms", (1, y), (1.01, y), xycoords="data", textcoords=axes.get_yaxis_transform(), va="center",
            fontsize=8.5, color=INK, annotation_clip=False,
        )  # fmt: skip
    y = len(rows)
    axes.axhline(y - 0.4, color=INK, linewidth=0.8)
    _means(axes, y + MEANS, [row for row in rows if row is not None], log(right / left))
    axes.set_title(f"{direction}, time relative to ours", fontsize=11.5, fontweight="bold", color=INK, loc="left")
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if left <= tick <= right]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color=PALE, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.spines[:].set_visible(False)


def _means(axes: Axes, y: float, rows: Sequence[Row], width: float) -> None:
    """Geometric means with their numbers below the points, or above them, in one line or two, beside a close one."""
    ratios: dict[str, list[float]] = {}
    for name, value in relative(rows):
        ratios.setdefault(name, []).append(value)
    means = sorted((geometric_mean(values), name) for name, values in ratios.items())
    last: dict[int, float] = {}  # the number before, by how many points lines lie above the mean's
    for mean, name in means:
        lines = [line for line in (-8, 8, 18) if line not in last or log(mean / last[line]) > 0.075 * width]
        line = lines[0] if lines else min(last, key=last.__getitem__)
        last[line] = mean
        colour, marker = LOOKS[name]
        _point(axes, mean, y, colour, marker)
        axes.annotate(
            digits(mean), (mean, y), (0, line), textcoords="offset points", ha="center",
            va="top" if line < 0 else "bottom", fontsize=8.5, color=colour, fontweight="bold",
            bbox={"color": "white", "pad": 0.6, "alpha": 0.8},
        )  # fmt: skip


def _point(axes: Axes, x: float, y: float, colour: str, marker: str) -> Any:
    line = marker == "|"
    return axes.plot(
        [x], [y], marker, color=colour, markersize=13 if line else 7.5, markeredgewidth=2 if line else 0.8,
        markeredgecolor=colour if line else "white", linestyle="none", zorder=4,
    )[0]  # fmt: skip
