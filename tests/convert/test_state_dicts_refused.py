"""State_dicts and models that cannot be converted, each with the sentence that says why and what to do."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.convert.libraries import (  # noqa: E402
    CHANNELS,
    NO_V1_WITH_BIAS,
    POOLS,
    SOURCES,
    V1,
    Block,
    Compiled,
    Geometry,
    Pack,
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
from torch.nn.utils import parametrize, prune  # noqa: E402
from torch.nn.utils.parametrizations import weight_norm  # noqa: E402

from deformconv import ShapeError  # noqa: E402
from deformconv.convert import (  # noqa: E402
    convert_state_dict,
    to_torchvision,
)
from deformconv.convert.layouts import LAYOUTS  # noqa: E402
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d  # noqa: E402

every_source = pytest.mark.parametrize("source", SOURCES)


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


def test_layers_that_are_passed_their_offsets_are_looked_at():
    model = Block(DeformConv2d(4, 8, 3, predict_offsets=False, boundary="inside"))
    with pytest.raises(ValueError, match="layer 'conv2' of `model` has boundary='inside', and CharlesShang"):
        convert_state_dict(model.state_dict(), source="dcnv2", model=model)


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


def test_biases_that_a_library_has_not_or_always():
    """They would be lost on the way: mmdetection, for one, loads what fits and logs the rest."""
    model = ours(Geometry(modulated=False))
    for to in sorted(NO_V1_WITH_BIAS):
        with pytest.raises(
            ValueError, match=f"^layer 'conv2' of `model` has a bias, and v1 of {LAYOUTS[to].library} never has one"
        ):
            convert_state_dict(model.state_dict(), to=to, model=model)
    model = ours(Geometry(bias=False))
    with pytest.raises(
        ValueError, match=r"has no bias, and v2 of CharlesShang's DCNv2 and CenterNet always has one. Build it with"
    ):
        convert_state_dict(model.state_dict(), to="dcnv2", model=model)


def test_wrapped_gluon_with_kinds_before_names():
    model = Compiled(ours(Geometry()))
    state = {f"arg:{name}": tensor for name, tensor in theirs("mxnet").state_dict().items()}
    with pytest.raises(
        ValueError, match=r"`state` has 'arg:conv2.offset_weight', and for `model` that would be '_orig_mod.conv2.off"
    ):
        convert_state_dict(state, source="mxnet", model=model)
