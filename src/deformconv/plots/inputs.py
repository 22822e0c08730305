"""What a model was called with, and the picture among it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Inputs"]


class Inputs:
    """The arguments of a model's call, kept as copies, and where the picture is in them.

    The picture is the first floating-point tensor that has as many axes as a batch of images for the model's deformable layers;
    else the first that has one fewer, one image, in a list of images as torchvision's detectors take them or by itself.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._args, self._kwargs = _mapped((args, kwargs), lambda _, value: _copied(value))
        self._path: tuple[Any, ...] = ()
        self._form = ""  # "batch", "list" or "image"

    def find(self, rank: int) -> None:
        """Find the picture of a model whose deformable layers have this many axes."""
        leaves = [
            (path, t) for path, t in _leaves((self._args, self._kwargs)) if isinstance(t, Tensor) and t.is_floating_point()
        ]
        for axes in (rank + 2, rank + 1):
            for path, tensor in leaves:
                if tensor.ndim == axes:
                    self._path, self._form = path, "batch"
                    if axes == rank + 1:
                        holder = self._at(path[:-1])
                        in_list = len(path) > _DEPTH and isinstance(holder, (list, tuple))
                        self._path, self._form = (path[:-1], "list") if in_list else (path, "image")
                    return
        shapes = ", ".join(str(tuple(t.shape)) for _, t in leaves) or "none"
        raise ValueError(
            f"no picture was found in what the model was called with: it got floating-point tensors of shapes {shapes}; "
            f"expected one with {rank + 2} axes, (N, C) and {rank} of pixels, as the model's deformable layers have {rank}, or "
            f"with {rank + 1}, one image."
        )

    def picture(self, which: Any) -> Tensor:
        """One picture of those recorded, (1, C, *S), without a graph."""
        found, number = self._at(self._path), 1
        if self._form != "image":
            number = len(found)
        if not (isinstance(which, (int, np.integer)) and 0 <= which < number):
            raise ValueError(f"`image` is {which}; the recorded batch has {number}, counted from 0.")
        with torch.inference_mode(False):
            return (found if self._form == "image" else found[which]).detach().clone()[None]

    def batch(self) -> Tensor:
        """All recorded pictures, (N, C, *S); of a list, the first."""
        found = self._at(self._path)
        return found if self._form == "batch" else self.picture(0)

    def with_picture(self, image: Tensor, which: int) -> tuple[Any, Any]:
        """The arguments with another picture (N, C, *S) for the recorded one with this number.

        What else comes once for each recorded picture is taken as it came with that one.
        """
        if self._form == "image" and len(image) != 1:
            raise ValueError(
                f"`image` has {len(image)} pictures; the model was recorded with one without a batch axis: expected 1."
            )
        holder = self._at(self._path)
        recorded = len(holder) if self._form != "image" else 1

        def other(path: tuple[Any, ...], value: Any) -> Any:
            if path == self._path:
                # Copies, since a model may change in place what it gets.
                if self._form == "list":
                    return type(holder)([picture.clone() for picture in image])
                return image.clone() if self._form == "batch" else image[0].clone()
            if recorded == 1 or len(path) < _DEPTH or not isinstance(value, (list, tuple, Tensor)):
                return None
            if isinstance(value, Tensor):
                whole = value.ndim > 0 and len(value) == recorded
                return value[which : which + 1].expand(len(image), *value.shape[1:]) if whole else None
            whole = len(value) == recorded and all(isinstance(part, (dict, Tensor)) for part in value)
            return type(value)([value[which]] * len(image)) if whole else None

        args, kwargs = _mapped((self._args, self._kwargs), other)
        return args, kwargs

    def pictures(self, args: Any, kwargs: Any) -> list[Tensor]:
        """The tensors among arguments that are pictures."""
        found = _at((args, kwargs), self._path)
        return list(found) if self._form == "list" else [found]

    def _at(self, path: tuple[Any, ...]) -> Any:
        return _at((self._args, self._kwargs), path)


_DEPTH = 2  # of an argument's path: args or kwargs, then its place there


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else None


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """Keys and parts of a list, a tuple or a dict; None for anything else."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else None


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    parts = _parts(value)
    if parts is None:
        yield path, value
    for key, part in parts or ():
        yield from _leaves(part, (*path, key))


def _mapped(value: Any, other: Callable[[tuple[Any, ...], Any], Any], path: tuple[Any, ...] = ()) -> Any:
    """A nest of lists, tuples and dicts with `other(path, value)`, where that is not None, in the place of each value."""
    if (instead := other(path, value)) is not None:
        return instead
    parts = _parts(value)
    if parts is None:
        return value
    new = [(key, _mapped(part, other, (*path, key))) for key, part in parts]
    if isinstance(value, dict):
        result = copy.copy(value)
        result.update(new)
        return result
    return type(value)(*(part for _, part in new)) if hasattr(value, "_fields") else type(value)([part for _, part in new])
