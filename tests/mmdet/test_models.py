"""mmdetection's deformable detectors with our kernels under them, beside torchvision's operator in the same place."""

from __future__ import annotations

import pytest
import torch
from tests.mmdet import oracles
from tests.mmdet.models import DEFORMABLE, batch, build, gradients, layers_of, loss_of, mmcv

from deformconv.accuracy import error
from deformconv.convert import attention_kernels
from deformconv.convert.mmcv import accelerate_mmcv
from deformconv.torch import deform_attention

# mmdetection calls it as PyTorch once took it.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")

# With boxes on all levels of the pyramid, and fewer of them.
POOLS = {
    "roi_head.bbox_roi_extractor.finest_scale": 8,
    "train_cfg.rcnn.sampler.num": 128,
    "test_cfg.rpn.max_per_img": 200,
}


@pytest.fixture(scope="module", autouse=True)
def accelerated():
    with accelerate_mmcv():
        yield


@pytest.fixture(scope="module", params=DEFORMABLE)
def detector(request, accelerated):
    return build(DEFORMABLE[request.param], **(POOLS if "pool" in request.param else {}))


def assert_same(found, expected, limit):
    """Numbers by name, nearer than a limit, relative to the greatest of each; None at the same places."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name].shape == value.shape, name
            assert value.abs().max() > 0, name
            distance = error(found[name].detach().numpy(), value.detach().numpy())
            assert distance < limit, f"{name}: {distance:.1e}"


def test_a_training_step_is_that_of_torchvisions_operator(detector):
    """The loss and the gradient of every parameter, in float64."""
    detector.double()
    loss, found = gradients(detector, *batch(torch.float64))
    with oracles.in_place_of_mmcvs():
        expected_loss, expected = gradients(detector, *batch(torch.float64))
    assert_same(found | {"loss": loss}, expected | {"loss": expected_loss}, 1e-9)
    predictors = [name for name, slope in found.items() if slope is not None and ("offset" in name or "mask_fc" in name)]
    layers = layers_of(detector)
    assert len(predictors) == sum(len(list(layer.parameters())) - hasattr(layer, "weight") for layer in layers)


def test_features_and_detections_are_those_of_torchvisions_operator(detector):
    def outcome():
        images, samples = batch(torch.float64)
        with torch.no_grad():
            found = {f"features {level}": features for level, features in enumerate(detector.extract_feat(images))}
            torch.manual_seed(0)
            detections = detector.predict(images, samples)[0].pred_instances
        assert len(detections) > 10
        return found | {"boxes": detections.bboxes, "scores": detections.scores, "classes": detections.labels.double()}

    detector.double().eval()
    found = outcome()
    with oracles.in_place_of_mmcvs():
        assert_same(found, outcome(), 1e-9)


def test_features_in_float32_are_as_near_to_float64_as_torchvisions(detector):
    """Positions amplify roundings from layer to layer: how far depends on a net's weights, for every operator alike."""
    with torch.no_grad():
        exact = detector.double().eval().extract_feat(batch(torch.float64)[0])
        detector.float()
        found = detector.extract_feat(batch()[0])
        with oracles.in_place_of_mmcvs():
            theirs = detector.extract_feat(batch()[0])
    for level, features in enumerate(exact):
        ours, other = (error(one[level].numpy(), features.numpy()) for one in (found, theirs))
        assert ours < min(2 * other + 1e-6, 1e-4)


def test_every_layer_in_float32(detector):
    """Each on what the layers before it gave, as torchvision's operator computes it."""
    calls = {}
    names = {layer: name for name, layer in detector.named_modules()}
    layers = layers_of(detector)
    assert len(layers) in (4, 13)
    detector.float().train()
    hooks = [
        layer.register_forward_hook(lambda layer, given, output: calls.update({layer: (given, output.detach())}))
        for layer in layers
    ]
    with torch.no_grad():
        loss_of(detector, *batch())
        for hook in hooks:
            hook.remove()
        assert calls.keys() == set(layers)
        with oracles.in_place_of_mmcvs():
            expected = {names[layer]: layer(*given) for layer, (given, _) in calls.items()}
    assert_same({names[layer]: output for layer, (_, output) in calls.items()}, expected, 1e-5)


@pytest.mark.parametrize("name", ["mdconv", "mdpool"])
def test_it_trains(name):
    detector = build(DEFORMABLE[name], **(POOLS if "pool" in name else {}))
    detector.train()
    images, samples = batch()
    before = {(layer, key): p.detach().clone() for layer in layers_of(detector) for key, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.001)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(detector, images, samples)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    for (layer, key), old in before.items():
        assert not torch.equal(layer.get_parameter(key), old), key


def test_automatic_mixed_precision():
    """Features, boxes and offsets in bfloat16, as mmengine's AmpOptimWrapper makes them."""
    detector = build(DEFORMABLE["mdpool"])
    with torch.autocast("cpu", torch.bfloat16):
        loss, slopes = gradients(detector, *batch())
    assert torch.isfinite(loss)
    assert all(torch.isfinite(slope).all() for slope in slopes.values() if slope is not None)
    exact, _ = gradients(detector, *batch())
    assert abs(loss - exact) < 0.1 * exact


MORE = {
    "Mask R-CNN": ("dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py", {}),
    "Cascade R-CNN": ("dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py", {}),
    "RetinaNet": (
        "retinanet/retinanet_r50_fpn_1x_coco.py",
        {"backbone.dcn": {"type": "DCNv2", "deform_groups": 1}, "backbone.stage_with_dcn": (False, True, True, True)},
    ),
    "RepPoints": ("reppoints/reppoints-moment_r50_fpn_1x_coco.py", {}),
}


@pytest.mark.parametrize("name", MORE)
def test_other_detectors_run(name):
    config, changed = MORE[name]
    detector = build(config, **changed)
    images, samples = batch()
    loss, slopes = gradients(detector, images, samples)
    assert torch.isfinite(loss)
    reached = [key for key, slope in slopes.items() if slope is not None and slope.abs().max() > 0]
    assert any("conv_offset" in key or "reppoints_pts_init_out" in key for key in reached)
    detector.eval()
    with torch.no_grad():
        assert len(detector.predict(images, samples)[0].pred_instances) > 0


DETRS = {
    "Deformable DETR": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "with refinement": "deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py",
}


@pytest.mark.filterwarnings("ignore:The arguments `dropout` in MultiheadAttention:DeprecationWarning")  # its configuration's
@pytest.mark.parametrize("name", DETRS)
def test_deformable_detr_is_that_of_mmcvs_function(name, monkeypatch):
    """The loss and the gradient of every parameter in float64, with this library's attention and with mmcv's own for CPUs."""
    few = {"encoder.num_layers": 2, "decoder.num_layers": 2, "num_queries": 10}
    detector = build(DETRS[name], dtype=torch.float64, **few)
    for key, parameter in detector.named_parameters():
        # mmdetection leaves the levels' embedding as memory was until a runner initialises it.
        if "sampling_offsets.weight" in key or "attention_weights.weight" in key or "level_embed" in key:
            torch.nn.init.normal_(parameter, std=0.05)
        assert parameter.isfinite().all(), key
    called = []
    monkeypatch.setattr(attention_kernels, "deform_attention", lambda *a: called.append(a) or deform_attention(*a))
    loss, found = gradients(detector, *batch(torch.float64))
    assert len(called) == 4
    module = mmcv.ops.multi_scale_deform_attn
    monkeypatch.setattr(module, "multi_scale_deformable_attn_pytorch", module.multi_scale_deformable_attn_pytorch.__wrapped__)
    expected_loss, expected = gradients(detector, *batch(torch.float64))
    assert len(called) == 4
    moved = {key: slope for key, slope in expected.items() if slope is not None and slope.any()}
    assert any("sampling_offsets.weight" in key for key in moved)
    assert_same({key: found[key] for key in moved} | {"loss": loss}, moved | {"loss": expected_loss}, 1e-9)
