"""State_dicts of other libraries become ours and go back, with those libraries' layers as the measure."""

from __future__ import annotations

import copy
import doctest
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.convert.libraries import (  # noqa: E402
    CHANNELS,
    MATCHED,
    NO_V1_WITH_BIAS,
    POOLS,
    SOURCES,
    V1,
    Block,
    Compiled,
    Geometry,
    assert_equal_outputs,
    assert_same,
    filled,
    inputs,
    of,
    ours,
    pool_of,
    theirs,
)
from torch import nn  # noqa: E402

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
from deformconv.torch import DeformConv2d  # noqa: E402

every_source = pytest.mark.parametrize("source", SOURCES)
# What each library's layers can be; all of them stride and pad.
GROUPS = {"mmcv", "mmdet1", "detectron2", "basicsr", "paddle", "mxnet", "mxnet_symbol", "torchvision", "deformconv"}
OFFSET_GROUPS = set(SOURCES) - {"paddle"}
DILATION = set(SOURCES) - {"dcnv2", "paddle"}  # Paddle's is tested apart
NO_BIAS = set(SOURCES) - {"dcnv2"}

GEOMETRIES = (
    Geometry(),
    Geometry(stride=2),
    Geometry(bias=False, padding=2),
    Geometry(offset_groups=4),
    Geometry(dilation=2, padding=2, bias=False),
    Geometry(groups=2, offset_groups=2, stride=2, dilation=2),
    Geometry(modulated=False),
    Geometry(modulated=False, offset_groups=2, groups=2, bias=False),
    Geometry(modulated=False, dilation=2, stride=2, bias=False),
)


def can(source: str, g: Geometry) -> bool:
    return (
        (g.modulated or source in V1)
        and (g.groups == 1 or source in GROUPS)
        and (g.offset_groups == 1 or source in OFFSET_GROUPS)
        and (g.dilation == 1 or source in DILATION)
        and (g.bias or source in NO_BIAS)
        and (g.modulated or not g.bias or source not in NO_V1_WITH_BIAS)
        and (g.padding == 1 or source != "paddle")  # whose predictor pads so that the size stays
    )


CASES = [(source, geometry) for source in SOURCES for geometry in GEOMETRIES if can(source, geometry)]
every_case = pytest.mark.parametrize(
    "source, geometry", CASES, ids=[f"{source}-{GEOMETRIES.index(geometry)}" for source, geometry in CASES]
)


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


def test_the_obvious_rename_is_wrong_by_a_factor_of_two():
    """Masks of mean 1.3 for 0.66, and outputs twice as large, which is warned of; the conversion is right."""
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


@pytest.mark.slow
def test_names_of_a_compiled_model():
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    assert list(torch.compile(net).state_dict()) == list(Compiled(net).state_dict())


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


def test_a_layer_that_stands_at_two_places():
    layer = filled(ours(Geometry())).conv2
    model = nn.ModuleDict({"first": layer, "second": layer})
    there = convert_state_dict(model.state_dict(), to="detectron2", model=model)
    assert list(there)[2:6] == ["first_offset.weight", "first_offset.bias", "second.weight", "second.bias"]
    assert torch.equal(there["first.weight"], there["second.weight"])
    assert torch.equal(there["first.weight"], layer.weight * 2)
    assert_same(convert_state_dict(there, source="detectron2", model=model), model.state_dict())


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


def test_a_deleted_bias():
    model = ours(Geometry())
    del model.conv2.bias
    assert "conv2.bias" not in convert_state_dict(model.state_dict(), to="mmcv", model=model)
    result = convert_state_dict(theirs("mmcv").state_dict(), source="mmcv", model=model)
    assert "conv2.bias" in result  # of which load_state_dict tells


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


def test_a_matrix_of_another_shape_is_left_to_the_load():
    model = nn.Linear(3, 2)
    state = {"weight": torch.rand(2, 3, 1), "bias": torch.rand(2)}
    assert convert_state_dict(state, source="paddle", model=model)["weight"] is state["weight"]


def test_names_of_a_file_that_are_in_no_layer():
    """A name without points is nobody's but its own."""
    for source in ("mxnet", "mxnet_symbol", "paddle"):
        state = {**theirs(source).state_dict(), "step": torch.rand(1), "conv2.x": torch.rand(1)}
        assert list(convert_state_dict(state, source=source, model=of(source)))[-2:] == ["step", "conv2.x"]
    state = {**theirs("paddle", Geometry(bias=False)).state_dict(), "conv2.conv_dcn.bias": torch.rand(8)}
    assert "conv2.bias" in convert_state_dict(state, source="paddle", model=ours(Geometry(bias=False)))
