"""DCNv3 and DCNv4 in every view: what they sample is told in this library's order, and nothing changes by looking."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from deformconv.plots import (  # noqa: E402
    OffsetMonitor,
    draw_unit_points,
    offset_field,
    offset_statistics,
    receptive_field,
    record,
    regular_points,
    saliency_region,
    sampling_locations,
    unit_points,
)
from deformconv.plots.observe import observe  # noqa: E402
from deformconv.torch import DeformConv2d, deform_aggregate2d  # noqa: E402
from deformconv.vision import DCNv3, DCNv4  # noqa: E402

SIZE = (24, 32)


class Net(nn.Module):
    """A layer whose maps have their channels last, between convolutions whose maps have them first."""

    def __init__(self, layer):
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 32, 3, stride=2, padding=1), layer, nn.Conv2d(32, 4, 1)
        for name, parameter in layer.named_parameters():
            if name.startswith(("offset", "mask")):
                nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        if isinstance(self.layer, DCNv3):
            x = self.layer(x)
        else:
            size = tuple(x.shape[1:3])
            x = self.layer(x.flatten(1, 2), size)
            x = x.unflatten(1, size)
        return self.head(x.permute(0, 3, 1, 2))


LAYERS = {
    "v3": lambda: DCNv3(32, group=2),
    "v3, scaled, without its middle": lambda: DCNv3(32, group=2, offset_scale=2.0, remove_center=True),
    "v3, stride 2": lambda: DCNv3(32, group=1, stride=2, center_feature_scale=True),
    "v4": lambda: DCNv4(32, group=2, offset_scale=0.5),
    "v4, alone": lambda: DCNv4(32, group=2, without_pointwise=True, dw_kernel_size=3),
}


@pytest.fixture(params=LAYERS)
def net(request):
    torch.manual_seed(0)
    return Net(LAYERS[request.param]()).eval()


def recorded(net, x=None):
    with record(net) as trace, torch.no_grad():
        net(torch.rand(2, 3, *SIZE) if x is None else x)
    return trace


def with_gradients(net, x):
    y = net(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))]


def test_nothing_changes_bit_for_bit_and_nothing_stays(net):
    x = torch.rand(2, 3, *SIZE)
    expected = with_gradients(net, x)
    with record(net) as trace:
        found = with_gradients(net, x)
    net(x)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert [(call.layer, call.kind, call.index) for call in trace] == [("layer", "deformconv", 0)]
    assert "_observers" not in vars(net.layer)


def test_offsets_and_masks_are_those_that_were_used(net):
    seen = []
    with observe(net, seen.append):
        y = net(torch.rand(2, 3, *SIZE))
    (event,) = seen
    torch.testing.assert_close(event.layer.sampled(event.input, event.offset, event.mask), event.output)
    for tensor in (event.offset, event.mask):
        (gradient,) = torch.autograd.grad(y.square().sum(), tensor, retain_graph=True)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
def test_what_is_told_is_in_our_order_whatever_the_authors_is(kind, scale):
    """Their taps go column by column, x before y, stretched about the middle; ours row by row, y before x."""
    layer = kind(32, group=2, offset_scale=scale)
    predictor = layer.offset if kind is DCNv3 else layer.offset_mask
    group, column, row = 1, 2, 0
    with torch.no_grad():  # DCNv4's row has a group's offsets, then its masks
        place = (group * 9 + column * 3 + row) * 2 if kind is DCNv3 else group * 27 + (column * 3 + row) * 2
        predictor.bias[place], predictor.bias[place + 1] = 0.25, 0.75
    net = Net(nn.Identity())
    net.layer = layer
    view = unit_points(recorded(net.eval()), "layer", unit=(6, 8), offset_group=group)
    step = 2  # of the stem
    expected = {((6 + scale * (i - 1)) * step, (8 + scale * (j - 1)) * step) for i in range(3) for j in range(3)}
    expected -= {((6 - scale) * step, (8 + scale) * step)}
    expected |= {((6 + scale * (row - 1 + 0.75)) * step, (8 + scale * (column - 1 + 0.25)) * step)}
    assert {tuple(point) for point in view.points.round(4).tolist()} == expected
    assert {tuple(point) for point in view.regular.tolist()} == {(10 + 2 * i, 14 + 2 * j) for i in range(3) for j in range(3)}


def test_a_tap_that_was_removed_weighs_nothing():
    net = Net(DCNv3(32, group=1, remove_center=True)).eval()
    mask = recorded(net)["layer"].mask
    assert (mask[:, 4] == 0).all() and mask.sum(1).allclose(torch.ones(1)) and (mask[:, 3] > 0).all()


def test_geometry_is_followed_through_maps_whose_channels_are_last(net):
    trace = recorded(net)
    call, geometry = trace["layer"], trace.geometry("layer")
    assert (geometry.origin, geometry.step, geometry.source) == ((0, 0), (2, 2), "graph")
    stride = net.layer.stride
    assert trace.output_geometry("layer").step == (2 * stride, 2 * stride)
    assert trace.output_geometry("head").source == "graph" and trace.output_geometry("head").step == (2 * stride, 2 * stride)
    view = unit_points(trace, "layer", unit=(2, 3))
    regular = regular_points(call.output_size, 3, stride=stride, padding=1)[:, :, 2, 3] * 2
    assert {tuple(point) for point in view.regular.tolist()} == {tuple(point) for point in regular.tolist()}
    assert view.counts.sum() == 9 * call.offset_groups


def test_the_function_within_a_layer_of_ones_own_is_followed():
    class Pooled(nn.Module):
        def forward(self, x):
            return deform_aggregate2d(x, x.new_zeros(len(x), 18, 12, 16), None, 3, 2, 1)

    net = nn.Sequential(Pooled(), DeformConv2d(3, 4, 3, padding=1)).eval()
    geometry = recorded(net, torch.rand(1, 3, *SIZE)).geometry("1")
    assert (geometry.origin, geometry.step, geometry.source) == ((0, 0), (2, 2), "graph")


def test_strengths_of_samples_are_the_gradients_of_the_offsets(net):
    x = torch.rand(1, 3, *SIZE)
    trace, seen = recorded(net, x), []
    view = sampling_locations(trace, "layer", unit=(2, 3), channels=32)
    with observe(net, seen.append):
        net(x)
    (event,) = seen
    square = 0
    for channel in range(32):
        (gradient,) = torch.autograd.grad(event.output[0, channel, 2, 3], event.offset, retain_graph=True)
        taps = gradient[0, :, 2, 3].double().reshape(-1, 2) / 2  # a cell is 2 image pixels
        square = square + taps.square().sum(1) / 32
    strength = square.sqrt().numpy()
    assert view.of == "layer" and view.units.tolist() == [[2, 3]] * len(view.units)
    np.testing.assert_allclose(view.strength, strength[view.group * 9 + view.tap], rtol=1e-4)
    assert len(view.strength) == np.count_nonzero(strength)


def test_views_of_the_whole_net(net):
    """The response is what the layer's samples add up to: its receptive field is that of the operator's output."""
    x = torch.rand(1, 3, *SIZE)
    trace, seen = recorded(net, x), []
    field = receptive_field(trace, "layer", unit=(2, 3), channels=32)
    image = x.clone().requires_grad_()
    with observe(net, seen.append):
        net(image)
    gradients = [torch.autograd.grad(one, image, retain_graph=True)[0][0] for one in seen[0].output[0, :, 2, 3]]
    expected = torch.stack(gradients).double().square().sum(1).mean(0).sqrt()
    np.testing.assert_allclose(field.field, expected.numpy(), rtol=1e-4, atol=1e-6 * float(expected.max()))
    assert saliency_region(trace, "layer", unit=(2, 3), max_passes=8, progress=False).error <= 0.1
    assert sampling_locations(trace, "head", unit=(2, 3), channels=4).of == "layer"
    assert offset_field(trace, "layer").flow.shape == (2, *trace["layer"].output_size)


def test_the_monitor_watches(net):
    x, written = torch.rand(2, 3, *SIZE), []
    net.train()
    with OffsetMonitor(net, lambda step, values: written.append(values)):
        net(x).sum().backward()
    (row,) = offset_statistics(recorded(net, x)).rows
    assert written[0]["offsets/layer/largest"] == pytest.approx(row.largest)
    assert written[0]["offsets/layer/mask"] == pytest.approx(row.mask_mean, rel=1e-3)
    assert written[0]["offsets/layer/mean_width"] == pytest.approx(row.mean[1], rel=1e-3, abs=1e-6)


def test_weights_of_a_softmax_are_drawn_beside_the_heaviest():
    axes = pytest.importorskip("matplotlib.figure").Figure().add_subplot()
    torch.manual_seed(0)
    net, x = Net(DCNv3(32, group=1)).eval(), torch.rand(1, 3, *SIZE)
    view = unit_points(recorded(net, x), "layer", unit=(6, 8))
    assert view.weights.max() < 0.5
    drawn = draw_unit_points(axes, x, view)
    order = np.argsort(view.weights, kind="stable")
    np.testing.assert_allclose(
        drawn.get_sizes() / drawn.get_sizes().max(), np.clip(view.weights / view.weights.max(), 0.12, None)[order]
    )
    assert drawn.get_clim() == (0, pytest.approx(view.weights.max()))


def test_the_page_shows_them():
    from deformconv.plots.page import build

    trace = recorded(Net(DCNv4(32, group=2)).eval())
    (layer,) = build(trace, np.zeros(SIZE))["layers"]
    assert layer["groups"] == 2 and layer["kernel"] == [3, 3] and layer["step"] == [2.0, 2.0]
    assert layer["offset"]["shape"] == [2, 9, 2, 12, 16] and layer["mask"]["shape"] == [2, 9, 12, 16]
