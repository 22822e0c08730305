"""The page in a real browser, from disk and without a network: what it draws, and what its controls do."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.browser import executable
from tests.plots.pages import field, picture, points_by_recursion, small_trace

from deformconv.plots.packing import Packing
from deformconv.plots.page import build, page

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.browser

STEM, DOWN, WIDE = range(3)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable())
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small trace: its top layer begins, and one layer has receptive fields."""
    fields = {"body.wide": [field((6, 8), (26.5, 34.5)), field((18, 24), (74.5, 98.5))]}
    document = build(
        small_trace(),
        picture(),
        receptive_fields=fields,
        start=("body.wide", (50.0, 66.0)),
        title="Waves",
        alt="Waves of colour",
    )
    path = tmp_path_factory.mktemp("page") / "look.html"
    path.write_text(page(document), encoding="utf-8")
    return path


class Look:
    """A page that is shown."""

    def __init__(self, shown: Any):
        self.shown = shown

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shown, name)

    def settle(self) -> None:
        """Wait until what was asked for has been drawn."""
        self.shown.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def until(self, condition: str, shown: Any = None) -> None:
        """Wait for a condition: Playwright's own way evaluates a text in the page, which its policy forbids."""
        for _ in range(300):
            if (shown or self.shown).evaluate(condition):
                return
            self.shown.wait_for_timeout(10)
        pytest.fail(f"{condition} has not come true")

    def press(self, *keys: str) -> None:
        self.shown.focus("#marks")
        for key in keys:
            self.shown.keyboard.press(key)
        self.settle()

    def choose(self, name: str, value: str) -> None:
        self.shown.locator(f"[name={name}][value='{value}']").check(force=True)
        self.settle()

    def click(self, at: tuple[float, float], **options: Any) -> None:
        """Click at an image position (y, x)."""
        y, x = self.shown.evaluate("(at) => deformconvLook.onCanvas(at)", at)
        self.shown.locator("#marks").click(position={"x": x, "y": y}, **options)
        self.settle()

    def points(self, which: int = 0) -> dict[str, Any]:
        return self.shown.evaluate("(which) => deformconvLook.points(which)", which)

    def state(self) -> dict[str, Any]:
        return self.shown.evaluate("deformconvLook.state")

    def pixels(self, canvas: str) -> np.ndarray:
        """A canvas, (height, width, 4)."""
        source = self.shown.evaluate("(id) => document.getElementById(id).toDataURL()", canvas)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGBA")).astype(int)

    def box(self, points: Any, space: float) -> tuple[slice, slice]:
        """The canvas around image positions."""
        on_canvas = np.array([self.shown.evaluate("(at) => deformconvLook.onCanvas(at)", list(at)) for at in points])
        (top, left), (bottom, right) = on_canvas.min(0) - space, on_canvas.max(0) + space
        return slice(max(int(top), 0), int(bottom) + 1), slice(max(int(left), 0), int(right) + 1)


class Shows:
    """Pages in windows of one's choice; none says anything on the console, or asks for anything but itself."""

    def __init__(self, browser: Any, file: Path):
        self.browser, self.file = browser, file
        self.contexts, self.opened, self.said, self.asked = [], [], [], []

    def __call__(self, path: Path | None = None, width: int = 1200, height: int = 800, **options: Any) -> Look:
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        self.contexts.append(context)
        context.set_offline(True)
        shown = context.new_page()
        shown.on("console", lambda message: self.said.append(message.text))
        shown.on("pageerror", lambda error: self.said.append(str(error)))
        shown.on("request", lambda request: self.asked.append(request.url))
        self.opened.append((path or self.file).as_uri())
        shown.goto(self.opened[-1])
        shown.evaluate("() => window.deformconvLook?.ready")
        return Look(shown)

    def check(self) -> None:
        assert self.said == []
        assert [url for url in self.asked if not url.startswith("data:")] == self.opened


@pytest.fixture
def shows(browser: Any, file: Path) -> Iterator[Shows]:
    made = Shows(browser, file)
    yield made
    for context in made.contexts:
        context.close()
    made.check()


@pytest.fixture(scope="module")
def wide(browser: Any, file: Path) -> Iterator[tuple[Shows, Look]]:
    made = Shows(browser, file)
    yield made, made()
    made.contexts[0].close()


@pytest.fixture
def look(wide: tuple[Shows, Look]) -> Iterator[Look]:
    """One page for many tests, each of which begins with what it shows at first."""
    made, one = wide
    one.mouse.move(1, 1)
    one.press("r")
    yield one
    made.check()


def test_it_opens_from_disk_without_a_network(look):
    assert look.title() == "Waves"
    assert not look.is_visible("#trouble")
    assert look.locator("#layer option").all_inner_texts() == ["stem", "body.down", "body.wide"]
    state = look.state()
    assert (state["layer"], state["at"], state["scale"], state["depth"]) == (WIDE, [[50, 66], None], 1, 1)
    colours = look.pixels("picture")
    inside = colours[look.box([(0, 0), (95, 127)], 0)]
    assert (inside[2:-2, 2:-2, 3] == 255).all() and inside[..., :3].std() > 20


@pytest.mark.parametrize("layer, name, layers", [(STEM, "stem", 1), (DOWN, "body.down", 2), (WIDE, "body.wide", 3)])
def test_points_are_numpys(look, layer, name, layers):
    look.select_option("#layer", str(layer))
    look.choose("depth", str(layers))
    # At the corners samples lie outside, and between the map and its padding.
    for at, scale in [((50.0, 66.0), 1), ((0.0, 0.0), 1.73), ((95.0, 127.0), 0)]:
        look.click(at)
        look.locator("#scale").fill(str(scale))
        found = look.points()
        points, weights = points_by_recursion(small_trace(), name, found["unit"], layers=layers, scale=scale)
        assert len(points) == sum(found["counts"])
        if scale:
            np.testing.assert_allclose(found["points"], points, atol=0.05 * layers * scale)
            np.testing.assert_allclose(found["weights"], weights, atol=0.02 * layers)
        else:
            distance = np.linalg.norm(points[:, None] - np.array(found["points"]), axis=-1)
            assert distance.min(0).max() < 1e-6 and distance.min(1).max() < 1e-6
            merged = np.bincount(distance.argmin(1), weights)
            np.testing.assert_allclose(found["weights"], merged, atol=0.02 * len(points) / len(merged))
            np.testing.assert_allclose(found["regular"], found["points"])


def test_points_at_the_maps_edge_are_numpys(look):
    """Samples that lie between the first units of the layer before and its padding."""
    look.select_option("#layer", str(DOWN))
    look.choose("depth", "2")
    between = 0
    for at in [(0.0, 20.0), (0.0, 60.0), (0.0, 100.0), (20.0, 0.0), (60.0, 0.0), (95.0, 40.0), (40.0, 127.0)]:
        look.click(at)
        found = look.points()
        points, weights = points_by_recursion(small_trace(), "body.down", found["unit"], layers=2)
        np.testing.assert_allclose(found["points"], points, atol=0.1)
        np.testing.assert_allclose(found["weights"], weights, atol=0.04)
        top, _ = points_by_recursion(small_trace(), "body.down", found["unit"])
        between += (((top > -1.5) & (top < 0.5)) | ((top > [94.5, 126.5]) & (top < [96.5, 128.5]))).any(-1).sum()
    assert between > 20


def test_a_click_moves_to_the_nearest_unit(look):
    look.click((10.2, 101.1))  # units of the layer lie at 0.5, 4.5, ...
    found = look.points()
    assert found["unit"] == [2, 25] and found["at"] == [8.5, 100.5] and len(found["points"]) == 18
    assert look.locator("#numbers tbody td").first.inner_text() == "2, 25"
    label = look.get_attribute("#marks", "aria-label")
    assert label.startswith("Waves of colour. Position A: unit at row 2, column 25 of layer body.wide, image pixel y 9, x 101.")
    look.until("document.getElementById('said').textContent.includes('row 2, column 25')")


def test_the_marks_change_where_the_points_are(look):
    look.select_option("#layer", str(STEM))
    look.mouse.move(1, 1)
    look.settle()
    for at in [(30.0, 40.0), (70.0, 100.0)]:
        look.press("r")
        look.select_option("#layer", str(STEM))
        look.click(at)
        look.mouse.move(1, 1)
        look.settle()
        found = look.points()
        marks = look.pixels("marks")[..., 3]
        inside = look.box(found["points"] + found["regular"] + [found["at"]], 12)
        assert (marks[inside] > 0).mean() > 0.02
        marks[inside] = 0
        assert not marks.any()
        # Every point is seen: its colour is at its middle, unless another mark is drawn over it.
        colours = look.pixels("marks")
        places = [look.evaluate("(at) => deformconvLook.onCanvas(at)", point) for point in found["points"]]
        orange = [np.abs(colours[int(y), int(x), :3] - (255, 176, 0)).max() < 40 for y, x in places]
        assert sum(orange) >= len(orange) - 2


def test_views_change_the_picture_and_not_what_is_around_it(look):
    before = look.pixels("picture")
    image = look.box([(0, 0), (95, 127)], -3)
    seen = []
    for kind in ["field", "arrows", "colours", "spread", "mask"]:
        look.choose("overlay", kind)
        after = look.pixels("picture")
        changed = (after != before).any(-1)
        assert changed[image].mean() > 0.1, kind
        outside = changed.copy()
        outside[look.box([(0, 0), (95, 127)], 10)] = False
        assert not outside.any(), kind
        assert all((after != other).any() for other in seen), kind
        seen.append(after)
        assert look.is_visible("#key"), kind
    look.choose("overlay", "none")
    assert (look.pixels("picture") == before).all() and not look.is_visible("#key")


def test_the_receptive_field_is_the_nearest_that_there_is(look):
    look.choose("overlay", "field")
    look.click((30.0, 30.0))
    assert (
        "Receptive field of unit (6, 8), dashed: the nearest that was computed. Effective radius 20.0 px."
        in look.inner_text("#note")
    )
    near = look.pixels("picture")
    look.click((26.5, 34.5))
    # The layer's units lie at 0.5 + 4*unit: (26, 34) is unit (6, 8) or (7, 9).
    assert "Receptive field" in look.inner_text("#note")
    assert (look.pixels("picture") == near).all()
    look.click((90.0, 90.0))
    assert "of unit (18, 24)" in look.inner_text("#note")
    # The heat is where the field is: reddest around unit (18, 24), grey at the other end.
    colours = look.pixels("picture")
    hot, cold = (colours[look.box([at], 3)][..., :3].astype(int) for at in [(74.5, 98.5), (10.0, 20.0)])
    assert (hot[..., 0] - hot[..., 2]).mean() > 15 > np.abs(cold[..., 0] - cold[..., 2]).mean()
    look.select_option("#layer", str(STEM))
    assert look.locator("[name=overlay][value=field]").count() == 0 and look.state()["overlay"] == "none"


def test_keys(look):
    start = look.points()["unit"]
    look.press("ArrowRight", "ArrowDown", "ArrowDown")
    assert look.points()["unit"] == [start[0] + 2, start[1] + 1]
    look.press("ArrowLeft", "ArrowUp", "Shift+ArrowRight")
    assert look.points()["unit"] == [start[0] + 1, start[1] + 5]
    look.press(*["Shift+ArrowUp"] * 7, *["Shift+ArrowLeft"] * 9)
    assert look.points()["unit"] == [0, 0]
    look.press("2", "[", "[", "v")
    state = look.state()
    assert (state["depth"], round(state["scale"], 2), state["overlay"]) == (2, 0.9, "field")
    look.press("3", "]", "PageUp")
    state = look.state()
    assert (state["layer"], state["depth"], round(state["scale"], 2)) == (DOWN, 2, 0.95)  # there are no three layers
    look.press("+", "+", "-")
    assert look.state()["zoom"] == 2
    look.press("c")
    assert look.state()["active"] == 1 and look.points(1)["unit"] != look.points()["unit"]
    look.press("r")
    state = look.state()
    assert (state["layer"], state["at"], state["zoom"], state["scale"]) == (WIDE, [[50, 66], None], 1, 1)


def test_a_key_elsewhere_does_nothing(look):
    look.focus("#layer")
    before = look.points()
    look.keyboard.press("v")
    look.keyboard.press("c")
    assert look.state()["overlay"] == "none" and look.points() == before
    # Radio buttons have keys of their own, and the focus stays with them.
    look.focus("[name=overlay][value=none]")
    look.keyboard.press("ArrowRight")
    look.keyboard.press("ArrowRight")
    assert look.state()["overlay"] == "arrows" and look.evaluate("document.activeElement.value") == "arrows"


def test_the_slider_scales_the_offsets(look):
    plain = look.points()["regular"]
    look.focus("#scale")
    look.keyboard.press("Home")
    np.testing.assert_allclose(look.points()["points"], plain)
    assert look.inner_text("#amount").endswith("0.00")
    look.keyboard.press("End")
    trace = small_trace()
    twice, _ = points_by_recursion(trace, "body.wide", look.points()["unit"], scale=2)
    np.testing.assert_allclose(look.points()["points"], twice, atol=0.1)


def test_play_lets_the_offsets_grow(look):
    look.click((50.0, 66.0))
    before = look.pixels("marks")
    look.locator("#play").click()
    look.until("deformconvLook.state.scale < 0.7")
    assert look.inner_text("#play") == "Pause"
    look.locator("#play").click()
    look.settle()
    scale = look.state()["scale"]
    assert scale < 0.7 and float(look.input_value("#scale")) == pytest.approx(scale, abs=0.006)
    look.wait_for_timeout(60)
    assert look.state()["scale"] == scale
    assert (look.pixels("marks") != before).any()


def test_without_motion_play_leaps(shows):
    look = shows(reduced_motion="reduce")
    look.locator("#play").click()
    assert look.state()["scale"] == 0
    look.wait_for_timeout(60)
    assert look.state()["scale"] == 0


def test_a_second_position(look):
    first = look.points()
    look.click((20.0, 20.0), modifiers=["Shift"])
    assert look.points() == first and look.points(1)["unit"] == [5, 5]
    assert look.locator("#numbers thead th").all_inner_texts() == ["A", "B"]
    colours = look.pixels("marks")
    blue, orange = ((np.abs(colours[..., :3] - colour).max(-1) < 20) for colour in [(92, 200, 255), (255, 176, 0)])
    assert blue.sum() > 100 and orange.sum() > 100
    assert "Position B: unit at row 5" in look.get_attribute("#marks", "aria-label")
    look.choose("position", "0")
    look.press("ArrowUp")
    assert look.points()["unit"] == [first["unit"][0] - 1, first["unit"][1]] and look.points(1)["unit"] == [5, 5]
    look.locator("#remove").click()
    assert look.points(1) is None and look.locator("#numbers thead th").all_inner_texts() == ["A"]
    look.choose("position", "1")  # the button alone chooses a place as well
    assert look.points(1)["unit"] != look.points()["unit"]


def test_numbers_under_the_pointer(look):
    y, x = look.evaluate("deformconvLook.onCanvas([34.6, 70.2])")
    box = look.locator("#marks").bounding_box()
    look.mouse.move(box["x"] + x, box["y"] + y)
    look.settle()
    made = small_trace().calls[WIDE]
    offset = made.offset[0].reshape(2, 9, 2, 24, 32)[..., 9, 17].astype(float) * 4
    mean = offset.mean((0, 1))
    spread = np.sqrt(((offset - mean) ** 2).sum(-1).mean())
    mask = made.mask[0][:, 9, 17].mean()
    text = look.inner_text("#pointer").replace("\u2212", "-")
    assert text.startswith("pixel (35, 70) · unit (9, 17) · mean offset (")
    shown = [float(part) for part in text.split("mean offset (")[1].split(")")[0].split(", ")]
    np.testing.assert_allclose(shown, mean, atol=0.06)
    assert float(text.split("spread ")[1].split()[0]) == pytest.approx(spread, abs=0.06)
    assert float(text.split("mask ")[1]) == pytest.approx(mask, abs=0.01)


def test_an_offset_group_and_statistics(look):
    look.select_option("#group", label="2")
    look.settle()
    found = look.points()
    points, _ = points_by_recursion(small_trace(), "body.wide", found["unit"], group=1)
    np.testing.assert_allclose(found["points"], points, atol=0.05)
    look.choose("depth", "2")
    points, _ = points_by_recursion(small_trace(), "body.wide", found["unit"], layers=2, group=1)
    assert sum(look.points()["counts"]) == len(points) > 81  # of the layer before, all groups
    np.testing.assert_allclose(look.points()["points"], points, atol=0.1)
    look.select_option("#layer", str(STEM))
    assert not look.is_visible("#groups") and look.inner_text("#of-layer") == "stem"
    made = small_trace().calls[STEM]
    assert f"{made.mask.mean():.2f}" in look.inner_text("#statistics")
    assert f"{np.abs(made.offset).max() * 2:.1f} px" in look.inner_text("#statistics")


def test_positions_that_there_was_no_room_for(shows, tmp_path):
    """Every second position of the largest layer is kept; a sample whose offset is NaN is not drawn."""
    trace = small_trace()
    trace.calls[STEM].offset[0, 0, 10, 20] = np.nan
    whole = build(trace, picture())
    room = len(page(whole).encode()) - len(whole["layers"][STEM]["offset"]["data"]) * 3 // 4
    document = build(trace, picture(), limit=room, start=("stem", (23.0, 45.0)))
    assert [entry["every"] for entry in document["layers"]] == [2, 1, 1]
    path = tmp_path / "small.html"
    path.write_text(page(document), encoding="utf-8")
    look = shows(path)
    assert "room for every second row and column" in look.inner_text("#missing")
    for at, unit in [((26.0, 47.0), [12, 24]), ((95.0, 127.0), [46, 62])]:  # units lie at 0.5, 2.5, ...
        look.click(at)
        found = look.points()
        points, _ = points_by_recursion(trace, "stem", unit)
        assert found["unit"] == unit
        np.testing.assert_allclose(found["points"], points, atol=0.05)
    look.click((20.5, 40.5))
    assert look.points()["unit"] == [10, 20] and len(look.points()["points"]) == 8
    assert look.locator("#numbers tbody td").nth(2).inner_text() == "not a number"
    look.press("ArrowRight")
    assert look.points()["unit"] == [10, 22]


def test_a_stack_through_a_layer_of_fewer_positions(shows, tmp_path):
    """Where that layer's offsets are the same everywhere, those that were kept say all, up to the map's edges."""
    trace = small_trace()
    stem = trace.calls[STEM]
    for values in (stem.offset, stem.mask):
        values[:] = values[..., :1, :1]
    document = build(trace, picture(), start=("body.down", (50.0, 66.0)))
    entry = Packing(stem, stem.geometry, [], every=3, tolerance=0.002).entry()
    document["layers"][STEM] |= {name: entry[name] for name in ("every", "offset", "mask")}
    path = tmp_path / "thin.html"
    path.write_text(page(document), encoding="utf-8")
    look = shows(path)
    look.press("2")
    for at in [(50.0, 66.0), (0.0, 60.0), (95.0, 127.0)]:
        look.click(at)
        found = look.points()
        points, weights = points_by_recursion(trace, "body.down", found["unit"], layers=2)
        np.testing.assert_allclose(found["points"], points, atol=0.1)
        np.testing.assert_allclose(found["weights"], weights, atol=0.04)


def test_padding_that_is_not_of_zeros_weighs_as_the_map(shows, tmp_path):
    trace = small_trace()
    trace.calls[WIDE].padding_mode = "reflect"
    path = tmp_path / "reflect.html"
    path.write_text(page(build(trace, picture(), start=("body.wide", (0.0, 0.0)))), encoding="utf-8")
    look = shows(path)
    look.press("1")
    found = look.points()
    points, weights = points_by_recursion(trace, "body.wide", found["unit"])
    np.testing.assert_allclose(found["points"], points, atol=0.05)
    np.testing.assert_allclose(found["weights"], weights, atol=0.02)
    _, of_zeros = points_by_recursion(small_trace(), "body.wide", found["unit"])
    assert (weights - of_zeros).max() > 0.5  # samples in the padding weigh nothing there


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone(shows, width):
    look = shows(width=width, height=740, has_touch=True, is_mobile=True, device_scale_factor=2)
    assert look.evaluate("document.documentElement.scrollWidth") <= width
    y, x = look.evaluate("deformconvLook.onCanvas([20, 30])")
    look.locator("#marks").tap(position={"x": x, "y": y})
    look.settle()
    assert look.points()["unit"] == [5, 7]
    look.locator("#all summary").tap()
    look.locator("#help summary").tap()
    look.choose("position", "1")
    look.choose("overlay", "colours")
    assert look.evaluate("document.documentElement.scrollWidth") <= width
    small = look.evaluate(
        """() => [...document.querySelectorAll("button, select, summary, .choice, input[type=range]")]
        .filter((one) => one.getClientRects().length && getComputedStyle(one).visibility === "visible")
        .filter((one) => Math.min(one.getBoundingClientRect().width, one.getBoundingClientRect().height) < 44)
        .map((one) => one.outerHTML)"""
    )
    assert small == []
    ratio = look.evaluate("document.getElementById('marks').width / document.getElementById('marks').clientWidth")
    assert ratio == pytest.approx(2, abs=0.01)


def test_dark_and_light(shows):
    def ground(look: Look) -> int:
        colour = look.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(", ")))

    light, dark = shows(color_scheme="light"), shows(color_scheme="dark")
    assert ground(light) > 600 > 150 > ground(dark)
    assert dark.get_attribute("#theme", "aria-pressed") == "true"
    for look in (light, dark):
        look.locator("#theme").click()
    assert ground(dark) > 600 > 150 > ground(light)
    assert dark.get_attribute("#theme", "aria-pressed") == "false"


def test_two_in_a_notebook_know_nothing_of_each_other(shows, file, tmp_path):
    """As frames without an origin, in which there is no storage either."""
    frame = (
        f'<iframe sandbox="allow-scripts" width="1000" height="700" srcdoc="{html.escape(file.read_text("utf-8"))}"></iframe>'
    )
    notebook = tmp_path / "notebook.html"
    notebook.write_text("<!doctype html>" + 2 * frame, encoding="utf-8")
    look = shows(notebook, height=1500)
    first, second = look.frames[1:]
    for one in (first, second):
        look.until("Boolean(window.deformconvLook?.state.view)", one)
    first.focus("#marks")
    look.keyboard.press("ArrowRight")
    look.keyboard.press("3")
    assert first.evaluate("deformconvLook.state.depth") == 3 and second.evaluate("deformconvLook.state.depth") == 1
    assert first.evaluate("deformconvLook.points().unit") != second.evaluate("deformconvLook.points().unit")


def test_a_browser_that_cannot_unpack_is_told(browser, file):
    context = browser.new_context(offline=True)
    context.add_init_script("delete window.DecompressionStream")
    shown = context.new_page()
    shown.goto(file.as_uri())
    assert "unpacks its numbers with DecompressionStream, which this browser lacks" in shown.inner_text("#trouble")
    context.close()


def test_a_position_is_drawn_within_a_frame(look):
    look.press("3")
    took = []
    for key in ["ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowRight"]:
        look.press(key)
        took.append(look.state()["milliseconds"])
    assert sum(look.points()["counts"]) > 1000  # 18 x 9 x 9, but for those at the edge
    assert min(took) < 16  # the least, which other programs delay the least
