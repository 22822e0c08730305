"""Where the elements of a tensor lie in an image, as rules: what convolutions, poolings, views and the like do to positions.

A tensor's place says of each of its axes which of the image's axes it runs along, where its first element lies and how many
pixels a step is. Pixel centres are whole numbers; a window's output lies at the window's middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

__all__ = ["Along", "Axis", "Place", "absorbed", "each", "mapped", "merged", "moved", "of_image", "viewed", "windowed"]


@dataclass(frozen=True)
class Along:
    """A factor of one axis of a tensor: how many elements, and along which axis of the image, from where, by which step."""

    size: int
    axis: int | None = None
    step: float = 0.0
    origin: float = 0.0


Axis = tuple[Along, ...]  # an axis that a view has made of several has several factors, the outermost first


@dataclass(frozen=True)
class Place:
    """Where the elements of a tensor lie; `doubt` names an operation on the way whose effect on positions is a guess."""

    axes: tuple[Axis, ...]
    doubt: str = ""

    def spatial(self, rank: int) -> list[Along] | None:
        """The last axes, if they are the image's in its order."""
        found = [_repeated(axis) for axis in self.axes[-rank:]]
        return found if [along.axis for along in found] == list(range(rank)) else None


def _repeated(axis: Axis) -> Along:
    """An axis as one factor, where it is one; elements that are there several times lie about where the one lay."""
    if len(axis) == 2 and axis[1].axis is None and axis[0].axis is not None:
        along, times = axis[0], axis[1].size
        return Along(along.size * times, along.axis, along.step / times, along.origin - along.step * (times - 1) / (2 * times))
    return axis[0] if len(axis) == 1 else Along(prod(along.size for along in axis))


def of_image(shape: Sequence[int], rank: int) -> Place:
    """The place of an image's own pixels, which are the tensor's last axes."""
    before = len(shape) - rank
    return Place(tuple((Along(size, n - before, 1.0) if n >= before else Along(size),) for n, size in enumerate(shape)))


def moved(axis: Axis, size: int, shift: float, factor: float = 1.0) -> Axis:
    """An axis whose element i was at `shift + factor*i` of the axis before."""
    if len(axis) != 1:
        return (Along(size),)
    along = axis[0]
    return (Along(size, along.axis, along.step * factor, along.origin + along.step * shift),)


def windowed(place: Place, shape: Sequence[int], kernel: Any, stride: Any, before: Any, dilation: Any = 1) -> Place:
    """A convolution or pooling over the last axes: an output lies at its window's middle."""
    rank = len(kernel)
    stride, before, dilation = (each(value, rank) for value in (stride, before, dilation))
    shifts = [d * (k - 1) / 2 - b for k, b, d in zip(kernel, before, dilation, strict=True)]
    return mapped(place, shape, list(zip(shifts, stride, strict=True)))


def mapped(place: Place, shape: Sequence[int], maps: Sequence[tuple[float, float]]) -> Place:
    """A change of the last axes, whose output i reads at shift + factor*i; the channels before them are made anew."""
    rank = len(maps)
    axes = list(place.axes[:-rank])
    last = [
        moved(axis, size, shift, factor)
        for axis, size, (shift, factor) in zip(place.axes[-rank:], shape[-rank:], maps, strict=True)
    ]
    if axes:
        last = absorbed(last, axes[-1:])
        axes[-1] = (Along(shape[len(axes) - 1]),)
    return Place((*axes, *last), place.doubt)


def absorbed(kept: Sequence[Axis], lost: Sequence[Axis]) -> list[Axis]:
    """The axes that are left after others were summed over: what is summed lies in the middle of what was."""
    result = list(kept)
    for along in (along for axis in lost for along in axis if along.axis is not None):
        shift = along.origin + along.step * (along.size - 1) / 2
        for number, axis in enumerate(result):
            found = next((n for n, other in enumerate(axis) if other.axis == along.axis), None)
            if found is not None:
                placed = replace(axis[found], origin=axis[found].origin + shift)
                result[number] = (*axis[:found], placed, *axis[found + 1 :])
                break
    return result


def each(value: Any, rank: int) -> list[Any]:
    """One number for each axis."""
    values = [value] if isinstance(value, (int, float)) else list(value)
    return values * rank if len(values) == 1 else values


def merged(places: Sequence[Place], shape: Sequence[int]) -> Place | None:
    """The place of what is computed element by element, with broadcasting, from tensors in these places.

    Where they disagree, the result lies halfway: with an even kernel beside a shortcut, as an example. Places without doubt are
    preferred.
    """
    certain = [place for place in places if not place.doubt]
    places = certain or places
    axes: list[Axis] = []
    for number in range(1, len(shape) + 1):  # from the last axis, as broadcasting aligns them
        here = [place.axes[-number] for place in places if len(place.axes) >= number]
        here = [axis for axis in here if prod(a.size for a in axis) == shape[-number] and any(a.axis is not None for a in axis)]
        alike = [axis for axis in here if [(a.size, a.axis) for a in axis] == [(a.size, a.axis) for a in here[0]]]
        axes.insert(0, _mean(alike) if alike else (Along(shape[-number]),))
    if all(along.axis is None for axis in axes for along in axis):
        return None
    return Place(tuple(axes), "" if certain else places[0].doubt)


def _mean(axes: list[Axis]) -> Axis:
    if all(axis == axes[0] for axis in axes):
        return axes[0]
    return tuple(
        replace(same[0], step=float(np.mean([a.step for a in same])), origin=float(np.mean([a.origin for a in same])))
        for same in zip(*axes, strict=True)
    )


def viewed(place: Place, shape: Sequence[int]) -> Place | None:
    """A view of the same elements in the same order: axes are split and joined."""
    left = [along for axis in place.axes for along in axis]
    axes: list[Axis] = []
    for size in shape:
        taken: list[Along] = []
        while (missing := size // prod(a.size for a in taken)) > 1 or (not taken and left and left[0].size == 1):
            if not left:
                return None
            along = left.pop(0)
            if along.size > missing:
                if along.size % missing:
                    return None
                inner = along.size // missing
                left.insert(0, Along(inner, along.axis, along.step, 0.0))
                along = Along(missing, along.axis, along.step * inner, along.origin)
            taken.append(along)
        if prod(a.size for a in taken) != size:
            return None
        axes.append(_joined(taken) or (Along(size),))
    return Place(tuple(axes), place.doubt)


def _joined(factors: list[Along]) -> Axis:
    """Neighbouring factors that make up one axis again, as after the windows of an attention are put back."""
    result: list[Along] = []
    for along in factors:
        last = result[-1] if result else None
        if along.size == 1 and along.axis is None:
            continue
        if last is not None and last.axis == along.axis and (last.axis is None or last.step == along.step * along.size):
            result[-1] = Along(last.size * along.size, along.axis, along.step, last.origin + along.origin)
        else:
            result.append(along)
    return tuple(result)
