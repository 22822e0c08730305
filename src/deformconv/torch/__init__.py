"""Deformable convolution and deformable RoI pooling for PyTorch: functions with torchvision's signature, and layers."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    from deformconv.installation import command as _command

    raise ModuleNotFoundError(
        f"deformconv.torch needs PyTorch, which is not installed: {_command('torch', 'torch')}", name="torch"
    ) from None

from deformconv.torch.conv.functional import deform_conv1d, deform_conv2d, deform_conv3d
from deformconv.torch.conv.modules import DeformConv1d, DeformConv2d, DeformConv3d, parameter_groups, reset_predictors
from deformconv.torch.roi_pool.functional import deform_roi_pool
from deformconv.torch.roi_pool.modules import DeformRoIPool

__all__ = [
    "DeformConv1d",
    "DeformConv2d",
    "DeformConv3d",
    "DeformRoIPool",
    "deform_conv1d",
    "deform_conv2d",
    "deform_conv3d",
    "deform_roi_pool",
    "parameter_groups",
    "reset_predictors",
]
