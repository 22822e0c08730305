"""The statistics of layers' offsets, drawn: a row for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from deformconv.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from deformconv.plots.fields import LayerOffsets, OffsetStatistics

__all__ = ["draw_offset_statistics"]


def draw_offset_statistics(figure: FigureBase, view: OffsetStatistics) -> tuple[Axes, ...]:
    """Draw a row for each layer: how large offsets are, how many samples lie outside of the map, and the masks' histogram.

    Lengths are in image pixels where these are known of every layer, else in the layer's input pixels. A figure for n layers
    looks well with a width of 9 and a height of 1.6 + 0.35*n inches and `layout="constrained"`.

    Args:
        figure: a matplotlib Figure or SubFigure.
        view: what `offset_statistics` returns, of any rank.

    Returns:
        The axes: offsets, share outside, and masks if any layer has some.

    Raises:
        TypeError: it is no figure.
        ValueError: there is no layer.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from deformconv.plots import draw_offset_statistics, offset_statistics, record
        >>> from deformconv.torch import DeformConv2d
        >>> image, net = torch.rand(1, 3, 32, 48), DeformConv2d(3, 8, 3, padding=1)
        >>> with record(net) as trace:
        ...     _ = net(image)
        >>> figure = Figure(figsize=(9, 2), layout="constrained")
        >>> lengths, outside, masks = draw_offset_statistics(figure, offset_statistics(trace))
        >>> lengths.get_xlabel()
        'offsets [image pixels]'
    """
    if not hasattr(figure, "subplots"):
        raise TypeError(f"`figure` is of type {type(figure).__name__}; expected a matplotlib Figure or SubFigure.")
    rows = view.rows
    if not rows:
        raise ValueError("`view` has no rows: no deformable layer was recorded.")
    masked = any(row.mask_histogram is not None for row in rows)
    panels = figure.subplots(1, 2 + masked, sharey=True, squeeze=False, width_ratios=[3, 2, 2][: 2 + masked])[0]
    _draw_lengths(panels[0], rows)
    _draw_outside(panels[1], rows)
    if masked:
        _draw_masks(panels[2], rows)
    names = [(row.layer or "(the model)") + (f", call {row.index}" if row.index else "") for row in rows]
    panels[0].set_yticks(range(len(rows)), names)
    for axes in panels:
        axes.tick_params(labelsize=style.SMALL, left=False)
        axes.grid(color="0.92", axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_ylim(len(rows) - 0.5, -0.6)  # the first layer above
        handles, _ = axes.get_legend_handles_labels()
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), frameon=False, fontsize=style.SMALL, borderaxespad=0.3,
            handletextpad=0.4, columnspacing=1.2,
        )  # fmt: skip
    return tuple(panels)


def _draw_lengths(axes: Axes, rows: Sequence[LayerOffsets]) -> None:
    """Draw the offsets' deviation as bars, and the length of their mean and the largest as marks."""
    in_image = all(row.mean_image is not None for row in rows)
    values = [
        (row.deviation_image, row.largest_image, row.mean_image) if in_image else (row.deviation, row.largest, row.mean)
        for row in rows
    ]
    deviations, largest, means = zip(*values, strict=True)
    y = np.arange(len(rows))
    axes.hlines(y, 0, largest, color="0.75", linewidth=1)
    axes.barh(y, deviations, 0.45, color=style.SKY, label="deviation")
    axes.plot(np.hypot.reduce(np.abs(means), axis=1), y, "D", color=style.VERMILLION, markersize=4.5, label="mean")
    axes.plot(largest, y, "o", color=style.BLUE, markersize=4.5, label="largest")
    axes.set_xlabel(f"offsets [{'image' if in_image else 'input'} pixels]", fontsize=style.SMALL)
    axes.set_xlim(0, 1.05 * max(max(largest), 1e-6))


def _draw_outside(axes: Axes, rows: Sequence[LayerOffsets]) -> None:
    """Draw the share of samples outside of the map, with offsets and without."""
    y = np.arange(len(rows))
    shares = [(100 * row.outside_regular, 100 * row.outside) for row in rows]
    axes.hlines(y, *zip(*shares, strict=True), color="0.75", linewidth=1)
    axes.plot([share for share, _ in shares], y, "P", color="0.45", markersize=5.5, label="without offsets")
    axes.plot([share for _, share in shares], y, "o", color=style.BLUE, markersize=5, label="with them")
    axes.set_xlabel("samples outside of the map [%]", fontsize=style.SMALL)
    axes.set_xlim(0, 1.1 * max(1.0, *(max(pair) for pair in shares)))


def _draw_masks(axes: Axes, rows: Sequence[LayerOffsets]) -> None:
    """Draw each layer's histogram of masks on its row, and their mean."""
    labelled = False
    for y, row in enumerate(rows):
        if row.mask_histogram is None or row.mask_mean is None:
            axes.text(0.02, y, "no mask", fontsize=style.SMALL, va="center", color="0.4", transform=axes.get_yaxis_transform())
            continue
        counts, edges = (np.asarray(values, np.float64) for values in row.mask_histogram)
        height = 0.75 * counts / max(counts.max(), 1)
        axes.stairs(y + 0.35 - height, edges, baseline=y + 0.35, fill=True, color=style.GREEN, alpha=0.75)
        mean = [row.mask_mean, row.mask_mean]
        axes.plot(mean, [y + 0.35, y - 0.4], color=style.VERMILLION, linewidth=1.5, label=None if labelled else "mean")
        labelled = True
    axes.set_xlabel("masks", fontsize=style.SMALL)
