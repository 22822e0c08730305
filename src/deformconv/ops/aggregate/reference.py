"""The definition of deformable aggregation and of its gradients, in NumPy and float64.

    y[n, c, p] = sum over k of mask[n, g, k, p] * interp(x[n, c], q[k, p])
    q[k, p] = p*stride - padding + k*dilation + offset[n, g, k, :, p]

with g the offset group of channel c, and `interp` what `deformconv.sampling.rule` says: deformable convolution without its
weight. arXiv 2211.05778, equation 2, with factors of any kind. Written to be read: every other backend is compared with it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import numpy as np

from deformconv.ops.aggregate.spec import AggregateSpec, Gradients
from deformconv.ops.backends import as_given as computes_in
from deformconv.ops.backends import nothing_to_say as how
from deformconv.ops.backends import reasons_against_numpy_only as reasons_against
from deformconv.ops.taps import reference as taps

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against"]

Array = np.ndarray[Any, Any]

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True


# Infinities are data here: 0 * inf is NaN by definition, and nothing to warn of.
@np.errstate(invalid="ignore", over="ignore")
def forward(spec: AggregateSpec, input: Array, offset: Array, mask: Array | None) -> Array:
    """The output (N, C, *O)."""
    samples, _ = taps.sample(spec, input, offset)  # (N, C, K, P)
    columns = samples * taps.mask_per_channel(spec, spec.channels, mask)
    return columns.sum(axis=2).reshape(spec.output_shape).astype(input.dtype)


@np.errstate(invalid="ignore", over="ignore")
def backward(
    spec: AggregateSpec, grad_output: Array, input: Array, offset: Array, mask: Array | None, wanted: Collection[str]
) -> Gradients:
    """The gradients of sum(grad_output * output)."""
    samples, d_samples = taps.sample(spec, input, offset)
    factors = taps.mask_per_channel(spec, spec.channels, mask)
    d_output = grad_output.astype(np.float64).reshape(spec.batch, spec.channels, 1, spec.positions)
    d_columns = np.broadcast_to(d_output, samples.shape)  # each tap's is the output's
    gradients = taps.pull_back(spec, offset, factors, samples, d_samples, d_columns)
    return Gradients(**taps.rounded(gradients, wanted, input.dtype))
