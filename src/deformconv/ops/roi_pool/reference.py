"""The definition of deformable RoI pooling and of its gradients, in NumPy and float64.

    y[r, c, b] = mask[r, b] / n * sum over the samples s of bin b of interp(x[image(r), channel(c, b)], q[r, b, s])

`bins` says where the samples lie, which of them count, and what n is; `interp` is what `deformconv.sampling.rule` says of the
boundary "inside", at positions that have been moved onto the map. arXiv 1703.06211, equations 4 to 6, and arXiv 1811.11168,
equation 2. Written to be read: every other backend is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np

from deformconv.ops.backends import as_given as computes_in
from deformconv.ops.backends import nothing_to_say as how
from deformconv.ops.backends import reasons_against_numpy_only as reasons_against
from deformconv.ops.roi_pool.bins import margin, part_of, sample_at, sides
from deformconv.ops.roi_pool.spec import Gradients, RoiSpec
from deformconv.sampling import rule

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against"]

Array = np.ndarray[Any, Any]

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True


class _Sample(NamedTuple):
    position: tuple[float, float]  # on the map, or NaN
    moves: tuple[bool, bool]  # whether an offset along each axis would move it
    counts: bool  # whether it lies on the map or within the margin


class _Bin(NamedTuple):
    """A bin of a box, for the channels of one class."""

    box: int
    image: int
    place: tuple[int, int]
    outputs: Any  # channels of the output
    inputs: Any  # those of the input that they read
    offset: tuple[Any, Any]  # where the offsets along height and width lie in `offset`
    lengths: tuple[float, float]  # what an offset of 1 moves it by
    samples: list[_Sample]
    divisor: int


# Infinities are data here: 0 * inf is NaN by definition, and nothing to warn of.
@np.errstate(invalid="ignore", over="ignore")
def forward(spec: RoiSpec, input: Array, boxes: Array, offset: Array | None, mask: Array | None) -> Array:
    """The output (R, C_out, PH, PW)."""
    output = np.zeros(spec.output_shape)
    pixels = input.astype(np.float64)
    for bin in _bins(spec, boxes, offset):
        at: Any = (bin.box, bin.outputs, *bin.place)
        output[at] = _mean(spec, pixels, bin) * _factor(mask, bin)
    return output.astype(input.dtype)


@np.errstate(invalid="ignore", over="ignore")
def backward(
    spec: RoiSpec,
    grad_output: Array,
    input: Array,
    boxes: Array,
    offset: Array | None,
    mask: Array | None,
    wanted: Collection[str],
) -> Gradients:
    """The gradients of sum(grad_output * output)."""
    pixels = input.astype(np.float64)
    d_input, d_offset, d_mask = np.zeros(spec.input_shape), np.zeros(spec.offset_shape), np.zeros(spec.mask_shape)
    for bin in _bins(spec, boxes, offset):
        at: Any = (bin.box, bin.outputs, *bin.place)
        d_bin = grad_output[at].astype(np.float64)
        d_mask[(bin.box, 0, *bin.place)] += d_bin @ _mean(spec, pixels, bin)
        d_sample = d_bin * _factor(mask, bin) / bin.divisor
        for sample in bin.samples:
            if not sample.counts:
                continue
            _, slopes = rule.interpolate_at(pixels[bin.image, bin.inputs], sample.position, "inside")
            for axis in range(2):
                slope = slopes[axis] if sample.moves[axis] else np.zeros(len(d_bin))
                d_offset[bin.offset[axis]] += d_sample @ slope * bin.lengths[axis]
            for corner in rule.corners((0, 0), sample.position, spec.input_size, "inside"):
                into: Any = (bin.image, bin.inputs, *corner.pixel)
                d_input[into] += corner.weight * d_sample
    found = {"input": d_input, "offset": d_offset if spec.deformed else None, "mask": d_mask if spec.masked else None}
    return Gradients(
        **{name: array.astype(input.dtype) for name, array in found.items() if array is not None and name in wanted}
    )


def _bins(spec: RoiSpec, boxes: Array, offset: Array | None) -> Iterator[_Bin]:
    outputs = np.arange(spec.out_channels).reshape(spec.classes, -1)
    for box, (image, *corners) in enumerate(boxes.astype(np.float64).tolist()):
        both = sides(spec, corners)
        for number, place in product(range(spec.classes), np.ndindex(spec.output_size)):
            group, part = (tuple(map(part_of, place, spec.output_size, sizes)) for sizes in (spec.group_size, spec.part_size))
            # x lies before y
            at: Any = tuple((box, 2 * number + channel, *part) for channel in (1, 0))
            shift = [0.0 if offset is None else float(offset[index]) for index in at]
            samples = [
                _sample(spec, [sample_at(spec, *each) for each in zip(both, place, inner, shift, strict=True)])
                for inner in np.ndindex(both[0].samples, both[1].samples)
            ]
            counted = sum(sample.counts for sample in samples) if spec.convention == "rounded" else len(samples)
            lengths = tuple(spec.gamma * side.size for side in both)
            inputs = (outputs[number] * spec.group_size[0] + group[0]) * spec.group_size[1] + group[1]
            yield _Bin(box, int(image), place, outputs[number], inputs, at, lengths, samples, max(1, counted))  # type: ignore[arg-type]


def _sample(spec: RoiSpec, position: list[float]) -> _Sample:
    if any(map(math.isnan, position)):
        return _Sample((math.nan, math.nan), (True, True), True)
    last = [length - 1 for length in spec.input_size]
    reach = margin(spec)
    counts = all(-reach <= q <= end + reach for q, end in zip(position, last, strict=True))
    y, x = (min(max(q, 0.0), float(end)) for q, end in zip(position, last, strict=True))
    return _Sample((y, x), (y == position[0], x == position[1]), counts)


def _mean(spec: RoiSpec, pixels: Array, bin: _Bin) -> Array:
    total = np.zeros(len(bin.inputs))
    for sample in bin.samples:
        if sample.counts:
            total += rule.interpolate_at(pixels[bin.image, bin.inputs], sample.position, "inside")[0]
    return total / bin.divisor


def _factor(mask: Array | None, bin: _Bin) -> float:
    return 1.0 if mask is None else float(mask[(bin.box, 0, *bin.place)])
