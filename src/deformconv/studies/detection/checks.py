"""What training is given, checked where it comes in: torchvision notices some of it late, and some of it never."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["SettingsError", "check_numbers", "check_scenes", "checked"]

_TARGET = "`boxes` (n, 4), as x1, y1, x2, y2 in pixels, and `labels` (n,), int64"


class SettingsError(ValueError):
    """What training is asked for does not go together, or not with the checkpoint."""


def check_numbers(**numbers: Any) -> None:
    """Raise unless these settings are numbers above 0, or None where they may be; a seed may be 0."""
    for name, value in numbers.items():
        if value is None and name in ("steps", "seconds"):
            continue
        is_whole = name in ("steps", "batch", "every", "seed")
        what = f"{'an integer' if is_whole else 'a number'} {'of at least' if name == 'seed' else 'above'} 0"
        if isinstance(value, bool) or not isinstance(value, Integral if is_whole else Real):
            raise TypeError(f"`{name}` is {value!r}; expected {what}.")
        if not (float(value) >= 0 if name == "seed" else float(value) > 0):
            raise ValueError(f"`{name}` is {value!r}; expected {what}.")


def check_scenes(scenes: Any) -> None:
    """Raise unless scenes can be counted and asked for by number."""
    if not hasattr(scenes, "__len__") or not hasattr(scenes, "__getitem__"):
        raise TypeError(
            f"`scenes` is a {_kind(scenes)}; expected what has a length and gives, for a number from 0 on, an image and its "
            "target, as a list or a torch.utils.data.Dataset does."
        )


def checked(scene: Any, number: int) -> tuple[Tensor, Mapping[str, Any]]:
    """The image and the target of a scene; TypeError or ValueError if it has none."""
    if not isinstance(scene, (tuple, list)) or len(scene) != 2:
        what = f"{_kind(scene)} of {len(scene)}" if isinstance(scene, (tuple, list)) else _kind(scene)
        raise TypeError(f"scene {number} is a {what}; expected two things, an image and its target.")
    image, target = scene
    if not isinstance(image, Tensor):
        raise TypeError(f"the image of scene {number} is a {_kind(image)}; expected a PyTorch tensor (3, H, W), from 0 to 1.")
    if not image.is_floating_point():
        raise TypeError(
            f"the image of scene {number} is {str(image.dtype).removeprefix('torch.')}; expected floating point, from 0 to 1: "
            "`image / 255` for bytes."
        )
    if image.ndim != 3:
        raise ValueError(f"the image of scene {number} has shape {tuple(image.shape)}; expected (3, H, W).")
    if not isinstance(target, Mapping):
        raise TypeError(f"the target of scene {number} is a {_kind(target)}; expected a dict with {_TARGET}.")
    _check_target(target, number)
    return image, target


def _check_target(target: Mapping[str, Any], number: int) -> None:
    for name in ("boxes", "labels"):
        if name not in target:
            has = ", ".join(map(repr, target)) or "nothing"
            raise ValueError(f"the target of scene {number} has {has}, and no {name!r}; expected {_TARGET}.")
        if not isinstance(target[name], Tensor):
            raise TypeError(f"`{name}` of scene {number} is a {_kind(target[name])}; expected a PyTorch tensor: {_TARGET}.")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise ValueError(
            f"scene {number} has `boxes` {tuple(boxes.shape)} and `labels` {tuple(labels.shape)}; expected {_TARGET}."
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"`labels` of scene {number} is {str(labels.dtype).removeprefix('torch.')}; expected {_TARGET}.")


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
