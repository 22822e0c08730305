"""A small detector and its scenes, for this process and for those that torchrun starts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from deformconv.vision import MultiScaleDeformRoIPool, make_deformable


class Backbone(nn.Module):
    """Three convolutions to stride 8."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.layer2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.layer3 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer3(self.layer2(self.norm(self.layer1(x)).relu()).relu())
        return found


def detector(dtype: torch.dtype = torch.float64) -> FasterRCNN:
    """Modulated convolution and pooling in a Faster R-CNN of two classes.

    It asks for more boxes of an image than there are, so that images have different numbers of them.
    """
    torch.manual_seed(0)
    model = FasterRCNN(
        Backbone(), min_size=64, max_size=64, image_mean=[0, 0, 0], image_std=[1, 1, 1],
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)), box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(72, 10), nn.ReLU()), box_predictor=FastRCNNPredictor(10, 3),
        rpn_batch_size_per_image=32, rpn_post_nms_top_n_train=40, box_batch_size_per_image=48,
    )  # fmt: skip
    make_deformable(model, "backbone.layer3")
    model.roi_heads.box_roi_pool = MultiScaleDeformRoIPool.like(model.roi_heads.box_roi_pool, 8, hidden=8)
    return model.to(dtype)


class Scenes:
    """Noise with brighter boxes; every third scene has none."""

    def __init__(self, size: int = 60, empty: int = 3) -> None:
        self.size, self.empty = size, empty

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> tuple[Tensor, dict[str, Tensor]]:
        random = torch.Generator().manual_seed(index)
        image = torch.rand(3, 64, 64, generator=random)
        number = 0 if index % self.empty == 0 else 1 + index % 2
        corners = torch.randint(0, 30, (number, 2), generator=random)
        boxes = torch.cat([corners, corners + torch.randint(12, 34, (number, 2), generator=random)], 1).float()
        labels = torch.arange(1, number + 1)
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
            image[label, y1:y2, x1:x2] += 1.0
        return image, {"boxes": boxes, "labels": labels}
