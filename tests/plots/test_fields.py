"""Fields and statistics of offsets: against sums in plain Python, and hand-set offsets."""

from __future__ import annotations

import doctest
import json
from itertools import product
from math import sqrt

import numpy as np
import pytest
import torch
from tests.plots.plain_trace import Geometry, Trace, call, plain

from deformconv.plots import fields
from deformconv.plots.fields import offset_field, offset_statistics

WINDOWS = [
    ((11,), (3,), (2,), ((1, 0),), (2,)),
    ((7, 9), (3, 2), (1, 2), ((1, 2), (0, 1)), (1, 2)),
    ((5, 4, 6), (2, 1, 2), (1, 2, 1), ((1, 0), (0, 0), (2, 1)), (2, 1, 1)),
]


def made(window, modulated=True, groups=2, batch=2):
    D = len(window[0])
    one = call("a", *window, groups, batch=batch, modulated=modulated, random=np.random.default_rng(D))
    return Trace([one], [Geometry((0.5, 7.0, -2.0)[:D], (4.0, 2.0, 3.0)[:D])])


def samples(one, image, group, tap, unit):
    """A tap's offset, its sampling position, and its position without the offset, axis by axis."""
    place = np.unravel_index(tap, one.kernel_size)
    offset = one.offset.reshape(-1, one.offset_groups, one.K, one.D, *one.output_size)
    moved = [float(offset[(image, group, tap, axis, *unit)]) for axis in range(one.D)]
    base = [unit[a] * one.stride[a] - one.padding[a][0] + int(place[a]) * one.dilation[a] for a in range(one.D)]
    return moved, [b + m for b, m in zip(base, moved, strict=True)], base


def misses(position, size):
    return any(q <= -1 or q >= n for q, n in zip(position, size, strict=True))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("group", [None, 1])
def test_field_against_sums_unit_by_unit(window, group):
    trace = made(window)
    one, geometry = trace["a"], trace.geometry("a")
    field = offset_field(trace, "a", image=1, offset_group=group)
    mask = one.mask[1].reshape(2, one.K, *one.output_size)
    for unit in product(*map(range, one.output_size)):
        taps = list(product(range(2) if group is None else [group], range(one.K)))
        found = [samples(one, 1, *tap, unit) for tap in taps]
        pixels = [[m * s for m, s in zip(moved, geometry.step, strict=True)] for moved, _, _ in found]
        mean = [sum(axis) / len(taps) for axis in zip(*pixels, strict=True)]
        squares = [sum((p - m) ** 2 for p, m in zip(pixel, mean, strict=True)) for pixel in pixels]
        assert field.flow[(slice(None), *unit)].tolist() == pytest.approx(mean)
        assert field.spread[unit] == pytest.approx(sqrt(sum(squares) / len(taps)))
        assert field.outside[unit] == pytest.approx(sum(misses(q, one.input_size) for _, q, _ in found) / len(taps))
        assert field.mask[unit] == pytest.approx(sum(float(mask[(*tap, *unit)]) for tap in taps) / len(taps))
        middle = [
            o + s * (u * t - before + d * (k - 1) / 2)
            for o, s, u, t, (before, _), d, k in zip(
                geometry.origin, geometry.step, unit, one.stride, one.padding, one.dilation, one.kernel_size, strict=True
            )
        ]
        assert field.at[unit].tolist() == pytest.approx(middle)
        assert np.add(field.origin, np.multiply(field.step, unit)).tolist() == pytest.approx(middle)


@pytest.mark.parametrize("window", WINDOWS)
def test_statistics_against_sums_sample_by_sample(window):
    trace = made(window)
    one, step = trace["a"], trace.geometry("a").step
    (row,) = offset_statistics(trace).rows
    every = product(range(2), range(2), range(one.K), product(*map(range, one.output_size)))
    moved, positions, bases = zip(*(samples(one, *each) for each in every), strict=True)
    mean = [sum(axis) / len(moved) for axis in zip(*moved, strict=True)]
    variance = [sum((m - mean[a]) ** 2 for m in axis) / len(moved) for a, axis in enumerate(zip(*moved, strict=True))]
    assert row.layer == "a" and row.index == 0
    assert row.mean == pytest.approx(mean)
    assert row.mean_image == pytest.approx([m * s for m, s in zip(mean, step, strict=True)])
    assert row.deviation == pytest.approx(sqrt(sum(variance)))
    assert row.deviation_image == pytest.approx(sqrt(sum(v * s * s for v, s in zip(variance, step, strict=True))))
    assert row.largest == pytest.approx(max(abs(m) for sample in moved for m in sample))
    assert row.largest_image == pytest.approx(max(abs(m) * s for sample in moved for m, s in zip(sample, step, strict=True)))
    assert row.outside == pytest.approx(sum(misses(q, one.input_size) for q in positions) / len(positions))
    assert row.outside_regular == pytest.approx(sum(misses(q, one.input_size) for q in bases) / len(bases))
    assert 0 < row.outside_regular < 1 and row.outside != row.outside_regular
    assert row.mask_mean == pytest.approx(float(one.mask.mean()))
    counts, edges = row.mask_histogram
    masks = one.mask.flatten().tolist()
    assert edges[0] == 0 and edges[-1] == 2 and sum(counts) == len(masks)
    for n, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        assert n == sum(low <= m < high for m in masks)


def test_hand_set_offsets_flow_and_spread():
    trace = plain((8, 8), 2)
    offset = trace["0"].offset[0].reshape(9, 2, 4, 4)
    offset[:, 0, 1, 2], offset[:, 1, 1, 2] = 3.0, -1.5
    offset[0, 0, 3, 3], offset[8, 0, 3, 3] = -9.0, 9.0  # the first tap leaves the map, and so does the last
    field = offset_field(trace, "0")
    assert field.flow[:, 1, 2].tolist() == [3.0, -1.5] and field.spread[1, 2] == 0
    assert field.flow[:, 3, 3].tolist() == [0.0, 0.0] and field.spread[3, 3] == pytest.approx(sqrt(2 * 81 / 9))
    assert field.outside[0].tolist() == pytest.approx([5 / 9, 3 / 9, 3 / 9, 3 / 9])
    assert field.outside[3, 3] == pytest.approx(2 / 9) and field.outside[2, 2] == 0
    assert (field.mask == 1).all() and field.at[3, 1].tolist() == [6.0, 2.0] and field.step == (2.0, 2.0)


@pytest.mark.parametrize(("offset", "outside"), [(-1.0, 1), (-0.99, 0), (0.99, 0), (1.0, 1), (torch.inf, 1), (torch.nan, 1)])
def test_a_sample_is_outside_where_it_reads_no_pixel(offset, outside):
    one = call("a", (1,), (1,), (1,), ((0, 0),), (1,), modulated=False)
    one.offset.fill_(offset)
    trace = Trace([one], [Geometry((0.0,), (1.0,))])
    assert offset_field(trace, "a").outside.tolist() == [outside]
    assert offset_statistics(trace).rows[0].outside == outside


def test_padding_of_another_mode_is_read_as_the_map_is():
    trace = plain((8, 8), 1)
    trace["0"].padding_mode = "reflect"
    assert not offset_field(trace, "0").outside.any()
    trace["0"].offset[0, 0, 0, 0] = -0.99  # the first tap at row -1.99, where the padding begins at -1
    assert not offset_field(trace, "0").outside.any()
    trace["0"].offset[0, 0, 0, 0] = -1.0
    (row,) = offset_statistics(trace).rows
    assert row.outside == pytest.approx(1 / (9 * 64)) and row.outside_regular == 0


def test_layers_without_masks():
    trace = made(WINDOWS[1], modulated=False)
    assert offset_field(trace, "a").mask is None
    (row,) = offset_statistics(trace).rows
    assert row.mask_mean is None and row.mask_histogram is None


@pytest.mark.parametrize(("low", "high", "edges"), [(0, 1, (0, 1)), (0.2, 0.3, (0, 1)), (0.5, 1.5, (0, 2)), (-3, 7, (-3, 7))])
def test_the_histogram_covers_the_masks(low, high, edges):
    trace = plain((9, 9), 1)
    trace["0"].mask.copy_(torch.linspace(low, high, 9 * 81).reshape(1, 9, 9, 9))
    trace["0"].mask[0, 0, 0, 1] = torch.nan
    counts, found = offset_statistics(trace).rows[0].mask_histogram
    assert (found[0], found[-1]) == edges and sum(counts) == 9 * 81 - 1


def test_the_table_can_be_read_and_handed_on():
    trace = plain((8, 8), 2, 1)
    trace["0"].offset[0, ::2] = 1.25
    trace["1"].offset[0, 3, 0, 0] = -40.0
    trace["1"].mask = None
    statistics = offset_statistics(trace)
    assert str(statistics) == (
        "Offsets in the layer's input pixels (in image pixels); regular: outside without offsets.\n"
        "layer   mean height    mean width   deviation       largest  outside  regular   mask\n"
        "0      +1.25 (+1.2)  +0.00 (+0.0)  0.00 (0.0)    1.25 (1.2)    16.0%    16.0%  1.000\n"
        "1      +0.00 (+0.0)  -0.28 (-0.6)  3.32 (6.6)  40.00 (80.0)    30.6%    30.6%   none"
    )
    rows = statistics.as_dicts()
    assert [row["layer"] for row in rows] == ["0", "1"] and rows[1]["largest_image"] == 80
    assert json.loads(json.dumps(rows))[0]["mean"] == [1.25, 0.0]


def test_statistics_are_of_the_last_forward_pass_and_of_every_call_in_it():
    trace = plain((8, 8), 1)
    first, again = plain((8, 8), 1)["0"], plain((8, 8), 1)["0"]
    first.offset.fill_(7.0)
    trace["0"].forward = again.forward = 1
    again.index = 1
    trace.calls = [first, trace["0"], again]
    statistics = offset_statistics(trace)
    assert [(row.layer, row.index, row.largest) for row in statistics.rows] == [("0", 0, 0.0), ("0", 1, 0.0)]
    assert str(statistics).splitlines()[3].startswith("0, call 1")


def test_the_parts_of_a_batch_that_replicas_had_are_one():
    first, second = (call("a", *WINDOWS[1], 1, batch=n, random=np.random.default_rng(n)) for n in (1, 2))
    trace = Trace([first], [Geometry((0.0, 0.0), (1.0, 1.0))])
    trace.calls.append(second)
    (row,) = offset_statistics(trace).rows
    offset = torch.cat([first.offset, second.offset]).unflatten(1, (-1, 2))
    assert row.mean == pytest.approx(offset.mean((0, 1, 3, 4)).tolist())
    assert sum(row.mask_histogram[0]) == first.mask.numel() + second.mask.numel()


def test_nothing_recorded_is_explained():
    with pytest.raises(ValueError, match="nothing was recorded; expected a trace within whose"):
        offset_statistics(Trace([], []))


def test_a_layer_whose_place_in_the_image_is_unknown():
    trace = plain((8, 8), 1)

    def unknown(layer, index=0):
        raise ValueError("no image")

    trace.geometry = unknown
    (row,) = offset_statistics(trace).rows
    assert row.mean == (0, 0) and row.mean_image is row.deviation_image is row.largest_image is None
    assert "(" not in str(offset_statistics(trace)).splitlines()[2]


def test_wrong_images_and_groups_are_explained():
    trace = made(WINDOWS[0])
    with pytest.raises(ValueError, match="`image` is 2; layer 'a' was called with 2 images, counted from 0"):
        offset_field(trace, "a", image=2)
    with pytest.raises(ValueError, match=r"`offset_group` is -1; layer 'a' has 2 offset groups, counted from 0\. None"):
        offset_field(trace, "a", offset_group=-1)


def test_examples():
    result = doctest.testmod(fields)
    assert result.attempted >= 14 and not result.failed
