"""Drawn over a picture: receptive fields, saliency regions, and offset fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from deformconv.errors import ShapeError
from deformconv.plots import style
from deformconv.plots.images import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from deformconv.plots.fields import OffsetField
    from deformconv.plots.receptive import ReceptiveField
    from deformconv.plots.saliency import SaliencyRegion

__all__ = ["colour_wheel", "draw_offset_field", "draw_receptive_field", "draw_saliency_region"]

Kind = Literal["flow", "spread", "outside", "mask"]

EDGE = 4.55  # percent of a receptive field's maximum, above which its area is counted (arXiv 1701.04128)
# Directions, from right over down, left and up: warm to the right, cool to the left, dark down, light up. Opposite ones, and
# those at a right angle, differ for the colour-blind as well.
DIRECTIONS = ("F0A000", "C8503C", "6A2A6A", "20409A", "3C96E6", "96D2E6", "F5F5C8", "FAD750")
FAINT = 0.1  # of a cell: where all offsets are smaller, colours and arrows do not grow further
LABELS = {
    "spread": "spread [image pixels]",
    "outside": "share of samples outside",
    "mask": "mean mask",
}


def draw_receptive_field(
    axes: Axes, image: Any, view: ReceptiveField, *, zoom: style.Zoom = None, legend: bool = True, bar: bool = True
) -> AxesImage:
    """Draw a unit's effective receptive field over the grey picture, and a circle of its radius.

    The colours go by the square root, since most of a field is faint. The circle around the field's centroid is as large as
    the area above 4.55 % of the maximum.

    Args:
        axes: matplotlib axes; legend and bar find room beside them in a figure with `layout="constrained"`.
        image: the picture that the model got, in any form that `picture` takes.
        view: what `receptive_field` returns, of a 2-D layer.
        zoom: image pixels to show around the unit: to each side, or a pair, up and down, left and right; None shows the
            whole picture.
        legend: whether to say below the picture what the marks mean.
        bar: whether to draw a colour bar.

    Returns:
        The drawn field.

    Raises:
        ShapeError: the view is of another rank, or of a picture of another size.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from deformconv.plots import draw_receptive_field, receptive_field, record
        >>> from deformconv.torch import DeformConv2d
        >>> image, net = torch.rand(1, 3, 32, 48), DeformConv2d(3, 8, 3, padding=1)
        >>> with record(net) as trace:
        ...     _ = net(image)
        >>> figure = Figure(figsize=(6, 4.5), layout="constrained")
        >>> drawn = draw_receptive_field(figure.add_subplot(), image, receptive_field(trace, "", at=(16, 10)))
        >>> drawn.get_array().shape
        (32, 48)

    Paper: arXiv 1811.11168, section 2.1; arXiv 1701.04128.
    """
    from matplotlib.patches import Circle

    field = style.of_the_picture("view.field", view.field, image)
    root = np.sqrt(np.clip(field / (float(field.max()) or 1.0), 0, None))
    style.show(axes, style.grey(image, 0.75))
    drawn = axes.imshow(root, cmap=style.HEAT, vmin=0, vmax=1, alpha=np.clip(2.2 * root, 0, 0.85), zorder=2)
    y, x = view.centroid
    looks: dict[str, Any] = {"edgecolor": "white", "linewidth": 1.6, "linestyle": "--", "path_effects": style.halo(3.2)}
    axes.add_patch(Circle((x, y), view.radius, fill=False, zorder=5, **looks))
    style.mark(axes, "unit", view.at)
    style.limits(axes, field.shape, at=view.at, zoom=zoom)
    if legend:
        circle = f"radius {view.radius:.3g} px: as large as the area above {EDGE} % of the maximum"
        style.add_legend(axes, [style.sample("unit", "unit"), style.line(circle, "white", "--", 1.6)])
    if bar:
        shares = (0, 0.05, 0.2, 0.5, 1)
        made = style.add_bar(axes, drawn, "gradient [share of maximum]", ticks=np.sqrt(shares))
        made.ax.set_yticks(np.sqrt(shares), [f"{share:g}" for share in shares])
    return drawn


def draw_saliency_region(
    axes: Axes, image: Any, view: SaliencyRegion, *, zoom: style.Zoom = None, legend: bool = True
) -> AxesImage:
    """Draw the region that is enough for a unit's response as it is, and a veil over the rest of the picture.

    Args:
        axes, image, zoom, legend: as `draw_receptive_field`'s.
        view: what `saliency_region` returns, of a 2-D layer.

    Returns:
        The drawn picture.

    Raises:
        ShapeError: the view is of another rank, or of a picture of another size.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from deformconv.plots import draw_saliency_region, record, saliency_region
        >>> from deformconv.torch import DeformConv2d
        >>> image, net = torch.rand(1, 3, 32, 48), DeformConv2d(3, 8, 3, padding=1)
        >>> with record(net) as trace:
        ...     _ = net(image)
        >>> figure = Figure(figsize=(6, 4.5), layout="constrained")
        >>> view = saliency_region(trace, "", at=(16, 10))
        >>> drawn = draw_saliency_region(figure.add_subplot(), image, view)
        >>> drawn.get_array().shape
        (32, 48, 3)

    Paper: arXiv 1811.11168, section 2.1.
    """
    region = style.of_the_picture("view.region", view.region, image).astype(bool)
    values = picture(image)
    coloured = values if values.ndim == 3 else values[..., None]
    drawn = axes.imshow(np.where(region[..., None], coloured, 0.12 + style.grey(image, 0.3)), zorder=0)
    axes.set(xticks=[], yticks=[])
    _outline(axes, region)
    style.mark(axes, "unit", view.at)
    style.limits(axes, region.shape, at=view.at, zoom=zoom)
    if legend:
        label = (
            f"{100 * float(view.share):.2g} % of the picture give the response with an error of {view.error:.3f} "
            f"(bound {view.bound:g})"
        )
        style.add_legend(axes, [style.sample("unit", "unit"), style.line(label, style.ORANGE)])
    return drawn


def _outline(axes: Axes, region: Any) -> None:
    """Draw the edges between a region's pixels and the others."""
    from matplotlib.collections import LineCollection

    padded = np.pad(region, 1)
    rows, columns = np.nonzero(padded[1:] != padded[:-1])
    lying = [(columns - 1.5, rows - 0.5), (columns - 0.5, rows - 0.5)]  # x and y of an edge's ends
    rows, columns = np.nonzero(padded[:, 1:] != padded[:, :-1])
    standing = [(columns - 0.5, rows - 1.5), (columns - 0.5, rows - 0.5)]
    edges: Any = np.concatenate([np.moveaxis(np.array(ends), 2, 0) for ends in (lying, standing)])  # (edges, ends, x and y)
    for width, color in ((3.0, "black"), (1.4, style.ORANGE)):
        axes.add_collection(LineCollection(edges, colors=color, linewidths=width, capstyle="round", zorder=4), autolim=False)


def draw_offset_field(
    axes: Axes, image: Any, view: OffsetField, kind: Kind = "flow", *, legend: bool = True, bar: bool = True
) -> AxesImage:
    """Draw a layer's offsets over the grey picture, one cell for each output unit.

    Args:
        axes, image: as `draw_receptive_field`'s.
        view: what `offset_field` returns, of a 2-D layer.
        kind: "flow", the mean offset of a window, as colours of its direction, stronger for longer ones, and as arrows, which
            are means over blocks of cells; "spread", how far a window's offsets are from that mean; "outside", the share of
            samples that read nothing of the map; "mask", the mean mask.
        legend: whether to draw the flow's colour wheel and say how long arrows are.
        bar: whether to draw the others' colour bar.

    Returns:
        The drawn cells.

    Raises:
        ShapeError: the view is of another rank.
        ValueError: there is no such kind, or the layer has no masks.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from deformconv.plots import draw_offset_field, offset_field, record
        >>> from deformconv.torch import DeformConv2d
        >>> image, net = torch.rand(1, 3, 32, 48), DeformConv2d(3, 8, 3, padding=1)
        >>> with record(net) as trace:
        ...     _ = net(image)
        >>> figure = Figure(figsize=(6, 4.5), layout="constrained")
        >>> drawn = draw_offset_field(figure.add_subplot(), image, offset_field(trace, ""), "spread")
        >>> float(drawn.get_array().max())  # a new layer's offsets are 0
        0.0
    """
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` is {kind!r}; expected one of {', '.join(map(repr, get_args(Kind)))}.")
    flow = np.asarray(view.flow, np.float64)
    if flow.ndim != 3 or len(flow) != 2:
        raise ShapeError(
            f"`view.flow` has shape {flow.shape}; expected (2, H_out, W_out). Pictures are drawn of 2-D layers; of others take "
            "the numbers."
        )
    if getattr(view, kind) is None:
        raise ValueError(f"The layer '{view.layer}' has no masks to draw: it is v1, or was called without a mask.")
    flow = np.where(np.isfinite(flow).all(axis=0), flow, 0)  # of offsets that are not finite nothing is drawn
    size = style.show(axes, style.grey(image, 0.6))
    (top, left), (down, right) = np.array(view.origin) - np.array(view.step) / 2, view.step
    extent = (left, left + right * flow.shape[2], top + down * flow.shape[1], top)
    if kind == "flow":
        length = np.hypot(*flow)
        longest = max(float(np.percentile(length, 99)), FAINT * min(view.step))
        colours = np.dstack([colour_wheel(flow), 0.75 * np.clip(length / longest, 0, 1)])
        drawn = axes.imshow(colours, extent=extent, zorder=1, interpolation="nearest")
        times = _arrows(axes, view, flow)
        if legend:
            _wheel_legend(axes, longest, times)
    else:
        values = np.asarray(getattr(view, kind), np.float64)
        top_value = float(np.max(values, initial=0, where=np.isfinite(values))) or 1.0
        highest = {"spread": top_value, "outside": 1.0, "mask": max(top_value, 2.0) if top_value > 1 else 1.0}[kind]
        alpha = np.full_like(values, 0.65) if kind == "mask" else 0.2 + 0.55 * np.clip(values / highest, 0, 1)
        alpha = np.where(np.isfinite(values), alpha, 0)
        drawn = axes.imshow(
            values, extent=extent, zorder=1, interpolation="nearest", alpha=alpha, vmin=0, vmax=highest,
            cmap=style.AMOUNT if kind == "mask" else style.HEAT,
        )  # fmt: skip
        if bar:
            style.add_bar(axes, drawn, LABELS[kind])
    style.limits(axes, size)
    return drawn


def colour_wheel(flow: Any) -> Any:
    """The colours (*S, 3), 0 to 1, of the directions of moves (2, *S), y before x, whatever their length."""
    anchors = np.array([[int(one[i : i + 2], 16) / 255 for i in (0, 2, 4)] for one in DIRECTIONS])
    turns = np.arctan2(flow[0], flow[1]) / (2 * np.pi) % 1 * len(anchors)  # from right, downwards
    whole = np.floor(turns).astype(int)
    weight = (turns - whole)[..., None]
    return (1 - weight) * anchors[whole % len(anchors)] + weight * anchors[(whole + 1) % len(anchors)]


def _arrows(axes: Axes, view: OffsetField, flow: Any) -> float:
    """Draw the mean flow of blocks of cells, some 16 along the longer side; return how many times too long arrows are."""
    every = max(1, round(max(flow.shape[1:]) / 16))
    rows, columns = (max(1, n // every) for n in flow.shape[1:])
    high, wide = (min(every, n) for n in flow.shape[1:])
    cut = flow[:, : rows * high, : columns * wide].reshape(2, rows, high, columns, wide)
    dy, dx = cut.mean(axis=(2, 4))
    y = view.origin[0] + view.step[0] * (np.arange(rows) * high + (high - 1) / 2)
    x = view.origin[1] + view.step[1] * (np.arange(columns) * wide + (wide - 1) / 2)
    longest = max(float(np.percentile(np.hypot(dy, dx), 95)), FAINT * min(view.step))
    times = 0.9 * every * min(view.step) / longest
    axes.quiver(
        x, y, dx, dy, angles="xy", scale_units="xy", scale=1 / times, units="inches", width=0.018, headwidth=4,
        headlength=4.5, minlength=0.5, color="white", zorder=3, path_effects=style.halo(1.8),
    )  # fmt: skip
    return times


def _wheel_legend(axes: Axes, longest: float, times: float) -> None:
    """Draw the colours of all directions beside the picture, and say how long arrows are."""
    inset = axes.inset_axes((1.03, 0.0, 0.17, 0.17))
    y, x = np.mgrid[-1:1:129j, -1:1:129j]
    length = np.hypot(y, x)
    shade = np.clip(length, 0, 1)[..., None]
    inset.imshow(np.dstack([0.5 + shade * (colour_wheel(np.stack([y, x])) - 0.5), length <= 1]), interpolation="bilinear")
    inset.set_axis_off()
    words: dict[str, Any] = {"fontsize": style.SMALL, "transform": inset.transAxes, "linespacing": 1.2}
    inset.text(0, 1.08, f"mean offset\nof a window:\nrim {longest:.2g} px", va="bottom", **words)
    inset.text(0, -0.08, f"arrows x {times:.2g}", va="top", **words)
