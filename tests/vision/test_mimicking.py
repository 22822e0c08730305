"""Feature mimicking: there is no other implementation, so identities and traps carry the proof."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

torchvision = pytest.importorskip("torchvision")

from torchvision.models.detection import FasterRCNN  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign  # noqa: E402

import deformconv  # noqa: E402
from deformconv.vision import FeatureMimicking, MultiScaleDeformRoIPool, make_deformable  # noqa: E402


class Backbone(nn.Module):
    """Two convolutions to stride 8, with a norm."""

    out_channels = 8

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.layer2 = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.norm = norm(8)
        self.layer3 = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer3(self.norm(self.layer2(x)).relu())
        return found


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def detector(norm: Any = group_norm, **others: Any) -> Any:
    torch.manual_seed(0)
    return FasterRCNN(
        Backbone(norm), min_size=64, max_size=64, image_mean=[0, 0, 0], image_std=[1, 1, 1],
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)), box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(72, 10), nn.ReLU()),
        box_predictor=torchvision.models.detection.faster_rcnn.FastRCNNPredictor(10, 3), box_batch_size_per_image=16, **others,
    )  # fmt: skip


def scenes(boxes: int = 2, images: int = 2) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(1)
    places = torch.tensor([[8.0, 10.0, 40.0, 44.0], [30.0, 20.0, 60.0, 62.0]])[:boxes]
    targets = [{"boxes": places, "labels": torch.tensor([1, 2])[:boxes]} for _ in range(images)]
    return [torch.rand(3, 64, 64) for _ in range(images)], targets


def test_it_adds_two_losses_and_leaves_the_others_alone() -> None:
    images, targets = scenes()
    model = FeatureMimicking(detector().train(), rois_per_image=4, crop=64)
    torch.manual_seed(2)
    found = model(images, targets)
    torch.manual_seed(2)
    expected = model.detector(images, targets)
    assert found.keys() - expected.keys() == {"loss_mimic", "loss_rcnn_classifier"}
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert 0 <= found["loss_mimic"] <= 2 * model.weight


def test_detections_are_the_detector_s_bit_for_bit() -> None:
    images, _ = scenes()
    inner = detector().eval()
    expected, found = inner(images), FeatureMimicking(inner, crop=64).eval()(images)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[key], value) for key, value in other.items())


def test_a_box_that_is_the_whole_image_mimics_itself() -> None:
    model = FeatureMimicking(detector(), crop=64, weight=1.0)
    image = torch.rand(1, 3, 64, 64)
    whole = [torch.tensor([[0.0, 0.0, 64.0, 64.0]])]
    heads = model.detector.roi_heads
    features = heads.box_head(heads.box_roi_pool({"0": model.detector.backbone(image)}, whole, [(64, 64)]))
    teachers = model._teachers(image, [(64, 64)], whole)
    assert torch.allclose(features, teachers, atol=1e-6)
    seen = {
        "features": features,
        "proposals": whole,
        "labels": [torch.tensor([1])],
        "truth": whole,
        "images": image,
        "sizes": [(64, 64)],
        "generators": [None],
    }
    assert abs(model._losses(seen)["loss_mimic"].item()) < 1e-6
    seen["features"] = 7 * features  # a cosine does not see how long a vector is
    assert abs(model._losses(seen)["loss_mimic"].item()) < 1e-6
    seen["features"] = 0 * features  # nor what all zeros point at
    assert torch.isfinite(model._losses(seen)["loss_mimic"])


def test_gradients_reach_what_is_shared_and_not_the_regressor() -> None:
    images, targets = scenes()
    inner = detector()
    make_deformable(inner, "backbone.layer3")
    inner.roi_heads.box_roi_pool = MultiScaleDeformRoIPool.like(inner.roi_heads.box_roi_pool, 8, hidden=8)
    model = FeatureMimicking(inner.train(), crop=64)
    losses = model(images, targets)
    (losses["loss_mimic"] + losses["loss_rcnn_classifier"]).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part in ("backbone.layer2.weight", "backbone.layer3.offset_conv.weight", "box_roi_pool.pools.0.offset_mask_fc.4.weight",
                 "box_head.1.weight"):  # fmt: skip
        assert any(name.endswith(part) for name in reached), part
    assert "classifier.weight" in reached
    assert not any("bbox_pred" in name or "rpn" in name for name in reached)


def test_only_positive_boxes_and_no_more_than_asked_for() -> None:
    model = FeatureMimicking(detector(), rois_per_image=3, crop=64)
    labels, proposals = torch.tensor([0, 1, 2, 0, 1, 2, 1]), torch.rand(7, 4)
    for _ in range(20):
        rows = model._chosen(labels, proposals, proposals[1:2])
        assert len(rows) == len(set(rows.tolist())) == 3 and (labels[rows] > 0).all()
    without = FeatureMimicking(detector(), rois_per_image=9, crop=64, include_ground_truth=False)
    assert sorted(without._chosen(labels, proposals, proposals[1:2]).tolist()) == [2, 4, 5, 6]


def test_an_image_without_objects_gives_zeros_that_reach_the_classifier() -> None:
    images, targets = scenes(boxes=0)
    model = FeatureMimicking(detector().train(), crop=64)
    losses = model(images, targets)
    assert losses["loss_mimic"] == 0 and losses["loss_rcnn_classifier"] == 0
    sum(losses.values()).backward()
    assert model.classifier.weight.grad is not None and not model.classifier.weight.grad.any()


def test_the_mean_is_over_an_image_s_boxes_and_then_over_images() -> None:
    model = FeatureMimicking(detector(), crop=64, weight=1.0)
    values = torch.tensor([1.0, 3.0, 10.0])
    assert model._reduced(values, [2, 1]) == (2 + 10) / 2
    assert model._reduced(values, [2, 0, 1]) == (2 + 10) / 3
    model.reduction = "sum"
    assert model._reduced(values, [2, 1]) == (4 + 10) / 2


def test_batch_norm_does_not_learn_from_patches() -> None:
    images, targets = scenes()
    model = FeatureMimicking(detector(nn.BatchNorm2d).train(), crop=64)
    norm = model.detector.backbone.norm
    torch.manual_seed(2)
    model(images, targets)
    assert norm.num_batches_tracked == 1 and norm.training
    alone = detector(nn.BatchNorm2d).train()
    torch.manual_seed(2)
    alone(images, targets)
    assert torch.equal(norm.running_mean, alone.backbone.norm.running_mean)


def test_the_detector_s_state_dict_has_no_new_keys() -> None:
    inner = detector()
    keys = [*inner.state_dict()]
    model = FeatureMimicking(inner, crop=64)
    model(*scenes())
    assert [*inner.state_dict()] == keys and {*model.state_dict()} - {f"detector.{key}" for key in keys} == {
        "classifier.weight", "classifier.bias"
    }  # fmt: skip
    assert "select_training_samples" not in vars(inner.roi_heads) and not inner.roi_heads.box_head._forward_hooks


def test_the_same_seed_chooses_the_same_boxes() -> None:
    model, results = FeatureMimicking(detector().train(), rois_per_image=1, crop=64), []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(model(*scenes())["loss_mimic"].item())
    assert results[0] == results[1]


def test_a_generator_chooses_instead_of_the_global_one() -> None:
    model = FeatureMimicking(
        detector().train(), rois_per_image=2, crop=64, generator=torch.Generator().manual_seed(3), include_ground_truth=False
    )
    labels, proposals = torch.ones(50, dtype=torch.int64), torch.rand(50, 4)
    chosen = []
    for seed, globally in ((3, 0), (3, 1), (4, 1)):
        torch.manual_seed(globally)
        chosen.append(model._chosen(labels, proposals, proposals[:0], torch.Generator().manual_seed(seed)).tolist())
    assert chosen[0] == chosen[1] != chosen[2]
    before = model.generator.get_state()  # type: ignore[union-attr]
    model(*scenes())
    assert not torch.equal(model.generator.get_state(), before)  # type: ignore[union-attr]


def test_a_generator_for_each_image_chooses_alike_in_any_batch() -> None:
    images, targets = scenes()
    asked: list[int] = []

    def generator(target: dict[str, Tensor]) -> torch.Generator:
        asked.append(int(target["image_id"]))
        return torch.Generator().manual_seed(asked[-1])

    model = FeatureMimicking(detector().train(), rois_per_image=2, crop=64, generator=generator)
    model(images, [{**target, "image_id": torch.tensor(7 + i)} for i, target in enumerate(targets)])
    assert asked == [7, 8]


def test_float64_stays_float64() -> None:
    images, targets = scenes()
    model = FeatureMimicking(detector().double().train(), crop=64).double()
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    losses = model([image.double() for image in images], targets)
    for name in ("loss_mimic", "loss_rcnn_classifier"):
        assert losses[name].dtype == torch.float64 and losses[name].item() != losses[name].float().item()


def test_in_half_precision_losses_are_taken_in_float32() -> None:
    images, targets = scenes()
    model = FeatureMimicking(detector().train(), rois_per_image=2, crop=64)
    torch.manual_seed(2)
    expected = model(images, targets)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images, targets)
    for name in ("loss_mimic", "loss_rcnn_classifier"):
        assert found[name].dtype == torch.float32
        assert found[name].item() != found[name].bfloat16().item()  # no number that was rounded
    assert found["loss_rcnn_classifier"].item() == pytest.approx(expected["loss_rcnn_classifier"].item(), rel=0.05)


def test_a_patch_is_what_lies_under_its_box_within_the_image() -> None:
    """The cut is exact where a box's side is the patch's; what is beyond the image is left out, though it is in the batch."""
    model = FeatureMimicking(detector(), crop=32)
    images, seen = torch.rand(2, 3, 64, 64), []
    handle = model.detector.backbone.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    boxes = [torch.tensor([[16.0, 8.0, 48.0, 40.0]]), torch.tensor([[-9.0, 2.0, 32.0, 34.0], [20.0, 32.0, 90.0, 99.0]])]
    model._teachers(images, [(64, 64), (64, 52)], boxes)
    handle.remove()
    first, second, third = seen[0]
    assert torch.allclose(first, images[0, :, 8:40, 16:48], atol=1e-6)
    assert torch.allclose(second, images[1, :, 2:34, :32], atol=1e-6)
    assert torch.allclose(third, images[1, :, 32:64, 20:52], atol=1e-6)


def test_patches_do_not_decide_how_boxes_of_images_are_pooled() -> None:
    """Pooling finds its scales at its first call, which is the image's also in the first step of all."""
    images, targets = scenes()
    model = FeatureMimicking(detector().train(), crop=32)
    pool, asked = model.detector.roi_heads.box_roi_pool, []
    handle = pool.register_forward_pre_hook(lambda module, given: asked.append((module.scales, given[2][0])))
    model(images, targets)
    handle.remove()
    assert asked == [(None, (64, 64)), ([0.125], (32, 32))]


def test_training_lowers_it() -> None:
    torch.manual_seed(0)
    images, targets = scenes()
    model = FeatureMimicking(detector().train(), crop=64, weight=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    values = []
    for step in range(40):
        torch.manual_seed(step % 4)
        loss = model(images, targets)["loss_mimic"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-4:]) < 0.5 * sum(values[:4])


def test_texts() -> None:
    with pytest.raises(
        TypeError, match=r"`detector` is a torch.nn.modules.linear.Linear; expected torchvision's GeneralizedRCNN"
    ):
        FeatureMimicking(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`crop` is 100; expected a multiple of 32"):
        FeatureMimicking(detector(), crop=100)
    with pytest.raises(ValueError, match="`reduction` is 'max'; expected 'mean' or 'sum'"):
        FeatureMimicking(detector(), reduction="max")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`generator` is 5; expected a torch\.Generator, or a function that is called"):
        FeatureMimicking(detector(), crop=64, generator=5)  # type: ignore[arg-type]


def test_sentences_for_what_cannot_be() -> None:
    images, targets = scenes()
    for weight in ("a", None, -1, float("nan"), True):
        with pytest.raises(ValueError, match=f"`weight` is {weight!r}; expected a number of at least 0"):
            FeatureMimicking(detector(), crop=64, weight=weight)  # type: ignore[arg-type]
    model = FeatureMimicking(detector(), crop=64).train()
    model.detector.eval()
    with pytest.raises(ValueError, match=r"the detector is in evaluation mode, .*; expected model.train\(\) after"):
        model(images, targets)
    inner = detector()
    inner.roi_heads.box_predictor = nn.Linear(10, 3)
    with pytest.raises(TypeError, match=r"`detector.roi_heads.box_predictor` has no nn.Linear `cls_score`"):
        FeatureMimicking(inner, crop=64)
    model = FeatureMimicking(detector(), crop=64).train()
    model.detector.roi_heads.box_head = nn.Sequential(model.detector.roi_heads.box_head, nn.Unflatten(1, (10, 1, 1)))
    with pytest.raises(deformconv.ShapeError, match=r"box head gives features \(32, 10, 1, 1\); expected \(R, 10\), a vector"):
        model(images, targets)


def test_a_sampler_on_the_instance_stays() -> None:
    images, targets = scenes()
    inner, calls = detector().train(), []
    select = inner.roi_heads.select_training_samples
    inner.roi_heads.select_training_samples = lambda *given: (calls.append(1), select(*given))[1]
    model = FeatureMimicking(inner, crop=64)
    for _ in range(2):
        model(images, targets)
    assert len(calls) == 2


def test_norms_of_every_kind_do_not_learn_from_patches() -> None:
    images, targets = scenes()
    inner = detector(lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True))
    head = inner.roi_heads.box_head
    inner.roi_heads.box_head = nn.Sequential(head, nn.BatchNorm1d(10))
    other = copy.deepcopy(inner).train()
    other(images[:1], targets[:1])
    FeatureMimicking(inner, rois_per_image=1, crop=64).train()(images[:1], targets[:1])
    assert torch.equal(inner.backbone.norm.running_mean, other.backbone.norm.running_mean)
    assert inner.roi_heads.box_head[1].num_batches_tracked == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn"])
def test_torchvision_s_detectors_whole(name: str) -> None:
    torch.manual_seed(0)
    build = getattr(torchvision.models.detection, name)
    inner = build(weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=128)
    heads = inner.roi_heads
    make_deformable(inner, "resnet:conv3-conv5")
    for pool in ("box_roi_pool", "mask_roi_pool"):
        if getattr(heads, pool, None) is not None:
            setattr(heads, pool, MultiScaleDeformRoIPool.like(getattr(heads, pool), hidden=8))
    model, other = FeatureMimicking(inner, 2, 64).train(), copy.deepcopy(inner).train()
    masks = torch.zeros(1, 96, 128, dtype=torch.uint8)
    masks[:, 10:50, 20:80] = 1
    given = (
        [torch.rand(3, 96, 128)],
        [{"boxes": torch.tensor([[20.0, 10.0, 80.0, 50.0]]), "labels": torch.tensor([1]), "masks": masks}],
    )
    torch.manual_seed(1)
    sum(model(*given).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    torch.manual_seed(1)
    other(*given)
    found, expected = dict(inner.named_buffers()), dict(other.named_buffers())
    assert all(torch.equal(found[key], buffer) for key, buffer in expected.items())  # the patches left no trace in them
