"""Average precision by COCO's rules, and by octaves of the objects' size."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deformconv.studies.detection.scenes import Scenes, Target

__all__ = ["OCTAVES", "Scores", "detections", "scores"]

# Sides of a square of a box's area, in pixels. COCO's own limits, 32 and 96, would leave "large" empty here.
OCTAVES = (0, 16, 32, 64, math.inf)
MOST = 30  # detections of an image that count, as many as the detector gives
_BATCH = 8


@dataclass(frozen=True)
class Scores:
    """Percentages."""

    AP: float  # mean over IoU 0.50, 0.55, ... 0.95
    AP50: float
    AP75: float
    octaves: dict[str, float | None]  # AP of the objects of a size, None where there are none


def octave_names() -> list[str]:
    """What the octaves are called: by the sides that they lie between."""
    names = []
    for least, most in pairwise(OCTAVES):
        names.append(f"<{most}" if not least else f">{least}" if most == math.inf else f"{least}-{most}")
    return names


@torch.inference_mode()
def detections(model: nn.Module, scenes: Scenes, count: int) -> Iterator[tuple[Target, dict[str, Tensor]]]:
    """The first `count` scenes' targets, and what a detector finds there: `boxes` (n, 4), `labels` (n,), `scores` (n,)."""
    model.eval()
    for start in range(0, count, _BATCH):
        part = [scenes[index] for index in range(start, min(start + _BATCH, count))]
        found = model([image for image, _ in part])
        yield from ((target, one) for (_, target), one in zip(part, found, strict=True))


def scores(pairs: Sequence[tuple[Target, Mapping[str, Tensor]]]) -> Scores:
    """Average precision of detections beside targets, one pair an image.

    By pycocotools: the reference that others are compared with, in one small wheel for each Python from 3.10 on, which needs
    nothing but NumPy.

    Raises ValueError if no target has an object: there is no precision then.
    """
    if not any(len(target["boxes"]) for target, _ in pairs):
        raise ValueError(f"the {len(pairs)} targets have no object; expected one at least, to have a precision.")
    # Not at the top: training needs no evaluator.
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset, results = _dataset(pairs)
    with redirect_stdout(io.StringIO()):  # it tells how long it takes
        truth.createIndex()
        found = COCO()
        found.dataset = {**truth.dataset, "annotations": results}
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        areas = [(0, 1e10), *((least**2, min(most**2, 1e10)) for least, most in pairwise(OCTAVES))]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = areas, ["all", *octave_names()]
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # (IoU thresholds, recalls, classes, areas), -1 without an object
    thresholds = evaluation.params.iouThrs
    at = {round(float(threshold), 2): number for number, threshold in enumerate(thresholds)}
    every, half, three_quarters = (
        _mean(part) for part in (precision[..., 0], *(precision[at[x], ..., 0] for x in (0.5, 0.75)))
    )
    assert every is not None and half is not None and three_quarters is not None  # there is an object, checked above
    octaves = {name: _mean(precision[..., number]) for number, name in enumerate(octave_names(), 1)}
    return Scores(every, half, three_quarters, octaves)


def _mean(precision: Any) -> float | None:
    known = precision[precision > -1]
    return 100 * float(np.mean(known)) if known.size else None


def _dataset(pairs: Sequence[tuple[Target, Mapping[str, Tensor]]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The targets as COCO's file has them, and the detections."""
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image, (target, found) in enumerate(pairs, 1):
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            objects.append({"id": len(objects) + 1, "image_id": image, "category_id": label, "iscrowd": 0, **_box(box)})
        for box, label, score in zip(*(found[name].tolist() for name in ("boxes", "labels", "scores")), strict=True):
            results.append({"id": len(results) + 1, "image_id": image, "category_id": label, "score": score, **_box(box)})
    labels = sorted({item["category_id"] for item in objects + results})
    dataset = {
        "info": {}, "images": [{"id": image} for image in range(1, len(pairs) + 1)], "annotations": objects,
        "categories": [{"id": label} for label in labels],
    }  # fmt: skip
    return dataset, results


def _box(box: Sequence[float]) -> dict[str, Any]:
    left, top, right, bottom = box
    return {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
