"""The parts of a torchvision detector, by words that no library's names depend on."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from deformconv.torch import DeformRoIPool

__all__ = ["Anatomy", "Part", "anatomy", "is_rcnn", "parts"]


class Part(NamedTuple):
    """What a module is in a detector, and the words that a template of its name may ask for."""

    kind: str
    words: dict[str, Any]


class Anatomy(NamedTuple):
    """A torchvision model's ResNet, by its name in the model, and what stands around it."""

    body_name: str
    body: Any
    fpn_name: str | None  # None for a ResNet alone
    fpn: Any
    rcnn: Any  # the model, where it is a whole detector

    @property
    def blocks(self) -> dict[str, Any]:
        """The first block of each stage that the ResNet has."""
        stages = ((f"layer{number}", getattr(self.body, f"layer{number}", None)) for number in (1, 2, 3, 4))
        return {name: stage[0] for name, stage in stages if stage is not None}


def is_rcnn(model: nn.Module) -> bool:
    """Whether a model is torchvision's GeneralizedRCNN, on whatever backbone."""
    if "torchvision" not in sys.modules:  # then no model is torchvision's
        return False
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

    return isinstance(model, GeneralizedRCNN)


def anatomy(model: nn.Module) -> Anatomy | None:
    """The parts of a model that is torchvision's GeneralizedRCNN, BackboneWithFPN or ResNet; None for any other."""
    if "torchvision" not in sys.modules:  # then no model is torchvision's
        return None
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.resnet import ResNet

    rcnn: Any = model if is_rcnn(model) else None
    backbone: Any = model if rcnn is None else rcnn.backbone
    prefix = "" if rcnn is None else "backbone."
    if isinstance(backbone, BackboneWithFPN) and _is_resnet(backbone.body):
        return Anatomy(f"{prefix}body", backbone.body, f"{prefix}fpn", backbone.fpn, rcnn)
    if isinstance(model, ResNet) and _is_resnet(model):
        return Anatomy("", model, None, None, None)
    return None


def parts(found: Anatomy) -> Iterator[tuple[str, Part]]:
    """The names of a model's modules that have a place in other libraries' detectors, and what they are."""
    prefix = f"{found.body_name}." if found.body_name else ""
    for name, module in found.body.named_modules():
        if name and (part := _in_resnet(name, module)) is not None:
            yield f"{prefix}{name}", part
    if found.fpn is not None:
        yield from _in_fpn(found)
    if found.rcnn is not None:
        yield from _in_rpn(found.rcnn.rpn.head)
        yield from _in_heads(found.rcnn.roi_heads)


def _is_resnet(body: Any) -> bool:
    """Whether a module, or the IntermediateLayerGetter of one, has a ResNet's stem and blocks."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    stages = [stage for number in (1, 2, 3, 4) if (stage := getattr(body, f"layer{number}", None)) is not None]
    blocks = [block for stage in stages for block in stage]
    has_stem = isinstance(getattr(body, "conv1", None), nn.Module) and hasattr(body, "bn1")
    return has_stem and bool(blocks) and all(isinstance(block, (BasicBlock, Bottleneck)) for block in blocks)


_RESNET = (
    (r"conv1", "stem"),
    (r"bn1", "stem_norm"),
    (r"fc", "classifier"),
    (r"layer(?P<layer>\d)\.(?P<block>\d+)\.conv(?P<number>\d)", "conv"),
    (r"layer(?P<layer>\d)\.(?P<block>\d+)\.bn(?P<number>\d)", "norm"),
    (r"layer(?P<layer>\d)\.(?P<block>\d+)\.downsample\.0", "shortcut"),
    (r"layer(?P<layer>\d)\.(?P<block>\d+)\.downsample\.1", "shortcut_norm"),
)


def _in_resnet(name: str, module: Any) -> Part | None:
    for pattern, kind in _RESNET:
        if match := re.fullmatch(pattern, name):
            # torchvision's bn1 may be any norm; mmdetection's is called after what it is.
            kept = name.replace("bn", "gn") if isinstance(module, nn.GroupNorm) else name
            words: dict[str, Any] = {"name": kept, **match.groupdict()}
            if "layer" in words:
                words["stage"] = int(words["layer"]) + 1
            return Part(kind, words)
    return None


def _in_fpn(found: Anatomy) -> Iterator[tuple[str, Part]]:
    layers = sorted(int(name.removeprefix("layer")) for name in found.body.return_layers)
    for blocks, kind in (("inner_blocks", "lateral"), ("layer_blocks", "output")):
        for index, block in enumerate(getattr(found.fpn, blocks)):
            stage = layers[index] + 1 if index < len(layers) else index + 2
            yield from _convolution(f"{found.fpn_name}.{blocks}.{index}", block, kind, index=index, stage=stage)


def _in_rpn(head: Any) -> Iterator[tuple[str, Part]]:
    convolutions = list(getattr(head, "conv", ()))
    for index, block in enumerate(convolutions):
        kind = "rpn_conv" if len(convolutions) == 1 else "rpn_convs"
        yield from _convolution(f"rpn.head.conv.{index}", block, kind, index=index)
    yield "rpn.head.cls_logits", Part("rpn_logits", {})
    yield "rpn.head.bbox_pred", Part("rpn_deltas", {})


def _in_heads(heads: Any) -> Iterator[tuple[str, Part]]:
    for kind in ("box", "mask"):
        pool = getattr(heads, f"{kind}_roi_pool", None)
        for index, level in enumerate(getattr(pool, "pools", ())):
            if isinstance(level, DeformRoIPool):
                for name, _ in level.named_modules():
                    rest = f".{name}" if name else ""
                    yield f"roi_heads.{kind}_roi_pool.pools.{index}{rest}", Part(f"{kind}_pool", {"index": index, "rest": rest})
        yield from _in_head(f"roi_heads.{kind}_head", getattr(heads, f"{kind}_head", None), kind)
    for name, kind in (("box_predictor.cls_score", "box_logits"), ("box_predictor.bbox_pred", "box_deltas")):
        yield f"roi_heads.{name}", Part(kind, {})
    if getattr(heads, "mask_predictor", None) is not None:
        yield "roi_heads.mask_predictor.conv5_mask", Part("mask_upsample", {})
        yield "roi_heads.mask_predictor.mask_fcn_logits", Part("mask_logits", {})


def _in_head(name: str, head: Any, kind: str) -> Iterator[tuple[str, Part]]:
    """Convolutions and fully connected layers one after the other, counted apart."""
    convolutions, connected = 0, 0
    for child, module in head.named_children() if head is not None else ():
        if isinstance(module, nn.Linear):
            yield f"{name}.{child}", Part(f"{kind}_connected", {"index": connected, "number": connected + 1})
            connected += 1
        elif isinstance(module, nn.Sequential):
            words = {"index": convolutions, "number": convolutions + 1}
            yield from _convolution(f"{name}.{child}", module, f"{kind}_conv", **words)
            convolutions += 1


def _convolution(name: str, block: Any, kind: str, **words: Any) -> Iterator[tuple[str, Part]]:
    """A convolution and the norm after it, as torchvision's Conv2dNormActivation has them."""
    yield f"{name}.0", Part(kind, words)
    if len(block) > 1 and any(True for _ in block[1].state_dict()):
        norm = "gn" if isinstance(block[1], nn.GroupNorm) else "bn"
        yield f"{name}.1", Part(f"{kind}_norm", {**words, "norm": norm})
