"""A layer's arithmetic without its framework: its arguments, its predictor's channels, and offsets and masks made of them.

A layer is a convolution's weight beside a predictor, itself a convolution over the same window of the same input. This module
sees numbers, and arrays only through the functions that it is handed, so that every framework's layer shares it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from numbers import Real
from typing import Any, NamedTuple

from deformconv.errors import ShapeError
from deformconv.ops.window import count, integers, paddings, resolved
from deformconv.sampling.rule import BOUNDARIES

__all__ = [
    "MASK_SCALE",
    "Layer",
    "LayerPadding",
    "Predicted",
    "activated",
    "check_divides",
    "check_passed",
    "check_predictor",
    "checked_layer",
    "describe",
    "layer_padding",
    "positive",
    "predicted",
]

MASK_SCALE = 2.0  # of masks MASK_SCALE*sigmoid(raw): a predictor of zeros, as a fresh one is, gives masks of 1


class Predicted(NamedTuple):
    """A predictor's channels: first those of the offsets, then those of the masks, of which v1 has none."""

    offsets: int
    masks: int

    @property
    def channels(self) -> int:
        return self.offsets + self.masks


class LayerPadding(NamedTuple):
    """A layer's padding: as a user reads it, "same", "valid", D numbers or D pairs, and always as D pairs (before, after)."""

    shown: Any
    pairs: tuple[tuple[int, int], ...]

    @property
    def symmetric(self) -> bool:
        """Whether every axis is padded by the same amount on both sides, which is all that most convolutions can do."""
        return all(before == after for before, after in self.pairs)


class Layer(NamedTuple):
    """A layer's checked arguments, under the names of its attributes."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: LayerPadding
    dilation: tuple[int, ...]
    groups: int
    offset_groups: int | None
    mask_scale: float
    max_offset: float | None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)


def checked_layer(
    rank: int,
    in_channels: Any,
    out_channels: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    *,
    offset_groups: Any,
    predict_offsets: bool,
    mask_scale: Any,
    max_offset: Any,
    boundary: str,
    padding_mode: str = "zeros",
    padding_modes: Collection[str] = ("zeros",),
) -> Layer:
    """Check a constructor's arguments; `padding_modes` are those that the framework can pad its input by.

    `in_channels` is None where the first input says it; the layer's is 0 then.
    Raises ShapeError, TypeError (numbers that are no integers) or ValueError (a word or a real number that is none of those).
    """
    in_channels = 0 if in_channels is None else count("in_channels", in_channels)
    out_channels = count("out_channels", out_channels)
    kernel_size = integers("kernel_size", kernel_size, rank, 1)
    stride, dilation = integers("stride", stride, rank, 1), integers("dilation", dilation, rank, 1)
    groups = count("groups", groups)
    if offset_groups is None and predict_offsets:
        raise ValueError("`offset_groups` is None; expected a number of groups, since this layer predicts their offsets.")
    offset_groups = None if offset_groups is None else count("offset_groups", offset_groups)
    check_divides("groups", groups, "in_channels", in_channels)
    check_divides("groups", groups, "out_channels", out_channels)
    check_divides("offset_groups", offset_groups or 1, "in_channels", in_channels)
    _check_word("padding_mode", padding_mode, padding_modes)
    _check_word("boundary", boundary, BOUNDARIES)
    mask_scale = positive("mask_scale", mask_scale)
    max_offset = None if max_offset is None else positive("max_offset", max_offset)
    amounts = layer_padding(padding, kernel_size, stride, dilation)
    return Layer(
        in_channels, out_channels, kernel_size, stride, amounts, dilation, groups, offset_groups, mask_scale, max_offset
    )  # fmt: skip


def layer_padding(
    padding: Any, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> LayerPadding:
    pairs = paddings(padding, len(kernel_size))
    if isinstance(pairs, str):
        return LayerPadding(pairs, resolved(pairs, kernel_size, stride, dilation))
    made = LayerPadding(pairs, pairs)
    return made._replace(shown=tuple(before for before, _ in pairs)) if made.symmetric else made


def predicted(kernel_size: tuple[int, ...], offset_groups: int, modulated: bool) -> Predicted:
    """What is predicted at every position: for each tap of each offset group D offsets and, in v2, a mask."""
    taps = offset_groups * math.prod(kernel_size)
    return Predicted(taps * len(kernel_size), taps if modulated else 0)


def activated(
    offset: Any,
    mask: Any,
    mask_scale: float,
    max_offset: float | None,
    tanh: Callable[[Any], Any],
    sigmoid: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """The offsets and the mask of what a predictor gave; without a bound offsets are used as they are, and v1 has no mask."""
    if max_offset is not None:
        offset = max_offset * tanh(offset / max_offset)
    return offset, None if mask is None else mask_scale * sigmoid(mask)


def check_passed(offset: Any, mask: Any, modulated: bool) -> None:
    """Raise unless a call has both, or offsets alone, or neither."""
    if offset is None and mask is not None:
        raise TypeError("`mask` was passed without `offset`; expected both, or neither to predict them.")
    if mask is not None and not modulated:
        raise ValueError(
            "`mask` was passed to a layer without modulation (v1); expected `offset` alone. For v2 build "
            "the layer with modulated=True."
        )


def check_predictor(predictor: Any) -> Any:
    """The predictor of a layer that is called without offsets; raise if it has none."""
    if predictor is None:
        raise TypeError(
            "`offset` is missing and this layer predicts none (predict_offsets=False); expected "
            "layer(input, offset) or layer(input, offset, mask)."
        )
    return predictor


def check_divides(name: str, divisor: int, of: str, number: int) -> None:
    if number % divisor:
        raise ShapeError(f"`{name}` is {divisor}; expected a divisor of {of} = {number}.")


def describe(layer: Any, *, biased: bool, predicts: bool) -> str:
    """The arguments of a layer as its repr shows them: the first ones, and those that are not the defaults."""
    rank = len(layer.kernel_size)
    defaults = {
        "padding": (0,) * rank,
        "dilation": (1,) * rank,
        "groups": 1,
        "padding_mode": "zeros",
        "modulated": True,
        "offset_groups": 1,
        "mask_scale": MASK_SCALE,
        "max_offset": None,
        "boundary": "zeros",
    }
    parts = [f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}", f"stride={layer.stride}"]
    parts += [f"{name}={value!r}" for name in defaults if (value := getattr(layer, name)) != defaults[name]]
    parts += ["bias=False"] * (not biased) + ["predict_offsets=False"] * (not predicts)
    return ", ".join(parts)


def _check_word(name: str, word: str, words: Collection[str]) -> None:
    if word not in words:
        raise ValueError(f"`{name}` is {word!r}; expected one of {', '.join(words)}.")


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"`{name}` is {value!r}; expected a number above 0.")
    return number
