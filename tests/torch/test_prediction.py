"""A layer's forward pass in one kernel: when it is taken, when not, and that nobody notices but the clock."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from tests.tolerances import assert_close
from tests.torch.test_modules import CONFIGURATIONS, LAYERS, TestLayers, image, moved
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deformconv import ShapeError
from deformconv.ops.conv import cpu
from deformconv.torch import DeformConv2d


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The calls that have gone through the one kernel."""
    calls: list[int] = []
    forward_layer = cpu.forward_layer

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return forward_layer(*arguments, **keywords)

    monkeypatch.setattr(cpu, "forward_layer", counted)
    yield calls


class TestLayersInOneKernel(TestLayers):
    """All that a layer is, without gradients."""

    def layer(self, rank: int, *, modulated: bool, **arguments: Any) -> Any:
        return super().layer(rank, modulated=modulated, **arguments).requires_grad_(False)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_it_computes_what_predictor_and_operator_compute(configuration: dict[str, Any], rank: int, taken: list[int]) -> None:
    layer = moved(LAYERS[rank][0](4, 8, 3, dtype=torch.float64, **configuration))
    x = image(rank)
    expected = layer(x)
    assert not taken
    with torch.no_grad():
        found = layer(x)
        apart = layer(x, *layer.offsets_and_mask(x))
    assert len(taken) == 1
    assert_close(found, expected.detach(), "float64")
    assert_close(found, apart, "float64")


def ready(**arguments: Any) -> tuple[DeformConv2d, torch.Tensor]:
    return moved(DeformConv2d(4, 6, 3, padding=1, dtype=torch.float64, **arguments)), image(2)


WITHOUT_GRADIENTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "parameters that need none": nullcontext,
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_it_is_taken_without_gradients(name: str, taken: list[int]) -> None:
    layer, x = ready()
    expected = layer(x).detach()
    if name == "parameters that need none":
        layer.requires_grad_(False)
    with WITHOUT_GRADIENTS[name]():
        found = layer(x)
        assert_close(layer(x.to(memory_format=torch.channels_last)).clone(), expected, "float64")
    assert len(taken) == 2
    assert not found.requires_grad
    assert_close(found.clone(), expected, "float64")


def test_the_output_has_the_input_s_memory_format() -> None:
    layer, x = ready()
    with torch.no_grad():
        assert layer(x).is_contiguous()
        assert layer(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_weights_that_change_are_seen(taken: list[int]) -> None:
    layer, x = ready()
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2)
        layer.bias.zero_()
        layer.offset_conv.weight.add_(0.1)
        layer.offset_conv.bias.sub_(0.3)
        found = layer(x)
        assert_close(found, layer(x, *layer.offsets_and_mask(x)), "float64")
    assert len(taken) == 2


def _forward_hook(layer: DeformConv2d) -> None:
    layer.offset_conv.register_forward_hook(lambda module, given, output: output + 1)


def _pre_hook(layer: DeformConv2d) -> None:
    layer.offset_conv.register_forward_pre_hook(lambda module, given: (given[0] + 1,))


def _another_predictor(layer: DeformConv2d) -> None:
    layer.offset_conv = nn.Sequential(nn.Conv2d(4, 27, 3, padding=1, dtype=torch.float64), nn.Tanh())


def _another_window(layer: DeformConv2d) -> None:
    layer.offset_conv.dilation, layer.offset_conv.padding = (2, 2), (2, 2)


def _another_padding(layer: DeformConv2d) -> None:
    """A window of one tap gives maps of the same size."""
    conv = layer.offset_conv
    conv.weight = nn.Parameter(conv.weight[:, :, 1:2, 1:2].detach().clone())
    conv.kernel_size, conv.padding = (1, 1), (0, 0)


def _another_forward(layer: DeformConv2d) -> None:
    layer.offset_conv.forward = lambda x: torch.full((2, 27, *x.shape[2:]), 0.5, dtype=x.dtype)


def _spectral_norm(layer: DeformConv2d) -> None:
    layer.eval()
    parametrizations.weight_norm(layer.offset_conv)


CHANGES = [
    _forward_hook, _pre_hook, _another_predictor, _another_window, _another_padding, _another_forward, _spectral_norm,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_predictor_that_is_another_is_asked(change: Any, taken: list[int]) -> None:
    layer, x = ready()
    change(layer)
    with torch.no_grad():
        found = layer(x)
        apart = layer(x, *layer.offsets_and_mask(x))
    assert not taken
    assert_close(found, layer(x).detach(), "float64")
    assert_close(found, apart, "float64")


def test_a_predictor_padded_otherwise_is_refused_as_ever(taken: list[int]) -> None:
    layer, x = ready()
    layer.offset_conv.padding = (0, 0)  # its maps are smaller than the output
    with pytest.raises(ShapeError):
        layer(x)
    with torch.no_grad(), pytest.raises(ShapeError):
        layer(x)
    assert not taken


def test_a_global_hook_sees_the_predictor(taken: list[int]) -> None:
    layer, x = ready()
    seen = []
    with torch.no_grad(), nn.modules.module.register_module_forward_hook(lambda module, given, out: seen.append(module)):
        layer(x)
    assert layer.offset_conv in seen
    assert not taken


def test_a_subclass_that_predicts_by_itself_is_asked(taken: list[int]) -> None:
    class Still(DeformConv2d):
        def _predict(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            offset, mask = super()._predict(input)
            return torch.zeros_like(offset), torch.ones_like(mask)

    layer, x = moved(Still(4, 6, 3, padding=1, dtype=torch.float64)), image(2)
    with torch.no_grad():
        assert_close(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias, padding=1), "float64")
    assert not taken


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_modes_see_the_predictor_and_the_operator(taken: list[int]) -> None:
    layer, x = ready()
    with torch.no_grad():
        expected = layer(x)
        taken.clear()
        with FlopCounterMode(display=False) as counter:
            found = layer(x)
        assert counter.get_total_flops() == 2 * 2 * 4 * 9 * (27 + 6) * 7 * 6
        traced = torch.jit.trace(layer, x, check_trace=False)
        exported = torch.export.export(layer.requires_grad_(False), (x,)).module()
        mapped = torch.func.vmap(layer)(x[None])[0]
        others = found, traced(x), exported(x), mapped
    assert not taken
    for other in others:
        assert_close(other, expected, "float64")


def test_autocast_and_one_image_take_the_other_way(taken: list[int]) -> None:
    layer, x = ready()
    with torch.no_grad():
        assert_close(layer(x[0]), layer(x)[0], "float64")
        with torch.autocast("cpu"):
            layer.float()(x.float())
    assert len(taken) == 1


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_predicts_in_float32(taken: list[int], dtype: torch.dtype) -> None:
    """As in two steps: the predictor's numbers are never rounded to half precision, and the output once."""
    layer, x = ready()
    half, x = layer.to(dtype), x.to(dtype)
    with torch.no_grad():
        found = half(x)
        offset, mask = half.offsets_and_mask(x)
        assert len(taken) == 1 and found.dtype is dtype
        apart = half(x, offset, mask)
        whole = copy.deepcopy(half).float()(x.float())
    assert torch.equal(found, whole.to(dtype))
    assert_close(found.float(), apart.float(), str(dtype).removeprefix("torch."))


def test_mixed_dtypes_are_refused_as_ever() -> None:
    layer, x = ready()
    layer.offset_conv.float()
    with pytest.raises(RuntimeError) as apart:
        layer(x)
    with torch.no_grad(), pytest.raises(RuntimeError) as at_once:
        layer(x)
    assert str(at_once.value) == str(apart.value)


def test_an_empty_batch() -> None:
    layer, x = ready()
    with torch.no_grad():
        assert layer(x[:0]).shape == (0, 6, 7, 6)
