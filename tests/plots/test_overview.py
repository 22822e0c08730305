"""The composite picture shows a unit's views, each once, and fits whatever was recorded."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from deformconv.errors import ShapeError
from deformconv.plots import style
from deformconv.plots.overview import draw_look, draw_view
from deformconv.plots.recording import record
from deformconv.plots.stack import unit_points
from deformconv.torch import DeformConv1d, DeformConv2d

IMAGE = np.random.default_rng(0).random((48, 64, 3))


def traced(*layers, image=IMAGE):
    """What was recorded of deformable layers behind a stem of stride 2, with offsets of about a pixel."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2, padding=1), *layers).eval()
    for layer in layers:
        torch.nn.init.normal_(layer.offset_conv.bias, std=1.0)
    with record(net) as trace, torch.no_grad():
        net(torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None])
    return trace


def layer(**more):
    return DeformConv2d(4, 4, 3, padding=1, **more)


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def words(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_all_views_of_a_unit_are_drawn(tmp_path):
    trace = traced(layer(), layer())
    figure = draw_look(trace, IMAGE, "2", at=(20, 30))
    first, second, third, flow, spread = titles(figure)
    assert first == "What the unit samples" and second == "The same through 2 layers: 81 paths"
    assert third.startswith("Receptive field, radius ")
    assert flow.startswith("Where windows move") and spread.startswith("How windows change")
    assert figure.get_suptitle() == "Where layer 2 looks for its unit at y = 20, x = 30"
    assert figure.get_size_inches()[0] * figure.dpi == 1200
    view = unit_points(trace, "2", at=(20, 30))
    drawn = figure.axes[0].collections[1].get_offsets()
    assert sorted(map(tuple, drawn.tolist())) == sorted((x, y) for y, x in view.points.tolist())
    said = words(figure)
    assert "3x3 taps, stride 1x1, dilation 1x1, 1 offset group" in said
    assert "unit (10, 15) of 24x32, 2 x 2 image pixels apart" in said and "mean mask: " in said
    for name in ("look.png", "look.svg"):
        style.save(figure, tmp_path / name)
    assert "what a plain convolution samples" in (tmp_path / "look.svg").read_text()


def test_one_layer_shows_its_masks_and_v1_what_lies_outside():
    assert titles(draw_look(traced(layer()), IMAGE, "1"))[1] == "Mean mask of each window"
    figure = draw_look(traced(layer(modulated=False)), IMAGE, "1", unit=(0, 0))
    assert titles(figure)[1] == "Samples outside of the map"
    assert "no masks (v1)" in words(figure) and figure.get_suptitle() == "Where layer 1 looks for its unit at y = 0, x = 0"


def test_paths_that_would_hide_the_picture_are_not_followed():
    figure = draw_look(traced(layer(offset_groups=2), layer(offset_groups=2), layer(offset_groups=4)), IMAGE, "3")
    assert titles(figure)[1] == "The same through 2 layers: 648 paths"


def test_the_first_pictures_show_the_surroundings_of_the_points_and_the_others_where_that_is():
    figure = draw_look(traced(layer()), IMAGE, "1", at=(20, 30))
    left, right = figure.axes[0].get_xlim()
    bottom, top = figure.axes[0].get_ylim()
    np.testing.assert_allclose([(left + right) / 2, (top + bottom) / 2], [30, 20])
    assert right - left < 64 and abs((right - left) / (bottom - top) - 64 / 48) < 1e-9
    (frame,) = (patch for patch in figure.axes[2].patches if hasattr(patch, "get_width") and not hasattr(patch, "radius"))
    size = right - left, bottom - top
    np.testing.assert_allclose([*frame.get_xy(), frame.get_width(), frame.get_height()], [left, top, *size])


@pytest.mark.parametrize(
    ("view", "title"),
    [
        ("points", "What layer 2's unit at y = 20, x = 30 samples through 2 deformable layers"),
        ("erf", "Effective receptive field of layer 2's unit at y = 20, x = 30: radius "),
        ("locations", "Samples of layer 1 that move layer 2's unit at y = 20, x = 30"),
        ("saliency", "What layer 2's unit at y = 20, x = 30 needs of the picture: "),
    ],
)
def test_a_view_that_is_small_in_the_picture_is_drawn_larger_beside_it(view, title):
    image = np.random.default_rng(0).random((120, 160, 3))
    figure = draw_view(traced(layer(), layer(), image=image), image, "2", (20, 30), view, progress=False)
    assert figure.get_suptitle().startswith(title)
    whole, zoomed = figure.axes[:2]
    assert whole.get_legend() is None and zoomed.get_legend() is not None
    assert whole.child_axes == [] and len(zoomed.child_axes) == (view != "saliency")
    assert whole.get_xlim() == (-0.5, 159.5)
    (left, right), (bottom, top) = zoomed.get_xlim(), zoomed.get_ylim()
    np.testing.assert_allclose([(left + right) / 2, (bottom + top) / 2], [30, 20])
    frame = whole.patches[-1]
    np.testing.assert_allclose([*frame.get_xy(), frame.get_width()], [left, top, right - left])


def test_a_view_that_fills_the_picture_is_drawn_once():
    image = IMAGE[:14, :16]
    figure = draw_view(traced(layer(), image=image), image, "1", (6, 6), "points", layers=1)
    assert figure.axes[0].get_legend() is not None and len(figure.axes) == 1
    figure = draw_view(traced(layer()), IMAGE, "1", (20, 30), "flow")
    assert figure.get_suptitle() == "Mean offsets of the windows of layer 1" and len(figure.axes) == 1
    assert len(draw_view(traced(layer()), IMAGE, "1", (20, 30), "all").axes) >= 6


def test_in_a_strip_the_surroundings_are_no_strip():
    image = np.random.default_rng(0).random((40, 400, 3))
    axes = draw_look(traced(layer(), image=image), image, "1", at=(20, 200)).axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    np.testing.assert_allclose((bottom - top) / (right - left), 0.6)


def test_layers_of_other_ranks_are_explained():
    net = DeformConv1d(2, 2, 3, padding=1)
    with record(net) as trace, torch.no_grad():
        net(torch.rand(1, 2, 30))
    with pytest.raises(ShapeError, match=r"Pictures are drawn of 2-D layers; of others take the numbers"):
        draw_look(trace, IMAGE, "")
    with pytest.raises(ShapeError, match="`image` is 20x20, and the picture that was recorded 48x64; expected the same"):
        draw_look(traced(layer()), IMAGE[:20, :20], "1")
