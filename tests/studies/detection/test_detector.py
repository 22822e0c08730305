"""The arms: what surgery must leave equal at the cut, and what it brings."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
detectors = pytest.importorskip("deformconv.studies.detection.detector")
ARMS, cut, fresh, inner = detectors.ARMS, detectors.cut, detectors.fresh, detectors.inner
DeformConv2d = pytest.importorskip("deformconv.torch").DeformConv2d


@pytest.fixture(scope="module")
def regular():
    """A detector whose every parameter is something, biases and scales too."""
    model = fresh(0, 64).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)
    return model


@pytest.fixture(scope="module")
def images():
    random = torch.Generator().manual_seed(1)
    return [torch.rand(3, 64, 64, generator=random) for _ in range(2)]


@torch.inference_mode()
def outputs(model, images):
    """Scores and boxes of given proposals, before detections are chosen among them."""
    given, _ = model.transform(images)
    maps = model.backbone(given.tensors)
    boxes = [torch.tensor([[3.0, 5.0, 40.0, 30.0], [10.0, 10.0, 20.0, 24.0], [0.0, 0.0, 64.0, 64.0]])] * len(images)
    pooled = model.roi_heads.box_roi_pool(maps, boxes, given.image_sizes)
    return [*maps.values(), *model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))]


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_computes_at_the_cut_what_the_regular_detector_does(arm, regular, images):
    model = inner(cut(regular, arm, 0)).eval()
    for ours, theirs in zip(outputs(model, images), outputs(regular, images), strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def test_every_box_of_a_scene_is_pooled_from_the_finest_map(regular, images):
    """As docs/detection.md says: by torchvision's rule only a box of 224 pixels and more is pooled from the next map."""
    outputs(regular, images)  # so that it knows the levels
    rule = regular.roi_heads.box_roi_pool.map_levels
    sides = torch.tensor([1.0, 5.0, 64.0, 127.0, 128.0, 223.0, 224.0, 448.0])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
    assert rule([boxes]).tolist() == [0] * 6 + [1, 2]


@pytest.mark.parametrize("arm", [name for name in ARMS if name != "wide"])
def test_an_arm_has_the_regular_detectors_parameters(arm, regular):
    """The same bits under the same names, its own copies, and beside them predictors alone."""
    state, model = regular.state_dict(), inner(cut(regular, arm, 0))
    ours = model.state_dict()
    assert all(torch.equal(ours[name], tensor) and ours[name].data_ptr() != tensor.data_ptr() for name, tensor in state.items())
    more = ours.keys() - state.keys()
    assert all("offset_conv" in name or "box_roi_pool.pools" in name for name in more)
    assert bool(more) == (arm not in ("regular", "seconds"))


def test_what_is_deformable_in_which_arm(regular):
    found = {}
    for arm in ARMS:
        model = inner(cut(regular, arm, 0))
        layers = [layer.modulated for layer in model.modules() if isinstance(layer, DeformConv2d)]
        pools = getattr(model.roi_heads.box_roi_pool, "pools", None)
        found[arm] = layers, None if pools is None else [pool.modulated for pool in pools]
    plain, six = ([], None), [True] * 6
    assert found == {
        "regular": plain, "seconds": plain, "wide": plain, "v1": ([False] * 2, [False]), "v2-conv": (six, None),
        "v2": (six, [True]), "v2-mimic": (six, [True]),
    }  # fmt: skip
    assert isinstance(cut(regular, "v2-mimic", 0), detectors.FeatureMimicking)


def test_the_wider_head_has_the_predictors_parameters(regular):
    sizes = {
        arm: sum(p.numel() for p in inner(cut(regular, arm, 0)).parameters()) for arm in ("regular", "wide", "v2-conv", "v2")
    }
    predictor = sizes["v2"] - sizes["v2-conv"]
    assert sizes["wide"] - sizes["regular"] == pytest.approx(predictor, rel=0.005)
    assert sizes["regular"] == 2_291_765


def test_new_units_of_a_wider_head_learn(regular, images):
    model = cut(regular, "wide", 0)
    target = {"boxes": torch.tensor([[3.0, 5.0, 40.0, 30.0]]), "labels": torch.tensor([2])}
    sum(model(images, [target] * 2).values()).backward()
    head, old = model.roi_heads.box_head, regular.roi_heads.box_head.fc6.out_features
    assert head.fc7.weight.grad[:, old:].abs().sum() > 0
    assert head.fc6.weight[old:].abs().sum() > 0


def test_a_seed_makes_a_detector_and_global_random_numbers_stay():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    one, same, other = (fresh(seed, 64) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    weights = [model.roi_heads.box_head.fc6.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    new = [inner(cut(one, "v2", seed)).roi_heads.box_roi_pool.pools[0].offset_mask_fc[0].weight for seed in (0, 0, 1)]
    assert torch.equal(new[0], new[1]) and not torch.equal(new[0], new[2])


def test_every_arm_that_can_be_asked_for_has_its_surgery():
    from deformconv.studies.detection import plan

    assert [*ARMS, plan.SCRATCH] == plan.ARMS
