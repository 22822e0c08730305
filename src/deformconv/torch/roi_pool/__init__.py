"""Deformable RoI pooling, registered with PyTorch: who loads a saved program that names it may call no function of ours."""

from __future__ import annotations

from deformconv.ops.roi_pool import folding, operator
from deformconv.torch.registry import Registered

__all__ = ["DEFORM_ROI_POOL"]

DEFORM_ROI_POOL = Registered(operator.DEFORM_ROI_POOL, fold_forward=folding.fold_forward, fold_backward=folding.fold_backward)
