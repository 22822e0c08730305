"""The demo's pictures: where a trained net samples, and how training went. Figures never open a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from deformconv.plots import draw_sampling_points, regular_points, sampling_points
from deformconv.studies import digits
from deformconv.studies.digits import Digits, Placement
from deformconv.studies.training import DigitNet, Run, scores
from deformconv.torch import DeformConv2d

__all__ = ["looks", "training_curves"]

# Okabe and Ito's colours, which the colour-blind can tell apart, and markers for print without colour.
STYLES = {"plain": ("#0072B2", "o"), "longer": ("#56B4E9", "D"), "v1": ("#E69F00", "s"), "v2": ("#009E73", "^")}
SCALES = (0.6, 0.85, 1.1, 1.4)
ROWS = ((4, 0), (6, 35), (8, -35))  # label, and rotation in degrees
POSITIONS = {2: 3, 4: 2}  # how many output positions to show, by image pixels per input pixel of the layer


def training_curves(runs: Sequence[Run]) -> Figure:
    """Loss and held-out accuracy of all runs by step, from the trained net on."""
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
    left.set(title="Training loss", xlabel="step", ylabel="mean of 15 steps", ylim=(0, None))
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
    figure = Figure(figsize=(9.5, 7.4), layout="constrained")
    panels = figure.subplots(len(ROWS), len(SCALES))
    drawn: Any = None
    for row, (label, rotation) in enumerate(ROWS):
        image = np.repeat(_typical(scans, label)[None], len(SCALES), axis=0)
        canvases = digits.place(image, _centred(SCALES, rotation))
        offset, mask, stride, pixel = _predictions(net, block, canvases)
        points = sampling_points(offset, 3, stride=stride, padding=1)
        regular = regular_points(offset.shape[2:], 3, stride=stride, padding=1)
        answers = scores(net, canvases).argmax(1).tolist()
        for column, canvas in enumerate(canvases):
            axes = panels[row, column]
            drawn = draw_sampling_points(
                axes,
                canvas,
                points[column, 0],
                None if mask is None else mask[column],
                at=_positions(canvas[:: stride * pixel, :: stride * pixel], POSITIONS[pixel]),
                regular=regular,
                pixel=pixel,
                margin=1,
            )
            title = f"scale {SCALES[column]:g}, read as {answers[column]}"
            axes.set_title(title, fontsize=9, color="black" if answers[column] == label else "#B00000")
    bar = figure.colorbar(drawn, ax=panels, shrink=0.6, aspect=25, pad=0.02, ticks=[0, 0.5, 1, 1.5, 2])
    bar.set_label("mask: how much a sample counts")
    figure.suptitle(
        f"Where a trained {net.kind} layer looks. A cross is an output position, circles what it samples\n"
        "(colour and size: mask), and small plus signs what a plain convolution samples there.",
        fontsize=10,
    )
    return figure


def _typical(scans: Digits, label: int) -> digits.Images:
    """Of the scans of a label, the one nearest to their mean."""
    images = scans.images[scans.labels == label]
    distances = np.square(images - images.mean(axis=0)).sum(axis=(1, 2))
    return images[np.argmin(distances)]


def _centred(scales: Sequence[float], degrees: float) -> Placement:
    zeros = np.zeros(len(scales))
    return Placement(np.array(scales), zeros + np.deg2rad(degrees), zeros, zeros)


@torch.inference_mode()
def _predictions(net: DigitNet, block: int, canvases: digits.Images) -> tuple[Any, Any, int, int]:
    """The offsets and masks of the deformable layer of a block, its stride, and the image pixels per pixel of its input."""
    net.eval()
    features = net.body[:block](torch.from_numpy(canvases)[:, None])
    layer = next(layer for layer in net.body[block].modules() if isinstance(layer, DeformConv2d))
    offset, mask = layer.offsets_and_mask(features)
    pixel = canvases.shape[1] // features.shape[2]
    return offset.numpy(), None if mask is None else mask.numpy(), features.shape[2] // offset.shape[2], pixel


def _positions(ink: Any, most: int) -> list[tuple[int, int]]:
    """Some output positions on ink, given at every one, as far from each other as can be."""
    candidates = np.argwhere(ink >= 0.5 * ink.max())
    chosen = [candidates[0]]
    while len(chosen) < most:
        distances = np.min([np.hypot(*(candidates - other).T) for other in chosen], axis=0)
        if distances.max() < 3:
            break  # windows so near to each other would hide one another
        chosen.append(candidates[np.argmax(distances)])
    return [(int(row), int(column)) for row, column in chosen]
