"""A GIF shows what was drawn, grows from the plain window, and stays small."""

import io

import numpy as np
import pytest

from deformconv.errors import ShapeError
from deformconv.plots.animation import animate_unit_points
from deformconv.plots.stack import UnitPoints

pytest.importorskip("matplotlib")
pillow = pytest.importorskip("PIL.Image")

RANDOM = np.random.default_rng(0)
REGULAR = np.array([[y, x] for y in (20.0, 30, 40) for x in (30.0, 40, 50)])
MOVED = RANDOM.uniform(-12, 12, (9, 2))
IMAGE = np.linspace(0, 1, 60 * 80 * 3).reshape(60, 80, 3)


def view(scale: float, unit=(3, 4), layers=("a",)) -> UnitPoints:
    return UnitPoints(
        layers=layers, unit=unit, at=(30.0, 40.0), points=REGULAR + scale * MOVED, weights=np.linspace(0.2, 1.8, 9),
        counts=np.ones(9, np.int64), regular=REGULAR, regular_weights=np.ones(9),
    )  # fmt: skip


def frames(path):
    with pillow.open(path) as gif:
        found = []
        for number in range(gif.n_frames):
            gif.seek(number)
            found.append((np.asarray(gif.convert("RGB")), gif.info["duration"]))
        return found, gif.info["loop"]


def test_a_gif_grows_from_the_plain_window_and_begins_anew(tmp_path):
    animate_unit_points([view(scale) for scale in (0, 0.5, 1)], IMAGE, tmp_path / "a.gif", width=300, seconds=0.4)
    found, loop = frames(tmp_path / "a.gif")
    assert loop == 0 and [duration for _, duration in found] == [700, 200, 1600]
    assert {picture.shape for picture, _ in found} == {(round(300 * 60 / 80) + 34, 300, 3)}
    first, middle, last = (picture.astype(int) for picture, _ in found)
    # A point's place changes, and a place that nothing moves to or from does not.
    pixel = 300 / 80
    y, x = ((REGULAR[0] + 0.5) * pixel).astype(int)
    assert np.abs(first[y - 3 : y + 4, x - 3 : x + 4] - last[y - 3 : y + 4, x - 3 : x + 4]).max() > 50
    assert (first[-34:] == last[-34:]).all() and (first[60:, :40] == middle[60:, :40]).all()


def test_a_gif_shows_the_colours_that_were_drawn(tmp_path, monkeypatch):
    from deformconv.plots import animation

    drawn, write = [], animation._write
    monkeypatch.setattr(animation, "_write", lambda pictures, *more: (drawn.extend(pictures), write(pictures, *more)))
    animate_unit_points([view(scale) for scale in np.linspace(0, 1, 4)], IMAGE, tmp_path / "a.gif", width=240)
    found, _ = frames(tmp_path / "a.gif")
    assert len(found) == len(drawn) == 4
    for (picture, _), expected in zip(found, drawn, strict=True):
        away = np.abs(picture.astype(int) - expected)
        assert away.mean() < 6 and np.percentile(away, 99) < 40
    yellow = np.abs(found[-1][0].astype(int) - (0xF0, 0xE4, 0x42)).sum(axis=2) < 30
    assert np.count_nonzero(yellow[:-34]) >= 10  # the unit's cross, in a picture with many colours


def test_what_does_not_move_takes_no_room(tmp_path):
    noise = RANDOM.random((60, 80, 3))
    sizes = []
    for count in (2, 7):
        animate_unit_points([view(scale) for scale in np.linspace(0, 1, count)], noise, tmp_path / "a.gif", width=240)
        sizes.append((tmp_path / "a.gif").stat().st_size)
    file = io.BytesIO()
    with pillow.open(tmp_path / "a.gif") as gif:
        gif.convert("RGB").quantize(256).save(file, "gif")
    assert sizes[1] - sizes[0] < 5 * 0.35 * len(file.getvalue())


def test_what_makes_no_animation_is_explained(tmp_path):
    path = tmp_path / "a.gif"
    with pytest.raises(ValueError, match="`views` has 1; expected at least 2: `unit_points` of one unit with growing `scale`"):
        animate_unit_points([view(0)], IMAGE, path)
    with pytest.raises(ValueError, match=r"`views` are of 2 units, \(0, 1\) and \(3, 4\) among them; expected one unit"):
        animate_unit_points([view(0), view(1, unit=(0, 1))], IMAGE, path)
    with pytest.raises(ValueError, match=r"`path` is 'a\.png'; expected a name that ends in \.gif"):
        animate_unit_points([view(0), view(1)], IMAGE, "a.png")
    with pytest.raises(ValueError, match="`scales` has 3 numbers for 2 views"):
        animate_unit_points([view(0), view(1)], IMAGE, path, scales=[0, 1, 2])
    with pytest.raises(ShapeError, match="`image` has 1 axes"):
        animate_unit_points([view(0), view(1)], np.zeros(5), path)
    assert not path.exists()
