"""The predictor of MXNet's block, a convolution with the layer's groups, and ours, which has none."""

from __future__ import annotations

import numpy as np

from deformconv.errors import ShapeError

__all__ = ["dense", "grouped"]


def dense(weight: np.ndarray, inputs: int, key: str, groups: int) -> np.ndarray:
    """A convolution's weight without groups: zeros where a group did not look."""
    outputs, seen, *kernel = weight.shape
    if seen == inputs:
        return weight
    if seen < 1 or inputs % seen or outputs % (inputs // seen):
        raise ShapeError(
            f"{key!r} has shape {weight.shape}, so each predicted channel reads {seen} of C_in = {inputs} (groups={groups}); "
            f"expected {inputs}, or a part of them in groups that divide both {inputs} and {outputs}."
        )
    predictor_groups = inputs // seen
    made = np.zeros((outputs, inputs, *kernel), weight.dtype)
    for group in range(predictor_groups):
        rows = slice(group * outputs // predictor_groups, (group + 1) * outputs // predictor_groups)
        made[rows, group * seen : (group + 1) * seen] = weight[rows]
    return made


def grouped(weight: np.ndarray, groups: int) -> np.ndarray:
    """The weight of a convolution with groups that computes the same, if there is one."""
    outputs, inputs = weight.shape[:2]
    if outputs % groups:
        raise ValueError(
            f"the predictor has {outputs} channels, which groups={groups} does not divide; in MXNet's block it has as many "
            "groups as the convolution. With style='symbol', or to='mxnet_symbol', it has one."
        )
    seen, predicted = inputs // groups, outputs // groups
    parts = np.concatenate([weight[g * predicted : (g + 1) * predicted, g * seen : (g + 1) * seen] for g in range(groups)])
    if np.count_nonzero(parts) != np.count_nonzero(weight):
        raise ValueError(
            f"the predictor reads across the convolution's {groups} groups; in MXNet's block it has as many groups, and "
            "cannot. With style='symbol', or to='mxnet_symbol', it has one."
        )
    return parts
