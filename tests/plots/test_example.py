"""The net that the package ships is small, loads without running code, and samples within objects."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deformconv.plots import regular_points, sampling_points  # noqa: E402
from deformconv.plots.example import DILATION, FILE, LAYERS, STEP, ExampleNet, example_net, save  # noqa: E402
from deformconv.torch import DeformConv2d  # noqa: E402

WINDOW = {"padding": DILATION, "dilation": DILATION}


@pytest.fixture(scope="module")
def net():
    return example_net()


def disc(size: int = 160, radius: float = 30):
    """An orange disc on blue, and where it is."""
    y, x = np.indices((size, size)) - size / 2
    within = np.hypot(y, x) < radius
    image = np.where(within[..., None], [0.9, 0.5, 0.1], [0.1, 0.3, 0.6])
    return torch.tensor(image.transpose(2, 0, 1)[None], dtype=torch.float32), within


def share_within(points, within) -> float:
    """The share of points (K, 2, h, w), image pixels, of the disc's units that lie on the disc."""
    units = within[::STEP, ::STEP]
    nearest = np.rint(points[:, :, units]).astype(int).clip(0, len(within) - 1)
    return within[nearest[:, 0], nearest[:, 1]].mean()


def test_the_file_is_small_and_holds_arrays_alone():
    assert FILE.stat().st_size < 400_000
    with np.load(FILE, allow_pickle=False) as arrays:
        assert {arrays[name].dtype for name in arrays.files} <= {np.dtype(t) for t in (np.float16, np.float32, np.int64)}
        assert all(np.isfinite(arrays[name]).all() for name in arrays.files)


def test_its_deformable_layers_have_names(net):
    assert not net.training
    assert [name for name, module in net.named_modules() if isinstance(module, DeformConv2d)] == list(LAYERS)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (64, 64), (101, 75)])
def test_images_of_any_size_become_a_map_of_cells(net, size):
    painted = net(torch.rand(2, 3, *size))
    assert painted.shape == (2, 3, *(-(-length // STEP) for length in size))
    assert painted.isfinite().all()


def test_it_paints_the_same_every_time():
    image = torch.rand(1, 3, 40, 52, generator=torch.Generator().manual_seed(0))
    assert torch.equal(example_net()(image), example_net()(image))


def test_a_grey_picture_is_painted_grey(net):
    image, _ = disc()
    painted = net(image[:, 1:2].expand(-1, 3, -1, -1))
    assert painted.std(1).mean() < 0.05


def test_the_colours_of_a_disc_and_of_what_surrounds_it_are_painted(net):
    image, _ = disc()
    painted = net(image)[0]
    torch.testing.assert_close(painted[:, 20, 20], image[0, :, 80, 80], atol=0.1, rtol=0)
    torch.testing.assert_close(painted[:, 6, 6], image[0, :, 24, 24], atol=0.1, rtol=0)


def test_samples_of_a_disc_stay_on_it(net):
    image, within = disc()
    _, offsets = net.paint(image, image)
    regular = share_within(STEP * regular_points(offsets[0].shape[2:], 3, **WINDOW), within)
    for offset in offsets:
        points = STEP * sampling_points(offset.detach(), 3, **WINDOW)[0, 0]
        assert share_within(points, within) > regular + 0.1


def test_samples_of_the_undeformed_net_are_the_plain_windows():
    _, offsets = ExampleNet(deformable=False).paint(*(torch.rand(1, 3, 32, 32),) * 2)
    assert not any(offset.any() for offset in offsets)


def test_a_net_without_training_takes_the_mean_of_its_windows():
    painted = ExampleNet()(torch.full((1, 3, 160, 160), 0.25))
    torch.testing.assert_close(painted[:, :, 12:-12, 12:-12], torch.full((1, 3, 16, 16), 0.25))


def test_a_saved_net_is_the_same_but_for_rounding(net, tmp_path):
    save(net, tmp_path / "again.npz")
    again = example_net(tmp_path / "again.npz")
    # What was loaded is in float16 already.
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name]), name


def test_on_a_photograph_that_it_has_not_seen_samples_stay_in_their_region(net):
    for needed in ("skimage", "sklearn"):
        pytest.importorskip(needed)
    from deformconv.studies.regions import report

    found = report(net, "coffee")
    assert min(found.share) > found.share_regular + 0.2
    assert min(found.length) > 4
