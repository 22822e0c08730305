"""mmdetection's detectors as torchvision's with our layers: from one image the same features, logits and deltas."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.mmdet import oracles
from tests.mmdet.models import DEFORMABLE, SIZE, batch, build
from torch import nn

from deformconv.accuracy import error
from deformconv.convert import convert_state_dict
from deformconv.convert.mmcv import accelerate_mmcv
from deformconv.vision import MultiScaleDeformRoIPool, make_deformable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchvision

MASKS = {"masks": "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py"}
POOLS = {"roi_head.bbox_roi_extractor.finest_scale": 14}  # with boxes on all levels of the pyramid
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "dconv": {"modulated": False}, "mdconv": {}, "group4": {"offset_groups": 4}, "masks": {},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def accelerated():
    with accelerate_mmcv():
        yield


@pytest.fixture(scope="module", params=[*DEFORMABLE, "masks"])
def pair(request, accelerated):
    """A detector of mmdetection, and the one of torchvision that has its weights."""
    name = request.param
    theirs = build((DEFORMABLE | MASKS)[name], **(POOLS if "pool" in name else {})).double().eval()
    ours = torchvisions("maskrcnn_resnet50_fpn" if name == "masks" else "fasterrcnn_resnet50_fpn")
    if name in CONVOLUTIONS:
        assert len(make_deformable(ours, "resnet:conv3-conv5", **CONVOLUTIONS[name])) == 13
    else:
        ours.roi_heads.box_roi_pool = MultiScaleDeformRoIPool.like(
            ours.roi_heads.box_roi_pool, sampling_ratio=0, canonical_scale=56, convention="aligned", trunk="separate",
            modulated=name == "mdpool", hidden=64,
        ).double()  # fmt: skip
    missing, unexpected = ours.load_state_dict(convert_state_dict(theirs.state_dict(), source="mmcv", model=ours))
    assert not missing and not unexpected
    return theirs, ours


def torchvisions(kind="fasterrcnn_resnet50_fpn"):
    model = getattr(torchvision.models.detection, kind)(weights=None, weights_backbone=None, num_classes=81)
    return model.double().eval()


def assert_near(found, expected):
    """Numbers by name, nearer than float64 makes two kernels, relative to the greatest of each."""
    assert len(found) == len(expected)
    for level, (some, others) in enumerate(zip(found, expected, strict=True)):
        assert some.shape == others.shape and others.abs().max() > 0, level
        assert error(some.detach().numpy(), others.detach().numpy()) < 1e-9, level


@torch.no_grad()
def test_features_and_what_the_rpn_says_of_them(pair):
    theirs, ours = pair
    images = batch(torch.float64)[0]
    with oracles.in_place_of_mmcvs():  # torchvision's operators, so that the two sides share no kernel
        expected = theirs.extract_feat(images)
        logits, deltas = theirs.rpn_head(expected)
    found = list(ours.backbone(images).values())
    assert_near(found, expected)
    our_logits, our_deltas = ours.rpn.head(found)
    assert_near(our_logits, logits)
    assert_near(our_deltas, deltas)


@torch.no_grad()
def test_classes_and_boxes_of_the_same_boxes(pair):
    theirs, ours = pair
    boxes = torch.tensor([[4, 6, 30, 40], [10, 12, 70, 85], [50, 30, 125, 90], [-8, -8, 136, 104], [60, 60, 75, 70.0]]).double()
    with oracles.in_place_of_mmcvs():
        features = theirs.extract_feat(batch(torch.float64)[0])
        rows = torch.cat([torch.zeros(len(boxes), 1).double(), boxes], 1)
        pooled = theirs.roi_head.bbox_roi_extractor(features[:4], rows)
        logits, deltas = theirs.roi_head.bbox_head(pooled)
    pool: Any = ours.roi_heads.box_roi_pool
    if isinstance(pool, MultiScaleDeformRoIPool):
        found = pool({str(level): features[level] for level in range(4)}, [boxes], [SIZE])
        scale = 2 if pool.pools[0].modulated else 1  # of the masks, for which the head's first layer makes up
        assert_near(found.split(1), (scale * pooled).split(1))
        pooled = found
    our_logits, our_deltas = ours.roi_heads.box_predictor(ours.roi_heads.box_head(pooled))
    assert_near([our_logits[:, 1:], our_logits[:, :1]], [logits[:, :-1], logits[:, -1:]])
    assert_near([our_deltas[:, 4:]], [deltas])
    assert not our_deltas[:, :4].any()


@torch.no_grad()
@pytest.mark.parametrize("pair", ["masks"], indirect=True)
def test_masks_of_the_same_boxes(pair):
    theirs, ours = pair
    pooled = torch.rand(3, 256, 14, 14, dtype=torch.float64)
    logits = ours.roi_heads.mask_predictor(ours.roi_heads.mask_head(pooled))
    assert_near([logits[:, 1:]], [theirs.roi_head.mask_head(pooled)])


def test_the_way_back_is_the_same_state_dict(pair):
    theirs, ours = pair
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    after = convert_state_dict(ours.state_dict(), to="mmcv", model=ours)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    theirs.load_state_dict(after, strict=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in theirs.state_dict().items())


@torch.no_grad()
def test_a_backbone_of_style_caffe_strides_in_its_1x1_convolutions_and_takes_bgr(accelerated):
    theirs = build(DEFORMABLE["mdconv"], **{"backbone.style": "caffe"}).double().eval()
    ours = torchvisions()
    for stage in (ours.backbone.body.layer2, ours.backbone.body.layer3, ours.backbone.body.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    make_deformable(ours, "resnet:conv3-conv5")
    words = {"channel_order": "bgr", "stride_in_1x1": True}
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), source="mmcv", model=ours, **words))
    bgr = batch(torch.float64)[0]
    assert_near(list(ours.backbone(bgr.flip(1)).values()), theirs.extract_feat(bgr))
