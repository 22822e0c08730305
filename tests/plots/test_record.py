"""A recorded forward pass: what a Trace says of the calls, and what it says where something is missing."""

from __future__ import annotations

import doctest
import threading
import warnings

import pytest

torch = pytest.importorskip("torch")

import torchvision  # noqa: E402
from tests.plots.test_observe import CalledWithOffsets, randomised, replica_of  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from deformconv.plots import geometry as geometry_module  # noqa: E402
from deformconv.plots import recording as record_module  # noqa: E402
from deformconv.plots import trace as trace_module  # noqa: E402
from deformconv.plots.recording import Call, record  # noqa: E402
from deformconv.torch import DeformConv1d, DeformConv2d  # noqa: E402


@pytest.mark.parametrize(("module", "examples"), [(record_module, 6), (trace_module, 4), (geometry_module, 3)])
def test_doctests(module, examples):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted >= examples


class Net(nn.Module):
    """A stem, a layer that is called twice, another one, and a torchvision's."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.twice = DeformConv2d(4, 4, 3, padding=1, offset_groups=2)
        self.last = CalledWithOffsets(torchvision.ops.DeformConv2d(4, 4, 3, padding=1), masked=False)
        self.never = DeformConv2d(4, 4, 3)

    def forward(self, x):
        x = self.twice(self.stem(x)).relu()
        return self.last(F.avg_pool2d(self.twice(x), 2))


def recorded(net, *args, **kwargs):
    with record(net) as trace:
        net(*args, **kwargs)
    return trace


@pytest.fixture(scope="module")
def trace():
    return recorded(randomised(Net()).eval(), torch.rand(2, 3, 24, 32))


def test_a_call_says_what_the_layer_did():
    layer = randomised(DeformConv2d(3, 6, (3, 2), stride=(2, 1), padding=((1, 2), (0, 1)), dilation=(1, 2), offset_groups=3))
    x = torch.rand(2, 3, 9, 11)
    (call,) = recorded(layer, x)
    assert isinstance(call, Call)
    assert (call.layer, call.index, call.forward, call.kind) == ("", 0, 0, "deformconv")
    assert (call.input_size, call.output_size, call.kernel_size) == ((9, 11), (5, 10), (3, 2))
    assert (call.stride, call.dilation, call.padding) == ((2, 1), (1, 2), ((1, 2), (0, 1)))
    assert (call.offset_groups, call.D, call.K, call.padding_mode) == (3, 2, 6, "zeros")
    offset, mask = layer.offsets_and_mask(x)
    assert torch.equal(call.offset, offset)
    assert torch.equal(call.mask, mask)
    assert not call.offset.requires_grad
    assert "tensor" not in repr(call)


def test_names_indices_and_forward_passes_are_counted():
    net, x = randomised(Net()), torch.rand(2, 3, 24, 32)
    with record(net) as trace:
        net(x)
        net(x)
    calls = [("twice", 0), ("twice", 1), ("last.layer", 0)]
    assert [(call.layer, call.index, call.forward) for call in trace] == [
        (*call, forward) for forward in (0, 1) for call in calls
    ]
    assert len(trace) == 6
    assert trace.calls == list(trace)
    assert trace.layers == ["twice", "last.layer"]
    assert trace["twice"] is trace.calls[4]
    assert trace["twice", 0] is trace.calls[3]
    assert trace["last.layer"].kind == "torchvision"
    assert trace["last.layer"].mask is None


def test_layers_that_are_called_by_themselves_are_recorded_too():
    net = Net()
    with record(net) as trace:
        net.twice(torch.rand(1, 4, 8, 8))
    assert [(call.layer, call.index, call.forward) for call in trace] == [("twice", 0, 0)]
    with pytest.raises(ValueError, match=r"the model itself was not called .* expected model\(x\) within"):
        trace.image  # noqa: B018


def test_recordings_may_be_within_each_other_and_end_with_an_exception():
    class Failing(Net):
        def forward(self, x):
            super().forward(x)
            raise KeyError

    net = Failing()
    with record(net) as outer:
        with pytest.raises(KeyError), record(net) as inner:
            net(torch.rand(1, 3, 8, 8))
        with pytest.raises(KeyError):
            net(torch.rand(1, 3, 8, 8))
    with pytest.raises(KeyError):
        net(torch.rand(1, 3, 8, 8))
    assert (len(outer), len(inner)) == (6, 3)
    for part in net.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert "_observers" not in vars(part)


def test_an_inference_tensor_is_recorded_as_a_plain_one():
    layer = DeformConv2d(3, 4, 3, padding=1)
    with torch.inference_mode():
        trace = recorded(layer, torch.rand(1, 3, 8, 8))
    assert not trace[""].offset.is_inference()
    assert not trace.image.is_inference()
    assert trace.geometry("").step == (1, 1)


class Shared(nn.Module):
    """What DataParallel does on several GPUs: a replica of the net for each part of the batch, in a thread of its own."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        threads = [threading.Thread(target=replica_of(self.net), args=(part,)) for part in x.chunk(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_replicas_in_threads_are_counted_each_by_itself():
    net, x = Shared(randomised(Net())), torch.rand(4, 3, 24, 32)
    with record(net) as trace:
        net(x)
        net(x)
    once = [("net.twice", 0), ("net.twice", 1), ("net.last.layer", 0)]
    found = [(call.layer, call.index, call.forward, len(call.offset)) for call in trace]
    assert sorted(found) == sorted((*call, forward, 2) for call in once for forward in (0, 1) for _ in range(2))


def test_data_parallel_is_looked_through():
    net, x = randomised(Net()).eval(), torch.rand(2, 3, 24, 32)
    plain, wrapped = recorded(net, x), recorded(nn.DataParallel(net), x)
    assert wrapped.layers == [f"module.{name}" for name in plain.layers]
    assert wrapped.geometry("module.last.layer") == plain.geometry("last.layer")
    assert wrapped.before("module.last.layer") == [(f"module.{name}", index) for name, index in plain.before("last.layer")]


def test_the_image_is_a_copy_of_what_the_model_got(trace):
    net, x = Net(), torch.rand(2, 3, 24, 32)
    given = x.clone()
    found = recorded(net, given)
    given.zero_()
    assert torch.equal(found.image, x)
    assert found.size == (24, 32)
    assert trace.image.shape == (2, 3, 24, 32)


class Takes(nn.Module):
    """A net that takes its image in one way or another."""

    def __init__(self, take):
        super().__init__()
        self.layer, self.take = DeformConv2d(3, 4, 3, padding=1), take

    def forward(self, *args, **kwargs):
        return self.layer(self.take(*args, **kwargs))


IMAGE = torch.rand(1, 3, 8, 10)


@pytest.mark.parametrize(
    ("take", "args", "kwargs"),
    [
        (lambda x: x, (IMAGE,), {}),
        (lambda *, pixels: pixels, (), {"pixels": IMAGE}),
        (lambda batch: batch["image"], ({"time": torch.rand(1), "image": IMAGE},), {}),
        (lambda images: torch.stack(images), ([IMAGE[0]],), {}),
        (lambda images, targets: torch.stack(images), ([IMAGE[0]], [{"boxes": torch.rand(5, 4)}]), {}),
        (lambda x: x, (IMAGE[0],), {}),
        (lambda steps, x: x, (torch.arange(24).reshape(1, 2, 3, 4), IMAGE), {}),
        (lambda x: x.mul_(2), (IMAGE.clone(),), {}),
        (lambda images: torch.stack([image.mul_(2) for image in images]), ([IMAGE[0].clone()],), {}),
    ],
)
def test_the_image_is_found_wherever_it_was_passed(take, args, kwargs):
    trace = recorded(Takes(take), *args, **kwargs)
    assert torch.equal(trace.image, IMAGE)
    assert trace.geometry("layer").step == (1, 1)


def test_a_model_that_gets_no_image_is_told_so():
    trace = recorded(Takes(lambda x: x.reshape(1, 3, 8, 10)), torch.rand(240))
    with pytest.raises(
        ValueError, match=r"floating-point tensors of shapes \(240,\); expected one with 4 axes, \(N, C\) and 2"
    ):
        trace.size  # noqa: B018
    trace = recorded(Takes(lambda x: x / 255.0), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="floating-point tensors of shapes none"):
        trace.image  # noqa: B018


def test_before_is_the_chain_of_layers_that_a_call_depends_on():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (DeformConv2d(3, 3, 3, padding=1) for _ in range(4))

        def forward(self, x):
            left, right = self.b(self.a(x)), self.c(x)
            return self.d(left) + right

    trace = recorded(Branches(), IMAGE)
    assert trace.layers == ["a", "b", "c", "d"]
    assert [trace.before(name) for name in "abcd"] == [[], [("a", 0)], [], [("b", 0), ("a", 0)]]


def test_before_counts_calls_of_a_shared_layer(trace):
    assert trace.before("last.layer") == [("twice", 1), ("twice", 0)]
    assert trace.before("twice", 1) == [("twice", 0)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, (6, 8)),  # the image's middle, (11.5, 15.5), is between cells 5 and 6
        ({"at": (0, 0)}, (0, 0)),
        ({"at": (-0.5, 31.5)}, (0, 15)),
        ({"at": (6.9, 7.1)}, (3, 4)),
        ({"at": (7.1, 6.9)}, (4, 3)),
        ({"unit": (11, 0)}, (11, 0)),
        ({"unit": torch.tensor([2, 3])}, (2, 3)),
    ],
)
def test_a_position_becomes_the_nearest_unit(trace, how, expected):
    assert trace.unit("twice", **how) == expected
    assert all(type(cell) is int for cell in trace.unit("twice", **how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"at": (24, 3)}, r"`at` is \(24, 3\), outside the image of 24 x 32 pixels; its first pixel is at 0"),
        ({"at": (float("nan"), 3)}, "outside the image"),
        ({"at": 3.0}, r"`at` is 3.0; expected 2 numbers, \(y, x\)"),
        ({"at": (1, 2, 3)}, r"`at` is \(1, 2, 3\); expected 2 numbers, \(y, x\)"),
        ({"unit": (12, 3)}, r"`unit` is \(12, 3\); layer 'twice' has an output of 12 x 16 units, from 0"),
        ({"unit": (-1, 3)}, "has an output of 12 x 16 units"),
        ({"unit": (1.5, 3)}, r"`unit` is \(1.5, 3\); expected whole numbers"),
        ({"at": (1, 2), "unit": (1, 2)}, "`at` and `unit` were both passed; expected one of them, or none"),
    ],
)
def test_a_position_that_is_none_is_told_so(trace, how, message):
    with pytest.raises(ValueError, match=message):
        trace.unit("twice", **how)


@pytest.mark.parametrize(
    "ask",
    [lambda t: t["lst"], lambda t: t.geometry("lst"), lambda t: t.before("lst"), lambda t: t["stem"], lambda t: t["never"]],
)
def test_an_unknown_layer_is_told_so(trace, ask):
    with pytest.raises(ValueError, match=r"no deformable layer '\w+' was recorded; .* are 'twice', 'last.layer'"):
        ask(trace)


@pytest.mark.parametrize("ask", [lambda t: t["twice", 2], lambda t: t.geometry("twice", 2), lambda t: t.unit("twice", index=2)])
def test_an_unknown_call_is_told_so(trace, ask):
    with pytest.raises(ValueError, match=r"layer 'twice' was called 2 times in a forward pass; there is no call 2 \(from 0\)"):
        ask(trace)


def test_a_model_of_which_nothing_was_recorded_is_told_so():
    with record(Net()) as trace:
        pass
    assert repr(trace) == "Trace: nothing was recorded yet"
    assert trace.layers == []
    for ask in (lambda: trace["twice"], lambda: trace.image, lambda: trace.geometry("twice"), lambda: trace.unit("twice")):
        with pytest.raises(ValueError, match=r"nothing was recorded: call the model, model\(x\), within `with deformconv"):
            ask()


def test_a_trace_shows_itself_as_a_table(trace):
    lines = repr(trace).splitlines()
    assert lines[0] == "Trace of 1 forward pass, 3 calls"
    assert lines[1].split("  ")[0].strip() == "layer"
    assert [line.split()[:3] for line in lines[2:]] == [
        ["twice", "0", "12x16"],
        ["twice", "1", "12x16"],
        ["last.layer", "0", "6x8"],
    ]
    assert lines[4].split()[-1] == "-"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: None, TypeError, "`model` is a builtins.NoneType; expected a torch.nn.Module"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 3)),
            ValueError,
            "`model`, a Sequential, has no deformable layer; expected one of",
        ),
        (lambda: torch.compile(DeformConv2d(3, 3, 3)), ValueError, "`model` is compiled, .* expected the module from before"),
        (lambda: nn.Sequential(torch.compile(DeformConv2d(3, 3, 3))), ValueError, "layer '0' of `model` is compiled"),
    ],
)
def test_a_model_that_cannot_be_recorded_is_told_so(make, error, message):
    with pytest.raises(error, match=message), record(make()):
        pass


def test_a_module_that_compiles_itself_and_a_script_are_told_so():
    net = DeformConv2d(3, 3, 3)
    net.compile()
    with pytest.raises(ValueError, match="`model` is compiled"), record(net):
        pass
    with warnings.catch_warnings():  # jit.trace is deprecated
        warnings.simplefilter("ignore")
        script = torch.jit.trace(DeformConv2d(3, 3, 3), torch.rand(1, 3, 5, 5), check_trace=False)
    message = "`model` is a script or a trace of torch.jit, .* expected the Python module"
    with pytest.raises(ValueError, match=message), record(script):
        pass


def test_layers_of_other_ranks_than_the_first_have_no_place():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.plane, self.line = DeformConv2d(3, 3, 3, padding=1), DeformConv1d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.line(self.plane(x).mean(2))

    trace = recorded(Mixed(), IMAGE)
    assert trace["line"].D == 1
    assert trace.geometry("plane").step == (1, 1)
    with pytest.raises(ValueError, match=r"where layer 'line' lies .* it has 1 spatial axis and the image 2"):
        trace.geometry("line")
