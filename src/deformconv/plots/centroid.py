"""Where a map lies in an image, measured: by the centroid of the gradient of its cells with respect to the image."""

from __future__ import annotations

from math import log2
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Spot", "centroid", "fitted"]

Vector = npt.NDArray[np.float64]


class Spot(NamedTuple):
    """The gradient of some cells: its centroid and its root mean square distance from that, image pixels on each axis."""

    middle: Vector
    radius: Vector


def centroid(features: Tensor, image: Tensor, box: list[slice] | None = None, draws: int = 1) -> Spot | None:
    """The centroid of the squared gradient of a box of cells, of the map's middle half if there is none.

    The cells and channels of features (1, C, *O) are added with random signs, so that their squared gradients add up. None if
    there is no gradient.
    """
    sizes = features.shape[2:]
    box = [slice(n // 4, n - n // 4) for n in sizes] if box is None else box
    energy: Any = 0.0
    with torch.inference_mode(False), torch.enable_grad():  # whatever who asks is within
        cells = features[(slice(None), slice(None), *box)]
        random = torch.Generator().manual_seed(0)
        for _ in range(draws):
            signs = torch.randint(0, 2, tuple(cells.shape), generator=random).mul_(2).sub_(1).to(cells)
            gradient: Any = torch.autograd.grad(cells, image, signs, retain_graph=True, allow_unused=True)[0]
            if gradient is None:
                return None
            energy = energy + gradient.detach().double().square().sum((0, 1)).cpu().numpy()
    total = energy.sum()
    if not (np.isfinite(total) and total > 0):
        return None
    middle, radius = [], []
    for axis, size in enumerate(energy.shape):
        share = energy.sum(tuple(a for a in range(energy.ndim) if a != axis)) / total
        middle.append(float(share @ np.arange(size)))
        radius.append(float(np.sqrt(share @ (np.arange(size) - middle[-1]) ** 2)))
    return Spot(np.array(middle), np.array(radius))


def fitted(features: Tensor, image: Tensor, steps: list[float] | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Origin and step of a map by its gradient: the step from two halves of its middle, the origin from both.

    A step that is within an eighth of one of `steps`, of a power of two or of the ratio of the sizes is that: a gradient that
    the image's border cuts off has its centroid too far inside.
    """
    sizes = features.shape[2:]
    whole = [slice(n // 4, n - n // 4) for n in sizes]
    middle = centroid(features, image, whole, draws=4)
    if middle is None:
        return None
    origin, step = [], []
    for axis, size in enumerate(sizes):
        ratio = image.shape[2 + axis] / size
        found = steps[axis] if steps is not None else ratio
        if size >= 4:
            half = size // 2
            low, high = slice(size // 4, half), slice(size - half, size - size // 4)
            spots = [centroid(features, image, [*whole[:axis], part, *whole[axis + 1 :]], draws=4) for part in (low, high)]
            if spots[0] is None or spots[1] is None:
                return None
            raw = float(spots[1].middle[axis] - spots[0].middle[axis]) / (high.start - low.start)
            near = ([steps[axis]] if steps is not None else []) + ([2.0 ** round(log2(raw))] if raw > 0 else []) + [ratio]
            found = next((known for known in near if abs(raw - known) <= known / 8), raw)
        step.append(found)
        origin.append(float(middle.middle[axis]) - found * (size - 1) / 2)
    return tuple(origin), tuple(step)
