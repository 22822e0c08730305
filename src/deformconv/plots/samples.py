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

__all__ = ["Call", "Lattice", "LayerStep", "Taken", "explosion", "lattice", "lattices", "of_layers", "take"]

Array = npt.NDArray[Any]

ALONG = (0, 196, 14, 6)  # by the number of axes: along each the fewest positions of a lattice, if the map has more
IMAGES = 4  # the most of a batch that a lattice takes, as far as that divides it
EXPLODED = 0.5  # of the map: offsets whose root mean square is longer read little of it
GROWN = 10  # times the usual: offsets that do it within the steps that say what is usual are on their way there
HISTORY = 100  # steps that say what is usual
FEWEST = 10  # steps of them that were looked at


class Call(NamedTuple):
    """What a lattice depends on, but for the step. Sizes are of the map that is sampled, with padding that is not zeros."""

    batch: int
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    dilation: tuple[int, ...]


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


def lattice(call: Call, number: int) -> Lattice:
    """The lattice of a step. It is shifted from step to step, so that all positions have their turn, those at borders too."""
    D = len(call.kernel_size)
    taps = np.indices(call.kernel_size).reshape(D, -1)
    places, reads, here = [slice(None, None, max(1, call.batch // IMAGES)), slice(None)], [], []
    for axis, (out, step) in enumerate(zip(call.output_size, _steps(call), strict=True)):
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


def lattices(call: Call) -> int:
    """After how many steps a lattice comes again."""
    return prod(_steps(call))


def _steps(call: Call) -> list[int]:
    fewest = ALONG[len(call.output_size)]
    return [max(1, out // fewest) for out in call.output_size]


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
        return Taken(layer, lattice, (whole.min(), whole.max()), copy, kept)
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
        tuple(d * (k - 1) + 1 for d, k in zip(call.dilation, call.kernel_size, strict=True)),
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
