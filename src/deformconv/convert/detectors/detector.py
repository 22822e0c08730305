"""A torchvision detector as another library's: its names there, and what its tensors go through."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from deformconv.convert.detectors.names import DIALECTS, renamed
from deformconv.convert.detectors.numbers import changes
from deformconv.convert.detectors.origin import CELL_ANCHORS, PIXELS, Origin, check_model, check_told, settled
from deformconv.convert.detectors.parts import Anatomy, anatomy, parts
from deformconv.convert.layouts.layout import Change, Layout
from deformconv.torch import DeformRoIPool

__all__ = ["Detector", "detector_of"]


class Detector(NamedTuple):
    """A torchvision model's parts, and the names of its modules in a library's layout."""

    layout: Layout
    anatomy: Anatomy
    renamed: Mapping[str, str]

    def here(self, state: Mapping[str, Tensor], origin: Origin) -> tuple[OrderedDict[str, Tensor], dict[str, Change]]:
        """Their state_dict without what is of no use here, and the changes of numbers, by our names."""
        told = {name: state[name] for name in state if self._is_told(name)}
        stem = self.renamed[f"{self.anatomy.body_name}.conv1".lstrip(".")]
        if any(name.startswith(f"{stem}.") for name in state):
            origin = settled(self.anatomy, self.layout, origin, told)
            check_model(self.anatomy, self.layout, origin)
            check_told(self.anatomy, self.layout, origin, told)
        rest = OrderedDict((name, tensor) for name, tensor in state.items() if name not in told)
        return rest, changes(self.anatomy, self.layout, origin.channel_order or "rgb")

    def back(self, origin: Origin) -> dict[str, Change]:
        """The changes of numbers on the way back, by our names."""
        origin = settled(self.anatomy, self.layout, origin, {})
        check_model(self.anatomy, self.layout, origin)
        return changes(self.anatomy, self.layout, origin.channel_order or "rgb")

    def readers(self) -> dict[str, str]:
        """Of each pool of boxes the weight that alone reads what it pools, and can make up for masks of another scale."""
        found: dict[str, str] = {}
        heads = self.anatomy.rcnn.roi_heads if self.anatomy.rcnn is not None else None
        for kind in ("box", "mask"):
            pool = getattr(heads, f"{kind}_roi_pool", None)
            levels = [level for level in getattr(pool, "pools", ()) if isinstance(level, DeformRoIPool)]
            if levels and self.layout.pools is not None and getattr(pool, "share_levels", False):
                raise ValueError(
                    f"layer 'roi_heads.{kind}_roi_pool' of `model` has one predictor for all levels, and {self.layout.library} "
                    "one for each. Build it with share_levels=False."
                )
            first = next((name for name in self.renamed if name.startswith(f"roi_heads.{kind}_head.")), None)
            if first is not None and len({level.mask_scale for level in levels}) == 1:
                found.update((f"roi_heads.{kind}_roi_pool.pools.{index}", f"{first}.weight") for index in range(len(levels)))
        return found

    def _is_told(self, name: str) -> bool:
        return self.layout.source == "detectron2" and (name in PIXELS or name.startswith(CELL_ANCHORS))


def detector_of(model: nn.Module, layout: Layout, state: Mapping[str, Tensor] | None = None) -> Detector | None:
    """The model as a detector of a library, with the names that a state_dict has of those that it may have."""
    dialect = DIALECTS.get(layout.source)
    found = anatomy(model) if dialect is not None else None
    if found is None or dialect is None:
        return None
    return Detector(layout, found, renamed(parts(found), dialect, found.fpn_name is None, state))
