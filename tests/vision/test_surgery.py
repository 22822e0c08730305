"""make_deformable: which layers it finds, what stays, and that the net computes what it did."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tolerances import error
from torch import nn

from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d
from deformconv.vision import Replaced, make_deformable

torchvision = pytest.importorskip("torchvision")
models = torchvision.models

pytestmark = [  # PyTorch's own scripts, one of which a test makes
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]  # fmt: skip


def resnet(name: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    return getattr(models, name)().double().eval()


def deformable(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (DeformConv1d, DeformConv2d, DeformConv3d))]


@pytest.mark.parametrize(
    ("name", "recipe", "number"),
    [
        ("resnet18", "resnet:conv3-conv5", 12), ("resnet34", "resnet:conv3-conv5", 26), ("resnet50", "resnet:conv3-conv5", 13),
        ("resnet101", "resnet:conv3-conv5", 30), ("resnext50_32x4d", "resnet:conv3-conv5", 13), ("resnet50", "resnet:conv5", 3),
        ("resnet50", "resnet:conv2-conv5", 16),
    ],
)  # fmt: skip
def test_the_recipe_finds_every_3x3_of_its_stages(name: str, recipe: str, number: int) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
    found = make_deformable(model, recipe)
    assert len(found) == number and [*found] == deformable(model)
    assert repr(found).startswith(f"{number} layers: layer")
    assert all(layer.kernel_size == (3, 3) for layer in map(model.get_submodule, found))


def test_the_recipe_knows_detectron2_s_names() -> None:
    """Stages res2 to res5 in a backbone's `bottom_up`. Its own Conv2d, a subclass with a norm, is refused."""

    class Conv2d(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.norm(super().forward(x))
            return found

    def block() -> nn.Module:
        return nn.ModuleDict({f"conv{n}": nn.Conv2d(4, 4, taps) for n, taps in ((1, 1), (2, 3), (3, 1))})

    def stage(blocks: int) -> nn.Module:
        return nn.Sequential(*(block() for _ in range(blocks)))

    stages = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 7), **{f"res{n}": stage(n - 1) for n in (2, 3, 4, 5)}})
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"fpn_output3": nn.Conv2d(4, 4, 3), "bottom_up": stages})})
    expected = tuple(f"backbone.bottom_up.res{n}.{block}.conv2" for n in (3, 4, 5) for block in range(n - 1))
    assert make_deformable(model, "resnet:conv3-conv5") == expected
    stages["res5"][0]["conv2"] = Conv2d()
    with pytest.raises(ValueError, match=r"layer 'backbone\.bottom_up\.res5\.0\.conv2' of `model` is a .*Conv2d; expected"):
        make_deformable(model, "resnet:conv5")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_the_net_computes_what_it_did(name: str) -> None:
    model, x = resnet(name), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    expected, keys = model(x), model.state_dict()
    make_deformable(model, "resnet:conv3-conv5")
    assert error(model(x).detach().numpy(), expected.detach().numpy()) < 1e-10
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in keys.items())
    assert {key for key in after if key not in keys} == {
        f"{layer}.offset_conv.{part}" for layer in deformable(model) for part in ("weight", "bias")
    }


def test_what_is_not_replaced_stays_bit_for_bit() -> None:
    model, x = resnet("resnet50"), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    names = ("conv1", "layer1.2.conv2", "layer1")
    seen: dict[str, Any] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, given, output, name=name: seen.setdefault(name, output))
    model(x)
    before = dict(seen)
    seen.clear()
    make_deformable(model, "resnet:conv3-conv5")
    model(x)
    assert all(torch.equal(seen[name], before[name]) for name in names)


def test_parameters_flags_mode_and_hooks_stay() -> None:
    model = resnet().train()
    conv = model.layer2[0].conv1
    conv.weight.requires_grad_(False)
    conv.eval()
    calls: list[str] = []
    handle = conv.register_forward_hook(lambda *_: calls.append("seen"))
    weight = conv.weight
    make_deformable(model, ["layer2.0.conv1"], modulated=False, max_offset=4.0)
    layer = model.layer2[0].conv1
    assert layer.weight is weight and not layer.weight.requires_grad and layer.offset_conv.weight.requires_grad
    assert not layer.training and model.training and layer.stride == (2, 2) and not layer.modulated and layer.max_offset == 4.0
    model.eval()(torch.rand(1, 3, 32, 32, dtype=torch.float64))
    handle.remove()
    model(torch.rand(1, 3, 32, 32, dtype=torch.float64))
    assert calls == ["seen"]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 8, (3, 1), padding="same", bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"),
        nn.Conv1d(4, 6, 5, padding="valid"),
        nn.Conv3d(4, 6, 3, padding=1),
    ],
    ids=str,
)
def test_windows_of_every_kind(conv: Any) -> None:
    conv = copy.deepcopy(conv).double()
    net = nn.Sequential(conv, nn.ReLU())
    x = torch.rand(2, 4, *(9,) * (conv.weight.ndim - 2), dtype=torch.float64)
    expected = net(x)
    assert make_deformable(net, "0", offset_groups=2) == ("0",)
    assert error(net(x).detach().numpy(), expected.detach().numpy()) < 1e-10
    net(x).sum().backward()
    assert net[0].offset_conv.weight.grad is not None


def test_dtype_and_device() -> None:
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float32, "meta")):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=dtype, device=device))
        make_deformable(net, "0")
        assert {(p.dtype, p.device.type) for p in net.parameters()} == {(dtype, device)}


def test_no_random_number_is_drawn() -> None:
    net = resnet()
    before = torch.get_rng_state()
    make_deformable(net, "resnet:conv5")
    assert torch.equal(torch.get_rng_state(), before)


def test_patterns_and_names() -> None:
    assert make_deformable(resnet("resnet50"), "layer4.*.conv2") == tuple(f"layer4.{n}.conv2" for n in range(3))
    assert make_deformable(resnet("resnet50"), "layer4.0.*") == ("layer4.0.conv2",)  # the others have one tap
    assert make_deformable(resnet(), {"layer1.0.conv2", "conv1"}) == ("conv1", "layer1.0.conv2")


def test_a_shared_module_is_replaced_once_and_everywhere() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(conv, nn.ReLU(), conv)
    assert make_deformable(net, "*") == ("0", "2")
    assert net[0] is net[2] and type(net[0]) is DeformConv2d


def test_a_backbone_that_was_cut_out_by_fx() -> None:
    extract = pytest.importorskip("torchvision.models.feature_extraction").create_feature_extractor
    model, x = extract(resnet(), ["layer4"]), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)["layer4"]
    assert len(make_deformable(model, "resnet:conv3-conv5")) == 12
    assert error(model(x)["layer4"].detach().numpy(), expected.detach().numpy()) < 1e-10


@pytest.mark.parametrize(
    ("name", "arguments", "number"),
    [
        ("fasterrcnn_resnet50_fpn", {}, 13), ("maskrcnn_resnet50_fpn", {}, 13), ("retinanet_resnet50_fpn", {}, 13),
        ("fcos_resnet50_fpn", {}, 13),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_detectors(name: str, arguments: dict[str, Any], number: int) -> None:
    torch.manual_seed(0)
    model = getattr(models.detection, name)(weights=None, weights_backbone=None, min_size=96, max_size=128, **arguments)
    model = model.double().eval()
    images = [torch.rand(3, 96, 128, dtype=torch.float64)]
    expected = model(images)[0]
    assert len(make_deformable(model, "resnet:conv3-conv5")) == number
    found = model(images)[0]
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        if value.numel():
            assert error(found[key].detach().numpy(), value.detach().numpy()) < 1e-6, key


@pytest.mark.slow
def test_segmenters_and_other_backbones() -> None:
    model = models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None).double().eval()
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)["out"]
    assert len(make_deformable(model, "resnet:conv3-conv5")) == 13
    assert {model.backbone.layer4[n].conv2.offset_conv.dilation for n in range(3)} == {(2, 2), (4, 4)}
    assert error(model(x)["out"].detach().numpy(), expected.detach().numpy()) < 1e-10
    ssd = models.detection.ssd300_vgg16(weights=None, weights_backbone=None)
    assert make_deformable(ssd, "backbone.features.2?") != ()


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    model, x = timm.create_model("resnet26", pretrained=False).double().eval(), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    assert len(make_deformable(model, "resnet:conv3-conv5")) == 6
    assert error(model(x).detach().numpy(), expected.detach().numpy()) < 1e-10
    same = nn.Sequential(timm.layers.Conv2dSame(3, 4, 3, stride=2))  # it pads by the size of its input
    with pytest.raises(ValueError, match=r"layer '0' of `model` is a timm\..*Conv2dSame; expected .* and not a subclass"):
        make_deformable(same, "*")


class Padded(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(input, [1, 1, 1, 1]))


def test_errors() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), Padded(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 4))
    before = [*net]
    with pytest.raises(
        ValueError, match=r"layer '1' of `model` is a .*Padded; expected .* not a subclass, whose `forward` may be"
    ):
        make_deformable(net, "*")
    with pytest.raises(ValueError, match=r"`which` names '7', which `model` does not have"):
        make_deformable(net, ["7"])
    with pytest.raises(ValueError, match="`which` has no names"):
        make_deformable(net, [])
    with pytest.raises(
        ValueError, match=r"`which` is 'layer3\*', and finds no convolution of more than one tap in `model`. It has 0, 1\."
    ):
        make_deformable(net, "layer3*")
    with pytest.raises(ValueError, match=r'expected "resnet:conv3-conv5", with stages from conv2 to conv5'):
        make_deformable(net, "resnet:layer3")
    with pytest.raises(ValueError, match=r"layer '3' of `model` is a torch.nn.modules.linear.Linear; expected an nn.Conv1d"):
        make_deformable(net, "3")
    with pytest.raises(ValueError, match="`offset_groups` is 3; expected a divisor"):
        make_deformable(net, ["0"], offset_groups=3)
    with pytest.raises(TypeError, match=r"`model` is a builtins.list; expected a torch.nn.Module"):
        make_deformable([nn.Conv2d(4, 4, 3)], "0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`model` is a convolution itself"):
        make_deformable(nn.Conv2d(4, 4, 3), [""])
    with pytest.raises(ValueError, match="that is computed from other parameters, by a parametrization"):
        make_deformable(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))), "0")
    assert [*net] == before
    make_deformable(net, ["0"])
    with pytest.raises(ValueError, match="layer '0' of `model` is deformable already"):
        make_deformable(net, "0")
    with pytest.raises(ValueError, match=r"finds no convolution .* 1 layer: 0 there, and deformable already"):
        make_deformable(net, "[0]")
    with pytest.raises(ValueError, match="`model` is a compiled model, whose code is fixed"):
        make_deformable(torch.compile(net), "0")
    with pytest.raises(ValueError, match="`model` is a script, whose code is fixed"):
        make_deformable(torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3))), "0")
    assert repr(Replaced(())) == "no layers"


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 4, 3)))


@pytest.mark.parametrize(
    ("which", "kind", "text"),
    [
        (None, TypeError, "`which` is None; expected a recipe"),
        (3, TypeError, "`which` is 3; expected a recipe"),
        (re.compile("0"), TypeError, r"`which` is re.compile\('0'\); expected a recipe"),
        (b"0", TypeError, "`which` is b'0'; expected a recipe"),
        ([nn.ReLU()], TypeError, "`which` has a torch.nn.modules.activation.ReLU; expected .* or names"),
        ([["0"]], TypeError, "`which` has a builtins.list; expected"),
        (["1.*"], ValueError, r"names '1\.\*', which `model` does not have. Pass a pattern or a recipe as a string alone"),
        (["resnet:conv5"], ValueError, "Pass a pattern or a recipe as a string alone"),
        ("1", ValueError, r'layer \'1\' of `model` is a .*Sequential; .* For what it contains pass "1\.\*"'),
        ("", ValueError, r'For what it contains pass "\*"'),
        ("conv3-conv5", ValueError, r'It has 0, 1\.0\. A recipe is written "resnet:conv3-conv5"\.'),
        ("ResNet50:conv5", ValueError, 'A recipe is written "resnet:conv3-conv5"'),
        ("resnet:conv5", ValueError, r"finds no convolution of more than one tap in `model`\. It has 0, 1\.0\.$"),
    ],
)
def test_which_of_other_kinds(which: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make_deformable(pair(), which)


def test_names_of_special_characters() -> None:
    model = nn.Module()
    for name in ("a[0]*?", "x-y", "\u00fc \u00ef"):
        model.add_module(name, nn.Conv2d(3, 3, 3))
    assert make_deformable(model, "a[0]*?") == ("a[0]*?",)
    assert make_deformable(model, ["\u00fc \u00ef", "x-y"]) == ("x-y", "\u00fc \u00ef")


def test_what_a_new_layer_would_lose_is_refused() -> None:
    model = pair()
    model[0].forward = lambda input: input
    with pytest.raises(ValueError, match="layer '0' of `model` has a `forward` of its own, put on the instance"):
        make_deformable(model, "*")
    for key, value in (("register_buffer", torch.ones(1)), ("register_parameter", None), ("add_module", nn.ReLU())):
        model = pair()
        getattr(model[1][0], key)("extra", value)
        with pytest.raises(ValueError, match=r"layer '1.0' of `model` has 'extra' beside its weight and bias"):
            make_deformable(model, "1.0")
        assert type(model[1][0]) is nn.Conv2d
    with pytest.raises(TypeError, match="unexpected keyword argument 'deformable_groups'; here: offset_groups"):
        make_deformable(pair(), "0", deformable_groups=1)


def test_a_model_in_distributed_data_parallel_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(pair())
        with pytest.raises(ValueError, match="`model` is or has a DistributedDataParallel, which would not average"):
            make_deformable(model, "*")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compile", [lambda net: torch.compile(net, backend="eager"), lambda net: net])
def test_a_part_that_is_compiled_takes_the_new_layers(compile: Any) -> None:
    model, x = nn.Sequential(compile(pair())), torch.rand(1, 3, 8, 8)
    model.compile(backend="eager")
    expected = model(x)
    name = make_deformable(model, "*1.0")[0]
    assert torch.allclose(model(x), expected, atol=1e-5)
    with torch.no_grad():
        model.get_submodule(name).offset_conv.bias.add_(0.3)  # type: ignore[union-attr, operator]
    assert not torch.allclose(model(x), expected, atol=1e-5)
    torch._dynamo.reset()
