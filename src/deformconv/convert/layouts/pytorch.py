"""Libraries built on PyTorch, which name the parameters of all that is not deformable as we do."""

from __future__ import annotations

from deformconv.convert.layouts.layout import Layout

__all__ = ["BASICSR", "DCNV2", "DEFORMCONV", "DETECTRON2", "MMCV", "MMDET1", "TORCHVISION"]

_NEVER_IN_V1 = (False, None)

MMCV = Layout("mmcv", "mmcv and mmdetection from 2.0 on", biases=_NEVER_IN_V1, pools=("separate", "aligned"))

MMDET1 = Layout(
    "mmdet1", "mmdetection 1", predictor="{layer}_offset.{parameter}", biases=_NEVER_IN_V1, pools=("separate", "rounded")
)

DETECTRON2 = Layout("detectron2", "detectron2", predictor="{layer}_offset.{parameter}", biases=_NEVER_IN_V1)

DCNV2 = Layout(
    "dcnv2", "CharlesShang's DCNv2 and CenterNet",
    predictor="{layer}.conv_offset_mask.{parameter}", biases=(None, True), dilated=None, pools=("shared", "rounded"),
)  # fmt: skip

BASICSR = Layout("basicsr", "BasicSR", guided=True)

# What `to_torchvision` makes of our layers, so that the masks are ours.
TORCHVISION = Layout(
    "torchvision", "torchvision", weight="{layer}.deform_conv.{parameter}", predictor="{layer}.offset_conv.{parameter}",
    mask_scale=None,
)  # fmt: skip

DEFORMCONV = Layout("deformconv", "this library", predictor="{layer}.offset_conv.{parameter}", mask_scale=None)
