"""Draw docs/images/offset_order.png, the order of the channels of `offset` and `mask`.

Run from anywhere: python docs/draw_offsets.py [output.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

KERNEL = 3
TAPS = KERNEL * KERNEL
COLOURS = [plt.get_cmap("tab10")(index) for index in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # one per tap, no grey
GREY = (0.55, 0.55, 0.55, 1.0)
SHOWN = 5  # the tap whose offset is drawn


def cell(
    axes: Axes, x: float, y: float, width: float, colour: tuple[float, ...], text: str, below: str = "", alpha: float = 0.3
) -> None:
    """One channel: a box with what it holds, and its number under it."""
    axes.add_patch(Rectangle((x, y), width, 1, facecolor=(*colour[:3], alpha), edgecolor="white", linewidth=1.5))
    axes.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=9)
    axes.text(x + width / 2, y - 0.12, below, ha="center", va="top", fontsize=8, color="0.25")


def bracket(axes: Axes, start: float, end: float, y: float, text: str, colour: tuple[float, ...] = (0, 0, 0, 1)) -> None:
    axes.plot([start, start, end, end], [y, y + 0.18, y + 0.18, y], color=colour, linewidth=1)
    axes.text((start + end) / 2, y + 0.28, text, ha="center", va="bottom", fontsize=8.5, color=colour)


def draw_window(axes: Axes) -> None:
    """The window on the input: taps row by row, and one of them moved."""
    for row in range(KERNEL):
        for column in range(KERNEL):
            tap = KERNEL * row + column
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="none", edgecolor="0.85"))
            axes.scatter(column, row, s=330, color=[(*COLOURS[tap][:3], 0.3)], zorder=2)
            axes.text(column, row, str(tap), ha="center", va="center", fontsize=11, zorder=3)
    row, column = divmod(SHOWN, KERNEL)
    dy, dx = 0.75, 1.3
    arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (column, row + dy), (column, row + 0.16), arrowprops=arrow)
    axes.annotate("", (column + dx, row + dy), (column, row + dy), arrowprops=arrow)
    axes.text(column + 0.1, row + 0.42, f"dy: channel {2 * SHOWN}", va="center", fontsize=9)
    axes.text(column + 0.45, row + dy + 0.1, f"dx: channel {2 * SHOWN + 1}", va="top", fontsize=9)
    axes.scatter(column + dx, row + dy, s=90, color=COLOURS[SHOWN], edgecolors="black", zorder=4)
    axes.text(-0.5, -0.78, "x: width, to the right  →", fontsize=8.5, color="0.35")
    axes.text(-0.82, -0.5, "y: height, down  ↓", fontsize=8.5, color="0.35", rotation=-90, va="top", ha="center")
    axes.set(xlim=(-1.1, 3.9), ylim=(2.7, -1.1), aspect="equal")
    axes.set_title("The window on the input: taps go row by row", fontsize=10.5, loc="left")


def draw_kernel(axes: Axes) -> None:
    """The same taps with their channel numbers."""
    for tap in range(TAPS):
        row, column = divmod(tap, KERNEL)
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=(*COLOURS[tap][:3], 0.3), edgecolor="white", linewidth=2))
        axes.text(column + 0.5, row + 0.22, f"tap {tap}", ha="center", va="center", fontsize=9, weight="bold")
        lines = f"dy {2 * tap}   dx {2 * tap + 1}\nmask {tap}"
        axes.text(column + 0.5, row + 0.62, lines, ha="center", va="center", fontsize=9, linespacing=1.5)
    axes.set(xlim=(0, 3), ylim=(3, 0))
    axes.set_title("Channel numbers, offset group 0: dy 2k, dx 2k + 1, mask k", fontsize=10.5, loc="left")


def draw_order(axes: Axes) -> None:
    """The channels in a row: both groups' offsets, both groups' masks, and what is one number too many."""
    heads = 3.2
    # offset
    axes.text(0, 8.5, "offset", fontsize=11, family="monospace", va="center", weight="bold")
    for channel in range(2 * TAPS):
        tap, axis = divmod(channel, 2)
        cell(axes, heads + channel, 8, 1, COLOURS[tap], ("dy", "dx")[axis], str(channel))
    for tap in range(TAPS):
        axes.plot([heads + 2 * tap + 0.1, heads + 2 * tap + 1.9], [9.06, 9.06], color=COLOURS[tap], linewidth=2)
        axes.text(heads + 2 * tap + 1, 9.18, f"tap {tap}", ha="center", va="bottom", fontsize=8.5)
    bracket(axes, heads + 0.05, heads + 17.95, 10, "offset group 0")
    bracket(axes, heads + 18.25, heads + 23.4, 10, "offset group 1, and so on", GREY)
    for extra, text in enumerate(("dy", "dx", "dy", "dx")):
        cell(axes, heads + 18.2 + extra, 8, 1, GREY, text, str(18 + extra), 0.2)
    axes.text(heads + 22.6, 8.5, "…", fontsize=11, va="center")
    # mask
    axes.text(0, 5.5, "mask", fontsize=11, family="monospace", va="center", weight="bold")
    axes.text(0, 4.9, "(v2 only)", fontsize=8.5, va="center", color="0.35")
    for tap in range(TAPS):
        cell(axes, heads + tap, 5, 1, COLOURS[tap], "m", str(tap))
    for extra in range(4):
        cell(axes, heads + 9.2 + extra, 5, 1, GREY, "m", str(9 + extra), 0.2)
    axes.text(heads + 13.6, 5.5, "…", fontsize=11, va="center")
    axes.text(heads + 15, 5.5, "one number per tap, in the taps' order", fontsize=9, va="center", color="0.25")
    # The mistake.
    axes.text(0, 2.5, "not this", fontsize=10, va="center", weight="bold", color="firebrick")
    axes.add_patch(Rectangle((heads, 2), 15.6, 1, facecolor=(0, 0, 0, 0.08), edgecolor="white"))
    axes.text(heads + 7.8, 2.5, "18 offsets", ha="center", va="center", fontsize=9)
    axes.add_patch(Rectangle((heads + 15.6, 2), 7.8, 1, facecolor=(0.7, 0.13, 0.13, 0.2), edgecolor="firebrick", hatch="//"))
    axes.text(heads + 19.5, 2.5, "9 masks", ha="center", va="center", fontsize=9,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
    axes.text(
        heads, 1.6,
        "27 channels as `offset` of a 3x3 kernel: it takes 2 axes x 9 taps = 18. The 27 channels that a v2 predictor puts out\n"
        "are two arguments, offset = raw[:, :18] and mask = 2*sigmoid(raw[:, 18:]). Also wrong: all dy first and then all dx,\n"
        "or dx before dy. Those have the right number of channels, so no check can find them.",
        fontsize=9, va="top", linespacing=1.45,
    )  # fmt: skip
    axes.set(xlim=(0, 27), ylim=(-0.6, 11.2))


def draw(path: Path) -> None:
    figure = plt.figure(figsize=(10.4, 8.0))
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.15), left=0.02, right=0.99, top=0.95, bottom=0.01, hspace=0.1)
    panels = (grid[0, 0], grid[0, 1], grid[1, :])
    for panel, paint in zip(panels, (draw_window, draw_kernel, draw_order), strict=True):
        axes = figure.add_subplot(panel)
        axes.set_axis_off()
        paint(axes)
    # Without the version of matplotlib, so that another one does not change the file for nothing.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    default = Path(__file__).parent / "images" / "offset_order.png"
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
