"""Sampling locations against finite differences of the very offsets that are passed, and windows written out by hand."""

import doctest
import math

import numpy as np
import pytest
import torch
from torch import nn

from deformconv.plots import locations
from deformconv.plots.locations import sampling_locations
from deformconv.plots.points import regular_points, sampling_points
from deformconv.plots.recording import record
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d

LAYERS = {1: (DeformConv1d, nn.Conv1d), 2: (DeformConv2d, nn.Conv2d), 3: (DeformConv3d, nn.Conv3d)}
SIZES = {1: (13,), 2: (9, 8), 3: (5, 4, 6)}
WINDOW = {"stride": 1, "padding": 1, "dilation": 1}


class Passed(nn.Module):
    """A stem of stride 2, a layer whose offsets and masks are passed, and a head; activations work in place."""

    def __init__(self, layer, colours=2):
        super().__init__()
        plain = LAYERS[len(layer.kernel_size)][1]
        self.stem = plain(colours, layer.in_channels, 3, stride=2, padding=1)
        self.layer = layer
        self.act = nn.ReLU(inplace=True)
        self.head = plain(layer.out_channels, 3, 2)

    def forward(self, x, offset, mask=None):
        x = torch.tanh_(self.stem(x))
        return self.head(self.act(self.layer(x, offset, mask)))


def passed(rank, dtype=torch.float64, kind=None):
    """The net, an image, offsets in two groups that are no whole numbers, and masks."""
    torch.manual_seed(rank)
    layer = kind or LAYERS[rank][0](4, 4, 3 if rank < 3 else 2, padding=1, offset_groups=2, predict_offsets=False)
    net = Passed(layer).to(dtype).eval()
    image = torch.randn(1, 2, *SIZES[rank], dtype=dtype)
    taps = math.prod(layer.kernel_size)
    size = layer(net.stem(image), torch.zeros(1, 2 * taps * rank, *shape_of(net, image), dtype=dtype)).shape[2:]
    offset = torch.rand(1, 2 * taps * rank, *size, dtype=dtype) * 2.8 - 1.4
    return net, image, offset, torch.rand(1, 2 * taps, *size, dtype=dtype) + 0.5


def shape_of(net, image):
    """The size of the layer's output for an image."""
    layer, size = net.layer, net.stem(image).shape[2:]
    return [n + 2 - kernel + 1 for n, kernel in zip(size, layer.kernel_size, strict=True)]


def traced(net, *args):
    with record(net) as trace, torch.no_grad():
        net(*args)
    return trace


def slopes(net, image, offset, mask, cell, step=1e-6):
    """Central differences of a unit's channels by each offset: (offsets, channels)."""
    moves = step * torch.eye(offset.numel(), dtype=offset.dtype).reshape(-1, *offset.shape[1:])
    both = []
    with torch.no_grad():
        for sign in (1, -1):
            moved = offset + sign * moves
            images, masks = (t.expand(len(moved), *t.shape[1:]) for t in (image, mask))
            both.append(net(images, moved, masks)[(slice(None), slice(None), *cell)])
    return (both[0] - both[1]) / (2 * step)


@pytest.mark.parametrize(("rank", "kind"), [(1, None), (2, None), (3, None), (2, "torchvision")])
def test_strengths_are_what_finite_differences_say(rank, kind):
    """The offsets are constants of the model's: they have no graph."""
    if kind is not None:
        kind = pytest.importorskip("torchvision").ops.DeformConv2d(4, 4, 3, padding=1)
    net, image, offset, mask = passed(rank, kind=kind)
    cell = {1: (3,), 2: (2, 1), 3: (1, 0, 2)}[rank]
    found = sampling_locations(traced(net, image, offset, mask), "head", unit=cell)
    taps, size = math.prod(net.layer.kernel_size), offset.shape[2:]
    square = slopes(net, image, offset, mask, cell).square().mean(1).reshape(2, taps, rank, *size).sum(2) / 2**2  # stride 2
    expected = square.sqrt().numpy()
    strength = np.zeros(expected.shape)
    strength[(found.group, found.tap, *found.units.T)] = found.strength
    np.testing.assert_allclose(strength, expected, atol=1e-7 * expected.max())
    assert found.of == "layer" and len(found.strength) > 2 * taps and (found.strength > 0).all()
    window = {"padding": 1, "offset_groups": 2}
    cells = sampling_points(offset, net.layer.kernel_size, **window)[0]  # (groups, K, D, *O)
    of_those = [
        cells[(group, tap, slice(None), *unit)] for group, tap, unit in zip(found.group, found.tap, found.units, strict=True)
    ]
    np.testing.assert_allclose(found.points, 2 * np.array(of_those))  # the stem's cell 0 lies at pixel 0
    keys = [(*unit, group, tap) for unit, group, tap in zip(found.units.tolist(), found.group, found.tap, strict=True)]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_layers_own_unit_has_its_own_taps_alone(rank):
    net, image, offset, mask = passed(rank)
    cell = (2,) * rank
    found = sampling_locations(traced(net, image, offset, mask), "layer", unit=cell)
    taps = math.prod(net.layer.kernel_size)
    assert (found.units == cell).all() and len(found.strength) <= 2 * taps
    assert len(found.strength) >= taps  # a few lie outside the map
    assert found.at == pytest.approx([2 * (2 - 1 + (k - 1) / 2) for k in net.layer.kernel_size])


def test_zero_offsets_give_the_plain_window():
    torch.manual_seed(0)
    layer = DeformConv2d(2, 3, 3, stride=2, padding=2, dilation=2)
    found = sampling_locations(traced(layer, torch.rand(1, 2, 11, 12)), "", unit=(2, 3))
    window = regular_points((6, 7), 3, stride=2, padding=2, dilation=2)[:, :, 2, 3]
    assert (found.points == window).all() and found.tap.tolist() == list(range(9)) and not found.group.any()


def test_predicted_offsets_and_passed_ones_have_the_same_strengths():
    torch.manual_seed(0)
    layer = DeformConv2d(2, 3, 3, padding=1).double()
    nn.init.normal_(layer.offset_conv.weight, std=0.4)
    image = torch.randn(1, 2, 7, 8, dtype=torch.float64)

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, *offset_and_mask):
            return self.layer(x, *offset_and_mask)

    offset, mask = (t.detach() for t in layer.offsets_and_mask(image))
    predicted = sampling_locations(traced(Given(), image), "layer", at=(3, 4))
    given = sampling_locations(traced(Given(), image, offset, mask), "layer", at=(3, 4))
    np.testing.assert_allclose(predicted.strength, given.strength, rtol=1e-10)
    np.testing.assert_allclose(predicted.points, given.points, rtol=1e-12)


def test_strengths_on_the_steepest_of_ramps():
    """On a ramp of slope (3, 4) a sample moves the response by its mask times its weight times 5 a pixel."""
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    layer = DeformConv2d(1, 2, 3, padding=1, predict_offsets=False, bias=False)
    mask = torch.arange(9.0).reshape(1, 9, 1, 1).expand(1, 9, 9, 9)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.ones(1, 3, 3), torch.full((1, 3, 3), 7.0)]))
    trace = traced(layer, (3 * y + 4 * x)[None, None], torch.full((1, 18, 9, 9), 0.25), mask)
    found = sampling_locations(trace, "", unit=(4, 4))
    assert found.tap.tolist() == list(range(1, 9))  # tap 0's mask is 0: it does not count
    np.testing.assert_allclose(found.strength, np.arange(1, 9) * math.sqrt((1 + 49) / 2) * 5, rtol=1e-5)
    np.testing.assert_allclose(found.points[3], (4.25, 4.25))


def stack():
    torch.manual_seed(0)
    net = nn.Sequential(
        DeformConv2d(3, 4, 3, padding=1), nn.Tanh(), DeformConv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3)
    )
    return net, torch.rand(1, 3, 12, 12)


def test_without_a_name_it_is_the_layer_itself_or_the_last_before_it():
    net, image = stack()
    trace = traced(net, image)
    for layer, of, units in (("0", "0", 1), ("1", "0", 1), ("2", "2", 1), ("4", "2", 9)):
        found = sampling_locations(trace, layer, at=(6, 6))
        assert found.of == of and found.layer == layer
        assert len(np.unique(found.units, axis=0)) == units and len(found.points) == 9 * units
    lower = sampling_locations(trace, "4", at=(6, 6), of="0")
    assert lower.of == "0" and len(np.unique(lower.units, axis=0)) == 25
    assert np.ptp(lower.points, 0).tolist() == [6, 6]


def test_of_a_shared_layer_it_is_the_last_call():
    layer = DeformConv2d(2, 2, 3, padding=1)
    net = nn.Sequential(nn.MaxPool2d(2), layer, nn.Tanh(), layer, nn.Conv2d(2, 1, 1))
    trace = traced(net, torch.rand(1, 2, 24, 24))
    assert len(sampling_locations(trace, "4", unit=(5, 5)).points) == 9
    first = sampling_locations(trace, "1", unit=(5, 5), index=0)
    assert len(first.points) == 9 and first.points.mean(0).tolist() == [10.5, 10.5]


def test_many_channels_are_estimated():
    torch.manual_seed(0)
    net = nn.Sequential(DeformConv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 64, 1))
    trace = traced(net, torch.rand(1, 3, 9, 9))
    exact = sampling_locations(trace, "2", channels=64)
    found = [sampling_locations(trace, "2", channels=8, seed=seed) for seed in range(8)]
    assert all((one.points == exact.points).all() for one in found)
    mean = np.mean([one.strength**2 for one in found], 0)
    np.testing.assert_allclose(mean, exact.strength**2, rtol=0.6)
    assert (sampling_locations(trace, "2", channels=8, seed=1).strength == found[1].strength).all()
    assert (found[0].strength != found[1].strength).any()


def test_what_a_model_is_does_not_matter_and_stays():
    net, image, offset, mask = passed(2)
    trace = traced(net, image, offset, mask)
    expected = sampling_locations(trace, "head").strength
    net.train()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        with torch.no_grad():
            assert (sampling_locations(trace, "head").strength == expected).all()
    assert all(module.training for module in net.modules()) and not offset.requires_grad
    assert all((parameter.grad == 1).all() for parameter in net.parameters())


def test_looking_within_a_recording_is_not_recorded():
    net, image = stack()
    with record(net) as trace:
        net(image)
        calls = len(trace.calls)
        sampling_locations(trace, "4")
    assert len(trace.calls) == calls == 2


def test_an_image_of_a_batch_has_the_strengths_that_it_has_alone():
    net, _, _, _ = passed(2)
    images = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    offsets, masks = torch.rand(3, 36, 5, 4, dtype=torch.float64), torch.rand(3, 18, 5, 4, dtype=torch.float64)
    whole = sampling_locations(traced(net, images, offsets, masks), "head", image=1)
    alone = sampling_locations(traced(net, images[1:2], offsets[1:2], masks[1:2]), "head")
    np.testing.assert_allclose(whole.strength, alone.strength, rtol=1e-9)
    np.testing.assert_allclose(whole.points, alone.points)


def test_one_image_without_a_batch_axis():
    net, image, offset, mask = passed(2)
    whole = sampling_locations(traced(net, image, offset, mask), "head")
    alone = sampling_locations(traced(net, image[0], offset[0], mask[0]), "head")
    np.testing.assert_allclose(whole.strength, alone.strength, rtol=1e-9)
    assert (whole.points == alone.points).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(dtype):
    net, image, offset, mask = passed(2)
    expected = sampling_locations(traced(net, image, offset.to(dtype).double(), mask), "head").strength
    low = [t.to(dtype) for t in (image, offset, mask)]
    found = sampling_locations(traced(net.to(dtype), *low), "head")
    allowed = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    assert found.strength.dtype == np.float64
    assert abs(found.strength.sum() - expected.sum()) < allowed * expected.sum()


def test_padding_of_another_kind():
    """Samples in the mirrored rim are kept where they are: outside the image."""
    torch.manual_seed(0)
    layer = DeformConv2d(1, 1, 3, padding=1, padding_mode="reflect")
    found = sampling_locations(traced(layer, torch.rand(1, 1, 6, 6)), "", unit=(0, 5))
    assert (found.points == regular_points((6, 6), 3, padding=1)[:, :, 0, 5]).all()


class Overwriting(nn.Module):
    """A net that changes in place what a deformable layer got and gave, once that is no longer needed."""

    def __init__(self, *, overwrites):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layer = nn.Conv2d(1, 2, 3, padding=1), DeformConv2d(2, 2, 3, padding=1, predict_offsets=False)
        self.overwrites = overwrites

    def forward(self, x, offset):
        x, offset = self.stem(x), offset + 0.0
        y = self.layer(x, offset)
        if self.overwrites:
            with torch.no_grad():
                x.zero_(), offset.zero_()
            return y.mul_(2)
        return 2 * y


def test_what_a_model_overwrites_later_is_seen_as_it_was():
    image, offset = torch.rand(1, 1, 8, 8), torch.rand(1, 18, 8, 8)
    found = [
        sampling_locations(traced(Overwriting(overwrites=overwrites), image, offset), "", unit=(4, 4), of="layer")
        for overwrites in (False, True)
    ]
    assert (found[0].strength == found[1].strength).all() and (found[0].points == found[1].points).all()


def test_a_model_that_computes_in_half_precision_by_itself():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), DeformConv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3))
    nn.init.normal_(net[1].offset_conv.weight, std=0.3)
    image = torch.randn(1, 2, 20, 20)
    whole = sampling_locations(traced(net, image), "2")

    def lowered(module, args):
        return tuple(t.bfloat16() for t in args)

    net.bfloat16().register_forward_pre_hook(lowered)
    found = sampling_locations(traced(net, image), "2")
    assert len(found.points) == len(whole.points) and abs(found.strength.sum() / whole.strength.sum() - 1) < 0.1


class Severed(nn.Module):
    """A deformable layer whose output goes on without its graph."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = DeformConv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.head(self.layer(x).detach() + x)


def test_what_cannot_be_answered_is_explained():
    net, image = stack()
    trace = traced(net, image)
    with pytest.raises(ValueError, match=r"`channels` is 0; expected an integer of at least 1"):
        sampling_locations(trace, "0", channels=0)
    with pytest.raises(ValueError, match=r"no deformable layer '1' was recorded; the layers that were called are '0', '2'"):
        sampling_locations(trace, "4", of="1")
    with pytest.raises(ValueError, match=r"layer '0' depends on no call of layer `of`, '2' by .* Up to there, these ran: '0'"):
        sampling_locations(trace, "0", of="2")
    before = nn.Sequential(nn.Conv2d(3, 3, 1), DeformConv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"layer '0' depends on no deformable layer .* these ran: none"):
        sampling_locations(traced(before, image), "0")
    with pytest.raises(ValueError, match=r"layer 'head' depends on no deformable layer .* these ran: 'layer'"):
        sampling_locations(traced(Severed(), torch.rand(1, 1, 8, 8)), "head")
    image[0, 0, 6, 6] = math.nan
    with pytest.raises(ValueError, match=r"the gradient of unit .* of layer '4' has \d+ of .* that are NaN or infinite"):
        sampling_locations(traced(net, image), "4")


def test_a_unit_that_nothing_moves_has_no_locations():
    net = nn.Sequential(DeformConv2d(1, 2, 3), nn.ReLU())
    nn.init.constant_(net[0].bias, -100)
    found = sampling_locations(traced(net, torch.rand(1, 1, 8, 8)), "1", unit=(2, 2))
    assert found.points.shape == (0, 2) and found.units.shape == (0, 2) and found.strength.shape == (0,)
    assert repr(found) == "SamplingLocations of layer '1', unit (2, 2) at image pixel (3.0, 3.0): 0 samples of layer '0'"


def test_doctests():
    result = doctest.testmod(locations)
    assert result.attempted > 3 and result.failed == 0
