"""The effective receptive field: how much each pixel of the image moves one unit of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from deformconv.plots.geometry import position_text
from deformconv.plots.gradients import check_channels, check_finite, differentiable, gradients, sums_of, unit_response
from deformconv.plots.rerun import Probe
from deformconv.plots.stack import check_trace
from deformconv.plots.trace import Trace

__all__ = ["THRESHOLD", "ReceptiveField", "each_receptive_field", "receptive_field"]

THRESHOLD = 1 - 0.9545
"""Share of the maximum above which a pixel counts as part of the effective receptive field: two standard deviations' rest."""

Field = npt.NDArray[np.float64]
Position = Sequence[float]


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """What `receptive_field` returns. Axes go depth, height, width; *S is the image's size.

    Attributes:
        layer: the layer's name.
        unit: the output unit, a cell of the layer's output map; of several the first.
        at: the middle of its undeformed window, image pixels.
        field: (*S) float64, how much the unit's channels change with a pixel: the root mean square over channels of the length
            of the gradient over the pixel's colours; response per unit of intensity.
        radius: the size as one number, image pixels: the radius of a disc as large as the pixels above 4.55 % of the largest,
            sqrt(area / pi); along one axis half their number, over three axes the radius of a ball as large as they are.
        centroid: the mean position weighed by the field's square, image pixels; NaN where the field is 0 everywhere.
        units: all the units whose fields were averaged, `unit` first.
    """

    layer: str
    unit: tuple[int, ...]
    at: tuple[float, ...]
    field: Field
    radius: float
    centroid: tuple[float, ...]
    units: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        several = f", the mean of {len(self.units)} units" if len(self.units) > 1 else ""
        return (
            f"ReceptiveField of layer {self.layer!r}, unit {self.unit} at image pixel {position_text(self.at)}{several}: "
            f"radius {self.radius:.1f} px, centroid {position_text(self.centroid)}"
        )


def receptive_field(
    trace: Trace,
    layer: str,
    at: Position | Sequence[Position] | None = None,
    *,
    unit: Sequence[int] | Sequence[Sequence[int]] | None = None,
    channels: int = 16,
    image: int = 0,
    index: int = 0,
    seed: int = 0,
) -> ReceptiveField:
    """The gradient of a unit's response with respect to the image: how much each pixel counts.

    The model runs again on the recorded image, in evaluation mode, up to the layer. The gradient is that of the whole model:
    it holds what a pixel does through the offsets and masks that layers predict, as well as through what they sample.

    Args:
        trace: from `record`.
        layer: name of any module of the model that returns a map (N, C, *O).
        at: a position in the image, pixels, (y, x): the nearest unit is taken. A list of positions averages their fields, each
            moved by whole pixels onto the first; a pixel has the mean of those fields that reach it.
        unit: an output cell, (row, column), or a list of cells, instead. With neither, the unit nearest to the image's middle.
        channels: up to so many channels have their gradients computed one by one. Of a unit with more, the mean square over
            channels is estimated from so many sums with random signs; its relative standard deviation is at most
            sqrt(2 / channels).
        image: which image of the recorded batch.
        index: which call of the layer in a forward pass.
        seed: of the random signs.

    Returns:
        A ReceptiveField: field (*S), its radius and centroid in image pixels.

    Raises:
        ValueError: there is no such layer, unit, image or position; the layer has no gradient with respect to the image, or
            the gradient is not finite.
        TypeError: `trace` is none.

    Example:
        >>> import torch
        >>> from deformconv.plots import receptive_field
        >>> from deformconv.plots import record
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(DeformConv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1))
        >>> with record(net) as trace:
        ...     y = net(torch.rand(1, 3, 32, 48))
        >>> found = receptive_field(trace, "1", at=(10, 20))
        >>> found.field.shape, found.field.any(axis=1).nonzero()[0].tolist()
        ((32, 48), [8, 9, 10, 11, 12])

    Papers: Luo et al. 2016, arXiv 1701.04128, where the field counts from 4.55 % (1 - 95.45 %) of its maximum on; as a view of
    deformable layers DCNv2, arXiv 1811.11168, section 2.1.
    """
    check_trace(trace)
    units = _units(trace, layer, at, unit, index)
    found = list(each_receptive_field(trace, layer, units, channels=channels, image=image, index=index, seed=seed))
    shifts = [np.rint(np.subtract(found[0].at, one.at)).astype(int) for one in found]
    mean = averaged([one.field for one in found], shifts)
    return replace(found[0], field=mean, radius=radius_of(mean), centroid=centroid_of(mean), units=tuple(units))


def each_receptive_field(
    trace: Trace, layer: str, units: Sequence[tuple[int, ...]], *, channels: int, image: int = 0, index: int = 0, seed: int = 0
) -> Iterator[ReceptiveField]:
    """The receptive fields of several units of a layer, one after the other, from one forward pass."""
    channels = check_channels(channels)
    geometry = trace.output_geometry(layer, index)
    with differentiable():
        picture = (probe := Probe(trace, layer, index, image)).image.requires_grad_()
        features = probe.features(picture)
    for left, unit in zip(range(len(units) - 1, -1, -1), units, strict=True):
        with differentiable():  # and not while the caller has what is yielded
            field = _field(unit_response(features, unit), picture, channels, seed, keep=left > 0)
        check_finite(field, layer, unit)
        at = tuple(map(float, geometry.to_image(unit)))
        yield ReceptiveField(layer, unit, at, field, radius_of(field), centroid_of(field), (unit,))


def _field(response: Tensor, picture: Tensor, channels: int, seed: int, *, keep: bool) -> Field:
    """The receptive field (*S) of a unit's channels (C,) in a picture (1, C, *S)."""
    sums = sums_of(len(response), channels, seed)
    square = np.zeros(picture.shape[2:])
    for (gradient,) in gradients(response, [picture], sums, keep=keep):
        if gradient is None:
            raise ValueError(
                "the layer's output does not depend on the image by any operation that PyTorch differentiates: a tensor on the "
                "way there is detached, or made from something else. Expected a model that is differentiable up to this layer."
            )
        square += gradient.double().square().sum((0, 1)).cpu().numpy()
    return np.asarray(np.sqrt(square * sums.share))


def _units(trace: Trace, layer: str, at: Any, unit: Any, index: int) -> list[tuple[int, ...]]:
    """The units that `at` or `unit` name, one or a list of them."""
    for name, value in (("at", at), ("unit", unit)):
        if isinstance(value, Sequence) and not value:
            raise ValueError(f"`{name}` is an empty list; expected a position or a list of at least one.")
    if at is not None and unit is not None:
        raise ValueError("`at` and `unit` were both passed; expected one of them, or none for the image's middle.")
    if _are_several(at):
        return [trace.unit(layer, one, None, index) for one in at]
    if _are_several(unit):
        return [trace.unit(layer, None, one, index) for one in unit]
    return [trace.unit(layer, at, unit, index)]


def _are_several(positions: Any) -> bool:
    """Whether it is a list of positions, and not one."""
    return hasattr(positions, "__len__") and len(positions) > 0 and hasattr(positions[0], "__len__")


def averaged(fields: Sequence[Field], shifts: Sequence[npt.NDArray[np.int_]]) -> Field:
    """The mean of fields (*S), each moved by whole pixels; each pixel has the mean of those that reach it."""
    total, number = np.zeros(fields[0].shape), np.zeros(fields[0].shape)
    for field, shift in zip(fields, shifts, strict=True):
        to = tuple(slice(max(0, s), max(0, n + min(0, s))) for s, n in zip(shift, field.shape, strict=True))
        taken = tuple(slice(max(0, -s), max(0, n - max(0, s))) for s, n in zip(shift, field.shape, strict=True))
        total[to] += field[taken]
        number[to] += 1
    return total / number  # the first is not moved, and reaches all


def radius_of(field: Field) -> float:
    """The radius of a ball of the field's rank that is as large as its pixels above the threshold."""
    largest = field.max(initial=0.0)
    volume = float((field > THRESHOLD * largest).sum())
    if field.ndim == 1:
        return volume / 2
    return math.sqrt(volume / math.pi) if field.ndim == 2 else (volume * 3 / (4 * math.pi)) ** (1 / 3)


def centroid_of(field: Field) -> tuple[float, ...]:
    """The mean position of a field, weighed by its square."""
    weights = (field / (field.max(initial=0.0) or 1)) ** 2  # without overflow
    total = weights.sum()
    if not total:
        return (math.nan,) * field.ndim
    sums = (np.moveaxis(weights, axis, -1).sum(tuple(range(field.ndim - 1))) for axis in range(field.ndim))
    return tuple(float(along @ np.arange(len(along)) / total) for along in sums)
