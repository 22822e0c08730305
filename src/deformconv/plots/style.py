"""One look for all pictures: colours, halos, marks, legends. matplotlib is loaded when something is drawn."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deformconv.errors import ShapeError
from deformconv.installation import command
from deformconv.plots.images import LUMINANCE, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

__all__ = [
    "AMOUNT", "BLUE", "GREEN", "HEAT", "LEVELS", "ORANGE", "POINTS_HEAT", "PURPLE", "SKY", "SMALL", "VERMILLION", "YELLOW",
    "Zoom", "add_bar", "add_legend", "box", "dots", "embedded", "frame", "grey", "halo", "limits", "line", "mark", "new_figure",
    "of_the_picture", "positions", "rays", "sample", "save", "show", "window",
]  # fmt: skip

Array = npt.NDArray[np.float64]
Zoom = float | tuple[float, float] | None  # image pixels around a unit: to each side, or up and down, left and right

# Okabe and Ito's colours, which the colour-blind can tell apart.
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
LEVELS = ORANGE, SKY, PURPLE, GREEN, VERMILLION, BLUE  # of a pyramid, the finest first
# Maps that are perceptually even, also to the colour-blind: of weights, of amounts over a picture, and of amounts in points,
# which begin with a blue because black points would be lost on what is dark.
AMOUNT, HEAT, POINTS_HEAT = "viridis", "magma", "plasma"
SMALL = 8.5  # the size of a legend's letters, in points


def new_figure(**looks: Any) -> Figure:
    """A matplotlib figure, which opens no window."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            f"Drawing needs matplotlib, which is not installed: {command('plots', 'matplotlib')}", name="matplotlib"
        ) from None
    return Figure(**looks)


def halo(width: float, alpha: float = 0.85) -> list[Any]:
    """Path effects that draw a dark line of this width, in points, under what is drawn."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground="black", alpha=alpha)]


def show(axes: Axes, image: Any) -> tuple[int, int]:
    """Draw a picture as it is, without ticks; return its size (H, W)."""
    values = picture(image)
    axes.imshow(values, cmap="gray", vmin=0, vmax=1, zorder=0)  # these are for grey pictures; colours ignore them
    axes.set(xticks=[], yticks=[])
    return values.shape[0], values.shape[1]


def grey(image: Any, contrast: float = 1.0) -> Array:
    """A picture's luminance (H, W, 3), with the contrast made less, so that colours over it are seen."""
    values = picture(image)
    if values.ndim == 3:
        values = values @ LUMINANCE
    return np.repeat((0.5 + contrast * (values - 0.5))[..., None], 3, axis=2)


def window(size: tuple[int, int], points: Any = (), at: Any = None, zoom: Zoom = None) -> tuple[Array, Array]:
    """The corners, y before x, of what to show: `zoom` pixels around `at`, or the picture and what lies near it.

    Near is what lies up to a fifth of the picture's sides outside of it.
    """
    low, high = np.array([-0.5, -0.5]), np.array(size) - 0.5
    if zoom is not None:
        middle = np.asarray(at, np.float64).reshape(-1, 2).mean(axis=0)
        return middle - zoom, middle + zoom
    if len(points) == 0:
        return low, high
    most, space = 0.2 * np.array(size), 0.02 * max(size)
    before, after = low - np.min(points, axis=0), np.max(points, axis=0) - high
    low = low - np.where(before > 0, np.minimum(before + space, most), 0)
    return low, high + np.where(after > 0, np.minimum(after + space, most), 0)


def limits(axes: Axes, size: tuple[int, int], points: Any = (), at: Any = None, zoom: Zoom = None) -> None:
    """Set the axes' limits to that window."""
    low, high = window(size, points, at, zoom)
    if zoom is None and (high - low > size).any():
        frame(axes, size)
    axes.set(xlim=(low[1], high[1]), ylim=(high[0], low[0]))


def frame(axes: Axes, size: tuple[int, int]) -> None:
    """Draw the picture's edge in place of the axes' frame, for where there is room around the picture."""
    right, bottom = size[1] - 0.5, size[0] - 0.5
    axes.plot([-0.5, right, right, -0.5, -0.5], [-0.5, -0.5, bottom, bottom, -0.5], color="0.6", linewidth=0.8, zorder=1)
    axes.spines[:].set_visible(False)


def dots(axes: Axes, points: Any, areas: Any, **looks: Any) -> PathCollection:
    """Draw circles at points (M, 2), y before x, with a white ring within a dark one: one of them is seen on anything."""
    ring = min(0.9, 0.13 * float(np.sqrt(np.median(areas)))) if np.size(areas) else 0.0
    ours = {"edgecolors": "white", "linewidths": ring, "path_effects": halo(2.9 * ring), "zorder": 5}
    return axes.scatter(points[:, 1], points[:, 0], s=areas, **{**ours, **looks})


def box(axes: Axes, edges: Sequence[float], color: str = YELLOW) -> None:
    """Draw a box (top, left, bottom, right), dashed."""
    top, left, bottom, right = edges
    looks: dict[str, Any] = {"color": color, "linewidth": 1.2, "linestyle": (0, (4, 2)), "path_effects": halo(2.6, 0.7)}
    axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], zorder=4, **looks)


def mark(axes: Axes, kind: str, points: Any, size: float | None = None) -> PathCollection:
    """Draw marks of a kind, "unit" (a cross) or "regular" (small plus signs), at points (M, 2), y before x."""
    points = np.asarray(points, np.float64).reshape(-1, 2)
    looks = _mark(kind, size)
    return axes.scatter(
        points[:, 1], points[:, 0], s=looks["markersize"] ** 2, marker=looks["marker"], color=looks["color"],
        linewidths=looks["markeredgewidth"], path_effects=looks["path_effects"], zorder=7 if kind == "unit" else 6,
    )  # fmt: skip


def _mark(kind: str, size: float | None = None, color: Any = None) -> dict[str, Any]:
    """What marks of a kind look like, in the words of a line; `size` is their width in points."""
    if kind == "dot":
        return {
            "marker": "o", "markersize": 6.0, "markerfacecolor": color, "markeredgecolor": "white", "markeredgewidth": 0.8,
            "path_effects": halo(2.0),
        }  # fmt: skip
    marker, width, stroke, colour = {"unit": ("x", 9.0, 0.22, YELLOW), "regular": ("+", 5.0, 0.2, "white")}[kind]
    width = width if size is None else size
    return {
        "marker": marker, "markersize": width, "color": colour, "markeredgewidth": stroke * width,
        "path_effects": halo(stroke * width + max(1.1, 0.24 * width), 1.0 if kind == "unit" else 0.85),
    }  # fmt: skip


def rays(axes: Axes, middles: Any, points: Any, width: float = 0.9) -> list[Line2D]:
    """Draw a thin line from a middle to each point, both (M, 2), y before x."""
    y, x = np.moveaxis(np.stack(np.broadcast_arrays(middles, points)), 2, 0)  # (2, M): a line for each column
    return axes.plot(x, y, color="white", linewidth=width, zorder=3, path_effects=halo(width + 1.3, 0.7))


def sample(kind: str, label: str, color: Any = None) -> Line2D:
    """A legend's mark of a kind: "unit", "regular" or "dot"."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=label, **_mark(kind, color=color))


def line(label: str, color: str, style: Any = "-", width: float = 1.4) -> Line2D:
    """A legend's line, with a halo."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, color=color, linewidth=width, linestyle=style, path_effects=halo(width + 1.6))


def add_legend(axes: Axes, handles: Sequence[Any], columns: int | None = None) -> Legend:
    """Say below the picture, where it covers nothing, what marks mean."""
    return axes.legend(
        handles=list(handles), loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False,
        ncols=columns or len(handles), fontsize=SMALL, handletextpad=0.5, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def add_bar(axes: Axes, drawn: Any, label: str, **more: Any) -> Colorbar:
    """Draw a colour bar beside the picture, as high as the picture."""
    figure: Any = axes.figure
    bar = figure.colorbar(drawn, cax=axes.inset_axes((1.02, 0, 0.03, 1)), **more)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL - 0.5)
    bar.outline.set_linewidth(0.6)
    return bar


def save(figure: Figure, path: str | PathLike[str], **more: Any) -> None:
    """Write a figure to a file; in an SVG, text stays text, and the same figure gives the same file."""
    import matplotlib

    reproducible: dict[str, Any] = {"metadata": {"Date": None}} if str(path).lower().endswith(".svg") else {}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deformconv"}):
        figure.savefig(path, **{**reproducible, **more})


def embedded(figure: Figure) -> str:
    """A figure as HTML."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(figure.get_suptitle(), quote=True)}" src="data:image/png;base64,{data}">'


def positions(name: str, points: Any) -> Array:
    """A view's positions (M, 2); ShapeError if they are of another number of axes."""
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ShapeError(
            f"`{name}` has shape {points.shape}; expected (M, 2). Pictures are drawn of 2-D layers; of others take the numbers."
        )
    return points


def of_the_picture(name: str, values: Any, image: Any) -> Any:
    """A view's values (H, W) for each pixel; ShapeError if the picture has another size."""
    values, size = np.asarray(values), picture(image).shape[:2]
    if values.ndim != 2:
        raise ShapeError(
            f"`{name}` has shape {values.shape}; expected (H, W). Pictures are drawn of 2-D layers; of others take the numbers."
        )
    if values.shape != size:
        raise ShapeError(
            f"`{name}` is {values.shape[0]}x{values.shape[1]}, and `image` {size[0]}x{size[1]}; expected the picture that the "
            "model got, in its size."
        )
    return values
