"""What a detector's file says of the images that it takes, and what the model must agree with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deformconv.convert.detectors.parts import Anatomy
from deformconv.convert.layouts.layout import Layout

__all__ = ["CELL_ANCHORS", "PIXELS", "Origin", "check_model", "check_told", "settled"]

PIXELS = ("pixel_mean", "pixel_std")  # detectron2's buffers
CELL_ANCHORS = "proposal_generator.anchor_generator.cell_anchors."
_MEANS = (123.675, 103.53)  # of red and of blue, which every library takes for ImageNet's
_EPS = 1e-5


class Origin(NamedTuple):
    """How a file's detector was built: what the caller says, or, when settled, what it is."""

    channel_order: str | None = None
    stride_in_1x1: bool | None = None


def settled(found: Anatomy, layout: Layout, origin: Origin, told: Mapping[str, Tensor]) -> Origin:
    """What the caller says, else what the file tells, else the library's only habit."""
    order, is_strided = origin
    if layout.source != "detectron2":
        return Origin("rgb" if order is None else order, bool(is_strided))
    mean, std = ([float(number) for number in told[name].flatten()] if name in told else [] for name in PIXELS)
    if order is None and len(mean) == 3:
        ends = mean[0], mean[2]
        order = "rgb" if _near(ends, _MEANS) else "bgr" if _near(ends, _MEANS[::-1]) else None
    if is_strided is None and std:
        is_strided = all(number == 1 for number in std)
    if is_strided is None and not _is_bottleneck(found):
        is_strided = False
    if order is None or is_strided is None:
        why = "`state` has not both of pixel_mean and pixel_std, with ImageNet's numbers, which would tell"
        if not told:
            why = "a state_dict without pixel_mean and pixel_std does not tell"
        raise ValueError(
            f"{why} what the ResNet takes and where it strides; expected `channel_order` and `stride_in_1x1`, as the "
            "detectron2 config has them (INPUT.FORMAT, RESNETS.STRIDE_IN_1X1): 'bgr' and True for its R50 and R101, of MSRA's "
            "weights with pixel_std 1; 'bgr' and False for its X101; 'rgb' and False for torchvision's weights."
        )
    return Origin(order, is_strided)


def check_model(found: Anatomy, layout: Layout, origin: Origin) -> None:
    """Raise if the model's ResNet computes something else than one with these words does."""
    channels = found.body.conv1.in_channels
    if origin.channel_order == "bgr" and channels != 3:
        raise ValueError(
            f"`channel_order` is 'bgr', and the first convolution of `model` takes {channels} channels; expected 3."
        )
    _check_stride(found, origin)
    for name, module in (*_named(found.body_name, found.body), *_named(found.fpn_name or "", found.fpn)):
        eps = getattr(module, "eps", _EPS)
        if eps != _EPS:
            raise ValueError(
                f"layer {name!r} of `model` has eps={eps:g}, and those of {layout.library} {_EPS:g}: other outputs. Set it: "
                f"`for module in model.modules(): module.eps = {_EPS:g}`."
            )


def _named(prefix: str, module: Any) -> list[tuple[str, Any]]:
    return list(module.named_modules(prefix=prefix)) if module is not None else []


def _is_bottleneck(found: Anatomy) -> bool:
    return any(hasattr(block, "conv3") for block in found.blocks.values())


def _check_stride(found: Anatomy, origin: Origin) -> None:
    """Raise unless each stage strides where the file's does: in its first block's 1x1 convolution, or in the 3x3."""
    for stage, block in found.blocks.items():
        strides = [max(getattr(convolution, "stride", (1,))) for convolution in (block.conv1, block.conv2)]
        if not hasattr(block, "conv3") or max(strides) == 1 or (strides[0] > 1) == origin.stride_in_1x1:
            continue
        name = f"{found.body_name}.{stage}".lstrip(".")
        here, there = ("1x1", "3x3") if strides[0] > 1 else ("3x3", "1x1")
        pair = "(2, 2), (1, 1)" if there == "1x1" else "(1, 1), (2, 2)"
        body = f"model.{found.body_name}" if found.body_name else "model"
        raise ValueError(
            f"{name!r} of `model` strides in its {here} convolution, and the other detector's in its {there} "
            f"(stride_in_1x1={origin.stride_in_1x1}), which no weights make up for. Build it so, before make_deformable:\n"
            f"    for stage in ({body}.layer2, {body}.layer3, {body}.layer4):\n"
            f"        stage[0].conv1.stride, stage[0].conv2.stride = {pair}"
        )


def check_told(found: Anatomy, layout: Layout, origin: Origin, told: Mapping[str, Tensor]) -> None:
    """Raise if the model normalises images, or lays anchors, otherwise than the file tells."""
    if found.rcnn is None:
        return
    _check_pixels(found, layout, origin, told)
    anchors = getattr(found.rcnn.rpn.anchor_generator, "cell_anchors", None)
    for level, ours in enumerate(anchors or ()):
        theirs = told.get(f"{CELL_ANCHORS}{level}")
        if theirs is None:
            continue
        if len(theirs) == len(ours) and len(found.rcnn.rpn.anchor_generator.sizes[level]) > 1:
            generator = found.rcnn.rpn.anchor_generator
            shape = len(generator.sizes[level]), len(generator.aspect_ratios[level])
            theirs = theirs.unflatten(0, shape).transpose(0, 1).flatten(0, 1)
        if theirs.shape != ours.shape or bool(((theirs.to(ours) - ours).abs() > 0.5 + 1e-3).any()):  # torchvision rounds
            raise ValueError(
                f"the anchors of level {level} are {_boxes(ours)} in `model` and {_boxes(theirs)} in `state`, more than their "
                "rounding apart. Build it with the anchor generator that the detector was trained with."
            )


def _check_pixels(found: Anatomy, layout: Layout, origin: Origin, told: Mapping[str, Tensor]) -> None:
    if not all(name in told for name in PIXELS):
        return
    theirs = [(told[name].flatten().double() / 255).tolist() for name in PIXELS]
    if origin.channel_order == "bgr":
        theirs = [numbers[::-1] for numbers in theirs]
    transform = found.rcnn.transform
    ours = [list(transform.image_mean), list(transform.image_std)]
    if all(_near(some, others, 1e-4) for some, others in zip(ours, theirs, strict=True)):
        return
    mean, std = (f"[{', '.join(f'{number:.6g}' for number in numbers)}]" for numbers in theirs)
    raise ValueError(
        f"`model` normalises images by image_mean={_short(ours[0])} and image_std={_short(ours[1])}, and {layout.library}'s by "
        f"others, here in red, green, blue, of 0 to 1. Set them:\n    model.transform.image_mean = {mean}\n"
        f"    model.transform.image_std = {std}"
    )


def _near(some: Any, others: Any, tolerance: float = 0.5) -> bool:
    """Whether numbers are equal within a tolerance."""
    return len(some) == len(others) and all(abs(one - other) <= tolerance for one, other in zip(some, others, strict=True))


def _short(numbers: list[float]) -> str:
    return f"[{', '.join(f'{number:.4g}' for number in numbers)}]"


def _boxes(anchors: Tensor) -> str:
    return str(torch.round(anchors.detach().double(), decimals=1).tolist())
