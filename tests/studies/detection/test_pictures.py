"""Pictures of the experiment: that they show where bins lie, and which detections are right."""

import numpy as np
import pytest

for needed in ("torchvision", "matplotlib", "mlxtend", "skimage"):
    pytest.importorskip(needed, reason="the pictures need it")
torch = pytest.importorskip("torch")

from deformconv.studies.detection import pictures  # noqa: E402
from deformconv.torch import deform_roi_pool  # noqa: E402


def test_bins_are_drawn_where_they_are_pooled():
    """Pooling of a map whose pixels hold their own position gives the middles of bins."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    ramps, box = torch.stack([x, y])[None].double(), torch.tensor([[20.0, 24.0, 41.0, 38.0]]).double()
    offset = torch.rand(1, 2, 7, 7, generator=torch.Generator().manual_seed(0)).double() * 6 - 3
    expected = deform_roi_pool(ramps, [box], offset, convention="unaligned", gamma=0.1)[0]
    found = pictures.bins(box[0].numpy(), offset[0].numpy() * 0.1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)


class Finder(torch.nn.Module):
    """Detects the same in every image: a right box, one of the wrong class, one beside the digit, and one of a low score."""

    def forward(self, images):
        boxes = torch.tensor([[10.0, 10, 30, 30], [10, 10, 30, 30], [25, 25, 45, 45], [10, 10, 30, 30]])
        labels, scores = torch.tensor([3, 4, 3, 3]), torch.tensor([0.9, 0.8, 0.7, 0.1])
        return [{"boxes": boxes, "labels": labels, "scores": scores}] * len(images)


def test_detections_are_marked_as_right_or_wrong():
    target = {"boxes": torch.tensor([[10.0, 10, 30, 32]]), "labels": torch.tensor([3])}
    figure = pictures.found({"one": Finder(), "two": Finder()}, [(torch.rand(3, 64, 64), target)] * pictures.SHOWN)
    assert len(figure.axes) == 2 * pictures.SHOWN
    for axes in figure.axes:
        assert [patch.get_linestyle() for patch in axes.patches] == ["-", "--", "--"]
        assert [text.get_text() for text in axes.texts] == ["2", "3", "2"]  # labels count from 1, digits from 0
    assert [axes.get_ylabel() for axes in figure.axes[:: pictures.SHOWN]] == ["one", "two"]
