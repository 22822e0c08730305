"""The way out by torchvision: copies that compute the same, compile, and come back."""

from __future__ import annotations

import copy
import doctest
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import torchvision  # noqa: E402
from tests.tolerances import assert_close  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

from deformconv.convert import replace_layers, to_torchvision, torchvision_copy  # noqa: E402
from deformconv.convert.torchvision_modules import PredictingDeformConv2d  # noqa: E402
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d  # noqa: E402

# PyTorch 2.14 calls torch.jit deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

OPTIONS = {
    "v2": {"padding": 1},
    "v1": {"modulated": False, "stride": (2, 1), "dilation": 2, "padding": (2, 1)},
    "groups": {"groups": 2, "offset_groups": 2, "bias": False},
    "pairs": {"padding": ((0, 1), (2, 0)), "mask_scale": 1.5},
    "same": {"padding": "same", "kernel_size": (3, 2), "max_offset": 2.5},
    "bounded v1": {"modulated": False, "max_offset": 0.5, "offset_groups": 4},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": ((1, 0), (0, 2)), "padding_mode": "replicate", "modulated": False},
    "circular": {"padding": (1, 2), "padding_mode": "circular", "groups": 2},
    "nothing to pad": {"padding": 0, "padding_mode": "circular"},
}


def layer_of(how, dtype=torch.float64):
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, **{"kernel_size": 3, **how}).to(dtype)
    for parameter in [] if layer.offset_conv is None else layer.offset_conv.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer, torch.rand(2, 4, 9, 8).to(dtype)


def test_doctests():
    result = doctest.testmod(torchvision_copy)
    assert result.failed == 0
    assert result.attempted > 4


@pytest.mark.parametrize("how", OPTIONS.values(), ids=OPTIONS)
def test_the_same_outputs_as_they_are_scripted_exported_and_back(how):
    layer, x = layer_of(how)
    net = nn.Sequential(nn.Identity(), layer)
    expected = net(x).detach()
    theirs = to_torchvision(net)
    assert type(theirs[1]) is PredictingDeformConv2d
    assert type(theirs[1].deform_conv) is torchvision.ops.DeformConv2d
    assert type(theirs[1].offset_conv) is nn.Conv2d
    assert net[1] is layer
    torch._dynamo.reset()  # PyTorch 2.4 may read what it kept of an earlier module that is gone, and end the process
    exported = torch.export.export(theirs, (x,))
    assert any("torchvision.deform_conv2d" in str(node.target) for node in exported.graph.nodes)
    for found in (theirs(x), torch.jit.script(theirs)(x), exported.module()(x)):
        assert_close(found.detach(), expected, "float64")
    back = replace_layers(theirs)
    assert type(back[1]) is DeformConv2d
    assert list(back.state_dict()) == list(net.state_dict())
    assert torch.equal(back(x), expected)
    if how.get("padding_mode") != "circular" or how["padding"]:
        assert repr(back) == repr(net).replace("padding='same'", "padding=((1, 1), (0, 1))")


def assert_rounded_alike(found, expected):
    """Equal, but where two sums in float32 lie on two sides of a step and are rounded to neighbours."""
    steps = torch.finfo(expected.dtype).eps * expected.abs().float() + 1e-6
    assert ((found.float() - expected.float()).abs() <= steps).all()
    assert (found == expected).float().mean() > 0.99


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["v2", "v1", "pairs"])
def test_half_precision_is_computed_in_float32(name, dtype):
    layer, x = layer_of(OPTIONS[name], dtype)
    theirs = to_torchvision(layer)
    expected = layer(x)
    for found in (theirs(x), torch.jit.script(theirs)(x)):
        assert found.dtype is dtype
        assert_rounded_alike(found, expected)
    assert all(parameter.dtype is dtype for parameter in theirs.parameters())
    back = replace_layers(theirs)
    assert torch.equal(back(x), expected)


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [{}, {"padding": ((0, 1), (2, 0))}, {"offset_groups": None}])
def test_offsets_from_outside(how, dtype):
    layer, x = layer_of({**how, "predict_offsets": False}, dtype)
    theirs = to_torchvision(layer)
    assert isinstance(theirs, PredictingDeformConv2d if "padding" in how else torchvision.ops.DeformConv2d)
    size = (8, 8) if "padding" in how else (7, 6)
    # In half precision they may be float32.
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    offset, mask = torch.randn(2, 18, *size, dtype=wide), torch.rand(2, 9, *size, dtype=wide)
    for passed in ((offset,), (offset, mask)):
        found, expected = torch.jit.script(theirs)(x, *passed), layer(x, *passed)
        assert found.dtype is dtype
        if dtype is torch.float64:
            assert_close(found.detach(), expected.detach(), "float64")
        else:
            assert_rounded_alike(found, expected)
    assert torch.equal(replace_layers(theirs)(x, offset, mask), layer(x, offset, mask))
    if "padding" in how:
        with pytest.raises(TypeError, match="`offset` is missing and this layer predicts none"):
            to_torchvision(layer)(x)


def test_a_predicting_layer_takes_offsets_too():
    layer, x = layer_of({"padding": 1})
    theirs, offset = to_torchvision(layer), torch.randn(2, 18, 9, 8).double()
    assert_close(theirs(x, offset).detach(), layer(x, offset).detach(), "float64")


def test_the_model_stays_as_it_was_and_shares_nothing():
    layer, _ = layer_of({"padding": 1})
    net = nn.Sequential(layer, nn.ReLU()).eval()
    layer.weight.requires_grad_(False)  # but not its bias
    modules, state, random = list(net.modules()), copy.deepcopy(net.state_dict()), torch.random.get_rng_state()
    theirs = to_torchvision(net)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(module.training for module in theirs.modules())
    assert [p.requires_grad for p in theirs.parameters()] == [True, True, False, True]  # predictor, layer
    nn.init.zeros_(theirs[0].deform_conv.weight)
    nn.init.ones_(theirs[0].offset_conv.weight)
    assert list(net.modules()) == modules
    assert all(torch.equal(net.state_dict()[name], state[name]) for name in state)
    assert len(theirs.state_dict()) == len(state)
    assert all(module.training for module in to_torchvision(net.train()).modules())


def test_layers_and_weights_that_are_shared_stay_so():
    first, x = layer_of({"padding": 1})
    second, _ = layer_of({"padding": 1})
    second.weight = first.weight
    plain = nn.Conv2d(4, 6, 3).double()
    plain.weight = first.weight
    net = nn.ModuleDict({"a": first, "again": first, "b": second, "plain": plain})
    theirs = to_torchvision(net)
    assert theirs["a"] is theirs["again"] and theirs["a"] is not theirs["b"]
    assert theirs["a"].deform_conv.weight is theirs["b"].deform_conv.weight is theirs["plain"].weight
    assert theirs["plain"].weight is not first.weight
    assert_close(theirs["b"](x).detach(), second(x).detach(), "float64")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations_are_computed(change, training):
    layer, x = layer_of({"padding": 1})
    change(layer).train(training)
    change(layer.offset_conv)
    state = copy.deepcopy(layer.state_dict())
    theirs = to_torchvision(layer)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert sorted(name for name, _ in theirs.named_parameters()) == [
        "deform_conv.bias", "deform_conv.weight", "offset_conv.bias", "offset_conv.weight",
    ]  # fmt: skip
    assert_close(torch.jit.script(theirs)(x).detach(), layer(x).detach(), "float64")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("change", [nn.utils.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5)])
def test_weights_that_hooks_compute_are_refused(change, within):
    layer, _ = layer_of({})
    change(layer.offset_conv if within else layer)
    text = f"{'the offset_conv of ' * within}layer '0' of `model` has a weight that a hook computes"
    with pytest.raises(ValueError, match=text):
        to_torchvision(nn.Sequential(layer))


class Listening(nn.Module):
    """A net whose layers call a method of its own."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.first, _ = layer_of({"padding": 1})
        self.second = DeformConv2d(6, 4, 1).double()
        self.first.register_forward_hook(self.look)
        self.second.offset_conv.register_forward_hook(self.look)

    def look(self, module, inputs, output):
        self.seen.append(type(module))

    def forward(self, x):
        return self.second(self.first(x))


def test_hooks_are_copied_and_belong_to_the_copy():
    net = Listening()
    theirs = to_torchvision(net)
    theirs(torch.rand(1, 4, 5, 5).double())
    assert theirs.seen == [PredictingDeformConv2d, nn.Conv2d]
    assert net.seen == []
    assert not any(isinstance(module, DeformConv2d) for module in theirs.modules())


def test_a_predictor_that_somebody_made():
    layer, x = layer_of({"padding": 1})
    layer.offset_conv = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 27, 3, padding=1)).double()
    theirs = to_torchvision(layer)
    assert theirs.offset_conv is not layer.offset_conv
    assert_close(torch.jit.script(theirs)(x).detach(), layer(x).detach(), "float64")
    assert torch.equal(replace_layers(theirs)(x), layer(x))
    layer.offset_conv = nn.Conv2d(4, 27, 1).double()  # of another window
    assert torch.equal(replace_layers(to_torchvision(layer))(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (DeformConv1d(2, 3, 3), "is a DeformConv1d; expected a DeformConv2d, since torchvision has 2 spatial axes only"),
        (DeformConv3d(2, 3, 3), "is a DeformConv3d; expected a DeformConv2d, since torchvision has 2 spatial axes only"),
        (DeformConv2d(2, 3, 3, boundary="inside"), 'has boundary="inside"; expected "zeros", which is all that'),
        (type("Own", (DeformConv2d,), {"__module__": "mine"})(2, 3, 3), "is a mine.Own; expected DeformConv2d itself, since"),
    ],
    ids=["1-D", "3-D", "inside", "subclass"],
)
def test_what_torchvision_cannot_do_is_refused(layer, text):
    for model, name in ((nn.Sequential(nn.ReLU(), layer), "layer '1' of `model`"), (layer, "`model`")):
        with pytest.raises(ValueError) as raised:
            to_torchvision(model)
        assert str(raised.value).startswith(f"{name} {text}")


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"`model` is a builtins.dict; expected a torch.nn.Module"):
        to_torchvision({})


def test_torchvision_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match="to_torchvision needs torchvision, which is not installed"):
        to_torchvision(nn.ReLU())


LOADED = """
import sys, torch, torchvision
net = torch.jit.load("net.pt")
x, expected = torch.load("data.pt")
assert (net(x) - expected).abs().max() < 1e-12 * expected.abs().max()
assert "deformconv" not in sys.modules
"""


def test_a_scripted_file_needs_torchvision_alone(tmp_path):
    layer, x = layer_of({"padding": 1})
    torch.jit.script(to_torchvision(layer)).save(tmp_path / "net.pt")
    torch.save((x, layer(x).detach()), tmp_path / "data.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOADED], cwd=tmp_path, check=True)
