"""The samples of taps that have offsets and masks, and their gradients, in NumPy and float64, for the definitions of operators.

A sample of channel c is interp(x[n, c], q[k, p]), as `deformconv.sampling.rule` says, at

    q[k, p] = p*stride - padding + k*dilation + offset[n, g, k, :, p]

with g the offset group of the channel. What an operator makes of mask[n, g, k, p] times this, its columns, it says itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from deformconv.ops.taps.spec import WindowSpec
from deformconv.sampling import rule

__all__ = ["mask_per_channel", "pull_back", "rounded", "sample"]

Array = np.ndarray[Any, Any]


def sample(spec: WindowSpec, input: Array, offset: Array) -> tuple[Array, Array]:
    """interp at every position, (N, C_in, K, P), and its derivatives along the axes, (D, N, C_in, K, P)."""
    input = input.astype(np.float64)
    samples = np.empty((spec.batch, input.shape[1], spec.taps, spec.positions))
    d_samples = np.empty((spec.rank, *samples.shape))
    for n, channels, k, p, base, position_offset in _positions(spec, input.shape[1], offset):
        value, d_value = rule.interpolate(input[n, channels], base, position_offset, spec.boundary)
        samples[n, channels, k, p] = value
        d_samples[:, n, channels, k, p] = d_value
    return samples, d_samples


def mask_per_channel(spec: WindowSpec, channels: int, mask: Array | None) -> Array:
    """The mask repeated for the channels of its offset group, (N, C_in, K, P); ones without a mask."""
    if mask is None:
        return np.ones((1, 1, 1, 1))
    mask = mask.astype(np.float64).reshape(spec.batch, spec.offset_groups, spec.taps, spec.positions)
    return np.repeat(mask, channels // spec.offset_groups, axis=1)


def pull_back(
    spec: WindowSpec, offset: Array, factors: Array, samples: Array, d_samples: Array, d_columns: Array
) -> dict[str, Array | None]:
    """The gradients of input, offset and mask from those of the columns, `factors` * `samples`, (N, C_in, K, P)."""
    N, C, D, G = spec.batch, d_columns.shape[1], spec.rank, spec.offset_groups
    # A mask belongs to the channels of its offset group, an offset too: both sum over them.
    d_mask = (d_columns * samples).reshape(N, G, C // G, spec.taps, spec.positions).sum(axis=2)
    d_interp = d_columns * factors
    d_offset = (d_interp * d_samples).reshape(D, N, G, C // G, spec.taps, spec.positions).sum(axis=3)

    d_input = np.zeros((N, C, *spec.input_size))
    for n, channels, k, p, base, position_offset in _positions(spec, C, offset):
        for corner in rule.corners(base, position_offset, spec.input_size, spec.boundary):
            at: Any = (n, channels, *corner.pixel)
            d_input[at] += corner.weight * d_interp[n, channels, k, p]
    return {
        "input": d_input,
        "offset": np.moveaxis(d_offset, 0, 3).reshape(spec.offset_shape),  # (N, G, K, D, P)
        "mask": d_mask.reshape(spec.mask_shape) if spec.masked else None,
    }


def rounded(gradients: Mapping[str, Array | None], wanted: Collection[str], dtype: Any) -> dict[str, Array]:
    """The wanted gradients that are there, in the dtype of a call's arrays."""
    return {name: gradient.astype(dtype) for name, gradient in gradients.items() if gradient is not None and name in wanted}


def _positions(
    spec: WindowSpec, in_channels: int, offset: Array
) -> Iterator[tuple[int, slice, int, int, tuple[int, ...], list[float]]]:
    """Every sampling position: image, channels of its offset group, tap, output position, base, offset."""
    N, G, K, D = spec.batch, spec.offset_groups, spec.taps, spec.rank
    offset = offset.astype(np.float64).reshape(N, G, K, D, spec.positions)
    before = [pair[0] for pair in spec.padding]
    for k, tap in enumerate(np.ndindex(spec.kernel_size)):
        for p, position in enumerate(np.ndindex(spec.output_size)):
            base = tuple(map(rule.base, position, tap, spec.stride, before, spec.dilation))
            for n, g in np.ndindex(N, G):
                group_channels = in_channels // G
                channels = slice(g * group_channels, (g + 1) * group_channels)
                yield n, channels, k, p, base, offset[n, g, k, :, p].tolist()
