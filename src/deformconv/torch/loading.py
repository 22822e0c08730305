"""What a layer notes in a state_dict of its masks, and what it looks for in one that it loads.

The masks of other libraries are sigmoid and those of this one, by default, 2*sigmoid: with the keys renamed, their weights
would load and compute something else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["RECORD", "Loading", "noted"]

RECORD = "mask_scale"  # the name of the record in a layer's metadata


class Loading(nn.Module):
    """A layer whose predicted masks are mask_scale*sigmoid, which its state_dict notes beside the tensors."""

    modulated: bool
    mask_scale: float
    _predictors: tuple[str, ...]  # the names that the layer's predictors may have

    def _recorded(self) -> float | None:
        """What the layer notes: its masks' scale, or None where it predicts no masks."""
        has_predictor = any(self._modules.get(name) is not None for name in self._predictors)
        return float(self.mask_scale) if self.modulated and has_predictor else None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A dict that the caller passed has no metadata.
        metadata, scale = getattr(destination, "_metadata", {}).get(prefix[:-1]), self._recorded()
        if metadata is not None and scale is not None:
            metadata[RECORD] = scale


def noted(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """A state_dict with the tensors of `state` whose metadata says that its masks are those of the model's layers.

    The metadata of all other modules stays; the caller's is not changed.
    """
    metadata: Mapping[str, Any] = getattr(state, "_metadata", None) or {}
    found = OrderedDict((name, dict(entry)) for name, entry in metadata.items())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Loading) and (scale := module._recorded()) is not None:
            found[name] = {"version": module._version, RECORD: scale}
    result: Any = OrderedDict(state)
    result._metadata = found
    recorded: OrderedDict[str, Tensor] = result
    return recorded
