"""Convolutions of a model replaced by deformable layers that begin by computing the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.utils import parametrize

from deformconv.ops.words import unexpected
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d, surgery
from deformconv.torch.conv.modules import OffsetPredictor

__all__ = ["Replaced", "make_deformable"]

_KINDS: dict[type[nn.Module], Any] = {nn.Conv1d: DeformConv1d, nn.Conv2d: DeformConv2d, nn.Conv3d: DeformConv3d}
_DEFORMABLE = (DeformConv1d, DeformConv2d, DeformConv3d)
_RECIPE = re.compile(r"resnet:conv([2-5])(?:-conv([2-5]))?")
_SHOWN = 6  # names in an error


class Replaced(tuple[str, ...]):
    """The names of the layers that `make_deformable` replaced, in the model's order."""

    def __repr__(self) -> str:
        if not self:
            return "no layers"
        return f"{len(self)} layer{'s' * (len(self) > 1)}: {', '.join(self)}"


def make_deformable(
    model: nn.Module,
    which: str | Iterable[str],
    *,
    modulated: bool = True,
    offset_groups: int = 1,
    max_offset: float | None = None,
    **unknown: NoReturn,
) -> Replaced:
    """Replace convolutions of a model by deformable ones, in place, so that it computes what it did before.

    A new layer takes over the convolution's parameters (the very same objects), window, groups, padding mode, hooks, training
    mode and frozen state; its predictor begins at offsets 0 and masks 1 and can be trained. Outputs stay the same within
    rounding, until training moves the offsets.

    Args:
        model: any module.
        which: a recipe, a pattern, or names.

            - "resnet:conv3-conv5", or one stage, "resnet:conv5": all convolutions of more than one tap in these stages of every
              ResNet within the model: `layer2` to `layer4` in torchvision and timm, `res3` to `res5` in detectron2. In a
              ResNet-50 these are 13 layers, in a ResNet-18 12, in a ResNet-101 30.
            - a pattern for the modules' names, as in `fnmatch`: "backbone.*.conv2". What it matches and is no convolution, or
              has one tap, is passed by.
            - a name or names, as `model.named_modules()` has them.
        modulated: True is v2, False is v1 (no masks).
        offset_groups: offset groups of the new layers; it must divide their input channels.
        max_offset: bounds predicted offsets, in input pixels.

    Returns:
        The names of the layers that were replaced; `print` shows how many they are.

    Raises:
        TypeError: `model` is no nn.Module, or `which` neither a string nor names.
        ValueError: `which` finds no convolution, or one that cannot be replaced: a subclass or an instance whose `forward` may
            be another, or one with a parametrization or with parameters, buffers or modules of its own; or `model` is compiled,
            a script or in DistributedDataParallel. The model is left as it was.
        ShapeError: `offset_groups` does not divide a layer's channels. The model is left as it was.

    Example:
        >>> import torch
        >>> from deformconv.vision import make_deformable
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1))
        >>> make_deformable(net, "2")
        1 layer: 2
        >>> type(net[2]).__name__
        'DeformConv2d'

    Papers: v1, arXiv 1703.06211, section 3.1, conv5; v2, arXiv 1811.11168, section 3.1, conv3 to conv5.
    """
    if unknown:
        raise unexpected(make_deformable, unknown)
    surgery.check_model(model)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "`model` is or has a DistributedDataParallel, which would not average the gradients of new parameters; expected "
            "the model within: change that first, and wrap it then."
        )
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        kind = "a script" if isinstance(model, torch.jit.ScriptModule) else "a compiled model"
        raise ValueError(f"`model` is {kind}, whose code is fixed; expected the model that it was made of: change that first.")
    names = _found(model, which)
    layers: dict[int, nn.Module] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:  # before any is put in its place, so that an error leaves the model as it was
        module = modules[name]
        _check(name, module)
        if id(module) not in layers:
            layers[id(module)] = _deformable(module, modulated=modulated, offset_groups=offset_groups, max_offset=max_offset)
    if id(model) in layers:
        raise ValueError("`model` is a convolution itself, which cannot be replaced in place; expected a model that has some.")
    surgery.replace(model, lambda module: layers.get(id(module)))
    return Replaced(names)


def _found(model: nn.Module, which: str | Iterable[str]) -> list[str]:
    """The names of the convolutions to replace, in the model's order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(which, str):
        wanted = _names(which)
        unknown = [name for name in wanted if name not in modules]
        if unknown:
            text = f"`which` names {unknown[0]!r}, which `model` does not have."
            is_pattern = any(fnmatchcase(name, unknown[0]) for name in modules) or unknown[0].startswith("resnet:")
            raise ValueError(text + (" Pass a pattern or a recipe as a string alone, and not in a list." * is_pattern))
        return [name for name in modules if name in set(wanted)]
    if which in modules:
        return [which]
    matches = _matcher(which)
    found = [name for name, module in modules.items() if matches(name) and _is_candidate(module)]
    if not found:
        text = f"`which` is {which!r}, and finds no convolution of more than one tap in `model`.{_hint(modules, matches)}"
        is_recipe = not which.startswith("resnet:") and re.search(r":|\bconv[2-5]-", which)
        raise ValueError(text + (' A recipe is written "resnet:conv3-conv5".' if is_recipe else ""))
    return found


def _names(which: Any) -> list[str]:
    """The names in `which`, which is no string."""
    expected = 'a recipe, "resnet:conv3-conv5", a pattern, "layer4.*", or names, as `model.named_modules()` has them'
    if isinstance(which, bytes) or not isinstance(which, Iterable):
        raise TypeError(f"`which` is {which!r}; expected {expected}.")
    names = list(which)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"`which` has a {type(name).__module__}.{type(name).__qualname__}; expected {expected}.")
    if not names:
        raise ValueError("`which` has no names.")
    return names


def _matcher(which: str) -> Callable[[str], bool]:
    if which.startswith("resnet:"):
        recipe = _RECIPE.fullmatch(which)
        if recipe is None or int(recipe[2] or recipe[1]) < int(recipe[1]):
            raise ValueError(f'`which` is {which!r}; expected "resnet:conv3-conv5", with stages from conv2 to conv5.')
        stages = range(int(recipe[1]), int(recipe[2] or recipe[1]) + 1)
        parts = {f"layer{stage - 1}" for stage in stages} | {f"res{stage}" for stage in stages}
        return lambda name: not parts.isdisjoint(name.split("."))
    return lambda name: fnmatchcase(name, which)


def _is_candidate(module: nn.Module) -> bool:
    """Whether a module that a pattern matches is meant: a convolution of more than one tap that is not deformable yet."""
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not isinstance(module, _DEFORMABLE)
    return convolution and max(module.kernel_size) > 1  # type: ignore[arg-type]


def _hint(modules: dict[str, nn.Module], matches: Callable[[str], bool]) -> str:
    deformable = [name for name, module in modules.items() if isinstance(module, _DEFORMABLE) and matches(name)]
    if deformable:
        return f" {Replaced(deformable[:_SHOWN])} there, and deformable already."
    candidates = [name for name, module in modules.items() if _is_candidate(module)]
    if not candidates:
        return " It has none at all."
    rest = ", ..." if len(candidates) > _SHOWN else ""
    return f" It has {', '.join(islice(candidates, _SHOWN))}{rest}."


def _check(name: str, module: nn.Module) -> None:
    """Raise ValueError unless a layer computes a convolution with its parameters, and nothing else."""
    if isinstance(module, _DEFORMABLE):
        raise ValueError(f"layer {name!r} of `model` is deformable already.")
    surgery.check_plain(name, module)
    kind = type(module).__mro__[parametrize.is_parametrized(module)]
    if kind not in _KINDS:
        text = f"layer {name!r} of `model` is a {kind.__module__}.{kind.__qualname__}; expected an nn.Conv1d, Conv2d or Conv3d"
        if isinstance(module, tuple(_KINDS)):
            text += ", and not a subclass, whose `forward` may be another. Put a plain one there first, or leave it out"
        elif any(map(_is_candidate, module.modules())):
            text += f'. For what it contains pass "{name}.*"' if name else '. For what it contains pass "*"'
        raise ValueError(f"{text}.")
    own = [*module._modules, *module._buffers, *(key for key in module._parameters if key not in ("weight", "bias"))]
    if own or "forward" in vars(module):
        text = f"has {own[0]!r} beside its weight and bias" if own else "has a `forward` of its own, put on the instance"
        raise ValueError(f"layer {name!r} of `model` {text}, which a new layer would not have; expected a plain convolution.")


def _deformable(theirs: Any, **keywords: Any) -> nn.Module:
    """Our layer with a convolution's parameters, and with a predictor of zeros beside them."""
    weight = theirs.weight
    ours: Any = _KINDS[type(theirs)](
        theirs.in_channels, theirs.out_channels, theirs.kernel_size, theirs.stride, theirs.padding, theirs.dilation,
        theirs.groups, theirs.bias is not None, theirs.padding_mode, device="meta", dtype=weight.dtype, **keywords,
    )  # fmt: skip
    ours.weight, ours.bias = weight, theirs.bias
    predictor = ours.offset_conv
    assert isinstance(predictor, OffsetPredictor)  # these layers predict
    predictor.to_empty(device=weight.device)
    predictor.reset_parameters()
    return surgery.like(theirs, ours)
