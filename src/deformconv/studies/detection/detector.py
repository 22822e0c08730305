"""A small Faster R-CNN of torchvision's parts, and the paper's arms, each cut out of one trained detector by surgery."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from deformconv.vision import FeatureMimicking, MultiScaleDeformRoIPool, make_deformable

__all__ = ["ARMS", "CLASSES", "cut", "detector", "fresh", "inner", "wider_head"]

CLASSES = 11  # ten digits, and the background as 0
WIDTH, PYRAMID, HIDDEN, BINS = 32, 64, 256, 7  # channels of conv2 and of the pyramid, the head's features, a box's bins
ANCHORS = ((10, 16), (24, 36), (52, 76))  # two sizes on each level, in pixels of a scene of 128
RATIOS = (0.5, 1.0, 2.0)
# A patch's side for feature mimicking. By torchvision's rule for levels, boxes and patches of this size are all pooled from the
# map of stride 8, where a patch has about as many cells as bins.
CROP = 64
MIMICKED = 8  # boxes of an image that are cut out for it
_norm = partial(nn.GroupNorm, 8)  # batch normalisation would learn from patches, and learns badly from small batches


class _Backbone(nn.Module):
    """A ResNet of one basic block a stage, 6 convolutions of 3x3 taps in conv3 to conv5, and a pyramid on these stages."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH]
        stem = nn.Sequential(
            nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False), _norm(WIDTH), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        stages: OrderedDict[str, nn.Module] = OrderedDict(stem=stem, layer1=_stage(WIDTH, WIDTH))
        for number, (channels, planes) in enumerate(pairwise(widths), 2):
            stages[f"layer{number}"] = _stage(channels, planes, 2)
        for module in stages.values():
            _initialise(module)
        self.body = IntermediateLayerGetter(nn.Sequential(stages), {"layer2": "0", "layer3": "1", "layer4": "2"})
        self.fpn = FeaturePyramidNetwork(widths[1:], PYRAMID)
        self.out_channels = PYRAMID

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps (N, 64, h, w) of strides 8, 16 and 32, of images (N, 3, H, W)."""
        maps: dict[str, Tensor] = self.fpn(self.body(images))
        return maps


def _stage(channels: int, planes: int, stride: int = 1) -> nn.Module:
    down = nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), _norm(planes)) if stride > 1 else None
    return nn.Sequential(BasicBlock(channels, planes, stride, down, norm_layer=_norm))


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def detector(size: int = 128) -> FasterRCNN:
    """The regular detector for scenes of `size` x `size` pixels, with fresh weights of PyTorch's global random numbers."""
    names = ["0", "1", "2"]
    return FasterRCNN(
        _Backbone(),
        min_size=size, max_size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3, _skip_resize=True,
        rpn_anchor_generator=AnchorGenerator(ANCHORS, (RATIOS,) * len(ANCHORS)),
        rpn_pre_nms_top_n_train=300, rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_train=150, rpn_post_nms_top_n_test=60,
        rpn_batch_size_per_image=128,
        box_roi_pool=MultiScaleRoIAlign(names, BINS, sampling_ratio=2),
        box_head=TwoMLPHead(PYRAMID * BINS**2, HIDDEN), box_predictor=FastRCNNPredictor(HIDDEN, CLASSES),
        box_batch_size_per_image=64, box_positive_fraction=0.5, box_score_thresh=0.02, box_detections_per_img=30,
    )  # fmt: skip


def fresh(seed: int, size: int = 128) -> FasterRCNN:
    """The regular detector of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return detector(size)


def wider_head(head: TwoMLPHead, wider: int) -> TwoMLPHead:
    """A box head with more hidden units that computes what `head` does: the new ones count nothing at first."""
    first, second = head.fc6, head.fc7
    made = TwoMLPHead(first.in_features, first.out_features + wider)
    made.fc7 = nn.Linear(first.out_features + wider, second.out_features)
    with torch.no_grad():
        made.fc6.weight[: first.out_features] = first.weight
        made.fc6.bias[: first.out_features] = first.bias
        made.fc7.weight[:, first.out_features :] = 0
        made.fc7.weight[:, : first.out_features] = second.weight
        made.fc7.bias.copy_(second.bias)
    return made


def _wide(model: FasterRCNN) -> nn.Module:
    """As many parameters more as the predictor of deformable pooling has."""
    head = model.roi_heads.box_head
    predictor = sum(parameter.numel() for parameter in _pool(model, modulated=True).parameters())
    unit = head.fc6.in_features + 1 + head.fc7.out_features
    model.roi_heads.box_head = wider_head(head, round(predictor / unit))
    return model


def _pool(model: FasterRCNN, *, modulated: bool) -> MultiScaleDeformRoIPool:
    # One predictor for all levels: one for each would be more parameters than all the rest of this detector, and by
    # torchvision's rule all boxes of such small scenes are pooled from one level.
    return MultiScaleDeformRoIPool.like(
        model.roi_heads.box_roi_pool, PYRAMID, hidden=HIDDEN, share_levels=True, modulated=modulated
    )


def _v1(model: FasterRCNN) -> nn.Module:
    make_deformable(model, "resnet:conv5", modulated=False)
    model.roi_heads.box_roi_pool = _pool(model, modulated=False)
    return model


def _v2_convolution(model: FasterRCNN) -> nn.Module:
    make_deformable(model, "resnet:conv3-conv5")
    return model


def _v2(model: FasterRCNN) -> nn.Module:
    _v2_convolution(model)
    model.roi_heads.box_roi_pool = _pool(model, modulated=True)
    return model


def _v2_mimicking(model: FasterRCNN) -> nn.Module:
    return FeatureMimicking(_v2(model), rois_per_image=MIMICKED, crop=CROP)


def _unchanged(model: FasterRCNN) -> nn.Module:
    return model


# What surgery makes of the regular detector.
ARMS: dict[str, Callable[[FasterRCNN], nn.Module]] = {
    "regular": _unchanged,
    "seconds": _unchanged,
    "wide": _wide,
    "v1": _v1,
    "v2-conv": _v2_convolution,
    "v2": _v2,
    "v2-mimic": _v2_mimicking,
}


def cut(regular: nn.Module, arm: str, seed: int) -> nn.Module:
    """An arm out of a regular detector, which stays as it is; what it brings anew is of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARMS[arm](copy.deepcopy(regular)).train()


def inner(model: Any) -> FasterRCNN:
    """The detector itself, where the arm wraps it for training."""
    return model.detector if isinstance(model, FeatureMimicking) else model
