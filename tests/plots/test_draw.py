"""The drawings put everything where the numbers say, and are legible on every picture."""

import doctest
import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from deformconv.errors import ShapeError
from deformconv.plots import draw_sampling_points, regular_points, sampling_points, style
from deformconv.plots.draw_fields import colour_wheel, draw_offset_field, draw_receptive_field, draw_saliency_region
from deformconv.plots.draw_points import draw_sampling_locations, draw_unit_points
from deformconv.plots.draw_statistics import draw_offset_statistics
from deformconv.plots.fields import LayerOffsets, OffsetField, OffsetStatistics
from deformconv.plots.stack import UnitPoints

figure = pytest.importorskip("matplotlib.figure")
matplotlib = pytest.importorskip("matplotlib")

SIZE = (24, 32)
RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.random((*SIZE, 3))


@pytest.fixture
def axes():
    return figure.Figure().add_subplot()


def random_layer(seed: int = 0):
    random = np.random.default_rng(seed)
    offset, mask = random.normal(size=(1, 18, 5, 6)), random.random((1, 9, 5, 6))
    return sampling_points(offset, 3, stride=2, padding=1)[0, 0], mask[0]


def test_points_are_drawn_in_x_y_order_in_image_pixels(axes):
    points, mask = random_layer()
    at = [(1, 4), (3, 0)]
    drawn = draw_sampling_points(axes, np.zeros((20, 24)), points, mask, at=at, pixel=2, origin=0.5)
    expected = [points[tap, ::-1, row, column] * 2 + 0.5 for tap in range(9) for row, column in at]
    np.testing.assert_allclose(drawn.get_offsets(), expected)
    amounts = [mask[tap, row, column] for tap in range(9) for row, column in at]
    np.testing.assert_allclose(drawn.get_array(), amounts)


def test_without_a_mask_every_point_counts_1(axes):
    points, _ = random_layer()
    drawn = draw_sampling_points(axes, np.ones((9, 9, 3)), points, at=[(0, 0)])
    assert drawn.get_array().tolist() == [1] * 9


def test_the_undeformed_window_is_drawn_around_its_middle(axes):
    points, mask = random_layer()
    regular = regular_points((5, 6), 3, stride=2, padding=1)
    draw_sampling_points(axes, np.zeros((9, 11)), points, mask, at=[(2, 3)], regular=regular)
    assert len(axes.lines) == 9
    for tap, line in enumerate(axes.lines):
        assert line.get_xydata()[0].tolist() == [6, 4]
        np.testing.assert_allclose(line.get_xydata()[1], points[tap, ::-1, 2, 3])
    window, middle, _ = axes.collections
    np.testing.assert_allclose(window.get_offsets(), regular[:, ::-1, 2, 3])
    assert middle.get_offsets().tolist() == [[6, 4]]
    assert axes.get_xlim() == (-0.5, 10.5) and axes.get_ylim() == (8.5, -0.5)


def test_grey_pictures_are_drawn_as_they_are(axes):
    points, _ = random_layer()
    image = RANDOM.random((9, 11))
    draw_sampling_points(axes, image, points, at=[(0, 0)], margin=2)
    (drawn,) = axes.images
    np.testing.assert_array_equal(drawn.get_array(), image)
    assert drawn.get_cmap().name == "gray" and drawn.get_clim() == (0, 1)
    assert axes.get_xlim() == (-2.5, 12.5) and axes.get_ylim() == (10.5, -2.5)


def test_wrong_shapes_are_explained(axes):
    points, mask = random_layer()
    with pytest.raises(ShapeError, match=r"`points` has shape \(18, 5, 6\); expected \(K, 2, H_out, W_out\)"):
        draw_sampling_points(axes, np.zeros((9, 9)), np.zeros((18, 5, 6)), at=[(0, 0)])
    with pytest.raises(ShapeError, match=r"`mask` has shape \(8, 5, 6\); expected .* \(9, 5, 6\)"):
        draw_sampling_points(axes, np.zeros((9, 9)), points, mask[1:], at=[(0, 0)])


def unit_view(layers: int = 1, points: int = 9, weights=None) -> UnitPoints:
    """A unit's points, all of them on the picture."""
    random = np.random.default_rng(points)
    return UnitPoints(
        layers=tuple("cba"[:layers]), unit=(3, 4), at=(12.0, 16.0),
        points=random.uniform((2, 2), (20, 28), (points, 2)),
        weights=random.uniform(0.1, 1.9, points) if weights is None else weights,
        counts=np.ones(points, np.int64),
        regular=np.array([[y, x] for y in (8.0, 12, 16) for x in (12.0, 16, 20)]), regular_weights=np.ones(9),
    )  # fmt: skip


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_units_points_are_drawn_with_their_weights_and_the_plain_window(axes):
    view = unit_view()
    drawn = draw_unit_points(axes, PICTURE, view)
    order = np.argsort(view.weights)
    np.testing.assert_allclose(drawn.get_offsets(), view.points[order, ::-1])
    np.testing.assert_allclose(drawn.get_array(), view.weights[order])
    assert drawn.get_clim() == (0, 2)
    areas = drawn.get_sizes()
    np.testing.assert_allclose(areas / areas[-1], view.weights[order] / view.weights.max())
    regular, unit = (one for one in axes.collections if one is not drawn)
    np.testing.assert_allclose(regular.get_offsets(), view.regular[:, ::-1])
    assert unit.get_offsets().tolist() == [[16, 12]]
    assert len(axes.lines) == 9 and all(line.get_xydata()[0].tolist() == [16, 12] for line in axes.lines)
    assert texts(axes) == ["unit", "its samples (colour and size: how much they count)", "a plain convolution's"]
    (bar,) = axes.child_axes
    assert bar.get_ylabel() == "mask"


def test_points_that_count_alike_need_no_colours(axes):
    drawn = draw_unit_points(axes, PICTURE, unit_view(weights=np.ones(9)), regular=False, legend=False)
    assert drawn.get_array() is None and axes.child_axes == [] and axes.get_legend() is None
    assert len(set(drawn.get_sizes())) == 1
    assert len(axes.collections) == 2  # the points and the unit


def test_points_through_several_layers_have_no_lines_and_colours_to_the_heaviest(axes):
    view = unit_view(3, 200)
    drawn = draw_unit_points(axes, PICTURE, view)
    assert drawn.get_clim() == (0, view.weights.max()) and len(axes.lines) == 0
    assert axes.child_axes[0].get_ylabel() == "product of masks"


def test_masks_below_1_have_colours_up_to_1_and_negative_ones_from_the_lowest(axes):
    assert draw_unit_points(axes, PICTURE, unit_view(weights=np.linspace(0.1, 0.9, 9))).get_clim() == (0, 1)
    drawn = draw_unit_points(axes, PICTURE, unit_view(weights=np.linspace(-0.5, 1.5, 9)), top=3.0)
    assert drawn.get_clim() == (-0.5, 3) and drawn.get_sizes().min() > 0


def test_a_view_without_points_shows_the_picture(axes):
    empty = replace(unit_view(), points=np.zeros((0, 2)), weights=np.zeros(0), counts=np.zeros(0, np.int64))
    assert len(draw_unit_points(axes, PICTURE, empty).get_offsets()) == 0
    assert axes.get_xlim() == (-0.5, 31.5)


def test_the_picture_fills_the_axes_but_for_points_that_are_near(axes):
    view = unit_view()
    draw_unit_points(axes, PICTURE, view)
    assert axes.get_xlim() == (-0.5, 31.5) and axes.get_ylim() == (23.5, -0.5)
    beside = replace(view, points=np.vstack([view.points, [[10, -3.5], [500, 10]]]), weights=np.ones(11))
    draw_unit_points(axes, PICTURE, beside)
    left, right = axes.get_xlim()
    assert -0.5 - 0.2 * 32 < left < -3.5 and right == 31.5  # all of the near point, with some space
    assert axes.get_ylim() == (23.5 + 0.2 * 24, -0.5)  # not all the way to the far one


def test_a_zoom_shows_a_square_around_the_unit(axes):
    draw_unit_points(axes, PICTURE, unit_view(), zoom=5)
    assert axes.get_xlim() == (11, 21) and axes.get_ylim() == (17, 7)


def locations(**more):
    strength = np.array([0.5, 0.001, 2.0, 1.0, 0.0])
    points = np.array([[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 10]])
    return SimpleNamespace(layer="b", of="a", unit=(3, 4), at=(12.0, 16.0), points=points, strength=strength, **more)


def test_sampling_locations_are_drawn_by_their_strength(axes):
    drawn = draw_sampling_locations(axes, PICTURE, locations())
    assert drawn.get_offsets().tolist() == [[2, 1], [8, 7], [6, 5]]  # the strongest on top; the faint ones left out
    assert drawn.get_array().tolist() == [0.25, 0.5, 1]
    assert (np.diff(drawn.get_sizes()) > 0).all()
    assert texts(axes) == ["unit", "samples of a that move it"]
    strongest = draw_sampling_locations(axes, PICTURE, locations(), most=1, legend=False, bar=False, zoom=8)
    assert strongest.get_offsets().tolist() == [[6, 5]] and axes.get_xlim() == (8, 24)


def field_view(size=SIZE):
    field = np.zeros(size)
    field[10:14, 14:20] = 1.0
    field[11, 16] = 4.0
    return SimpleNamespace(layer="b", unit=(3, 4), at=(12.0, 16.0), field=field, radius=2.76, centroid=(11.5, 16.5))


def test_a_receptive_field_is_drawn_with_a_circle_of_its_radius(axes):
    drawn = draw_receptive_field(axes, PICTURE, field_view())
    np.testing.assert_allclose(drawn.get_array(), np.sqrt(field_view().field / 4))
    alpha = drawn.get_alpha()
    assert alpha[0, 0] == 0 and alpha[11, 16] == 0.85  # what is no part of it shows the picture
    (circle,) = axes.patches
    assert circle.center == (16.5, 11.5) and circle.radius == 2.76
    assert texts(axes) == ["unit", "radius 2.76 px: as large as the area above 4.55 % of the maximum"]
    (bar,) = axes.child_axes
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0", "0.05", "0.2", "0.5", "1"]
    np.testing.assert_allclose(bar.get_yticks() ** 2, [0, 0.05, 0.2, 0.5, 1])


def test_a_receptive_field_of_nothing_is_drawn_without_a_warning(axes):
    nothing = field_view()
    nothing.field = np.zeros(SIZE)
    assert draw_receptive_field(axes, PICTURE, nothing).get_array().max() == 0


def region_view():
    region = np.zeros(SIZE, bool)
    region[10:14, 14:20] = True
    region[11, 15] = False  # a hole
    region[0, 0] = True  # at the border
    return SimpleNamespace(
        layer="b", unit=(3, 4), at=(12.0, 16.0), region=region, error=0.0982, bound=0.1, passes=40, share=region.mean()
    )


@pytest.mark.parametrize("image", [PICTURE, PICTURE[..., 0]])
def test_a_saliency_region_is_drawn_as_it_is_and_the_rest_veiled(axes, image):
    view = region_view()
    shown = draw_saliency_region(axes, image, view).get_array()
    colours = image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
    np.testing.assert_array_equal(shown[view.region], colours[view.region])
    veiled = shown[~view.region]
    assert np.ptp(veiled) <= 0.3 and (veiled == veiled[:, :1]).all()
    assert texts(axes)[1] == "3.1 % of the picture give the response with an error of 0.098 (bound 0.1)"


def test_the_outline_of_a_region_runs_between_its_pixels_and_the_others(axes):
    view = region_view()
    draw_saliency_region(axes, PICTURE, view)
    drawn = {tuple(sorted(map(tuple, edge.tolist()))) for edge in axes.collections[0].get_segments()}
    expected = set()
    padded = np.pad(view.region, 1)
    for row, column in np.argwhere(view.region):
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            if not padded[row + 1 + dy, column + 1 + dx]:
                middle = np.array([column + dx / 2, row + dy / 2])
                half = np.array([abs(dy) / 2, abs(dx) / 2])
                expected.add(tuple(sorted([tuple((middle - half).tolist()), tuple((middle + half).tolist())])))
    assert drawn == expected and len(drawn) == 20 + 4 + 4


def offset_view(rows: int = 6, columns: int = 8, mask=True) -> OffsetField:
    random = np.random.default_rng(1)
    return OffsetField(
        layer="b", flow=random.normal(size=(2, rows, columns)), spread=random.random((rows, columns)) * 7,
        outside=random.random((rows, columns)), mask=random.random((rows, columns)) * 2 if mask else None,
        at=np.zeros((rows, columns, 2)), origin=(1.5, 0.5), step=(4.0, 3.5),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["flow", "spread", "outside", "mask"])
def test_cells_lie_around_their_units(axes, kind):
    drawn = draw_offset_field(axes, PICTURE, offset_view(), kind)
    left, right, bottom, top = drawn.get_extent()
    # The middles of the first and last of 6 x 8 cells.
    assert (top + 2, bottom - 2) == (1.5, 1.5 + 5 * 4) and (left + 1.75, right - 1.75) == (0.5, 0.5 + 7 * 3.5)
    assert axes.get_xlim() == (-0.5, 31.5) and axes.get_ylim() == (23.5, -0.5)


def test_amounts_have_a_colour_bar_with_their_unit(axes):
    view = offset_view()
    for kind, label, highest in (
        ("spread", "spread [image pixels]", view.spread.max()),
        ("outside", "share of samples outside", 1),
        ("mask", "mean mask", 2),
    ):
        drawn = draw_offset_field(axes, PICTURE, view, kind)
        np.testing.assert_array_equal(drawn.get_array(), getattr(view, kind))
        assert drawn.get_clim() == (0, highest) and axes.child_axes[-1].get_ylabel() == label
    below = replace(view, mask=view.mask / 4)
    assert draw_offset_field(axes, PICTURE, below, "mask", bar=False).get_clim() == (0, 1)
    assert len(axes.child_axes) == 3


def arrows(axes):
    (quiver,) = (one for one in axes.collections if isinstance(one, matplotlib.quiver.Quiver))
    return quiver


def test_arrows_begin_at_their_units_and_point_where_the_window_moves(axes):
    view = offset_view()
    draw_offset_field(axes, PICTURE, view)
    quiver = arrows(axes)
    assert quiver.get_offsets()[9].tolist() == [0.5 + 3.5, 1.5 + 4]  # x, y of unit (1, 1)
    np.testing.assert_allclose(quiver.U, view.flow[1].ravel())
    np.testing.assert_allclose(quiver.V, view.flow[0].ravel())
    assert quiver.angles == "xy" and quiver.scale_units == "xy"
    (wheel,) = axes.child_axes
    longest = np.percentile(np.hypot(*view.flow), 99)
    rim, scale = (text.get_text() for text in wheel.texts)
    assert rim.endswith(f"rim {longest:.2g} px") and scale == f"arrows x {1 / quiver.scale:.2g}"
    np.testing.assert_allclose(np.percentile(np.hypot(quiver.U, quiver.V), 95) / quiver.scale, 0.9 * 3.5)  # of a cell


def test_arrows_of_large_maps_are_means_over_blocks_around_their_middle(axes):
    view = offset_view(37, 65)
    draw_offset_field(axes, PICTURE, view, legend=False)
    quiver = arrows(axes)
    assert len(quiver.U) == 9 * 16 and axes.child_axes == []
    np.testing.assert_allclose(quiver.U[17], view.flow[1, 4:8, 4:8].mean())
    np.testing.assert_allclose(quiver.get_offsets()[17], [0.5 + 3.5 * 5.5, 1.5 + 4 * 5.5])


def test_flow_is_stronger_where_windows_move_farther(axes):
    view = replace(offset_view(), flow=np.zeros((2, 6, 8)))
    view.flow[:, 2, 3] = 3, 4
    view.flow[:, 4, 5] = np.nan  # of offsets that are not finite
    alpha = draw_offset_field(axes, PICTURE, view).get_array()[..., 3]
    assert alpha[2, 3] == 0.75 and np.count_nonzero(alpha) == 1
    faint = replace(view, flow=np.zeros((2, 6, 8)))
    faint.flow[0, 2, 3] = 0.035  # a hundredth of a cell: colours do not grow beyond all bounds
    alpha = draw_offset_field(axes, PICTURE, faint).get_array()[..., 3]
    np.testing.assert_allclose(alpha.max(), 0.075)


MATRICES = {  # how the colour-blind see linear RGB: Machado, Oliveira and Fernandes 2009, severity 1
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", MATRICES)
def test_the_colour_blind_can_tell_directions_apart(kind):
    color = pytest.importorskip("skimage.color")
    turn = np.arange(24) / 24 * 2 * np.pi
    colours = colour_wheel(np.stack([np.sin(turn), np.cos(turn)]))
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(MATRICES[kind]), 0, 1)
    seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = color.rgb2lab(seen[None])[0]
    # Differences of 2.3 are just seen; matplotlib's hsv has 3.8 at a right angle.
    for steps, least in ((6, 18), (12, 35)):  # a right angle, and the opposite
        assert color.deltaE_ciede2000(lab, np.roll(lab, steps, 0)).min() > least


@pytest.mark.parametrize("level", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("kind", "pixels"), [("unit", 20), ("regular", 8), ("dot", 12), ("ray", 12)])
def test_marks_are_legible_on_black_grey_and_white(level, kind, pixels):
    """Each has pixels, by its size, that are far from the background's brightness, also where its colour is near that."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    paper = figure.Figure(figsize=(1, 1), dpi=100)
    canvas, axes = FigureCanvasAgg(paper), paper.add_axes((0, 0, 1, 1))
    style.show(axes, np.full((20, 20), level))
    if kind == "dot":
        style.dots(axes, np.array([[10.0, 10]]), [30.0], color=str(level))
    elif kind == "ray":
        style.rays(axes, [[3.0, 3]], [[15.0, 12]])
    else:
        style.mark(axes, kind, [[10.0, 10]])
    canvas.draw()
    seen = np.asarray(canvas.buffer_rgba())[5:-5, 5:-5, :3] / 255 @ style.LUMINANCE
    assert np.count_nonzero(np.abs(seen - level) > 0.25) >= pixels


VIEWS = {
    "points": (draw_unit_points, unit_view),
    "locations": (draw_sampling_locations, locations),
    "field": (draw_receptive_field, field_view),
    "region": (draw_saliency_region, region_view),
    "offsets": (draw_offset_field, offset_view),
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_drawing_takes_tensors_and_goes_to_svg_with_its_text(name, tmp_path):
    torch = pytest.importorskip("torch")
    draw, view = VIEWS[name]
    paper = figure.Figure(figsize=(6, 5), layout="constrained")
    draw(paper.add_subplot(), torch.tensor(PICTURE).permute(2, 0, 1)[None], view())
    style.save(paper, tmp_path / "picture.svg")
    assert ("arrows x" if name == "offsets" else ">unit<") in (tmp_path / "picture.svg").read_text()


def test_the_same_picture_makes_the_same_svg(tmp_path):
    """Whatever form it has."""
    pillow = pytest.importorskip("PIL.Image")
    eight = np.rint(PICTURE * 255).astype(np.uint8)
    pillow.fromarray(eight).save(tmp_path / "photo.png")
    for image, name in ((eight, "array.svg"), (tmp_path / "photo.png", "file.svg")):
        paper = figure.Figure(figsize=(4, 3))
        draw_unit_points(paper.add_subplot(), image, unit_view())
        style.save(paper, tmp_path / name)
    assert (tmp_path / "array.svg").read_bytes() == (tmp_path / "file.svg").read_bytes()


def test_views_of_other_ranks_and_pictures_of_other_sizes_are_explained(axes):
    thin = replace(unit_view(), points=np.zeros((3, 1)))
    with pytest.raises(ShapeError, match=r"`view.points` has shape \(3, 1\); expected \(M, 2\)\. Pictures are drawn of 2-D"):
        draw_unit_points(axes, PICTURE, thin)
    deep = SimpleNamespace(**{**vars(locations()), "points": np.zeros((5, 3))})
    with pytest.raises(ShapeError, match=r"`view.points` has shape \(5, 3\)"):
        draw_sampling_locations(axes, PICTURE, deep)
    with pytest.raises(ShapeError, match=r"`view.field` is 12x20, and `image` 24x32; expected the picture that the model got"):
        draw_receptive_field(axes, PICTURE, field_view((12, 20)))
    solid = region_view()
    solid.region = np.zeros((4, 5, 6), bool)
    with pytest.raises(ShapeError, match=r"`view.region` has shape \(4, 5, 6\); expected \(H, W\)"):
        draw_saliency_region(axes, PICTURE, solid)
    with pytest.raises(ShapeError, match=r"`view.flow` has shape \(1, 9\); expected \(2, H_out, W_out\)"):
        draw_offset_field(axes, PICTURE, replace(offset_view(), flow=np.zeros((1, 9))))
    with pytest.raises(ShapeError, match="`image` has 1 axes"):
        draw_offset_field(axes, np.zeros(3), offset_view())


def test_kinds_of_field_that_are_not_there_are_explained(axes):
    with pytest.raises(ValueError, match="`kind` is 'hist'; expected one of 'flow', 'spread', 'outside', 'mask'"):
        draw_offset_field(axes, PICTURE, offset_view(), "hist")
    with pytest.raises(ValueError, match="layer 'b' has no masks to draw: it is v1"):
        draw_offset_field(axes, PICTURE, offset_view(mask=False), "mask")


def row(layer: str, scale: float, mask: bool = True, known: bool = True) -> LayerOffsets:
    edges = tuple(np.linspace(0, 2, 5).tolist())
    return LayerOffsets(
        layer=layer, index=0, mean=(3 * scale, 4 * scale), deviation=scale, largest=7 * scale,
        mean_image=(24 * scale, 32 * scale) if known else None, deviation_image=8 * scale if known else None,
        largest_image=56 * scale if known else None, outside=0.05 * scale, outside_regular=0.03,
        mask_mean=0.8 if mask else None, mask_histogram=((1, 5, 3, 0), edges) if mask else None,
    )  # fmt: skip


def test_statistics_are_drawn_in_a_row_for_each_layer():
    view = OffsetStatistics((row("a", 1), row("", 2, mask=False)))
    lengths, outside, masks = draw_offset_statistics(figure.Figure(), view)
    assert [label.get_text() for label in lengths.get_yticklabels()] == ["a", "(the model)"]
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in lengths.patches]
    np.testing.assert_allclose(bars, [(0, 8), (1, 16)])
    marks = {line.get_label(): line.get_xydata().tolist() for line in (*lengths.lines, *outside.lines, *masks.lines)}
    assert marks["largest"] == [[56, 0], [112, 1]] and lengths.get_xlabel() == "offsets [image pixels]"
    assert marks["without offsets"] == [[3, 0], [3, 1]] and marks["with them"] == [[5, 0], [10, 1]]
    assert [x for x, _ in marks["mean"]] == [0.8, 0.8]
    assert [text.get_text() for text in masks.texts] == ["no mask"]
    np.testing.assert_allclose(masks.patches[0].get_data().edges, np.linspace(0, 2, 5))
    heights = 0.35 - masks.patches[0].get_data().values
    np.testing.assert_allclose(heights / heights.max(), [0.2, 1, 0.6, 0])


def test_statistics_are_in_input_pixels_where_a_place_in_the_image_is_unknown():
    view = OffsetStatistics((row("a", 1), row("b", 2, mask=False, known=False)))
    lengths, *_ = draw_offset_statistics(figure.Figure(), view)
    means = next(line for line in lengths.lines if line.get_label() == "mean")
    assert means.get_xydata().tolist() == [[5, 0], [10, 1]] and lengths.get_xlabel() == "offsets [input pixels]"
    assert len(draw_offset_statistics(figure.Figure(), OffsetStatistics((row("b", 1, mask=False),)))) == 2


@pytest.mark.parametrize("name", ["animation", "draw", "draw_fields", "draw_points", "draw_statistics", "images", "overview"])
def test_examples(name):
    pytest.importorskip("torch")
    result = doctest.testmod(importlib.import_module(f"deformconv.plots.{name}"))
    assert result.failed == 0 and result.attempted >= 6


def test_drawing_without_matplotlib_tells_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="Drawing needs matplotlib, which is not installed: pip install"):
        style.new_figure()


def test_what_has_no_statistics_is_explained(axes):
    with pytest.raises(ValueError, match="no rows: no deformable layer was recorded"):
        draw_offset_statistics(figure.Figure(), OffsetStatistics(()))
    with pytest.raises(TypeError, match="`figure` is of type Axes; expected a matplotlib Figure or SubFigure"):
        draw_offset_statistics(axes, OffsetStatistics((row("a", 1),)))
