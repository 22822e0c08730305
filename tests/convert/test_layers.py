"""Layers of other libraries, replaced: the same parameters, the same outputs."""

from __future__ import annotations

import copy
import doctest
import gc
import sys
import types
from functools import partial

import pytest

torch = pytest.importorskip("torch")

import torchvision  # noqa: E402
from tests.tolerances import assert_close  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from deformconv.convert import layers, replace_layers  # noqa: E402
from deformconv.convert.layers import as_ours, predictor_of  # noqa: E402
from deformconv.torch import DeformConv2d  # noqa: E402


def test_doctests():
    result = doctest.testmod(layers)
    assert result.failed == 0
    assert result.attempted > 5


class Net(nn.Module):
    """Predicts offsets for torchvision's layer, as its documentation does."""

    def __init__(self, offset_groups, masked, **how):
        super().__init__()
        self.masked = masked
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.predict = nn.Conv2d(4, offset_groups * 9 * (3 if masked else 2), 3, padding=1)
        self.deform = torchvision.ops.DeformConv2d(4, 6, 3, padding=1, **how)
        self.again = self.deform if how.get("groups", 1) == 1 else None

    def forward(self, x):
        x = self.stem(x)
        raw = self.predict(x)
        if not self.masked:
            return self.deform(x, raw)
        offset, mask = raw.tensor_split([raw.shape[1] * 2 // 3], 1)
        return self.deform(x, offset, mask.sigmoid())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset_groups", [1, 2])
@pytest.mark.parametrize("how", [{}, {"groups": 2, "bias": False}])
def test_torchvision(how, offset_groups, masked):
    torch.manual_seed(0)
    net = Net(offset_groups, masked, **how).double()
    x = torch.rand(2, 3, 7, 6).double()
    expected, state = net(x), copy.deepcopy(net.state_dict())
    parameters = list(net.parameters())
    assert replace_layers(net) is net
    assert type(net.deform) is DeformConv2d
    assert net.again is (net.deform if "groups" not in how else None)
    assert_close(net(x).detach(), expected.detach(), "float64")
    assert all(ours is theirs for ours, theirs in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state)


def test_hooks_and_modes_stay():
    net = nn.Sequential(torchvision.ops.DeformConv2d(2, 3, 1)).eval()
    net[0].weight.requires_grad_(False)
    seen = []
    net[0].register_forward_hook(lambda *arguments: seen.append(1))
    replace_layers(net)
    assert not net[0].training
    assert not net[0].weight.requires_grad
    net[0](torch.rand(1, 2, 3, 3), torch.zeros(1, 2, 3, 3))
    assert seen


def test_a_layer_alone_and_other_models():
    assert type(replace_layers(torchvision.ops.DeformConv2d(2, 3, 1))) is DeformConv2d
    net = nn.Sequential(nn.Conv2d(2, 3, 1), DeformConv2d(3, 4, 3))
    before = list(net.modules())
    assert list(replace_layers(net).modules()) == before
    with pytest.raises(TypeError, match=r"`model` is a builtins.dict; expected a torch.nn.Module"):
        replace_layers({})


def test_subclasses_are_left_alone():
    class Doubled(torchvision.ops.DeformConv2d):
        def forward(self, input, offset, mask=None):
            return 2 * super().forward(input, offset, mask)

    net = nn.Sequential(Doubled(2, 3, 1))
    assert type(replace_layers(net)[0]) is Doubled


def offset_groups_of_the_call():
    layer = DeformConv2d(4, 6, 3, predict_offsets=False, offset_groups=None)
    return [layer(torch.rand(1, 4, 5, 5), torch.zeros(1, 18 * groups, 3, 3)).shape for groups in (1, 2)]


def test_offset_groups_of_the_call():
    assert offset_groups_of_the_call() == [(1, 6, 3, 3)] * 2
    with pytest.raises(ValueError, match="`offset_groups` is None; expected a number of groups, since this layer predicts"):
        DeformConv2d(4, 6, 3, offset_groups=None)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("how", [{}, {"bias": True, "stride": 2}])
def test_kornia(mask, how):
    aliked = pytest.importorskip("kornia.feature.aliked.aliked")
    torch.manual_seed(0)
    theirs = aliked.DeformableConv2d(4, 6, mask=mask, **how).double()
    nn.init.normal_(theirs.offset_conv.weight, std=1.0)  # beyond a quarter of the image
    net = nn.Sequential(theirs)
    x = torch.rand(2, 4, 8, 6).double()
    expected = net(x)
    replace_layers(net)
    assert isinstance(net[0], DeformConv2d)
    assert_close(net(x).detach(), expected.detach(), "float64")
    offset, _ = net[0].offsets_and_mask(x)
    assert offset.abs().max() == 2


class _Mmcv(nn.Module):
    """What mmcv's four layers have in common, with its names; computed by torchvision."""

    modulated, packed = False, False

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, deform_groups=1):
        super().__init__()
        pair = nn.modules.utils._pair
        self.kernel_size, self.stride = pair(kernel_size), pair(stride)
        self.padding, self.dilation = pair(padding), pair(dilation)
        self.groups, self.deform_groups = groups, deform_groups
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // groups, *self.kernel_size))
        if self.modulated:
            self.bias = nn.Parameter(torch.randn(out_channels))
        if self.packed:
            channels = deform_groups * (3 if self.modulated else 2) * self.kernel_size[0] * self.kernel_size[1]
            window = self.kernel_size, self.stride, self.padding, self.dilation
            self.conv_offset = nn.Conv2d(in_channels, channels, *window)

    def forward(self, x, offset=None, mask=None):
        if self.packed and self.modulated:
            o1, o2, mask = torch.chunk(self.conv_offset(x), 3, dim=1)
            offset, mask = torch.cat((o1, o2), dim=1), torch.sigmoid(mask)
        elif self.packed:
            offset = self.conv_offset(x)
        bias = self.bias if self.modulated else None
        return torchvision.ops.deform_conv2d(x, offset, self.weight, bias, self.stride, self.padding, self.dilation, mask)


MMCV = {
    "DeformConv2d": ("deform_conv", False, False),
    "DeformConv2dPack": ("deform_conv", False, True),
    "ModulatedDeformConv2d": ("modulated_deform_conv", True, False),
    "ModulatedDeformConv2dPack": ("modulated_deform_conv", True, True),
}


@pytest.mark.parametrize("name", MMCV)
def test_mmcv(name, monkeypatch):
    """mmcv has no wheel for this PyTorch: layers with its names and attributes stand in for its own."""
    file, modulated, packed = MMCV[name]
    kind = type(name, (_Mmcv,), {"modulated": modulated, "packed": packed, "__module__": f"mmcv.ops.{file}"})
    monkeypatch.setitem(sys.modules, f"mmcv.ops.{file}", types.ModuleType(f"mmcv.ops.{file}"))
    torch.manual_seed(0)
    net = nn.ModuleList([kind(4, 6, 3, stride=2, padding=1, groups=2, deform_groups=2)]).double()
    x = torch.rand(2, 4, 9, 8).double()
    inputs = [x] if packed else [x, torch.randn(2, 36, 5, 4).double()]
    inputs += [torch.rand(2, 18, 5, 4).double()] if modulated and not packed else []
    expected, weight = net[0](*inputs), net[0].weight
    replace_layers(net)
    assert type(net[0]) is DeformConv2d
    assert net[0].weight is weight
    assert_close(net[0](*inputs).detach(), expected.detach(), "float64")


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_of_ours_with_anothers_parameters_leaves_that_as_it_was(packed, monkeypatch):
    """For who looks at layers: `as_ours` replaces none."""
    name = f"ModulatedDeformConv2d{'Pack' * packed}"
    kind = type(name, (_Mmcv,), {"modulated": True, "packed": packed, "__module__": "mmcv.ops.modulated_deform_conv"})
    monkeypatch.setitem(sys.modules, "mmcv.ops.modulated_deform_conv", types.ModuleType("mmcv.ops.modulated_deform_conv"))
    theirs = kind(4, 6, 3, padding=1, deform_groups=2)
    seen = []
    for module in theirs.modules():
        of_all_hooks(module, seen)
    parts = dict(theirs.named_modules())
    before = {path: {key: copy.copy(value) for key, value in vars(module).items()} for path, module in parts.items()}
    ours = as_ours(theirs)
    assert type(ours) is DeformConv2d
    assert ours.weight is theirs.weight
    assert predictor_of(theirs) is getattr(theirs, "conv_offset", None)
    assert not packed or ours.offset_conv.weight is theirs.conv_offset.weight
    assert {path: vars(module).keys() for path, module in theirs.named_modules()} == {p: b.keys() for p, b in before.items()}
    theirs.load_state_dict(theirs.state_dict())
    assert {kind for what, kind in (each for each in seen if isinstance(each, tuple))} == {
        type(part) for part in parts.values()
    }
    x, offset, mask = torch.rand(2, 4, 7, 8), torch.randn(2, 36, 7, 8), torch.rand(2, 18, 7, 8)
    assert_close(
        ours(x, offset, mask).detach(),
        torchvision.ops.deform_conv2d(x, offset, theirs.weight, theirs.bias, padding=1, mask=mask).detach(),
        "float32",
    )


def test_as_ours_takes_subclasses_and_computed_weights_and_nothing_else():
    class Subclass(torchvision.ops.DeformConv2d):
        pass

    assert as_ours(nn.Conv2d(3, 3, 3)) is None
    assert as_ours(DeformConv2d(3, 3, 3)) is None
    assert predictor_of(nn.Conv2d(3, 3, 3)) is None
    layer = torch.nn.utils.parametrizations.weight_norm(Subclass(3, 4, 3, stride=2))
    ours = as_ours(layer)
    assert torch.equal(ours.weight, layer.weight)
    assert ours.stride == (2, 2)


def of_all_hooks(module, seen):
    """Every kind of hook there is; the handles."""
    if hasattr(module, "register_state_dict_post_hook"):
        after_state_dict, before_load = module.register_state_dict_post_hook, module.register_load_state_dict_pre_hook
    else:  # PyTorch 2.4 has them under other names
        after_state_dict = module._register_state_dict_hook
        before_load = partial(module._register_load_state_dict_pre_hook, with_module=True)
    register = [
        module.register_forward_hook(lambda module, args, kwargs, output: seen.append("with_kwargs"), with_kwargs=True),
        module.register_forward_hook(lambda *_: seen.append("always"), always_call=True),
        module.register_forward_pre_hook(lambda module, args, kwargs: seen.append("pre"), with_kwargs=True),
        module.register_full_backward_hook(lambda *_: seen.append("backward")),
        module.register_full_backward_pre_hook(lambda *_: seen.append("backward_pre")),
        module.register_state_dict_pre_hook(lambda *_: seen.append("state_dict_pre")),
        after_state_dict(lambda *_: seen.append("state_dict")),
        before_load(lambda module, *_: seen.append(("load_pre", type(module)))),
        module.register_load_state_dict_post_hook(lambda module, _: seen.append(("load", type(module)))),
    ]
    return register


def test_every_kind_of_hook_stays_and_its_handle_removes_it():
    net, seen = nn.Sequential(torchvision.ops.DeformConv2d(2, 3, 1)), []
    handles = of_all_hooks(net[0], seen)
    replace_layers(net)
    gc.collect()

    def use():
        net[0](torch.rand(1, 2, 3, 3, requires_grad=True), torch.zeros(1, 2, 3, 3)).sum().backward()
        net.load_state_dict(net.state_dict())
        found = set(seen)
        seen.clear()
        return found

    assert use() == {
        "with_kwargs", "always", "pre", "backward", "backward_pre", "state_dict_pre", "state_dict",
        ("load_pre", DeformConv2d), ("load", DeformConv2d),
    }  # fmt: skip
    for handle in handles:
        handle.remove()
    assert use() == set()


def test_the_predictors_hooks_stay(monkeypatch):
    kind = type("DeformConv2dPack", (_Mmcv,), {"packed": True, "__module__": "mmcv.ops.deform_conv"})
    monkeypatch.setitem(sys.modules, "mmcv.ops.deform_conv", types.ModuleType("mmcv.ops.deform_conv"))
    net, seen = nn.Sequential(kind(4, 6, 3)), []
    net[0].conv_offset.register_forward_hook(lambda *_: seen.append(1))
    replace_layers(net)(torch.rand(1, 4, 5, 5))
    assert seen == [1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
    ids=["parametrized", "weight_norm", "spectral_norm", "pruned"],
)
def test_computed_weights_are_refused(change):
    net = nn.Sequential(torchvision.ops.DeformConv2d(2, 3, 1), nn.Sequential(torchvision.ops.DeformConv2d(3, 4, 1)))
    change(net[1][0])
    before = list(net.modules())
    rest = (
        "has a weight that is computed from other parameters, by a parametrization, weight_norm, spectral_norm or pruning; "
        "expected a parameter. Remove that first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
        "remove_spectral_norm, prune.remove) and apply it to the new layer."
    )
    for model, name in ((net, "layer '1.0' of `model`"), (net[1][0], "`model`")):
        with pytest.raises(ValueError) as raised:
            replace_layers(model)
        assert str(raised.value) == f"{name} {rest}"
    assert list(net.modules()) == before


def test_a_computed_weight_of_a_predictor_is_refused(monkeypatch):
    kind = type("DeformConv2dPack", (_Mmcv,), {"packed": True, "__module__": "mmcv.ops.deform_conv"})
    monkeypatch.setitem(sys.modules, "mmcv.ops.deform_conv", types.ModuleType("mmcv.ops.deform_conv"))
    net = nn.Sequential(kind(4, 6, 3))
    nn.utils.parametrizations.weight_norm(net[0].conv_offset)
    with pytest.raises(ValueError, match=r"layer '0' of `model` has a conv_offset\.weight that is computed"):
        replace_layers(net)
    # Plain layers beside it may have what they like.
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 1)), torchvision.ops.DeformConv2d(3, 4, 1))
    assert type(replace_layers(net)[1]) is DeformConv2d
