"""What mmdetection and detectron2 call the parts of a detector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from deformconv.convert.detectors.parts import Part

__all__ = ["DIALECTS", "Dialect", "renamed"]


class Variant(NamedTuple):
    """What stands before the names of a ResNet and of the pyramid on it, and what the classifier is called."""

    body: str
    fpn: str = ""
    classifier: str = "fc"


class Dialect(NamedTuple):
    """A library's templates of names by kinds of parts, and where its files may have them; what it writes is first."""

    templates: Mapping[str, str]
    detector: tuple[Variant, ...]
    alone: tuple[Variant, ...]


_BODY = dict.fromkeys(("stem", "stem_norm", "conv", "norm", "shortcut", "shortcut_norm"), "{body}{name}")

_MMDET = {
    **_BODY,
    "classifier": "{classifier}",
    "lateral": "neck.lateral_convs.{index}.conv",
    "lateral_norm": "neck.lateral_convs.{index}.{norm}",
    "output": "neck.fpn_convs.{index}.conv",
    "output_norm": "neck.fpn_convs.{index}.{norm}",
    "rpn_conv": "rpn_head.rpn_conv",
    "rpn_convs": "rpn_head.rpn_conv.{index}.conv",
    "rpn_logits": "rpn_head.rpn_cls",
    "rpn_deltas": "rpn_head.rpn_reg",
}

_MMDET_HEADS = {
    "box_pool": "bbox_roi_extractor.roi_layers.{index}{rest}",
    "box_conv": "bbox_head.shared_convs.{index}.conv",
    "box_conv_norm": "bbox_head.shared_convs.{index}.{norm}",
    "box_connected": "bbox_head.shared_fcs.{index}",
    "box_logits": "bbox_head.fc_cls",
    "box_deltas": "bbox_head.fc_reg",
    "mask_pool": "mask_roi_extractor.roi_layers.{index}{rest}",
    "mask_conv": "mask_head.convs.{index}.conv",
    "mask_conv_norm": "mask_head.convs.{index}.{norm}",
    "mask_upsample": "mask_head.upsample",
    "mask_logits": "mask_head.conv_logits",
}

_DETECTRON2 = {
    "stem": "{body}stem.conv1",
    "stem_norm": "{body}stem.conv1.norm",
    "conv": "{body}res{stage}.{block}.conv{number}",
    "norm": "{body}res{stage}.{block}.conv{number}.norm",
    "shortcut": "{body}res{stage}.{block}.shortcut",
    "shortcut_norm": "{body}res{stage}.{block}.shortcut.norm",
    "classifier": "{body}{classifier}",
    "lateral": "{fpn}fpn_lateral{stage}",
    "lateral_norm": "{fpn}fpn_lateral{stage}.norm",
    "output": "{fpn}fpn_output{stage}",
    "output_norm": "{fpn}fpn_output{stage}.norm",
    "rpn_conv": "proposal_generator.rpn_head.conv",
    "rpn_convs": "proposal_generator.rpn_head.conv.conv{index}",
    "rpn_logits": "proposal_generator.rpn_head.objectness_logits",
    "rpn_deltas": "proposal_generator.rpn_head.anchor_deltas",
    "box_conv": "roi_heads.box_head.conv{number}",
    "box_conv_norm": "roi_heads.box_head.conv{number}.norm",
    "box_connected": "roi_heads.box_head.fc{number}",
    "box_logits": "roi_heads.box_predictor.cls_score",
    "box_deltas": "roi_heads.box_predictor.bbox_pred",
    "mask_conv": "roi_heads.mask_head.mask_fcn{number}",
    "mask_conv_norm": "roi_heads.mask_head.mask_fcn{number}.norm",
    "mask_upsample": "roi_heads.mask_head.deconv",
    "mask_logits": "roi_heads.mask_head.predictor",
}

_MM_DETECTOR = (Variant("backbone."), Variant(""))
_MM_ALONE = (Variant("backbone.", classifier="head.fc"), Variant(""))

DIALECTS = {
    "mmcv": Dialect(
        {**_MMDET, **{kind: f"roi_head.{name}" for kind, name in _MMDET_HEADS.items()}}, _MM_DETECTOR, _MM_ALONE
    ),
    "mmdet1": Dialect({**_MMDET, **_MMDET_HEADS}, _MM_DETECTOR, _MM_ALONE),
    "detectron2": Dialect(
        _DETECTRON2,
        (Variant("backbone.bottom_up.", "backbone."), Variant("bottom_up."), Variant("", "backbone.")),
        # The classifier is stem.fc in the files that its converter makes of torchvision's, and linear in its own ResNet.
        (
            Variant("", classifier="stem.fc"), Variant("", classifier="linear"),
            Variant("backbone.bottom_up.", classifier="linear"), Variant("bottom_up.", classifier="linear"),
        ),
    ),
}  # fmt: skip


def renamed(found: Iterable[tuple[str, Part]], dialect: Dialect, is_alone: bool, state: Iterable[str] | None) -> dict[str, str]:
    """Their name for each of our modules; of the variants that there are, the one that most keys of a state_dict have."""
    ours = [(name, part) for name, part in found if part.kind in dialect.templates]
    there = {key.rpartition(".")[0] for key in state or ()}
    made = [_names(ours, dialect, variant) for variant in (dialect.alone if is_alone else dialect.detector)]
    return max(made, key=lambda names: len(there.intersection(names.values())))


def _names(ours: list[tuple[str, Part]], dialect: Dialect, variant: Variant) -> dict[str, str]:
    where = variant._asdict()
    return {name: dialect.templates[part.kind].format(**{**part.words, **where}) for name, part in ours}
