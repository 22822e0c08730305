"""What a detector's tensors go through: the background's place, the anchors' order, the images' channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deformconv.convert.detectors.parts import Anatomy
from deformconv.convert.layouts.layout import Change, Layout
from deformconv.errors import ShapeError

__all__ = ["changes"]

_BACKGROUND_FIRST = ("mmdet1",)  # and of the others the background is the last class
_PARAMETERS = ("weight", "bias")


def changes(found: Anatomy, layout: Layout, channel_order: str) -> dict[str, Change]:
    """What is done to a tensor on its way here and back, by our names."""
    made: dict[str, Change] = {}
    if channel_order == "bgr":
        flip = Change(lambda tensor: tensor.flip(1), lambda tensor: tensor.flip(1))
        made[f"{found.body_name}.conv1.weight".lstrip(".")] = flip
    if found.rcnn is not None:
        made.update(_classes(found.rcnn.roi_heads, layout))
        made.update(_anchors(found.rcnn.rpn, layout))
    return made


def _classes(heads: Any, layout: Layout) -> Iterator[tuple[str, Change]]:
    """Of what has rows for each class."""
    predictor = getattr(heads, "box_predictor", None)
    logits, deltas = getattr(predictor, "cls_score", None), getattr(predictor, "bbox_pred", None)
    masks = getattr(getattr(heads, "mask_predictor", None), "mask_fcn_logits", None)
    moves = layout.source not in _BACKGROUND_FIRST
    for parameter in _PARAMETERS:
        if logits is not None and deltas is not None:
            name, classes = f"roi_heads.box_predictor.cls_score.{parameter}", logits.out_features
            yield name, _logits(name, classes, moves)
            name = f"roi_heads.box_predictor.bbox_pred.{parameter}"
            yield name, _foreground(name, 4, classes, moves)
        if masks is not None:
            name = f"roi_heads.mask_predictor.mask_fcn_logits.{parameter}"
            yield name, _foreground(name, 1, masks.out_channels, moves)


def _logits(name: str, classes: int, moves: bool) -> Change:
    """Rows of the classes and of the background, which torchvision has first."""

    def here(tensor: Tensor) -> Tensor:
        if len(tensor) != classes:
            raise ShapeError(_wrong_classes(name, len(tensor), len(tensor), classes))
        return tensor.roll(1, 0) if moves else tensor

    return Change(here, lambda tensor: tensor.roll(-1, 0) if moves else tensor)


def _foreground(name: str, each: int, classes: int, moves: bool) -> Change:
    """`each` rows a class; those of the background, which torchvision has and does not use, are 0."""

    def here(tensor: Tensor) -> Tensor:
        absent = each if moves else 0
        rows = len(tensor) + absent
        if len(tensor) == each:  # one regression for all classes
            tensor = torch.cat([tensor] * (classes - moves))
        elif rows != each * classes:
            raise ShapeError(_wrong_classes(name, len(tensor), rows // each, classes))
        return torch.cat((tensor.new_zeros(absent, *tensor.shape[1:]), tensor)) if moves else tensor

    return Change(here, lambda tensor: tensor[each:] if moves else tensor)


def _wrong_classes(name: str, rows: int, there: int, here: int) -> str:
    text = (
        f"{name!r} has {rows} rows in `state`, which are num_classes={there} with the background, and `model` has "
        f"num_classes={here}: build it with num_classes={there}."
    )
    if (there, here) == (81, 91):
        text += " torchvision counts COCO's ids, which have gaps up to 90; the other libraries count its 80 classes."
    return text


def _anchors(rpn: Any, layout: Layout) -> Iterator[tuple[str, Change]]:
    """Of the rows for each anchor; detectron2 goes through ratios within sizes, torchvision through sizes within ratios."""
    generator = rpn.anchor_generator
    sizes, ratios = getattr(generator, "sizes", ()), getattr(generator, "aspect_ratios", ())
    kinds = {(len(some), len(others)) for some, others in zip(sizes, ratios, strict=False)}
    anchors = rpn.head.cls_logits.out_channels
    for head, each in (("cls_logits", 1), ("bbox_pred", 4)):
        for parameter in _PARAMETERS:
            name = f"rpn.head.{head}.{parameter}"
            shape = next(iter(kinds)) if len(kinds) == 1 and layout.source == "detectron2" else (1, anchors)
            yield name, _ordered(name, each, anchors, *shape)


def _ordered(name: str, each: int, anchors: int, sizes: int, ratios: int) -> Change:
    """`each` rows an anchor, from an order of sizes, then ratios, to one of ratios, then sizes."""

    def turned(tensor: Tensor, first: int, second: int) -> Tensor:
        if first == 1 or second == 1:
            return tensor
        return tensor.unflatten(0, (first, second, each)).transpose(0, 1).flatten(0, 2)

    def here(tensor: Tensor) -> Tensor:
        if len(tensor) != each * anchors:
            raise ShapeError(
                f"{name!r} has {len(tensor)} rows in `state`; expected {each * anchors}, {each} for each of the {anchors} "
                "anchors that `model` has at a place: build it with the anchor generator that the detector was trained with. A "
                "head of two logits an anchor, trained with softmax, has no counterpart here."
            )
        return turned(tensor, sizes, ratios)

    return Change(here, lambda tensor: turned(tensor, ratios, sizes))
