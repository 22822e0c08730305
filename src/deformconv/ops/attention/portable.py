"""Multi-scale deformable attention in the functions of the array-API standard: any array library, any device.

The library itself can differentiate it, to any order. It samples one level after the other; an automatic derivative holds the
samples of all levels, and a copy for each of four corners: memory is the price of running everywhere.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace, is_numpy_array
from array_api_compat import device as device_of

from deformconv.ops.attention.spec import AttentionSpec
from deformconv.ops.backends import reasons_against_arrays
from deformconv.ops.operator import half_in_float32 as computes_in
from deformconv.sampling import gather

__all__ = ["DETERMINISTIC", "TAKES", "computes_in", "forward", "how", "reasons_against"]

Array = Any

TAKES: Literal["native"] = "native"
# On a GPU PyTorch adds up the value's gradient by atomics, unless torch.use_deterministic_algorithms(True) is set.
DETERMINISTIC = True


def reasons_against(spec: AttentionSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run the call; none if it can."""
    return reasons_against_arrays("deform_attention", library, backward)


def how(spec: AttentionSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return ["PyTorch's own operations compute the call at once"] if library == "torch" else []


def forward(spec: AttentionSpec, value: Array, locations: Array, weights: Array) -> Array:
    """The output (N, Q, heads*d), by the library's own operations."""
    if is_numpy_array(value):
        # Infinities are data here: 0 * inf is NaN by definition, and nothing to warn of.
        with np.errstate(invalid="ignore", over="ignore"):
            return _forward(spec, value, locations, weights)
    return _forward(spec, value, locations, weights)


def _forward(spec: AttentionSpec, value: Array, locations: Array, weights: Array) -> Array:
    xp = array_namespace(value)
    N, Q, heads, d, points = spec.batch, spec.queries, spec.heads, spec.channels, spec.points
    image = xp.reshape(xp.arange(N * heads, device=device_of(value)), (N * heads, 1, 1))
    image = xp.broadcast_to(image, (N * heads, Q, points))
    total = None
    for level, (start, (height, width)) in enumerate(zip(spec.starts, spec.levels, strict=True)):
        pixels = xp.permute_dims(value[:, start : start + height * width, ...], (0, 2, 3, 1))
        pixels = xp.reshape(pixels, (N * heads, d, height, width))
        factors = xp.permute_dims(weights[:, :, :, level, :], (0, 2, 1, 3))  # (N, heads, Q, points)
        bases, fractions = [], []
        for axis, size in enumerate((height, width)):
            coordinate = xp.permute_dims(locations[:, :, :, level, :, 1 - axis], (0, 2, 1, 3))
            base, fraction = _position(xp, xp.reshape(coordinate, (N * heads, Q, points)), size)
            bases.append(base)
            fractions.append(fraction)
        samples = gather.interpolate(pixels, bases, fractions, "zeros", image)  # (N*heads, Q, points, d)
        summed = xp.sum(samples * xp.reshape(factors, (N * heads, Q, points, 1)), axis=2)
        total = summed if total is None else total + summed
    output = xp.permute_dims(xp.reshape(total, (N, heads, Q, d)), (0, 2, 1, 3))
    return xp.reshape(output, (N, Q, heads * d))


def _position(xp: Any, coordinate: Array, size: int) -> tuple[Array, Array]:
    """The pixel below a coordinate of a level, and the rest, computed where a product with a float32 number is exact."""
    dtype, device = coordinate.dtype, device_of(coordinate)
    exact = dtype if str(device).startswith("mps") else xp.float64
    position = xp.astype(coordinate, exact) * size - 0.5
    zeros = xp.zeros_like(position)
    is_near = xp.abs(position) < gather.REACH  # NaN is not
    floor = xp.floor(xp.where(is_near, position, zeros))
    return xp.astype(floor, xp.int64), xp.astype(position - floor, dtype)
