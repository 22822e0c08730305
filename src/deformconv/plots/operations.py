"""Operations of PyTorch as they are seen while a forward pass is followed, and the table of their rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deformconv.plots.places import Along, Place, merged, moved

__all__ = ["Operation", "Rules", "guessed", "place_of"]

# Operations that look at the places of more tensors than the first.
_OF_SEVERAL = {f"aten::{name}" for name in ("cat", "stack", "mm", "bmm", "addmm", "baddbmm")}


@dataclass(frozen=True)
class Operation:
    """A call of an operation: its name, its arguments by their names, and the places of those that are tensors."""

    name: str
    given: dict[str, Any]
    places: dict[str, Any]  # a list of places for a list of tensors; None where nothing is known
    pointwise: bool

    @property
    def known(self) -> list[Place]:
        found = [part for value in self.places.values() for part in (value if isinstance(value, list) else [value])]
        return [place for place in found if place is not None]

    @property
    def first(self) -> Place | None:
        """The place of the first tensor."""
        place = next(iter(self.places.values()), None)
        return place if isinstance(place, Place) else None


# A rule gets the call, the place of its first tensor, the output's shape and which of the outputs it is.
Rule = Callable[[Operation, Place, tuple[int, ...], int], "Place | None"]


class Rules(dict[str, Rule]):
    """A table of rules by the names of operations."""

    def of(self, *names: str) -> Callable[[Rule], Rule]:
        """A decorator that puts a rule into the table, for operations of aten unless a name says otherwise."""

        def put(rule: Rule) -> Rule:
            self.update((name if "::" in name else f"aten::{name}", rule) for name in names)
            return rule

        return put


def place_of(rules: Rules, operation: Operation, shape: tuple[int, ...], number: int) -> Place | None:
    """Where an output of an operation lies, the one with this number; None if nothing is known."""
    if not operation.known:
        return None
    if operation.pointwise:
        return merged(operation.known, shape)
    rule = rules.get(operation.name)
    if rule is None:
        return guessed(operation, shape)
    if operation.first is None and operation.name not in _OF_SEVERAL:
        return None  # weights, say, that depend on the image
    return rule(operation, operation.first or Place(()), shape, number)


def guessed(operation: Operation, shape: tuple[int, ...]) -> Place | None:
    """An unknown operation leaves the image's axes where they are, as far as one can guess."""
    place = operation.known[0]
    rank = len({along.axis for axis in place.axes for along in axis} - {None})
    spatial = place.spatial(rank)
    is_new = operation.name.endswith("_like") or "::new_" in operation.name
    if is_new or spatial is None or len(shape) <= rank or 0 in shape:
        return None
    pairs = list(zip(spatial, shape[-rank:], strict=True))
    last = [moved((along,), size, (along.size / size - 1) / 2, along.size / size) for along, size in pairs]
    return Place((*((Along(size),) for size in shape[:-rank]), *last), place.doubt or operation.name)
