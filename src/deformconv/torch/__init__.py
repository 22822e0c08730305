"""Deformable convolution and its family for PyTorch: functions with the signatures that are known, and layers."""

from typing import TYPE_CHECKING, Any

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    from deformconv.installation import command

    raise ModuleNotFoundError(
        f"deformconv.torch needs PyTorch, which is not installed: {command('torch', 'torch')}", name="torch"
    ) from None

from deformconv.torch.aggregate import DEFORM_AGGREGATE  # noqa: F401
from deformconv.torch.attention import DEFORM_ATTENTION  # noqa: F401
from deformconv.torch.conv.functional import deform_conv1d, deform_conv2d, deform_conv3d
from deformconv.torch.conv.modules import DeformConv1d, DeformConv2d, DeformConv3d, parameter_groups, reset_predictors
from deformconv.torch.conv.prepacked import PrepackedDeformConv
from deformconv.torch.roi_pool import DEFORM_ROI_POOL  # noqa: F401

if TYPE_CHECKING:
    from deformconv.torch.aggregate.functional import deform_aggregate1d, deform_aggregate2d, deform_aggregate3d
    from deformconv.torch.attention.functional import deform_attention
    from deformconv.torch.attention.modules import DeformAttention
    from deformconv.torch.roi_pool.functional import deform_roi_pool
    from deformconv.torch.roi_pool.modules import DeformRoIPool

__all__ = [
    "DeformAttention",
    "DeformConv1d",
    "DeformConv2d",
    "DeformConv3d",
    "DeformRoIPool",
    "PrepackedDeformConv",
    "deform_aggregate1d",
    "deform_aggregate2d",
    "deform_aggregate3d",
    "deform_attention",
    "deform_conv1d",
    "deform_conv2d",
    "deform_conv3d",
    "deform_roi_pool",
    "parameter_groups",
    "reset_predictors",
]

# Who imports this room for its convolution does not wait for these. Their operators are registered above, for saved programs.
_WHERE = {
    "DeformAttention": "attention.modules",
    "deform_aggregate1d": "aggregate.functional",
    "deform_aggregate2d": "aggregate.functional",
    "deform_aggregate3d": "aggregate.functional",
    "deform_attention": "attention.functional",
    "deform_roi_pool": "roi_pool.functional",
    "DeformRoIPool": "roi_pool.modules",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'deformconv.torch' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"deformconv.torch.{_WHERE[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
