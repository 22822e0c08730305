"""MultiScaleDeformRoIPool in torchvision's detectors."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from tests.tolerances import error
from torch import Tensor

torchvision = pytest.importorskip("torchvision")

from torchvision.ops import MultiScaleRoIAlign  # noqa: E402

from deformconv.vision import MultiScaleDeformRoIPool, make_deformable  # noqa: E402


def maps(levels: int = 4, batch: int = 2) -> OrderedDict[str, Tensor]:
    torch.manual_seed(0)
    return OrderedDict((str(n), torch.rand(batch, 6, 64 >> n, 80 >> n, dtype=torch.float64)) for n in range(levels))


def boxes() -> list[Tensor]:
    torch.manual_seed(1)
    found = []
    for number in (9, 4):
        corner, size = torch.rand(number, 2).double() * 150, torch.rand(number, 2).double() ** 3 * 250 + 3
        found.append(torch.cat([corner, corner + size], 1))
    return found


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("share_levels", [True, False])
def test_a_fresh_one_is_torchvision_s(levels: int, share_levels: bool) -> None:
    theirs = MultiScaleRoIAlign([str(n) for n in range(levels)], 7, 2)
    ours = MultiScaleDeformRoIPool.like(theirs, 6, hidden=8, share_levels=share_levels).double()
    expected = theirs(maps(levels), boxes(), [(256, 320)] * 2)
    assert error(ours(maps(levels), boxes(), [(256, 320)] * 2).detach().numpy(), expected.numpy()) < 1e-12
    assert len(ours.pools) == (1 if share_levels else levels)


def test_every_predictor_has_a_gradient_also_without_boxes() -> None:
    pool = MultiScaleDeformRoIPool(["0", "1", "2", "3"], 7, 2, 6, hidden=8).double()
    pool(maps(), [torch.zeros(0, 4).double(), boxes()[1][:1]], [(256, 320)] * 2).sum().backward()
    assert all(parameter.grad is not None for parameter in pool.parameters())


def test_boxes_keep_their_order() -> None:
    pool = MultiScaleDeformRoIPool(["0", "1", "2", "3"], 7, 2, 6, hidden=8).double()
    whole = pool(maps(), boxes(), [(256, 320)] * 2)
    one = pool(maps(), [boxes()[0][3:4], boxes()[1][:0]], [(256, 320)] * 2)
    assert torch.allclose(whole[3:4], one, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_a_whole_detector_computes_what_it_did_and_trains(name: str) -> None:
    torch.manual_seed(0)
    build: Any = getattr(torchvision.models.detection, name)
    model = build(weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=128).double().eval()
    images = [torch.rand(3, 96, 128, dtype=torch.float64)]
    expected = model(images)[0]
    make_deformable(model, "resnet:conv3-conv5")
    for head in ("box_roi_pool", "mask_roi_pool"):
        pool = getattr(model.roi_heads, head, None)
        if pool is not None:
            setattr(model.roi_heads, head, MultiScaleDeformRoIPool.like(pool, hidden=16, share_levels=True).double())
    found = model(images)[0]
    for key, value in expected.items():
        assert found[key].shape == value.shape
        if value.numel():
            assert error(found[key].detach().numpy(), value.detach().numpy()) < 1e-6, key
    masks = torch.zeros(1, 96, 128, dtype=torch.uint8)
    masks[:, 10:50, 20:80] = 1
    target = {"boxes": torch.tensor([[20.0, 10.0, 80.0, 50.0]]).double(), "labels": torch.tensor([1]), "masks": masks}
    losses = model.train()(images, [target])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.roi_heads.box_roi_pool.parameters())


def test_texts() -> None:
    with pytest.raises(TypeError, match=r"`pool` is a builtins.int; expected a MultiScaleRoIAlign"):
        MultiScaleDeformRoIPool.like(7)  # type: ignore[arg-type]
    text = repr(MultiScaleDeformRoIPool(["0"], 7, hidden=8))
    assert (
        text.startswith("MultiScaleDeformRoIPool(featmap_names=['0'], output_size=(7, 7)") and "convention='unaligned'" in text
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'aligned'; here: convention"):
        MultiScaleDeformRoIPool(["0"], 7, aligned=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`featmap_names` is empty; expected the names of feature maps"):
        MultiScaleDeformRoIPool([], 7)
    pool = MultiScaleDeformRoIPool(["0", "1"], 7, 2, 6, hidden=8).double()
    with pytest.raises(ValueError, match=r"`x` has 'a'; expected a dict of feature maps, some of them named \['0', '1'\]"):
        pool({"a": maps()["0"]}, boxes(), [(256, 320)] * 2)
    with pytest.raises(ValueError, match=r"`x` is a torch.Tensor; expected a dict"):
        pool(maps()["0"], boxes(), [(256, 320)] * 2)
    with pytest.raises(TypeError, match=r"`boxes` is a torch.Tensor; expected a list of tensors \(r, 4\), one for each image"):
        pool(maps(), torch.zeros(3, 5).double(), [(256, 320)] * 2)
    with (
        pytest.raises(NotImplementedError, match=r"torch\.jit\.script cannot compile a DeformRoIPool"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # PyTorch's, that scripts are deprecated
        torch.jit.script(pool)


def test_a_predictor_belongs_to_a_name() -> None:
    """Where maps are absent, and where a detector names more than its backbone has, as MobileNet's does."""
    pool = MultiScaleDeformRoIPool(["0", "1", "2"], 7, 2, 6, hidden=8).double()
    pool({name: maps()[name] for name in ("1", "2")}, boxes(), [(256, 320)] * 2).sum().backward()
    assert [any(p.grad is not None for p in each.parameters()) for each in pool.pools] == [False, True, True]
    assert len(MultiScaleDeformRoIPool.like(pool, 6, featmap_names=["1", "2"], hidden=8).pools) == 2
