"""Deformable attention recorded, and where its queries look: against the operator's own rule, and nothing changes."""

from __future__ import annotations

import copy
import doctest
import importlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import deformconv  # noqa: E402
from deformconv.errors import ShapeError  # noqa: E402
from deformconv.plots import (  # noqa: E402
    OffsetMonitor,
    draw_query_points,
    offset_field,
    offset_statistics,
    query_points,
    receptive_field,
    record,
    style,
    unit_points,
)  # fmt: skip
from deformconv.plots.attending import attention_layers  # noqa: E402
from deformconv.torch import DeformAttention, DeformConv2d, deform_attention  # noqa: E402

LEVELS = [(6, 8), (3, 4)]
SIZE = (48, 64)


class Net(nn.Module):
    """A pyramid, and attention of every cell of it to all of it."""

    def __init__(self, boxes=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.attention = DeformAttention(8, num_levels=2, num_heads=2, num_points=3)
        self.boxes = boxes
        for predictor in (self.attention.sampling_offsets, self.attention.attention_weights):
            nn.init.normal_(predictor.weight, std=0.3)

    def forward(self, x):
        finest = self.stem(x)
        maps = [finest, nn.functional.avg_pool2d(finest, 2)]
        value = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)
        places = [
            torch.stack(torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1)
            for h, w in LEVELS
        ]
        reference = torch.cat([place.flatten(0, 1) for place in places])[None, :, None].expand(len(x), -1, 1, -1)
        if self.boxes:
            reference = torch.cat([reference, torch.full_like(reference, 0.25)], -1)
        return self.attention(value, reference, value, LEVELS)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def trace(net):
    with record(net) as trace, torch.no_grad():
        net(torch.rand(2, 3, *SIZE))
    return trace


def with_gradients(net, x):
    y = net(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))]


def test_nothing_changes_bit_for_bit_and_nothing_stays(net):
    x = torch.rand(2, 3, *SIZE)
    expected = with_gradients(net, x)
    with record(net) as trace:
        found = with_gradients(net, x)
        twin = copy.deepcopy(net)
        twin(x)
    net(x)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert len(trace.attentions) == 1
    assert "_observers" not in vars(net.attention) and not net.attention._forward_hooks


def test_locations_and_weights_are_those_that_were_used(net):
    x, given = torch.rand(2, 3, *SIZE), []
    with net.attention.register_forward_pre_hook(lambda _, args: given.append(args)), record(net) as trace:
        output = net(x)
    call = trace.attention("attention")
    _, reference, value, levels = given[0]
    value = net.attention.value_proj(value).unflatten(2, (2, 4))
    assert torch.equal(net.attention.output_proj(deform_attention(value, levels, call.locations, call.weights)), output)
    assert torch.equal(call.reference, reference) and call.levels == tuple(LEVELS)
    assert (call.kind, call.index, call.forward) == ("deformconv", 0, 0)
    assert not call.locations.requires_grad and trace.attention_layers == ["attention"] and trace.layers == []


def test_points_are_where_the_operator_reads(net, trace):
    """The operator reads a map whose values are image positions: what it reads at a location is the position that is told."""
    view = query_points(trace, "attention", query=20, head=1)
    call = trace.attention("attention")
    assert view.points.shape == (6, 2) and view.heads.tolist() == [1] * 6 and view.levels.tolist() == [0] * 3 + [1] * 3
    np.testing.assert_allclose(view.weights, call.weights[0, 20, 1].flatten())
    for level, (height, width) in enumerate(LEVELS):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        # The image pixel that each cell's middle is.
        step = torch.tensor(SIZE) / torch.tensor([height, width]).double()
        where = torch.stack([rows, columns], -1) * step + (step - 1) / 2
        inside = (
            (view.levels == level) & (view.points > where[0, 0].numpy()).all(1) & (view.points < where[-1, -1].numpy()).all(1)
        )
        assert inside.any()
        locations = call.locations[:1, 20:21, 1:2, level : level + 1].double()  # (1, 1, 1, 1, points, 2)
        for point in np.flatnonzero(inside):
            number = point - 3 * level
            read = deform_attention(
                where.reshape(1, -1, 1, 2), [(height, width)], locations[..., number : number + 1, :],
                torch.ones(1, 1, 1, 1, 1).double(),
            )  # fmt: skip
            np.testing.assert_allclose(read[0, 0].numpy(), view.points[point], atol=1e-9)


def test_a_query_is_chosen_by_its_reference_point(net, trace):
    view = query_points(trace, "attention", at=(28, 36))  # row 3, column 4 of the finest level, at 3*8 + 3.5 and 4*8 + 3.5
    assert view.query == 3 * 8 + 4 and view.at == pytest.approx((27.5, 35.5), abs=1e-5) and view.box is None
    assert view.points.shape == (2 * 2 * 3, 2) and view.sizes == tuple(LEVELS)
    assert query_points(trace, "attention").query == query_points(trace, "attention", at=(23.5, 31.5)).query
    assert query_points(trace, "attention", at=(28, 36), level=1, image=1).levels.tolist() == [1] * 6


def test_boxes_are_known():
    net = Net(boxes=True).eval()
    with record(net) as trace:
        net(torch.rand(1, 3, *SIZE))
    view = query_points(trace, "attention", query=0)
    assert view.at == pytest.approx((3.5, 3.5), abs=1e-5)
    assert view.box == pytest.approx((3.5 - 6, 3.5 - 8, 3.5 + 6, 3.5 + 8), abs=1e-5)


def test_without_reference_points_a_query_is_where_it_looks(trace):
    from dataclasses import replace

    call = trace.attentions[0]
    trace.attentions[0] = replace(call, reference=None)
    view = query_points(trace, "attention", query=5)
    weights = view.weights[:, None]
    assert view.at == pytest.approx(tuple((view.points * weights).sum(0) / weights.sum()))


def test_what_is_not_finite_is_left_out(trace):
    call = trace.attentions[0]
    call.locations[0, 5, 0, 0, 0, 1] = torch.nan
    assert query_points(trace, "attention", query=5).points.shape == (11, 2)
    assert np.isfinite(query_points(trace, "attention", at=(20, 20)).points).all()


def test_a_layer_by_itself_wants_the_pictures_size():
    layer = DeformAttention(8, num_levels=2, num_heads=2, num_points=3)
    with record(layer) as trace:
        layer(torch.rand(1, 5, 8), torch.full((1, 5, 1, 2), 0.5), torch.rand(1, 60, 8), LEVELS)
    assert query_points(trace, "", query=0, size=SIZE).at == (23.5, 31.5)
    with pytest.raises(
        ValueError,
        match=r"called with has no picture: .* is 1x2 pixels large, and the finest level of layer '' 6x8\. Expected .* `size`",
    ):
        query_points(trace, "", query=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": 60}, "`query` is 60; layer 'attention' was called with 60 queries, counted from 0"),
        ({"head": 2}, "`head` is 2; layer 'attention' was called with 2 heads"),
        ({"level": -1}, "`level` is -1; layer 'attention' was called with 2 levels"),
        ({"image": 2}, "`image` is 2; layer 'attention' was called with 2 images"),
        ({"index": 1}, "layer 'attention' was called 1 time in a forward pass; there is no call 1"),
        ({"at": (1, 2), "query": 3}, "`at` and `query` were both passed"),
        ({"at": (1, 2, 3)}, r"`at` is \(1, 2, 3\); expected 2 numbers"),
        ({"at": "rim"}, "`at` is 'rim'; expected 2 numbers"),
        ({"at": (48, 2)}, r"`at` is \(48, 2\), outside the image of 48 x 64 pixels"),
    ],
)
def test_what_is_not_there_is_said(trace, arguments, message):
    with pytest.raises(ValueError, match=message):
        query_points(trace, "attention", **arguments)


def test_a_trace_of_nothing_or_of_attention_alone_is_told_so():
    layer = DeformAttention(32, num_levels=1)
    with record(layer) as trace:
        pass
    with pytest.raises(ValueError, match=r"nothing was recorded: call the model, model\(x\), within"):
        query_points(trace, "", size=(8, 10))
    with record(layer) as trace:
        layer(torch.rand(1, 20, 32), torch.rand(1, 20, 1, 2), torch.rand(1, 20, 32), [(4, 5)])
    with pytest.raises(ValueError, match=r"only deformable attention was recorded, .* query_points\(trace, layer\) has"):
        offset_statistics(trace)


def test_other_layers_are_no_attention(trace, net):
    with pytest.raises(
        ValueError, match="no attention 'stem' was recorded; the layers of attention that were called are 'attention'"
    ):
        query_points(trace, "stem")
    with pytest.raises(TypeError, match="`trace` is of type Net"):
        query_points(net, "attention")
    convolution = DeformConv2d(3, 4, 3)
    with record(convolution) as other:
        convolution(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"called are none\. It has offsets: trace\[name\] is its call"):
        other.attention("")


@pytest.mark.parametrize(
    "view",
    [
        lambda trace: trace["attention"],
        lambda trace: trace.unit("attention", (3, 4)),
        lambda trace: unit_points(trace, "attention", layers=2),
        lambda trace: offset_field(trace, "attention"),
        lambda trace: receptive_field(trace, "attention"),
    ],
)
def test_views_of_windows_say_that_attention_has_none(trace, view):
    with pytest.raises(
        ValueError, match=r"layer 'attention' is deformable attention: .* Expected query_points\(trace, 'attention'\)"
    ):
        view(trace)
    with pytest.raises(ValueError, match="layers that were called are none, but for attention"):
        trace["stem"]


def test_the_trace_prints_both_kinds_of_layers():
    layer = DeformConv2d(3, 3, 3, padding=1)
    net = nn.Sequential(layer, Net()).eval()
    with record(net) as trace:
        net(torch.rand(1, 3, *SIZE))
    assert str(trace).splitlines() == [
        "Trace of 1 forward pass, 2 calls",
        "layer  call  input  output  kernel  groups  largest offset  mean mask",
        "0      0     48x64  48x64   3x3     1       0 px            1.000",
        "attention    call  queries  heads  points  levels",
        "1.attention  0     60       2      3       6x8, 3x4",
    ]
    assert unit_points(trace, "0", (20, 20)).points.shape == (9, 2)


def test_the_monitor_says_what_to_do_with_attention(net):
    with pytest.raises(ValueError, match=r"no deformable layers to watch\. It has deformable attention, .*record has them"):
        OffsetMonitor(net)


@pytest.mark.parametrize("accelerated", [False, True])
def test_attention_of_transformers_is_seen_with_our_kernels_and_without(accelerated):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from contextlib import nullcontext

    from deformconv.convert import accelerate_transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage3", "stage4"]
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone, num_feature_levels=2, d_model=32, encoder_layers=1, decoder_layers=2, num_queries=7,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    net, x = transformers.DeformableDetrModel(config).eval(), torch.rand(1, 3, *SIZE)
    with accelerate_transformers() if accelerated else nullcontext(), torch.no_grad():
        expected = net(x).last_hidden_state
        with record(net) as trace:
            found = net(x).last_hidden_state
    assert torch.equal(found, expected)
    assert trace.attention_layers == [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.encoder_attn",
        "decoder.layers.1.encoder_attn",
    ]
    call = trace.attention("encoder.layers.0.self_attn")
    assert call.levels == ((3, 4), (2, 2)) and call.kind == "transformers"
    assert call.locations.shape == (1, 16, 2, 2, 4, 2) and call.weights.sum().item() == pytest.approx(32, abs=1e-4)
    assert query_points(trace, "encoder.layers.0.self_attn", at=(24, 24)).at == pytest.approx((23.5, 23.5), abs=1e-4)
    assert trace.attention("decoder.layers.1.encoder_attn").reference.shape == (1, 7, 2, 2)


def test_which_models_of_transformers_are_recorded():
    """Those that have the class, as docs/looking.md has it; what calls a function has nothing to look at."""
    pytest.importorskip("transformers", minversion="5.24")  # whose models are listed, in its words for backbones
    from tests.convert import attention_models

    from deformconv.convert.transformers_attention import MODELS

    models = {name: attention_models.MAKERS[name]() for name in MODELS}
    seen = {name for name, model in models.items() if attention_layers(model)}
    assert seen == {name for name, holder in MODELS.items() if holder == "MultiScaleDeformableAttention"}
    assert models.keys() - seen == {"mask2former", "oneformer", "rt_detr_v2", "d_fine", "deimv2"}
    for name in models.keys() - seen:
        with pytest.raises(ValueError, match=r"a module MultiScaleDeformableAttention of transformers\. Calls of functions"):
            record(models[name]).__enter__()


class TestDrawn:
    @pytest.fixture
    def axes(self):
        return pytest.importorskip("matplotlib.figure").Figure().add_subplot()

    @pytest.mark.parametrize("boxes", [False, True])
    def test_points_are_drawn_by_level_and_weight(self, boxes, axes):
        net, image = Net(boxes).eval(), torch.rand(1, 3, *SIZE)
        with record(net) as trace:
            net(image)
        view = query_points(trace, "attention", at=(20, 30))
        drawn = draw_query_points(axes, image, view)
        assert len(drawn) == 2
        for level, dots in enumerate(drawn):
            here = view.levels == level
            order = np.argsort(view.weights[here], kind="stable")
            np.testing.assert_allclose(dots.get_offsets(), view.points[here][order][:, ::-1])
            areas, share = dots.get_sizes(), view.weights[here][order] / view.weights.max()
            np.testing.assert_allclose(areas / areas.max(), np.clip(share, 0.12, None) / max(share.max(), 0.12))
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["middle of its box" if boxes else "reference", "6x8", "3x4"]
        assert axes.get_legend().get_title().get_text() == "colour: the level that is sampled; size: weight"
        assert [line.get_color() for line in axes.lines].count(style.YELLOW) == boxes
        assert len({tuple(dots.get_facecolor()[0]) for dots in drawn}) == 2

    def test_a_picture_that_is_none_is_refused(self, trace, axes):
        with pytest.raises(ShapeError):
            draw_query_points(axes, np.zeros((2, 3, 4, 5)), query_points(trace, "attention"))

    def test_look_draws_attention_and_has_no_page_of_it(self, net, tmp_path):
        pytest.importorskip("matplotlib")
        seen = deformconv.look(net, torch.rand(3, *SIZE), at=(20, 30), progress=False)
        assert seen.layer == "attention"
        assert seen.save(tmp_path / "look.png").stat().st_size > 1000
        assert seen.draw("points").get_suptitle() == "What layer attention's query at y = 19.5, x = 27.5 samples in 2 levels"
        assert seen._repr_html_().startswith('<img alt="What layer attention&#x27;s query')
        with pytest.raises(ValueError, match="a page shows the windows of deformable layers; expected a picture"):
            seen.save(tmp_path / "look.html")
        with pytest.raises(
            ValueError, match="`view` is 'erf', and layer 'attention' is deformable attention; expected the view 'points'"
        ):
            seen.draw("erf")
        with pytest.raises(ValueError, match="`layers` is 2, and layer 'attention' is deformable attention"):
            seen.draw("points", 2)
        with pytest.raises(ValueError, match="is deformable attention: it samples for queries"):
            seen.save(tmp_path / "look.gif")
        with pytest.raises(ValueError, match="outside the image"):
            deformconv.look(net, torch.rand(3, *SIZE), at=(200, 30), progress=False)

    def test_of_two_kinds_of_layers_the_page_shows_the_other(self):
        net = nn.Sequential(DeformConv2d(3, 3, 3, padding=1), Net()).eval()
        assert deformconv.look(net, torch.rand(3, *SIZE), progress=False).layer == "0"
        assert style.LEVELS[0] != style.LEVELS[1]


@pytest.mark.parametrize("module", ["query", "attending", "calls"])
def test_examples(module):
    failed, _ = doctest.testmod(importlib.import_module(f"deformconv.plots.{module}"))
    assert not failed
