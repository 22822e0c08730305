"""One picture of everything that is to be seen at one unit of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from deformconv.errors import ShapeError
from deformconv.ops.window import by, n_of
from deformconv.plots import style
from deformconv.plots.draw_fields import draw_offset_field, draw_receptive_field, draw_saliency_region
from deformconv.plots.draw_points import draw_query_points, draw_sampling_locations, draw_unit_points
from deformconv.plots.fields import offset_field
from deformconv.plots.images import picture
from deformconv.plots.locations import sampling_locations
from deformconv.plots.query import query_points
from deformconv.plots.receptive import receptive_field
from deformconv.plots.saliency import saliency_region
from deformconv.plots.stack import call_and_before, unit_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from deformconv.plots.fields import OffsetField
    from deformconv.plots.stack import UnitPoints
    from deformconv.plots.trace import Call, Trace

__all__ = ["draw_look", "draw_view", "stack_depth"]

DEEPEST = 3  # layers whose paths are followed
MOST_PATHS = 6000  # more of them would hide the picture


def draw_look(
    trace: Trace,
    image: Any,
    layer: str,
    at: Sequence[float] | None = None,
    *,
    unit: Sequence[int] | None = None,
    index: int = 0,
) -> Figure:
    """Draw where a unit looks: its points through one and several layers, receptive field, and its layer's offsets.

    Args:
        trace: what `record` has seen: a forward pass with this picture, the first of its batch.
        image: the picture that the model got, in any form that `picture` takes.
        layer: a 2-D deformable layer's name.
        at: (y, x), a position in image pixels: the nearest unit is taken.
        unit: (row, column), the unit itself. Without `at` and `unit`: the unit nearest to the picture's middle.
        index: which call of the layer within the forward pass.

    Returns:
        A matplotlib Figure of 1200 pixels' width at 100 dots per inch; `style.save` or `savefig` writes it.

    Raises:
        ValueError: there is no such layer, unit or position.
        ShapeError: the layer is 1-D or 3-D, or the picture is no picture or of another size.

    Example:
        >>> import torch
        >>> from deformconv.plots import record
        >>> from deformconv.plots.overview import draw_look
        >>> from deformconv.torch import DeformConv2d
        >>> image, net = torch.rand(1, 3, 32, 48), DeformConv2d(3, 8, 3, padding=1)
        >>> with record(net) as trace:
        ...     _ = net(image)
        >>> draw_look(trace, image, "", at=(16, 10)).get_suptitle()
        'Where the model looks for its unit at y = 16, x = 10'
    """
    values = picture(image)
    call = trace[layer, index]
    shallow = unit_points(trace, layer, at, unit=unit, index=index)
    style.positions("view.points", shallow.points)
    if tuple(trace.size) != values.shape[:2]:
        raise ShapeError(
            f"`image` is {by(values.shape[:2])}, and the picture that was recorded {by(trace.size)}; expected the same picture."
        )
    place: dict[str, Any] = {"unit": shallow.unit, "index": index}
    depth = stack_depth(trace, layer, index)
    deep = unit_points(trace, layer, layers=depth, **place)
    field = receptive_field(trace, layer, **place)
    offsets = offset_field(trace, layer, index=index)
    height = float(np.clip(3.3 * values.shape[0] / values.shape[1], 2.4, 5.0))  # of a row; less has no room for the facts
    figure = style.new_figure(figsize=(12, 2 * height + 1.75), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    spots = np.concatenate([points for view in (shallow, deep) for points in (view.points, view.regular)])
    zoom = _zoom(values.shape[:2], shallow.at, spots)
    draw_unit_points(panels[0], values, shallow, zoom=zoom, legend=False)
    _caption(panels[0], "What the unit samples")
    if depth > 1:
        draw_unit_points(panels[1], values, deep, zoom=zoom, legend=False)
        _caption(panels[1], f"The same through {n_of(depth, 'layer')}: {n_of(int(deep.counts.sum()), 'path')}")
    else:
        draw_offset_field(panels[1], values, offsets, "outside" if offsets.mask is None else "mask")
        _caption(panels[1], "Samples outside of the map" if offsets.mask is None else "Mean mask of each window")
    draw_receptive_field(panels[2], values, field, legend=False)
    _caption(panels[2], f"Receptive field, radius {field.radius:.3g} px (circle)")
    draw_offset_field(panels[3], values, offsets, "flow")
    _caption(panels[3], "Where windows move: mean offset")
    draw_offset_field(panels[4], values, offsets, "spread")
    _caption(panels[4], "How windows change: spread of offsets")
    for axes in panels[2:5]:
        _draw_zoomed(axes, shallow.at, zoom)
    _draw_facts(panels[5], call, shallow, offsets, zoomed=0 if zoom is None else min(depth, 2))
    figure.suptitle(_title(call, shallow), fontsize=12)
    return figure


def draw_view(
    trace: Trace, image: Any, layer: str, at: Sequence[float], view: str, *, layers: int | None = None, progress: bool = True
) -> Figure:
    """Draw one view of a unit, with its legend: "points", "erf", "locations", "saliency", "flow"; or "all" of `draw_look`.

    Where what is drawn is small in the picture, it is drawn twice: in the whole picture, and larger beside that. `layers` is
    through how many deformable layers points go, and at which depth the layer is whose locations are drawn; by default as many
    as `stack_depth` says. `progress` is `saliency_region`'s.
    """
    attends = layer in trace.attention_layers
    if view == "all" and not attends:
        return draw_look(trace, image, layer, at)
    values = picture(image)
    draw, title, place, spots = _view(trace, layer, at, view, layers, progress)
    zoom = None if view == "flow" else _zoom(values.shape[:2], place, spots)
    width = 7.0 if zoom is None else 5.3
    height = float(np.clip(width * values.shape[0] / values.shape[1], 2.5, 9.0))
    figure = style.new_figure(figsize=(8 if zoom is None else 12, height + 1.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, 1 if zoom is None else 2, squeeze=False)[0]
    if zoom is None:
        draw(panels[0], values)
    else:
        draw(panels[0], values, legend=False, **({} if view == "saliency" or attends else {"bar": False}))
        _draw_zoomed(panels[0], place, zoom)
        draw(panels[1], values, zoom=zoom)
    figure.suptitle(title, fontsize=12)
    return figure


def _view(
    trace: Trace, layer: str, at: Sequence[float], view: str, layers: int | None, progress: bool
) -> tuple[Callable[..., Any], str, Any, Any]:
    """What draws a view over a picture, a title, the unit's position, and those that are to be seen."""
    name = f"layer {layer}" if layer else "the model"
    if layer in trace.attention_layers:
        return _attention_view(trace, layer, at, view, layers, name)
    unit = f"{name}'s unit at y = {at[0]:.4g}, x = {at[1]:.4g}"
    if view == "points":
        depth = stack_depth(trace, layer, 0) if layers is None else layers
        points = unit_points(trace, layer, at, layers=depth)
        title = f"What {unit} samples through {n_of(depth, 'deformable layer')}"
        return partial(_drawn, draw_unit_points, points), title, points.at, np.concatenate([points.points, points.regular])
    if view == "erf":
        field = receptive_field(trace, layer, at)
        title = f"Effective receptive field of {unit}: radius {field.radius:.3g} px"
        corners = np.array(field.centroid) + 1.5 * field.radius * np.array([[-1, -1], [1, 1]])
        return partial(_drawn, draw_receptive_field, field), title, field.at, corners
    if view == "locations":
        depth = stack_depth(trace, layer, 0) if layers is None else layers
        samples = sampling_locations(trace, layer, at, of=_layer_at(trace, layer, depth))
        title = f"Samples of {f'layer {samples.of}' if samples.of else 'the model'} that move {unit}"
        return partial(_drawn, draw_sampling_locations, samples), title, samples.at, samples.points
    if view == "saliency":
        region = saliency_region(trace, layer, at, progress=progress)
        title = f"What {unit} needs of the picture: {100 * region.share:.2g} %"
        return partial(_drawn, draw_saliency_region, region), title, region.at, np.argwhere(region.region)
    offsets = offset_field(trace, layer)
    return partial(_drawn, draw_offset_field, offsets), f"Mean offsets of the windows of {name}", at, ()


def _attention_view(
    trace: Trace, layer: str, at: Sequence[float], view: str, layers: int | None, name: str
) -> tuple[Callable[..., Any], str, Any, Any]:
    """The same of deformable attention, which has one view."""
    if view not in ("all", "points") or layers is not None:
        given = f"`view` is {view!r}" if view not in ("all", "points") else f"`layers` is {layers!r}"
        raise ValueError(
            f"{given}, and layer {layer!r} is deformable attention; expected the view 'points', of this layer alone: its "
            "samples belong to queries, and not to the units of a map."
        )
    points = query_points(trace, layer, at)
    title = (
        f"What {name}'s query at y = {points.at[0]:.4g}, x = {points.at[1]:.4g} samples in {n_of(len(points.sizes), 'level')}"
    )
    return partial(_drawn, draw_query_points, points), title, points.at, points.points


def _drawn(draw: Callable[..., Any], view: Any, axes: Axes, image: Any, **more: Any) -> Any:
    return draw(axes, image, view, **more)


def _layer_at(trace: Trace, layer: str, depth: int) -> str:
    """The layer at a depth of the stack that ends with a layer, which is at depth 1."""
    stack = call_and_before(trace, layer, 0)
    if len(stack) < depth:
        raise ValueError(f"`layers` is {depth}, and layer {layer!r} has {n_of(len(stack) - 1, 'deformable layer')} before it.")
    return stack[depth - 1].layer


def stack_depth(trace: Trace, layer: str, index: int) -> int:
    """Through how many layers to follow the unit's paths, so that they are not too many to be seen."""
    paths, depth = 1, 0
    for call in call_and_before(trace, layer, index)[:DEEPEST]:
        paths *= call.offset_groups * call.K
        if paths > MOST_PATHS and depth:
            break
        depth += 1
    return depth


def _zoom(size: tuple[int, int], at: Any, spots: Any) -> tuple[float, float] | None:
    """What to show around the unit: all spots, in the picture's proportions but no strip; None where it is most of it."""
    if len(spots) == 0:
        return None
    tall, wide = np.maximum(1.25 * np.percentile(np.abs(np.asarray(spots) - at), 98, axis=0), 8)
    shape = float(np.clip(size[0] / size[1], 0.6, 1.7))
    tall = max(float(tall), float(wide) * shape)
    wide = tall / shape
    return None if tall > 0.4 * size[0] and wide > 0.4 * size[1] else (tall, wide)


def _caption(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, loc="left", pad=5)


def _draw_zoomed(axes: Axes, at: Any, zoom: tuple[float, float] | None) -> None:
    """Draw the edge of what the first panels show."""
    from matplotlib.patches import Rectangle

    if zoom is not None:
        corner = at[1] - zoom[1], at[0] - zoom[0]
        looks: dict[str, Any] = {"edgecolor": "white", "linewidth": 1.0, "path_effects": style.halo(2.2)}
        axes.add_patch(Rectangle(corner, 2 * zoom[1], 2 * zoom[0], fill=False, zorder=6, **looks))


def _title(call: Call, view: UnitPoints) -> str:
    name = f"layer {call.layer}" if call.layer else "the model"
    times = f", call {call.index}" if call.index else ""
    y, x = view.at
    return f"Where {name}{times} looks for its unit at y = {y:.4g}, x = {x:.4g}"


def _draw_facts(axes: Axes, call: Call, view: UnitPoints, offsets: OffsetField, zoomed: int) -> None:
    """Say what the marks of all panels mean, of which the first `zoomed` show a part, and the numbers of the layer."""
    from matplotlib.lines import Line2D

    axes.set_axis_off()
    colour, how = (style.ORANGE, "") if offsets.mask is None else (style.GREEN, "; colour and size: how much it counts")
    handles = [
        style.sample("unit", "the unit that is asked about"),
        style.sample("dot", f"what it samples{how}", colour),
        style.sample("regular", "what a plain convolution samples"),
        style.line("circle of the effective receptive field's radius", "white", "--", 1.6),
    ]
    if zoomed:
        label = f"what the first {'picture shows' if zoomed == 1 else 'two pictures show'}"
        square: dict[str, Any] = {"marker": "s", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "white"}
        handles.append(Line2D([], [], linestyle="none", label=label, path_effects=style.halo(2.2), **square))
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.02, 1), "borderaxespad": 0}
    axes.legend(handles=handles, frameon=False, fontsize=9.5, handlelength=2, **place)
    moved, spread = float(np.hypot(*offsets.flow).mean()), float(offsets.spread.mean())
    lines = [
        f"{by(call.kernel_size)} taps, stride {by(call.stride)}, dilation {by(call.dilation)}, "
        f"{n_of(call.offset_groups, 'offset group')}",
        f"unit ({view.unit[0]}, {view.unit[1]}) of {by(call.output_size)}, "
        f"{offsets.step[0]:.3g} x {offsets.step[1]:.3g} image pixels apart",
        f"offsets, mean over units: move {moved:.3g} px, spread {spread:.3g} px",
        f"samples outside of the map: {100 * float(offsets.outside.mean()):.2g} %",
        "no masks (v1)" if offsets.mask is None else f"mean mask: {float(offsets.mask.mean()):.3g}",
    ]
    axes.text(0, 0.02, "\n".join(lines), fontsize=9.5, va="bottom", linespacing=1.7, transform=axes.transAxes)
