"""examples/internimage.py: every name and shape of the authors' state_dicts, and nets of few layers that train."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

EXAMPLE = Path(__file__).parents[2] / "examples" / "internimage.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("internimage_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """A weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def block(at: str, C: int, group: int, flash: bool, bias: bool, dw: bool) -> dict[str, tuple[int, ...]]:
    """A block of the authors' nets, in their order."""
    if flash:
        rows = -(-27 * group // 8) * 8
        dcn = both("dcn.offset_mask_dw", C, 1, 3, 3) if dw else {}
        dcn |= both("dcn.offset_mask", rows, C) | both("dcn.value_proj", C, C) | both("dcn.output_proj", C, C)
    else:
        dcn = both("dcn.dw_conv.0", C, 1, 3, 3) | both("dcn.dw_conv.1.1", C)
        dcn |= both("dcn.offset", 18 * group, C) | both("dcn.mask", 9 * group, C)
        dcn |= both("dcn.input_proj", C, C) | both("dcn.output_proj", C, C)
    found = both("norm1.0", C) | dcn | both("norm2.0", C) | both("mlp.fc1", 4 * C, C) | both("mlp.fc2", C, 4 * C)
    if not bias:
        del found["dcn.output_proj.bias"], found["mlp.fc2.bias"]
    return {f"{at}.{name}": shape for name, shape in found.items()}


def published(
    C: int, depths: tuple[int, ...], groups: tuple[int, ...], *, flash: bool, bias: bool, late: bool = False, dw: bool = False
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the authors' classifiers, in their order; `late` has scales and norms after."""
    found = both("patch_embed.conv1", C // 2, 3, 3, 3) | both("patch_embed.norm1.1", C // 2)
    found |= both("patch_embed.conv2", C, C // 2, 3, 3) | both("patch_embed.norm2.1", C)
    for level, (depth, group) in enumerate(zip(depths, groups, strict=True)):
        wide = C * 2**level
        for i in range(depth):
            at = f"levels.{level}.blocks.{i}"
            found |= {f"{at}.gamma1": (wide,), f"{at}.gamma2": (wide,)} if late else {}
            found |= block(at, wide, group, flash, bias, dw)
        found |= {} if late else both(f"levels.{level}.norm.0", wide)
        if level < len(depths) - 1:
            down = f"levels.{level}.downsample"
            found |= {f"{down}.conv.weight": (2 * wide, wide, 3, 3), **both(f"{down}.norm.1", 2 * wide)}
    last = 12 * C
    found |= {"conv_head.0.weight": (last, 8 * C, 1, 1)} | both("conv_head.1.0", last)
    found |= {"conv_head.1.0.running_mean": (last,), "conv_head.1.0.running_var": (last,)}
    return found | {"conv_head.1.0.num_batches_tracked": ()} | both("head", 1000, last)


@pytest.mark.parametrize("flash", [False, True])
def test_names_shapes_and_order_of_t(example: ModuleType, flash: bool) -> None:
    with torch.device("meta"):
        net = example.flash_internimage_t() if flash else example.internimage_t()
    found = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    expected = published(64, (4, 4, 18, 4), (4, 8, 16, 32), flash=flash, bias=not flash)
    assert found == expected and list(found) == list(expected)
    assert len(found) == (393 if flash else 633)


@pytest.mark.parametrize(("flash", "bias", "dw"), [(False, True, False), (True, False, True), (True, True, True)])
def test_names_shapes_and_order_of_larger_nets(example: ModuleType, flash: bool, bias: bool, dw: bool) -> None:
    sizes, more = (80, (4, 4, 21, 4), (5, 10, 20, 40)), {"dw_kernel_size": 3} if dw else {}
    with torch.device("meta"):
        net = example.InternImage(*sizes, flash=flash, bias=bias, layer_scale=1e-5, post_norm=True, **more)
    found = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    expected = published(*sizes, flash=flash, bias=bias, late=True, dw=dw)
    assert found == expected and list(found) == list(expected)


@pytest.mark.parametrize("more", [{}, {"layer_scale": 0.1, "post_norm": True, "offset_scale": 2.0}], ids=["T", "XL"])
@pytest.mark.parametrize("flash", [False, True])
def test_few_layers_train(example: ModuleType, flash: bool, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = example.InternImage(16, (1, 1, 2, 1), (1, 2, 4, 8), num_classes=5, flash=flash, **more)
    images, labels = torch.rand(3, 3, 64, 32), torch.tensor([0, 3, 4])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        scores = net(images)
        assert scores.shape == (3, 5)
        loss = cross_entropy(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
    predictors = [tensor for name, tensor in net.named_parameters() if "dcn.offset" in name or "dcn.mask" in name]
    assert predictors and all(tensor.any() for tensor in predictors)  # they learn
