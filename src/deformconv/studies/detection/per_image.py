"""Losses and random choices of a detector that are each image's own, whatever else is in its batch.

torchvision's detectors choose anchors and boxes by the global generator, and take their losses' means over all that was
chosen in a batch. Both depend on which images share it, so that two processes on half a batch each would not compute the
gradients of one process on the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork

from deformconv.vision import FeatureMimicking

__all__ = ["Sampler", "check_detector", "drawn", "generator", "per_image"]

# What is chosen in an image, each by a generator of its own.
ANCHORS, BOXES, PATCHES = range(3)


def drawn(seed: int, step: int, batch: int, size: int) -> tuple[list[int], list[int]]:
    """The scenes of a step, `batch` different ones of `size`, and the number of each draw, from which its image is sampled."""
    random = np.random.default_rng([seed, step])
    scenes = random.choice(size, batch, replace=False)
    return scenes.tolist(), random.integers(2**63, size=batch).tolist()


def generator(target: dict[str, Tensor], purpose: int) -> torch.Generator:
    """A generator that depends on the number of the image's draw, `target["image_id"]`, and on what it is for."""
    if "image_id" not in target:
        raise ValueError(
            f'a target has the keys {", ".join(map(repr, target))}; expected "image_id" among them, an integer of its own for '
            "each image, from which its anchors and boxes are chosen."
        )
    seed = np.random.SeedSequence([int(target["image_id"]), purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


class Sampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of positive and negative rows, by generators that are given: one for each image to come."""

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        super().__init__(batch_size_per_image, positive_fraction)
        self.generators: Iterator[torch.Generator] = iter(())

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of each image's chosen rows: where labels are above 0, and where they are 0."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels in matched_idxs:
            random = next(self.generators)
            positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
            number = min(int(self.batch_size_per_image * self.positive_fraction), len(positive))
            for rows, most, masks in zip(
                (positive, negative), (number, self.batch_size_per_image - number), found, strict=True
            ):
                # The numbers are drawn on the CPU, so that every device gets the same.
                order = torch.randperm(len(rows), generator=random)[:most].to(rows.device)
                masks.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill(0, rows[order], 1))
        return found


class _Proposals(RegionProposalNetwork):
    """A network of proposals whose losses are means over an image, and then over images."""

    def forward(self, images: Any, features: Any, targets: Any = None) -> Any:
        if self.training:
            self.fg_bg_sampler.generators = iter([generator(target, ANCHORS) for target in targets])
        return super().forward(images, features, targets)

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        anchors = [len(each) for each in labels]
        parts = zip(objectness.split(anchors), pred_bbox_deltas.split(anchors), labels, regression_targets, strict=True)
        # torchvision's labels are float32, and to these PyTorch rounds the cross-entropy of float64 scores.
        losses = [super(_Proposals, self).compute_loss(o, d, [label.to(o)], [t]) for o, d, label, t in parts]
        objects, boxes = (torch.stack(each).mean() for each in zip(*losses, strict=True))
        return objects, boxes


class _Heads(RoIHeads):
    """Heads whose losses are means over an image's boxes, and then over images."""

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        self.fg_bg_sampler.generators = iter([generator(target, BOXES) for target in targets])
        predictions: list[Any] = []
        handle = self.box_predictor.register_forward_hook(lambda module, given, output: predictions.append(output))
        try:
            result, losses = super().forward(features, proposals, image_shapes, targets)
        finally:
            handle.remove()
            labels, regression = self.__dict__.pop("_sampled", ([], []))
        scores, deltas = predictions[0]
        boxes = [len(each) for each in labels]
        parts = zip(scores.split(boxes), deltas.split(boxes), labels, regression, strict=True)
        each = [_losses(*part) for part in parts]
        for name, values in zip(("loss_classifier", "loss_box_reg"), zip(*each, strict=True), strict=True):
            losses[name] = torch.stack(values).mean()
        return result, losses

    def select_training_samples(self, proposals: Any, targets: Any) -> Any:
        found = super().select_training_samples(proposals, targets)
        self.__dict__["_sampled"] = found[2], found[3]
        return found


def _losses(scores: Tensor, deltas: Tensor, labels: Tensor, regression_targets: Tensor) -> tuple[Tensor, Tensor]:
    """An image's losses; without a box there is no mean, and nothing to learn."""
    if not len(labels):
        return scores.sum() * 0.0, deltas.sum() * 0.0
    classes, boxes = fastrcnn_loss(scores, deltas, [labels], [regression_targets])
    return classes, boxes


def check_detector(model: Any) -> None:
    """Raise TypeError unless `model` is a Faster R-CNN of torchvision, or one within FeatureMimicking, whose losses are known.

    Those of masks and keypoints are means over the boxes of a batch.
    """
    detector = model.detector if isinstance(model, FeatureMimicking) else model
    if not isinstance(detector, GeneralizedRCNN):
        raise TypeError(
            f"`model` is a {type(model).__module__}.{type(model).__qualname__}; expected torchvision's FasterRCNN, or a "
            "FeatureMimicking of one."
        )
    rpn: Any = detector.rpn
    heads: Any = detector.roi_heads
    if type(rpn) is not RegionProposalNetwork or type(heads) is not RoIHeads:
        raise TypeError(
            f"the detector's `rpn` is a {type(rpn).__qualname__} and its `roi_heads` a {type(heads).__qualname__}; expected "
            "torchvision's RegionProposalNetwork and RoIHeads, whose losses are known."
        )
    if heads.has_mask() or heads.has_keypoint():
        raise TypeError(
            "the detector has a head for masks or keypoints, whose loss is a mean over the boxes of a batch; expected heads "
            "for boxes alone."
        )


@contextmanager
def per_image(model: GeneralizedRCNN | FeatureMimicking) -> Iterator[None]:
    """A context in which the detector's losses and choices are each image's own.

    Images of one size and layers that normalise within an image provided, a batch's loss is then the mean of its images'
    losses, each of which depends on that image and its `target["image_id"]` alone.

    Raises TypeError where `check_detector` does.
    """
    check_detector(model)
    detector = model.detector if isinstance(model, FeatureMimicking) else model
    rpn: Any = detector.rpn
    heads: Any = detector.roi_heads
    samplers = rpn.fg_bg_sampler, heads.fg_bg_sampler
    drawing = getattr(model, "generator", None)
    for part, kind in ((rpn, _Proposals), (heads, _Heads)):
        part.__class__ = kind
        part.fg_bg_sampler = Sampler(part.fg_bg_sampler.batch_size_per_image, part.fg_bg_sampler.positive_fraction)
    if isinstance(model, FeatureMimicking):
        model.generator = lambda target: generator(target, PATCHES)
    try:
        yield
    finally:
        rpn.__class__, heads.__class__ = RegionProposalNetwork, RoIHeads
        rpn.fg_bg_sampler, heads.fg_bg_sampler = samplers
        if isinstance(model, FeatureMimicking):
            model.generator = drawing
