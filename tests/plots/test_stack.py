"""Points of units through one to three layers: against a path-by-path enumeration, and where arithmetic says they are."""

from __future__ import annotations

import doctest
from itertools import product
from math import floor, prod

import numpy as np
import pytest
import torch
from tests.plots.plain_trace import Geometry, Trace, call, output_geometry, plain
from torch import nn

from deformconv.errors import ShapeError
from deformconv.plots import stack
from deformconv.plots.recording import record
from deformconv.plots.stack import unit_points
from deformconv.torch import DeformConv2d


def neighbours(position, size):
    """The units around a position that are on the map, with their weights."""
    found = []
    for corner in product((0, 1), repeat=len(size)):
        unit = tuple(floor(p) + c for p, c in zip(position, corner, strict=True))
        weight = prod((p - floor(p)) if c else 1 - (p - floor(p)) for p, c in zip(position, corner, strict=True))
        if weight and all(0 <= u < n for u, n in zip(unit, size, strict=True)):
            found.append((unit, weight))
    return found


def paths(trace, names, position, weight, scale, groups):
    """Every path from a position on the first layer's output: the rule in words, one path after the other."""
    call, geometry = trace[names[0]], trace.geometry(names[0])
    axes = range(call.D)
    offset = call.offset[0].reshape(call.offset_groups, call.K, call.D, *call.output_size)
    mask = None if call.mask is None else call.mask[0].reshape(call.offset_groups, call.K, *call.output_size)
    around = neighbours(position, call.output_size)
    share = sum(w for _, w in around)
    if not share:
        return
    for group, (tap, place) in product(groups[0], enumerate(product(*map(range, call.kernel_size)))):
        sample, masked = [0.0] * call.D, 0.0
        for unit, w in around:
            for a in axes:
                read = unit[a] * call.stride[a] - call.padding[a][0] + place[a] * call.dilation[a]
                read += scale * float(offset[(group, tap, a, *unit)])
                sample[a] += w / share * read
            masked += w * (1.0 if mask is None else float(mask[(group, tap, *unit)]))
        pixel = [geometry.origin[a] + geometry.step[a] * sample[a] for a in axes]
        if len(names) == 1:
            yield pixel, weight * masked * sum(w for _, w in neighbours(sample, call.input_size))
        else:
            there = trace.output_geometry(names[1])
            cells = [(pixel[a] - there.origin[a]) / there.step[a] for a in axes]
            cells = [round(c) if abs(c - round(c)) < 1e-6 else c for c in cells]
            yield from paths(trace, names[1:], cells, weight * masked, scale, groups[1:])


def merged(found, D):
    """Points nearer than 1e-6 pixels as one: rows of position, weight and count, sorted by position."""
    rows = []
    for pixel, weight in found:
        for row in rows:
            if all(abs(a - b) < 1e-6 for a, b in zip(row[0], pixel, strict=True)):
                row[1] += weight
                row[2] += 1
                break
        else:
            rows.append([pixel, weight, 1])
    return sorted_rows(np.array([[*pixel, weight, count] for pixel, weight, count in rows]).reshape(-1, D + 2))


def sorted_rows(rows):
    return rows[np.lexsort(np.round(rows, 5).T[::-1])]


def rows_of(view):
    return sorted_rows(np.column_stack([view.points, view.weights, view.counts]))


def random_net(seed):
    """One to three layers with random windows, offsets and masks, some with a pooling of pairs after the first."""
    random = np.random.default_rng(seed)
    D, layers = 1 + seed % 3, 1 + seed // 3 % 3

    def draw(low, high):
        return tuple(map(int, random.integers(low, high, D)))

    size, calls, geometries = draw(22, 27) if D < 3 else draw(16, 19), [], []
    geometry = Geometry(tuple(random.uniform(-3, 3, D)), tuple(random.uniform(0.5, 3, D)))
    for name in range(layers):
        kernel = draw(1 + (seed % 4 > 0), 4) if D < 3 else draw(1, 3)
        padding = tuple(zip(draw(name > 0, 3), draw(name > 0, 3), strict=True))
        stride = draw(1, 3) if name == 0 else (1,) * D
        window = kernel, stride, padding, draw(1, 3)
        groups = int(random.integers(1, 3)) if layers < 3 else 1
        calls.append(call(str(name), size, *window, groups, modulated=bool(random.integers(4)), random=random))
        geometries.append(geometry)
        size, geometry = calls[-1].output_size, output_geometry(calls[-1], geometry)
        if not name and random.integers(2):  # a pooling of pairs, whose cells lie between two pixels
            size = tuple(-(-n // 2) for n in size)
            step = tuple(2 * s for s in geometry.step)
            geometry = Geometry(tuple(o + s / 2 for o, s in zip(geometry.origin, geometry.step, strict=True)), step)
    return Trace(calls, geometries), random


@pytest.mark.parametrize("seed", range(45))
def test_against_every_path_by_itself(seed):
    trace, random = random_net(seed)
    names = trace.layers[::-1]
    top = trace[names[0]]
    unit = tuple(int(random.integers(n)) if seed % 2 else n // 2 for n in top.output_size)
    scale = float(random.choice([0.3, 1.0, 1.6]))
    one = int(random.integers(top.offset_groups)) if seed % 5 == 0 else None
    groups = [range(trace[name].offset_groups) for name in names]
    if one is not None:
        groups[0] = [one]
    view = unit_points(trace, names[0], unit=unit, layers=len(names), offset_group=one, scale=scale)
    expected = merged(paths(trace, names, unit, 1.0, scale, groups), top.D)
    assert len(expected) == len(view.points)
    np.testing.assert_allclose(rows_of(view), expected, rtol=1e-9, atol=1e-9)
    for each in trace.calls:
        each.mask = None
    regular = merged(paths(trace, names, unit, 1.0, 0.0, groups), top.D)
    np.testing.assert_allclose(
        sorted_rows(np.column_stack([view.regular, view.regular_weights])), regular[:, :-1], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("layers", "points", "paths"), [(1, 9, 9), (2, 25, 81), (3, 49, 729)])
@pytest.mark.parametrize("modulated", [True, False])
def test_zero_offsets_give_the_windows_of_plain_convolutions(layers, points, paths, modulated):
    trace = plain((20, 30), 1, 1, 1, modulated=modulated)
    view = unit_points(trace, "2", at=(9, 12), layers=layers)
    assert view.layers == ("2", "1", "0")[:layers] and view.unit == (9, 12) and view.at == (9.0, 12.0)
    reach = range(-layers, layers + 1)
    assert view.points.tolist() == [[9 + y, 12 + x] for y in reach for x in reach] and len(view.points) == points
    # The number of ways to add up to a shift of so many steps of -1, 0, 1, along each axis.
    ways = np.ones(1)
    for _ in range(layers):
        ways = np.convolve(ways, np.ones(3))
    assert view.counts.tolist() == np.outer(ways, ways).ravel().tolist() and view.counts.sum() == paths
    assert view.weights.tolist() == view.counts.tolist()
    assert (view.regular == view.points).all() and (view.regular_weights == view.weights).all()


def test_strides_widen_the_window():
    trace = plain((21, 21), 2, 2, 1)
    view = unit_points(trace, "2", unit=(3, 2), layers=3)
    # A layer's windows reach 1, 2 and 4 pixels: stride 2 twice lies below the last one.
    along = np.add.outer(np.add.outer([-1, 0, 1], [-2, 0, 2]), [-4, 0, 4]).ravel()
    ends, ways = np.unique(along, return_counts=True)
    assert view.at == (12.0, 8.0)
    assert view.points.tolist() == [[12 + y, 8 + x] for y in ends for x in ends]
    assert view.counts.tolist() == np.outer(ways, ways).ravel().tolist()


def test_hand_set_offsets_move_their_paths_alone():
    trace = plain((20, 20), 1, 1)
    first, second = (trace[name].offset[0].reshape(9, 2, 20, 20) for name in "01")
    second[4, :, 8, 8] = torch.tensor([2.0, 3.0])  # the middle tap reads (10, 11) of the layer before
    second[0, :, 8, 8] = torch.tensor([0.5, 0.0])  # the first one the middle between (7, 7) and (8, 7)
    first[4, :, 10, 11] = torch.tensor([0.0, 0.25])  # whose middle tap reads (10, 11.25)
    first[8, :, 7, 7] = torch.tensor([1.0, 0.0])  # the interpolated offset is half of it
    trace["1"].mask[0, 4, 8, 8] = 0.5
    trace["0"].mask[0, 4, 10, 11] = 0.3
    trace["0"].mask[0, 8, 8, 7] = 0.0  # interpolated with the 1 of (7, 7)
    view = unit_points(trace, "1", unit=(8, 8), layers=2)
    found = {tuple(point): (weight, count) for *point, weight, count in rows_of(view).round(9)}
    assert found[10.0, 11.25] == (pytest.approx(0.5 * 0.3), 1)
    # From (7.5, 7) the last tap, half a pixel on; from (8, 7) one of mask 0; from (8, 9), (9, 7), (9, 8) and (9, 9) plain ones.
    assert found[7.5 + 1 + 0.5, 8.0] == (pytest.approx(0.5 + 0 + 4 * 1), 6)
    assert (11.0, 10.0) in found and (11.0, 12.0) in found and view.counts.sum() == 81
    plain_again = unit_points(trace, "1", unit=(8, 8), layers=2, scale=0)
    assert (plain_again.points == plain_again.regular).all() and len(plain_again.regular) == 25
    doubled = unit_points(trace, "1", unit=(8, 8), layers=1, scale=2)
    assert [12.0, 14.0] in doubled.points.tolist()


def test_samples_in_the_padding_keep_their_place_and_weigh_nothing():
    view = unit_points(plain((6, 6), 1), "0", at=(0, 5.2))
    assert view.unit == (0, 5)
    found = {tuple(point): weight for *point, weight, _ in rows_of(view)}
    assert len(found) == 9
    assert found == {(y, x): float(y >= 0 and x <= 5) for y in (-1.0, 0.0, 1.0) for x in (4.0, 5.0, 6.0)}


def test_samples_in_padding_of_another_mode_weigh_as_others():
    trace = plain((6, 6), 1)
    trace["0"].padding_mode = "reflect"
    assert unit_points(trace, "0", unit=(0, 0)).weights.tolist() == [1.0] * 9
    trace["0"].offset[0, 0, 0, 0] = -0.5  # half of what the first tap reads lies beyond the padding
    assert sorted(unit_points(trace, "0", unit=(0, 0)).weights.tolist()) == [0.5] + [1.0] * 8


def test_paths_end_where_the_map_before_does():
    """Of the corner's 9 samples 4 are units of the layer before; of theirs, points in the padding are kept."""
    view = unit_points(plain((8, 8), 1, 1), "1", unit=(0, 0), layers=2)
    assert view.counts.sum() == 4 * 9
    assert view.points.min() == -1 and view.points.max() == 2
    assert view.weights.sum() == 5 * 5  # along each axis units 0 and 1 read -1, 0, 1 and 0, 1, 2, of which five are pixels


def test_a_sample_half_outside_weighs_half_and_takes_the_window_of_its_neighbour_inside():
    trace = plain((9, 9), 1, 1)
    trace["1"].offset[0].reshape(9, 2, 9, 9)[1, :, 0, 4] = torch.tensor([0.5, 0.0])  # from row -1 to -0.5
    trace["0"].offset[0].reshape(9, 2, 9, 9)[8, :, 0, 4] = torch.tensor([0.0, 3.0])
    kept = unit_points(trace, "1", unit=(0, 4), layers=2)
    trace["1"].offset.zero_()
    without = unit_points(trace, "1", unit=(0, 4), layers=2)
    assert kept.counts.sum() == without.counts.sum() + 9
    weights = {tuple(point): weight for *point, weight, _ in rows_of(without)}
    more = {(*point,): weight - weights.get((*point,), 0) for *point, weight, _ in rows_of(kept)}
    window = {(y, x): 0.5 * (y >= 0) for y in (-1.0, 0.0, 1.0) for x in (3.0, 4.0, 5.0)}
    window[1.0, 8.0] = window.pop((1.0, 5.0))  # the interpolated offset is the neighbour's whole one
    assert {point: weight for point, weight in more.items() if weight} == {p: w for p, w in window.items() if w}


def test_of_several_offset_groups_one_or_all():
    random = np.random.default_rng(0)
    window = (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)
    geometry = Geometry((0.0, 0.0), (1.0, 1.0))
    made = [call("a", (9, 9), *window, 2, random=random), call("b", (9, 9), *window, 3, random=random)]
    trace = Trace(made, [geometry, geometry])
    views = [unit_points(trace, "b", unit=(4, 4), offset_group=group) for group in range(3)]
    whole = unit_points(trace, "b", unit=(4, 4))
    np.testing.assert_array_equal(rows_of(whole), sorted_rows(np.concatenate(list(map(rows_of, views)))))
    assert whole.regular_weights.tolist() == [3.0] * 9 and views[0].regular_weights.tolist() == [1.0] * 9
    assert unit_points(trace, "b", unit=(4, 4), layers=2, offset_group=1).regular_weights.sum() == 9 * 2 * 9
    with pytest.raises(ValueError, match="`offset_group` is 3; layer 'b' has 3 offset groups, counted from 0"):
        unit_points(trace, "b", offset_group=3)


def test_another_image_of_the_batch():
    random = np.random.default_rng(0)
    one = call("a", (7,), (3,), (1,), ((1, 1),), (1,), batch=2, modulated=False, random=random)
    trace = Trace([one], [Geometry((2.0,), (4.0,))])
    expected = [2.0 + 4.0 * (3 - 1 + tap + float(one.offset[1, tap, 3])) for tap in range(3)]
    assert unit_points(trace, "a", unit=(3,), image=1).points.ravel().tolist() == pytest.approx(sorted(expected))
    for image in (2, -1):
        with pytest.raises(ValueError, match=f"`image` is {image}; layer 'a' was called with 2 images, counted from 0"):
            unit_points(trace, "a", image=image)


def test_offsets_far_outside_and_not_finite():
    trace = plain((9, 9), 1, 1)
    offset = trace["1"].offset[0].reshape(9, 2, 9, 9)
    offset[0, 0, 4, 4], offset[1, 1, 4, 4], offset[2, 0, 4, 4] = torch.nan, torch.inf, 1e30
    view = unit_points(trace, "1", unit=(4, 4), layers=2)
    assert view.counts.sum() == 6 * 9
    far = unit_points(trace, "1", unit=(4, 4))
    assert far.counts.sum() == 7 and far.weights.sum() == 6
    offset[:, 0, 4, 4] = 100.0
    nowhere = unit_points(trace, "1", unit=(4, 4), layers=2)
    assert nowhere.points.shape == (0, 2) and nowhere.weights.shape == nowhere.counts.shape == (0,)
    assert len(nowhere.regular) == 25


def test_points_closer_than_a_millionth_of_a_pixel_are_one():
    trace = plain((9, 9), 1)
    offset = trace["0"].offset[0].reshape(9, 2, 9, 9)
    trace["0"].offset = offset.reshape(1, 18, 9, 9).double()
    offset = trace["0"].offset[0].reshape(9, 2, 9, 9)
    offset[3, 1, 4, 4] = 1 + 4e-7  # on the middle tap, and beyond the middle of two multiples of 1e-6 when rounded
    offset[4, 1, 4, 4] = 6e-7
    offset[5, 1, 4, 4] = -1 + 3e-6
    view = unit_points(trace, "0", unit=(4, 4))
    assert len(view.points) == 8 and sorted(view.counts.tolist()) == [1] * 7 + [2]


def test_what_cannot_be_shown_is_explained():
    trace = plain((9, 9), 1, 1)
    with pytest.raises(
        ValueError, match=r"`layers` is 3; layer '1' has 1 deformable layer before it .* \('0'\): expected at most 2"
    ):
        unit_points(trace, "1", layers=3)
    with pytest.raises(ValueError, match=r"`layers` is 2; layer '0' has 0 deformable layers before it .* \(none\)"):
        unit_points(trace, "0", layers=2)
    with pytest.raises(ShapeError, match="`layers` is 0; expected at least 1"):
        unit_points(trace, "0", layers=0)
    with pytest.raises(ValueError, match="`scale` is nan; expected a finite number"):
        unit_points(trace, "0", scale=float("nan"))
    deep = plain((5, 5, 5), 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="`layers` is 5: 27 x 27 x 27 x 27 x 27 = 14348907 paths; expected at most 2000000"):
        unit_points(deep, "4", layers=5)


def test_three_layers_over_three_axes():
    view = unit_points(plain((9, 9, 9), 1, 1, 1), "2", unit=(4, 4, 4), layers=3)
    assert len(view.points) == 7**3 and view.counts.sum() == view.weights.sum() == 27**3


def test_a_recorded_net():
    """Between the layers a pooling halves the map: a cell of the upper one lies between two of the lower one's units."""
    first, second = DeformConv2d(2, 2, 3, padding=1), DeformConv2d(2, 2, 3, padding=1)
    with record(net := nn.Sequential(first, nn.MaxPool2d(2), second).eval()) as trace:
        net(torch.rand(1, 2, 16, 16))
    view = unit_points(trace, "2", unit=(4, 4), layers=2)
    assert view.layers == ("2", "0") and view.at == (8.5, 8.5)
    along = np.add.outer([6.5, 8.5, 10.5], [-1, 0, 1]).ravel()
    ends, ways = np.unique(along, return_counts=True)
    assert view.points.tolist() == [[y, x] for y in ends for x in ends]
    assert view.weights == pytest.approx(np.outer(ways, ways).ravel())
    with pytest.raises(ValueError, match="no deformable layer '1' was recorded; the layers that were called are '0', '2'"):
        unit_points(trace, "1")


def test_examples():
    result = doctest.testmod(stack)
    assert result.attempted >= 7 and not result.failed
