"""Where one query of deformable attention samples the image, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deformconv.ops.window import by, integers, n_of
from deformconv.plots.stack import check_trace

if TYPE_CHECKING:
    from deformconv.plots.trace import AttentionCall, Trace

__all__ = ["QueryPoints", "query_points"]

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class QueryPoints:
    """Where a query samples; positions in image pixels (the first pixel's centre is 0), y before x.

    Attributes:
        layer: the layer's name.
        query: the number of the query.
        at: (2,), its reference point, the mean over levels; where that is not known the weighted mean of its points.
        box: (top, left, bottom, right) of its reference box; None where the reference is a point or not known.
        points: (M, 2), float64: the positions, in order of head, level and point.
        weights: (M,), float64: the factors of the samples.
        heads, levels: (M,): whose head each is, and in which level it samples.
        sizes: the (height, width) of each level.
    """

    layer: str
    query: int
    at: tuple[float, float]
    box: tuple[float, float, float, float] | None
    points: Array
    weights: Array
    heads: Numbers
    levels: Numbers
    sizes: tuple[tuple[int, int], ...]


def query_points(
    trace: Trace,
    layer: str,
    at: Sequence[float] | None = None,
    *,
    query: int | None = None,
    head: int | None = None,
    level: int | None = None,
    image: int = 0,
    index: int | None = None,
    size: int | Sequence[int] | None = None,
) -> QueryPoints:
    """The points of the image that a query of deformable attention samples, in all levels of the pyramid.

    Every level covers the whole picture: a location u of a level lies at u times the picture's size, less half a pixel. Points
    outside of the picture sample zeros. Points that are not finite are left out.

    Args:
        trace: what `record` has seen.
        layer: the name of a layer of attention.
        at: (y, x), a position in image pixels: the query with the nearest reference point is taken, the first of several.
        query: the number of the query instead. With neither, the query nearest to the picture's middle.
        head: one head, whose points alone are taken; None takes all.
        level: one level, the same.
        image: which image of the batch.
        index: which call of the layer within the forward pass; None takes the last.
        size: (height, width) of the picture, for a layer that was recorded by itself; None takes the recorded picture's.

    Returns:
        QueryPoints.

    Raises:
        ValueError: there is no such layer of attention, query, head, level or image; both `at` and `query` are passed; the
            model was called with no picture, and there is no `size`.
        TypeError: `trace` is none.

    Example:
        >>> import torch
        >>> from deformconv.plots import query_points, record
        >>> from deformconv.torch import DeformAttention
        >>> layer, levels = DeformAttention(32, num_levels=2), [(8, 12), (4, 6)]
        >>> query, value = torch.rand(1, 50, 32), torch.rand(1, 120, 32)
        >>> with record(layer) as trace:
        ...     _ = layer(query, torch.rand(1, 50, 1, 2), value, levels)
        >>> view = query_points(trace, "", query=7, size=(64, 96))
        >>> view.points.shape, round(float(view.weights.sum()), 3)      # 8 heads, 2 levels, 4 points; each head's weights are 1
        ((64, 2), 8.0)

    Paper: arXiv 2010.04159, figure 3.
    """
    check_trace(trace)
    call = trace.attention(layer, index)
    _check("image", image, call.weights.shape[0], call)
    pixels = np.array(_size(trace, call) if size is None else integers("size", size, 2, 1), np.float64)
    locations, weights = (tensor[image].double().cpu().numpy() for tensor in (call.locations, call.weights))
    points = locations[..., ::-1] * pixels - 0.5  # (Q, heads, levels, points, 2), y before x
    if at is not None and query is not None:
        raise ValueError("`at` and `query` were both passed; expected one of them, or none for the picture's middle.")
    references = _references(call, image, points, weights, pixels)
    if query is None:
        query = _nearest(references, (pixels - 1) / 2 if at is None else at, pixels)
    _check("query", query, len(points), call)
    _, heads, levels, number = weights.shape
    for name, value, count in (("head", head, heads), ("level", level, levels)):
        if value is not None:
            _check(name, value, count, call)
    which = np.indices((heads, levels, number)).reshape(3, -1)
    here, weight = points[query].reshape(-1, 2), weights[query].reshape(-1)
    kept = np.isfinite(here).all(1)
    for value, axis in ((head, which[0]), (level, which[1])):
        kept &= value is None or axis == value
    y, x = map(float, references[query])
    box = _box(call, image, query, pixels)
    return QueryPoints(layer, int(query), (y, x), box, here[kept], weight[kept], which[0][kept], which[1][kept], call.levels)


def _size(trace: Trace, call: AttentionCall) -> tuple[int, ...]:
    """The recorded picture's size."""
    finest = max(call.levels)
    if any(one < other for one, other in zip(trace.size, finest, strict=True)):
        raise ValueError(
            f"what the model was called with has no picture: its first tensor with as many axes is {by(trace.size)} pixels "
            f"large, and the finest level of layer {call.layer!r} {by(finest)}. Expected a model that is called with a "
            "picture, or `size`, (height, width) of the picture that the levels cover."
        )
    return trace.size


def _references(call: AttentionCall, image: int, points: Array, weights: Array, pixels: Array) -> Array:
    """The queries' reference points in image pixels, (Q, 2), y before x."""
    if call.reference is not None:
        reference = call.reference[image, ..., :2].double().cpu().numpy().mean(1)  # (Q, 2), the mean over levels
        return np.asarray(reference[:, ::-1] * pixels - 0.5)
    total = weights.sum((1, 2, 3))[:, None]
    return np.asarray((points * weights[..., None]).sum((1, 2, 3)) / np.where(total == 0, 1, total))


def _box(call: AttentionCall, image: int, query: int, pixels: Array) -> tuple[float, float, float, float] | None:
    """A query's reference box in image pixels."""
    if call.reference is None or call.reference.shape[-1] != 4:
        return None
    x, y, width, height = call.reference[image, query].double().mean(0).tolist()
    corners = np.array([[y - height / 2, x - width / 2], [y + height / 2, x + width / 2]]) * pixels - 0.5
    top, left, bottom, right = map(float, corners.ravel())
    return top, left, bottom, right


def _nearest(references: Array, at: Any, pixels: Array) -> int:
    """The query whose reference point is nearest to a position."""
    try:
        position = np.asarray(at, np.float64)
    except (TypeError, ValueError):
        position = np.empty(0)
    if position.shape != (2,):
        raise ValueError(f"`at` is {at!r}; expected 2 numbers, (y, x).")
    if not ((position >= -0.5) & (position <= pixels - 0.5)).all():
        height, width = map(int, pixels)
        raise ValueError(f"`at` is {tuple(at)}, outside the image of {height} x {width} pixels; its first pixel is at 0.")
    distance = np.square(references - position).sum(1)
    return int(np.argmin(np.where(np.isnan(distance), np.inf, distance)))


def _check(name: str, value: Any, count: int, call: AttentionCall) -> None:
    if not (isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < count):
        raise ValueError(f"`{name}` is {value!r}; layer {call.layer!r} was called with {n_of(count, name)}, counted from 0.")
