"""The definition of deformable convolution and of its five gradients, in NumPy and float64.

    y[n, o, p] = bias[o]
               + sum over k, c in group(o) of weight[o, c, k] * mask[n, g, k, p] * interp(x[n, c], q[k, p])
    q[k, p] = p*stride - padding + k*dilation + offset[n, g, k, :, p]

with g the offset group of channel c, and `interp` what `deformconv.sampling.rule` says. arXiv 1703.06211,
equation 2, and arXiv 1811.11168, equation 1. Written to be read: every other backend is compared with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

import numpy as np

from deformconv.ops.backends import as_given as computes_in
from deformconv.ops.backends import nothing_to_say as how
from deformconv.ops.backends import reasons_against_numpy_only as reasons_against
from deformconv.ops.conv.spec import ConvSpec, Gradients
from deformconv.sampling import rule

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against"]

Array = np.ndarray[Any, Any]

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True


# Infinities are data here: 0 * inf is NaN by definition, and nothing to warn of.
@np.errstate(invalid="ignore", over="ignore")
def forward(spec: ConvSpec, input: Array, offset: Array, weight: Array, bias: Array | None, mask: Array | None) -> Array:
    """The output (N, C_out, *O)."""
    samples, _ = _sample(spec, input, offset)
    columns = samples * _mask_per_channel(spec, mask)
    output = np.einsum("gock,ngckp->ngop", _grouped_weight(spec, weight), _grouped(spec, columns))
    output = output.reshape(spec.batch, spec.out_channels, spec.positions)
    if bias is not None:
        output = output + bias.astype(np.float64)[:, None]
    return output.reshape(spec.output_shape).astype(input.dtype)


@np.errstate(invalid="ignore", over="ignore")
def backward(
    spec: ConvSpec,
    grad_output: Array,
    input: Array,
    offset: Array,
    weight: Array,
    mask: Array | None,
    wanted: Collection[str],
) -> Gradients:
    """The gradients of sum(grad_output * output)."""
    N, C, D, G = spec.batch, spec.in_channels, spec.rank, spec.offset_groups
    samples, d_samples = _sample(spec, input, offset)
    mask_per_channel = _mask_per_channel(spec, mask)
    d_output = grad_output.astype(np.float64)
    d_output = d_output.reshape(N, spec.groups, spec.out_channels // spec.groups, spec.positions)
    d_columns = np.einsum("gock,ngop->ngckp", _grouped_weight(spec, weight), d_output)
    d_columns = d_columns.reshape(samples.shape)  # (N, C_in, K, P)

    d_weight = np.einsum("ngop,ngckp->gock", d_output, _grouped(spec, samples * mask_per_channel))
    d_bias = d_output.sum(axis=(0, 3))

    # A mask belongs to the channels of its offset group, an offset too: both sum over them.
    d_mask = (d_columns * samples).reshape(N, G, C // G, spec.taps, spec.positions).sum(axis=2)
    d_interp = d_columns * mask_per_channel
    d_offset = (d_interp * d_samples).reshape(D, N, G, C // G, spec.taps, spec.positions).sum(axis=3)

    d_input = np.zeros(spec.input_shape)
    for n, channels, k, p, base, position_offset in _positions(spec, offset):
        for corner in rule.corners(base, position_offset, spec.input_size, spec.boundary):
            at: Any = (n, channels, *corner.pixel)
            d_input[at] += corner.weight * d_interp[n, channels, k, p]

    gradients = {
        "input": d_input,
        "offset": np.moveaxis(d_offset, 0, 3).reshape(spec.offset_shape),  # (N, G, K, D, P)
        "weight": d_weight.reshape(spec.weight_shape),
        "bias": d_bias.reshape(spec.out_channels) if spec.biased else None,
        "mask": d_mask.reshape(spec.mask_shape) if spec.masked else None,
    }
    return Gradients(
        **{
            name: gradient.astype(input.dtype)
            for name, gradient in gradients.items()
            if gradient is not None and name in wanted
        }
    )


def _positions(spec: ConvSpec, offset: Array) -> Iterator[tuple[int, slice, int, int, tuple[int, ...], list[float]]]:
    """Every sampling position: image, channels of its offset group, tap, output position, base, offset."""
    N, G, K, D = spec.batch, spec.offset_groups, spec.taps, spec.rank
    offset = offset.astype(np.float64).reshape(N, G, K, D, spec.positions)
    before = [pair[0] for pair in spec.padding]
    for k, tap in enumerate(np.ndindex(spec.kernel_size)):
        for p, position in enumerate(np.ndindex(spec.output_size)):
            base = tuple(map(rule.base, position, tap, spec.stride, before, spec.dilation))
            for n, g in np.ndindex(N, G):
                group_channels = spec.in_channels // G
                channels = slice(g * group_channels, (g + 1) * group_channels)
                yield n, channels, k, p, base, offset[n, g, k, :, p].tolist()


def _sample(spec: ConvSpec, input: Array, offset: Array) -> tuple[Array, Array]:
    """interp at every position, (N, C_in, K, P), and its derivatives along the axes, (D, N, C_in, K, P)."""
    input = input.astype(np.float64)
    samples = np.empty((spec.batch, spec.in_channels, spec.taps, spec.positions))
    d_samples = np.empty((spec.rank, *samples.shape))
    for n, channels, k, p, base, position_offset in _positions(spec, offset):
        value, d_value = rule.interpolate(input[n, channels], base, position_offset, spec.boundary)
        samples[n, channels, k, p] = value
        d_samples[:, n, channels, k, p] = d_value
    return samples, d_samples


def _mask_per_channel(spec: ConvSpec, mask: Array | None) -> Array:
    """The mask repeated for the channels of its offset group, (N, C_in, K, P); ones without a mask."""
    if mask is None:
        return np.ones((1, 1, 1, 1))
    mask = mask.astype(np.float64).reshape(spec.batch, spec.offset_groups, spec.taps, spec.positions)
    return np.repeat(mask, spec.in_channels // spec.offset_groups, axis=1)


def _grouped(spec: ConvSpec, columns: Array) -> Array:
    """(N, C_in, K, P) as (N, groups, C_in/groups, K, P)."""
    return columns.reshape(spec.batch, spec.groups, spec.in_channels // spec.groups, spec.taps, spec.positions)


def _grouped_weight(spec: ConvSpec, weight: Array) -> Array:
    """(C_out, C_in/groups, *kernel) as (groups, C_out/groups, C_in/groups, K)."""
    return weight.astype(np.float64).reshape(
        spec.groups, spec.out_channels // spec.groups, spec.in_channels // spec.groups, spec.taps
    )
