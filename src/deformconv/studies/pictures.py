"""The demo's pictures: where a trained net samples, and how training went. Figures never open a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import nn

from deformconv.plots import draw_sampling_points, regular_points, sampling_points
from deformconv.studies import digits
from deformconv.studies.digits import Digits, Placement
from deformconv.studies.training import DigitNet, Run, scores
from deformconv.torch import DeformConv2d

__all__ = ["looks", "training_curves"]

# Okabe and Ito's colours, which the colour-blind can tell apart, and markers for print without colour.
STYLES = {"plain": ("#0072B2", "o"), "v1": ("#E69F00", "s"), "v2": ("#009E73", "^")}
SCALES = (0.6, 0.85, 1.1, 1.4)
ROTATIONS = (0, 35, -35)  # degrees, one a row


def training_curves(runs: Sequence[Run]) -> Figure:
    """Loss and held-out accuracy of all runs by step."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        color, marker = STYLES[run.kind]
        first = run.seed == runs[0].seed
        label = run.kind if first else None
        left.plot(*_smoothed(run.losses), color=color, linewidth=1.4, alpha=0.85, label=label)
        steps, values = zip(*sorted(run.accuracies.items()), strict=True)
        right.plot(
            steps,
            [100 * value for value in values],
            color=color,
            marker=marker,
            markersize=5,
            alpha=0.85,
            label=label,
        )
    seeds = len({run.seed for run in runs})
    lines = "one line a seed" if seeds > 1 else "one seed"
    left.set(
        title="Training loss", xlabel="step", ylabel="cross entropy, averaged over 15 steps", yscale="log"
    )
    right.set(title="Accuracy on held-out digits", xlabel="step", ylabel="%")
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title=lines)
    return figure


def _smoothed(losses: Sequence[float], window: int = 15) -> tuple[Any, Any]:
    """Steps and the means of the `window` losses around each."""
    window = min(window, len(losses))
    means = np.convolve(losses, np.full(window, 1 / window), "valid")
    return np.arange(len(means)) + (window + 1) / 2, means


def looks(net: DigitNet, scans: Digits, block: int) -> Figure:
    """Some digits at several scales, with the points where the deformable layer of a block samples."""
    chosen = scans.take(_examples(scans, len(ROTATIONS)))
    rows, columns = len(ROTATIONS), len(SCALES)
    figure = Figure(figsize=(2.15 * columns + 0.9, 2.35 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    drawn: Any = None
    for row, rotation in enumerate(ROTATIONS):
        image = np.repeat(chosen.images[row : row + 1], columns, axis=0)
        canvases = digits.place(image, _centred(SCALES, rotation))
        offset, mask, pixel = _predictions(net, block, canvases)
        points = sampling_points(offset, 3, padding=1)
        regular = regular_points(offset.shape[2:], 3, padding=1)
        answers = scores(net, canvases).argmax(1).tolist()
        for column, canvas in enumerate(canvases):
            axes = panels[row, column]
            drawn = draw_sampling_points(
                axes, canvas, points[column, 0], None if mask is None else mask[column],
                at=_positions(canvas, offset.shape[2:], pixel), regular=regular, pixel=pixel,
            )  # fmt: skip
            axes.set_title(f"x{SCALES[column]:g}, read as {answers[column]}", fontsize=9)
    bar = figure.colorbar(drawn, ax=panels, shrink=0.6, aspect=25, pad=0.02)
    bar.set_label("mask: how much a sample counts")
    figure.suptitle(
        "Where a trained v2 layer looks: three output positions (x), the points they sample\n"
        "(colour and size: mask) and, as +, the points a plain convolution would sample",
        fontsize=10,
    )
    return figure


def _examples(scans: Digits, count: int) -> npt.NDArray[np.intp]:
    """The first scan of each of some labels with strokes that turn."""
    return np.array([np.flatnonzero(scans.labels == label)[0] for label in (3, 5, 8, 2, 6)[:count]])


def _centred(scales: Sequence[float], degrees: float) -> Placement:
    zeros = np.zeros(len(scales))
    return Placement(np.array(scales), zeros + np.deg2rad(degrees), zeros, zeros)


@torch.inference_mode()
def _predictions(net: DigitNet, block: int, canvases: digits.Images) -> tuple[Any, Any, int]:
    """The offsets, masks and image pixels per input pixel of the deformable layer of a block."""
    net.eval()
    features = net.body[:block](torch.from_numpy(canvases)[:, None])
    stage = net.body[block]
    assert isinstance(stage, nn.Sequential)
    layer = stage[0]
    assert isinstance(layer, DeformConv2d)
    offset, mask = layer.offsets_and_mask(features)
    return offset.numpy(), None if mask is None else mask.numpy(), canvases.shape[1] // features.shape[2]


def _positions(canvas: Any, size: Sequence[int], pixel: int, count: int = 3) -> list[tuple[int, int]]:
    """Some output positions on ink, as far from each other as can be."""
    ink = canvas[::pixel, ::pixel][: size[0], : size[1]]
    candidates = np.argwhere(ink >= 0.5 * ink.max())
    chosen = [candidates[0]]
    while len(chosen) < min(count, len(candidates)):
        distances = np.min([np.hypot(*(candidates - other).T) for other in chosen], axis=0)
        chosen.append(candidates[np.argmax(distances)])
    return [(int(row), int(column)) for row, column in chosen]
