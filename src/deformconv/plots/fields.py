"""The offsets of whole layers, as numbers: how they flow and spread over the map, and what they are on the average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deformconv.ops.window import axis_name
from deformconv.plots.points import regular_points
from deformconv.plots.stack import check_trace, checked_group, checked_image, of_the_last_pass, offsets_and_masks, sampled_map

if TYPE_CHECKING:
    from deformconv.plots.recording import Call, Trace

__all__ = ["LayerOffsets", "OffsetField", "OffsetStatistics", "offset_field", "offset_statistics", "outside"]

Array = npt.NDArray[np.float64]

BINS = 20  # of the masks' histogram


@dataclass(frozen=True, eq=False)
class OffsetField:
    """A layer's offsets at every unit of its output (*O); lengths in image pixels, y before x.

    Attributes:
        layer: its name.
        flow: (D, *O), float64: the mean offset of the window's taps, by which the window moves as a whole.
        spread: (*O), float64: root mean square distance of the taps' offsets from that mean, by which it changes its form.
        outside: (*O), float64: the share of its samples that read nothing of the map, from 0 to 1.
        mask: (*O), float64: the mean of its masks; None for a layer without.
        at: (*O, D), float64: the image position of each unit, which is `origin + step*unit`.
        origin, step: (D,), of these positions.
    """

    layer: str
    flow: Array
    spread: Array
    outside: Array
    mask: Array | None
    at: Array
    origin: tuple[float, ...]
    step: tuple[float, ...]


@dataclass(frozen=True)
class LayerOffsets:
    """The offsets of one call of a layer, over all images, units, taps and offset groups.

    Attributes:
        layer, index: which call.
        mean: (D,), the mean offset in input pixels of the layer, y before x.
        deviation: root mean square distance of the offsets from their mean, input pixels.
        largest: the largest |offset| along any axis, input pixels: what `max_offset` bounds.
        mean_image, deviation_image, largest_image: the same in image pixels; None where the map's place there is unknown.
        outside: the share of the samples that read nothing of the map, from 0 to 1.
        outside_regular: that share with all offsets 0: the taps in the padding.
        mask_mean: the mean of the masks; None for a layer without.
        mask_histogram: how many masks lie in each bin, and the bins' edges, one more; None for a layer without masks.
    """

    layer: str
    index: int
    mean: tuple[float, ...]
    deviation: float
    largest: float
    mean_image: tuple[float, ...] | None
    deviation_image: float | None
    largest_image: float | None
    outside: float
    outside_regular: float
    mask_mean: float | None
    mask_histogram: tuple[tuple[int, ...], tuple[float, ...]] | None


@dataclass(frozen=True)
class OffsetStatistics:
    """A row for each deformable layer, in the order of the net; it prints as a table.

    Attributes:
        rows: tuple of LayerOffsets.
    """

    rows: tuple[LayerOffsets, ...]

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as dictionaries, for a table of another library or a file."""
        return [asdict(row) for row in self.rows]

    def __repr__(self) -> str:
        if not self.rows:
            return "no deformable layers"
        D = max(len(row.mean) for row in self.rows)
        heads = [
            "layer",
            *(f"mean {axis_name(axis, D)}" for axis in range(D)),
            *("deviation", "largest", "outside", "regular", "mask"),
        ]
        lines = [heads, *(_cells(row, D) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
        return "\n".join(["Offsets in the layer's input pixels (in image pixels); regular: outside without offsets.", *table])


def _cells(row: LayerOffsets, D: int) -> list[str]:
    """A line of the table."""
    name = row.layer or "(the model)"
    in_image = row.mean_image or (None,) * len(row.mean)
    means = [_length(*pair, "+") for pair in zip(row.mean, in_image, strict=True)]
    return [
        f"{name}, call {row.index}" if row.index else name,
        *[""] * (D - len(means)),
        *means,
        _length(row.deviation, row.deviation_image),
        _length(row.largest, row.largest_image),
        f"{row.outside:.1%}",
        f"{row.outside_regular:.1%}",
        "none" if row.mask_mean is None else f"{row.mask_mean:.3f}",
    ]


def _length(cells: float, pixels: float | None, sign: str = "") -> str:
    return f"{cells:{sign}.2f}" + ("" if pixels is None else f" ({pixels:{sign}.1f})")


def offset_field(trace: Trace, layer: str, *, image: int = 0, offset_group: int | None = None, index: int = 0) -> OffsetField:
    """A layer's offsets at every unit: where its windows move to, how they change their form, what they miss of the map.

    Args:
        trace: what `record` has seen.
        layer: the layer's name.
        image: which image of the batch.
        offset_group: one offset group; None takes the means over all of them.
        index: which call of the layer within the forward pass.

    Returns:
        OffsetField.

    Raises:
        ValueError: there is no such layer, image or offset group.
        TypeError: `trace` is none.

    Example:
        >>> import torch
        >>> from deformconv.plots import offset_field, record
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), DeformConv2d(8, 8, 3, padding=1))
        >>> _ = torch.nn.init.constant_(net[1].offset_conv.bias[1:18:2], 1.5)  # of a fresh layer: every dx
        >>> with record(net) as trace:
        ...     _ = net(torch.rand(1, 3, 32, 40))
        >>> field = offset_field(trace, "1")
        >>> field.flow[:, 8, 10].tolist(), field.at[8, 10].tolist()  # in image pixels, of which a step is 2
        ([0.0, 3.0], [16.0, 20.0])
    """
    check_trace(trace)
    call = trace[layer, index]
    image, group = checked_image(call, image), checked_group(call, offset_group)
    offset, mask = offsets_and_masks(call, image)  # (G, K, D, *O), (G, K, *O)
    if group is not None:
        offset, mask = offset[[group]], None if mask is None else mask[[group]]
    units = trace.output_geometry(layer, index)
    step = np.reshape(trace.geometry(layer, index).step, (-1, *(1,) * call.D))  # (D, 1, ...)
    flow = offset.mean((0, 1)) * step
    at = units.to_image(np.moveaxis(np.indices(call.output_size, np.float64), 0, -1))
    return OffsetField(
        layer=layer,
        flow=flow,
        spread=np.sqrt(np.square(offset * step - flow).sum(2).mean((0, 1))),
        outside=outside(call, offset).mean((0, 1)),
        mask=None if mask is None else mask.mean((0, 1)),
        at=at,
        origin=tuple(map(float, units.origin)),
        step=tuple(map(float, units.step)),
    )


def offset_statistics(trace: Trace) -> OffsetStatistics:
    """What the offsets and masks of every deformable layer are on the average, over all images of the last forward pass.

    Args:
        trace: what `record` has seen.

    Returns:
        OffsetStatistics.

    Raises:
        ValueError: nothing was recorded, or deformable attention alone.
        TypeError: `trace` is none.

    Example:
        >>> import torch
        >>> from deformconv.plots import offset_statistics, record
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), DeformConv2d(8, 8, 3, padding=1))
        >>> with record(net) as trace:
        ...     _ = net(torch.rand(4, 3, 32, 32))
        >>> offset_statistics(trace)
        Offsets in the layer's input pixels (in image pixels); regular: outside without offsets.
        layer   mean height    mean width   deviation     largest  outside  regular   mask
        1      +0.00 (+0.0)  +0.00 (+0.0)  0.00 (0.0)  0.00 (0.0)     8.2%     8.2%  1.000
    """
    check_trace(trace)
    if not trace.calls and trace.attentions:
        raise ValueError(
            "only deformable attention was recorded, which has no offsets of a window; expected a trace of deformable layers. "
            "query_points(trace, layer) has what attention samples."
        )
    if not trace.calls:
        raise ValueError("nothing was recorded; expected a trace within whose `with record(model)` the model was called.")
    calls: dict[tuple[str, int], list[Call]] = {}
    for call in of_the_last_pass(trace.calls):  # DataParallel's replicas have a part of the images each
        calls.setdefault((call.layer, call.index), []).append(call)
    return OffsetStatistics(tuple(_row(trace, each) for each in calls.values()))


def _row(trace: Trace, calls: Sequence[Call]) -> LayerOffsets:
    call = calls[0]
    parts = [offsets_and_masks(each, image) for each in calls for image in range(len(each.offset))]
    offset = np.stack([part for part, _ in parts])  # (N, G, K, D, *O)
    masks = [part for _, part in parts if part is not None]
    over = tuple(axis for axis in range(offset.ndim) if axis != 3)
    mean, variance, largest = offset.mean(over), offset.var(over), np.abs(offset).max(over)
    try:
        step = np.array(trace.geometry(call.layer, call.index).step)
    except ValueError:  # its place in the image is unknown
        step = None
    mask = np.stack(masks) if masks else None
    return LayerOffsets(
        layer=call.layer,
        index=call.index,
        mean=tuple(mean.tolist()),
        deviation=sqrt(variance.sum()),
        largest=float(largest.max()),
        mean_image=None if step is None else tuple((mean * step).tolist()),
        deviation_image=None if step is None else sqrt((variance * step**2).sum()),
        largest_image=None if step is None else float((largest * step).max()),
        outside=float(outside(call, offset).mean()),
        outside_regular=float(outside(call, np.zeros((1,) * (1 + call.D))).mean()),
        mask_mean=None if mask is None else float(mask.mean()),
        mask_histogram=None if mask is None else _histogram(mask),
    )


def _histogram(mask: Array) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Counts and edges of equal bins over what masks can be: 0 to 1 or to 2, or as far as they go."""
    values = mask[np.isfinite(mask)]
    low, high = min(0.0, values.min(initial=0.0)), values.max(initial=0.0)
    counts, edges = np.histogram(values, BINS, (low, max(1.0, np.ceil(high)) if high <= 2 else high))
    return tuple(counts.tolist()), tuple(edges.tolist())


def outside(call: Call, offset: Array) -> npt.NDArray[np.bool_]:
    """Which samples read nothing of the map: (..., K, D, *O) -> (..., K, *O)."""
    regular = regular_points(
        call.output_size, call.kernel_size, stride=call.stride, padding=call.padding, dilation=call.dilation
    )
    before, sizes = (np.reshape(numbers, (-1, *(1,) * call.D)) for numbers in sampled_map(call))
    position = regular + offset + before
    inside = (position > -1) & (position < sizes)  # and so is no position that is NaN
    result: npt.NDArray[np.bool_] = ~inside.all(-1 - call.D)
    return result
