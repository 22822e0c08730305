"""Sampling points drawn over an image. The caller brings the axes, so nothing here imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deformconv.errors import ShapeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

__all__ = ["draw_sampling_points"]


def draw_sampling_points(
    axes: Axes,
    image: npt.ArrayLike,
    points: npt.ArrayLike,
    mask: npt.ArrayLike | None = None,
    *,
    at: Sequence[tuple[int, int]],
    regular: npt.ArrayLike | None = None,
    pixel: float = 1.0,
    origin: float = 0.0,
    margin: float = 0.0,
    size: float = 26.0,
    mask_limit: float = 2.0,
    **style: Any,
) -> PathCollection:
    """Draw the sampling points of some output positions over an image; colour and area show the mask.

    Args:
        axes: matplotlib axes.
        image: (H, W) or (H, W, 3), what to draw over.
        points: (K, 2, *O), one image's and one offset group's part of `sampling_points`, input pixels.
        mask: (K, *O), or None for v1.
        at: output positions (row, column).
        regular: (K, 2, *O), `regular_points`: draws the undeformed window too, and lines from its middle.
        pixel: image pixels per input pixel of the layer, the total stride of the layers before it.
        origin: the image pixel that the layer's input pixel 0 stands for.
        margin: image pixels to show around the image, for the points that fall outside.
        size: area of a point whose mask is 1, in square typographic points.
        mask_limit: the mask's largest value (mask_scale), the end of the colours.
        **style: handed to `axes.scatter`.

    Returns:
        The drawn points, from which `figure.colorbar` makes a legend.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 4 or points.shape[1] != 2:
        raise ShapeError(
            f"`points` has shape {points.shape}; expected (K, 2, H_out, W_out): "
            "`sampling_points(...)[image, offset_group]` of a 2-D layer."
        )
    if mask is not None and np.shape(mask) != (len(points), *points.shape[2:]):
        raise ShapeError(
            f"`mask` has shape {np.shape(mask)}; expected (K, H_out, W_out) = "
            f"{(len(points), *points.shape[2:])}, as `points` {points.shape}."
        )
    rows, columns = np.transpose(np.asarray(at, np.intp).reshape(-1, 2))
    chosen = points[:, :, rows, columns] * pixel + origin  # (K, 2, positions)
    amount = np.ones(chosen[:, 0].shape) if mask is None else np.asarray(mask)[:, rows, columns]
    image = np.asarray(image)
    # Grey images are drawn pale, for the points to stand out.
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=2.2 * float(image.max()) or 1)  # colours ignore these
    if regular is not None:
        window = np.asarray(regular)[:, :, rows, columns] * pixel + origin
        middle = window.mean(axis=0)  # (2, positions)
        y, x = np.moveaxis(np.stack(np.broadcast_arrays(middle, chosen)), 2, 0).reshape(2, 2, -1)
        axes.plot(x, y, color="0.35", linewidth=0.6, zorder=2)
        axes.scatter(window[:, 1], window[:, 0], s=size / 4, color="0.45", marker="+", linewidths=0.6)
        axes.scatter(middle[1], middle[0], s=size, color="black", marker="x", linewidths=1.4, zorder=4)
    looks = {"cmap": "viridis", "vmin": 0, "vmax": mask_limit, "edgecolors": "black", "linewidths": 0.5}
    drawn = axes.scatter(chosen[:, 1], chosen[:, 0], s=size * np.abs(amount), c=amount, zorder=3, **{**looks, **style})
    height, width = image.shape[:2]
    right, bottom = width - 0.5, height - 0.5
    if margin:
        # The image's own edge takes the place of the axes' frame.
        x, y = np.array([[-0.5, right, right, -0.5, -0.5], [-0.5, -0.5, bottom, bottom, -0.5]])
        axes.plot(x, y, color="0.6", linewidth=0.8)
        axes.spines[:].set_visible(False)
    axes.set(xlim=(-0.5 - margin, right + margin), ylim=(bottom + margin, -0.5 - margin))
    axes.set(xticks=[], yticks=[])
    return drawn
