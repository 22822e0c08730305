"""mmdetection's own detectors, built from the configurations in its wheel, and one batch for them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deformconv.convert.mmcv import accelerate_mmcv

with accelerate_mmcv(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mmcv.ops
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.structures import InstanceData

    register_all_modules()

__all__ = ["CONFIGS", "DEFORMABLE", "Detector", "batch", "build", "gradients", "layers_of", "loss_of", "mmcv"]

Detector = Any
CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
# The deformable models of the papers, by the names of their configurations.
DEFORMABLE = {
    "dconv": "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    "mdconv": "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
    "group4": "dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py",
    "dpool": "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py",
    "mdpool": "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py",
}
SIZE = (96, 128)
CONVOLUTIONS = (mmcv.ops.DeformConv2dPack, mmcv.ops.ModulatedDeformConv2dPack)
POOLINGS = (mmcv.ops.DeformRoIPoolPack, mmcv.ops.ModulatedDeformRoIPoolPack)


def build(config: str, seed: int = 0, pool_features: int = 64, dtype: torch.dtype = torch.float32, **changed: Any) -> Detector:
    """A detector with weights that a seed gives, offsets of some pixels, and no download.

    Its features differ from pixel to pixel in every layer, as a trained net's do, since positions would not matter otherwise.
    The predictors of a pooling have `pool_features` features instead of 1024, of which mmdetection has 100 million weights.
    """
    found = Config.fromfile(CONFIGS / config)
    found.model.backbone.init_cfg = None
    found.merge_from_dict({f"model.{name}": value for name, value in changed.items()})
    pooling = found.model.get("roi_head", {}).get("bbox_roi_extractor", {}).get("roi_layer", {})
    if "Deform" in pooling.get("type", ""):
        pooling["deform_fc_channels"] = pool_features
    if "rcnn" in found.model.test_cfg:
        found.model.test_cfg.rcnn.score_thr = 0.0  # weights of no training are sure of nothing
    torch.manual_seed(seed)
    detector = MODELS.build(found.model)
    deform(detector)
    normalise(detector)
    return detector.to(dtype)


def deform(detector: nn.Module) -> None:
    """Predictors that predict: mmcv's begin at zero. Offsets of a convolution are pixels, of a pooling tenths of a box."""
    for layer in layers_of(detector):
        last = [layer.conv_offset] if isinstance(layer, CONVOLUTIONS) else [layer.offset_fc[-1]]
        last += [layer.mask_fc[2]] if hasattr(layer, "mask_fc") else []
        for linear in last:
            nn.init.normal_(linear.weight, std=0.005)
            nn.init.normal_(linear.bias, std=1.5)


def normalise(detector: Detector) -> None:
    """Statistics of the batch in each normalisation layer of the backbone: random weights alone make features fade.

    A block adds a quarter of what it computes, so that the sums do not grow from block to block.
    """
    for name, parameter in detector.backbone.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(parameter, 0.25)
    norms = [layer for layer in detector.backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        detector.backbone(batch()[0])
    for norm in norms:
        norm.eval()
        norm.momentum = 0.1


def layers_of(detector: nn.Module) -> list[nn.Module]:
    """The deformable layers."""
    return [layer for layer in detector.modules() if isinstance(layer, CONVOLUTIONS + POOLINGS)]


def batch(dtype: torch.dtype = torch.float32, images: int = 1, size: tuple[int, int] = SIZE) -> tuple[Tensor, list[Any]]:
    """Images, and the boxes, classes and masks of two objects in each."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    names = "img_shape", "ori_shape", "pad_shape", "batch_input_shape"
    height, width = size
    # Left, top, right, bottom.
    shares = torch.tensor([[0.1, 0.12, 0.55, 0.9], [0.4, 0.3, 0.98, 0.95]], dtype=dtype)
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, (shares * torch.tensor([width, height] * 2)).int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    for _ in range(images):
        sample = DetDataSample(metainfo={**dict.fromkeys(names, size), "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(
            bboxes=shares * torch.tensor([width, height] * 2),
            labels=torch.tensor([1, 5]),
            masks=BitmapMasks(masks.numpy(), height, width),
        )
        samples.append(sample)
    return torch.randn(images, 3, *size, generator=generator, dtype=torch.float64).to(dtype), samples


def loss_of(detector: Detector, images: Tensor, samples: list[Any]) -> Tensor:
    """The sum of the losses, with the same boxes drawn each time."""
    torch.manual_seed(0)
    total: Tensor = detector.parse_losses(detector.loss(images, samples))[0]
    return total


def gradients(detector: Detector, images: Tensor, samples: list[Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss, and the gradient of each parameter, None where a step does not reach it."""
    detector.train()
    detector.zero_grad()
    loss = loss_of(detector, images, samples)
    loss.backward()
    found = {name: None if p.grad is None else p.grad.detach().clone() for name, p in detector.named_parameters()}
    return loss.detach(), found
