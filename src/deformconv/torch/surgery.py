"""Modules of a PyTorch model put in the place of others: with their names, parameters, hooks and mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["check_model", "check_plain", "like", "replace"]


def check_model(model: Any) -> None:
    """Raise unless this is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__module__}.{type(model).__qualname__}; expected a torch.nn.Module.")


def check_plain(name: str, module: nn.Module) -> None:
    """Raise ValueError if a weight or bias within is computed from other parameters."""
    for part in module.modules():
        for key in ("weight", "bias"):
            if key not in part._parameters and isinstance(getattr(part, key, None), Tensor):
                path = next(path for path, inner in module.named_modules() if inner is part)
                raise ValueError(
                    f"{f'layer {name!r} of `model`' if name else '`model`'} has a {f'{path}.' if path else ''}{key} that is "
                    "computed from other parameters, by a parametrization, weight_norm, spectral_norm or pruning; expected a "
                    "parameter. Remove that first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
                    "remove_spectral_norm, prune.remove) and apply it to the new layer."
                )


def replace(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Put `replacement(module)`, where it is not None, in the place of each module, in place; what is there twice stays so.

    Returns the model, or what stands in its place.
    """
    replaced: dict[int, nn.Module | None] = {}

    def once(module: nn.Module) -> nn.Module | None:
        if id(module) not in replaced:
            replaced[id(module)] = replacement(module)
        return replaced[id(module)]

    whole = once(model)
    if whole is not None:
        return whole
    for parent in list(model.modules()):
        if replaced.get(id(parent)) is not None:  # its parts are the new module's, or nobody's
            continue
        for name, child in list(parent._modules.items()):  # named_children leaves out what is there twice
            if child is not None and (ours := once(child)) is not None:
                setattr(parent, name, ours)
    return model


def like(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    """Give our module the other one's mode and hooks: the same dicts, from which the hooks' handles remove them."""
    for name, value in vars(theirs).items():
        if "_hooks" in name or name == "_is_full_backward_hook":
            setattr(ours, name, value)
    for hook in theirs._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # it would be called with theirs, which is gone
            hook.module = weakref.ref(ours)  # type: ignore[attr-defined]
    return ours.train(theirs.training)
