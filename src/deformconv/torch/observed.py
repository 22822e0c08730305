"""Layers that somebody may look at: what they compute with is shown to who asks for it, and nothing is changed by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deformconv.torch import modes

__all__ = ["Observed"]


class Observed:
    """A layer that shows each call's tensors to who looks at it: `deformconv.plots.observe` does."""

    # What is called with each call's tensors; a layer's own dict while somebody looks at it.
    _observers: dict[int, Callable[..., None]] | None = None

    def _show(self, *seen: Any) -> None:
        """Hand a call to who looks at the layer, unless it is being read by a compiler, a tracer or a transform."""
        if not (modes.compiling() or modes.traced() or modes.transformed()):
            for watch in tuple((self._observers or {}).values()):
                watch(*seen)
