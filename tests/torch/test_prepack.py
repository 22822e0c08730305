"""A layer whose weight is packed once: the same bits as the layer's, never from a weight that has changed meanwhile."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import deformconv
from deformconv.convert import prepack, to_torchvision
from deformconv.ops.conv import cpu
from deformconv.runtime import work
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d, PrepackedDeformConv

# Small calls do not take packed weights.
pytestmark = pytest.mark.usefixtures("nothing_is_small")

KINDS = {1: DeformConv1d, 2: DeformConv2d, 3: DeformConv3d}
SIZES = {1: (40,), 2: (13, 11), 3: (5, 6, 7)}
LAYERS = {
    "v2": {},
    "v1": {"modulated": False},
    "no bias": {"bias": False},
    "groups": {"groups": 2, "offset_groups": 4},
    "depthwise": {"groups": 8, "out_channels": 8},
    "a larger window": {"kernel_size": 5, "stride": 2, "dilation": 2, "padding": 3},
    "two sides": {"padding": "pairs"},
    "padding by reflection": {"padding_mode": "reflect"},
    "bounded": {"max_offset": 2.0, "mask_scale": 1.0},
    "inside": {"boundary": "inside"},
    "39 outputs": {"out_channels": 39},
}


def layer_of(rank=2, dtype=torch.float32, **options):
    """A layer whose predictor predicts something, and an input."""
    torch.manual_seed(rank)
    if options.get("padding") == "pairs":
        options["padding"] = ((1, 2),) * rank
    arguments = {"in_channels": 8, "out_channels": 6, "kernel_size": 3, "padding": 1} | options
    layer = KINDS[rank](**arguments, dtype=dtype).eval()
    if layer.offset_conv is not None:
        for parameter in layer.offset_conv.parameters():
            nn.init.normal_(parameter, std=0.2)
    return layer, torch.rand(2, 8, *SIZES[rank], dtype=dtype)


def same(one, other):
    return one.dtype is other.dtype and one.stride() == other.stride() and torch.equal(one, other)


@pytest.mark.parametrize("rank", KINDS)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_the_layer_s_bits(rank, options):
    layer, x = layer_of(rank, **options)
    packed = layer.prepack()
    assert isinstance(packed, PrepackedDeformConv) and packed.rank == rank
    with torch.inference_mode():
        offset, mask = layer.offsets_and_mask(x)
        for arguments in ((x,), (x, offset), (x, offset, mask)):
            assert same(packed(*arguments), layer(*arguments))
        assert same(packed(x[0]), layer(x[0]))
        assert same(packed(x[0], offset[0]), layer(x[0], offset[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    layer, x = layer_of(dtype=dtype)
    packed = layer.prepack()
    with torch.inference_mode():
        assert same(packed(x), layer(x))
        assert same(packed(x, *layer.offsets_and_mask(x)), layer(x, *layer.offsets_and_mask(x)))


def test_channels_last():
    layer, x = layer_of()
    x, packed = x.contiguous(memory_format=torch.channels_last), layer.prepack()
    with torch.inference_mode():
        assert same(packed(x), layer(x))
        assert packed(x).is_contiguous(memory_format=torch.channels_last)
        last = layer.to(memory_format=torch.channels_last)
        assert same(last.prepack()(x), last(x))
        assert same(packed.to(memory_format=torch.channels_last)(x), last(x))


@pytest.mark.parametrize("passed", [False, True], ids=["predicted", "passed"])
def test_the_weight_is_packed_once(passed, monkeypatch):
    layer, x = layer_of()
    packed, packs, pack = layer.prepack(), [], cpu.pack

    def counted(*arguments):
        packs.append(arguments)
        return pack(*arguments)

    monkeypatch.setattr(cpu, "pack", counted)
    with torch.inference_mode():
        more = layer.offsets_and_mask(x) if passed else ()
        expected = layer(x, *more)
        assert torch.equal(packed(x, *more), expected)
        for name, buffer in packed.named_buffers():
            if "weight" in name and not (passed and "offset" in name):
                buffer.numpy()[...] = float("nan")  # nobody reads it any more, nor sees that it has changed
        assert torch.equal(packed(x, *more), expected)
        other = torch.rand(1, 8, 4, 30)  # of another size
        assert torch.isfinite(packed(other, *(layer.offsets_and_mask(other) if passed else ()))).all()
    assert len(packs) == 1


def other_state(layer, added):
    state = copy.deepcopy(layer.state_dict())
    for value in state.values():
        value += added
    return state


CHANGES = {
    "in place": lambda layer: layer.weight.detach().mul_(2),
    "in place, the predictor": lambda layer: layer.offset_conv.weight.detach().mul_(-1),
    "another tensor": lambda layer: setattr(layer, "weight", type(layer.weight)(layer.weight.detach() * 3)),
    "loaded": lambda layer: layer.load_state_dict(other_state(layer, 0.5)),
    "loaded by assignment": lambda layer: layer.load_state_dict(other_state(layer, -1), assign=True),
    "other memory": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "to float64 and back": lambda layer: layer.double().float(),
    "half and back": lambda layer: layer.half().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change):
    layer, x = layer_of()
    packed = layer.prepack()
    with torch.inference_mode():
        before = packed(x)
    for each in (layer, packed):
        change(each)
    with torch.inference_mode():
        assert torch.equal(packed(x), layer(x))
        if change is not CHANGES["to float64 and back"]:
            assert not torch.equal(packed(x), before)


def test_a_dtype_at_a_time():
    layer, x = layer_of()
    packed = layer.prepack()
    with torch.inference_mode():
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            layer.to(dtype), packed.to(dtype)
            assert same(packed(x.to(dtype)), layer(x.to(dtype)))
        with pytest.raises(TypeError, match="`weight` is float32 and `input` is float64"):
            packed(x.double())


def test_a_layer_moved_under_inference_mode():
    layer, x = layer_of()
    with torch.inference_mode():
        packed, other = layer.prepack(), layer.prepack().double()
        assert same(packed(x), layer(x)) and not packed.weight.is_inference()
        assert same(other(x.double()), layer.double()(x.double()))


def test_it_is_a_copy_without_parameters():
    layer, x = layer_of()
    packed = layer.prepack()
    assert not list(packed.parameters()) and packed.state_dict().keys() == layer.state_dict().keys()
    with torch.inference_mode():
        before = packed(x)
    with torch.no_grad():
        layer.weight.fill_(7)
        layer.offset_conv.bias.fill_(7)
    with torch.inference_mode():
        assert torch.equal(packed(x), before)
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad


def test_state_dicts_both_ways():
    layer, x = layer_of(mask_scale=1.0)
    other = layer_of(mask_scale=1.0)[0].prepack()
    other.weight.zero_()
    other.load_state_dict(layer.state_dict())
    third = layer_of(mask_scale=1.0)[0]
    third.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(other(x), layer(x)) and torch.equal(third(x), layer(x))
    with pytest.raises(RuntimeError, match="mask_scale"):
        layer_of()[0].load_state_dict(other.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_duplicates(duplicate):
    layer, x = layer_of()
    packed = layer.prepack()
    with torch.inference_mode():
        expected = packed(x)
        other = duplicate(packed)
        assert torch.equal(other(x), expected)
    size = len(pickle.dumps(packed))
    assert size < len(pickle.dumps(layer)) + 500  # no panels among it


def test_training_is_refused():
    layer, x = layer_of()
    packed = layer.prepack()
    assert not packed.training and packed.eval() is packed
    for train in (packed.train, nn.Sequential(packed).train):
        with pytest.raises(
            RuntimeError, match=r"train\(\) was called on a prepacked layer, which has no parameters: train the"
        ):
            train()
    with pytest.raises(RuntimeError, match="no parameters to reset"):
        packed.reset_parameters()
    packed.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="A buffer of a prepacked layer requires a gradient; expected none"):
        packed(x)
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))


def test_gradients_of_what_is_passed():
    layer, x = layer_of()
    packed = layer.prepack()
    offset, mask = (t.detach() for t in layer.offsets_and_mask(x))
    for given in ((x,), (x, offset, mask)):
        found = []
        for each in (layer, packed):
            leaves = [t.clone().requires_grad_() for t in given]
            output = each(*leaves)
            output.square().sum().backward()
            found.append([output, *(leaf.grad for leaf in leaves)])
        assert all(map(torch.equal, *found))


def test_refusals():
    class Mine(DeformConv2d):
        pass

    with pytest.raises(TypeError, match=r"`layer` is a .*Mine; expected a DeformConv1d, DeformConv2d or DeformConv3d itself"):
        Mine(3, 3, 3).prepack()
    with pytest.raises(TypeError, match=r"`layer` is a deformconv.torch.conv.prepacked.PrepackedDeformConv; expected"):
        layer_of()[0].prepack().prepack()
    with pytest.raises(TypeError, match="`layer` is a int; expected a DeformConv1d, DeformConv2d or DeformConv3d"):
        PrepackedDeformConv(3)
    layer, _ = layer_of()
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(
        ValueError, match=r"`layer` has a weight that is computed from other parameters.*remove_parametrizations"
    ):
        layer.prepack()


def test_a_predictor_of_one_s_own():
    layer, x = layer_of()
    layer.offset_conv = nn.Sequential(nn.Conv2d(8, 27, 3, padding=1), nn.Tanh())
    packed = layer.prepack()
    assert not list(packed.parameters())
    with torch.inference_mode():
        assert torch.equal(packed(x), layer(x))


def test_passed_offsets_alone():
    layer, x = layer_of(predict_offsets=False, offset_groups=None)
    packed, offset = layer.prepack(), torch.randn(2, 36, 13, 11)
    with torch.inference_mode():
        assert torch.equal(packed(x, offset), layer(x, offset))
        with pytest.raises(TypeError, match="`offset` is missing"):
            packed(x)
        with pytest.raises(deformconv.ShapeError, match="in_channels=8"):
            packed(x[:, :3])


def test_threads_that_begin_together():
    layer, x = layer_of()
    packed = layer.prepack()
    with torch.no_grad():
        expected, found = layer(x), []

    def call():
        with torch.no_grad():
            found.append(packed(x))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(each, expected) for each in found)


def test_small_calls_and_other_devices_take_the_plain_weight(monkeypatch, nothing_is_small):
    layer, x = layer_of()
    packed = layer.prepack()
    assert packed.to("meta")(x.to("meta")).shape == layer(x).shape
    monkeypatch.setattr(work, "SHARED_FROM", 1e9)
    nothing_is_small()
    packed = layer.prepack()
    monkeypatch.setattr(cpu, "pack", None)
    offset, mask = layer.offsets_and_mask(x)
    with torch.no_grad():
        assert torch.equal(packed(x, offset, mask), layer(x, offset, mask))


def test_torchvision_has_none():
    with pytest.raises(
        ValueError, match=r"`model` is a deformconv.torch.conv.prepacked.PrepackedDeformConv; expected DeformConv2d"
    ):
        to_torchvision(layer_of()[0].prepack())


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_export_and_trace():
    layer, x = layer_of()
    packed = layer.prepack()
    with torch.no_grad():
        expected = packed(x)
        program = torch.export.export(packed, (x,))
        assert not list(program.parameters())
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.jit.trace(packed, (x,))(x), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(NotImplementedError, match=r"torch.jit.script cannot compile a PrepackedDeformConv"):
            torch.jit.script(packed)


@pytest.mark.slow
def test_compile():
    layer, x = layer_of()
    packed = layer.prepack()
    with torch.no_grad():
        expected = packed(x)
        torch.testing.assert_close(torch.compile(packed, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-4)


def test_autocast():
    layer, x = layer_of()
    packed = layer.prepack()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same(packed(x), layer(x))


def test_who_looks_at_it():
    from deformconv.plots import record

    layer, x = layer_of()
    net = nn.Sequential(layer).eval()
    packed = prepack(net)
    with torch.no_grad(), record(packed) as trace:
        packed(x)
    with torch.no_grad(), record(net) as expected:
        net(x)
    assert len(trace) == len(expected) == 1


# A whole model


def net_of():
    layer, x = layer_of()
    return nn.Sequential(nn.Conv2d(8, 8, 1), layer, nn.BatchNorm2d(6), nn.ReLU()).eval(), x


def test_a_model():
    net, x = net_of()
    net[1].register_forward_hook(lambda module, inputs, output: output + 1)
    packed = prepack(net)
    assert type(packed[1]) is PrepackedDeformConv and type(net[1]) is DeformConv2d
    assert packed.state_dict().keys() == net.state_dict().keys()
    with torch.inference_mode():
        assert torch.equal(packed(x), net(x))
    assert not {p.data_ptr() for p in net.parameters()} & {t.data_ptr() for t in packed.state_dict().values()}
    assert type(prepack(net[1])) is PrepackedDeformConv


def test_a_layer_that_is_there_twice():
    layer, _ = layer_of(out_channels=8)
    packed = prepack(nn.Sequential(layer, layer).eval())
    assert packed[0] is packed[1]


def test_models_that_cannot_be_prepacked():
    net, _ = net_of()
    with pytest.raises(ValueError, match=r"`model` is in training mode; expected evaluation mode.*: model.eval\(\)"):
        prepack(net.train())
    with pytest.raises(
        ValueError, match=r"`model` has no DeformConv1d, DeformConv2d or DeformConv3d to prepack.*replace_layers"
    ):
        prepack(nn.ReLU().eval())
    with pytest.raises(TypeError, match=r"`model` is a builtins.str; expected a torch.nn.Module"):
        prepack("net")
    net.eval()
    nn.utils.parametrizations.weight_norm(net[1])
    with pytest.raises(ValueError, match="layer '1' of `model` has a weight that is computed"):
        prepack(nn.Sequential(*net, DeformConv2d(6, 6, 3)).eval())


def test_subclasses_stay():
    class Mine(DeformConv2d):
        pass

    packed = prepack(nn.Sequential(Mine(3, 3, 3), DeformConv2d(3, 3, 3)).eval())
    assert [type(module) for module in packed] == [Mine, PrepackedDeformConv]
