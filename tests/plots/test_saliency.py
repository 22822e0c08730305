"""Saliency regions: errors measured again by hand, passes counted, patches that are known; and the search by itself."""

import doctest
import io
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from deformconv.plots import progress, saliency
from deformconv.plots.masking import cell_sizes, smallest_region
from deformconv.plots.receptive import receptive_field
from deformconv.plots.recording import record
from deformconv.plots.saliency import saliency_region
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d

LAYERS = {1: (DeformConv1d, nn.Conv1d), 2: (DeformConv2d, nn.Conv2d), 3: (DeformConv3d, nn.Conv3d)}
SIZES = {1: (60,), 2: (24, 32), 3: (8, 9, 10)}


def small_net(rank=2, colours=3, dtype=torch.float64):
    torch.manual_seed(rank)
    deformable, plain = LAYERS[rank]
    net = nn.Sequential(
        plain(colours, 4, 3, stride=2, padding=1), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](4), nn.ReLU(),
        deformable(4, 6, 3, padding=1), nn.ReLU(), plain(6, 20, 3, padding=1),
    ).to(dtype)  # fmt: skip
    nn.init.normal_(net[3].offset_conv.weight, std=0.3)
    nn.init.zeros_(net[5].bias)
    net[1].running_mean.uniform_(-0.5, 0.5)
    return net.eval(), torch.randn(1, colours, *SIZES[rank], dtype=dtype)


def traced(net, *args):
    with record(net) as trace, torch.no_grad():
        net(*args)
    return trace


def error_by_hand(net, image, region, fill, unit):
    """||y(masked) - y|| / ||y|| of a net's output unit, written anew."""
    masked = image.clone()
    for channel, value in enumerate(fill):
        masked[0, channel][torch.from_numpy(~region)] = float(value)
    with torch.no_grad():
        whole, found = (net(x)[(0, slice(None), *unit)].double() for x in (image, masked))
    return ((found - whole).square().sum() / whole.square().sum()).sqrt().item()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bound", [0.02, 0.2])
def test_the_bound_holds_for_the_region_and_fails_with_the_last_step_undone(rank, bound):
    net, image = small_net(rank)
    unit = {1: (12,), 2: (5, 7), 3: (2, 2, 2)}[rank]
    found = saliency_region(traced(net, image), "5", unit=unit, bound=bound, max_passes=60)
    fill = image.mean(tuple(range(2, image.ndim)))[0]
    assert error_by_hand(net, image, found.region, fill, unit) == pytest.approx(found.error, rel=1e-9)
    assert error_by_hand(net, image, found.undone, fill, unit) == pytest.approx(found.error_undone, rel=1e-9)
    assert found.error <= bound < found.error_undone
    assert not (found.undone & ~found.region).any() and found.undone.sum() < found.region.sum()
    assert found.region.shape == image.shape[2:] and found.region.dtype == bool
    assert found.share == found.region.mean() < (1 if rank == 3 else 0.5)  # a unit sees most of so few voxels
    field = receptive_field(traced(net, image), "5", unit=unit).field
    assert found.region[field > 0].sum() > 0.9 * found.region.sum()  # pixels may change what is masked, beside the field itself


@pytest.mark.parametrize("passes", [2, 3, 4, 5, 9, 30, 60])
def test_the_model_is_run_on_no_more_images_than_allowed(passes):
    net, image = small_net()
    trace = traced(net, image)
    trace.output_geometry("5")
    images = []
    with torch.no_grad():
        net[0].register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    found = saliency_region(trace, "5", max_passes=passes, bound=0.05)
    assert sum(images) == found.passes <= passes
    assert 0.9 * passes - 1 < found.passes  # what is left would not do for another round
    assert found.error <= 0.05 < found.error_undone
    assert found.region.all() == (passes < 4)


def test_more_passes_find_a_smaller_region():
    net, image = small_net()
    trace = traced(net, image)
    shares = [saliency_region(trace, "5", max_passes=passes, bound=0.1).share for passes in (5, 20, 80)]
    assert all(later <= before for before, later in pairwise(shares)) and shares[-1] < 0.6 * shares[0]


@pytest.mark.parametrize("shift", [(0, 0), (4, -3)])
def test_a_unit_that_looks_at_a_known_patch_alone(shift):
    """The picture is black but for a patch and for what lies outside the unit's window, wherever the offsets move that."""
    layer = DeformConv2d(1, 2, 5, padding=2, predict_offsets=False)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1)
    offset = torch.tensor(shift, dtype=torch.float).repeat(25).reshape(1, 50, 1, 1).expand(1, 50, 20, 20)
    image = torch.rand(1, 1, 20, 20) + 0.5
    top, left = 9 - 2 + shift[0], 11 - 2 + shift[1]
    image[..., top : top + 5, left : left + 5] = 0
    patch = np.zeros((20, 20), bool)
    patch[top + 1 : top + 4, left + 2 : left + 4] = True
    image[..., torch.from_numpy(patch)] = 2.0
    found = saliency_region(traced(layer, image, offset), "", unit=(9, 11), bound=1e-3, fill=0.0, cell=1)
    assert (found.region == patch).all()
    assert found.at == (9, 11) and found.undone.sum() == patch.sum() - 1


def test_of_bound_0_the_region_is_what_the_unit_can_see():
    torch.manual_seed(0)
    layer = DeformConv2d(1, 3, 3, padding=1)
    found = saliency_region(traced(layer, torch.rand(1, 1, 12, 14)), "", unit=(5, 6), bound=0, cell=1)
    window = np.zeros((12, 14), bool)
    window[4:7, 5:8] = True
    assert (found.region == window).all() and found.error == 0 < found.error_undone


def test_where_nothing_is_enough_the_region_is_empty():
    net, image = small_net()
    trace = traced(net, image)
    for bound in (1e6, math.inf):
        found = saliency_region(trace, "5", bound=bound)
        assert not found.region.any() and found.share == 0 and found.passes == 2
        assert 0 < found.error <= bound and found.undone is None and found.error_undone is None
    constant = torch.full_like(image, 0.1) + torch.tensor([0.0, 0.2, 0.3]).reshape(1, 3, 1, 1)
    for picture in (constant, constant.float()):
        found = saliency_region(traced(net.to(picture.dtype), picture), "5", bound=0)
        assert not found.region.any() and found.error == 0


def test_a_picture_that_cannot_be_left_out():
    """A picture of one pixel, and one of which every pixel counts as much as all others."""
    layer = DeformConv2d(1, 1, 1, bias=False)
    found = saliency_region(traced(layer, torch.ones(1, 1, 1, 1)), "", fill=0)
    assert found.region.all() and found.error == 0 and not found.undone.any() and found.error_undone == pytest.approx(1)
    layer = DeformConv2d(1, 1, 5, bias=False)
    nn.init.ones_(layer.weight)
    found = saliency_region(traced(layer, torch.ones(1, 1, 5, 5)), "", fill=0, bound=0.03)
    assert found.region.all() and found.undone.sum() == 24 and found.error_undone == pytest.approx(1 / 25)


def test_what_masks_the_image():
    net, image = small_net(dtype=torch.float32)
    trace = traced(net, image)
    trace.output_geometry("5")
    seen = []
    handle = net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    mean = [image[0, channel].mean().item() for channel in range(3)]
    for fill, expected in (("mean", mean), (0.25, [0.25] * 3), (2, [2.0] * 3), ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])):
        seen.clear()
        saliency_region(trace, "5", fill=fill, max_passes=10)
        assert (seen[0] == image).all()  # the first is the image, the second nothing of it
        np.testing.assert_allclose(seen[1][0].flatten(1), np.tile(np.array(expected)[:, None], 24 * 32), rtol=1e-5)
        for masked in seen[2:]:
            kept = (masked == image).all(1, keepdim=True)
            np.testing.assert_allclose(masked, torch.where(kept, image, seen[1]))
    handle.remove()


def test_the_mean_of_a_constant_is_the_constant():
    """A sum of the same number is rounded, and its mean is not always that number."""
    random = np.random.default_rng(0)
    for dtype in (torch.float64, torch.float32, torch.float16):
        for size in ((7, 11), (3, 5)):
            value = torch.from_numpy(random.random((1, 40, 1, 1))).to(dtype)
            assert (saliency._filling("mean", value.expand(1, 40, *size)) == value).all()


def test_cells_are_put_in_order_by_what_masking_them_changes(monkeypatch):
    """Exact for a layer that is linear, as one with offsets 0 is."""
    torch.manual_seed(0)
    layer = DeformConv2d(2, 3, 3, padding=1).double()
    image = torch.rand(1, 2, 6, 7, dtype=torch.float64)
    taken = []

    def search(measure, effects, size, **how):
        region = np.ones(size, bool)
        region[2, 3] = region[3, 3] = False
        taken.append((region, *effects(region)))
        raise InterruptedError

    monkeypatch.setattr(saliency, "smallest_region", search)
    with pytest.raises(InterruptedError):
        saliency_region(traced(layer, image), "", unit=(2, 2), fill=0.3)
    (region, *effects), *_ = taken

    def response(kept):
        return layer(torch.where(torch.from_numpy(kept), image, 0.3))[0, :, 2, 2].detach().numpy()

    for cell in np.ndindex(6, 7):
        fewer = region.copy()
        fewer[cell] = False
        found = [effect[cell] if region[cell] else 0 for effect in effects]
        np.testing.assert_allclose(found, response(region) - response(fewer), atol=1e-12)


class Normalised(nn.Module):
    """Has no number for a black image."""

    def __init__(self):
        super().__init__()
        self.layer = DeformConv2d(1, 2, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.layer(x)
        return y / y.square().sum(1, keepdim=True).sqrt()


def test_a_response_that_is_no_number_is_far_off():
    found = saliency_region(traced(Normalised(), torch.rand(1, 1, 8, 8)), "", unit=(4, 4), fill=0, max_passes=40)
    assert found.error <= 0.1 and 0 < found.share < 0.2
    found = saliency_region(traced(Normalised(), torch.rand(1, 1, 8, 8)), "", unit=(4, 4), fill=0, max_passes=2)
    assert found.error_undone == math.inf


@pytest.mark.parametrize("cell", [1, 3, 8, 100])
def test_regions_are_made_of_cells(cell):
    net, image = small_net()
    region = saliency_region(traced(net, image), "5", cell=cell, max_passes=60).region
    for row in range(0, 24, cell):
        for column in range(0, 32, cell):
            part = region[row : row + cell, column : column + cell]
            assert part.all() or not part.any()


def test_any_module_and_any_call_of_a_shared_one():
    layer = DeformConv2d(1, 1, 3, padding=1)
    nn.init.ones_(layer.weight)
    net = nn.Sequential(layer, nn.Tanh(), layer, nn.Flatten())
    trace = traced(net, torch.rand(1, 1, 12, 12))
    sides = []
    for name, index in (("0", 0), ("1", 0), ("0", 1)):
        found = saliency_region(trace, name, unit=(6, 6), index=index, bound=0, cell=1)
        assert found.region.sum() == np.prod(np.ptp(np.argwhere(found.region), 0) + 1)
        sides.append(int(found.region.sum()) ** 0.5)
    assert sides == [3, 3, 5]


def test_what_a_model_is_does_not_matter_and_stays():
    net, image = small_net()
    trace = traced(net, image)
    expected = saliency_region(trace, "5", max_passes=40)
    statistics = {name: value.clone() for name, value in net[1].state_dict().items()}
    net.train().requires_grad_(False)
    state = torch.get_rng_state()
    with torch.no_grad():
        found = saliency_region(trace, "5", max_passes=40)
    assert (found.region == expected.region).all() and found.error == expected.error
    assert (torch.get_rng_state() == state).all()
    assert all(module.training for module in net.modules())
    assert all((value == statistics[name]).all() for name, value in net[1].state_dict().items())


def test_an_image_of_a_batch_has_the_region_that_it_has_alone():
    net, _ = small_net()
    images = torch.rand(3, 3, 24, 32, dtype=torch.float64)
    of_batch = saliency_region(traced(net, images), "5", image=1, max_passes=40)
    alone = saliency_region(traced(net, images[1:2]), "5", max_passes=40)
    assert (of_batch.region == alone.region).all() and of_batch.error == pytest.approx(alone.error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(dtype):
    net, image = small_net(dtype=dtype, colours=1)
    found = saliency_region(traced(net, image), "5", unit=(5, 7), bound=0.2, max_passes=40)
    fill = [float(image.mean(dtype=torch.float64).to(dtype))]
    assert error_by_hand(net, image, found.region, fill, (5, 7)) == pytest.approx(found.error, rel=0.05)
    assert found.error <= 0.2 < found.error_undone and 0 < found.share < 0.5


def test_what_cannot_be_answered_is_explained():
    net, image = small_net()
    trace = traced(net, image)
    for bound in (-0.1, math.nan, True, "small"):
        with pytest.raises(ValueError, match=r"`bound` is .*; expected a number of at least 0"):
            saliency_region(trace, "5", bound=bound)
    for passes in (1, 2.5, True):
        with pytest.raises(
            ValueError, match=r"`max_passes` is .*; expected an integer of at least 2: of the image as it is and"
        ):
            saliency_region(trace, "5", max_passes=passes)
    for cell in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"`cell` is .*; expected an integer of at least 1: pixels"):
            saliency_region(trace, "5", cell=cell)
    for fill in ("median", [0.1, 0.2], math.nan, [[0.1, 0.2, 0.3]], None, ["a", "b", "c"]):
        with pytest.raises(ValueError, match=r"`fill` is .*; expected \"mean\", .* one for each of the image's 3 channels"):
            saliency_region(trace, "5", fill=fill)
    trace_of_nan = traced(net, torch.full_like(image, math.nan))
    nn.init.constant_(net[3].bias, -100)
    with pytest.raises(ValueError, match=r"the response of unit \(2, 2\) of layer '4' is 0 in all its 6 channels"):
        saliency_region(trace, "4", unit=(2, 2))
    with pytest.raises(ValueError, match=r"the response of unit .* of layer '1' is not finite"):
        saliency_region(trace_of_nan, "1", at=(3, 3))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("case", ["terminal", "pipe", "no rich", "not wanted"])
def test_a_bar_on_a_terminal_alone(case, monkeypatch):
    pytest.importorskip("rich")
    net, image = small_net()
    trace = traced(net, image)
    stream = io.StringIO() if case == "pipe" else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    if case == "no rich":
        monkeypatch.setattr(progress, "find_spec", lambda name: None)
    found = saliency_region(trace, "5", max_passes=20, progress=case != "not wanted")
    assert found.passes == 20
    written = stream.getvalue()
    if case != "terminal":
        assert written == ""
    else:
        assert "Masking" in written and "20/20" in written
        assert "\x1b[2K" in written.rpartition("20/20")[2]  # its line is erased in the end


def test_it_can_be_read():
    net, image = small_net()
    found = saliency_region(traced(net, image), "5", unit=(5, 7), max_passes=2)
    assert repr(found) == (
        "SaliencyRegion of layer '5', unit (5, 7) at image pixel (10.0, 14.0): 100.0% of the image leave an error of 0 "
        "(bound 0.1), found in 2 passes"
    )


def test_doctests():
    result = doctest.testmod(saliency)
    assert result.attempted > 3 and result.failed == 0


# The search by itself.


def test_cells_are_halved_down_to_the_finest():
    assert cell_sizes((40, 64), 1) == [8, 4, 2, 1]
    assert cell_sizes((40, 65), 1) == [16, 8, 4, 2, 1]
    assert cell_sizes((480, 640), 10) == [80, 40, 20, 10]
    assert cell_sizes((5, 8), 1) == [1] and cell_sizes((5, 8), 100) == [100]


class Measured:
    """Errors of regions by a rule, and how often they were asked for."""

    def __init__(self, error, effects):
        self.error_of, self.effects_of, self.asked = error, effects, 0

    def error(self, region):
        self.asked += 1
        return self.error_of(region)

    def effects(self, region):
        self.asked += 1
        return iter(self.effects_of(region))


@pytest.mark.parametrize("seed", range(30))
def test_a_search_keeps_its_promises_whatever_the_errors_are(seed):
    """Errors without any order, the same for the same region, and an order of cells that tells nothing."""
    random = np.random.default_rng(seed)
    size = tuple(random.integers(1, 20, random.integers(1, 4)))
    passes, bound, cell = int(random.integers(1, 60)), random.random(), int(random.integers(1, 4))

    def error(region):
        if region.all():
            return 0.0
        return 1.0 if not region.any() else np.random.default_rng([seed, *np.packbits(region)]).random()

    measured = Measured(error, lambda region: random.normal(size=(3, *size)))
    found = smallest_region(measured.error, measured.effects, size, bound=bound, passes=passes, cell=cell, at=(0,) * len(size))
    assert measured.asked <= passes
    assert error(found.region) == found.error <= bound
    assert error(found.undone) == found.error_undone > bound
    assert not (found.undone & ~found.region).any()


@pytest.mark.parametrize("needed", range(1, 17))
def test_the_step_is_one_cell_however_the_bisection_ends(needed):
    """A try of nothing, an order, and four tries among sixteen cells."""
    weights = np.arange(16.0, 0, -1)
    measured = Measured(lambda region: float(region[:needed].sum() < needed), lambda region: [weights])
    found = smallest_region(measured.error, measured.effects, (16,), bound=0.5, passes=6, cell=1, at=(0,))
    assert measured.asked <= 6
    assert np.flatnonzero(found.region).tolist() == list(range(needed))
    assert np.flatnonzero(found.undone).tolist() == list(range(needed - 1))


def test_an_effect_that_is_not_finite_comes_first():
    effect = np.arange(16.0)
    effect[3] = np.nan
    measured = Measured(lambda region: float(not region[3]), lambda region: [effect])
    found = smallest_region(measured.error, measured.effects, (16,), bound=0.5, passes=6, cell=1, at=(0,))
    assert np.flatnonzero(found.region).tolist() == [3]


def test_cells_are_near_by_their_middle():
    measured = Measured(lambda region: float(not region[5]), lambda region: [])
    found = smallest_region(measured.error, measured.effects, (16,), bound=0.5, passes=4, cell=4, at=(6.5,))
    assert np.flatnonzero(found.region).tolist() == [4, 5, 6, 7]


def test_where_errors_add_up_the_search_finds_the_smallest_region():
    """The effects are the errors: the most important pixels in order are the best that there is."""
    weights = np.random.default_rng(0).random((9, 11)) ** 3
    weights /= weights.sum()
    measured = Measured(lambda region: weights[~region].sum(), lambda region: [weights])
    found = smallest_region(measured.error, measured.effects, (9, 11), bound=0.2, passes=400, cell=1, at=(0, 0))
    fewest = int(np.searchsorted(np.cumsum(np.sort(weights.ravel())[::-1]), 0.8)) + 1
    assert fewest <= found.region.sum() <= 1.1 * fewest
    smallest = np.where(found.region, weights, np.inf).min()
    assert weights[~found.region].sum() + smallest > 0.2  # no single pixel can go
    assert found.region.sum() - found.undone.sum() == 1


def test_what_has_no_effect_is_kept_by_nearness():
    """A model without gradients on the way tells nothing: cells nearer to the unit come first."""
    needed = np.zeros((16, 16), bool)
    needed[6:10, 9:12] = True
    measured = Measured(lambda region: float((needed & ~region).any()), lambda region: [])
    found = smallest_region(measured.error, measured.effects, (16, 16), bound=0.5, passes=150, cell=1, at=(7.5, 10))
    assert (found.region == needed).all() and measured.asked <= 150
