"""Where one unit samples the image, through one deformable layer or a stack of them, as numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deformconv.ops.window import count, n_of

if TYPE_CHECKING:
    from deformconv.plots.recording import Call, Trace

__all__ = [
    "UnitPoints", "call_and_before", "check_trace", "checked_group", "checked_image", "of_the_last_pass", "offsets_and_masks",
    "sampled_map", "unit_points",
]  # fmt: skip

Array = npt.NDArray[np.float64]

MOST = 2_000_000  # paths: with everything that is computed on the way, about 400 MB in 3-D
NEAR = 1e-6  # pixels: closer points are one, and a cell so close to a whole number is that number


@dataclass(frozen=True, eq=False)
class UnitPoints:
    """Where a unit samples; positions in image pixels (the first pixel's centre is 0), y before x.

    Attributes:
        layers: names of the layers that were passed, the unit's own first.
        unit: the unit, a cell of the first layer's output.
        at: (D,), the middle of its undeformed window.
        points: (M, D), float64: the positions.
        weights: (M,), float64: the product of masks along the path to a point, and of the share of its samples that lie
            inside of the maps; summed over the paths that end there.
        counts: (M,), int64: how many paths end there.
        regular: (R, D), the points of the plain convolutions: offsets 0.
        regular_weights: (R,), the weights there: masks 1.
    """

    layers: tuple[str, ...]
    unit: tuple[int, ...]
    at: tuple[float, ...]
    points: Array
    weights: Array
    counts: npt.NDArray[np.int64]
    regular: Array
    regular_weights: Array


def unit_points(
    trace: Trace,
    layer: str,
    at: Sequence[float] | None = None,
    *,
    unit: Sequence[int] | None = None,
    layers: int = 1,
    image: int = 0,
    offset_group: int | None = None,
    scale: float = 1.0,
    index: int = 0,
) -> UnitPoints:
    """The points of the image that an output unit samples, through its layer and the deformable layers before it.

    Through 1, 2, 3 layers of 3x3 taps there are 9, 81, 729 paths, each of which ends at a point; points that coincide, to
    1e-6 pixels, are merged. A sample of one layer is a position on the output map of the layer before. Where it lies between
    that map's units it takes the samples of its (up to 2^D) neighbours, averaged with the weights of linear interpolation: the
    regular window there, moved by the interpolated offsets, with the interpolated masks. A neighbour outside of the map has
    weight 0, so that the average is over those inside, and the path's weight shrinks to their share; a path that has no
    neighbour inside ends there and is not counted. After the last layer every path keeps its point, also outside of the image;
    its weight is multiplied by the share of the sample's neighbours that lie on the layer's input map, 0 in the padding
    (unless the padding is of another mode than zeros, and so belongs to the map). A path whose offsets are not finite is left
    out.

    What lies between two layers is taken for the pixels that it moves by (see `Trace.geometry`), not for what it mixes.

    Args:
        trace: what `record` has seen.
        layer: the unit's layer.
        at: (D,), a position in image pixels, y before x: the nearest unit is taken.
        unit: (D,), the unit itself, a cell of the layer's output. Without `at` and `unit`: the unit nearest to the middle.
        layers: how many deformable layers to pass, this one included.
        image: which image of the batch.
        offset_group: an offset group of `layer`, of which alone the samples are taken; None takes all. Of the layers before,
            whose channels are mixed by then, all are taken.
        scale: offsets are multiplied by it: 0 shows plain convolutions, with the masks as they are.
        index: which call of the layer within the forward pass.

    Returns:
        UnitPoints.

    Raises:
        ValueError: there are fewer deformable layers before this one, or no such image, group or position; there are more
            than 2 million paths; `scale` is not finite.
        TypeError: `trace` is none.

    Example:
        >>> import torch
        >>> from deformconv.plots import record, unit_points
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(DeformConv2d(3, 8, 3, padding=1), DeformConv2d(8, 8, 3, padding=1))
        >>> with record(net) as trace:
        ...     _ = net(torch.rand(1, 3, 32, 32))
        >>> view = unit_points(trace, "1", at=(16, 10), layers=2)  # offsets of new layers are 0
        >>> view.layers, view.points.shape, view.counts.sum().item()
        (('1', '0'), (25, 2), 81)

    Paper: v1, arXiv 1703.06211, figure 6.
    """
    check_trace(trace)
    chain = _chain(trace, layer, index, count("layers", layers))
    image = checked_image(chain[0], image)
    group = checked_group(chain[0], offset_group)
    if not isfinite(scale):
        raise ValueError(f"`scale` is {scale!r}; expected a finite number, 1 for the offsets as they are.")
    groups = [call.offset_groups for call in chain]
    if group is not None:
        groups[0] = 1
    _check_paths(chain, groups)
    place = trace.unit(layer, at, unit, index)
    offsets, masks = [], []
    for call in chain:
        taken = slice(None) if group is None or call is not chain[0] else slice(group, group + 1)
        offset, mask = offsets_and_masks(call, image)
        offsets.append(scale * offset[taken])
        masks.append(None if mask is None else mask[taken])
    none = [None] * len(chain)
    points, weights, counts = _merged(*_ends(trace, chain, place, offsets, masks))
    regular, regular_weights, _ = _merged(*_ends(trace, chain, place, none, none))
    middle = trace.output_geometry(layer, index).to_image(np.array(place, np.float64))
    return UnitPoints(
        tuple(call.layer for call in chain), place, tuple(map(float, middle)),
        points, weights, counts, regular, regular_weights * prod(groups),
    )  # fmt: skip


def check_trace(trace: Any) -> None:
    """Raise TypeError for what `record` has not made: the model itself, or what `deformconv.look` returned, as examples."""
    if not hasattr(trace, "output_geometry"):
        hint = " It has one: pass its `trace`." if hasattr(trace, "trace") else ""
        raise TypeError(
            f"`trace` is of type {type(trace).__name__}; expected what deformconv.plots.record yields, as in "
            f"`with record(model) as trace: model(x)`.{hint}"
        )


def checked_image(call: Call, image: Any) -> int:
    """The number of an image of the batch; ValueError if there is none."""
    batch = len(call.offset)
    if not (isinstance(image, (int, np.integer)) and 0 <= image < batch):
        raise ValueError(f"`image` is {image!r}; layer {call.layer!r} was called with {n_of(batch, 'image')}, counted from 0.")
    return int(image)


def checked_group(call: Call, offset_group: Any) -> int | None:
    """The number of an offset group, or None for all; ValueError if there is none."""
    if offset_group is not None and not (
        isinstance(offset_group, (int, np.integer)) and 0 <= offset_group < call.offset_groups
    ):
        raise ValueError(
            f"`offset_group` is {offset_group!r}; layer {call.layer!r} has {n_of(call.offset_groups, 'offset group')}, counted "
            "from 0. None takes them all."
        )
    return None if offset_group is None else int(offset_group)


def offsets_and_masks(call: Call, image: int) -> tuple[Array, Array | None]:
    """An image's offsets (G, K, D, *O) and masks (G, K, *O), as float64; offsets that are not finite are NaN."""
    shape = call.offset_groups, call.K
    offset = call.offset[image].double().cpu().numpy().reshape(*shape, call.D, *call.output_size)
    offset = np.where(np.isfinite(offset), offset, np.nan)  # NumPy warns of inf - inf, and not of NaN
    mask = None if call.mask is None else call.mask[image].double().cpu().numpy().reshape(*shape, *call.output_size)
    return offset, mask


def sampled_map(call: Call) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a call's samples read: padding that is not zeros is read as the map is. Where the map begins in it, and its size."""
    if call.padding_mode == "zeros":
        return (0,) * call.D, call.input_size
    padded = tuple(size + sum(pair) for size, pair in zip(call.input_size, call.padding, strict=True))
    return tuple(before for before, _ in call.padding), padded


def _chain(trace: Trace, layer: str, index: int, layers: int) -> list[Call]:
    """The calls to pass, the unit's own first."""
    chain = call_and_before(trace, layer, index)
    if len(chain) < layers:
        names = ", ".join(repr(call.layer) for call in chain[1:]) or "none"
        raise ValueError(
            f"`layers` is {layers}; layer {layer!r} has {n_of(len(chain) - 1, 'deformable layer')} before it that its "
            f"samples come from ({names}): expected at most {len(chain)}."
        )
    return chain[:layers]


def call_and_before(trace: Trace, layer: str, index: int) -> list[Call]:
    """A call of a layer, and the deformable calls before it through which it sees the image, the nearest first."""
    return [trace[key] for key in ((layer, index), *trace.before(layer, index))]


def of_the_last_pass(calls: Sequence[Call]) -> list[Call]:
    """Those of some calls that belong to the last forward pass."""
    last = max(call.forward for call in calls)
    return [call for call in calls if call.forward == last]


def _check_paths(chain: Sequence[Call], groups: Sequence[int]) -> None:
    """Raise ValueError beyond the number of paths that fits in memory."""
    each = [number * call.K for number, call in zip(groups, chain, strict=True)]
    if prod(each) > MOST:
        raise ValueError(
            f"`layers` is {len(chain)}: {' x '.join(map(str, each))} = {prod(each)} paths; expected at most {MOST}. Pass fewer "
            "layers or, where the layer has several, one `offset_group`."
        )


def _ends(
    trace: Trace,
    chain: Sequence[Call],
    unit: tuple[int, ...],
    offsets: Sequence[Array | None],
    masks: Sequence[Array | None],
) -> tuple[Array, Array]:
    """Where the paths end: image pixels (M, D) and weights (M,)."""
    pixels = trace.output_geometry(chain[0].layer, chain[0].index).to_image(np.array([unit], np.float64))
    weights = np.ones(1)
    for call, offset, mask in zip(chain, offsets, masks, strict=True):
        units = trace.output_geometry(call.layer, call.index).to_cells(pixels)
        whole = np.rint(units)
        samples, weights = _samples(call, np.where(abs(units - whole) < NEAR, whole, units), weights, offset, mask)
        pixels = trace.geometry(call.layer, call.index).to_image(samples)
    before, size = sampled_map(call)
    return pixels, weights * _inside(samples + before, size)


def _samples(call: Call, units: Array, weights: Array, offset: Array | None, mask: Array | None) -> tuple[Array, Array]:
    """The input cells (M*G*K, D) that positions of the output (M, D) read, and their weights; None: offsets 0, masks 1."""
    D, K, size = call.D, call.K, call.output_size
    share = _inside(units, size)
    seen = share > 0
    units, weights, share = units[seen], weights[seen], share[seen]
    groups = 1 if offset is None else len(offset)
    moved = np.zeros((len(units), groups, K, D))
    masked = np.zeros((len(units), groups, K))
    for place, weight in _neighbours(units, size):
        here = weight > 0
        at = (..., *place[here].T)
        if offset is not None:
            moved[here] += (weight / share)[here, None, None, None] * np.moveaxis(offset[at], -1, 0)
        masked[here] += weight[here, None, None] * (1 if mask is None else np.moveaxis(mask[at], -1, 0))
    # The neighbours inside, averaged alone, stand at the nearest position on the map.
    base = np.clip(units, 0, np.array(size) - 1) * call.stride - [before for before, _ in call.padding]
    taps = np.stack(np.unravel_index(np.arange(K), call.kernel_size), 1) * call.dilation  # (K, D)
    samples = (base[:, None, None] + taps + moved).reshape(-1, D)
    weights = (weights[:, None, None] * masked).reshape(-1)
    finite = np.isfinite(samples).all(1)
    return samples[finite], weights[finite]


def _inside(cells: Array, size: tuple[int, ...]) -> Array:
    """The share of each position's neighbours that are on the map, by their weights: (M, D) -> (M,)."""
    return sum((weight for _, weight in _neighbours(cells, size)), np.zeros(len(cells)))


def _neighbours(cells: Array, size: tuple[int, ...]) -> Iterator[tuple[npt.NDArray[np.intp], Array]]:
    """The units around each position (M, D) and their weights (M,) in linear interpolation, 0 outside of the map."""
    low = np.floor(cells)
    fraction = cells - low
    for corner in product((0, 1), repeat=len(size)):
        place = low + corner
        inside = ((place >= 0) & (place < size)).all(1)
        weight = np.where(corner, fraction, 1 - fraction).prod(1)
        yield np.clip(place, 0, np.array(size) - 1).astype(np.intp), np.where(inside, weight, 0)


def _merged(points: Array, weights: Array) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """Points that coincide as one, with the sum of their weights and their number."""
    places = np.empty(points.shape, np.int64)
    for axis, values in enumerate(points.T):
        # Rounding would tear points apart that lie on two sides of the middle between two rounded numbers.
        order = np.argsort(values)
        places[order, axis] = np.cumsum(np.diff(values[order], prepend=-np.inf) > NEAR)
    _, first, which, counts = np.unique(places, axis=0, return_index=True, return_inverse=True, return_counts=True)
    summed = np.bincount(which.reshape(-1), weights, len(first)).astype(np.float64)  # integers where there are no points
    return points[first], summed, counts.astype(np.int64)
