"""The sampling points of some output positions, drawn over an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deformconv.errors import ShapeError
from deformconv.plots import style

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
    **looks: Any,
) -> PathCollection:
    """Draw the sampling points of some output positions over an image; colour and area show the mask.

    Args:
        axes: matplotlib axes.
        image: what to draw over, in any form that `picture` takes.
        points: (K, 2, *O), one image's and one offset group's part of `sampling_points`, input pixels.
        mask: (K, *O), or None for v1.
        at: output positions (row, column).
        regular: (K, 2, *O), `regular_points`: draws the undeformed window too, and lines from its middle.
        pixel: image pixels per input pixel of the layer, the total stride of the layers before it.
        origin: the image pixel that the layer's input pixel 0 stands for.
        margin: image pixels to show around the image, for the points that fall outside.
        size: area of a point whose mask is 1, in square typographic points.
        mask_limit: the mask's largest value (mask_scale), the end of the colours.
        **looks: handed to `axes.scatter`.

    Returns:
        The drawn points, from which `figure.colorbar` makes a legend.

    Raises:
        ShapeError: `points` or `mask` is not as above, or the picture's shape is none of a picture.

    Example:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> from deformconv.plots import draw_sampling_points, sampling_points
        >>> points = sampling_points(np.zeros((1, 18, 32, 48)), 3, padding=1)[0, 0]
        >>> drawn = draw_sampling_points(Figure().add_subplot(), np.zeros((32, 48)), points, at=[(16, 10)])
        >>> drawn.get_offsets().tolist()[:2]  # x before y, as matplotlib has it
        [[9.0, 15.0], [10.0, 15.0]]
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
    shape = style.show(axes, image)
    at_points = np.moveaxis(chosen, 1, 2).reshape(-1, 2)
    if regular is not None:
        window = np.asarray(regular)[:, :, rows, columns] * pixel + origin
        middle = window.mean(axis=0)  # (2, positions)
        style.rays(axes, np.tile(middle.T, (len(chosen), 1)), at_points, 0.6)
        style.mark(axes, "regular", np.moveaxis(window, 1, 2), size**0.5 / 1.5)
        style.mark(axes, "unit", middle.T, 1.3 * size**0.5)
    colours = {"c": amount.ravel(), "cmap": style.AMOUNT, "vmin": 0, "vmax": mask_limit}
    drawn = style.dots(axes, at_points, size * np.abs(amount).ravel(), **{**colours, **looks})
    if margin:
        style.frame(axes, shape)
    height, width = shape
    axes.set(xlim=(-0.5 - margin, width - 0.5 + margin), ylim=(height - 0.5 + margin, -0.5 - margin))
    return drawn
