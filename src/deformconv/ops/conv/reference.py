"""The definition of deformable convolution and of its five gradients, in NumPy and float64.

    y[n, o, p] = bias[o]
               + sum over k, c in group(o) of weight[o, c, k] * mask[n, g, k, p] * interp(x[n, c], q[k, p])
    q[k, p] = p*stride - padding + k*dilation + offset[n, g, k, :, p]

with g the offset group of channel c, and `interp` what `deformconv.sampling.rule` says. arXiv 1703.06211,
equation 2, and arXiv 1811.11168, equation 1. Written to be read: every other backend is compared with it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import numpy as np

from deformconv.ops.backends import as_given as computes_in
from deformconv.ops.backends import nothing_to_say as how
from deformconv.ops.backends import reasons_against_numpy_only as reasons_against
from deformconv.ops.conv.spec import ConvSpec, Gradients
from deformconv.ops.taps import reference as taps

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against"]

Array = np.ndarray[Any, Any]

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True


# Infinities are data here: 0 * inf is NaN by definition, and nothing to warn of.
@np.errstate(invalid="ignore", over="ignore")
def forward(spec: ConvSpec, input: Array, offset: Array, weight: Array, bias: Array | None, mask: Array | None) -> Array:
    """The output (N, C_out, *O)."""
    samples, _ = taps.sample(spec, input, offset)
    columns = samples * taps.mask_per_channel(spec, spec.in_channels, mask)
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
    samples, d_samples = taps.sample(spec, input, offset)
    factors = taps.mask_per_channel(spec, spec.in_channels, mask)
    d_output = grad_output.astype(np.float64)
    d_output = d_output.reshape(spec.batch, spec.groups, spec.out_channels // spec.groups, spec.positions)
    d_columns = np.einsum("gock,ngop->ngckp", _grouped_weight(spec, weight), d_output)
    d_columns = d_columns.reshape(samples.shape)  # (N, C_in, K, P)
    d_weight = np.einsum("ngop,ngckp->gock", d_output, _grouped(spec, samples * factors))
    d_bias = d_output.sum(axis=(0, 3))
    gradients = {
        **taps.pull_back(spec, offset, factors, samples, d_samples, d_columns),
        "weight": d_weight.reshape(spec.weight_shape),
        "bias": d_bias.reshape(spec.out_channels) if spec.biased else None,
    }
    return Gradients(**taps.rounded(gradients, wanted, input.dtype))


def _grouped(spec: ConvSpec, columns: Array) -> Array:
    """(N, C_in, K, P) as (N, groups, C_in/groups, K, P)."""
    return columns.reshape(spec.batch, spec.groups, spec.in_channels // spec.groups, spec.taps, spec.positions)


def _grouped_weight(spec: ConvSpec, weight: Array) -> Array:
    """(C_out, C_in/groups, *kernel) as (groups, C_out/groups, C_in/groups, K)."""
    return weight.astype(np.float64).reshape(
        spec.groups, spec.out_channels // spec.groups, spec.in_channels // spec.groups, spec.taps
    )
