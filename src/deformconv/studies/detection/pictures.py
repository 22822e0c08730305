"""Pictures: what each arm detects, and where v2 looks. Figures never open a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from deformconv.plots import draw_sampling_points, regular_points, sampling_points
from deformconv.studies.detection.scenes import Scenes
from deformconv.torch import DeformConv2d, DeformRoIPool

__all__ = ["bins", "found", "looks"]

SHOWN = 5  # scenes
SCORE = 0.5  # of a detection that is drawn
RIGHT, WRONG = "#009E73", "#D55E00"  # Okabe and Ito's, which the colour-blind can tell apart
LAYER, STRIDE = "backbone.body.layer2.0.conv2", 8  # a deformable layer, and image pixels for a pixel of its input


@torch.inference_mode()
def found(models: Mapping[str, nn.Module], scenes: Scenes) -> Figure:
    """A row for each detector, by its title, and a column for each scene; a detection in the wrong class or place is marked."""
    figure = Figure(figsize=(2.1 * SHOWN, 2.25 * len(models)), layout="constrained")
    panels = np.reshape(figure.subplots(len(models), SHOWN), (len(models), SHOWN))
    for row, (title, model) in zip(panels, models.items(), strict=True):
        model.eval()
        for axes, (image, target) in zip(row, (scenes[index] for index in range(SHOWN)), strict=True):
            axes.imshow(_shown(image))
            (detections,) = model([image])
            for box, label, score in zip(*(detections[name] for name in ("boxes", "labels", "scores")), strict=True):
                if score >= SCORE:
                    right = _is_right(box, int(label), target)
                    _draw_box(axes, box, int(label) - 1, RIGHT if right else WRONG, dashed=not right)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(title.replace(", ", ",\n"), fontsize=8)
    figure.suptitle(
        f"Detections of a score of at least {SCORE:g} in test scenes. Dashed: no digit of this class at IoU 0.5", fontsize=9
    )
    return figure


def _shown(image: Tensor) -> Any:
    return image.permute(1, 2, 0).clamp(0, 1).numpy()


def _is_right(box: Tensor, label: int, target: Mapping[str, Tensor]) -> bool:
    from torchvision.ops import box_iou

    same = target["boxes"][target["labels"] == label]
    return len(same) > 0 and bool(box_iou(box[None], same).max() >= 0.5)


def _draw_box(axes: Any, box: Tensor, digit: int, color: str, *, dashed: bool) -> None:
    left, top, right, bottom = box.tolist()
    style = "--" if dashed else "-"
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linestyle=style, linewidth=1.2))
    axes.text(
        left, top, str(digit), fontsize=7, color="white", backgroundcolor=color, va="bottom", bbox={"pad": 0.8, "color": color}
    )


@torch.inference_mode()
def looks(model: Any, scenes: Scenes) -> Figure:
    """Where v2 looks in some scenes: a convolution's sampling points in the middle of digits, and the bins of their boxes."""
    figure = Figure(figsize=(2.3 * SHOWN, 5.2), layout="constrained")
    panels = figure.subplots(2, SHOWN)
    drawn: Any = None
    model.eval()
    for column, (image, target) in enumerate(scenes[index] for index in range(SHOWN)):
        offset, mask, pooled = _predicted(model, image, target["boxes"])
        points = sampling_points(offset, 3, padding=1)[0, 0]
        middle = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2 / STRIDE
        size = offset.shape[2:]
        at = [(min(round(y), size[0] - 1), min(round(x), size[1] - 1)) for x, y in middle.tolist()][:3]
        drawn = draw_sampling_points(
            panels[0, column], _shown(image), points, mask[0], at=at, regular=regular_points(size, 3, padding=1), pixel=STRIDE,
            margin=2, size=20.0,
        )  # fmt: skip
        _draw_bins(panels[1, column], image, target["boxes"][:3], pooled)
    bar = figure.colorbar(drawn, ax=panels, shrink=0.6, aspect=25, pad=0.02, ticks=[0, 0.5, 1, 1.5, 2])
    bar.set_label("mask: how much a sample or a bin counts")
    figure.suptitle(
        "Where v2 looks. Above, a 3x3 convolution of conv3: a cross is an output position, circles what it samples.\n"
        "Below, the middles of the 7x7 bins of boxes: moved (circles), and of plain pooling (small plus signs).",
        fontsize=9,
    )
    return figure


def _predicted(model: Any, image: Tensor, boxes: Tensor) -> tuple[Any, Any, list[tuple[Any, Any]]]:
    """Offsets and masks of the layer, and those of each box's bins."""
    seen: dict[str, Any] = {}
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, DeformConv2d)
    handle = layer.register_forward_pre_hook(lambda module, given: seen.update(input=given[0]))
    try:
        images, _ = model.transform([image])
        maps = model.backbone(images.tensors)
    finally:
        handle.remove()
    offset, mask = layer.offsets_and_mask(seen["input"])
    assert mask is not None
    heads = model.roi_heads.box_roi_pool
    heads(maps, [boxes], images.image_sizes)  # so that it knows the levels' scales
    levels = heads.map_levels([boxes]).tolist()
    bins_of_boxes = []
    for box, level in zip(boxes, levels, strict=True):
        pool = heads.pools[0 if heads.share_levels else level]
        assert isinstance(pool, DeformRoIPool)
        pool.spatial_scale = heads.scales[level]
        moved, weight = pool.predict(maps[heads.featmap_names[level]], [box[None]])
        assert weight is not None
        bins_of_boxes.append((bins(box.numpy(), moved[0].numpy() * pool.gamma), weight[0, 0].numpy()))
    return offset.numpy(), mask.numpy(), bins_of_boxes


def bins(box: Any, moved: Any) -> Any:
    """The middles (2, PH, PW), x and y in pixels, of a box's bins that are moved by shares of its width and height."""
    left, top, right, bottom = box
    height, width = moved.shape[1:]
    x = left + (right - left) * ((np.arange(width) + 0.5) / width + moved[0])
    y = top + (bottom - top) * ((np.arange(height)[:, None] + 0.5) / height + moved[1])
    return np.stack([x, y])


def _draw_bins(axes: Any, image: Tensor, boxes: Tensor, pooled: list[tuple[Any, Any]]) -> None:
    axes.imshow(_shown(image), alpha=0.6)
    for box, (middles, weight) in zip(boxes.tolist(), pooled, strict=False):
        left, top, right, bottom = box
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color="0.2", linewidth=0.8))
        regular = bins(box, np.zeros_like(middles))
        axes.scatter(*regular.reshape(2, -1), s=6, color="0.35", marker="+", linewidths=0.6)
        axes.scatter(
            *middles.reshape(2, -1), s=7 * weight.ravel(), c=weight.ravel(), cmap="viridis", vmin=0, vmax=2,
            edgecolors="black", linewidths=0.3,
        )  # fmt: skip
    axes.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[2] - 0.5), ylim=(image.shape[1] - 0.5, -0.5))
