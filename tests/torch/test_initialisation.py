"""Nets are initialised by loops over their modules: a layer's weight is filled as a convolution's, its predictor stays zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tests.tolerances import assert_close
from torch import nn
from torch.nn.utils import prune

from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d, DeformRoIPool, reset_predictors

LAYERS = {1: (DeformConv1d, nn.Conv1d), 2: (DeformConv2d, nn.Conv2d), 3: (DeformConv3d, nn.Conv3d)}
# What importing these libraries warns of is theirs.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")


class Net(nn.Module):
    """A convolution and a deformable one, whose first values stand out from what an initialiser would write."""

    def __init__(self, rank=2):
        super().__init__()
        deformable, plain = LAYERS[rank]
        self.first = plain(3, 16, 3, padding=1)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](16)
        self.deform = deformable(16, 16, 3, padding=1)
        with torch.no_grad():
            for layer in (self.first, self.deform):
                layer.weight.fill_(77)
                layer.bias.fill_(77)

    def forward(self, x):
        return self.deform(F.relu(self.norm(self.first(x))))


def assert_initialised(net, layer="deform"):
    """The layer's own parameters are new, and it computes the convolution that it would be without offsets."""
    layer = net.get_submodule(layer)
    rank = layer.weight.ndim - 2
    assert (layer.weight != 77).all() and layer.weight.isfinite().all() and layer.weight.std() > 0
    assert not any(parameter.any() for parameter in layer.offset_conv.parameters())
    x = torch.rand(2, layer.in_channels, *(7, 6, 5)[:rank])
    convolution = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    expected = convolution(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
    assert_close(layer(x).detach(), expected.detach(), "float32")


# The rules by which loops choose modules, in words of our own.


def of_class(kind):
    return lambda module: isinstance(module, kind)


def of_its_class_or_bases_names(name):
    """mmengine's `init_cfg`: the class or one of those it names first is called so."""
    return lambda module: name in {type(module).__name__, *(base.__name__ for base in type(module).__bases__)}


def of_part_of_a_name(module):
    """The rule of PyTorch's DCGAN tutorial, and of CycleGAN and pix2pix."""
    return "Conv" in type(module).__name__ and hasattr(module, "weight")


RULES = [
    pytest.param(lambda rank: of_class(LAYERS[rank][1]), id="nn.ConvNd"),
    pytest.param(lambda rank: of_class((nn.Linear, nn.modules.conv._ConvNd)), id="_ConvNd"),
    pytest.param(lambda rank: of_its_class_or_bases_names(f"Conv{rank}d"), id="class or bases"),
    pytest.param(lambda rank: of_part_of_a_name, id="part of the name"),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_loops_over_modules(rank, rule):
    chosen = rule(rank)
    net = Net(rank)
    net.apply(lambda module: nn.init.kaiming_normal_(module.weight) if chosen(module) else None)
    assert_initialised(net)
    assert (net.first.weight != 77).all()
    assert [name for name, module in net.named_modules() if chosen(module)] == ["first", "deform"]


def test_a_layer_has_a_convolutions_attributes():
    for rank, (deformable, plain) in LAYERS.items():
        for arguments in ({"padding": 1}, {"padding": "same"}, {"padding": 2, "padding_mode": "reflect"}):
            theirs, ours = plain(4, 6, 3, **arguments), deformable(4, 6, 3, **arguments)
            assert isinstance(ours, plain)
            for name in vars(theirs):
                if name != "training" and not name.endswith("hooks") and name not in ("_parameters", "_buffers", "_modules"):
                    assert tuple_of(getattr(ours, name)) == tuple_of(getattr(theirs, name)), (rank, name)


def tuple_of(value):
    return tuple(value) if isinstance(value, list) else value


def test_a_predictor_has_a_convolutions_attributes():
    predictor = DeformConv2d(4, 6, 3, 2, 1, 2).offset_conv
    convolution = nn.Conv2d(4, 27, 3, 2, 1, 2)
    assert not isinstance(predictor, nn.modules.conv._ConvNd)
    assert predictor.extra_repr() == convolution.extra_repr()
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    for name in (*names, "transposed"):
        assert getattr(predictor, name) == getattr(convolution, name), name
    assert not predictor.load_state_dict(convolution.state_dict()).missing_keys
    x = torch.rand(1, 4, 9, 9)
    assert torch.equal(predictor(x), convolution(x))


def test_another_convolution_may_predict():
    layer = DeformConv2d(4, 6, 3, padding=1)
    layer.offset_conv = nn.Conv2d(4, 27, 3, padding=1)
    x = torch.rand(2, 4, 9, 9)
    assert torch.equal(layer.offsets_and_mask(x)[0], layer.offset_conv(x)[:, :18])
    before = layer.offset_conv.weight.clone()
    layer.reset_parameters()
    assert torch.equal(layer.offset_conv.weight, before)


@pytest.mark.parametrize("loop", ["parameters", "reset_parameters"])
def test_reset_predictors(loop):
    net = nn.Sequential(Net(), nn.ModuleDict({"again": DeformConv1d(4, 4, 3)}))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    if loop == "parameters":
        weights = [layer.weight.clone() for layer in (net[0].first, net[0].deform, net[1]["again"])]
        assert reset_predictors(net) is None
        assert all(map(torch.equal, weights, (net[0].first.weight, net[0].deform.weight, net[1]["again"].weight)))
    else:
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    assert_initialised(net, "0.deform")
    assert_initialised(net, "1.again")
    nn.init.ones_(net[0].deform.offset_conv.weight)
    reset_predictors(net[0].deform.offset_conv)
    assert_initialised(net, "0.deform")


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_reset_predictors_of_pooling(trunk):
    """Its last layers are zeros again, so that it is plain pooling; the hidden layers stay what a loop made of them."""
    pool = DeformRoIPool(4, 3, hidden=8, trunk=trunk)
    net = nn.ModuleDict({"pool": pool, "other": nn.Linear(8, 8)})
    x, boxes = torch.rand(1, 4, 9, 9), [torch.tensor([[1.0, 1.0, 7.0, 6.0]])]
    expected = pool(x, boxes)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(pool(x, boxes), expected)
    lasts = {f"{name}.{len(child) - 1}.{part}" for name, child in pool.named_children() for part in ("weight", "bias")}
    before = {name: parameter.clone() for name, parameter in pool.named_parameters()}
    reset_predictors(net)
    for name, parameter in pool.named_parameters():
        assert torch.equal(parameter, torch.zeros_like(parameter) if name in lasts else before[name]), name
    assert len(lasts) == (2 if trunk == "shared" else 4) and net["other"].weight.any()
    assert torch.equal(pool(x, boxes), expected)


def test_a_layer_begins_with_zeros_where_initialisers_do_nothing(monkeypatch):
    """transformers' `no_init_weights` and Lightning's `empty_init` switch torch.nn.init off while a net is made."""
    for name in ("zeros_", "constant_", "kaiming_uniform_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *arguments, **keywords: tensor)
    memory = [torch.full((27 * 16 * 9,), torch.nan) for _ in range(64)]  # what is free next is no zeros
    del memory
    assert not any(parameter.any() for parameter in DeformConv2d(16, 16, 3).offset_conv.parameters())


def test_functions_that_change_convolutions_change_the_layer():
    net = Net()
    nn.utils.convert_conv2d_weight_memory_format(net, torch.channels_last)
    assert net.deform.weight.is_contiguous(memory_format=torch.channels_last)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            prune.random_unstructured(module, "weight", amount=0.5)
    assert [name for name, _ in net.named_buffers() if name.endswith("mask")] == ["first.weight_mask", "deform.weight_mask"]


@pytest.mark.parametrize(
    "window",
    [
        {"stride": (1, 1), "dilation": (2, 2), "padding": (2, 2)},  # as DeepLab's: positions stay, the field of view grows
        {"dilation": 3},
        {"padding": ((0, 1), (2, 0)), "stride": 1},
        {"padding_mode": "reflect", "padding": "same", "dilation": (2, 1)},
    ],
    ids=str,
)
def test_a_window_that_is_changed_in_place(window):
    layer = DeformConv2d(4, 6, 3, 1 if window.get("padding") == "same" else 2, 1)
    nn.init.normal_(layer.offset_conv.weight, std=0.1)
    arguments = {"stride": layer.stride, "padding": 1} | window
    made = DeformConv2d(4, 6, 3, **arguments)
    made.load_state_dict(layer.state_dict())
    for name, value in window.items():
        setattr(layer, name, value)
    assert repr(layer) == repr(made)
    x = torch.rand(2, 4, 12, 11)
    assert torch.equal(layer(x), made(x))


def test_a_norm_is_folded_into_the_layer():
    """The layer is linear in its weight, so that what is right for a convolution is right for it."""
    net = Net().eval()
    nn.init.normal_(net.deform.weight)
    nn.init.normal_(net.deform.offset_conv.weight, std=0.1)
    norm = nn.BatchNorm2d(16).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.rand(2, 16, 8, 8)
    folded = nn.utils.fuse_conv_bn_eval(net.deform, norm)
    assert type(folded) is DeformConv2d
    assert_close(folded(x).detach(), norm(net.deform(x)).detach(), "float32")


# The loops themselves.


def test_torchvisions_resnet():
    class Block(torchvision.models.resnet.BasicBlock):
        def __init__(self, inplanes, planes, *arguments, **keywords):
            super().__init__(inplanes, planes, *arguments, **keywords)
            self.conv2 = DeformConv2d(planes, planes, 3, padding=1, bias=False)

    torch.manual_seed(0)
    net = torchvision.models.ResNet(Block, [1, 1, 1, 1], num_classes=4)  # its constructor ends with the loop
    for stage in ("layer1", "layer4"):
        assert_initialised(net, f"{stage}.0.conv2")
        weight = net.get_submodule(f"{stage}.0.conv2").weight
        fan_out = weight.shape[0] * 9
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert net(torch.rand(1, 3, 64, 64)).shape == (1, 4)


def test_torchvisions_ssd():
    net = Net()
    torchvision.models.detection.ssd._xavier_init(net)
    assert_initialised(net)
    assert not net.deform.bias.any()


@pytest.mark.slow
def test_timm():
    models = pytest.importorskip("timm.models")
    loops = [
        lambda net: models.ResNet.init_weights(net, zero_init_last=False),
        models._efficientnet_builder.efficientnet_init_weights,
        lambda net: models.named_apply(models.convnext._init_weights, net),
        lambda net: models.named_apply(models.byobnet._init_weights, net),
    ]
    for loop in loops:
        net = Net()
        loop(net)
        assert_initialised(net)


@pytest.mark.slow
def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Plain(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig
        layer = staticmethod(nn.Conv2d)

        def __init__(self, config):
            super().__init__(config)
            self.deform = self.layer(4, 6, 3, padding=1)
            self.post_init()

        def forward(self, x):
            return self.deform(x)

    class Ours(Plain):
        layer = staticmethod(DeformConv2d)

        def _init_weights(self, module):  # as docs/pytorch.md says, for from_pretrained
            super()._init_weights(module)
            reset_predictors(module)

    class Unaware(Plain):
        layer = staticmethod(DeformConv2d)

    for kind in (Ours, Unaware):
        net = kind(transformers.PretrainedConfig(initializer_range=0.5))
        assert_initialised(net)
        assert net.deform.weight.std() > 0.3 and not net.deform.bias.any()  # their normal_, not PyTorch's
    # A checkpoint of the plain net lacks the predictor, for which transformers takes memory as it is.
    plain = Plain(transformers.PretrainedConfig())
    plain.save_pretrained(tmp_path / "plain")
    net = Ours.from_pretrained(tmp_path / "plain")
    assert_initialised(net)
    assert torch.equal(net.deform.weight, plain.deform.weight)
    # What has been trained comes back.
    nn.init.normal_(net.deform.offset_conv.weight)
    net.save_pretrained(tmp_path / "trained")
    again = Ours.from_pretrained(tmp_path / "trained")
    assert torch.equal(again.deform.offset_conv.weight, net.deform.offset_conv.weight)
    # A class that is left as it is: afterwards, and only where the checkpoint has no predictor.
    again = Unaware.from_pretrained(tmp_path / "trained")
    assert torch.equal(again.deform.offset_conv.weight, net.deform.offset_conv.weight)
    net = Unaware.from_pretrained(tmp_path / "plain")
    reset_predictors(net)
    assert_initialised(net)


@pytest.mark.slow
def test_lightning():
    init = pytest.importorskip("lightning.fabric.utilities.init")
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.apply(self.kaiming)

        def kaiming(self, module):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    assert_initialised(Module(), "net.deform")
    # A net that is made without memory, as for strategies that cut it in parts.
    with torch.device("meta"):
        net = Net()
    init._materialize_meta_tensors(net, torch.device("cpu"))
    assert_initialised(net)
    with init._EmptyInit():
        net = DeformConv2d(16, 16, 3)
    assert not any(parameter.any() for parameter in net.offset_conv.parameters())


def test_mmengine():
    model = pytest.importorskip("mmengine.model")

    class Module(model.BaseModule):
        def __init__(self):
            super().__init__(init_cfg={"type": "Kaiming", "layer": ["Conv2d"]})
            self.net = Net()

    net = Module()
    net.init_weights()
    assert_initialised(net, "net.deform")
