"""Drawn over a picture: the points that a unit or a query samples, and the samples whose moves change a unit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deformconv.ops.window import by
from deformconv.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

    from deformconv.plots.locations import SamplingLocations
    from deformconv.plots.query import QueryPoints
    from deformconv.plots.stack import UnitPoints

__all__ = ["draw_query_points", "draw_sampling_locations", "draw_unit_points"]

WITH_LINES = 36  # points: of more, lines to the unit would hide the picture


def draw_unit_points(
    axes: Axes,
    image: Any,
    view: UnitPoints,
    *,
    zoom: style.Zoom = None,
    regular: bool = True,
    legend: bool = True,
    bar: bool = True,
    size: float | None = None,
    top: float | None = None,
) -> PathCollection:
    """Draw the points that a unit samples, in sizes and colours by their weights, and those of a plain convolution.

    Args:
        axes: matplotlib axes; legend and bar find room beside them in a figure with `layout="constrained"`.
        image: the picture that the model got, in any form that `picture` takes.
        view: what `unit_points` returns, of a 2-D layer.
        zoom: image pixels to show around the unit: to each side, or a pair, up and down, left and right; None shows the
            whole picture.
        regular: whether to draw the plain convolution's points, as small plus signs.
        legend: whether to say below the picture what the marks mean.
        bar: whether to draw a colour bar of the weights, where they differ.
        size: area of a point of weight 1, or of the heaviest, through several layers and where all weights are below 1/2, as
            those of a softmax are, in square typographic points; None chooses by the number of points.
        top: the weight at the end of the colours; None: through one layer 2, or 1 where all weights are below; through
            several, and where all are below 1/2, the largest.

    Returns:
        The drawn points.

    Raises:
        ShapeError: the view is of another rank, or the picture's shape is none of a picture.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from deformconv.plots import draw_unit_points, record, unit_points
        >>> from deformconv.torch import DeformConv2d
        >>> image, net = torch.rand(1, 3, 32, 48), DeformConv2d(3, 8, 3, padding=1)
        >>> with record(net) as trace:
        ...     _ = net(image)
        >>> figure = Figure(figsize=(6, 4.5), layout="constrained")
        >>> drawn = draw_unit_points(figure.add_subplot(), image, unit_points(trace, "", at=(16, 10)))
        >>> drawn.get_offsets().tolist()[:2]  # x before y, as matplotlib has it; a new layer's offsets are 0
        [[9.0, 15.0], [10.0, 15.0]]
    """
    points = style.positions("view.points", view.points)
    weights, single = np.asarray(view.weights, np.float64), len(view.layers) == 1
    shape = style.show(axes, image)
    area = _area(len(points), zoom) if size is None else size
    most = float(np.abs(weights).max(initial=0)) or 1.0
    alike = bool(np.abs(weights - most).max(initial=0) <= 1e-6 * most)
    if single and len(points) <= WITH_LINES:
        style.rays(axes, view.at, points)
    if regular:
        style.mark(axes, "regular", view.regular, (5.0 if single else 3.5) + 1.5 * (zoom is not None))
    order = np.argsort(weights, kind="stable")  # the heaviest on top
    heaviest = most if top is None else top
    absolute = single and not alike and most >= 0.5
    areas = area * np.clip(np.abs(weights[order]) / (1.0 if absolute else heaviest), 0.12, None)
    if alike and not single:
        areas = areas / 2  # where one is as large as the heaviest of others
    if top is None:
        top = (2.0 if most > 1 else 1.0) if single and most >= 0.5 else most
    looks: dict[str, Any] = {"color": style.ORANGE} if alike else {
        "c": weights[order], "cmap": style.AMOUNT, "vmin": min(0.0, weights.min()), "vmax": top,
    }  # fmt: skip
    drawn = style.dots(axes, points[order], areas, **looks)
    style.mark(axes, "unit", view.at)
    style.limits(axes, shape, points, view.at, zoom)
    if legend:
        colour, how = (style.ORANGE, "") if alike else (drawn.cmap(0.6), " (colour and size: how much they count)")
        handles = [style.sample("unit", "unit"), style.sample("dot", f"its samples{how}", colour)]
        if regular:
            handles.append(style.sample("regular", "a plain convolution's"))
        style.add_legend(axes, handles)
    if bar and not alike:
        style.add_bar(axes, drawn, "mask" if single else "product of masks")
    return drawn


def _area(points: int, zoom: style.Zoom) -> float:
    """The area of the heaviest of so many points, in square typographic points: smaller for more, larger in a zoom."""
    return 110.0 / max(points, 1) ** (0.45 if zoom is None else 0.35)


def draw_sampling_locations(
    axes: Axes,
    image: Any,
    view: SamplingLocations,
    *,
    zoom: style.Zoom = None,
    legend: bool = True,
    bar: bool = True,
    most: int = 500,
    size: float | None = None,
) -> PathCollection:
    """Draw the samples of a layer whose moves change a unit, in sizes and colours by how much.

    Args:
        axes, image, zoom, legend, bar: as `draw_unit_points`'s.
        view: what `sampling_locations` returns, of a 2-D layer.
        most: how many samples to draw, the strongest; those below 1/50 of the strongest are left out as well.
        size: area of the strongest sample, in square typographic points; None chooses by the number of samples.

    Returns:
        The drawn samples.

    Raises:
        ShapeError: the view is of another rank, or the picture's shape is none of a picture.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from deformconv.plots import draw_sampling_locations, record, sampling_locations
        >>> from deformconv.torch import DeformConv2d
        >>> image, net = torch.rand(1, 3, 32, 48), DeformConv2d(3, 8, 3, padding=1)
        >>> with record(net) as trace:
        ...     _ = net(image)
        >>> figure = Figure(figsize=(6, 4.5), layout="constrained")
        >>> drawn = draw_sampling_locations(figure.add_subplot(), image, sampling_locations(trace, "", at=(16, 10)))
        >>> len(drawn.get_offsets())
        9
    """
    points = style.positions("view.points", view.points)
    strength = np.asarray(view.strength, np.float64)
    shape = style.show(axes, image)
    share = strength / (float(strength.max(initial=0)) or 1.0)
    order = np.argsort(share, kind="stable")[len(share) - min(most, len(share)) :]
    order = order[share[order] >= 0.02]
    points, share = points[order], share[order]
    areas = (_area(len(points), zoom) if size is None else size) * np.clip(share, 0.1, None)
    drawn = style.dots(axes, points, areas, c=share, cmap=style.POINTS_HEAT, vmin=0, vmax=1)
    style.mark(axes, "unit", view.at)
    style.limits(axes, shape, points, view.at, zoom)
    if legend:
        style.add_legend(axes, [
            style.sample("unit", "unit"),
            style.sample("dot", f"samples of {view.of or 'the layer'} that move it", drawn.cmap(0.75)),
        ])  # fmt: skip
    if bar:
        style.add_bar(axes, drawn, "response to a move [share of strongest]")
    return drawn


def draw_query_points(
    axes: Axes,
    image: Any,
    view: QueryPoints,
    *,
    zoom: style.Zoom = None,
    legend: bool = True,
    size: float | None = None,
) -> list[PathCollection]:
    """Draw the points that a query of deformable attention samples: in colours by level, in sizes by weight.

    Args:
        axes, image, zoom, legend: as `draw_unit_points`'s.
        view: what `query_points` returns.
        size: area of the heaviest point, in square typographic points; None chooses by the number of points.

    Returns:
        The drawn points of each level that has some.

    Raises:
        ShapeError: the picture's shape is none of a picture.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from deformconv.plots import draw_query_points, query_points, record
        >>> from deformconv.torch import DeformAttention
        >>> layer, image = DeformAttention(32, num_levels=2), torch.rand(3, 64, 96)
        >>> with record(layer) as trace:
        ...     _ = layer(torch.rand(1, 50, 32), torch.rand(1, 50, 1, 2), torch.rand(1, 120, 32), [(8, 12), (4, 6)])
        >>> view = query_points(trace, "", query=7, size=(64, 96))
        >>> [len(drawn.get_offsets()) for drawn in draw_query_points(Figure().add_subplot(), image, view)]
        [32, 32]
    """
    shape = style.show(axes, image)
    share = np.abs(view.weights) / (float(np.abs(view.weights).max(initial=0)) or 1.0)
    most = 2 * _area(len(view.points), zoom) if size is None else size
    present = sorted(set(view.levels.tolist()))
    drawn: list[PathCollection] = []
    for level in reversed(present):  # the finest on top
        here = np.flatnonzero(view.levels == level)
        here = here[np.argsort(share[here], kind="stable")]
        colour = style.LEVELS[level % len(style.LEVELS)]
        drawn.insert(0, style.dots(axes, view.points[here], most * np.clip(share[here], 0.12, None), color=colour))
    if view.box is not None:
        style.box(axes, view.box)
    style.mark(axes, "unit", view.at)
    style.limits(axes, shape, view.points, view.at, zoom)
    if legend:
        handles = [style.sample("unit", "reference" if view.box is None else "middle of its box")]
        for level in present:
            handles.append(style.sample("dot", by(view.sizes[level]), style.LEVELS[level % len(style.LEVELS)]))
        title = "colour: the level that is sampled; size: weight"
        style.add_legend(axes, handles).set_title(title, prop={"size": style.SMALL})
    return drawn
