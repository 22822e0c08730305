"""The training of the net that the package ships: its scenes, its terms, and that it writes a net."""

import numpy as np
import pytest

for needed in ("torch", "skimage", "sklearn"):
    pytest.importorskip(needed)

import torch  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from deformconv.plots.example import DILATION, STEP, example_net  # noqa: E402
from deformconv.studies import regions  # noqa: E402
from deformconv.studies.regions import Scene  # noqa: E402


def halves(side: int = 96) -> Scene:
    """A black and a white half."""
    labels = np.indices((side, side))[1] >= side // 2
    return Scene(np.repeat(labels[..., None], 3, 2).astype(np.float32), labels.astype(np.int64))


def test_photographs_are_divided_where_colours_change():
    image = halves(80).image
    found = regions.regions(image)
    # A seam along the edge belongs to one of the halves.
    assert len(np.unique(found)) == 2
    assert (found[:, :36] == found[0, 0]).all() and (found[:, 44:] == found[0, -1]).all()


def test_scenes_are_those_of_their_seed_and_keep_regions_with_pixels():
    photographs = [halves(120)]
    first, again, other = (regions.scene(np.random.default_rng(seed), photographs) for seed in (3, 3, 4))
    assert (first.image == again.image).all() and (first.regions == again.regions).all()
    assert first.image.shape == other.image.shape and (first.image != other.image).any()
    # Without blobs and noise a region has one colour.
    part = regions._part(np.random.default_rng(0), photographs, 96)
    for label in np.unique(part.regions):
        assert np.ptp(part.image[part.regions == label], axis=0).max() == 0


def test_what_is_to_be_painted_is_the_mean_of_the_own_region():
    scene = halves()
    batch = regions._batch([scene])
    torch.testing.assert_close(batch.painted[0], batch.images[0, :, ::STEP, ::STEP])
    random = np.random.default_rng(0).random(scene.image.shape).astype(np.float32)
    batch = regions._batch([scene._replace(image=random)])
    # By hand, for one cell at the edge.
    y, x = np.indices(scene.regions.shape)
    weight = np.exp(-0.5 * ((y - 20) ** 2 + (x - 44) ** 2) / regions.REACH**2) * (x < 48)
    expected = (weight[..., None] * random).sum((0, 1)) / weight.sum()
    np.testing.assert_allclose(batch.painted[0, :, 5, 11], expected, rtol=1e-5)


def test_samples_outside_of_their_region_cost_their_distance():
    batch = regions._batch([halves()])
    outside = regions._outside(torch.zeros(1, 18, 24, 24), batch.away, batch.own)[0]
    # Cell 11 is the last of the left half; the right taps lie at 14, the first cell of the right half is 12.
    assert outside[5, 12, 11].item() == pytest.approx(DILATION)
    assert outside[4].abs().max() == 0
    # Beyond the picture too.
    assert outside[3, 12, 0].item() == pytest.approx(DILATION)
    offset = torch.zeros(1, 18, 24, 24)
    offset[0, 2 * 5 + 1] = -DILATION - 0.5
    assert regions._outside(offset, batch.away, batch.own)[0, 5, 12, 11].item() == 0


def test_points_are_counted_in_the_region_of_their_unit():
    labels = halves(16).regions
    points = np.zeros((2, 2, 4, 4))
    points[:, 0] = STEP * np.indices((4, 4))[0]
    points[0, 1] = STEP * np.indices((4, 4))[1]
    points[1, 1] = 3  # the left half
    points[1, 0, :, 0] = -1  # outside
    assert regions._share(points, labels) == pytest.approx((16 + 4) / 32)


def test_the_program_trains_a_net_and_writes_it(monkeypatch, tmp_path):
    photographs = [halves(120)]
    monkeypatch.setattr(regions, "material", lambda: photographs)
    monkeypatch.setattr(regions, "_BATCH", 2)
    monkeypatch.setattr(regions, "HELD_OUT", ("coffee",))
    threads = torch.get_num_threads()
    path = tmp_path / "net.npz"
    try:
        result = CliRunner().invoke(regions.main, ["--steps", "3", "--output", str(path)])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "coffee: error" in result.output
    trained = regions.train(photographs, 3, 0)
    written = example_net(path)
    torch.testing.assert_close(written.first.weight, trained.first.weight, atol=1e-4, rtol=1e-3)
    assert written.predict[0].weight.any()


def test_the_plain_net_keeps_its_offsets_at_zero(monkeypatch):
    monkeypatch.setattr(regions, "_BATCH", 2)
    net = regions.train([halves(120)], 2, 0, deformable=False)
    _, offsets = net.paint(*(torch.rand(1, 3, 96, 96),) * 2)
    assert not any(offset.any() for offset in offsets)


def test_photographs_in_which_no_scene_has_room_are_left_out():
    assert regions.material(["china.jpg"], [100]) == []
    (found,) = regions.material(["coffee"], [150])
    assert found.image.shape == (100, 150, 3) and found.regions.shape == (100, 150)
