"""Where a deformable layer samples, as numbers: NumPy only."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from deformconv.errors import ShapeError
from deformconv.ops.window import by, count, integers, n_of, paddings, resolved

__all__ = ["regular_points", "sampling_points"]

Positions = npt.NDArray[np.float64]


def sampling_points(
    offset: npt.ArrayLike,
    kernel_size: int | tuple[int, ...],
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    offset_groups: int = 1,
) -> Positions:
    """The positions at which each tap samples: `p*stride - padding + k*dilation + offset`, in input pixels.

    The channels of `offset` go by offset group, then tap (row-major), then axis, so that the two or three
    numbers of one tap are neighbours: (dy, dx), (dy, dx), ... and never all dy before all dx.

    Args:
        offset: (N, offset_groups*K*D, *O), input pixels; D is the number of spatial axes, K that of taps.
        kernel_size, stride, padding, dilation: the layer's; one integer, or one per axis.
        offset_groups: as the layer's.

    Returns:
        (N, offset_groups, K, D, *O), float64: in the order depth, height, width (y before x).

    Raises:
        ShapeError: the channels do not fit the kernel size and offset groups.

    Example:
        >>> import numpy as np
        >>> offset = np.zeros((1, 18, 5, 5))
        >>> offset[0, 2 * 4 + 1] = 0.5  # tap 4, the middle one, half a pixel to the right
        >>> sampling_points(offset, 3, padding=1)[0, 0, 4, :, 2, 3].tolist()
        [2.0, 3.5]
    """
    offset = np.asarray(offset, np.float64)
    D = offset.ndim - 2
    if not 1 <= D <= 3:
        raise ShapeError(
            f"`offset` has {n_of(offset.ndim, 'axis')}, shape {offset.shape}; expected 3, 4 or 5: "
            "(N, offset_groups*K*D) and 1, 2 or 3 spatial axes. For one image without a batch axis pass "
            "`offset[None]`."
        )
    kernel = integers("kernel_size", kernel_size, D, 1)
    groups, K = count("offset_groups", offset_groups), prod(kernel)
    batch, channels, *output_size = offset.shape
    if channels != groups * K * D:
        raise ShapeError(
            f"`offset` has {n_of(channels, 'channel')}; expected {n_of(groups, 'offset group')} x "
            f"{n_of(K, 'tap')} x {n_of(D, 'axis')} = {groups * K * D} for a {by(kernel)} kernel."
        )
    regular = regular_points(tuple(output_size), kernel, stride=stride, padding=padding, dilation=dilation)
    return offset.reshape(batch, groups, K, D, *output_size) + regular


def regular_points(
    output_size: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> Positions:
    """The positions at which a plain convolution samples: `sampling_points` of zero offsets, (K, D, *O)."""
    D = len(output_size)
    kernel = integers("kernel_size", kernel_size, D, 1)
    strides, dilations = integers("stride", stride, D, 1), integers("dilation", dilation, D, 1)
    before = [pair[0] for pair in resolved(paddings(padding, D), kernel, strides, dilations)]
    points = np.empty((prod(kernel), D, *output_size))
    for axis in range(D):
        taps = np.indices(kernel)[axis].reshape(-1, *(1,) * D) * dilations[axis]  # (K, 1, ...)
        points[:, axis] = np.indices(output_size)[axis] * strides[axis] - before[axis] + taps
    return points
