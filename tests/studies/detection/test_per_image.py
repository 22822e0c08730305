"""Losses and choices that are each image's own, beside torchvision's, which are a batch's."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torchvision")
torch = pytest.importorskip("torch")

from tests.studies.detection.small import Backbone, Scenes, detector  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.models.detection import MaskRCNN  # noqa: E402
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler  # noqa: E402

from deformconv.studies.detection.per_image import BOXES, Sampler, drawn, generator, per_image  # noqa: E402
from deformconv.vision import FeatureMimicking  # noqa: E402


def batch(*numbers: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    pairs = [Scenes()[number] for number in numbers]
    images = [image.double() for image, _ in pairs]
    return images, [
        {"boxes": target["boxes"].double(), "labels": target["labels"], "image_id": torch.tensor(number)}
        for (_, target), number in zip(pairs, numbers, strict=True)
    ]


def test_a_step_draws_different_scenes_which_depend_on_it_and_the_seed() -> None:
    scenes, draws = drawn(0, 5, 8, 20)
    assert drawn(0, 5, 8, 20) == (scenes, draws)
    assert len(set(scenes)) == len(set(draws)) == 8 and set(scenes) <= set(range(20))
    assert len({tuple(drawn(seed, step, 8, 20)[1]) for seed in range(3) for step in range(3)}) == 9


def test_a_generator_is_of_one_draw_and_one_purpose() -> None:
    firsts = [
        torch.rand((), generator=generator({"image_id": torch.tensor(number)}, purpose)).item()
        for number in (0, 1, 2**63 - 1)
        for purpose in (0, 1, 2)
    ]
    assert len(set(firsts)) == 9
    again = torch.rand((), generator=generator({"image_id": torch.tensor(1)}, 2)).item()
    assert again == firsts[5]
    with pytest.raises(ValueError, match="a target has the keys 'boxes', 'labels'; expected \"image_id\" among them"):
        generator({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}, BOXES)


@pytest.mark.parametrize("positives", [0, 3, 30])
def test_the_sampler_takes_as_many_as_torchvision_s(positives: int) -> None:
    labels = torch.full((60,), -1)
    labels[:positives], labels[positives : positives + 25] = 2, 0
    ours = Sampler(16, 0.25)
    ours.generators = iter([torch.Generator().manual_seed(seed) for seed in (0, 0, 1)])
    found, again, other = (ours([labels]) for _ in range(3))
    expected = BalancedPositiveNegativeSampler(16, 0.25)([labels])
    for mine, theirs, sign in zip(found, expected, (labels > 0, labels == 0), strict=True):
        assert mine[0].dtype == theirs[0].dtype and mine[0].sum() == theirs[0].sum()
        assert not mine[0][~sign].any()
    assert all(torch.equal(one[0], two[0]) for one, two in zip(found, again, strict=True))
    assert not torch.equal(found[1][0], other[1][0])


@pytest.mark.parametrize("mimicking", [False, True])
def test_a_batch_s_losses_are_the_means_of_its_images_(mimicking: bool) -> None:
    model: Any = detector()
    if mimicking:
        model = FeatureMimicking(model, rois_per_image=1, crop=64).double()
    numbers = (1, 2, 3, 4)  # the third has no box
    with per_image(model.train()):
        together = model(*batch(*numbers))
        alone = [model(*batch(number)) for number in numbers]
    assert len(together) == 4 + 2 * mimicking
    for name, value in together.items():
        mean = torch.stack([losses[name] for losses in alone]).mean()
        assert value.dtype == torch.float64 and abs(value - mean) <= 1e-12 * abs(mean), name


def test_an_image_alone_has_torchvision_s_losses() -> None:
    """By the same generators: what differs is only over what is averaged."""
    model = detector().train()
    images, targets = batch(2)
    with per_image(model):
        found = model(images, targets)
        samplers = model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler
    assert type(model.rpn.fg_bg_sampler) is BalancedPositiveNegativeSampler
    for purpose, (part, sampler) in enumerate(zip((model.rpn, model.roi_heads), samplers, strict=True)):
        sampler.generators = iter([generator(targets[0], purpose)])
        part.fg_bg_sampler = sampler
    expected = model(images, targets)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] - value) <= 1e-7 * value, name  # torchvision's objectness is rounded to float32


def test_an_image_in_which_nothing_is_proposed_has_losses_of_zero() -> None:
    model = detector().train()
    propose = model.rpn.filter_proposals
    model.rpn.filter_proposals = lambda *given: [[boxes[:0] for boxes in each] for each in propose(*given)]
    with per_image(model):
        losses = model(*batch(3))
        both = model(*batch(3, 4))
    sum(losses.values()).backward()
    assert losses["loss_classifier"] == losses["loss_box_reg"] == 0
    assert torch.isfinite(both["loss_classifier"]) and both["loss_classifier"] > 0
    assert not model.roi_heads.box_predictor.cls_score.weight.grad.any()


def test_the_model_is_as_before_afterwards_also_after_an_error() -> None:
    model = FeatureMimicking(detector(), crop=64)
    inner = model.detector
    rpn, heads = type(inner.rpn), type(inner.roi_heads)
    before = inner.rpn.fg_bg_sampler, inner.roi_heads.fg_bg_sampler
    with pytest.raises(KeyError, match="an error"), per_image(model):
        assert type(inner.rpn) is not rpn and model.generator is not None
        raise KeyError("an error")
    assert (type(inner.rpn), type(inner.roi_heads)) == (rpn, heads)
    assert (inner.rpn.fg_bg_sampler, inner.roi_heads.fg_bg_sampler) == before and model.generator is None
    assert not inner.roi_heads.box_predictor._forward_hooks


def test_detections_are_the_same_bit_for_bit() -> None:
    model = detector().eval()
    images, _ = batch(1, 2)
    expected = model(images)
    with per_image(model):
        found = model(images)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[key], value) for key, value in other.items())


def test_sentences_for_what_cannot_be() -> None:
    with pytest.raises(TypeError, match=r"`model` is a torch\.nn\.modules\.linear\.Linear; expected torchvision's FasterRCNN"):
        per_image(nn.Linear(1, 1)).__enter__()  # type: ignore[arg-type]
    model = detector()
    with per_image(model), pytest.raises(TypeError, match=r"the detector's `rpn` is a _Proposals and its `roi_heads` a _Heads"):
        per_image(model).__enter__()
    masks = MaskRCNN(
        Backbone(), num_classes=3, rpn_anchor_generator=detector().rpn.anchor_generator,
        box_roi_pool=detector().roi_heads.box_roi_pool, mask_roi_pool=detector().roi_heads.box_roi_pool,
    )  # fmt: skip
    with pytest.raises(TypeError, match="the detector has a head for masks or keypoints, whose loss is a mean over the boxes"):
        per_image(masks).__enter__()
