"""Multi-scale deformable attention as transformers and mmcv call it, computed by our operator: a function for each form.

Each is made of the library's own, to which it hands on what ours is not for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from deformconv.torch import deform_attention, modes
from deformconv.torch.tensors import HALF

__all__ = ["attribute", "by_points", "function", "method"]

_Form = Callable[..., Any]
_FLOATS = (*HALF, torch.float32, torch.float64)


def method(theirs: _Form) -> _Form:
    """`forward` of the class MultiScaleDeformableAttention, which most models of transformers have."""

    @wraps(theirs)
    def forward(
        self: Any, value: Tensor, value_spatial_shapes: Tensor, value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor, sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int,
    ) -> Any:  # fmt: skip
        if _is_ours(value, sampling_locations, attention_weights):
            return _attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)
        return theirs(
            self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, sampling_locations,
            attention_weights, im2col_step,
        )  # fmt: skip

    return forward


def function(theirs: _Form) -> _Form:
    """`multi_scale_deformable_attention` of Mask2Former and OneFormer, and mmcv's function for CPUs."""

    @wraps(theirs)
    def attention(value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor) -> Any:
        if _is_ours(value, sampling_locations, attention_weights):
            return _attention(value, value_spatial_shapes, sampling_locations, attention_weights)
        return theirs(value, value_spatial_shapes, sampling_locations, attention_weights)

    return attention


def by_points(theirs: _Form) -> _Form:
    """`multi_scale_deformable_attention_v2` of RT-DETR v2: the points of all levels stand in one axis.

    Where levels differ in their numbers of points, as D-FINE's may, the result is a sum over calls for one level each. The
    method "discrete", which takes the nearest pixel, is theirs.
    """

    @wraps(theirs)
    def attention(
        value: Tensor, value_spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor,
        num_points_list: Sequence[int], method: str = "default",
    ) -> Any:  # fmt: skip
        if method != "default" or not _is_ours(value, sampling_locations, attention_weights):
            return theirs(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)
        points = list(num_points_list)
        if len(set(points)) == 1:
            locations, weights = (t.unflatten(3, (len(points), -1)) for t in (sampling_locations, attention_weights))
            return _attention(value, value_spatial_shapes, locations, weights)
        parts = zip(
            value.split([height * width for height, width in value_spatial_shapes], dim=1),
            value_spatial_shapes,
            sampling_locations.unsqueeze(3).split(points, dim=4),
            attention_weights.unsqueeze(3).split(points, dim=4),
            strict=True,
        )
        return sum(_attention(part, [shape], locations, weights) for part, shape, locations, weights in parts)

    return attention


def attribute(name: str, function: str) -> property:
    """An attribute of layers that holds a function of a name: it is ours while this stands in the layers' class.

    What a layer sets stays in the layer, so that this can be taken away from models that were made under it.
    """

    def get(layer: Any) -> Any:
        found = vars(layer).get(name)
        return by_points(found) if getattr(found, "__name__", None) == function else found

    def put(layer: Any, value: Any) -> None:
        vars(layer)[name] = value

    return property(get, put)


def _is_ours(*tensors: Tensor) -> bool:
    """Whether our kernels are for a call: on a CPU, in one of their dtypes, not read into a file that does without us."""
    if not all(tensor.is_cpu and tensor.dtype in _FLOATS for tensor in tensors):
        return False
    if modes.exporting() or modes.traced() or modes.exporting_program():
        return False
    return modes.autocast("cpu") or len({tensor.dtype for tensor in tensors}) == 1


def _attention(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """Our operator; under autocast in the widest dtype of the three, and float32 at least, as grid_sample is."""
    if modes.autocast("cpu"):
        dtype = torch.float64 if torch.float64 in (value.dtype, locations.dtype, weights.dtype) else torch.float32
        value, locations, weights = value.to(dtype), locations.to(dtype), weights.to(dtype)
        with modes.without_autocast("cpu"):
            return deform_attention(value, shapes, locations, weights)
    return deform_attention(value, shapes, locations, weights)
