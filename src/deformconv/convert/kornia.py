"""kornia's deformable layer, whose offsets are cut off at a quarter of the image."""

from __future__ import annotations

from torch import Tensor

from deformconv.torch import DeformConv2d

__all__ = ["KorniaDeformConv2d"]


class KorniaDeformConv2d(DeformConv2d):
    """`DeformConv2d` whose predicted offsets are at most max(height, width)/4 input pixels, as in kornia's ALIKED."""

    def _predict(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        offset, mask = super()._predict(input)
        limit = max(input.shape[-2:]) / 4
        return offset.clamp(-limit, limit), mask
