"""The definition of multi-scale deformable attention and of its gradients, in NumPy and float64.

    y[n, q, h, c] = sum over the levels l and the points p of weights[n, q, h, l, p] * interp(value[n, level l, h, c], position)
    position      = (y * H_l - 0.5, x * W_l - 0.5)    where (x, y) = locations[n, q, h, l, p]

`interp` is what `deformconv.sampling.rule` says of the boundary "zeros". arXiv 2010.04159, equation 3. Written to be read:
every other backend is compared with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from deformconv.ops.attention.spec import AttentionSpec, Gradients
from deformconv.ops.backends import as_given as computes_in
from deformconv.ops.backends import nothing_to_say as how
from deformconv.ops.backends import reasons_against_numpy_only as reasons_against
from deformconv.sampling import rule

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against"]

Array = np.ndarray[Any, Any]

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True


class _Sample(NamedTuple):
    at: Any  # its index in `weights`
    row: Any  # the index in `output`, seen as (N, Q, heads, d), that it adds to
    size: tuple[int, int]  # of its level
    position: tuple[float, float]  # in pixels of its level


# Infinities are data here: 0 * inf is NaN by definition, and nothing to warn of.
@np.errstate(invalid="ignore", over="ignore")
def forward(spec: AttentionSpec, value: Array, locations: Array, weights: Array) -> Array:
    """The output (N, Q, heads*d)."""
    output = np.zeros((spec.batch, spec.queries, spec.heads, spec.channels))
    levels = _levels(spec, value.astype(np.float64))
    for sample in _samples(spec, locations):
        found, _ = rule.interpolate_at(_map(levels, sample.at), sample.position, "zeros")
        output[sample.row] += float(weights[sample.at]) * found
    return output.reshape(spec.output_shape).astype(value.dtype)


@np.errstate(invalid="ignore", over="ignore")
def backward(
    spec: AttentionSpec, grad_output: Array, value: Array, locations: Array, weights: Array, wanted: Collection[str]
) -> Gradients:
    """The gradients of sum(grad_output * output)."""
    grad = grad_output.astype(np.float64).reshape(spec.batch, spec.queries, spec.heads, spec.channels)
    levels = _levels(spec, value.astype(np.float64))
    d_value, d_locations, d_weights = (np.zeros(shape) for shape in spec.shapes.values())
    d_levels = _levels(spec, d_value)
    for sample in _samples(spec, locations):
        found, slopes = rule.interpolate_at(_map(levels, sample.at), sample.position, "zeros")
        d_weights[sample.at] = grad[sample.row] @ found
        weight = float(weights[sample.at])
        d_y, d_x = (slopes[axis] @ grad[sample.row] * weight * sample.size[axis] for axis in (0, 1))
        d_locations[sample.at] = d_x, d_y
        d_map = _map(d_levels, sample.at)
        for corner in rule.corners((0, 0), sample.position, sample.size, "zeros"):
            into: Any = (slice(None), *corner.pixel)
            d_map[into] += corner.weight * (grad[sample.row] * weight)
    gradients = {"value": d_value, "locations": d_locations, "weights": d_weights}
    return Gradients(**{name: array.astype(value.dtype) for name, array in gradients.items() if name in wanted})


def _levels(spec: AttentionSpec, value: Array) -> list[Array]:
    """Each level of a value as maps (N, H, W, heads, d), which share its memory."""
    return [
        value[:, start : start + height * width].reshape(spec.batch, height, width, spec.heads, spec.channels)
        for start, (height, width) in zip(spec.starts, spec.levels, strict=True)
    ]


def _map(levels: list[Array], at: Any) -> Array:
    """The map (d, H, W) that a sample reads, a view."""
    image, _, head, level, _ = at
    return np.moveaxis(levels[level][image, :, :, head], -1, 0)


def _samples(spec: AttentionSpec, locations: Array) -> Iterator[_Sample]:
    for at in np.ndindex(spec.weights_shape):
        height, width = spec.levels[at[3]]
        x, y = (float(coordinate) for coordinate in locations[at])
        yield _Sample(at, at[:3], (height, width), (y * height - 0.5, x * width - 0.5))
