"""State_dicts of other libraries become ours and go back, with those libraries' layers as the measure."""

from __future__ import annotations

import copy
import doctest
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.convert.libraries import (  # noqa: E402
    BLOCKS,
    CHANNELS,
    Block,
    Geometry,
    Guided,
    Pack,
    filled,
    ours,
)
from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch.nn.utils.parametrizations import weight_norm  # noqa: E402

from deformconv import ShapeError  # noqa: E402
from deformconv.convert import (  # noqa: E402
    convert_state_dict,
    layer_from_mxnet,
    layer_to_mxnet,
    replace_layers,
    state_dicts,
    to_torchvision,
)
from deformconv.convert.layouts import LAYOUTS  # noqa: E402
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d, DeformRoIPool, loading  # noqa: E402

SOURCES = tuple(BLOCKS)
SIGMOID = tuple(source for source in SOURCES if LAYOUTS[source].mask_scale == 1)
# What each library's layers can be; all of them stride and pad.
GROUPS = {"mmcv", "mmdet1", "detectron2", "basicsr", "paddle", "mxnet", "mxnet_symbol", "torchvision", "deformconv"}
OFFSET_GROUPS = set(SOURCES) - {"paddle"}
DILATION = set(SOURCES) - {"dcnv2", "paddle"}  # Paddle's is tested apart
NO_BIAS = set(SOURCES) - {"dcnv2"}
V1 = set(SOURCES) - {"dcnv2", "basicsr", "paddle"}
MATCHED = "<All keys matched successfully>"
every_source = pytest.mark.parametrize("source", SOURCES)

GEOMETRIES = (
    Geometry(),
    Geometry(stride=2),
    Geometry(bias=False, padding=2),
    Geometry(offset_groups=4),
    Geometry(dilation=2, padding=2, bias=False),
    Geometry(groups=2, offset_groups=2, stride=2, dilation=2),
    Geometry(modulated=False),
    Geometry(modulated=False, offset_groups=2, groups=2, bias=False),
    Geometry(modulated=False, dilation=2, stride=2),
)


def can(source: str, g: Geometry) -> bool:
    return (
        (g.modulated or source in V1)
        and (g.groups == 1 or source in GROUPS)
        and (g.offset_groups == 1 or source in OFFSET_GROUPS)
        and (g.dilation == 1 or source in DILATION)
        and (g.bias or source in NO_BIAS)
        and (g.padding == 1 or source != "paddle")  # whose predictor pads so that the size stays
    )


CASES = [(source, geometry) for source in SOURCES for geometry in GEOMETRIES if can(source, geometry)]
every_case = pytest.mark.parametrize(
    "source, geometry", CASES, ids=[f"{source}-{GEOMETRIES.index(geometry)}" for source, geometry in CASES]
)


def of(source, geometry=Geometry(), **keywords):  # noqa: B008
    """Our block for a source's: at the border MXNet computes v1 by another rule."""
    kind = Guided if source == "basicsr" else DeformConv2d
    return ours(geometry, kind, boundary=LAYOUTS[source].boundaries[geometry.modulated], **keywords)


def theirs(source, geometry=Geometry(), dtype=torch.float64, seed=0):  # noqa: B008
    return filled(BLOCKS[source](geometry), seed).to(dtype)


def assert_same(actual, expected):
    """The same names in the same order, and the same bits."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def inputs(source):
    generator = torch.Generator().manual_seed(1)
    number = 2 if source == "basicsr" else 1
    return [torch.rand(1, CHANNELS, 17, 15, generator=generator, dtype=torch.float64) for _ in range(number)]


def assert_equal_outputs(ours, theirs, source, geometry):
    with torch.no_grad():
        actual, expected = ours(*inputs(source)), theirs(*inputs(source))
    if LAYOUTS[source].boundaries[geometry.modulated] == "inside":
        # torchvision's operator has the other rule, which differs where a sample lies outside.
        actual, expected = actual[..., 3:-3, 3:-3], expected[..., 3:-3, 3:-3]
    assert expected.numel() and expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_doctests():
    result = doctest.testmod(state_dicts)
    assert result.failed == 0 and result.attempted >= 8


@every_case
def test_a_layer_computes_what_the_librarys_did(source, geometry):
    there = theirs(source, geometry)
    if LAYOUTS[source].boundaries[geometry.modulated] == "inside":
        small(there)
    for mask_scale in scales(source):
        here = of(source, geometry, mask_scale=mask_scale).double()
        assert str(here.load_state_dict(convert_state_dict(there.state_dict(), source=source, model=here))) == MATCHED
        assert_equal_outputs(here, there, source, geometry)


def scales(source):
    """The masks' scales to convert to; what was this library's keeps its own."""
    return (2.0,) if LAYOUTS[source].mask_scale is None else (2.0, 1.0, 1.5)


def small(block):
    """Keep the offsets below a pixel, so that they reach outside from the outermost outputs alone."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "offset" in name:
                parameter.mul_(0.02)


@every_case
def test_there_and_back_again(source, geometry):
    """Bit for bit, in every dtype; 1/1.5 of a float32 has more bits than a float32, and fewer than a float64."""
    block = theirs(source, geometry, torch.float32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        state = block.to(dtype).state_dict()
        for mask_scale in scales(source) if dtype == torch.float64 else scales(source)[:2]:
            model = of(source, geometry, mask_scale=mask_scale).to(dtype)
            here = convert_state_dict(state, source=source, model=model)
            assert_same(convert_state_dict(here, to=source, model=model), state)
            model.load_state_dict(here)
            own = model.state_dict()
            there = convert_state_dict(own, to=source, model=model)
            assert_same({name: there[name] for name in state}, state)
            again = convert_state_dict(there, source=source, model=model)
            assert_same(again, own)
            assert again._metadata == {name: entry for name, entry in own._metadata.items() if "mask_scale" in entry}


def test_paddles_predictor_is_not_dilated():
    """With the convolution in its place that the error names, the layer computes what Paddle's does."""
    geometry = Geometry(dilation=2, padding=2)
    there, here = theirs("paddle", geometry), of("paddle", geometry).double()
    with pytest.raises(
        ValueError, match=r"OffsetPredictor with padding=\(2, 2\), dilation=\(2, 2\), and PaddleDetection"
    ) as error:
        convert_state_dict(there.state_dict(), source="paddle", model=here)
    statement = "layer.offset_conv = torch.nn.Conv2d(4, 27, (3, 3), (1, 1), (1, 1), (1, 1))"
    assert f"`{statement}`" in str(error.value)
    exec(statement, {"torch": torch, "layer": here.conv2})
    here.double().load_state_dict(convert_state_dict(there.state_dict(), source="paddle", model=here))
    assert_equal_outputs(here, there, "paddle", geometry)
    assert_same(
        convert_state_dict(here.state_dict(), to="paddle", model=here), dict(sorted(there.state_dict().items(), key=order))
    )


def order(item):
    """The layer's own parameters before its predictor's, as in our state_dict."""
    return "conv_offset" in item[0]


def test_the_obvious_rename_is_wrong_by_a_factor_of_two(monkeypatch):
    """Masks of mean 1.3 for 0.66, and outputs twice as large, which is warned of; the conversion is right."""
    monkeypatch.setattr(loading, "_has_warned", False)
    there = theirs("mmcv", Geometry(bias=False))
    with torch.no_grad():
        there.conv2.conv_offset.bias[18:] = 0.7
        there.conv2.conv_offset.weight[18:] *= 0.05
    state, (x,) = there.state_dict(), inputs("mmcv")
    here = of("mmcv", Geometry(bias=False)).double()
    with pytest.warns(UserWarning, match="2 times as large"):
        here.load_state_dict({key.replace("conv_offset", "offset_conv"): tensor for key, tensor in state.items()})
    with torch.no_grad():
        masks = torch.sigmoid(there.conv2.conv_offset(x)[:, 18:])
        torch.testing.assert_close(here.conv2.offsets_and_mask(x)[1], 2 * masks)
        torch.testing.assert_close(here(x), 2 * there(x))
        assert 0.6 < masks.mean() < 0.75
    here.load_state_dict(convert_state_dict(state, source="mmcv", model=here))
    assert_equal_outputs(here, there, "mmcv", Geometry())


@pytest.mark.parametrize("source", sorted(V1 - {"mxnet", "mxnet_symbol"}))
@pytest.mark.parametrize("offset_groups", [1, 4])
def test_a_file_of_v1_becomes_v2_with_masks_of_one(source, offset_groups):
    one, two = (Geometry(modulated, offset_groups=offset_groups) for modulated in (False, True))
    there, here = theirs(source, one), of(source, two).double()
    given = there.state_dict()
    state = convert_state_dict(given, source=source, model=here)
    assert str(here.load_state_dict(state)) == MATCHED
    assert (here.conv2.offsets_and_mask(*inputs(source))[1] == 1).all()
    main = next(tensor for key, tensor in given.items() if key.endswith(("conv2.weight", "deform_conv.weight")))
    assert state["conv2.weight"] is main  # v1's weight has no masks to make up for
    assert_equal_outputs(here, there, source, one)
    here = of(source, two, mask_scale=1.0)
    with pytest.raises(ShapeError, match=f"expected {27 * offset_groups}: 3 x 9 taps x {offset_groups} offset group"):
        convert_state_dict(there.state_dict(), source=source, model=here)


@pytest.mark.parametrize("source", ["mxnet", "mxnet_symbol"])
def test_mxnets_v1_has_another_boundary_than_its_v2(source):
    state = theirs(source, Geometry(modulated=False)).state_dict()
    with pytest.raises(
        ValueError, match=r"boundary='zeros', and MXNet.* computes v1 with 'inside': outputs at the border would"
    ):
        convert_state_dict(state, source=source, model=of(source))
    model = ours(Geometry(), boundary="inside").double()
    model.load_state_dict(convert_state_dict(state, source=source, model=model))
    plain = ours(Geometry(modulated=False), boundary="inside").double()
    plain.load_state_dict(convert_state_dict(state, source=source, model=plain))
    torch.testing.assert_close(model(*inputs(source)), plain(*inputs(source)), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"boundary='inside', and MXNet.* computes v2 with 'zeros'"):
        convert_state_dict(theirs(source).state_dict(), source=source, model=model)
    with pytest.raises(ValueError, match=r"boundary='inside', and mmcv and mmdetection from 2.0 on computes v2 with 'zeros'"):
        convert_state_dict(model.state_dict(), to="mmcv", model=model)


@pytest.mark.parametrize("source", sorted(V1 - {"mxnet", "mxnet_symbol"}))
def test_a_file_of_v2_is_refused_by_a_layer_of_v1(source):
    model = ours(Geometry(modulated=False))
    text = (
        r"^the predictor of layer 'conv2' of `model` has 27 channels in `state`; expected 18: 2 x 9 taps x 1 offset group\. 27"
    )
    with pytest.raises(ShapeError, match=text + r" is v2 with 1 offset group: modulated=True, offset_groups=1\.$"):
        convert_state_dict(theirs(source).state_dict(), source=source, model=model)


def test_wrong_offset_groups_and_kernels():
    state = theirs("mmcv", Geometry(offset_groups=2)).state_dict()
    text = (
        "has 54 channels in `state`; expected 108: 3 x 9 taps x 4 offset groups. 54 is v1 with 3 offset groups: modulated=False"
    )
    with pytest.raises(
        ShapeError, match=text + ", offset_groups=3. 54 is v2 with 2 offset groups: modulated=True, offset_groups=2"
    ):
        convert_state_dict(state, source="mmcv", model=ours(Geometry(offset_groups=4)))
    other = Block(DeformConv2d(CHANNELS, 8, 5, padding=2))
    with pytest.raises(ShapeError, match=r"has 54 channels in `state`; expected 75: 3 x 25 taps x 1 offset group\.$"):
        convert_state_dict(state, source="mmcv", model=other)


class ResNet(nn.Module):
    """Names as a backbone's, plain or deformable."""

    def __init__(self, layer):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.layer3 = nn.Sequential(layer)
        self.fc = nn.Linear(3, 2)


@every_source
def test_a_plain_net_passes_into_a_deformable_one(source):
    plain = ResNet(nn.Conv2d(CHANNELS, 8, 3))
    model = ResNet(DeformConv2d(CHANNELS, 8, 3, boundary=LAYOUTS[source].boundaries[True])).double()
    state = plain.double().state_dict()
    result = convert_state_dict(state, source=source, model=model)
    assert list(result) == list(state)
    for name, tensor in state.items():
        if name == "fc.weight" and source == "paddle":
            assert torch.equal(result[name], tensor.t())
        else:
            assert result[name] is tensor
    if source == "paddle":
        return
    keys = model.load_state_dict(result, strict=False)
    assert keys.missing_keys == ["layer3.0.offset_conv.weight", "layer3.0.offset_conv.bias"] and not keys.unexpected_keys
    (x,) = inputs("mmcv")
    torch.testing.assert_close(model.layer3(x), plain.layer3(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("mmcv", ["bn1.weight", "bn1.running_var", "bn1.num_batches_tracked", "layer3.0.conv_offset.bias", "fc.weight"]),
        ("detectron2", ["bn1.weight", "bn1.running_var", "bn1.num_batches_tracked", "layer3.0_offset.bias", "fc.weight"]),
        ("paddle", ["bn1.weight", "bn1._variance", "layer3.0.conv_dcn.weight", "layer3.0.conv_offset.bias", "fc.weight"]),
        ("mxnet", ["bn1.gamma", "bn1.running_var", "layer3.0.deformable_conv_weight", "layer3.0.offset_bias", "fc.weight"]),
        (
            "mxnet_symbol",
            ["arg:bn1_gamma", "aux:bn1_moving_var", "arg:layer3_0_weight", "arg:layer3_0_offset_bias", "arg:fc_weight"],
        ),
    ],
)
def test_a_whole_nets_names(source, expected):
    model = filled(ResNet(DeformConv2d(CHANNELS, 8, 3, padding=1)))
    model.bn1.running_mean.uniform_()
    own = model.state_dict()
    there = convert_state_dict(own, to=source, model=model)
    assert set(expected) <= set(there) and len(set(there)) in (len(own), len(own) - 1)
    assert ("bn1.num_batches_tracked" in there) == (len(there) == len(own))
    weight = there["arg:fc_weight" if source == "mxnet_symbol" else "fc.weight"]
    assert weight.shape == ((3, 2) if source == "paddle" else (2, 3)) and weight.is_contiguous()
    again = convert_state_dict(there, source=source, model=model)
    assert_same(again, {name: own[name] for name in own if name in again})
    assert str(ResNet(DeformConv2d(CHANNELS, 8, 3)).load_state_dict(again)) == MATCHED


@pytest.mark.parametrize(
    "norm, words",
    [(nn.GroupNorm(2, 4), ("gamma", "beta")), (nn.LayerNorm(4), ("gamma", "beta")), (nn.Linear(4, 4), ("weight", "bias"))],
    ids=str,
)
def test_mxnets_words_for_norms(norm, words):
    net = nn.ModuleDict({"part": norm})
    assert list(convert_state_dict(net.state_dict(), to="mxnet", model=net)) == [f"part.{word}" for word in words]
    symbols = convert_state_dict(net.state_dict(), to="mxnet_symbol", model=net)
    assert list(symbols) == [f"arg:part_{word}" for word in words]
    assert list(convert_state_dict(symbols, source="mxnet_symbol", model=net)) == list(net.state_dict())
    bare = {key.removeprefix("arg:"): tensor for key, tensor in symbols.items()}  # as in the files of Gluon's `export`
    assert list(convert_state_dict(bare, source="mxnet_symbol", model=net)) == list(net.state_dict())


ROOT = {
    "mmcv": ["weight", "bias", "conv_offset.weight", "conv_offset.bias"],
    "mmdet1": ["weight", "bias", "offset.weight", "offset.bias"],
    "detectron2": ["weight", "bias", "offset.weight", "offset.bias"],
    "dcnv2": ["weight", "bias", "conv_offset_mask.weight", "conv_offset_mask.bias"],
    "basicsr": ["weight", "bias", "conv_offset.weight", "conv_offset.bias"],
    "paddle": ["conv_dcn.weight", "conv_dcn.bias", "conv_offset.weight", "conv_offset.bias"],
    "mxnet": ["deformable_conv_weight", "deformable_conv_bias", "offset_weight", "offset_bias"],
    "mxnet_symbol": ["arg:weight", "arg:bias", "arg:offset_weight", "arg:offset_bias"],
    "torchvision": ["deform_conv.weight", "deform_conv.bias", "offset_conv.weight", "offset_conv.bias"],
    "deformconv": ["weight", "bias", "offset_conv.weight", "offset_conv.bias"],
}


@every_source
def test_the_layer_itself_is_the_model(source):
    layer = filled(of(source)).conv2
    there = convert_state_dict(layer.state_dict(), to=source, model=layer)
    assert list(there) == ROOT[source]
    assert_same(convert_state_dict(there, source=source, model=layer), layer.state_dict())


@pytest.mark.parametrize("keyword", ["source", "to"])
def test_names_tensors_and_the_model_stay(keyword):
    model = filled(ResNet(DeformConv2d(CHANNELS, 8, 3)))
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    state = model.state_dict()
    if keyword == "source":
        state = convert_state_dict(state, to="mmcv", model=model)
    state["head.x.weight"], state["layer3.0.extra"] = torch.rand(2), torch.rand(3)
    state.move_to_end("fc.weight", last=False)
    names, held = list(state), dict(state)
    result = convert_state_dict(state, **{keyword: "mmcv"}, model=model)
    words = ("conv_offset", "offset_conv") if keyword == "source" else ("offset_conv", "conv_offset")
    assert list(result) == [name.replace(*words) for name in names]
    for new, old in zip(result, names, strict=True):
        assert (result[new] is held[old]) == (old != "layer3.0.weight"), old
        assert held[old] is state[old]
    assert_same(model.state_dict(), before)
    assert list(model.modules()) == modules
    assert list(state) == names


def test_the_result_is_stored_and_read():
    model = ours(Geometry())
    result = convert_state_dict(theirs("mmcv").state_dict(), source="mmcv", model=model)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert again._metadata == result._metadata
    assert result._metadata["conv2"] == {"version": 1, "mask_scale": 2.0}
    assert_same(again, result)
    assert str(model.load_state_dict(again)) == MATCHED


def test_metadata_of_other_modules_stays():
    """mmcv's layers say version 2, which is no version of ours; a norm's version is told on."""
    model = ResNet(DeformConv2d(CHANNELS, 8, 3))
    state = convert_state_dict(model.state_dict(), to="mmcv", model=model)
    state._metadata = {"layer3.0": {"version": 2}, "bn1": {"version": 2}}
    result = convert_state_dict(state, source="mmcv", model=model)
    assert result._metadata == {"layer3.0": {"version": 1, "mask_scale": 2.0}, "bn1": {"version": 2}}
    assert state._metadata["layer3.0"] == {"version": 2}


def test_a_record_of_other_masks_is_made_up_for():
    """A state_dict of this library whose layers had mask_scale=1, for layers with 2."""
    one, two = filled(ours(Geometry(), mask_scale=1.0)).double(), ours(Geometry()).double()
    two.load_state_dict(convert_state_dict(one.state_dict(), source="deformconv", model=two))
    torch.testing.assert_close(two(*inputs("mmcv")), one(*inputs("mmcv")), rtol=1e-12, atol=1e-12)
    lost = dict(one.state_dict())
    assert torch.equal(convert_state_dict(lost, source="deformconv", model=two)["conv2.weight"], one.conv2.weight)


class Compiled(nn.Module):
    """Names as of what torch.compile returns."""

    def __init__(self, net):
        super().__init__()
        self._orig_mod = net


@pytest.mark.slow
def test_names_of_a_compiled_model():
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    assert list(torch.compile(net).state_dict()) == list(Compiled(net).state_dict())


def test_a_record_of_other_masks_without_a_weight_to_make_up_for_them():
    one, two = pool_of(mask_scale=1.0), pool_of()
    for keyword in ("source", "to"):
        with pytest.raises(
            ValueError, match="layer 'pool' of `model` has mask_scale=2, and `state` is of one with 1; expected"
        ):
            convert_state_dict(one.state_dict(), **{keyword: "deformconv"}, model=two)
    one, two = ours(Geometry(), mask_scale=1.0), ours(Geometry())
    for model in (one, two):
        weight_norm(model.conv2)
    with pytest.raises(ValueError, match="layer 'conv2' of `model` has mask_scale=2, and `state` is of one with 1; expected"):
        convert_state_dict(one.state_dict(), source="deformconv", model=two)
    two.load_state_dict(convert_state_dict(two.state_dict(), source="deformconv", model=two))


def nested(layer):
    return nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), layer), nn.ReLU())


def private(layer):
    net = nn.Module()
    net._dcn = layer
    return net


@every_source
@pytest.mark.parametrize("put", [nested, private, nn.DataParallel, Compiled], ids=lambda put: put.__name__)
def test_models_of_any_kind_go_there_and_back(source, put):
    model = put(filled(of(source)).conv2)
    own = model.state_dict()
    there = convert_state_dict(own, to=source, model=model)
    assert source == "deformconv" or set(there) != set(own)
    assert_same(convert_state_dict(there, source=source, model=model), own)


@pytest.mark.parametrize("put", [nn.DataParallel, Compiled], ids=["module.", "_orig_mod."])
def test_wrapped_models_and_states(put):
    model = ours(Geometry())
    state = theirs("mmcv").state_dict()
    wrapped = put(model)
    word = next(iter(wrapped.state_dict())).split(".")[0]
    text = rf"`state` has 'conv2.conv_offset.weight', and for `model` that would be '{word}.conv2.conv_offset.weight': DataPara"
    with pytest.raises(ValueError, match=text):
        convert_state_dict(state, source="mmcv", model=wrapped)
    with pytest.raises(ValueError, match=r"pass the model within, `model.module` or `model._orig_mod`\.$"):
        convert_state_dict({f"{word}.{name}": tensor for name, tensor in state.items()}, source="mmcv", model=model)


def test_a_layer_that_stands_at_two_places():
    layer = filled(ours(Geometry())).conv2
    model = nn.ModuleDict({"first": layer, "second": layer})
    there = convert_state_dict(model.state_dict(), to="detectron2", model=model)
    assert list(there)[2:6] == ["first_offset.weight", "first_offset.bias", "second.weight", "second.bias"]
    assert torch.equal(there["first.weight"], there["second.weight"])
    assert torch.equal(there["first.weight"], layer.weight * 2)
    assert_same(convert_state_dict(there, source="detectron2", model=model), model.state_dict())


@pytest.mark.parametrize("keyword", ["source", "to"])
@pytest.mark.parametrize(
    "other", [nn.Conv2d(4, 8, 3), DeformConv2d(4, 8, 3, modulated=False), DeformConv2d(4, 8, 3, mask_scale=1)]
)
def test_a_weight_that_another_module_has_too(other, keyword):
    """The one would be loaded over the other, and the masks of one of them be wrong."""
    model = nn.ModuleDict({"deformable": DeformConv2d(4, 8, 3), "other": other})
    other.weight = model["deformable"].weight
    state = model.state_dict()
    if keyword == "source":
        state = {name.replace("offset_conv", "conv_offset"): tensor for name, tensor in state.items()}
    with pytest.raises(
        ValueError, match="layer 'deformable' of `model` shares its weight with 'other', which has no masks of its"
    ):
        convert_state_dict(state, **{keyword: "mmcv"}, model=model)


def test_a_weight_that_two_layers_share():
    model = nn.ModuleDict({"first": DeformConv2d(4, 8, 3), "second": DeformConv2d(4, 8, 3)})
    model["second"].weight = model["first"].weight
    there = convert_state_dict(model.state_dict(), to="mmcv", model=model)
    assert torch.equal(there["first.weight"], there["second.weight"])
    assert_same(convert_state_dict(there, source="mmcv", model=model), model.state_dict())


@every_source
def test_layers_that_are_passed_their_offsets(source):
    """No masks are predicted there, and nothing is to be made up for."""
    model = Block(DeformConv2d(4, 8, 3, predict_offsets=False))
    own = model.state_dict()
    there = convert_state_dict(own, to=source, model=model)
    symbol = source == "mxnet_symbol"
    assert list(there) == (["arg:conv2_weight", "arg:conv2_bias"] if symbol else ["conv2.weight", "conv2.bias"])
    assert all(mine is other for mine, other in zip(own.values(), there.values(), strict=True))
    here = convert_state_dict(there, source=source, model=model)
    assert all(here[name] is tensor for name, tensor in own.items()) and not here._metadata


def test_layers_that_are_passed_their_offsets_are_looked_at():
    model = Block(DeformConv2d(4, 8, 3, predict_offsets=False, boundary="inside"))
    with pytest.raises(ValueError, match="layer 'conv2' of `model` has boundary='inside', and CharlesShang"):
        convert_state_dict(model.state_dict(), source="dcnv2", model=model)


class OwnPredictor(nn.Module):
    """A block that predicts from another feature by a convolution of its own."""

    def __init__(self):
        super().__init__()
        self.conv_offset = nn.Conv2d(CHANNELS, 27, 3, padding=1)
        self.deform = DeformConv2d(CHANNELS, 8, 3, padding=1, predict_offsets=False)

    def forward(self, x, feature):
        one, two, mask = self.conv_offset(feature).chunk(3, 1)
        return self.deform(x, torch.cat((one, two), 1), mask.sigmoid())


@pytest.mark.parametrize("put", [Block, lambda block: block], ids=["within", "itself"])
def test_basicsrs_pack_as_a_block_with_a_predictor_of_its_own(put):
    there = theirs("basicsr").conv2
    here = put(OwnPredictor().double())
    there = put(there)
    state = convert_state_dict(there.state_dict(), source="basicsr", model=here)
    assert str(here.load_state_dict(state)) == MATCHED
    assert_equal_outputs(here, there, "basicsr", Geometry())
    assert {*convert_state_dict(here.state_dict(), to="basicsr", model=here)} == {*there.state_dict()}


def test_basicsrs_pack_predicts_from_another_feature():
    text = (
        "predicts its offsets from its own input, and BasicSR's DCNv2Pack from another feature: the keys fit, and the outputs"
    )
    with pytest.raises(ValueError, match=text):
        convert_state_dict(theirs("basicsr").state_dict(), source="basicsr", model=ours(Geometry()))
    # The other Pack, which is mmcv's, as the message says.
    there, here = filled(Block(Pack(Geometry()))).double(), ours(Geometry()).double()
    here.load_state_dict(convert_state_dict(there.state_dict(), source="mmcv", model=here))
    assert_equal_outputs(here, there, "mmcv", Geometry())


def test_another_convolution_as_predictor():
    there = theirs("mmcv", Geometry(stride=2))
    model = ours(Geometry(stride=2)).double()
    model.conv2.offset_conv = nn.Conv2d(CHANNELS, 27, 3, 2, 1).double()
    model.load_state_dict(convert_state_dict(there.state_dict(), source="mmcv", model=model))
    assert_equal_outputs(model, there, "mmcv", Geometry())
    model.conv2.offset_conv = nn.Conv2d(CHANNELS, 27, 3, 2, 1, bias=False)
    assert set(convert_state_dict(model.state_dict(), to="mmcv", model=model)) == {*there.state_dict()} - {
        "conv2.conv_offset.bias"
    }
    without = {name: tensor for name, tensor in there.state_dict().items() if name != "conv2.conv_offset.bias"}
    assert str(model.load_state_dict(convert_state_dict(without, source="mmcv", model=model))) == MATCHED


@pytest.mark.parametrize("keyword", ["source", "to"])
@pytest.mark.parametrize(
    "predictor, difference",
    [
        (nn.Conv2d(4, 27, 5, padding=2), r"a Conv2d with kernel_size=\(5, 5\), padding=\(2, 2\)"),
        (nn.Conv2d(4, 27, 3, padding=2, dilation=2), r"a Conv2d with padding=\(2, 2\), dilation=\(2, 2\)"),
        (nn.Conv2d(4, 27, 3, stride=2, padding=1), r"a Conv2d with stride=\(2, 2\)"),
        (nn.Conv2d(4, 27, 3, padding=1, padding_mode="reflect"), "a Conv2d with padding_mode='reflect'"),
        (nn.Conv2d(3, 27, 3, padding=1, groups=3), "a Conv2d with groups=3"),
        (nn.Sequential(nn.Conv2d(4, 27, 3, padding=1)), "a Sequential with kernel_size=None, stride=None"),
        (nn.Identity(), "a Identity with kernel_size=None"),
    ],
    ids=str,
)
def test_predictors_that_look_elsewhere(predictor, difference, keyword):
    model = ours(Geometry())
    model.conv2.offset_conv = predictor
    state = model.state_dict() if keyword == "to" else theirs("mmcv").state_dict()
    with pytest.raises(
        ValueError, match=f"layer 'conv2' of `model` predicts by {difference}.*, and mmcv and .* by another conv"
    ):
        convert_state_dict(state, **{keyword: "mmcv"}, model=model)


def test_a_predictor_without_a_weight():
    model = ours(Geometry())
    model.conv2.offset_conv.weight = None
    with pytest.raises(ValueError, match="predicts by a OffsetPredictor with no weight, and mmcv"):
        convert_state_dict(model.state_dict(), to="mmcv", model=model)


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", nn.Identity())


def normed(layer):
    weight_norm(layer)


def normed_predictor(layer):
    weight_norm(layer.offset_conv)


def pruned(layer):
    from torch.nn.utils import prune

    prune.identity(layer, "bias")


@pytest.mark.parametrize("keyword", ["source", "to"])
@pytest.mark.parametrize("change", [parametrized, normed, normed_predictor, pruned])
@every_source
def test_computed_parameters(change, source, keyword):
    model = of(source)
    change(model.conv2)
    state = model.state_dict() if keyword == "to" else theirs(source).state_dict()
    parameter = "bias" if change is pruned else "weight"
    with pytest.raises(
        ValueError, match=f"layer 'conv2' of `model` has a {parameter} that is computed from other parameters; exp"
    ):
        convert_state_dict(state, **{keyword: source}, model=model)


def test_a_deleted_bias():
    model = ours(Geometry())
    del model.conv2.bias
    assert "conv2.bias" not in convert_state_dict(model.state_dict(), to="mmcv", model=model)
    result = convert_state_dict(theirs("mmcv").state_dict(), source="mmcv", model=model)
    assert "conv2.bias" in result  # of which load_state_dict tells


@every_source
@pytest.mark.parametrize("kind", [DeformConv1d, DeformConv3d])
@pytest.mark.parametrize("predict_offsets", [True, False])
def test_layers_over_one_axis_and_three(kind, source, predict_offsets):
    model = Block(kind(4, 8, 3, predict_offsets=predict_offsets))
    own = model.state_dict()
    if source == "deformconv":
        assert_same(convert_state_dict(own, to=source, model=model), own)
        assert_same(convert_state_dict(own, source=source, model=model), own)
        return
    text = (
        f"layer 'conv2' of `model` is a {kind.__name__}; expected a DeformConv2d, since {LAYOUTS[source].library} has 2 spatial"
    )
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        convert_state_dict(own, to=source, model=model)
    other = Block(DeformConv2d(4, 8, 3, predict_offsets=predict_offsets))
    other.conv2.boundary = LAYOUTS[source].boundaries[True]
    there = other.state_dict()
    if predict_offsets:
        there = theirs(source).state_dict()
    elif source == "mxnet_symbol":
        there = {f"arg:{name.replace('.', '_')}": tensor for name, tensor in there.items()}
    with pytest.raises(ValueError, match="spatial axes only"):
        convert_state_dict(there, source=source, model=model)


@pytest.mark.parametrize(
    "keywords, text",
    [
        (
            {"max_offset": 2.0},
            "bounds its offsets, max_offset=2, and mmcv and mmdetection from 2.0 on does not. Build it without",
        ),
        ({"padding_mode": "reflect"}, "has padding_mode='reflect'; expected 'zeros', which is all that mmcv and mmdetection"),
        (
            {"padding": ((1, 0), (1, 1))},
            r"has padding=\(\(1, 0\), \(1, 1\)\), of two widths along an axis; mmcv .* pads both sides",
        ),
        (
            {"boundary": "inside"},
            "has boundary='inside', and mmcv and mmdetection from 2.0 on computes v2 with 'zeros': outputs at",
        ),
    ],
)
def test_what_other_libraries_cannot(keywords, text):
    model = Block(DeformConv2d(CHANNELS, 8, 3, **{"padding": 1, **keywords}))
    for keyword, state in (("to", model.state_dict()), ("source", theirs("mmcv").state_dict())):
        with pytest.raises(ValueError, match=f"^layer 'conv2' of `model` {text}"):
            convert_state_dict(state, **{keyword: "mmcv"}, model=model)
    if "boundary" not in keywords:  # which is not torchvision's
        copied = to_torchvision(model)
        there = convert_state_dict(model.state_dict(), to="torchvision", model=model)
        assert_same(dict(sorted(there.items())), dict(sorted(copied.state_dict().items())))


def test_charlesshangs_layer_has_no_dilation():
    model = DeformConv2d(4, 8, 3, padding=2, dilation=2)
    with pytest.raises(
        ValueError, match=r"^`model` has dilation=\(2, 2\); expected 1, since CharlesShang's DCNv2 and CenterNet's"
    ):
        convert_state_dict(model.state_dict(), to="dcnv2", model=model)


POOLS = {  # by source: what a pool must be
    "mmcv": {"trunk": "separate", "convention": "aligned", "mask_scale": 1.0},
    "mmdet1": {"trunk": "separate", "convention": "rounded", "mask_scale": 1.0},
    "dcnv2": {"trunk": "shared", "convention": "rounded", "mask_scale": 1.0},
    "torchvision": {},
    "deformconv": {},
}


def pool_of(**keywords):
    return nn.ModuleDict({"pool": DeformRoIPool(2, 2, hidden=3, **keywords)})


@pytest.mark.parametrize("source", POOLS)
def test_pools(source):
    model = pool_of(**POOLS[source])
    own = model.state_dict()
    there = convert_state_dict(own, to=source, model=model)
    names = ("offset_mask_fc",) if POOLS[source].get("trunk", "shared") == "shared" else ("offset_fc", "mask_fc")
    assert all(name.split(".")[1] in names for name in there) and len(there) in (6, 10)
    assert_same(convert_state_dict(there, source=source, model=model), own)
    if POOLS[source]:
        one = pool_of(modulated=False, convention=POOLS[source]["convention"])
        assert_same(convert_state_dict(one.state_dict(), to=source, model=one), one.state_dict())
        assert_same(convert_state_dict(dict(one.state_dict()), source=source, model=one), one.state_dict())


@pytest.mark.parametrize("keyword", ["source", "to"])
@pytest.mark.parametrize(
    "source, wrong, text",
    [
        (
            "mmcv",
            {"trunk": "shared"},
            "predicts with trunk='shared' and mmcv .* with 'separate'; neither gives the other. Build",
        ),
        (
            "mmcv",
            {"convention": "rounded"},
            "pools by convention='rounded' and mmcv .* by 'aligned': other numbers. Build it with",
        ),
        ("mmdet1", {"convention": "aligned"}, "pools by convention='aligned' and mmdetection 1 by 'rounded'"),
        ("dcnv2", {"trunk": "separate"}, "predicts with trunk='separate' and CharlesShang.* with 'shared'"),
        (
            "dcnv2",
            {"mask_scale": 2.0},
            r"has masks of 2\*sigmoid and CharlesShang.* of 1\*sigmoid, and no weight that could make",
        ),
    ],
)
def test_pools_that_compute_something_else(source, wrong, text, keyword):
    model = pool_of(**{**POOLS[source], **wrong})
    with pytest.raises(ValueError, match=f"layer 'pool' of `model` {text}"):
        convert_state_dict(model.state_dict(), **{keyword: source}, model=model)
    with pytest.raises(ValueError, match=r"^`model` "):
        convert_state_dict(model["pool"].state_dict(), **{keyword: source}, model=model["pool"])
    plain = {"stem.weight": torch.rand(2)}  # a file without the pool's keys is none of the pool's business
    assert list(convert_state_dict(plain, source=source, model=model)) == ["stem.weight"]


@pytest.mark.parametrize("source", sorted(set(SOURCES) - set(POOLS)))
def test_libraries_without_such_pools(source):
    model = pool_of()
    with pytest.raises(
        ValueError, match=r"layer 'pool' of `model` is a DeformRoIPool; .* has no pooling of boxes that predicts its"
    ):
        convert_state_dict(model.state_dict(), to=source, model=model)


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"deformconv"}))
def test_what_is_ours_already(source):
    for made in (ours(Geometry()).state_dict(), dict(ours(Geometry()).state_dict())):
        with pytest.raises(
            ValueError, match="`state` has layer 'conv2' by the names of this library already, and nothing says"
        ):
            convert_state_dict(made, source=source, model=of(source))


@every_source
@pytest.mark.parametrize("source_of_state", SOURCES)
def test_the_wrong_source(source_of_state, source):
    """A state_dict by another library's names is never taken for one without deformable layers."""
    state = theirs(source_of_state).state_dict()
    same = {"mmdet1": "detectron2", "mmcv": "basicsr"}  # one library's names are the other's
    if source == source_of_state or {(source, source_of_state), (source_of_state, source)} & set(same.items()):
        convert_state_dict(state, source=source, model=of(source))
        return
    with pytest.raises(ValueError) as error:
        convert_state_dict(state, source=source, model=of(source))
    if source_of_state == "deformconv":
        assert "if this library wrote them, pass source='deformconv'." in str(error.value)
    else:
        assert str(error.value).startswith("`state` has layer 'conv2' by the names of ")
        assert f"and source is {source!r}; expected source=" in str(error.value)
        assert repr(source_of_state) in str(error.value).partition("expected")[2]


def test_the_wrong_source_of_a_layer_that_is_the_model():
    layer = ours(Geometry()).conv2
    with pytest.raises(
        ValueError, match=r"^`state` has its layer by the names of PaddleDetection, and source is 'mmcv'; expected"
    ):
        convert_state_dict(theirs("paddle").conv2.state_dict(), source="mmcv", model=layer)


def test_half_of_a_file_renamed_by_hand():
    """Its masks would be twice as large, and the layer's record would say that all is well."""
    model = nn.Sequential(ours(Geometry()), ours(Geometry()))
    state = convert_state_dict(model.state_dict(), to="mmcv", model=model)
    half = {name.replace("1.conv2.conv_offset", "1.conv2.offset_conv"): tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match=r"`state` has layer '1.conv2' by the names of this library already"):
        convert_state_dict(half, source="mmcv", model=model)
    mixed = {name.replace("1.conv2.conv_offset", "1.conv2_offset"): tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match=r"layer '1.conv2' by the names of mmdetection 1 or detectron2, and source is 'mmcv'"):
        convert_state_dict(mixed, source="mmcv", model=model)


def test_a_name_twice():
    state = theirs("mmcv").state_dict()
    state["conv2.offset_conv.weight"] = state["conv2.conv_offset.weight"]
    with pytest.raises(
        ValueError, match=r"`state` has two tensors for 'conv2.offset_conv.weight' of the model, one of them 'conv2."
    ):
        convert_state_dict(state, source="mmcv", model=ours(Geometry()))


def test_two_names_that_are_one_there():
    model = nn.Module()
    model.a_b, model.a = nn.Conv2d(1, 1, 1), nn.ModuleDict({"b": nn.Conv2d(1, 1, 1)})
    for keyword in ("source", "to"):
        with pytest.raises(
            ValueError, match=r"'a_b.weight' and 'a.b.weight' of `model` are both 'arg:a_b_weight' by the names of MXN"
        ):
            convert_state_dict(model.state_dict(), **{keyword: "mxnet_symbol"}, model=model)
    block = ours(Geometry())
    block.conv2_offset = nn.Conv2d(CHANNELS, 27, 3)
    with pytest.raises(
        ValueError, match=r"are both 'conv2_offset.weight' by the names of detectron2; expected two names. Call one"
    ):
        convert_state_dict(block.state_dict(), to="detectron2", model=block)


def test_half_of_a_layer():
    model = ours(Geometry())
    for source in ("mmcv", "mxnet", "mxnet_symbol", "paddle"):
        there = convert_state_dict(model.state_dict(), to=source, model=of(source))
        main = next(name for name in there if name.endswith("weight") and "offset" not in name)
        del there[main]
        with pytest.raises(
            ValueError, match=r"^`state` has 'conv2.offset_conv.weight', by this library's name, and not 'conv2.weight"
        ):
            convert_state_dict(there, source=source, model=of(source))
    own = model.state_dict()
    for missing, there in (("weight", "offset_conv.weight"), ("offset_conv.weight", "weight")):
        state = {name: tensor for name, tensor in own.items() if name != f"conv2.{missing}"}
        with pytest.raises(
            ValueError, match=f"`state` has 'conv2.{there}', by this library's name, and not 'conv2.{missing}'; exp"
        ):
            convert_state_dict(state, to="mmcv", model=model)
    # A part of a state_dict, of other layers, is a state_dict.
    net = nn.Sequential(nn.Conv2d(1, 1, 1), model)
    part = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("0.")}
    assert list(convert_state_dict(part, to="mmcv", model=net)) == ["0.weight", "0.bias"]


@every_source
def test_a_predictor_without_bias(source):
    there = theirs(source)
    state = there.state_dict()
    (key,) = (name for name in state if "offset" in name and name.endswith("bias"))
    state[key] = torch.zeros_like(state[key])
    model = of(source).double()
    expected = convert_state_dict(state, source=source, model=model)
    without = {name: tensor for name, tensor in state.items() if name != key}
    result = convert_state_dict(without, source=source, model=model)
    assert_same(dict(sorted(result.items())), dict(sorted(expected.items())))
    assert result["conv2.offset_conv.bias"].dtype == torch.float64


@pytest.mark.parametrize("source", ["mmcv", "mxnet", "deformconv"])
def test_tensors_of_other_shapes(source):
    def changed(end, tensor):
        state = theirs(source).state_dict()
        (key,) = (name for name in state if "offset" in name and name.endswith(end))
        return {**state, key: tensor}

    model = of(source)
    with pytest.raises(
        ShapeError, match=r"^'conv2.offset_conv.weight' has shape \(27, 4, 3\); expected 4 axes, a convolution's w"
    ):
        convert_state_dict(changed("weight", torch.rand(27, 4, 3)), source=source, model=model)
    with pytest.raises(ShapeError, match=r"has shape \(\); expected 4 axes"):
        convert_state_dict(changed("weight", torch.rand(())), source=source, model=model)
    with pytest.raises(ShapeError, match=r"has 0 channels in `state`; expected 27"):
        convert_state_dict(changed("weight", torch.rand(0, 4, 3, 3)), source=source, model=model)
    for bias in (torch.rand(()), torch.rand(26), torch.rand(1, 27)):
        with pytest.raises(
            ShapeError, match=r"^'conv2.offset_conv.bias' has shape \(.*\); expected \(27,\), the predictor's chan"
        ):
            convert_state_dict(changed("bias", bias), source=source, model=model)
    # Of sizes that a load compares, it tells itself.
    with pytest.raises(RuntimeError, match=r"size mismatch for conv2.offset_conv.weight"):
        state = changed("weight", torch.rand(27, 4, 1, 1))
        model.load_state_dict(convert_state_dict(state, source=source, model=model))


def test_gluons_groups_that_do_not_fit():
    state = theirs("mxnet", Geometry(groups=2)).state_dict()
    state["conv2.offset_weight"] = torch.rand(27, 3, 3, 3)
    with pytest.raises(
        ShapeError, match=r"'conv2.offset_conv.weight' has shape \(27, 3, 3, 3\), so each predicted channel reads 3"
    ):
        convert_state_dict(state, source="mxnet", model=ours(Geometry(groups=2)))
    model = filled(ours(Geometry(groups=2)))
    with pytest.raises(
        ValueError, match=r"predictor has 27 channels, which groups=2 does not divide.* or to='mxnet_symbol', it has"
    ):
        convert_state_dict(model.state_dict(), to="mxnet", model=model)
    model = filled(ours(Geometry(groups=2, offset_groups=2)))
    with pytest.raises(ValueError, match="reads across the convolution's 2 groups; in MXNet's block it has as many"):
        convert_state_dict(model.state_dict(), to="mxnet", model=model)
    convert_state_dict(model.state_dict(), to="mxnet_symbol", model=model)


@pytest.mark.parametrize("keyword", ["source", "to"])
@pytest.mark.parametrize(
    "value, dtype",
    [(6e-8, torch.float16), (65504.0, torch.float16), (1e-45, torch.float32), (5e-324, torch.float64)],
)
def test_numbers_that_have_no_half_or_no_double(value, dtype, keyword):
    """The masks' factor is never rounded away; NaN and infinity stay what they are."""
    model = ours(Geometry(), mask_scale=2.0 if (value > 1) == (keyword == "to") else 0.5).to(dtype)
    state = model.state_dict() if keyword == "to" else theirs("mmcv", dtype=dtype).state_dict()
    weight = torch.full_like(state["conv2.weight"], 0.25)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    weight[0, 0, 0, 0], weight[1, :, 0, 0] = 0.5, odd
    state["conv2.weight"] = weight
    result = convert_state_dict(state, **{keyword: "mmcv"}, model=model)["conv2.weight"]
    assert torch.equal(result[1, :, 0, 0].nan_to_num(7.0), odd.to(dtype).nan_to_num(7.0)) and result[1, 3, 0, 0].signbit()
    assert result[0, 0, 0, 0] == (1.0 if value > 1 else 0.25)
    weight[0, 0, 0, 0] = value
    factor = "2" if value > 1 else "0.5"
    text = rf"^'conv2.weight' times {factor}, which makes up for .* masks, is rounded in {dtype}, and would not come back as"
    with pytest.raises(
        ValueError, match=text + " it was. Convert it in a wider float type, or build the model's layers with mask_scale=1,"
    ):
        convert_state_dict(state, **{keyword: "mmcv"}, model=model)
    if dtype != torch.float64:
        wide = {name: tensor.double() for name, tensor in state.items()}
        result = convert_state_dict(wide, **{keyword: "mmcv"}, model=model)["conv2.weight"]
        assert result[0, 0, 0, 0].item() == float(factor) * weight[0, 0, 0, 0].item()


def test_masks_of_odd_scales():
    model = ours(Geometry(), mask_scale=1.5)
    with pytest.raises(ValueError, match=r"'conv2.weight' times 0.666667, .* is rounded in torch.float32"):
        convert_state_dict(theirs("mmcv", dtype=torch.float32).state_dict(), source="mmcv", model=model)


def test_integers_are_no_weights():
    model = ours(Geometry())
    state = theirs("mmcv").state_dict()
    state["conv2.weight"] = torch.ones(8, 4, 3, 3, dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"'conv2.weight' is torch.int8; expected a float type, since it makes up for the masks of"
    ):
        convert_state_dict(state, source="mmcv", model=model)
    result = convert_state_dict(state, source="mmcv", model=ours(Geometry(), mask_scale=1.0))
    assert result["conv2.weight"] is state["conv2.weight"]


@every_source
def test_arrays(source):
    """NumPy's, read-only, of another byte order, and numbers; the result has memory of its own."""
    state = theirs(source, dtype=torch.float32).state_dict()
    arrays = {name: tensor.numpy().copy() for name, tensor in state.items()}
    for number, array in enumerate(arrays.values()):
        array.setflags(write=False)
        if number % 2:
            array = array.astype(array.dtype.newbyteorder(">"))
    swapped = {name: array.astype(">f4") for name, array in arrays.items()}
    model = of(source)
    for given in (arrays, swapped):
        result = convert_state_dict({**given, "step": np.int64(3)}, source=source, model=model)
        assert result.pop("step").item() == 3
        assert_same(result, convert_state_dict(state, source=source, model=model))
        for tensor in result.values():
            tensor.fill_(7.0)
    assert not any((array == 7).any() for array in arrays.values())


@every_source
def test_parameters_are_tensors(source):
    """As `dict(model.named_parameters())` has them; what is computed from them asks for no gradient."""
    there, model = theirs(source), of(source)
    result = convert_state_dict(dict(there.named_parameters()), source=source, model=model)
    assert_same(result, convert_state_dict(there.state_dict(), source=source, model=model))
    assert all(tensor.is_leaf for tensor in result.values())
    back = convert_state_dict(dict(model.named_parameters()), to=source, model=model)
    assert_same(back, convert_state_dict(model.state_dict(), to=source, model=model))


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = ours(Geometry())
    result = convert_state_dict(theirs("mmcv").state_dict(), source="mmcv", model=model)
    model.load_state_dict(result, assign=True)
    assert_equal_outputs(model, theirs("mmcv"), "mmcv", Geometry())


def test_what_is_no_state_dict(tmp_path):
    model, state = ours(Geometry()), theirs("mmcv").state_dict()
    for wrong, name in (
        (theirs("mmcv"), "Block"),
        ("model.pth", "str"),
        (tmp_path, "PosixPath"),
        (None, "NoneType"),
        ([], "list"),
    ):
        with pytest.raises(
            TypeError, match=rf"^`state` is a {name}; expected names and tensors, as load_checkpoint\(path\) or mod"
        ):
            convert_state_dict(wrong, source="mmcv", model=model)
    checkpoint = {"state_dict": state, "epoch": 3}
    with pytest.raises(
        TypeError, match=r"^`state` has a OrderedDict under 'state_dict'; expected a tensor under every name. A train"
    ):
        convert_state_dict(checkpoint, source="mmcv", model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    with pytest.raises(TypeError, match="`state` has a dict under 'state'; expected a tensor"):
        convert_state_dict(optimizer, source="mmcv", model=model)
    for wrong, name in (
        (None, "NoneType"),
        (3, "int"),
        ([1.0], "list"),
        (np.array(["x"]), "ndarray"),
        (np.array([None]), "ndarray"),
    ):
        with pytest.raises(TypeError, match=f"`state` has a {name} under 'conv2.x'; expected a tensor"):
            convert_state_dict({**state, "conv2.x": wrong}, source="mmcv", model=model)
    with pytest.raises(TypeError, match="`state` has a Tensor under 3; expected a tensor under every name"):
        convert_state_dict({3: torch.rand(1)}, source="mmcv", model=model)
    with pytest.raises(
        ValueError, match=r"`state` has a tensor on the meta device under 'conv2.weight', without numbers; expected on"
    ):
        convert_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, source="mmcv", model=model)
    with pytest.raises(TypeError, match=r"`model` is a builtins.str; expected a torch.nn.Module"):
        convert_state_dict(state, source="mmcv", model="resnet50")


def test_neither_both_and_wrong_words():
    model = ours(Geometry())
    state = model.state_dict()
    with pytest.raises(
        ValueError, match=r"^neither of `source` and `to` is given; expected one: whose `state` is, or whose it is to"
    ):
        convert_state_dict(state, model=model)
    with pytest.raises(ValueError, match=r"^both of `source` and `to` is given"):
        convert_state_dict(state, model=model, source="mmcv", to="mmcv")
    for word in ("mmdet", "Detectron2", "centernet", "", 3, ["mmcv"]):
        for keyword in ("source", "to"):
            with pytest.raises(ValueError) as error:
                convert_state_dict(state, model=model, **{keyword: word})
            assert str(error.value) == f"`{keyword}` is {word!r}; expected one of {', '.join(map(repr, SOURCES))}."


def test_a_state_that_is_not_the_models():
    model = ours(Geometry())
    text = "`state` has none of the model's 4 tensors, as 'conv2.weight'; expected model.state_dict"
    for wrong in ({}, theirs("mmcv").conv2.state_dict()):
        with pytest.raises(ValueError, match=text):
            convert_state_dict(wrong, to="mmcv", model=model)
    other = ours(Geometry(), mask_scale=1.0)
    with pytest.raises(
        ValueError, match="layer 'conv2' of `model` has mask_scale=2, and `state` is of one with 1; expected the sta"
    ):
        convert_state_dict(other.state_dict(), to="mmcv", model=model)
    with pytest.raises(ValueError, match=r"by this library's name, and not 'conv2.offset_conv.weight'"):
        convert_state_dict(theirs("mmcv").state_dict(), to="mmcv", model=model)


@every_source
def test_nothing_at_all(source):
    assert list(convert_state_dict({}, source=source, model=of(source))) == []
    for keyword in ("source", "to"):
        assert list(convert_state_dict({}, **{keyword: source}, model=nn.ReLU())) == []
    # A model without deformable layers takes a file for what it is, and load_state_dict tells of the rest.
    state = theirs(source).state_dict()
    assert_same(convert_state_dict(state, source=source, model=nn.ReLU()), state)


def test_replace_layers_agrees():
    """mmcv's layers, replaced in a net, and its state_dict, converted, compute the same."""
    layers = pytest.importorskip("torchvision").ops
    there = nn.Sequential(filled(layers.DeformConv2d(CHANNELS, 8, 3, padding=1)))
    converted = nn.Sequential(DeformConv2d(CHANNELS, 8, 3, padding=1, predict_offsets=False))
    converted.load_state_dict(convert_state_dict(there.state_dict(), source="torchvision", model=converted))
    predicting = filled(to_torchvision(ours(Geometry(offset_groups=2))))
    here = ours(Geometry(offset_groups=2))
    here.load_state_dict(convert_state_dict(predicting.state_dict(), source="torchvision", model=here))
    replaced = replace_layers(copy.deepcopy(predicting))
    assert type(replaced.conv2) is DeformConv2d
    assert_same(replaced.state_dict(), here.state_dict())
    assert_same(replace_layers(there).state_dict(), converted.state_dict())


@pytest.mark.parametrize("source", ["mxnet", "mxnet_symbol"])
@pytest.mark.parametrize("geometry", [Geometry(), Geometry(False, groups=2, offset_groups=2, bias=False)], ids=["v2", "v1"])
def test_layer_from_mxnet_agrees(source, geometry):
    state = theirs(source, geometry, torch.float32).state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    layer = layer_from_mxnet(arrays, "conv2", padding=1, groups=geometry.groups, modulated=geometry.modulated)
    model = of(source, geometry)
    model.load_state_dict(convert_state_dict(state, source=source, model=model))
    assert_same(layer.state_dict(), model.conv2.state_dict())
    style = "gluon" if source == "mxnet" else "symbol"
    back = convert_state_dict(model.state_dict(), to=source, model=model)
    older = layer_to_mxnet(layer, "conv2", style=style)
    assert [name.removeprefix("arg:") for name in back] == list(older)
    for tensor, array in zip(back.values(), older.values(), strict=True):
        assert np.array_equal(tensor.numpy(), array)
