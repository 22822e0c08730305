"""What a monitor takes of each call of a layer in training, and what it makes of a whole step's.

A step of training waits for it, and leaves nothing of its code and numbers in the processor's caches: then every operation of
PyTorch takes 10 to 20 microseconds, and one of NumPy about 10, however little it computes. So in the step itself the offsets
are passed over once, for the largest, and a lattice of positions is copied, which a GPU does by itself; all else comes later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, isfinite, isnan, nan, prod, sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deformconv.ops.window import axis_name, by
from deformconv.torch.tensors import HALF

__all__ = ["Call", "Lattice", "Lattices", "LayerStep", "Taken", "explosion", "of_layers", "take"]

Array = npt.NDArray[Any]

ALONG = (0, 196, 14, 6)  # by the number of axes: a lattice has so many positions along each of a large map, up to twice as many
IMAGES = 4  # of a large batch, up to twice as many
KEPT = 64  # lattices of a layer's calls of one size

# Offsets have exploded whose root mean square along an axis exceeds this share of the map, and the window's span: their samples
# lie outside as often as inside. The largest offset says less: single ones exceed the map in training that goes well.
EXPLODED = 0.5
# Offsets longer than the window's span, and than so many times the median of so many steps before, are on their way there. It
# takes so many of these steps that were looked at.
GROWN, HISTORY, FEWEST = 10, 100, 10


class Call(NamedTuple):
    """What the lattices of a layer's calls depend on."""

    input_size: tuple[int, ...]  # of the map that is sampled, with its padding if that is not zeros
    output_size: tuple[int, ...]
    batch: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # padding of zeros

    @property
    def span(self) -> tuple[int, ...]:
        """The pixels that the window covers along each axis."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))


class Lattices:
    """The lattices of a layer's calls of one size, which are made as they are asked for."""

    def __init__(
        self,
        input: tuple[int, ...],
        offset: tuple[int, ...],
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        pairs: tuple[tuple[int, int], ...],
        padding_mode: str,
    ) -> None:
        D = len(kernel_size)
        size, before = tuple(input[-D:]), tuple(pair[0] for pair in pairs)
        if padding_mode != "zeros":
            size, before = tuple(n + sum(pair) for n, pair in zip(size, pairs, strict=True)), (0,) * D
        self.call = Call(size, tuple(offset[2:]), offset[0], kernel_size, stride, dilation, before)
        self.steps = [max(1, out // ALONG[D]) for out in self.call.output_size]
        self.number = prod(self.steps)
        self._made: dict[int, Lattice] = {}

    def __getitem__(self, number: int) -> Lattice:
        """The lattice of a look at the layer; `self.number` of them, each at another place, take turns."""
        number %= self.number
        found = self._made.get(number)
        if found is None:
            found = _lattice(self.call, self.steps, number)
            if self.number <= KEPT:
                self._made[number] = found
        return found


class Lattice(NamedTuple):
    """Positions of a layer's output whose offsets are taken, every so many along each axis."""

    call: Call
    places: tuple[slice, ...]  # of an array of (N, channels, *O)
    positions: Array  # (D, 1, K, 1, *O of the lattice), float32: where taps read without offsets, from the map's middle
    limits: Array  # (D, 1, 1, 1, ...): the distance from the middle at which nothing is read any more
    regular: float  # the share of the samples outside without offsets, of the whole map
    beyond: float  # how much larger it is than that of the lattice


class Taken(NamedTuple):
    """Of one call the least and the largest offset, and the lattice's offsets and masks: arrays, or tensors of a device."""

    layer: str
    lattice: Lattice
    extremes: Any  # (2,)
    offset: Any  # (D, offset_groups*K, N, *O) of the lattice
    mask: Any  # (N, offset_groups*K, *O), or None


class LayerStep(NamedTuple):
    """What a layer's offsets were in one step, in its input pixels."""

    layer: str
    size: tuple[int, ...]  # of its map
    span: tuple[int, ...]  # of its undeformed window
    mean: tuple[float, ...]
    typical: tuple[float, ...]  # root mean square, along each axis
    largest: float
    outside: float
    regular: float  # the share outside without offsets
    mask: float | None

    @property
    def length(self) -> float:
        """Root mean square length of the offsets."""
        return sqrt(sum(t * t for t in self.typical))

    def values(self, prefix: str) -> dict[str, float]:
        """The numbers by their names."""
        name = f"{prefix}/{self.layer}/" if self.layer else f"{prefix}/"
        D = len(self.mean)
        squares = sum(t * t - m * m for t, m in zip(self.typical, self.mean, strict=True))
        found = {f"{name}mean_{axis_name(axis, D)}": mean for axis, mean in enumerate(self.mean)}
        found[f"{name}deviation"] = sqrt(max(squares, 0.0)) if isfinite(squares) else squares
        found[f"{name}largest"], found[f"{name}outside"] = self.largest, self.outside
        if self.mask is not None:
            found[f"{name}mask"] = self.mask
        return found

    def __str__(self) -> str:
        D = len(self.typical)
        typical = " and ".join(f"{t:.3g} along {axis_name(axis, D)}" for axis, t in enumerate(self.typical))
        return (
            f"root mean square {typical}, largest {self.largest:.3g} input pixels on a map of {by(self.size)}, of which "
            f"{self.outside:.0%} of the samples read nothing ({self.regular:.0%} without offsets)"
        )


def _lattice(call: Call, steps: Sequence[int], number: int) -> Lattice:
    """Positions so many steps apart, beginning at the place of that number; all of them together are every position once."""
    D = len(call.kernel_size)
    taps = np.indices(call.kernel_size).reshape(D, -1)
    places, reads, here = [slice(None, None, max(1, call.batch // IMAGES)), slice(None)], [], []
    for axis, (out, step) in enumerate(zip(call.output_size, steps, strict=True)):
        number, first = divmod(number, step)
        places.append(slice(first, None, step))
        read = taps[axis, :, None] * call.dilation[axis] + np.arange(out) * call.stride[axis] - call.before[axis]
        reads.append(read)  # (K, O_axis)
        here.append(read[:, first::step])
    positions = np.empty((D, 1, taps.shape[1], 1, *(read.shape[1] for read in here)), np.float32)
    for axis, read in enumerate(here):
        middle = (call.input_size[axis] - 1) / 2
        positions[axis] = (read - middle).reshape(-1, 1, *(read.shape[1] if each == axis else 1 for each in range(D)))
    regular = _outside(reads, call.input_size)
    limits = np.reshape([(size + 1) / 2 for size in call.input_size], (D, *(1,) * (3 + D))).astype(np.float32)
    return Lattice(call, tuple(places), positions, limits, regular, regular - _outside(here, call.input_size))


def _outside(reads: Sequence[Array], size: tuple[int, ...]) -> float:
    """The share of the samples outside, where taps read (K, O_axis) along each axis."""
    inside = [((read >= 0) & (read < n)).mean(1) for read, n in zip(reads, size, strict=True)]
    return 1 - float(np.prod(inside, 0).mean())


def take(layer: str, lattice: Lattice, offset: Tensor, mask: Tensor | None) -> Taken:
    """What is taken of a call, where it lies; nothing waits for a GPU."""
    D = len(lattice.limits)
    offset = offset.detach()
    if offset.is_cpu and offset.dtype not in HALF:
        whole = offset.numpy()
        part = whole[lattice.places]
        copy = np.ascontiguousarray(part.reshape(len(part), -1, D, *part.shape[2:]).swapaxes(0, 2))
        kept = None if mask is None else mask.detach().numpy()[lattice.places].copy()
        return Taken(layer, lattice, (np.minimum.reduce(whole, None), np.maximum.reduce(whole, None)), copy, kept)
    here = offset[lattice.places].unflatten(1, (-1, D)).transpose(0, 2).float()
    masks = None if mask is None else mask.detach()[lattice.places].float()
    return Taken(layer, lattice, torch.stack(offset.aminmax()).float(), here, masks)


def of_layers(taken: Sequence[Taken]) -> list[LayerStep]:
    """The numbers of a step's layers, in the order of their first calls; everything is on the host."""
    found: dict[str, list[tuple[LayerStep, int]]] = {}
    with np.errstate(all="ignore"):  # infinite offsets are told by a warning of the monitor's
        for each in taken:
            call = each.lattice.call
            found.setdefault(each.layer, []).append((_of_call(each), call.batch * prod(call.output_size)))
    return [calls[0][0] if len(calls) == 1 else _together(calls) for calls in found.values()]


def _of_call(taken: Taken) -> LayerStep:
    lattice, (low, high) = taken.lattice, taken.extremes
    call, offset, positions = lattice.call, taken.offset, lattice.positions
    D, K = len(positions), positions.shape[2]
    flat = offset.reshape(D, -1)
    samples = flat.shape[1]
    distance = offset.reshape(D, -1, K, *offset.shape[2:]) + positions
    inside = np.abs(distance, out=distance) < lattice.limits
    read = int(np.count_nonzero(inside.all(0))) / samples
    return LayerStep(
        taken.layer,
        call.input_size,
        call.span,
        tuple((flat.sum(1) / samples).tolist()),
        tuple(np.sqrt(np.einsum("ij,ij->i", flat, flat) / samples).tolist()),
        max(abs(float(low)), abs(float(high))),
        min(max(1 - read + lattice.beyond, 0.0), 1.0),
        lattice.regular,
        None if taken.mask is None else float(taken.mask.sum()) / taken.mask.size,
    )


def _together(calls: Sequence[tuple[LayerStep, int]]) -> LayerStep:
    """Several calls of a layer as one, by the number of their positions; its map is the largest of theirs."""
    total = sum(number for _, number in calls)

    def average(values: Iterable[float]) -> float:
        return sum(value * number for value, (_, number) in zip(values, calls, strict=True)) / total

    steps = [step for step, _ in calls]
    largest = [step.largest for step in steps]
    return max(steps, key=lambda step: prod(step.size))._replace(
        mean=tuple(map(average, zip(*(step.mean for step in steps), strict=True))),
        typical=tuple(sqrt(average(t * t for t in along)) for along in zip(*(step.typical for step in steps), strict=True)),
        largest=max(largest) if not any(map(isnan, largest)) else nan,
        outside=average(step.outside for step in steps),
        regular=average(step.regular for step in steps),
        mask=None if steps[0].mask is None else average(step.mask or 0.0 for step in steps),
    )


def explosion(step: LayerStep, earlier: Sequence[float]) -> str | None:
    """What tells that a layer's offsets have exploded, after root mean square lengths of steps before; None if nothing does."""
    if not (isfinite(step.largest) and isfinite(step.length)):
        return "are not finite"
    limits = (max(EXPLODED * size, span) for size, span in zip(step.size, step.span, strict=True))
    if any(typical > limit for typical, limit in zip(step.typical, limits, strict=True)):
        return "have exploded, to more than half of the map"
    usual = sorted(earlier)[len(earlier) // 2] if len(earlier) >= FEWEST else inf
    if step.length > max(*step.span, GROWN * usual):
        return f"explode: they have grown more than {GROWN} times within {HISTORY} steps"
    return None
