"""R-CNN feature mimicking (arXiv 1811.11168, section 3.3): a detector learns the features of what its boxes show, cut out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import roi_align

from deformconv.errors import ShapeError
from deformconv.ops.window import count

__all__ = ["FeatureMimicking"]

_NORMS = nn.modules.batchnorm._NormBase  # batch and instance normalisation over any number of axes


class FeatureMimicking(nn.Module):
    """A torchvision detector that is trained to see in a box what it sees in the box's picture alone.

    In training, some positive boxes of each image are cut out of it and scaled to `crop` x `crop` pixels. The detector's own
    backbone, pooling and box head, with the same parameters, make features of these patches, and a classifier of its own names
    them. Two losses join the detector's: `loss_mimic`, 1 minus the cosine between a box's features in the image and those of
    its patch, and `loss_rcnn_classifier`, the cross-entropy of that classifier. In inference it is the detector alone.

    Everything runs within `forward`, so that DistributedDataParallel takes it as one module. `detector` keeps its own
    state_dict; the classifier is the only new parameter, and needed in training alone.

    Args:
        detector: a GeneralizedRCNN, Faster or Mask R-CNN, whose box head gives a vector (R, F) for each box.
        rois_per_image: how many positive boxes of an image are cut out, at most, chosen at random. The paper takes 32.
        crop: the side of a patch in pixels, a multiple of 32. At 224 torchvision's pyramid pools a patch from its level of
            stride 16, as in the paper; for smaller ones let the detector's pooling have canonical_scale=crop.
        weight: the factor of both losses beside the detector's own.
        reduction: "mean" over an image's boxes and then over images, or "sum" over boxes and then mean over images, as
            equation 3 has it.
        include_ground_truth: whether the annotated boxes, which torchvision adds to the proposals, may be cut out as well.
        stop_teacher_gradient: whether the patches' features are constants to `loss_mimic`.
        generator: what chooses the boxes; without one torch's global generator. A torch.Generator on the CPU, or a function
            that is called with each image's target and returns one, so that an image's boxes can be chosen alike in any batch
            and on any process: `lambda target: torch.Generator().manual_seed(int(target["image_id"]))`.

    Call:
        as the detector: `model(images, targets)` in training gives its losses and the two; `model(images)` its detections.

    Raises:
        TypeError: `detector` is no GeneralizedRCNN with a box head, or its box predictor has no `cls_score`; or `generator` is
            neither a torch.Generator nor a function.
        ShapeError: `rois_per_image` or `crop` is below 1.
        ValueError: `crop` is no multiple of 32, `weight` negative, or `reduction` unknown; in a call, the detector alone is
            in evaluation mode.

    Example:
        >>> import torch, torchvision
        >>> from deformconv.vision import FeatureMimicking
        >>> detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(
        ...     weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
        ... )
        >>> model = FeatureMimicking(detector, rois_per_image=2, crop=64)
        >>> target = {"boxes": torch.tensor([[8.0, 8.0, 50.0, 40.0]]), "labels": torch.tensor([1])}
        >>> sorted(model([torch.rand(3, 64, 64)], [target]))[3:]
        ['loss_objectness', 'loss_rcnn_classifier', 'loss_rpn_box_reg']

    Paper: arXiv 1811.11168, section 3.3 and equation 3. Batch normalisation sees the patches with its running statistics, and
    does not learn from them.
    """

    def __init__(
        self,
        detector: GeneralizedRCNN,
        rois_per_image: int = 32,
        crop: int = 224,
        weight: float = 0.1,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        include_ground_truth: bool = True,
        stop_teacher_gradient: bool = False,
        generator: torch.Generator | Callable[[dict[str, Tensor]], torch.Generator] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(detector, GeneralizedRCNN) or getattr(detector.roi_heads, "box_predictor", None) is None:
            raise TypeError(
                f"`detector` is a {type(detector).__module__}.{type(detector).__qualname__}; expected torchvision's "
                "GeneralizedRCNN with a box head, as a Faster R-CNN or a Mask R-CNN is."
            )
        if count("crop", crop) % 32:
            raise ValueError(f"`crop` is {crop}; expected a multiple of 32, the stride of a backbone's last map.")
        _check_weight(weight)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"`reduction` is {reduction!r}; expected 'mean' or 'sum'.")
        if generator is not None and not isinstance(generator, torch.Generator) and not callable(generator):
            raise TypeError(
                f"`generator` is {generator!r}; expected a torch.Generator, or a function that is called with a target "
                "and returns one."
            )
        self.detector = detector
        self.rois_per_image, self.crop, self.weight = count("rois_per_image", rois_per_image), crop, weight
        self.reduction, self.include_ground_truth = reduction, include_ground_truth
        self.stop_teacher_gradient = stop_teacher_gradient
        self.generator = generator
        scores = getattr(detector.roi_heads.box_predictor, "cls_score", None)
        if not isinstance(scores, nn.Linear):
            raise TypeError(
                "`detector.roi_heads.box_predictor` has no nn.Linear `cls_score`, which says how many features and classes "
                "there are; expected one, as torchvision's FastRCNNPredictor has."
            )
        self.classifier = nn.Linear(scores.in_features, scores.out_features).to(scores.weight)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if not self.training:
            return self.detector(images, targets)
        if not self.detector.training:
            raise ValueError(
                "the detector is in evaluation mode, where it has no losses, and this module in training mode; expected "
                "model.train() after detector.eval(). To freeze normalisation put its layers alone in evaluation mode."
            )
        with self._watched() as seen:
            losses = self.detector(images, targets)
        return {**losses, **self._losses(seen)}

    def _losses(self, seen: dict[str, Any]) -> dict[str, Tensor]:
        """The two losses, from what was seen of the detector's own pass."""
        if seen["features"].ndim != 2 or seen["features"].shape[1] != self.classifier.in_features:
            raise ShapeError(
                f"the detector's box head gives features {tuple(seen['features'].shape)}; expected (R, "
                f"{self.classifier.in_features}), a vector for each box, as its `cls_score` takes."
            )
        students = seen["features"].split([len(boxes) for boxes in seen["proposals"]])
        each_image = zip(seen["labels"], seen["proposals"], seen["truth"], seen["generators"], strict=True)
        chosen = [self._chosen(*each) for each in each_image]
        boxes = [proposals[rows] for proposals, rows in zip(seen["proposals"], chosen, strict=True)]
        number = sum(map(len, boxes))
        if not number:  # nothing to learn here, but other processes may: their gradients are added to zeros
            zero = sum(parameter.sum() for parameter in self.classifier.parameters()) * 0.0
            return {"loss_mimic": zero + seen["features"].sum() * 0.0, "loss_rcnn_classifier": zero}
        teachers = self._teachers(seen["images"], seen["sizes"], boxes)
        students = torch.cat([features[rows] for features, rows in zip(students, chosen, strict=True)])
        labels = torch.cat([each[rows] for each, rows in zip(seen["labels"], chosen, strict=True)])
        target = teachers.detach() if self.stop_teacher_gradient else teachers
        apart = 1 - F.cosine_similarity(_float(students), _float(target), dim=1)
        entropy = F.cross_entropy(_float(self.classifier(teachers)), labels, reduction="none")
        sizes = [len(rows) for rows in chosen]
        return {"loss_mimic": self._reduced(apart, sizes), "loss_rcnn_classifier": self._reduced(entropy, sizes)}

    def _reduced(self, values: Tensor, sizes: list[int]) -> Tensor:
        images = [part.mean() if self.reduction == "mean" else part.sum() for part in values.split(sizes) if len(part)]
        return self.weight * torch.stack(images).sum() / len(sizes)

    def _chosen(self, labels: Tensor, proposals: Tensor, truth: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The rows of the boxes to cut out: positive ones, at random."""
        positive = labels > 0
        if not self.include_ground_truth and len(truth):
            positive = positive & ~(proposals[:, None] == truth[None]).all(2).any(1)
        rows = torch.where(positive)[0]
        order = torch.randperm(len(rows), generator=generator)[: self.rois_per_image]
        return rows[order.to(rows.device)]

    def _teachers(self, images: Tensor, sizes: list[tuple[int, int]], boxes: list[Tensor]) -> Tensor:
        """The features of patches that are cut out of the images, as the backbone saw these."""
        inside = [_clipped(each, size).to(images) for each, size in zip(boxes, sizes, strict=True)]
        with torch.no_grad():
            patches = roi_align(images, inside, (self.crop, self.crop), 1.0, -1, aligned=True)
        whole = torch.tensor([[0.0, 0.0, self.crop, self.crop]], dtype=boxes[0].dtype, device=patches.device)
        heads: Any = self.detector.roi_heads
        with _statistics_kept(self.detector.backbone), _statistics_kept(heads.box_head):
            features = self.detector.backbone(patches)
            features = {"0": features} if isinstance(features, Tensor) else features
            pooled = heads.box_roi_pool(features, [whole] * len(patches), [(self.crop, self.crop)] * len(patches))
            found: Tensor = heads.box_head(pooled)
        return found

    @contextmanager
    def _watched(self) -> Iterator[dict[str, Any]]:
        """What the detector's own pass makes of its images: normalised images, sampled boxes, their labels and features."""
        seen: dict[str, Any] = {}
        heads: Any = self.detector.roi_heads
        select = heads.select_training_samples

        def selected(proposals: Any, targets: Any) -> Any:
            found = select(proposals, targets)
            seen["proposals"], seen["labels"] = found[0], found[2]
            seen["truth"] = [target["boxes"].to(found[0][0].dtype) for target in targets]
            drawing = self.generator
            seen["generators"] = [drawing(target) if callable(drawing) else drawing for target in targets]
            return found

        def transformed(module: Any, given: Any, output: Any) -> None:
            seen["images"], seen["sizes"] = output[0].tensors, output[0].image_sizes

        def headed(module: Any, given: Any, output: Tensor) -> None:
            seen["features"] = output

        handles = [
            self.detector.transform.register_forward_hook(transformed), heads.box_head.register_forward_hook(headed),
        ]  # fmt: skip
        own = vars(heads).get("select_training_samples")  # somebody may have put one on the instance, too
        heads.select_training_samples = selected
        try:
            yield seen
        finally:
            del heads.select_training_samples  # the instance's, so that the class' is there again
            if own is not None:
                heads.select_training_samples = own
            for handle in handles:
                handle.remove()


def _float(values: Tensor) -> Tensor:
    """Values of half precision in float32, in which a loss can be added up; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def _clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes without what lies beyond the image."""
    height, width = size
    x, y = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)


def _check_weight(weight: Any) -> None:
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= float(weight) < math.inf:
        raise ValueError(f"`weight` is {weight!r}; expected a number of at least 0.")


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """A context in which batch normalisation uses its running statistics, and does not change them."""
    norms = [part for part in module.modules() if isinstance(part, _NORMS) and part.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
