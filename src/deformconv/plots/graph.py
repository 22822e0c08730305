"""A forward pass followed operation by operation: where each tensor lies in the image, and which layers it depends on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deformconv.plots import resampling, reshaping
from deformconv.plots.operations import Operation, Rules, place_of
from deformconv.plots.places import Along, Place, moved, of_image

__all__ = ["Follower"]

_RULES = Rules(resampling.RULES | reshaping.RULES)

Key = tuple[Any, ...]


class _Part(NamedTuple):
    """Which part of a whole a slice is: elements start, start + step, ... of an axis of some size, or one of them alone."""

    whole: Key
    dim: int
    size: int
    start: int
    step: int
    alone: bool


class Follower(TorchDispatchMode):
    """Sees every operation that PyTorch computes while it is on.

    A tensor is known by its memory and how that is laid out, so that what is changed in place or is another object for the same
    elements stays known. All memory seen is kept until the end, for no new tensor to come where a known one was.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[Key, Place] = {}
        self._sources: dict[int, frozenset[Any]] = {}  # by memory
        self._parts: dict[Key, _Part] = {}
        self._kept: dict[int, Any] = {}

    def put(self, tensor: Tensor, place: Place | None, sources: frozenset[Any] = frozenset()) -> None:
        """Say where a tensor lies, and what it depends on beside what was known."""
        key = self._key(tensor)
        if key is not None:
            if place is not None:
                self._places[key] = place
            self._sources[key[0]] = self._sources.get(key[0], frozenset()) | sources

    def put_image(self, image: Tensor, rank: int) -> None:
        """Begin with an image, whose pixels are the last axes."""
        self.put(image, of_image(image.shape, rank))

    def place(self, tensor: Tensor) -> Place | None:
        """Where a tensor lies, if it is known."""
        key = self._key(tensor)
        return None if key is None else self._places.get(key)

    def sources(self, tensor: Tensor) -> frozenset[Any]:
        """What a tensor depends on."""
        key = self._key(tensor)
        return frozenset() if key is None else self._sources.get(key[0], frozenset())

    def _key(self, tensor: Tensor) -> Key | None:
        try:
            memory = tensor.untyped_storage()
            address = memory.data_ptr()
            key = address, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        except (RuntimeError, NotImplementedError):  # PyTorch's, for tensors that have no memory of their own
            return None
        if address == 0:
            return None
        self._kept.setdefault(address, memory)
        return key

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        schema = func._schema
        given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        given.update(zip((a.name for a in schema.arguments), args, strict=False))
        given.update(kwargs or {})
        changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        places = {name: self._placed(value) for name, value in given.items() if _has_tensors(value)}
        operation = Operation(schema.name, given, places, torch.Tag.pointwise in func.tags)
        sources = frozenset().union(*(self.sources(t) for value in given.values() for t in _tensors(value)))
        for number, tensor in enumerate(_tensors(output)):
            if changed:
                self._change(operation, tensor, sources)
            else:
                self.put(tensor, _known(operation, tuple(tensor.shape), number), sources)
                self._link(operation, tensor)
        return output

    def _placed(self, value: Any) -> Any:
        return self.place(value) if isinstance(value, Tensor) else [self.place(tensor) for tensor in _tensors(value)]

    def _change(self, operation: Operation, tensor: Tensor, sources: frozenset[Any]) -> None:
        """An operation has changed its argument: what is computed element by element moves it to where that lies."""
        if operation.name == "aten::copy_":
            place = operation.places.get("src")
            place = place if place is not None and len(place.axes) == tensor.ndim else None
        else:
            place = place_of(_RULES, operation, tuple(tensor.shape), 0) if operation.pointwise else None
        self.put(tensor, place, sources)
        if place is not None and (key := self._key(tensor)) is not None:
            self._write_back(key, place)

    def _link(self, operation: Operation, tensor: Tensor) -> None:
        """Remember which part of another tensor a slice is: something may be written there, and be read from the whole."""
        if operation.name not in ("aten::slice", "aten::select") or operation.places.get("self") is not None:
            return
        base: Tensor = operation.given["self"]
        key, whole = self._key(tensor), self._key(base)
        if key is None or whole is None:
            return
        given, dim = operation.given, operation.given["dim"] % base.ndim
        if operation.name == "aten::select":
            part = _Part(whole, dim, base.shape[dim], given["index"], 1, True)
        else:
            start, _, step = slice(given["start"], given["end"], given["step"]).indices(base.shape[dim])
            part = _Part(whole, dim, base.shape[dim], start, step, False)
        self._parts.setdefault(key, part)

    def _write_back(self, key: Key, place: Place) -> None:
        """What was written into a slice lies in the whole there."""
        while key in self._parts:
            part = self._parts[key]
            axes = list(place.axes)
            if part.alone:
                axes.insert(part.dim, (Along(part.size),))
            else:
                axes[part.dim] = moved(axes[part.dim], part.size, -part.start / part.step, 1 / part.step)
            place, key = Place(tuple(axes), place.doubt), part.whole
            if key in self._places:
                return  # what was written first, an image's middle before its border, says where all is
            self._places[key] = place


def _known(operation: Operation, shape: tuple[int, ...], number: int) -> Place | None:
    try:
        place = place_of(_RULES, operation, shape, number)
    except (LookupError, TypeError, ValueError):  # another PyTorch calls an operation with other arguments
        return None
    return place if place is not None and len(place.axes) == len(shape) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, Tensor):
                yield part


def _has_tensors(value: Any) -> bool:
    return next(_tensors(value), None) is not None
