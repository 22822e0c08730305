"""torchvision's one-stage detectors and its segmenter, whole: after surgery they compute what they did, and train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tolerances import error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deformconv.torch import parameter_groups
from deformconv.vision import make_deformable

torchvision = pytest.importorskip("torchvision")
models = torchvision.models

SMALL = {"min_size": 64, "max_size": 96}
BARE: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
pytestmark = pytest.mark.slow


def batch(size: int, dtype: torch.dtype) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(1)
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.8], [0.4, 0.1, 0.9, 0.5]], dtype=dtype) * size
    images = [torch.rand(3, size, size, dtype=dtype) for _ in range(2)]
    return images, [{"boxes": boxes[: 2 - i], "labels": torch.tensor([1, 2])[: 2 - i]} for i in range(2)]


def built(builder: Any, dtype: torch.dtype, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = builder(**BARE, **arguments)
    return model.to(dtype).eval()


def trained(model: nn.Module, names: tuple[str, ...], losses: Any) -> None:
    """One step reaches every predictor of offsets, and moves it from its zeros; the loss of the next is finite."""
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-3))
    model.train()
    losses().backward()
    for name in names:
        predictor: Any = model.get_submodule(name).offset_conv
        assert predictor.weight.grad.isfinite().all() and predictor.weight.grad.abs().sum() > 0, name
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    optimizer.step()
    assert all(model.get_submodule(f"{name}.offset_conv").weight.any() for name in names)
    assert losses().isfinite()


@pytest.mark.parametrize(
    ("name", "which", "number", "size", "arguments"),
    [
        ("retinanet_resnet50_fpn", "resnet:conv3-conv5", 13, 64, SMALL),
        ("fcos_resnet50_fpn", "resnet:conv3-conv5", 13, 64, SMALL),
        ("ssdlite320_mobilenet_v3_large", "backbone.features.*.block.1.0", 13, 320, {}),  # depthwise, some of 5x5 taps
        ("ssd300_vgg16", ["backbone.features.21", "backbone.extra.0.3"], 2, 300, {}),
    ],
)
def test_a_detector_computes_what_it_did_and_trains(
    name: str, which: Any, number: int, size: int, arguments: dict[str, Any]
) -> None:
    is_large = name == "ssd300_vgg16"  # it has no size but 300 pixels, nor a normalisation over a batch
    dtype, tolerance = (torch.float32, 1e-5) if is_large else (torch.float64, 1e-10)
    model = built(getattr(models.detection, name), dtype, **arguments)
    images, targets = (each[: 1 if is_large else 2] for each in batch(size, dtype))
    seen: list[dict[str, Tensor]] = []
    handle = model.head.register_forward_hook(lambda module, given, output: seen.append(output))  # type: ignore[union-attr]
    with torch.no_grad():
        model(images)
        names = make_deformable(model, which)
        model(images)
    handle.remove()
    assert len(names) == number
    before, after = seen
    assert before.keys() == after.keys() and len(before) >= 2
    for key, values in before.items():
        assert values.any() and error(after[key].numpy(), values.numpy()) < tolerance, key
    trained(model, names, lambda: torch.stack([*model(images, targets).values()]).sum())


def test_a_segmenter_computes_what_it_did_and_trains() -> None:
    model = built(models.segmentation.deeplabv3_resnet50, torch.float64)
    images, _ = batch(64, torch.float64)
    given, labels = torch.stack(images), torch.randint(0, 3, (2, 64, 64))
    with torch.no_grad():
        expected = model(given)["out"]
        names = make_deformable(model, "resnet:conv3-conv5")
        found = model(given)["out"]
    assert len(names) == 13 and error(found.numpy(), expected.numpy()) < 1e-10
    trained(model, names, lambda: cross_entropy(model(given)["out"], labels))
