"""Who wants to see where multi-scale deformable attention looks: every call's locations and weights.

Of this library's layer and of those of transformers' models that have the operator in a module of its own, with this library's
kernels under them or without. Nothing is changed by looking.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from deformconv.plots.calls import Levels
from deformconv.plots.observe import Kept, Observation, look_at, seen_from_here
from deformconv.torch import modes
from deformconv.torch.attention.modules import DeformAttention

__all__ = ["AttentionEvent", "attention_layers", "observe_attention"]

OPERATOR = "MultiScaleDeformableAttention"  # of transformers, a module without parameters within each layer


class AttentionEvent(NamedTuple):
    """One call of a layer of attention, with the tensors that were used, in the graph if there is one."""

    name: str
    levels: Levels
    locations: Tensor
    weights: Tensor
    reference: Tensor | None  # (N, Q, levels or 1, 2 or 4), where it is known


def attention_layers(model: nn.Module) -> dict[str, str]:
    """The names of every layer of deformable attention of a model, and whose it is."""
    kinds = {name: _kind(module) for name, module in model.named_modules()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, DeformAttention):
        return "deformconv"
    return None if _operator_of(module) is None else "transformers"


def _operator_of(module: nn.Module) -> nn.Module | None:
    """The module that is transformers' operator within a layer of theirs."""
    return next((child for child in module.children() if _is_theirs(child)), None)


def _is_theirs(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == OPERATOR and kind.__module__.partition(".")[0] == "transformers"


def observe_attention(model: nn.Module, watch: Callable[[AttentionEvent], None]) -> Observation:
    """Call `watch` with an AttentionEvent for every call of a layer of attention within a model, as `observe` does."""
    ends: list[Callable[[], None]] = []
    is_seen = seen_from_here()
    handle = Observation(ends)

    def seen(event: AttentionEvent) -> None:
        if ends and is_seen():
            watch(event)

    layers = dict(model.named_modules())
    for name, kind in attention_layers(model).items():
        if kind == "deformconv":
            ends.append(_observe_ours(name, layers[name], seen))
        else:
            ends += _observe_theirs(name, layers[name], seen)
    return handle


def _observe_ours(name: str, layer: Any, watch: Callable[[AttentionEvent], None]) -> Callable[[], None]:
    def show(reference: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> None:
        watch(AttentionEvent(name, levels, locations, weights, reference))

    return look_at(layer, show)


def _observe_theirs(name: str, layer: nn.Module, watch: Callable[[AttentionEvent], None]) -> list[Callable[[], None]]:
    """Hooks on transformers' operator, which gets locations and weights, and on its layer, which gets reference points."""
    operator: Any = _operator_of(layer)
    kept = Kept()

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        kept.pair = kwargs.get("reference_points"), None

    def after(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        reference = (kept.take() or (None,))[0]
        if modes.compiling() or modes.traced() or modes.transformed():
            return
        given = inspect.signature(operator.forward).bind(*args, **kwargs).arguments
        levels = tuple((int(height), int(width)) for height, width in given["value_spatial_shapes_list"])
        watch(AttentionEvent(name, levels, given["sampling_locations"], given["attention_weights"], reference))

    handles = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        operator.register_forward_hook(after, with_kwargs=True),
    ]
    return [handle.remove for handle in handles]
