"""Watching deformable layers: every layer is seen, with its own tensors, and nothing changes."""

from __future__ import annotations

import copy
import sys
import threading
import types
import warnings

import pytest

torch = pytest.importorskip("torch")

import torchvision  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402

from deformconv.convert import to_torchvision  # noqa: E402
from deformconv.plots.observe import deformable_layers, kind_of, observe, unseen  # noqa: E402
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d  # noqa: E402
from deformconv.torch.conv import prediction  # noqa: E402


def randomised(net):
    """A net whose predictors predict offsets."""
    torch.manual_seed(0)
    for name, parameter in net.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


class CalledWithOffsets(nn.Module):
    """A net that predicts offsets for a layer which is called with them, as torchvision's documentation does."""

    def __init__(self, layer, masked=True, by_name=False):
        super().__init__()
        self.layer, self.masked, self.by_name = layer, masked, by_name
        self.offset_predictor = nn.Conv2d(4, 18, 3, padding=1)
        self.mask_predictor = nn.Conv2d(4, 9, 3, padding=1)

    def forward(self, x):
        given = [self.offset_predictor(x)] + ([self.mask_predictor(x).sigmoid()] if self.masked else [])
        if self.by_name:
            return self.layer(input=x, **dict(zip(("offset", "mask"), given, strict=False)))
        return self.layer(x, *given)


class Mmcv(nn.Module):
    """What mmcv's four layers have in common, with its names; computed by torchvision: mmcv has no wheel for this PyTorch."""

    modulated, packed = False, False

    def __init__(self):
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = (3, 3), (1, 1), (1, 1), (1, 1)
        self.groups, self.deform_groups = 1, 1
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        if self.modulated:
            self.bias = nn.Parameter(torch.randn(4))
        if self.packed:
            self.conv_offset = nn.Conv2d(4, 27 if self.modulated else 18, 3, padding=1)

    def forward(self, x, offset=None, mask=None):
        if self.packed and self.modulated:
            o1, o2, mask = torch.chunk(self.conv_offset(x), 3, dim=1)
            offset, mask = torch.cat((o1, o2), dim=1), torch.sigmoid(mask)
        elif self.packed:
            offset = self.conv_offset(x)
        return torchvision.ops.deform_conv2d(x, offset, self.weight, getattr(self, "bias", None), 1, 1, 1, mask)


def mmcv_layer(name, file, modulated, packed):
    sys.modules.setdefault(f"mmcv.ops.{file}", types.ModuleType(f"mmcv.ops.{file}"))
    return type(name, (Mmcv,), {"modulated": modulated, "packed": packed, "__module__": f"mmcv.ops.{file}"})()


@pytest.fixture(autouse=True)
def no_mmcv_is_left():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("mmcv"):
            del sys.modules[name]


class Subclass(torchvision.ops.DeformConv2d):
    """As nets of others have them: it is called with its offsets, and does something more."""

    def forward(self, input, offset, mask=None):
        return super().forward(input, offset, mask).relu()


class Secretive(torchvision.ops.DeformConv2d):
    """A subclass that makes its offsets itself."""

    def __init__(self):
        super().__init__(4, 4, 3, padding=1)
        self.offset_conv = nn.Conv2d(4, 18, 3, padding=1)

    def forward(self, input):
        return super().forward(input, self.offset_conv(input))


def kornia_layer(mask):
    from kornia.feature.aliked.aliked import DeformableConv2d

    layer = DeformableConv2d(4, 4, mask=mask)
    layer.offset_conv.bias.data[3] = 50.0  # beyond its bound
    return layer


TORCHVISION = torchvision.ops.DeformConv2d
PLANE = (2, 4, 9, 10)
NETS = {
    "v2": (lambda: DeformConv2d(4, 6, 3, padding=1), PLANE, "deformconv"),
    "v1, bounded, two groups": (
        lambda: DeformConv2d(4, 6, 3, stride=2, modulated=False, offset_groups=2, max_offset=1.0), PLANE, "deformconv"
    ),
    "reflect": (lambda: DeformConv2d(4, 6, 3, padding=2, padding_mode="reflect"), PLANE, "deformconv"),
    "uneven padding": (lambda: DeformConv2d(4, 6, 3, padding=((0, 1), (2, 0))), PLANE, "deformconv"),
    "1-D": (lambda: DeformConv1d(4, 6, 3, padding=1), (2, 4, 12), "deformconv"),
    "3-D": (lambda: DeformConv3d(4, 6, 3, padding=1), (2, 4, 5, 6, 7), "deformconv"),
    "one image": (lambda: DeformConv2d(4, 6, 3, padding=1), PLANE[1:], "deformconv"),
    "one signal, v1": (lambda: DeformConv1d(4, 6, 3, modulated=False), (4, 12), "deformconv"),
    "passed": (lambda: CalledWithOffsets(DeformConv2d(4, 4, 3, padding=1, predict_offsets=False)), PLANE, "deformconv"),
    "torchvision": (lambda: CalledWithOffsets(TORCHVISION(4, 4, 3, padding=1)), PLANE, "torchvision"),
    "torchvision, v1": (lambda: CalledWithOffsets(TORCHVISION(4, 4, 3, padding=1), masked=False), PLANE, "torchvision"),
    "by name": (lambda: CalledWithOffsets(TORCHVISION(4, 4, 3, padding=1), by_name=True), PLANE, "torchvision"),
    "subclass": (lambda: CalledWithOffsets(Subclass(4, 4, 3, padding=1)), PLANE, "torchvision"),
    "weight norm": (
        lambda: CalledWithOffsets(parametrizations.weight_norm(TORCHVISION(4, 4, 3, padding=1))), PLANE, "torchvision"
    ),
    "to_torchvision": (lambda: to_torchvision(DeformConv2d(4, 4, 3, padding=1, padding_mode="reflect")), PLANE, "torchvision"),
    "kornia": (lambda: kornia_layer(mask=True), PLANE, "kornia"),
    "kornia, v1": (lambda: kornia_layer(mask=False), PLANE, "kornia"),
    "mmcv": (
        lambda: CalledWithOffsets(mmcv_layer("ModulatedDeformConv2d", "modulated_deform_conv", True, False)), PLANE, "mmcv"
    ),
    "mmcv, v1": (lambda: CalledWithOffsets(mmcv_layer("DeformConv2d", "deform_conv", False, False), False), PLANE, "mmcv"),
    "mmcv, pack": (lambda: mmcv_layer("ModulatedDeformConv2dPack", "modulated_deform_conv", True, True), PLANE, "mmcv"),
    "mmcv, v1 pack": (lambda: mmcv_layer("DeformConv2dPack", "deform_conv", False, True), PLANE, "mmcv"),
}  # fmt: skip


def with_gradients(net, x):
    x = x.clone().requires_grad_()
    y = net(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()], allow_unused=True)]


@pytest.mark.parametrize("name", NETS)
def test_nothing_changes_bit_for_bit_and_nothing_stays(name):
    make, shape, _ = NETS[name]
    net, x = randomised(make()), torch.rand(shape)
    before = {path: {key: copy.copy(value) for key, value in vars(m).items()} for path, m in net.named_modules()}
    expected = with_gradients(net, x)
    with torch.no_grad():
        at_once = net(x)
    seen = []
    with observe(net, seen.append):
        found = with_gradients(net, x)
        with torch.no_grad():
            without = net(x)
        with torch.inference_mode():
            inferred = net(x)
    for one, other in zip([*expected, at_once, at_once], [*found, without, inferred], strict=True):
        assert one is other is None or torch.equal(one, other)
    assert len(seen) == 3
    net(x)
    assert len(seen) == 3
    for path, module in net.named_modules():
        assert {key: value for key, value in vars(module).items() if "hooks" in key or key == "_observers"} == {
            key: value for key, value in before[path].items() if "hooks" in key or key == "_observers"
        }, path


@pytest.mark.parametrize("name", NETS)
def test_offsets_and_masks_are_those_that_were_used(name):
    """The layer, called with what was seen, gives what it gave; and the output depends on these very tensors."""
    make, shape, kind = NETS[name]
    net, x = randomised(make()), torch.rand(shape)
    (layer,) = deformable_layers(net).values()
    assert kind_of(layer) == kind
    seen = []
    with observe(net, seen.append):
        y = net(x)
    (event,) = seen
    assert event.name == next(iter(deformable_layers(net)))
    assert event.input.shape[1 - event.layer.rank - 1 :] == x.shape[-event.layer.rank :]
    assert event.offset.ndim == event.layer.rank + 2
    assert event.mask is None or event.mask.ndim == event.layer.rank + 2
    assert event.offset.abs().max() > 0.1
    batch = event.input if event.input.ndim == event.offset.ndim else event.input[None]
    again = event.layer(batch, event.offset, event.mask).reshape(y.shape)
    torch.testing.assert_close(again.relu() if name == "subclass" else again, event.output)
    (gradient,) = torch.autograd.grad(y.square().sum(), event.offset)
    assert gradient.abs().max() > 0


def test_the_fused_way_is_still_taken(monkeypatch):
    layer, x = randomised(DeformConv2d(4, 6, 3, padding=1)), torch.rand(PLANE)
    taken, seen = [], []
    forward = prediction.forward
    monkeypatch.setattr(prediction, "forward", lambda *call: taken.append(forward(*call)) or taken[-1])
    with observe(layer, seen.append), torch.no_grad():
        y = layer(x)
    assert y is taken[0]
    expected = layer.offsets_and_mask(x)
    assert torch.equal(seen[0].offset, expected[0])
    assert torch.equal(seen[0].mask, expected[1])
    assert not seen[0].offset.requires_grad


def test_several_may_look_and_each_ends_by_itself():
    layer, x = DeformConv2d(4, 6, 3), torch.rand(PLANE)
    first, second, third = [], [], []
    with observe(layer, first.append):
        handle = observe(layer, second.append)
        layer(x)
        handle.remove()
        handle.remove()
        layer(x)
        with observe(layer, third.append):
            layer(x)
    layer(x)
    assert (len(first), len(second), len(third)) == (3, 1, 1)
    assert "_observers" not in vars(layer)


@pytest.mark.parametrize("net", [DeformConv2d(4, 4, 3, padding=1), CalledWithOffsets(TORCHVISION(4, 4, 3, padding=1))])
def test_what_the_watcher_raises_ends_the_forward_pass(net):
    def fail(event):
        raise KeyError(event.name)

    with observe(net, fail), pytest.raises(KeyError):
        net(torch.rand(PLANE))
    net(torch.rand(PLANE))


def test_a_layer_in_two_places_has_one_name_and_every_call_is_seen():
    layer = DeformConv2d(4, 4, 3, padding=1)
    seen = []
    with observe(nn.Sequential(layer, nn.ReLU(), layer), seen.append) as handle:
        nn.Sequential(layer, nn.ReLU(), layer)(torch.rand(PLANE))
    assert [event.name for event in seen] == ["0", "0"]
    handle.remove()


def test_what_is_inside_of_another_librarys_layer_is_no_layer_of_its_own():
    net = nn.Sequential(to_torchvision(DeformConv2d(4, 4, 3)), DeformConv2d(4, 4, 3))
    assert list(deformable_layers(net)) == ["0", "1"]


def replica_of(module):
    """What DataParallel makes of a module for another device, with its parts."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter * 1)
    return replica


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(DeformConv2d(4, 4, 3, padding=1)),
        lambda: CalledWithOffsets(TORCHVISION(4, 4, 3, padding=1)),
        lambda: nn.Sequential(kornia_layer(mask=True)),
    ],
)
def test_replicas_in_threads_are_seen_under_the_names_of_what_they_were_made_from(make):
    net, x = randomised(make()), torch.rand(6, 4, 9, 10)
    expected, seen, outputs = net(x), [], {}
    with observe(net, seen.append):
        replicas = [replica_of(net) for _ in range(3)]
        parts = x.chunk(3)
        threads = [
            threading.Thread(target=lambda n=n: outputs.update({n: replicas[n](parts[n])})) for n in range(len(replicas))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.testing.assert_close(torch.cat([outputs[n] for n in range(3)]), expected)
    assert [event.name for event in seen] == [next(iter(deformable_layers(net)))] * 3
    for event in seen:  # each with the offsets of its own part
        number = next(n for n in range(3) if torch.equal(event.output, outputs[n]))
        assert torch.equal(event.input, parts[number])
        torch.testing.assert_close(event.layer(event.input, event.offset, event.mask), event.output)


def test_a_subclass_that_makes_its_own_offsets_is_told_of():
    net = nn.Sequential(Secretive())
    seen = []
    with observe(net, seen.append), pytest.warns(UserWarning, match="layer '0', a Secretive, was called without offsets"):
        net(torch.rand(PLANE))
    assert not seen


def test_a_block_may_be_seen_by_those_alone_who_began_within():
    layer, x = DeformConv2d(4, 6, 3), torch.rand(PLANE)
    outside, inside = [], []
    with observe(layer, outside.append):
        with unseen(), observe(layer, inside.append):
            layer(x)
        layer(x)
    assert (len(outside), len(inside)) == (1, 1)


@pytest.mark.parametrize("net", [DeformConv2d(4, 4, 3, padding=1), CalledWithOffsets(TORCHVISION(4, 4, 3, padding=1), False)])
def test_transformed_and_traced_calls_are_left_alone(net):
    seen = []
    with observe(net, seen.append):
        if isinstance(net, DeformConv2d):  # torchvision's operator cannot be transformed
            torch.func.grad(lambda x: net(x).sum())(torch.rand(PLANE))
        with warnings.catch_warnings():  # jit.trace is deprecated
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(net, torch.rand(PLANE), check_trace=False)
    traced(torch.rand(PLANE))
    assert not seen


@pytest.mark.parametrize("make", [lambda: DeformConv2d(4, 4, 3, padding=1), lambda: kornia_layer(mask=True)])
def test_a_copy_of_an_observed_layer_is_not_observed(make):
    layer, x, seen = randomised(make()), torch.rand(PLANE), []
    with observe(layer, seen.append):
        twin = copy.deepcopy(layer)
        assert not vars(twin).get("_observers")  # so that it predicts once alone
        assert torch.equal(twin(x), layer(x))
    seen.clear()
    twin(x)
    assert not seen


def test_an_observed_layer_can_be_saved_and_compiled(tmp_path):
    layer, x, seen = randomised(DeformConv2d(4, 6, 3)), torch.rand(PLANE), []
    with observe(layer, seen.append):
        torch.save(layer, tmp_path / "layer.pt")
        expected = layer(x)
        assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=False)(x), expected)
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    assert len(seen) == 1


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"`model` is a builtins.list; expected a torch\.nn\.Module"):
        observe([DeformConv2d(4, 4, 3)], print)
