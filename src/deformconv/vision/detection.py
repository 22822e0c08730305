"""What a torchvision detector needs to become the DCNv2 paper's: its pooling of boxes by bins that can move."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import _filter_input, _setup_scales

from deformconv.ops.conv.layer import MASK_SCALE
from deformconv.ops.words import unexpected
from deformconv.torch import DeformRoIPool
from deformconv.torch.roi_pool.functional import joined

__all__ = ["MultiScaleDeformRoIPool"]


class MultiScaleDeformRoIPool(MultiScaleRoIAlign):
    """torchvision's MultiScaleRoIAlign whose bins can move: it stands in its place in a detector's box and mask heads.

    A box is pooled from the level of the pyramid that torchvision chooses. A fresh one computes what MultiScaleRoIAlign does.

    Args:
        featmap_names, output_size, sampling_ratio, canonical_scale, canonical_level: as MultiScaleRoIAlign.
        channels: those of the feature maps.
        convention: "unaligned" is what torchvision's detectors do.
        gamma, modulated, hidden, trunk, mask_scale: as `deformconv.torch.DeformRoIPool`.
        share_levels: one predictor for all levels, or one for each, as in msracver's FPN and mmdetection. A predictor for 256
            channels, 7x7 bins and 1024 hidden units has 14 million parameters, and for 14x14 bins 53 million; `hidden` makes
            it smaller. Name only maps that there are: of a name that never comes the predictor is not trained.

    Example:
        >>> import torch, torchvision
        >>> from deformconv.vision import MultiScaleDeformRoIPool
        >>> model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> pool = MultiScaleDeformRoIPool.like(model.roi_heads.box_roi_pool, hidden=256, share_levels=True)
        >>> model.roi_heads.box_roi_pool = pool
        >>> sum(parameter.numel() for parameter in pool.parameters())
        3315091

    Papers: v1, arXiv 1703.06211, section 2.2; v2, arXiv 1811.11168, section 3.2.
    """

    scales: list[float] | None
    map_levels: Any

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | tuple[int] | list[int],
        sampling_ratio: int = 2,
        channels: int = 256,
        *,
        convention: str = "unaligned",
        gamma: float = 0.1,
        modulated: bool = True,
        hidden: int = 1024,
        trunk: str = "shared",
        mask_scale: float = MASK_SCALE,
        share_levels: bool = False,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise unexpected(MultiScaleDeformRoIPool.__init__, unknown, "MultiScaleDeformRoIPool")
        if not featmap_names:
            raise ValueError('`featmap_names` is empty; expected the names of feature maps, as ["0", "1", "2", "3"].')
        super().__init__(
            featmap_names, output_size, sampling_ratio, canonical_scale=canonical_scale, canonical_level=canonical_level
        )
        self.share_levels = share_levels
        self.pools = nn.ModuleList(
            DeformRoIPool(
                channels, self.output_size, 1.0, sampling_ratio, convention=convention, gamma=gamma, modulated=modulated,
                hidden=hidden, trunk=trunk, mask_scale=mask_scale,
            )
            for _ in featmap_names[: 1 if share_levels else None]
        )  # fmt: skip

    @classmethod
    def like(cls, pool: MultiScaleRoIAlign, channels: int = 256, **others: Any) -> MultiScaleDeformRoIPool:
        """What stands in the place of a detector's `pool`; `others` are arguments that it does not know or that differ."""
        if not isinstance(pool, MultiScaleRoIAlign):
            raise TypeError(f"`pool` is a {type(pool).__module__}.{type(pool).__qualname__}; expected a MultiScaleRoIAlign.")
        same = ("featmap_names", "output_size", "sampling_ratio", "canonical_scale", "canonical_level")
        made = cls(**{**{name: getattr(pool, name) for name in same}, "channels": channels, **others})
        return made.train(pool.training)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool the boxes (r, 4) of each image, in pixels of the images, as (R, channels, *output_size)."""
        maps = _filter_input(x, self._present(x))
        if not isinstance(boxes, (list, tuple)):
            raise TypeError(
                f"`boxes` is a {type(boxes).__module__}.{type(boxes).__qualname__}; expected a list of tensors (r, 4), one for "
                "each image."
            )
        if self.scales is None or self.map_levels is None:
            self.scales, self.map_levels = _setup_scales(maps, image_shapes, self.canonical_scale, self.canonical_level)
        rows = joined(boxes, maps[0])
        if len(maps) == 1:
            return self._pool(x, 0, maps[0], rows)
        levels = self.map_levels(boxes)
        places = [torch.where(levels == level)[0] for level in range(len(maps))]
        pooled = torch.cat([self._pool(x, level, maps[level], rows[place]) for level, place in enumerate(places)])
        order = torch.cat(places)
        return torch.zeros_like(pooled).index_copy(0, order, pooled)

    def _present(self, x: Any) -> list[str]:
        """The names of the maps that are pooled."""
        found = [name for name in self.featmap_names if name in x] if isinstance(x, dict) else []
        if not found:
            has = (
                f"has {', '.join(map(repr, x))}" if isinstance(x, dict) else f"is a {type(x).__module__}.{type(x).__qualname__}"
            )
            raise ValueError(f"`x` {has}; expected a dict of feature maps, some of them named {self.featmap_names}.")
        return found

    def _pool(self, x: Any, level: int, features: Tensor, boxes: Tensor) -> Tensor:
        """The boxes of one level. It is called for no boxes, too: then the predictor's gradients are 0 and not absent."""
        pool = self.pools[0 if self.share_levels else self.featmap_names.index(self._present(x)[level])]
        assert isinstance(pool, DeformRoIPool) and self.scales is not None
        pool.spatial_scale = self.scales[level]
        pooled: Tensor = pool(features, boxes)
        return pooled

    def __repr__(self) -> str:
        own = MultiScaleRoIAlign.__repr__(self)
        return f"{own[:-1]}, share_levels={self.share_levels}, pool={self.pools[0].extra_repr()})"
