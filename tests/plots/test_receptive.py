"""Receptive fields against finite differences, plain convolutions and hand-made fields."""

import copy
import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from deformconv.plots import receptive
from deformconv.plots.gradients import sums_of
from deformconv.plots.receptive import averaged, centroid_of, radius_of, receptive_field
from deformconv.plots.recording import record
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d

LAYERS = {1: (DeformConv1d, nn.Conv1d), 2: (DeformConv2d, nn.Conv2d), 3: (DeformConv3d, nn.Conv3d)}
SIZES = {1: (11,), 2: (7, 8), 3: (4, 5, 5)}


def small_net(rank, colours=2, dtype=torch.float64, spread=0.3):
    """A stem of stride 2, batch normalisation with statistics of its own, a deformable layer in groups, and one on top."""
    torch.manual_seed(rank)
    deformable, plain = LAYERS[rank]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](4)
    net = nn.Sequential(
        plain(colours, 4, 3, stride=2, padding=1), norm, nn.Tanh(), deformable(4, 4, 3, padding=1, offset_groups=2), nn.Tanh(),
        deformable(4, 3, 2, modulated=False),
    ).to(dtype)  # fmt: skip
    for name, parameter in net.named_parameters():
        if "offset_conv" in name:
            nn.init.normal_(parameter, std=spread)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return net.eval(), torch.randn(1, colours, *SIZES[rank], dtype=dtype)


def traced(net, *args):
    with record(net) as trace, torch.no_grad():
        net(*args)
    return trace


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_field_is_what_finite_differences_say(rank):
    """Of the whole net, where a pixel works through the offsets and masks as well."""
    net, image = small_net(rank)
    unit = {1: (3,), 2: (1, 2), 3: (0, 1, 1)}[rank]
    found = receptive_field(traced(net, image), "5", unit=unit)
    step = 1e-6
    moves = step * torch.eye(image.numel(), dtype=image.dtype).reshape(-1, *image.shape[1:])
    with torch.no_grad():
        cell = (slice(None), slice(None), *unit)
        slopes = (net(image + moves)[cell] - net(image - moves)[cell]) / (2 * step)  # (pixels, channels)
    square = slopes.square().mean(1).reshape(image.shape[1:]).sum(0)
    assert found.field.dtype == np.float64
    np.testing.assert_allclose(found.field, square.sqrt(), atol=1e-7 * float(square.max()) ** 0.5)
    assert found.field.max() > 0.01


def test_zero_offsets_give_the_field_of_the_plain_net():
    net, image = small_net(2, spread=0)
    plain = copy.deepcopy(net)
    for name in ("3", "5"):
        ours = net[int(name)]
        other = nn.Conv2d(ours.in_channels, ours.out_channels, ours.kernel_size, padding=ours.padding, dtype=torch.float64)
        other.load_state_dict(ours.state_dict(), strict=False)
        plain[int(name)] = other
    image.requires_grad_()
    response = plain(image)[0, :, 2, 1]
    slopes = torch.stack([torch.autograd.grad(one, image, retain_graph=True)[0][0] for one in response])
    found = receptive_field(traced(net, image.detach()), "5", unit=(2, 1))
    np.testing.assert_allclose(found.field, slopes.square().mean(0).sum(0).sqrt(), atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_layer_of_ones_has_exactly_the_plain_window(rank):
    layer = LAYERS[rank][0](1, 1, 3, stride=2, padding=1, dilation=2)
    nn.init.ones_(layer.weight)
    found = receptive_field(traced(layer, torch.rand(1, 1, *(9,) * rank)), "", unit=(1,) * rank)
    expected = np.zeros((9,) * rank)
    expected[(slice(1, 6, 2),) * rank] = 1  # 1*2 - 1 + 2*{0, 1, 2}
    assert (found.field == expected).all()
    assert found.at == found.centroid == (3.0,) * rank
    assert found.radius == pytest.approx({1: 1.5, 2: math.sqrt(9 / math.pi), 3: (27 * 3 / (4 * math.pi)) ** (1 / 3)}[rank])


def test_it_is_the_root_mean_square_over_channels_of_the_length_over_colours():
    layer = DeformConv2d(3, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2, 2], [0, 4, 3]]).reshape(2, 3, 1, 1))
    found = receptive_field(traced(layer, torch.rand(1, 3, 4, 5)), "", at=(2, 3))
    assert np.argwhere(found.field).tolist() == [[2, 3]]
    assert found.field[2, 3] == pytest.approx(math.sqrt((9 + 25) / 2))


def test_random_sums_estimate_the_mean_over_channels():
    numbers = np.random.default_rng(0).normal(size=64) * np.linspace(0, 2, 64)
    expected = (numbers**2).mean()
    for limit in (64, 100):
        signs, share = sums_of(64, limit, seed=0)
        assert len(signs) == 64 and share * ((signs @ numbers) ** 2).sum() == pytest.approx(expected)
    found = []
    for seed in range(400):
        signs, share = sums_of(64, 8, seed)
        assert signs.shape == (8, 64)
        found.append(share * ((signs @ numbers) ** 2).sum())
    assert np.std(found) <= 1.1 * math.sqrt(2 / 8) * expected
    assert np.mean(found) == pytest.approx(expected, rel=4 * math.sqrt(2 / 8 / 400))


def test_a_unit_of_many_channels_takes_as_many_gradients_as_asked(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(DeformConv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 64, 3, padding=1))
    trace = traced(net, torch.rand(1, 3, 9, 9))
    trace.output_geometry("2")  # by gradients, once
    taken = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: taken.append(1) or grad(*args, **kwargs))
    exact = receptive_field(trace, "2", channels=64)
    assert len(taken) == 64
    taken.clear()
    estimates = [receptive_field(trace, "2", channels=12, seed=seed) for seed in range(6)]
    assert len(taken) == 6 * 12
    assert ((exact.field == 0) == (estimates[0].field == 0)).all()
    mean = np.mean([one.field**2 for one in estimates], 0)
    assert np.abs(mean - exact.field**2).sum() < 0.3 * (exact.field**2).sum()
    assert (receptive_field(trace, "2", channels=12, seed=3).field == estimates[3].field).all()
    assert (estimates[0].field != estimates[1].field).any()


def test_fields_of_several_units_are_moved_onto_the_first():
    layer = DeformConv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 10).reshape(1, 1, 3, 3))
    trace = traced(layer, torch.rand(1, 1, 8, 9))
    one = receptive_field(trace, "", unit=(3, 4))
    several = receptive_field(trace, "", unit=[(3, 4), (5, 2), (2, 6)])
    np.testing.assert_allclose(several.field, one.field)
    assert several.units == ((3, 4), (5, 2), (2, 6)) and several.unit == (3, 4) and several.at == (3, 4)
    by_position = receptive_field(trace, "", [(3.2, 4), (5, 1.8), (2, 6)])
    assert (by_position.field == several.field).all() and by_position.units == several.units
    # The first row of the corner's window is outside the image: there only the first unit counts.
    with_corner = receptive_field(trace, "", at=[(3, 4), (0, 0)])
    np.testing.assert_allclose(with_corner.field, one.field)
    assert "the mean of 3 units" in repr(several) and "mean" not in repr(one)


def test_a_pixel_has_the_mean_of_the_fields_that_reach_it():
    random = np.random.default_rng(0)
    fields = [random.random((4, 5)) for _ in range(4)]
    shifts = [np.array(shift) for shift in ((0, 0), (1, -2), (-3, 4), (7, 0))]
    found = averaged(fields, shifts)
    for row, column in itertools.product(range(4), range(5)):
        here = [
            field[row - down, column - right]
            for field, (down, right) in zip(fields, shifts, strict=True)
            if 0 <= row - down < 4 and 0 <= column - right < 5
        ]
        assert found[row, column] == pytest.approx(np.mean(here))


def test_radius_and_centroid_of_fields_made_by_hand():
    field = np.zeros((20, 30))
    assert radius_of(field) == 0 and all(map(math.isnan, centroid_of(field)))
    y, x = np.indices(field.shape)
    disc = ((y - 9) ** 2 + (x - 17) ** 2 <= 36).astype(float)
    assert radius_of(disc) == pytest.approx(6, abs=0.1)
    assert centroid_of(disc) == pytest.approx((9, 17))
    field[2, 3], field[2, 4], field[10, 10] = 2.0, 2 * 0.0456, 2 * 0.0454  # 4.55 % of the maximum lies between
    assert radius_of(field) == pytest.approx(math.sqrt(2 / math.pi))
    assert radius_of(np.array([0.0, 1, 1, 1, 0, 1])) == 2
    assert radius_of(np.ones((3, 4, 5))) == pytest.approx((60 * 0.75 / math.pi) ** (1 / 3))
    assert centroid_of(np.array([3.0, 0, 0, 0, 4])) == pytest.approx((64 / 25,))
    assert centroid_of(np.full((3, 3), 1e300)) == pytest.approx((1, 1))


def test_a_unit_that_nothing_moves_has_a_field_of_0():
    net = nn.Sequential(DeformConv2d(1, 2, 3), nn.ReLU())
    nn.init.constant_(net[0].bias, -100)
    found = receptive_field(traced(net, torch.rand(1, 1, 8, 8)), "1")
    assert not found.field.any() and found.radius == 0 and all(map(math.isnan, found.centroid))


def test_what_a_model_is_does_not_matter_and_stays():
    """Frozen or not, in training or not, the same field; parameters' gradients, modes and statistics stay as they were."""
    net, image = small_net(2)
    trace = traced(net, image)
    expected = receptive_field(trace, "5").field
    statistics = copy.deepcopy(net[1].state_dict())
    net.train()
    net[3].eval()
    modes = [module.training for module in net.modules()]
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        assert (receptive_field(trace, "5").field == expected).all()
        with torch.no_grad():
            assert (receptive_field(trace, "5").field == expected).all()
    assert [module.training for module in net.modules()] == modes
    assert all((parameter.grad == 1).all() for parameter in net.parameters())
    assert all((value == statistics[name]).all() for name, value in net[1].state_dict().items())


def test_an_image_of_a_batch_has_the_field_that_it_has_alone():
    net, _ = small_net(2, colours=3)
    images = torch.randn(3, 3, 7, 8, dtype=torch.float64)
    of_batch = receptive_field(traced(net, images), "5", image=2).field
    np.testing.assert_allclose(of_batch, receptive_field(traced(net, images[2:]), "5").field, atol=1e-12)
    assert np.abs(of_batch - receptive_field(traced(net, images), "5", image=0).field).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(dtype):
    exact, image = small_net(2)
    field = receptive_field(traced(exact, image), "5").field
    found = receptive_field(traced(exact.to(dtype), image.to(dtype)), "5").field
    assert found.dtype == np.float64
    allowed = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    assert np.abs(found - field).max() < allowed * field.max()


def test_calls_of_a_shared_layer_are_told_apart():
    layer = DeformConv2d(1, 1, 3, padding=1)
    nn.init.ones_(layer.weight)
    trace = traced(nn.Sequential(layer, nn.Tanh(), layer), torch.rand(1, 1, 9, 9))
    widths = [np.ptp(np.argwhere(receptive_field(trace, "0", at=(4, 4), index=index).field), 0).tolist() for index in (0, 1)]
    assert widths == [[2, 2], [4, 4]]


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = DeformConv2d(1, 1, 3)

    def forward(self, x):
        return self.layer(x.detach())


def test_what_cannot_be_answered_is_explained():
    net, image = small_net(2)
    trace = traced(net, image)
    for channels in (0, 2.5, True):
        with pytest.raises(ValueError, match=r"`channels` is .*; expected an integer of at least 1"):
            receptive_field(trace, "5", channels=channels)
    with pytest.raises(ValueError, match="`at` is an empty list"):
        receptive_field(trace, "5", at=[])
    for several in ({"at": [(1, 1)], "unit": (1, 1)}, {"at": (1, 1), "unit": [(1, 1)]}, {"at": (1, 1), "unit": (1, 1)}):
        with pytest.raises(ValueError, match="`at` and `unit` were both passed"):
            receptive_field(trace, "5", **several)
    with pytest.raises(ValueError, match=r"`unit` is \(9, 0\)"):
        receptive_field(trace, "5", unit=[(0, 0), (9, 0)])
    image[0, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match=r"gradient of unit .* of layer '5' has \d+ of 56 numbers that are NaN or infinite"):
        receptive_field(traced(net, image), "5")
    with pytest.raises(ValueError, match=r"differentia"):
        receptive_field(traced(Detached(), torch.rand(1, 1, 8, 8)), "layer", unit=(0, 0))


def test_it_can_be_read():
    layer = DeformConv2d(1, 1, 3)
    nn.init.ones_(layer.weight)
    found = receptive_field(traced(layer, torch.rand(1, 1, 8, 8)), "", unit=(2, 3))
    assert repr(found) == (
        "ReceptiveField of layer '', unit (2, 3) at image pixel (3.0, 4.0): radius 1.7 px, centroid (3.0, 4.0)"
    )


def test_doctests():
    result = doctest.testmod(receptive)
    assert result.attempted > 3 and result.failed == 0
