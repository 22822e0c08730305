"""A GIF in which offsets grow, and a unit's samples leave the window of a plain convolution. Pillow writes it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deformconv.plots import style
from deformconv.plots.draw_points import draw_unit_points
from deformconv.plots.images import picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from deformconv.plots.stack import UnitPoints

__all__ = ["animate_unit_points"]

DPI = 100
STRIP = 34  # pixels below the picture, for the legend
BEGINNING, END = 700, 1600  # milliseconds that the first and the last picture stay


def animate_unit_points(
    views: Sequence[UnitPoints],
    image: Any,
    path: str | PathLike[str],
    *,
    scales: Sequence[float] | None = None,
    zoom: style.Zoom = None,
    width: int = 600,
    seconds: float = 1.5,
) -> None:
    """Write a GIF of a unit's sampling points while its offsets grow.

    Args:
        views: what `unit_points` returns for one unit with growing `scale`, one for each picture of the GIF.
        image: the picture that the model got, in any form that `picture` takes.
        path: the file, which ends in .gif.
        scales: the `scale` of each view, for the label; None: equal steps from 0 to 1.
        zoom: image pixels to show around the unit: to each side, or a pair, up and down, left and right; None shows the
            whole picture.
        width: of the GIF, in pixels.
        seconds: from the first picture to the last, which then stay for a while.

    Raises:
        ValueError: there are fewer than 2 views, or they are of several units; the path does not end in .gif.
        ShapeError: a view is of another rank, or the picture's shape is none of a picture.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from deformconv.plots import animate_unit_points, record, unit_points
        >>> from deformconv.torch import DeformConv2d
        >>> image, net = torch.rand(1, 3, 32, 48), DeformConv2d(3, 8, 3, padding=1)
        >>> _ = torch.nn.init.normal_(net.offset_conv.bias)
        >>> with record(net) as trace:
        ...     _ = net(image)
        >>> views = [unit_points(trace, "", at=(16, 10), scale=scale) for scale in (0, 0.5, 1)]
        >>> with TemporaryDirectory() as folder:
        ...     animate_unit_points(views, image, Path(folder) / "points.gif")
    """
    scales = _checked(views, path, scales)
    values = picture(image)
    points = np.concatenate([style.positions("view.points", view.points) for view in views])
    low, high = style.window(values.shape[:2], points, views[-1].at, zoom)
    tall = round(width * float((high - low)[0] / (high - low)[1]))
    figure = style.new_figure(figsize=(width / DPI, (tall + STRIP) / DPI), dpi=DPI)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    last = views[-1]
    looks: dict[str, Any] = {
        "zoom": zoom, "size": 110.0 / max(len(last.points), 1) ** 0.4, "bar": False,
        "top": float(np.abs(last.weights).max(initial=0)) or 1.0 if len(last.layers) > 1 else None,
    }  # fmt: skip
    frames = []
    for view, scale in zip(views, scales, strict=True):
        figure.clear()
        axes = figure.add_axes((0, STRIP / (tall + STRIP), 1, tall / (tall + STRIP)))
        draw_unit_points(axes, values, view, **looks)
        axes.set(xlim=(low[1], high[1]), ylim=(high[0], low[0]))
        axes.axis("off")
        axes.text(
            9 / width, 1 - 9 / tall, f"offsets x {scale:.2f}", transform=axes.transAxes, va="top", zorder=9, fontsize=9.5,
            color="white", fontweight="bold", bbox={"boxstyle": "round", "facecolor": "black", "alpha": 0.7, "linewidth": 0},
        )  # fmt: skip
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    _write(frames, path, 1000 * seconds / (len(frames) - 1))


def _checked(views: Sequence[UnitPoints], path: str | PathLike[str], scales: Sequence[float] | None) -> Sequence[float]:
    """The scales, one for each view; ValueError for what makes no animation."""
    if len(views) < 2:
        raise ValueError(f"`views` has {len(views)}; expected at least 2: `unit_points` of one unit with growing `scale`.")
    units = sorted({(view.layers, tuple(view.unit)) for view in views})
    if len(units) > 1:
        raise ValueError(f"`views` are of {len(units)} units, {units[0][1]} and {units[1][1]} among them; expected one unit.")
    if not str(path).lower().endswith(".gif"):
        raise ValueError(f"`path` is '{path}'; expected a name that ends in .gif.")
    if scales is None:
        return [float(scale) for scale in np.linspace(0, 1, len(views))]
    if len(scales) != len(views):
        raise ValueError(f"`scales` has {len(scales)} numbers for {len(views)} views; expected one for each.")
    return scales


def _write(frames: Sequence[npt.NDArray[np.uint8]], path: str | PathLike[str], milliseconds: float) -> None:
    """Write pictures (H, W, 3) as a GIF that begins anew at its end."""
    from PIL import Image as pillow

    colours = _colours(frames)
    palette = pillow.new("P", (1, 1))
    palette.putpalette(colours)
    # Dithering would make the whole picture flicker and the file large: the first one's stays wherever nothing changes.
    still = np.asarray(pillow.fromarray(frames[0]).quantize(palette=palette, dither=pillow.Dither.FLOYDSTEINBERG))
    pictures: list[Image] = []
    for frame in frames:
        plain = pillow.fromarray(frame).quantize(palette=palette, dither=pillow.Dither.NONE)
        made = pillow.fromarray(np.where((frame == frames[0]).all(axis=2), still, np.asarray(plain)), "P")
        made.putpalette(colours)
        pictures.append(made)
    durations = [round(milliseconds)] * len(pictures)
    durations[0], durations[-1] = BEGINNING, END
    pictures[0].save(path, "gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)


def _colours(frames: Sequence[npt.NDArray[np.uint8]]) -> list[int]:
    """A palette: the marks' colours, which a photograph's many would crowd out, and 190 of the first and last picture's."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb
    from PIL import Image as pillow

    photograph = pillow.fromarray(np.concatenate([frames[0], frames[-1]])).quantize(190).getpalette() or []
    marks = [to_rgb(name) for name in ("black", "white", style.YELLOW, style.ORANGE)]
    marks += [tuple(one[:3]) for one in colormaps[style.AMOUNT](np.linspace(0, 1, 48))]
    return photograph[: 3 * 190] + [round(255 * value) for one in marks for value in one]
