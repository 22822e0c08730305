"""Average precision, where it can be counted by hand."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pycocotools")
evaluation = pytest.importorskip("deformconv.studies.detection.evaluation")


def target(*objects):
    """Of (label, left, top, side)."""
    boxes = torch.tensor([[x, y, x + side, y + side] for _, x, y, side in objects], dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor([label for label, *_ in objects], dtype=torch.int64)}


def found(*objects):
    """Of (score, label, left, top, side)."""
    return {**target(*(one for _, *one in objects)), "scores": torch.tensor([score for score, *_ in objects])}


def test_all_found_and_nothing_else():
    truth = target((1, 10, 10, 12), (2, 40, 40, 20), (3, 60, 10, 40))
    scores = evaluation.scores([(truth, found((0.9, 1, 10, 10, 12), (0.8, 2, 40, 40, 20), (0.7, 3, 60, 10, 40)))])
    assert pytest.approx((100, 100, 100)) == (scores.AP, scores.AP50, scores.AP75)
    assert scores.octaves.pop(">64") is None
    assert scores.octaves == pytest.approx({"<16": 100, "16-32": 100, "32-64": 100})


def test_none_found_and_the_wrong_class():
    pair = (target((1, 10, 10, 12)), found((0.9, 2, 10, 10, 12)))
    assert evaluation.scores([pair]).AP == 0
    assert evaluation.scores([(pair[0], found())]).AP == 0


def test_half_of_the_objects():
    """Recall 0.5 at precision 1: 51 of COCO's 101 recalls."""
    truth = target((1, 10, 10, 12), (1, 40, 40, 12))
    scores = evaluation.scores([(truth, found((0.9, 1, 10, 10, 12)))])
    assert pytest.approx(100 * 51 / 101) == scores.AP


def test_a_false_alarm_first():
    """Precision 1/2 at every recall; after the right one it costs nothing."""
    truth = target((1, 10, 10, 12))
    alarm, right = (1, 60, 60, 12), (1, 10, 10, 12)
    assert pytest.approx(50) == evaluation.scores([(truth, found((0.9, *alarm), (0.8, *right)))]).AP
    assert pytest.approx(100) == evaluation.scores([(truth, found((0.8, *alarm), (0.9, *right)))]).AP


def test_a_box_that_is_moved():
    """A box of side 20, 4 to the right: IoU 16/24 = 0.667, right at thresholds 0.5 to 0.65, 4 of 10."""
    scores = evaluation.scores([(target((1, 10, 10, 20)), found((0.9, 1, 14, 10, 20)))])
    assert pytest.approx(40) == scores.AP
    assert pytest.approx((100, 0)) == (scores.AP50, scores.AP75)


def test_octaves_are_of_the_objects_size():
    """The small one is missed; a found one of another size is no false alarm in its octave."""
    truth = target((1, 10, 10, 12), (1, 40, 40, 70))
    scores = evaluation.scores([(truth, found((0.9, 1, 40, 40, 70)))])
    assert scores.octaves["16-32"] is None and scores.octaves["32-64"] is None
    assert (scores.octaves["<16"], scores.octaves[">64"]) == pytest.approx((0, 100))


def test_a_mean_over_classes_and_images():
    """Class 1 in both images, found in one of them; class 2 found."""
    pairs = [
        (target((1, 10, 10, 12), (2, 40, 40, 20)), found((0.9, 1, 10, 10, 12), (0.9, 2, 40, 40, 20))),
        (target((1, 10, 10, 12)), found()),
    ]
    assert pytest.approx(np.mean([100 * 51 / 101, 100])) == evaluation.scores(pairs).AP


def test_no_object_has_no_precision():
    with pytest.raises(ValueError, match="the 1 targets have no object; expected one at least"):
        evaluation.scores([(target(), found((0.9, 1, 10, 10, 12)))])


def test_it_prints_nothing(capsys):
    evaluation.scores([(target((1, 10, 10, 12)), found((0.9, 1, 10, 10, 12)))])
    assert capsys.readouterr() == ("", "")


def test_detections_go_with_their_targets():
    """In batches, the last one smaller, each image with its own."""

    class Echo(torch.nn.Module):
        def forward(self, images):
            assert not self.training and len(images) <= evaluation._BATCH
            return [{"value": image.sum()} for image in images]

    scenes = [(torch.full((3, 2, 2), float(number)), {"labels": number}) for number in range(10)]
    pairs = list(evaluation.detections(Echo(), scenes, 10))
    assert [(truth["labels"], float(one["value"]) / 12) for truth, one in pairs] == [(n, n) for n in range(10)]
