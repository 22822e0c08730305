"""MXNet's layers become deformconv.torch's, with MXNet's own outputs as the measure, and go back."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.tolerances import assert_close, error  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402
from torch.nn.utils.parametrizations import weight_norm  # noqa: E402

import deformconv  # noqa: E402
from deformconv.convert import (  # noqa: E402
    layer_from_mxnet,
    layer_to_mxnet,
    load_mxnet,
    mxnet,
    mxnet_layers,
    read_params,
    write_params,
)
from deformconv.torch import DeformConv1d, DeformConv2d  # noqa: E402

DATA = Path(__file__).parent / "data"
EXPECTED = dict(np.load(DATA / "expected.npz"))  # by MXNet 1.9.1: see data/make.py
BLOCKS = {
    "v1": {"padding": 1},
    "v2": {"padding": 1},
    "v1_groups": {"groups": 2},
    "v2_groups": {"padding": 1, "groups": 2},
    "v2_window": {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
}
every_block = pytest.mark.parametrize("name", BLOCKS)


def layer_of(name: str) -> DeformConv2d:
    # v2_window's 72 channels are v2 with 4 offset groups, and v1 with 6 would not divide 4 input channels.
    return layer_from_mxnet(DATA / f"{name}.params", **BLOCKS[name])


def run(layer, name):
    with torch.no_grad():
        return layer(torch.from_numpy(EXPECTED[f"{name}.input"])).numpy()


def test_doctests():
    result = doctest.testmod(mxnet)
    assert result.failed == 0 and result.attempted >= 12


@every_block
def test_a_block_gives_mxnets_outputs(name):
    layer = layer_of(name)
    assert_close(run(layer, name), EXPECTED[f"{name}.output"], "float32")
    assert layer.modulated == (name[:2] == "v2") and layer.boundary == ("zeros" if layer.modulated else "inside")
    assert layer.offset_groups == {"v2_groups": 2, "v2_window": 4}.get(name, 1)


@pytest.mark.parametrize("name", ["v1", "v2", "v2_groups", "v2_window"])
def test_the_other_boundary_would_differ(name):
    own = layer_of(name)
    other = layer_from_mxnet(DATA / f"{name}.params", **BLOCKS[name], boundary="inside" if own.boundary == "zeros" else "zeros")
    assert error(run(other, name), EXPECTED[f"{name}.output"]) > 1e-3


@every_block
def test_a_block_goes_back_unchanged(name):
    old = read_params(DATA / f"{name}.params")
    new = layer_to_mxnet(layer_of(name))
    if name == "v1_groups":  # whose predictor has no bias; ours has one, of zeros
        assert (new.pop("offset_bias") == 0).all()
    assert set(new) == set(old)
    for key in old:
        assert new[key].dtype == old[key].dtype and (new[key] == old[key]).all(), key


@every_block
def test_a_block_loads_into_a_layer_that_is_there(name):
    layer = layer_of(name)
    expected = run(layer, name)
    old = read_params(DATA / f"{name}.params")
    layer.reset_parameters()
    torch.nn.init.ones_(layer.offset_conv.bias)
    load_mxnet(layer, old)
    assert (run(layer, name) == expected).all()


def test_a_net_of_several_layers_from_either_file():
    x = torch.from_numpy(EXPECTED["net.input"])
    for file, names in [
        ("net.params", ("0", "1", "2", "3")),
        ("exported-0000.params", ("net_conv0", "net_deformable_conv0", "net_modulated_deformable_conv0", "net_dense0")),
    ]:
        arrays = read_params(DATA / file)
        assert mxnet_layers(DATA / file) == list(names[1:3])
        conv, dense = torch.nn.Conv2d(4, 6, 3), torch.nn.Linear(48, 3)
        for layer, name in ((conv, names[0]), (dense, names[3])):
            prefix = f"{name}." if file == "net.params" else f"arg:{name}_"
            state = {part: torch.from_numpy(arrays[f"{prefix}{part}"]) for part in ("weight", "bias")}
            layer.load_state_dict(state)
        first, second = layer_from_mxnet(arrays, names[1], padding=1), layer_from_mxnet(DATA / file, names[2])
        relu = torch.nn.ReLU()
        net = torch.nn.Sequential(conv, relu, first, relu, second, torch.nn.Flatten(), dense)
        assert error(net(x).detach().numpy(), EXPECTED["net.output"]) < 1e-5


def test_symbols_as_in_deformable_convnets():
    file = DATA / "symbols.params"
    assert mxnet_layers(file) == ["res5a_branch2b", "res5b_branch2b"]
    first = layer_from_mxnet(file, "res5a_branch2b", padding=2, dilation=2)
    second = layer_from_mxnet(file, "res5b_branch2b", padding=1, groups=2)
    assert (first.modulated, first.offset_groups, second.modulated, second.offset_groups) == (False, 2, True, 1)
    x = torch.from_numpy(EXPECTED["symbols.input"])
    with torch.no_grad():
        assert_close(first(x).numpy(), EXPECTED["symbols.first"], "float32")
        assert_close(second(torch.from_numpy(EXPECTED["symbols.first"])).numpy(), EXPECTED["symbols.second"], "float32")
    old = {key.removeprefix("arg:"): array for key, array in read_params(file).items()}
    new = layer_to_mxnet(first, "res5a_branch2b", style="symbol") | layer_to_mxnet(second, "res5b_branch2b", style="symbol")
    assert set(new) == set(old)
    for key in old:
        assert (new[key] == old[key]).all(), key


def test_a_masks_other_scale_is_made_up_for_by_the_weight():
    x = torch.from_numpy(EXPECTED["v2.input"])
    layer = DeformConv2d(4, 5, 3, padding=1, mask_scale=1.0)
    load_mxnet(layer, DATA / "v2.params")
    assert_close(layer(x).detach().numpy(), EXPECTED["v2.output"], "float32")
    old = read_params(DATA / "v2.params")
    assert (layer.weight.detach().numpy() == 2 * old["deformable_conv_weight"]).all()
    assert (layer_to_mxnet(layer)["deformable_conv_weight"] == old["deformable_conv_weight"]).all()
    # A net whose masks are sigmoid without the factor.
    plain = layer_from_mxnet(old, padding=1, mask_scale=1.0)
    assert plain.mask_scale == 1 and (plain.weight.detach().numpy() == old["deformable_conv_weight"]).all()
    assert (layer_to_mxnet(plain, mask_scale=1.0)["deformable_conv_weight"] == old["deformable_conv_weight"]).all()
    v1 = DeformConv2d(4, 5, 3, padding=1, modulated=False, mask_scale=1.0, boundary="inside")
    load_mxnet(v1, DATA / "v1.params")
    assert (v1.weight.detach().numpy() == read_params(DATA / "v1.params")["deformable_conv_weight"]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_dtype_is_kept(dtype):
    old = {name: array.astype(dtype) for name, array in read_params(DATA / "v2.params").items()}
    layer = layer_from_mxnet(old, padding=1)
    assert layer.weight.dtype == layer.offset_conv.bias.dtype == getattr(torch, dtype)
    assert all(array.dtype == dtype for array in layer_to_mxnet(layer, "1").values())


def test_a_missing_bias_is_zero():
    old = read_params(DATA / "v2.params")
    del old["deformable_conv_bias"], old["offset_bias"]
    assert layer_from_mxnet(old).bias is None
    layer = DeformConv2d(4, 5, 3)
    torch.nn.init.ones_(layer.offset_conv.bias)
    load_mxnet(layer, old)
    assert not layer.bias.any() and not layer.offset_conv.bias.any()
    with pytest.raises(deformconv.ShapeError, match=r"the bias of '' has shape \(5,\); expected none, for a layer with bias"):
        load_mxnet(DeformConv2d(4, 5, 3, bias=False), DATA / "v2.params")


def test_v1_or_v2_must_be_said_where_both_are_possible():
    old = {"a_weight": np.ones((4, 6, 3, 3), "float32"), "a_offset_weight": np.ones((54, 6, 3, 3), "float32")}
    with pytest.raises(ValueError) as raised:
        layer_from_mxnet(old, "a")
    assert str(raised.value) == (
        "'a_offset_weight' predicts 54 channels, which is v1 with 3 offset groups or v2 with 2 offset groups: pass "
        "modulated=True for v2, False for v1."
    )
    assert layer_from_mxnet(old, "a", modulated=True).offset_groups == 2
    assert layer_from_mxnet(old, "a", modulated=False).offset_groups == 3
    layer = DeformConv2d(6, 4, 3, offset_groups=2)
    load_mxnet(layer, old, "a")
    with pytest.raises(deformconv.ShapeError, match="v1 with 3 offset groups or v2 with 2 offset groups; expected v2 with 1"):
        load_mxnet(DeformConv2d(6, 4, 3), old, "a")


def test_a_predictor_with_groups_becomes_a_dense_one_and_comes_back():
    layer = layer_of("v2_groups")
    dense = layer.offset_conv.weight.detach().numpy()
    assert dense.shape == (54, 4, 3, 3) and not dense[:27, 2:].any() and not dense[27:, :2].any()
    assert dense[:27, :2].all() and dense[27:, 2:].all()
    with torch.no_grad():
        layer.offset_conv.weight[0, 3, 1, 1] = 0.5
    with pytest.raises(ValueError) as raised:
        layer_to_mxnet(layer)
    assert str(raised.value) == (
        "the predictor reads across the convolution's 2 groups; in MXNet's block it has as many groups, and cannot. With "
        "style='symbol', or to='mxnet_symbol', it has one."
    )
    assert layer_to_mxnet(layer, style="symbol")["offset_weight"].shape == (54, 4, 3, 3)
    with pytest.raises(ValueError, match="the predictor has 27 channels, which groups=2 does not divide; in MXNet's block"):
        layer_to_mxnet(DeformConv2d(4, 4, 3, groups=2))


def test_arrays_that_do_not_fit():
    weight, offset = np.ones((6, 4, 3, 3), "float32"), np.ones((18, 4, 3, 3), "float32")
    whole = {"weight": weight, "offset_weight": offset}
    for changed, keywords, message in [
        ({"offset_weight": offset[:, :, :1, :1]}, {}, "'offset_weight' has a kernel of size 1x1; expected that of 'weight', 3"),
        ({"weight": weight[0]}, {}, "'weight' has shape (4, 3, 3); expected 4 axes: a 2-D layer's."),
        ({"offset_weight": offset[:17]}, {}, "'offset_weight' predicts 17 channels; expected v1 or v2: 2 (v1) or 3 (v2) x 9 "
         "taps for each offset group, of which there are a divisor of C_in = 4."),
        ({}, {"modulated": True}, "'offset_weight' predicts 18 channels, which is v1 with 1 offset group; expected v2: 2 (v1)"),
        ({"offset_weight": offset[:, :3]}, {}, "'offset_weight' has shape (18, 3, 3, 3), so each predicted channel reads 3 of "
         "C_in = 4 (groups=1); expected 4"),
        ({"bias": np.ones(5)}, {}, "'bias' has shape (5,); expected (6,), one for each output channel."),
        ({"offset_bias": np.ones(9)}, {}, "'offset_bias' has shape (9,); expected (18,), one for each output channel."),
        ({}, {"groups": 4}, "`groups` is 4; expected a divisor of 6, axis 0 of 'weight'"),
        ({}, {"groups": 0}, "`groups` is 0; expected at least 1."),
    ]:  # fmt: skip
        with pytest.raises(deformconv.ShapeError) as raised:
            layer_from_mxnet(whole | changed, **keywords)
        assert message in str(raised.value)
    with pytest.raises(deformconv.ShapeError, match=r"the weight of '' has shape \(6, 4, 3, 3\); expected the layer's, \(8"):
        load_mxnet(DeformConv2d(4, 8, 3, modulated=False, boundary="inside"), whole)


def test_layers_that_mxnet_does_not_have():
    for keywords, message in [
        ({"predict_offsets": False}, "`layer` predicts no offsets (predict_offsets=False); MXNet's deformable layers do."),
        ({"max_offset": 8}, "`layer` bounds its offsets (max_offset=8); MXNet's deformable layers do not."),
        ({"padding_mode": "reflect"}, "`layer` has padding_mode='reflect'; MXNet's deformable layers have 'zeros'."),
    ]:
        for call in (layer_to_mxnet, lambda layer: load_mxnet(layer, DATA / "v2.params")):
            with pytest.raises(ValueError) as raised:
                call(DeformConv2d(4, 5, 3, **keywords))
            assert str(raised.value) == message
    with pytest.raises(TypeError, match=r"`layer` is a DeformConv1d; expected a deformconv\.torch\.DeformConv2d"):
        layer_to_mxnet(DeformConv1d(4, 5, 3))
    with pytest.raises(ValueError, match="`style` is 'keras'; expected 'gluon' or 'symbol'"):
        layer_to_mxnet(DeformConv2d(4, 5, 3), style="keras")


def test_the_boundaries_must_agree():
    v1, v2 = DeformConv2d(4, 5, 3, modulated=False), DeformConv2d(4, 5, 3)
    with pytest.raises(ValueError) as raised:
        layer_to_mxnet(v1)
    assert str(raised.value) == (
        "`layer` has boundary='zeros' and MXNet's v1 will compute with 'inside'; outputs at the border would differ. Make the "
        "layer with boundary='inside', or pass boundary='zeros' for a block of deformconv.gluon with that rule."
    )
    layer_to_mxnet(v1, boundary="zeros")
    with pytest.raises(ValueError, match="`layer` has boundary='zeros' and MXNet's v1 was computed with 'inside'"):
        load_mxnet(v1, DATA / "v1.params")
    load_mxnet(v1, DATA / "v1.params", boundary="zeros")
    load_mxnet(v2, DATA / "v2.params")
    with pytest.raises(ValueError, match="`boundary` is 'border'; expected 'zeros' or 'inside', or None for MXNet's own"):
        layer_from_mxnet(DATA / "v2.params", boundary="border")


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError) as raised:
        layer_from_mxnet(DATA / "net.params", "7")
    assert str(raised.value) == "`name` is '7'; expected one of the deformable layers in `params`: '1', '2'."
    with pytest.raises(ValueError, match="expected one of the deformable layers in `params`: none"):
        layer_from_mxnet({"0.weight": np.ones((3, 3, 3, 3))}, "0")


@pytest.mark.parametrize("part", ["", "offset_conv"])
def test_a_weight_normed_layer_is_loaded_through_its_parametrization(part):
    old = read_params(DATA / "v2.params")
    layer = DeformConv2d(4, 5, 3, padding=1)
    if part:
        torch.nn.init.normal_(layer.offset_conv.weight)
    weight_norm(layer.get_submodule(part))
    load_mxnet(layer, old)
    assert_close(run(layer, "v2"), EXPECTED["v2.output"], "float32")
    assert_close(layer.weight.detach().numpy(), old["deformable_conv_weight"], "float32")
    assert_close(layer_to_mxnet(layer)["offset_weight"], old["offset_weight"], "float32")
    layer.weight.square().sum().backward()
    if not part:
        assert layer.parametrizations.weight.original1.grad is not None


def test_a_parametrization_that_cannot_hold_the_numbers():
    old = read_params(DATA / "v2.params")
    for make, kind in (
        (torch.nn.utils.parametrizations.spectral_norm, "SpectralNorm"),  # divides what is assigned
        (lambda layer: parametrize.register_parametrization(layer, "weight", NoInverse()), "NoInverse"),
    ):
        layer = DeformConv2d(4, 5, 3, padding=1)
        make(layer)
        before = [parameter.detach().clone() for parameter in layer.parameters()]
        with pytest.raises(ValueError) as raised:
            load_mxnet(layer, old)
        assert str(raised.value) == (
            f"`layer` has a parametrization of weight, {kind}, that cannot hold MXNet's numbers, and is left as it was. "
            "Remove it first: torch.nn.utils.parametrize.remove_parametrizations."
        )
        assert all(map(torch.equal, layer.parameters(), before))


class NoInverse(torch.nn.Module):
    def forward(self, weight):
        return weight.tanh()

    def right_inverse(self, weight):
        raise NotImplementedError


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_hooks_compute_is_refused():
    layers = [DeformConv2d(4, 5, 3, padding=1) for _ in range(3)]
    torch.nn.utils.weight_norm(layers[0])
    prune.l1_unstructured(layers[1], "bias", amount=1)
    prune.random_unstructured(layers[2].offset_conv, "weight", amount=0.5)
    for layer, name in zip(layers, ("weight", "bias", "offset_conv.weight"), strict=True):
        for call in (layer_to_mxnet, lambda layer: load_mxnet(layer, DATA / "v2.params")):
            with pytest.raises(ValueError) as raised:
                call(layer)
            assert str(raised.value) == (
                f"`layer` has a {name} that is computed from other parameters, as the older weight_norm, spectral_norm and "
                "pruning do; expected a parameter. Make it one first: torch.nn.utils.remove_weight_norm, "
                "remove_spectral_norm, or torch.nn.utils.prune.remove."
            )
    torch.nn.utils.remove_weight_norm(layers[0])
    load_mxnet(layers[0], DATA / "v2.params")
    assert_close(run(layers[0], "v2"), EXPECTED["v2.output"], "float32")


def test_padding_that_mxnet_does_not_have():
    for padding, text in (
        ("same", "'same', which is 1 before and 2 after, 1 before and 2 after"),
        (((1, 1), (0, 1)), "((1, 1), (0, 1)), which is 1 before and 1 after, 0 before and 1 after"),
    ):
        layer = DeformConv2d(4, 5, 4, padding=padding)
        for call in (layer_to_mxnet, lambda layer: load_mxnet(layer, DATA / "v2.params")):
            with pytest.raises(ValueError) as raised:
                call(layer)
            assert str(raised.value) == (
                f"`layer` has padding={text}; MXNet's deformable layers pad by the same number on both sides of an axis."
            )
    assert layer_to_mxnet(DeformConv2d(4, 5, 3, padding="same"))


def test_bfloat16_becomes_float32(tmp_path):
    layer = layer_of("v2").bfloat16()
    arrays = layer_to_mxnet(layer)
    assert {array.dtype.name for array in arrays.values()} == {"float32"}
    assert (arrays["offset_bias"] == layer.offset_conv.bias.detach().float().numpy()).all()
    again = layer_from_mxnet(dict(zip(arrays, (layer.weight, layer.bias, *layer.offset_conv.parameters()), strict=True)))
    assert again.weight.dtype == torch.float32 and torch.equal(again.weight, layer.weight.float())
    write_params(tmp_path / "a.params", {"parameter": layer.weight, "half": layer.bias.half(), "whole": torch.arange(3)})
    found = read_params(tmp_path / "a.params")
    assert {name: array.dtype.name for name, array in found.items()} == {
        "parameter": "float32", "half": "float16", "whole": "int64",
    }  # fmt: skip
    assert (found["parameter"] == arrays["deformable_conv_weight"]).all()


def test_v1_with_groups_becomes_v2():
    """What docs/gluon.md says to do, since a block's grouped predictor cannot."""
    v1 = layer_of("v1_groups")
    assert v1.groups == 2
    v2 = DeformConv2d(v1.in_channels, v1.out_channels, v1.kernel_size, groups=2, bias=False, boundary="inside")
    v2.weight = v1.weight
    with torch.no_grad():
        v2.offset_conv.weight[:18], v2.offset_conv.bias[:18] = v1.offset_conv.weight, v1.offset_conv.bias
    assert_close(run(v2, "v1_groups"), EXPECTED["v1_groups.output"], "float32")
