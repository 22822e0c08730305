"""Whole detectors of torchvision as mmdetection's and detectron2's: names, numbers, and what is refused."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

from torch import Tensor, nn  # noqa: E402
from torchvision.models.detection import FasterRCNN, MaskRCNN  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.backbone_utils import BackboneWithFPN  # noqa: E402
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead  # noqa: E402
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

from deformconv.convert import convert_state_dict  # noqa: E402
from deformconv.errors import ShapeError  # noqa: E402
from deformconv.torch import DeformConv2d  # noqa: E402
from deformconv.vision import MultiScaleDeformRoIPool, make_deformable  # noqa: E402

CLASSES = 4  # with the background
RGB = {"channel_order": "rgb", "stride_in_1x1": False}
LAYOUTS: dict[str, dict[str, Any]] = {"mmcv": {}, "mmdet1": {}, "detectron2": RGB}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Narrow(Bottleneck):
    """A bottleneck of few channels."""

    expansion = 1


def resnet(block: Any = Narrow, norm: Any = FrozenBatchNorm2d, **keywords: Any) -> ResNet:
    narrow = {"width_per_group": 4} if block is Narrow else {}
    return ResNet(block, [1, 1, 1, 1], num_classes=6, norm_layer=norm, **narrow, **keywords)


def pyramid(block: Any = Narrow, norm: Any = FrozenBatchNorm2d, first: int = 1) -> BackboneWithFPN:
    layers = {f"layer{number}": str(index) for index, number in enumerate(range(first, 5))}
    channels = [64 * block.expansion << (number - 1) for number in range(first, 5)]
    return BackboneWithFPN(resnet(block, norm), layers, channels, 8)


def detector(masks: bool = False, deformable: bool = True, backbone: Any = None, **keywords: Any) -> Any:
    """A detector of a few channels, all of whose parameters and buffers are random."""
    heads: dict[str, Any] = {"box_head": TwoMLPHead(8 * 49, 6), "box_predictor": FastRCNNPredictor(6, CLASSES)}
    if masks:
        heads |= {"mask_head": MaskRCNNHeads(8, (8, 8), 1), "mask_predictor": MaskRCNNPredictor(8, 8, CLASSES)}
    model = (MaskRCNN if masks else FasterRCNN)(backbone or pyramid(), **heads, **keywords)
    if deformable:
        make_deformable(model, "resnet:conv3-conv5")
    return model


def with_pool(kind: str = "box", **keywords: Any) -> Any:
    model = detector(masks=True, deformable=False)
    words = {"convention": "aligned", "trunk": "separate", "hidden": 4, **keywords}
    pool = MultiScaleDeformRoIPool.like(getattr(model.roi_heads, f"{kind}_roi_pool"), 8, **words)
    setattr(model.roi_heads, f"{kind}_roi_pool", pool)
    return model


def random(state: Any, seed: int = 0) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (name, torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 3)
        for name, tensor in state.items()
    )


def theirs_of(model: nn.Module, layout: str, **words: Any) -> OrderedDict[str, Tensor]:
    """A random state_dict with the names and shapes of another library's detector."""
    return random(convert_state_dict(model.state_dict(), to=layout, model=model, **(words or LAYOUTS[layout])))


def here(state: Any, layout: str, model: nn.Module, **words: Any) -> OrderedDict[str, Tensor]:
    return convert_state_dict(state, source=layout, model=model, **(words or LAYOUTS[layout]))


# Ours, mmdetection's since 2.0 and detectron2's, as their own models have them: each has .weight, and some .bias and more.
NAMES = """
backbone.body.conv1                       backbone.conv1                      backbone.bottom_up.stem.conv1
backbone.body.bn1                         backbone.bn1                        backbone.bottom_up.stem.conv1.norm
backbone.body.layer1.0.conv1              backbone.layer1.0.conv1             backbone.bottom_up.res2.0.conv1
backbone.body.layer1.0.bn1                backbone.layer1.0.bn1               backbone.bottom_up.res2.0.conv1.norm
backbone.body.layer1.0.conv2              backbone.layer1.0.conv2             backbone.bottom_up.res2.0.conv2
backbone.body.layer1.0.bn2                backbone.layer1.0.bn2               backbone.bottom_up.res2.0.conv2.norm
backbone.body.layer1.0.conv3              backbone.layer1.0.conv3             backbone.bottom_up.res2.0.conv3
backbone.body.layer1.0.bn3                backbone.layer1.0.bn3               backbone.bottom_up.res2.0.conv3.norm
backbone.body.layer1.0.downsample.0       backbone.layer1.0.downsample.0      backbone.bottom_up.res2.0.shortcut
backbone.body.layer1.0.downsample.1       backbone.layer1.0.downsample.1      backbone.bottom_up.res2.0.shortcut.norm
backbone.body.layer2.0.conv1              backbone.layer2.0.conv1             backbone.bottom_up.res3.0.conv1
backbone.body.layer2.0.bn1                backbone.layer2.0.bn1               backbone.bottom_up.res3.0.conv1.norm
backbone.body.layer2.0.conv2              backbone.layer2.0.conv2             backbone.bottom_up.res3.0.conv2
backbone.body.layer2.0.conv2.offset_conv  backbone.layer2.0.conv2.conv_offset backbone.bottom_up.res3.0.conv2_offset
backbone.body.layer2.0.bn2                backbone.layer2.0.bn2               backbone.bottom_up.res3.0.conv2.norm
backbone.body.layer2.0.conv3              backbone.layer2.0.conv3             backbone.bottom_up.res3.0.conv3
backbone.body.layer2.0.bn3                backbone.layer2.0.bn3               backbone.bottom_up.res3.0.conv3.norm
backbone.body.layer2.0.downsample.0       backbone.layer2.0.downsample.0      backbone.bottom_up.res3.0.shortcut
backbone.body.layer2.0.downsample.1       backbone.layer2.0.downsample.1      backbone.bottom_up.res3.0.shortcut.norm
backbone.body.layer3.0.conv1              backbone.layer3.0.conv1             backbone.bottom_up.res4.0.conv1
backbone.body.layer3.0.bn1                backbone.layer3.0.bn1               backbone.bottom_up.res4.0.conv1.norm
backbone.body.layer3.0.conv2              backbone.layer3.0.conv2             backbone.bottom_up.res4.0.conv2
backbone.body.layer3.0.conv2.offset_conv  backbone.layer3.0.conv2.conv_offset backbone.bottom_up.res4.0.conv2_offset
backbone.body.layer3.0.bn2                backbone.layer3.0.bn2               backbone.bottom_up.res4.0.conv2.norm
backbone.body.layer3.0.conv3              backbone.layer3.0.conv3             backbone.bottom_up.res4.0.conv3
backbone.body.layer3.0.bn3                backbone.layer3.0.bn3               backbone.bottom_up.res4.0.conv3.norm
backbone.body.layer3.0.downsample.0       backbone.layer3.0.downsample.0      backbone.bottom_up.res4.0.shortcut
backbone.body.layer3.0.downsample.1       backbone.layer3.0.downsample.1      backbone.bottom_up.res4.0.shortcut.norm
backbone.body.layer4.0.conv1              backbone.layer4.0.conv1             backbone.bottom_up.res5.0.conv1
backbone.body.layer4.0.bn1                backbone.layer4.0.bn1               backbone.bottom_up.res5.0.conv1.norm
backbone.body.layer4.0.conv2              backbone.layer4.0.conv2             backbone.bottom_up.res5.0.conv2
backbone.body.layer4.0.conv2.offset_conv  backbone.layer4.0.conv2.conv_offset backbone.bottom_up.res5.0.conv2_offset
backbone.body.layer4.0.bn2                backbone.layer4.0.bn2               backbone.bottom_up.res5.0.conv2.norm
backbone.body.layer4.0.conv3              backbone.layer4.0.conv3             backbone.bottom_up.res5.0.conv3
backbone.body.layer4.0.bn3                backbone.layer4.0.bn3               backbone.bottom_up.res5.0.conv3.norm
backbone.body.layer4.0.downsample.0       backbone.layer4.0.downsample.0      backbone.bottom_up.res5.0.shortcut
backbone.body.layer4.0.downsample.1       backbone.layer4.0.downsample.1      backbone.bottom_up.res5.0.shortcut.norm
backbone.fpn.inner_blocks.0.0             neck.lateral_convs.0.conv           backbone.fpn_lateral2
backbone.fpn.inner_blocks.1.0             neck.lateral_convs.1.conv           backbone.fpn_lateral3
backbone.fpn.inner_blocks.2.0             neck.lateral_convs.2.conv           backbone.fpn_lateral4
backbone.fpn.inner_blocks.3.0             neck.lateral_convs.3.conv           backbone.fpn_lateral5
backbone.fpn.layer_blocks.0.0             neck.fpn_convs.0.conv               backbone.fpn_output2
backbone.fpn.layer_blocks.1.0             neck.fpn_convs.1.conv               backbone.fpn_output3
backbone.fpn.layer_blocks.2.0             neck.fpn_convs.2.conv               backbone.fpn_output4
backbone.fpn.layer_blocks.3.0             neck.fpn_convs.3.conv               backbone.fpn_output5
rpn.head.conv.0.0                         rpn_head.rpn_conv                   proposal_generator.rpn_head.conv
rpn.head.cls_logits                       rpn_head.rpn_cls                    proposal_generator.rpn_head.objectness_logits
rpn.head.bbox_pred                        rpn_head.rpn_reg                    proposal_generator.rpn_head.anchor_deltas
roi_heads.box_head.fc6                    roi_head.bbox_head.shared_fcs.0     roi_heads.box_head.fc1
roi_heads.box_head.fc7                    roi_head.bbox_head.shared_fcs.1     roi_heads.box_head.fc2
roi_heads.box_predictor.cls_score         roi_head.bbox_head.fc_cls           roi_heads.box_predictor.cls_score
roi_heads.box_predictor.bbox_pred         roi_head.bbox_head.fc_reg           roi_heads.box_predictor.bbox_pred
roi_heads.mask_head.0.0                   roi_head.mask_head.convs.0.conv     roi_heads.mask_head.mask_fcn1
roi_heads.mask_head.1.0                   roi_head.mask_head.convs.1.conv     roi_heads.mask_head.mask_fcn2
roi_heads.mask_predictor.conv5_mask       roi_head.mask_head.upsample         roi_heads.mask_head.deconv
roi_heads.mask_predictor.mask_fcn_logits  roi_head.mask_head.conv_logits      roi_heads.mask_head.predictor
"""


def expected_names(layout: str) -> dict[str, str]:
    """Their names of modules by ours; mmdetection 1 has no roi_head, and the predictor beside its layer, as detectron2."""
    rows = [line.split() for line in NAMES.strip().splitlines()]
    if layout == "mmdet1":
        return {ours: theirs.removeprefix("roi_head.").replace(".conv_offset", "_offset") for ours, theirs, _ in rows}
    return {row[0]: row[("mmcv", "detectron2").index(layout) + 1] for row in rows}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_are_those_of_the_libraries_own_models(layout: str) -> None:
    model, names = detector(masks=True), expected_names(layout)
    state = model.state_dict()
    there = convert_state_dict(state, to=layout, model=model, **LAYOUTS[layout])
    expected = [f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" for key in state]
    assert list(there) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["deformable", "plain", "basic blocks", "bgr"])
def test_theirs_to_ours_to_theirs_is_the_same_bit_for_bit(layout: str, kind: str) -> None:
    backbone = pyramid(BasicBlock) if kind == "basic blocks" else None
    model = detector(masks=True, deformable=kind == "deformable", backbone=backbone)
    words = {**RGB, "channel_order": "bgr" if kind == "bgr" else "rgb"}
    theirs = theirs_of(model, layout, **words)
    for name in [name for name in theirs if name.endswith("running_var")]:
        theirs[f"{name.rpartition('.')[0]}.num_batches_tracked"] = torch.tensor(7)  # which FrozenBatchNorm2d has not
    ours = here(theirs, layout, model, **words)
    assert not model.load_state_dict(ours).missing_keys
    back = convert_state_dict(ours, to=layout, model=model, **words)
    assert list(back) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())


@pytest.mark.parametrize("layout", ["mmcv", "detectron2"])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_the_background_is_their_last_class_and_our_first(layout: str, parameter: str) -> None:
    model, names = detector(masks=True), expected_names(layout)
    theirs = theirs_of(model, layout)
    ours = here(theirs, layout, model)

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return ours[f"roi_heads.{name}.{parameter}"], theirs[f"{names[f'roi_heads.{name}']}.{parameter}"]

    found, logits = pair("box_predictor.cls_score")
    assert len(logits) == CLASSES and torch.equal(found, torch.cat([logits[-1:], logits[:-1]]))
    found, deltas = pair("box_predictor.bbox_pred")
    assert len(deltas) == 4 * (CLASSES - 1) and torch.equal(found[4:], deltas) and not found[:4].any()
    found, masks = pair("mask_predictor.mask_fcn_logits")
    assert len(masks) == CLASSES - 1 and torch.equal(found[1:], masks) and not found[0].any()


def test_mmdetection_1_has_the_background_first_as_torchvision() -> None:
    model = detector(masks=True)
    theirs = theirs_of(model, "mmdet1")
    ours = here(theirs, "mmdet1", model)
    for name, there, rows in (
        ("box_predictor.cls_score", "bbox_head.fc_cls", CLASSES), ("box_predictor.bbox_pred", "bbox_head.fc_reg", 4 * CLASSES),
        ("mask_predictor.mask_fcn_logits", "mask_head.conv_logits", CLASSES),
    ):  # fmt: skip
        for parameter in ("weight", "bias"):
            assert len(theirs[f"{there}.{parameter}"]) == rows
            assert ours[f"roi_heads.{name}.{parameter}"] is theirs[f"{there}.{parameter}"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_regression_for_all_classes_becomes_one_for_each(layout: str) -> None:
    model, names = detector(masks=True), expected_names(layout)
    theirs = theirs_of(model, layout)
    for name, each in (("box_predictor.bbox_pred", 4), ("mask_predictor.mask_fcn_logits", 1)):
        there = names[f"roi_heads.{name}"]
        for parameter in ("weight", "bias"):
            theirs[f"{there}.{parameter}"] = theirs[f"{there}.{parameter}"][:each].clone()
        ours = here(theirs, layout, model)
        for parameter in ("weight", "bias"):
            one, found = theirs[f"{there}.{parameter}"], ours[f"roi_heads.{name}.{parameter}"]
            assert len(found) == each * CLASSES
            assert all(torch.equal(part, one) for part in found.split(each)[1:])
    model.load_state_dict(ours, strict=False)
    pooled = torch.rand(3, 6)
    deltas = model.roi_heads.box_predictor.bbox_pred(pooled)
    there = names["roi_heads.box_predictor.bbox_pred"]
    expected = nn.functional.linear(pooled, theirs[f"{there}.weight"], theirs[f"{there}.bias"])
    torch.testing.assert_close(deltas[:, 8:12], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_number_of_classes_is_refused(layout: str) -> None:
    model, names = detector(masks=True), expected_names(layout)
    for name, each in (("box_predictor.cls_score", 1), ("box_predictor.bbox_pred", 4), ("mask_predictor.mask_fcn_logits", 1)):
        theirs = theirs_of(model, layout)
        key = f"{names[f'roi_heads.{name}']}.weight"
        theirs[key] = torch.cat([theirs[key], theirs[key][: 2 * each]])
        text = rf"'roi_heads.{name}.weight' has {len(theirs[key])} rows in `state`, which are num_classes=6 with the background"
        with pytest.raises(ShapeError, match=text + r", and `model` has num_classes=4: build it with num_classes=6\.$"):
            here(theirs, layout, model)


def test_cocos_ids_are_not_its_classes() -> None:
    model = detector()
    theirs = theirs_of(model, "mmcv")
    for parameter in ("weight", "bias"):
        theirs[f"roi_head.bbox_head.fc_cls.{parameter}"] = torch.rand(81, *([6] * (parameter == "weight")))
    model.roi_heads.box_predictor = FastRCNNPredictor(6, 91)
    with pytest.raises(ShapeError, match=r"num_classes=81\. torchvision counts COCO's ids, which have gaps up to 90; the oth"):
        here(theirs, "mmcv", model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_flip_where_the_file_takes_blue_first(layout: str) -> None:
    model, names = detector(), expected_names(layout)
    key = f"{names['backbone.body.conv1']}.weight"
    theirs = theirs_of(model, layout)
    found = {order: here(theirs, layout, model, channel_order=order, stride_in_1x1=False) for order in ("rgb", "bgr")}
    assert found["rgb"]["backbone.body.conv1.weight"] is theirs[key]
    assert torch.equal(found["bgr"]["backbone.body.conv1.weight"], theirs[key][:, [2, 1, 0]])
    images = torch.rand(1, 3, 9, 9)
    ours = nn.functional.conv2d(images, found["bgr"]["backbone.body.conv1.weight"])
    torch.testing.assert_close(ours, nn.functional.conv2d(images.flip(1), theirs[key]))
    back = convert_state_dict(model.state_dict(), to=layout, model=model, channel_order="bgr", stride_in_1x1=False)
    assert torch.equal(back[key].flip(1), model.backbone.body.conv1.weight)


def told(order: str, std: Any) -> dict[str, Tensor]:
    mean = MEAN if order == "rgb" else MEAN[::-1]
    return {"pixel_mean": torch.tensor(mean).view(3, 1, 1), "pixel_std": torch.tensor(std).view(3, 1, 1)}


def strided(model: Any) -> Any:
    """With the stride in the 1x1 convolutions."""
    body = model.backbone.body if hasattr(model, "backbone") else model
    for stage in (body.layer2, body.layer3, body.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return model


def of_msra(**keywords: Any) -> Any:
    model = strided(detector(deformable=False, **keywords))
    model.transform.image_mean = [number / 255 for number in MEAN]
    model.transform.image_std = [1 / 255] * 3
    return model


def test_detectron2s_buffers_tell_the_channels_and_the_stride_and_are_left_out() -> None:
    model = detector(deformable=False)
    theirs = theirs_of(model, "detectron2")
    stem = theirs["backbone.bottom_up.stem.conv1.weight"]
    ours = convert_state_dict({**theirs, **told("rgb", STD)}, source="detectron2", model=model)
    assert ours["backbone.body.conv1.weight"] is stem
    ours = convert_state_dict({**theirs, **told("bgr", STD[::-1])}, source="detectron2", model=model)  # as its X101
    assert torch.equal(ours["backbone.body.conv1.weight"], stem.flip(1))
    assert ours.keys() == model.state_dict().keys()
    ours = convert_state_dict({**theirs, **told("bgr", (1.0,) * 3)}, source="detectron2", model=of_msra())
    assert torch.equal(ours["backbone.body.conv1.weight"], stem.flip(1))


def test_what_the_caller_says_goes_before_what_the_buffers_tell() -> None:
    model = detector(deformable=False)
    theirs = theirs_of(model, "detectron2")
    model.transform.image_mean, model.transform.image_std = [number / 255 for number in MEAN], [1 / 255] * 3
    state = {**theirs, **told("bgr", (1.0,) * 3)}
    stem = theirs["backbone.bottom_up.stem.conv1.weight"]
    ours = convert_state_dict(state, source="detectron2", model=model, stride_in_1x1=False)
    assert torch.equal(ours["backbone.body.conv1.weight"], stem.flip(1))
    model.transform.image_mean = model.transform.image_mean[::-1]
    ours = convert_state_dict(state, source="detectron2", model=model, channel_order="rgb", stride_in_1x1=False)
    assert ours["backbone.body.conv1.weight"] is stem


@pytest.mark.parametrize("words", [{}, {"channel_order": "bgr"}, {"stride_in_1x1": False}])
def test_without_detectron2s_buffers_the_caller_must_say(words: dict[str, Any]) -> None:
    model = detector()
    theirs = theirs_of(model, "detectron2")
    text = (
        r"^a state_dict without pixel_mean and pixel_std does not tell what the ResNet takes and where it strides; expected "
        r"`channel_order` and `stride_in_1x1`, .*: 'bgr' and True for its R50 and R101, .*'rgb' and False for torchvision's"
    )
    with pytest.raises(ValueError, match=text):
        convert_state_dict(theirs, source="detectron2", model=model, **words)
    with pytest.raises(ValueError, match=text):
        convert_state_dict(model.state_dict(), to="detectron2", model=model, **words)
    state = {**theirs, "pixel_mean": torch.full((3, 1, 1), 127.5), "pixel_std": torch.ones(3, 1, 1)}
    if "channel_order" not in words:
        with pytest.raises(ValueError, match=r"^`state` has not both of pixel_mean and pixel_std, with ImageNet's numbers"):
            convert_state_dict(state, source="detectron2", model=model, **words)


def test_basic_blocks_have_no_1x1_convolution_to_stride_in() -> None:
    model = detector(deformable=False, backbone=pyramid(BasicBlock))
    theirs = convert_state_dict(model.state_dict(), to="detectron2", model=model, channel_order="rgb")
    assert convert_state_dict(theirs, source="detectron2", model=model, channel_order="rgb").keys() == model.state_dict().keys()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_strided", [True, False])
def test_the_stride_must_be_where_theirs_is(layout: str, is_strided: bool) -> None:
    model = detector(deformable=False)
    other = strided(model) if is_strided else model
    said = {"channel_order": "rgb", "stride_in_1x1": is_strided}
    theirs = theirs_of(other, layout, **said)
    assert here(theirs, layout, other, **said).keys() == model.state_dict().keys()
    one, three = ("1x1", "3x3") if is_strided else ("3x3", "1x1")
    pair = r"\(1, 1\), \(2, 2\)" if is_strided else r"\(2, 2\), \(1, 1\)"
    text = (
        rf"^'backbone.body.layer2' of `model` strides in its {one} convolution, and the other detector's in its {three} "
        rf"\(stride_in_1x1={not is_strided}\), .*\n    for stage in \(model.backbone.body.layer2, .*\n"
        rf"        stage\[0\].conv1.stride, stage\[0\].conv2.stride = {pair}$"
    )
    said["stride_in_1x1"] = not is_strided
    with pytest.raises(ValueError, match=text):
        here(theirs, layout, other, **said)
    with pytest.raises(ValueError, match=text):
        convert_state_dict(model.state_dict(), to=layout, model=other, **said)


def test_mmdetection_strides_in_the_3x3_and_takes_rgb_unless_the_caller_says() -> None:
    model = strided(detector(deformable=False))
    with pytest.raises(ValueError, match="strides in its 1x1 convolution"):
        convert_state_dict(model.state_dict(), to="mmcv", model=model)
    convert_state_dict(model.state_dict(), to="mmcv", model=model, stride_in_1x1=True)


def test_the_models_images_must_be_normalised_as_the_file_tells() -> None:
    model = strided(detector(deformable=False))
    theirs = theirs_of(model, "detectron2", channel_order="bgr", stride_in_1x1=True)
    state = {**theirs, **told("bgr", (1.0,) * 3)}
    text = (
        r"`model` normalises images by image_mean=\[0.485, 0.456, 0.406\] and image_std=\[0.229, 0.224, 0.225\], and "
        r"detectron2's by others, here in red, green, blue, of 0 to 1\. Set them:\n    (.*)\n    (.*)$"
    )
    with pytest.raises(ValueError, match=text) as caught:
        convert_state_dict(state, source="detectron2", model=model)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "    model.transform.image_mean = [0.485, 0.456, 0.406]",
        "    model.transform.image_std = [0.00392157, 0.00392157, 0.00392157]",
    ]
    exec("\n".join(line.strip() for line in lines), {"model": model})
    convert_state_dict(state, source="detectron2", model=model)
    model.transform.image_mean = model.transform.image_mean[::-1]
    with pytest.raises(ValueError, match=r"image_mean=\[0.406, 0.456, 0.485\]"):
        convert_state_dict(state, source="detectron2", model=model)


def test_a_first_convolution_of_other_than_three_channels_has_no_order() -> None:
    model = resnet()
    model.conv1 = nn.Conv2d(4, 64, 7, 2, 3, bias=False)
    with pytest.raises(ValueError, match=r"^`channel_order` is 'bgr', and the first convolution of `model` takes 4 channels"):
        convert_state_dict(model.state_dict(), to="mmcv", model=model, channel_order="bgr")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_that_add_another_eps_compute_something_else(layout: str) -> None:
    model = detector()
    theirs = theirs_of(model, layout)
    model.backbone.body.layer3[0].bn2.eps = 0.0  # as torchvision's trained detectors have it
    text = r"^layer 'backbone.body.layer3.0.bn2' of `model` has eps=0, and those of .* 1e-05: other outputs\. Set it: `(.*)`\.$"
    with pytest.raises(ValueError, match=text):
        convert_state_dict(model.state_dict(), to=layout, model=model, **LAYOUTS[layout])
    with pytest.raises(ValueError, match=text) as caught:
        here(theirs, layout, model)
    exec(str(caught.value).split("`")[-2], {"model": model})
    here(theirs, layout, model)


def anchors(sizes: Any, ratios: Any) -> AnchorGenerator:
    return AnchorGenerator((sizes,) * 5, (ratios,) * 5)


def test_detectron2_counts_anchors_by_sizes_and_torchvision_by_ratios() -> None:
    model = detector(rpn_anchor_generator=anchors((32, 64), (0.5, 1.0, 2.0)))
    theirs = theirs_of(model, "detectron2")
    name = "proposal_generator.rpn_head."
    theirs[f"{name}objectness_logits.bias"] = torch.tensor([320.5, 321, 322, 640.5, 641, 642])
    theirs[f"{name}anchor_deltas.bias"] = torch.arange(24.0)
    cells = {f"proposal_generator.anchor_generator.cell_anchors.{level}": cell_anchors(32, 64) for level in range(5)}
    ours = here({**theirs, **cells}, "detectron2", model)
    assert ours["rpn.head.cls_logits.bias"].tolist() == [320.5, 640.5, 321, 641, 322, 642]
    assert ours["rpn.head.bbox_pred.bias"].view(6, 4)[:, 0].tolist() == [0, 12, 4, 16, 8, 20]
    back = convert_state_dict(ours, to="detectron2", model=model, **RGB)
    assert back.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in back.items())
    assert here(theirs_of(model, "mmcv"), "mmcv", model)["rpn.head.bbox_pred.bias"].shape == (24,)


def test_mmdetection_counts_anchors_by_ratios_as_torchvision() -> None:
    model = detector(rpn_anchor_generator=anchors((32, 64), (0.5, 1.0, 2.0)))
    theirs = theirs_of(model, "mmcv")
    ours = here(theirs, "mmcv", model)
    assert ours["rpn.head.bbox_pred.bias"] is theirs["rpn_head.rpn_reg.bias"]


def cell_anchors(*sizes: float) -> Tensor:
    """As detectron2 lays them: not rounded, ratios within sizes."""
    rows = []
    for size in sizes:
        for ratio in (0.5, 1.0, 2.0):
            width = (size**2 / ratio) ** 0.5
            rows.append([-width / 2, -ratio * width / 2, width / 2, ratio * width / 2])
    return torch.tensor(rows)


def test_detectron2s_anchors_must_be_the_models_within_their_rounding() -> None:
    model = detector()
    theirs = theirs_of(model, "detectron2")
    name = "proposal_generator.anchor_generator.cell_anchors."
    cells = {f"{name}{level}": cell_anchors(32 << level) for level in range(5)}
    assert here({**theirs, **cells}, "detectron2", model).keys() == model.state_dict().keys()
    for wrong in (cell_anchors(36 * 4), cell_anchors(128, 256), cell_anchors(128).flip(0)):
        with pytest.raises(
            ValueError, match=r"^the anchors of level 2 are \[\[-91.0, -45.0, 91.0, 45.0\], .* in `state`, more"
        ):
            here({**theirs, **cells, f"{name}2": wrong}, "detectron2", model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_number_of_anchors_is_refused(layout: str) -> None:
    model, names = detector(), expected_names(layout)
    for head, each in (("cls_logits", 1), ("bbox_pred", 4)):
        theirs = theirs_of(model, layout)
        key = f"{names[f'rpn.head.{head}']}.weight"
        theirs[key] = torch.cat([theirs[key]] * 2)
        text = rf"^'rpn.head.{head}.weight' has {6 * each} rows in `state`; expected {3 * each}, {each} for each of the 3 anch"
        with pytest.raises(ShapeError, match=text):
            here(theirs, layout, model)


@pytest.mark.parametrize("layout", ["mmcv", "mmdet1"])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_heads_first_layer_makes_up_for_a_pools_masks(layout: str, kind: str) -> None:
    model = with_pool(kind, convention="aligned" if layout == "mmcv" else "rounded")
    theirs = theirs_of(model, layout)
    prefix = "roi_head." if layout == "mmcv" else ""
    extractor = f"{prefix}{'bbox' if kind == 'box' else 'mask'}_roi_extractor.roi_layers"
    for level in range(4):
        for layer in ("offset_fc.0", "offset_fc.2", "offset_fc.4", "mask_fc.0", "mask_fc.2"):
            assert {f"{extractor}.{level}.{layer}.weight", f"{extractor}.{level}.{layer}.bias"} <= theirs.keys()
    ours = here(theirs, layout, model)
    first, there = ("box_head.fc6", "bbox_head.shared_fcs.0") if kind == "box" else ("mask_head.0.0", "mask_head.convs.0.conv")
    assert torch.equal(ours[f"roi_heads.{first}.weight"], theirs[f"{prefix}{there}.weight"] / 2)
    assert ours[f"roi_heads.{first}.bias"] is theirs[f"{prefix}{there}.bias"]
    assert ours._metadata[f"roi_heads.{kind}_roi_pool.pools.3"]["mask_scale"] == 2  # type: ignore[attr-defined]
    back = convert_state_dict(ours, to=layout, model=model)
    assert list(back) == list(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())


@pytest.mark.parametrize("keywords", [{"modulated": False}, {"mask_scale": 1.0}])
def test_pools_with_their_masks_or_none_change_no_number(keywords: dict[str, Any]) -> None:
    model = with_pool(**keywords)
    theirs = theirs_of(model, "mmcv")
    ours = here(theirs, "mmcv", model)
    assert ours["roi_heads.box_head.fc6.weight"] is theirs["roi_head.bbox_head.shared_fcs.0.weight"]


def test_pools_that_have_no_counterpart_are_refused() -> None:
    model = with_pool(share_levels=True)
    text = (
        r"^layer 'roi_heads.box_roi_pool' of `model` has one predictor for all levels, and .* one for each\. Build it with sha"
    )
    with pytest.raises(ValueError, match=text):
        convert_state_dict(model.state_dict(), to="mmcv", model=model)
    with pytest.raises(ValueError, match=r"detectron2 has no pooling of boxes that predicts its offsets"):
        convert_state_dict(with_pool().state_dict(), to="detectron2", model=with_pool(), **RGB)
    model = with_pool()
    theirs = theirs_of(model, "mmcv")
    del theirs["roi_head.bbox_head.shared_fcs.0.weight"]
    with pytest.raises(
        ValueError, match=r"^`state` has layer 'roi_heads.box_roi_pool.pools.0' of `model` and not 'roi_heads.bo"
    ):
        here(theirs, "mmcv", model)
    model.roi_heads.box_roi_pool.pools[1].mask_scale = 4.0  # no weight makes up for two scales
    with pytest.raises(ValueError, match=r"has masks of 2\*sigmoid and .* no weight that could make up for it"):
        convert_state_dict(model.state_dict(), to="mmcv", model=model)


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_a_resnet_alone_is_mmdetections_backbone_or_a_classifiers(prefix: str) -> None:
    model = resnet(norm=nn.BatchNorm2d)
    make_deformable(model, "resnet:conv5")
    there = convert_state_dict(model.state_dict(), to="mmcv", model=model)
    assert {"head.fc.weight", "head.fc.bias", "backbone.conv1.weight", "backbone.bn1.num_batches_tracked"} <= there.keys()
    assert "backbone.layer4.0.conv2.conv_offset.weight" in there
    theirs = random(there)
    if not prefix:
        theirs = OrderedDict((name.removeprefix("backbone.").replace("head.fc", "fc"), theirs[name]) for name in theirs)
    ours = here(theirs, "mmcv", model)
    model.load_state_dict(ours)
    assert torch.equal(ours["layer4.0.conv2.weight"] * 2, theirs[f"{prefix}layer4.0.conv2.weight"])
    assert ours["fc.weight"] is theirs["head.fc.weight" if prefix else "fc.weight"]


@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up.", "bottom_up."])
@pytest.mark.parametrize("classifier", ["stem.fc", "linear"])
def test_a_resnet_alone_is_detectron2s_imagenet_file_or_backbone(prefix: str, classifier: str) -> None:
    model = resnet(norm=nn.BatchNorm2d)
    there = convert_state_dict(model.state_dict(), to="detectron2", model=model, **RGB)
    assert {"stem.conv1.weight", "stem.conv1.norm.running_mean", "res2.0.conv1.weight", "stem.fc.weight"} <= there.keys()
    if prefix:
        classifier = "linear"
    theirs = OrderedDict((f"{prefix}{name.replace('stem.fc', classifier)}", there[name]) for name in there)
    ours = here({**theirs, **told("rgb", STD)}, "detectron2", model)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())


def test_frozen_norms_load_into_norms_that_count_batches() -> None:
    model = resnet(norm=nn.BatchNorm2d)
    theirs: Any = theirs_of(resnet(), "detectron2")
    theirs._metadata = {"stem.conv1": {"version": 1}, "stem.conv1.norm": {"version": 3}}  # of its FrozenBatchNorm2d
    ours = here(theirs, "detectron2", model)
    model.load_state_dict(ours, strict=True)
    assert ours._metadata["conv1"] == {"version": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backbone_alone_reads_a_whole_detectors_file(layout: str) -> None:
    whole = detector()
    theirs = theirs_of(whole, layout)
    found = here(theirs, layout, whole.backbone)
    expected = here(theirs, layout, whole)
    ours = {name: found[name] for name in whole.backbone.state_dict()}
    assert all(torch.equal(tensor, expected[f"backbone.{name}"]) for name, tensor in ours.items())
    assert len(found) - len(ours) == sum(
        not name.startswith("backbone.") for name in expected
    )  # which load_state_dict tells of


@pytest.mark.parametrize("names", ["bottom_up.", "imagenet"])
def test_other_places_of_detectron2s_backbone(names: str) -> None:
    model = pyramid()
    there = convert_state_dict(model.state_dict(), to="detectron2", model=model, **RGB)
    if names == "imagenet":
        prefix = "backbone.bottom_up."
        theirs = {name.removeprefix(prefix): tensor for name, tensor in there.items() if name.startswith(prefix)}
    else:
        theirs = {name.removeprefix("backbone."): tensor for name, tensor in there.items()}
    ours = here(theirs, "detectron2", model)
    assert ours.keys() == {name for name in model.state_dict() if names == "bottom_up." or name.startswith("body.")}


def test_a_pyramid_that_begins_at_another_stage() -> None:
    model = pyramid(first=2)
    there = convert_state_dict(model.state_dict(), to="detectron2", model=model, **RGB)
    assert [name for name in there if "fpn_lateral" in name][::2] == [
        f"backbone.fpn_lateral{stage}.weight" for stage in (3, 4, 5)
    ]
    there = convert_state_dict(model.state_dict(), to="mmcv", model=model)
    assert [name for name in there if "lateral" in name][::2] == [
        f"neck.lateral_convs.{index}.conv.weight" for index in (0, 1, 2)
    ]


def test_the_second_version_of_torchvisions_detector() -> None:
    """Norms in the pyramid and in the heads, two convolutions in the RPN, four before the head's one fully connected layer."""
    with torch.device("meta"):
        model = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=81)
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    there = convert_state_dict(state, to="mmcv", model=model)
    assert {
        "neck.lateral_convs.3.bn.running_var", "neck.fpn_convs.0.conv.weight", "rpn_head.rpn_conv.0.conv.weight",
        "rpn_head.rpn_conv.1.conv.bias", "roi_head.bbox_head.shared_convs.3.conv.weight",
        "roi_head.bbox_head.shared_convs.3.bn.weight", "roi_head.bbox_head.shared_fcs.0.weight",
    } <= there.keys()  # fmt: skip
    assert not any(name.startswith(("rpn.", "roi_heads.")) or ".fpn." in name for name in there)
    there = convert_state_dict(state, to="detectron2", model=model, **RGB)
    assert {
        "backbone.fpn_lateral5.norm.running_var", "backbone.fpn_output2.weight",
        "proposal_generator.rpn_head.conv.conv0.weight", "proposal_generator.rpn_head.conv.conv1.bias",
        "roi_heads.box_head.conv4.weight", "roi_heads.box_head.conv4.norm.weight", "roi_heads.box_head.fc1.weight",
    } <= there.keys()  # fmt: skip
    norm = nn.GroupNorm(4, 8)
    model = pyramid()
    model.fpn.inner_blocks[0].append(norm)
    assert "neck.lateral_convs.0.gn.weight" in convert_state_dict(model.state_dict(), to="mmcv", model=model)


@pytest.mark.parametrize("deformable", [True, False])
def test_a_file_by_another_librarys_names_is_refused(deformable: bool) -> None:
    """Some names are the same, and their rows mean something else."""
    model = detector(deformable=deformable)
    for layout in LAYOUTS:
        theirs = theirs_of(model, layout)
        for other in set(LAYOUTS) - {layout}:
            with pytest.raises(ValueError, match=rf"source={other!r}|source={layout!r}") as caught:
                here(theirs, other, model)
            assert f"expected source={layout!r}" in str(caught.value)
    model = detector(deformable=False)
    with pytest.raises(
        ValueError, match=r"by the names of this library .* expected source='deformconv', or the file as it was"
    ):
        here(model.state_dict(), "mmcv", model)


def test_words_of_a_resnet_that_is_not_there_are_refused() -> None:
    layer = DeformConv2d(4, 8, 3)
    for words in ({"channel_order": "rgb"}, {"stride_in_1x1": False}):
        with pytest.raises(
            ValueError, match=rf"^`{next(iter(words))}` is for a ResNet of torchvision, .* is a DeformConv2d, and"
        ):
            convert_state_dict(layer.state_dict(), to="mmcv", model=layer, **words)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"`model` is a ResNet, and the other side 'paddle'"):
            convert_state_dict(resnet().state_dict(), to="paddle", model=resnet(), **words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^`channel_order` is 'gbr'; expected 'rgb' or 'bgr'\.$"):
        convert_state_dict({}, source="mmcv", model=resnet(), channel_order="gbr")
    with pytest.raises(ValueError, match=r"^`stride_in_1x1` is 'yes'; expected True or False\.$"):
        convert_state_dict({}, source="mmcv", model=resnet(), stride_in_1x1="yes")  # type: ignore[arg-type]


def test_names_of_other_models_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Module()
            self.backbone.body = nn.Conv2d(3, 3, 1)

    other = resnet()
    other.layer2[0] = nn.Conv2d(64, 128, 3, 2)
    for model in (Block(), pyramid().fpn, detector(backbone=mobilenet(), deformable=False), other):
        state = model.state_dict()
        assert list(convert_state_dict(state, to="mmcv", model=model)) == list(state)
        assert list(convert_state_dict(state, to="detectron2", model=model)) == list(state)
    model = resnet()
    monkeypatch.delitem(sys.modules, "torchvision")  # then nothing can be torchvision's, and it is not imported
    assert list(convert_state_dict(model.state_dict(), to="mmcv", model=model)) == list(model.state_dict())


def mobilenet() -> BackboneWithFPN:
    net = torchvision.models.mobilenet_v3_small(weights=None).features
    return BackboneWithFPN(net, {"3": "0", "8": "1"}, [24, 48], 8)
