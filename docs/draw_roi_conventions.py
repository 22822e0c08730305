"""Draw docs/images/roi_conventions.png: where the first bin of a box has its samples, by the three conventions.

Run from anywhere: python docs/draw_roi_conventions.py [output.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from deformconv.ops.operator import Operand
from deformconv.ops.roi_pool.bins import sample_at, sides
from deformconv.ops.roi_pool.spec import CONVENTIONS, roi_spec

SIZE = (6, 9)  # of the map, of stride 16
BOX = (28.0, 20.0, 108.0, 70.0)
BINS, SAMPLES = 3, 2
COLOUR = "#c1440e"


def draw(axes: Axes, convention: str) -> None:
    spec = roi_spec(
        Operand((1, 1, *SIZE), "float64"), Operand((1, 5), "float64"), output_size=BINS, spatial_scale=1 / 16,
        sampling_ratio=SAMPLES, convention=convention,
    )  # fmt: skip
    down, across = sides(spec, BOX)
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="white", edgecolor="0.85"))
            axes.plot(x, y, ".", color="0.6", markersize=3)
    for i in range(BINS):
        for j in range(BINS):
            corner = (across.start + j * across.bin, down.start + i * down.bin)
            first = i == j == 0
            face = (*matplotlib.colors.to_rgb(COLOUR), 0.18) if first else "none"
            axes.add_patch(Rectangle(corner, across.bin, down.bin, facecolor=face, edgecolor=COLOUR, linewidth=1.2))
    places = [
        (sample_at(spec, across, 0, j, 0.0), sample_at(spec, down, 0, i, 0.0)) for i in range(SAMPLES) for j in range(SAMPLES)
    ]
    axes.plot(*zip(*places, strict=True), "x", color="black", markersize=7, markeredgewidth=1.8)
    axes.set_title(f'"{convention}"', fontsize=11)
    axes.set_xlim(-0.7, SIZE[1] - 0.3)
    axes.set_ylim(SIZE[0] - 0.3, -0.7)
    axes.set_aspect("equal")
    axes.set_xticks(range(SIZE[1]))
    axes.set_yticks(range(SIZE[0]))
    axes.tick_params(length=0, labelsize=8, colors="0.4")
    for spine in axes.spines.values():
        spine.set_visible(False)


def main(output: Path) -> None:
    figure, panels = plt.subplots(1, len(CONVENTIONS), figsize=(12, 3.3))
    for axes, convention in zip(panels, CONVENTIONS, strict=True):
        draw(axes, convention)
    figure.text(
        0.5, 0.02,
        f"The box ({', '.join(f'{number:g}' for number in BOX)}) of an image over its feature map of stride 16, dots at "
        f"the centres of the map's pixels, {BINS}x{BINS} bins; crosses: the samples of the first bin.",
        ha="center", fontsize=9, color="0.25",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "roi_conventions.png")
