"""Multi-scale deformable attention's shapes: every check and error text, from shapes and dtypes alone."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from deformconv.errors import ShapeError
from deformconv.ops.operator import Operand, check_dtypes_and_devices
from deformconv.ops.window import LIMIT, n_of

__all__ = ["AttentionSpec", "Gradients", "attention_spec", "level_sizes"]

_LOCATIONS = "(N, Q, heads, levels, points, 2)"
_WEIGHTS = "(N, Q, heads, levels, points)"
_AXES = ("image", "query", "head", "level", "point")


class Gradients(NamedTuple):
    """One gradient per argument; None where it was not wanted."""

    value: Any = None
    locations: Any = None
    weights: Any = None


@dataclass(frozen=True)
class AttentionSpec:
    """A checked call: everything that shapes, dtypes and parameters determine."""

    batch: int
    heads: int
    channels: int  # of a head
    queries: int
    levels: tuple[tuple[int, int], ...]  # the height and the width of each
    points: int  # of a query in a level
    dtype: str

    @property
    def tokens(self) -> int:
        """The pixels of all levels."""
        return sum(height * width for height, width in self.levels)

    @property
    def starts(self) -> tuple[int, ...]:
        """The number of each level's first token."""
        ends = accumulate(height * width for height, width in self.levels)
        return (0, *ends)[: len(self.levels)]

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (self.batch, self.tokens, self.heads, self.channels)

    @property
    def locations_shape(self) -> tuple[int, ...]:
        return (*self.weights_shape, 2)

    @property
    def weights_shape(self) -> tuple[int, ...]:
        return (self.batch, self.queries, self.heads, len(self.levels), self.points)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.queries, self.heads * self.channels)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arguments, all of which are given."""
        return {"value": self.value_shape, "locations": self.locations_shape, "weights": self.weights_shape}

    def with_given(self, names: Collection[str]) -> AttentionSpec:
        """The same call, since no argument is optional."""
        return self


def level_sizes(spatial_shapes: Any) -> tuple[tuple[int, int], ...]:
    """The levels' heights and widths as plain numbers, from a sequence of pairs or an array of integers."""
    if type(spatial_shapes) is tuple and all(type(pair) is tuple and len(pair) == 2 for pair in spatial_shapes):
        pairs: Any = spatial_shapes
    else:
        pairs = spatial_shapes.tolist() if hasattr(spatial_shapes, "tolist") else spatial_shapes
        try:
            pairs = [tuple(pair) for pair in pairs]
        except TypeError:
            raise TypeError(
                f"`spatial_shapes` is {spatial_shapes!r}; expected a pair (height, width) of integers for each level."
            ) from None
    if not pairs:
        raise ShapeError("`spatial_shapes` is empty; expected a pair (height, width) for each level, at least one.")
    return tuple(_pair(pair) for pair in pairs)


def _pair(pair: Any) -> tuple[int, int]:
    if len(pair) != 2:
        raise ShapeError(f"`spatial_shapes` has {n_of(len(pair), 'number')} for a level, {pair}; expected 2: (height, width).")
    try:
        height, width = (size if type(size) is int else operator.index(size) for size in pair)
    except TypeError:
        raise TypeError(f"`spatial_shapes` has {pair} for a level; expected two integers: (height, width).") from None
    if not (1 <= height < LIMIT and 1 <= width < LIMIT):
        raise ShapeError(f"`spatial_shapes` has {pair} for a level; expected at least one pixel, and less than 2**40, an axis.")
    return height, width


def attention_spec(
    value: Operand, locations: Operand, weights: Operand, *, spatial_shapes: Any, cached: bool = True
) -> AttentionSpec:
    """Check a call and derive everything that its shapes and parameters determine.

    Raises ShapeError, TypeError (dtypes, levels that are no integers) or ValueError (devices).
    """
    levels = level_sizes(spatial_shapes)
    try:
        if cached:
            return _cached_spec(value, locations, weights, levels)
    except TypeError:
        pass  # symbolic sizes have no hash; a TypeError of the checks is raised again below
    return _spec(value, locations, weights, levels)


def _spec(value: Operand, locations: Operand, weights: Operand, levels: tuple[tuple[int, int], ...]) -> AttentionSpec:
    check_dtypes_and_devices(("value", value), {"locations": locations, "weights": weights})
    if len(value.shape) != 4:
        text = f"`value` has {n_of(len(value.shape), 'axis')}, shape {_shape(value)}; expected 4: (N, L, heads, d)."
        if len(value.shape) == 3:
            text += " For (N, L, heads*d) pass `value.reshape(N, L, heads, -1)`."
        raise ShapeError(text)
    batch, tokens, heads, channels = value.shape
    if heads < 1 or channels < 1:
        raise ShapeError(
            f"`value` has shape {_shape(value)}; expected (N, L, heads, d) with at least one head and one channel."
        )
    expected = sum(height * width for height, width in levels)
    if tokens != expected:
        sizes = " + ".join(f"{height}*{width}" for height, width in levels)
        raise ShapeError(
            f"`value` has {n_of(tokens, 'token')}, shape {_shape(value)}, and `spatial_shapes` has {sizes} = {expected}; "
            "expected the pixels of all levels, one level after the other." + _turned(value, expected)
        )
    _check_axes(locations, weights)
    spec = AttentionSpec(
        batch=batch,
        heads=heads,
        channels=channels,
        queries=locations.shape[1],
        levels=levels,
        points=locations.shape[4],
        dtype=value.dtype,
    )
    whose = ("`value`", None, "`value`", "`spatial_shapes`", None)
    for name, operand in (("locations", locations), ("weights", weights)):
        for axis, (found, wanted) in enumerate(zip(operand.shape, spec.weights_shape, strict=False)):
            if found != wanted:
                raise ShapeError(_other(name, operand, axis, found, wanted, whose[axis] or "`locations`"))
    return spec


_cached_spec = lru_cache(maxsize=1024)(_spec)


def _check_axes(locations: Operand, weights: Operand) -> None:
    if len(locations.shape) != 6 or locations.shape[5] != 2:
        text = f"`locations` has shape {_shape(locations)}; expected {_LOCATIONS}: x and y in 0..1 of each level"
        if len(locations.shape) == 6 and locations.shape[5] == 4:
            text += ". Boxes are no locations: pass the points that were found in them"
        elif len(locations.shape) == 4:
            text += ". Reference points are no locations: add the offsets to them"
        raise ShapeError(text + ".")
    if len(weights.shape) != 5:
        text = f"`weights` has {n_of(len(weights.shape), 'axis')}, shape {_shape(weights)}; expected 5: {_WEIGHTS}."
        if len(weights.shape) == 4:
            text += " Where levels and points are one axis, pass `weights.reshape(*weights.shape[:3], levels, points)`."
        raise ShapeError(text)


def _other(name: str, operand: Operand, axis: int, found: int, wanted: int, whose: str) -> str:
    form = _LOCATIONS if name == "locations" else _WEIGHTS
    return (
        f"`{name}` has {n_of(found, _AXES[axis])}, shape {_shape(operand)}, and {whose} has {wanted}; expected {form} with as "
        "many of them."
    )


def _turned(value: Operand, tokens: int) -> str:
    """What to do about a value whose axes seem to be in another order."""
    if value.shape[2] == tokens:
        return " For (N, heads, L, d) pass `value.transpose(1, 2)` of a tensor, `value.swapaxes(1, 2)` of an array."
    return ""


def _shape(operand: Operand) -> tuple[int, ...]:
    return tuple(operand.shape)
