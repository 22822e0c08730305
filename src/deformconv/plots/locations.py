"""Effective sampling locations: how much each sample of a deformable layer counts for one unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deformconv.plots.gradients import Sums, check_channels, check_finite, differentiable, gradients, sums_of, unit_response
from deformconv.plots.observe import AggregateWindow, Event
from deformconv.plots.points import sampling_points
from deformconv.plots.rerun import Probe
from deformconv.plots.stack import check_trace
from deformconv.plots.trace import Trace

__all__ = ["SamplingLocations", "sampling_locations"]

Values = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class SamplingLocations:
    """What `sampling_locations` returns: M samples, in order of unit, offset group and tap. Axes go depth, height, width.

    Attributes:
        layer: the name of the unit's layer.
        of: the name of the deformable layer whose samples these are.
        unit: the output unit of `layer`, a cell.
        at: the middle of its undeformed window, image pixels.
        points: (M, D) where the samples lie, image pixels.
        strength: (M,) how much the unit's channels change when a sample moves: the root mean square over channels of the length
            of the gradient; response per image pixel, above 0.
        tap: (M,) number of the sample's tap, row-major.
        group: (M,) number of its offset group.
        units: (M, D) the output unit of `of` that takes the sample, a cell.
    """

    layer: str
    of: str
    unit: tuple[int, ...]
    at: tuple[float, ...]
    points: Values
    strength: Values
    tap: Numbers
    group: Numbers
    units: Numbers

    def __repr__(self) -> str:
        at = ", ".join(f"{x:.1f}" for x in self.at)
        strongest = f", strength up to {self.strength.max():.3g} per px" if len(self.strength) else ""
        return (
            f"SamplingLocations of layer {self.layer!r}, unit {self.unit} at image pixel ({at}): {len(self.points)} samples of "
            f"layer {self.of!r}{strongest}"
        )


def sampling_locations(
    trace: Trace,
    layer: str,
    at: Sequence[float] | None = None,
    *,
    unit: Sequence[int] | None = None,
    of: str | None = None,
    channels: int = 16,
    image: int = 0,
    index: int = 0,
    seed: int = 0,
) -> SamplingLocations:
    """The gradient of a unit's response with respect to where a deformable layer samples: which of its samples count.

    The model runs again on the recorded image, in evaluation mode, up to the layer; offsets may be predicted or passed. Each
    sample is moved by itself, with everything else as it is. At whole positions, as zero offsets make them, interpolation has a
    bend, and the derivative is that towards larger coordinates.

    Args:
        trace: from `record`.
        layer: name of any module of the model that returns a map (N, C, *O).
        at: a position in the image, pixels, (y, x): the nearest unit is taken.
        unit: an output cell, (row, column), instead. With neither, the unit nearest to the image's middle.
        of: name of the deformable layer whose samples are asked for: `layer`, or one before it; its last call that the unit
            depends on. Without a name it is `layer`, if that is deformable, else the last before it.
        channels: up to so many channels have their gradients computed one by one. Of a unit with more, the mean square over
            channels is estimated from so many sums with random signs; its relative standard deviation is at most
            sqrt(2 / channels).
        image: which image of the recorded batch.
        index: which call of `layer` in a forward pass.
        seed: of the random signs.

    Returns:
        SamplingLocations: every sample that moves the unit, its place in image pixels and its strength.

    Raises:
        ValueError: there is no such layer, unit, image or position; the unit depends on no call of `of`; there is no gradient,
            or it is not finite.
        TypeError: `trace` is none.

    Example:
        >>> import torch
        >>> from deformconv.plots import sampling_locations
        >>> from deformconv.plots import record
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(DeformConv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1))
        >>> with record(net) as trace:
        ...     y = net(torch.rand(1, 3, 32, 48))
        >>> sampling_locations(trace, "0", at=(10, 20)).points.shape    # the unit's own taps
        (9, 2)
        >>> sampling_locations(trace, "1", at=(10, 20)).points.shape    # those of nine units
        (81, 2)

    Paper: DCNv2, arXiv 1811.11168, section 2.1.
    """
    check_trace(trace)
    channels = check_channels(channels)
    cell = trace.unit(layer, at, unit, index)
    if of is not None:
        trace[of]
    calls: list[_Seen] = []
    with differentiable():
        probe = Probe(trace, layer, index, image)
        features = probe.features(probe.image.requires_grad_(), lambda event: calls.append(_seen(event, calls)))
        response = unit_response(features, cell)
        seen = _chosen(response, calls, layer, of)
        geometry = trace.geometry(seen.name, seen.number)
        sums = sums_of(len(response), channels, seed)
        strength = _strengths(response, seen, sums, np.abs(geometry.step))  # (groups, K, *O)
    check_finite(strength, layer, cell)
    group, tap, *units = np.nonzero(strength)
    order = np.lexsort((tap, group, *units[::-1]))
    group, tap, *units = (numbers[order] for numbers in (group, tap, *units))
    points = np.moveaxis(_points(seen), 2, -1)[(group, tap, *units)]  # (M, D)
    middle = tuple(float(x) for x in trace.output_geometry(layer, index).to_image(cell))
    return SamplingLocations(
        layer, seen.name, cell, middle, geometry.to_image(points), strength[(group, tap, *units)], tap, group,
        np.stack(units, -1),
    )  # fmt: skip


class _Seen(NamedTuple):
    """A call of a deformable layer, as it was made: what comes after it may change tensors in place."""

    name: str
    number: int
    layer: Any
    input: Tensor
    offset: Tensor
    mask: Tensor | None
    output: GradientEdge | None  # None where nothing in it has a gradient


def _seen(event: Event, before: Sequence[_Seen]) -> _Seen:
    input, offset = event.input.detach().clone(), event.offset.detach().clone()
    mask = None if event.mask is None else event.mask.detach().clone()
    edge = get_gradient_edge(_whole(event.output)) if event.output.requires_grad else None
    return _Seen(event.name, sum(call.name == event.name for call in before), event.layer, input, offset, mask, edge)


def _whole(output: Tensor) -> Tensor:
    """The tensor that an output is a view of, as that of one image is: changed in place, a view is no longer on the way."""
    base: Any = output._base
    same = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return base if same and base.requires_grad else output


def _chosen(response: Tensor, calls: Sequence[_Seen], layer: str, of: str | None) -> _Seen:
    """The last call of a deformable layer that a unit's channels (C,) depend on; of the layer `of`, if there is a name."""
    possible = [call for call in reversed(calls) if of in (None, call.name) and call.output is not None]
    for call in possible:
        (gradient,) = torch.autograd.grad(
            response, [call.output], torch.ones_like(response), retain_graph=True, allow_unused=True
        )
        if gradient is not None:
            return call
    whose = "no deformable layer" if of is None else f"no call of layer `of`, {of!r}"
    ran = ", ".join(dict.fromkeys(repr(call.name) for call in calls)) or "none"
    raise ValueError(
        f"layer {layer!r} depends on {whose} by operations that PyTorch differentiates; expected one that comes before it, "
        f"or is it. Up to there, these ran: {ran}."
    )


def _strengths(response: Tensor, seen: _Seen, sums: Sums, step: Values) -> Values:
    """The root mean square over channels of the gradient's length, (groups, K, *O), response per image pixel."""
    rank = len(step)
    offset = _accurate(seen.offset).detach().requires_grad_()
    output = _sampled(seen, offset)
    square: Any = 0.0
    for (backward,) in gradients(response, [seen.output], sums):
        assert backward is not None  # `_chosen` has seen one
        (gradient,) = torch.autograd.grad(output, offset, backward.reshape(output.shape).to(output.dtype), retain_graph=True)
        taps = gradient.double().cpu().numpy().reshape(-1, *seen.layer.kernel_size, rank, *gradient.shape[2:])
        taps = taps.reshape(len(taps), -1, *taps.shape[1 + rank :])  # (groups, K, D, *O)
        square = square + ((taps / step.reshape(rank, *(1,) * rank)) ** 2).sum(2)
    return np.asarray(np.sqrt(square * sums.share))


def _sampled(seen: _Seen, offset: Tensor) -> Tensor:
    """What a layer computes with these offsets (1, groups*K*D, *O), in single or double precision."""
    layer = seen.layer
    rank = len(layer.kernel_size)
    input = _accurate(seen.input if seen.input.ndim == rank + 2 else seen.input[None])
    mask = None if seen.mask is None else _accurate(seen.mask)
    if isinstance(layer, AggregateWindow):
        return layer.sampled(input, offset, mask)
    padded = layer._padded(input)
    result: Tensor = type(layer)._operator(
        padded, offset, _accurate(layer.weight.detach()), None, layer.stride, layer._operator_padding, layer.dilation, mask,
        groups=layer.groups, offset_groups=layer.offset_groups, boundary=layer.boundary,
    )  # fmt: skip
    return result


def _accurate(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _points(seen: _Seen) -> Values:
    """Where a call samples, in cells of its input map: (groups, K, D, *O)."""
    layer = seen.layer
    offset = seen.offset.double().cpu().numpy()
    groups = offset.shape[1] // (len(layer.kernel_size) * int(np.prod(layer.kernel_size)))
    window = {"stride": layer.stride, "padding": layer._pairs, "dilation": layer.dilation, "offset_groups": groups}
    return sampling_points(offset, layer.kernel_size, **window)[0]
