"""A recorded model run again: for other images, up to one layer, and left as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.plots.test_observe import randomised  # noqa: E402
from torch import nn  # noqa: E402

from deformconv.errors import ShapeError  # noqa: E402
from deformconv.plots.recording import record  # noqa: E402
from deformconv.plots.rerun import Probe, undisturbed  # noqa: E402
from deformconv.torch import DeformConv2d  # noqa: E402


class Net(nn.Module):
    """A net that batch statistics, random numbers and a count of its own make a different one at each call in training."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.twice = DeformConv2d(4, 4, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.finished = 0

    def forward(self, x):
        self.calls += 1
        self.calls = self.calls * 1  # another tensor in its place
        x = self.dropout(self.twice(self.twice(self.stem(x))))
        x = x + torch.rand(()) * 0 + random.random() * 0 + np.random.rand() * 0
        self.finished += 1
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    return randomised(Net())


def recorded(net, *args, **kwargs):
    with record(net) as trace:
        net(*args, **kwargs)
    return trace


IMAGES = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(3))
DIFFERENTIABLE = IMAGES.clone().requires_grad_()


def test_features_are_what_the_layer_computes_and_the_pass_ends_there(net):
    trace = recorded(net.eval(), IMAGES)
    inside, first = net.stem(IMAGES), net.twice(net.stem(IMAGES))
    expected = {("stem", 0): inside, ("twice", 0): first, ("twice", 1): net.twice(first), ("", 0): net(IMAGES)}
    finished = net.finished
    for (layer, index), output in expected.items():
        probe = Probe(trace, layer, index)
        assert probe.image.shape == (1, 3, 16, 20)
        torch.testing.assert_close(probe.features(probe.image), output[:1])
        torch.testing.assert_close(probe.features(IMAGES), output)
        torch.testing.assert_close(probe.features(IMAGES.repeat(2, 1, 1, 1)[:3]), output[[0, 1, 0]])
    assert net.finished == finished + 3  # for the model itself alone
    torch.testing.assert_close(Probe(trace, "twice", image=1).image, IMAGES[1:])


def test_gradients_are_those_of_the_model(net):
    trace = recorded(net.eval(), IMAGES)
    x = IMAGES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net.twice(net.stem(x))[:, :, 3, 4].sum(), x)
    probe = Probe(trace, "twice")
    image = probe.image.requires_grad_()
    with torch.no_grad():  # who asks may be within it
        output = probe.features(image)
    (found,) = torch.autograd.grad(output[:, :, 3, 4].sum(), image)
    torch.testing.assert_close(found, expected[:1])
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not probe.features(probe.image.detach()).requires_grad


def test_who_watches_sees_the_layers_on_the_way_and_who_recorded_does_not(net):
    net.eval()
    seen = []
    with record(net) as trace:
        net(IMAGES)
        probe = Probe(trace, "twice", 1)
        image = probe.image.requires_grad_()
        output = probe.features(image, seen.append)
        assert trace.geometry("twice").step == (2, 2)
    assert len(trace) == 2
    assert [event.name for event in seen] == ["twice", "twice"]
    (gradient,) = torch.autograd.grad(output.sum(), seen[0].offset)
    assert gradient.abs().max() > 0


def states():
    numpy = np.random.get_state()
    return torch.get_rng_state(), random.getstate(), numpy[1].tolist(), numpy[2]


def test_a_model_is_left_as_it_was(net):
    net.train()
    net.stem[1].eval()
    net.head.bias.grad = torch.ones(5)
    trace = recorded(net, IMAGES)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in net.named_buffers()}
    modes = {name: module.training for name, module in net.named_modules()}
    hooks = {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in net.named_modules()}
    before = states()
    probe = Probe(trace, "")
    probe.features(probe.image.requires_grad_())
    trace.geometry("twice")
    trace.output_geometry("stem")
    assert torch.equal(before[0], states()[0])
    assert before[1:] == states()[1:]
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in net.named_modules()} == hooks
    assert net.nothing is None
    for name, buffer in net.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert net.head.bias.grad.tolist() == [1] * 5
    assert net.head.weight.grad is None


def test_a_model_is_left_as_it_was_by_an_exception_too(net):
    net.train()
    before = states()
    with pytest.raises(KeyError), undisturbed(net):
        assert not net.stem[1].training
        net(IMAGES)
        raise KeyError
    assert net.training
    assert net.stem[1].training
    assert net.calls == 0
    assert torch.equal(before[0], states()[0])
    assert before[1:] == states()[1:]


def test_runs_in_evaluation_mode_are_all_alike(net):
    """A net that draws random numbers, even then, draws the same."""

    class Noisy(Net):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    net = randomised(Noisy())
    trace = recorded(net, IMAGES)
    probe = Probe(trace, "twice")
    first = probe.features(probe.image)
    torch.rand(1)
    assert torch.equal(probe.features(probe.image), first)


class Stop(nn.Module):
    """A net that catches what its layers raise."""

    def __init__(self):
        super().__init__()
        self.layer, self.finished = DeformConv2d(3, 3, 3, padding=1), 0

    def forward(self, x):
        try:
            x = self.layer(x)
        except Exception:
            x = x + 1
        self.finished += 1
        return x


def test_a_model_that_catches_exceptions_is_stopped_all_the_same():
    net = Stop()
    trace = recorded(net, IMAGES)
    assert Probe(trace, "layer").features(IMAGES).shape == IMAGES.shape
    assert net.finished == 1


class Sharing(nn.DataParallel):
    """DataParallel as it is on several GPUs: what is run again is one image, and is not shared out."""

    calls = 0

    def forward(self, *args):
        self.calls += 1
        return self.module(*args)


def test_a_wrapper_that_shares_the_batch_out_is_left_out(net):
    wrapper = Sharing(net)
    trace = recorded(wrapper, IMAGES)
    Probe(trace, "module.twice").features(IMAGES)
    assert trace.geometry("module.twice").step == (2, 2)
    assert wrapper.calls == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_who_asks_may_be_within_no_grad_or_inference_mode(net, mode):
    trace = recorded(net, IMAGES)
    with mode():
        probe = Probe(trace, "twice")
        image = probe.image.requires_grad_()
        output = probe.features(image)
        geometry = trace.geometry("twice")
    (gradient,) = torch.autograd.grad(output.sum(), image)
    assert gradient.abs().max() > 0
    assert geometry.difference is not None


class Conditioned(nn.Module):
    """As diffusion models: an argument beside the image that has one row for each."""

    def __init__(self):
        super().__init__()
        self.layer = DeformConv2d(3, 3, 3, padding=1)

    def forward(self, x, time, names, size):
        assert size == (16, 20)
        assert len(names) == len(x) == len(time)
        return self.layer(x + time[:, None, None, None] + torch.stack([name["shift"] for name in names])[:, None, None, None])


def test_what_comes_for_each_image_is_taken_as_it_came_with_that_one():
    net = Conditioned().eval()
    time, names = torch.tensor([1.0, 5.0]), [{"shift": torch.tensor(2.0)}, {"shift": torch.tensor(4.0)}]
    trace = recorded(net, IMAGES, time, names=names, size=(16, 20))
    expected = net(IMAGES, time, names, (16, 20))
    for number in range(2):
        probe = Probe(trace, "layer", image=number)
        torch.testing.assert_close(probe.features(probe.image), expected[number : number + 1])
    torch.testing.assert_close(probe.features(IMAGES[[1, 1, 1]]), expected[[1, 1, 1]])


def test_one_image_without_a_batch_axis():
    net = DeformConv2d(3, 3, 3, padding=1)
    trace = recorded(net, IMAGES[0])
    probe = Probe(trace, "")
    image = probe.image.requires_grad_()
    assert image.shape == (1, 3, 16, 20)
    torch.testing.assert_close(probe.features(image), net(IMAGES[0]))
    with pytest.raises(ValueError, match=r"`image` has 2 pictures; .* without a batch axis: expected 1"):
        probe.features(IMAGES)


class Partly(nn.Module):
    """A net, a part of which runs without gradients."""

    def __init__(self, how):
        super().__init__()
        self.stem, self.layer, self.how = nn.Conv2d(3, 3, 3), DeformConv2d(3, 3, 3), how

    def forward(self, x):
        return {"pair": self.layer(self.how(self.stem, x))}


def without_gradients(stem, x):
    with torch.no_grad():
        return stem(x)


@pytest.mark.parametrize(
    ("make", "ask", "error", "message"),
    [
        (Net, lambda t: Probe(t, "twce"), ValueError, "the model has no layer 'twce'; its deformable layers are 'twice'"),
        (Net, lambda t: Probe(t, "twice", image=2), ValueError, "`image` is 2; the recorded batch has 2, counted from 0"),
        (Net, lambda t: Probe(t, "twice", image=-1), ValueError, "`image` is -1; the recorded batch has 2"),
        (
            Net, lambda t: Probe(t, "twice", 2).features(IMAGES), ValueError,
            "layer 'twice' is called 2 times in a forward pass in evaluation mode, so there is no call 2",
        ),
        (Net, lambda t: Probe(t, "twice", -1), ValueError, "`index` is -1; expected the number of a call, from 0"),
        (
            Net, lambda t: Probe(t, "twice").features(IMAGES[:, :, 1:]), ShapeError,
            r"`image` has shape \(2, 3, 15, 20\); expected \(N, 3, 16, 20\), as the recorded one",
        ),
        (Net, lambda t: Probe(t, "twice").features(IMAGES[0]), ShapeError, r"`image` has shape \(3, 16, 20\); expected \(N, 3"),
        (
            lambda: Partly(lambda stem, x: stem(x)), lambda t: Probe(t, "").features(IMAGES), ValueError,
            "layer '' returns a dict; expected a layer that returns one tensor",
        ),
        (
            lambda: Partly(without_gradients), lambda t: Probe(t, "layer").features(DIFFERENTIABLE), ValueError,
            "layer 'layer' has no gradient with respect to the image: .* under torch.no_grad",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_told_so(make, ask, error, message):
    trace = recorded(make(), IMAGES)
    with pytest.raises(error, match=message):
        ask(trace)


def test_a_layer_that_evaluation_leaves_out_is_told_of():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.extra = DeformConv2d(3, 3, 3), DeformConv2d(3, 3, 3)

        def forward(self, x):
            return (self.main(x), self.extra(x)) if self.training else self.main(x)

    trace = recorded(Auxiliary(), IMAGES)
    assert trace.geometry("main").step == (1, 1)
    with pytest.raises(ValueError, match="layer 'extra' is called 0 times in a forward pass in evaluation mode"):
        Probe(trace, "extra").features(IMAGES)
    with pytest.raises(ValueError, match="layer 'extra' has no call 0 in a forward pass in evaluation mode"):
        trace.geometry("extra")
