"""The window that an operator slides over its input: stride, padding and dilation, checked, and its size.

Also the words that error texts share. Like the specs that use it, it sees shapes and numbers only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deformconv.errors import ShapeError

__all__ = [
    "axes",
    "axis_name",
    "by",
    "channels_last",
    "count",
    "flat",
    "integers",
    "n_of",
    "paddings",
    "pairs",
    "positions_along",
    "resolved",
    "same_padding",
    "same_size_padding",
    "Window",
    "window_of",
]

AXES = ("depth", "height", "width")
LIMIT = 2**40  # of a window's numbers, in pixels: sums and products of positions stay within 64 bits


def integers(name: str, value: Any, D: int, least: int) -> tuple[int, ...]:
    """One integer for all axes, or D of them, as a tuple of D."""
    entries: tuple[int, ...]
    if type(value) is int:
        entries = (value,) * D
    elif _is_plain(value, D):
        entries = value
    else:
        try:
            entries = tuple(value)
        except TypeError:
            entries = (value,) * D
        entries = tuple(_integer(name, entry, value) for entry in entries)
        if len(entries) != D:
            raise ShapeError(
                f"`{name}` has {n_of(len(entries), 'entry')}, {entries}; a {D}-D call takes one integer for "
                f"all axes, or {D}: ({axes(D)})."
            )
    if min(entries) < least:
        raise ShapeError(f"`{name}` is {value!r}; expected at least {least} along every axis.")
    if max(entries) >= LIMIT:
        raise ShapeError(f"`{name}` is {value!r}; expected less than 2**40 = {LIMIT} along every axis.")
    return entries


def count(name: str, value: Any, least: int = 1) -> int:
    """An integer of at least 1, or of another number."""
    number = _integer(name, value, value)
    if number < least:
        raise ShapeError(f"`{name}` is {number}; expected at least {least}.")
    return number


def paddings(padding: Any, D: int) -> str | tuple[tuple[int, int], ...]:
    """The padding as D pairs (before, after), or "same" or "valid"."""
    if type(padding) is int and 0 <= padding < LIMIT:
        return ((padding, padding),) * D
    if _is_plain(padding, D) and min(padding) >= 0 and max(padding) < LIMIT:
        return tuple(zip(padding, padding, strict=True))
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ShapeError(f"`padding` is {padding!r}; expected 'same', 'valid', {_padding_forms(D)}.")
        return padding
    try:
        entries = tuple(padding)
    except TypeError:
        entries = (padding,) * D
    paired = [isinstance(entry, (tuple, list)) or getattr(entry, "ndim", 0) == 1 for entry in entries]
    if any(paired):
        if not all(paired) or len(entries) != D or any(len(entry) != 2 for entry in entries):
            raise ShapeError(f"`padding` is {padding!r}; a {D}-D call takes {n_of(D, 'pair')}, one per axis: {_pair_form(D)}.")
        given = tuple((_integer("padding", a, padding), _integer("padding", b, padding)) for a, b in entries)
        if min(map(min, given)) < 0:
            raise ShapeError(f"`padding` is {padding!r}; expected at least 0 on every side.")
        if max(map(max, given)) >= LIMIT:
            raise ShapeError(f"`padding` is {padding!r}; expected less than 2**40 = {LIMIT} on every side.")
        return given
    if len(entries) == 2 * D:
        raise ShapeError(
            f"`padding` has {n_of(len(entries), 'entry')}, {padding!r}; a {D}-D call takes "
            f"{_padding_forms(D)}. "
            f"For different amounts before and after write pairs: {_pair_form(D)}."
        )
    return tuple((amount, amount) for amount in integers("padding", padding, D, 0))


def same_padding(
    kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """The pairs that keep the input's size; of an odd sum the larger half is after, as in PyTorch."""
    if max(stride) > 1:
        raise ShapeError(
            f"`padding` is 'same' with stride {by(stride)}; expected stride {by((1,) * len(stride))}, since "
            "'same' "
            "keeps the input's size. Give the padding in numbers."
        )
    totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def same_size_padding(
    sizes: Sequence[Any],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    maximum: Callable[[Any, int], Any] = max,
) -> tuple[tuple[Any, Any], ...]:
    """What TensorFlow, JAX and Keras mean by "same", with strides too: ceil(size/stride) positions, the larger half after.

    With strides the amounts depend on the input's sizes. These may be what a program computes later, with its `maximum`.
    """
    amounts = []
    for size, k, s, d in zip(sizes, kernel_size, stride, dilation, strict=True):
        extent = d * (k - 1) + 1
        total = extent - 1 if s == 1 else maximum(-(-size // s) * s - s + extent - size, 0)
        amounts.append((total // 2, total - total // 2))
    return tuple(amounts)


class Window(NamedTuple):
    """A window's parameters along every axis, in pixels."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


def window_of(stride: Any, padding: Any, dilation: Any, kernel_size: tuple[int, ...]) -> Window:
    """Check a window's parameters, and find out what "same" and "valid" mean for this kernel."""
    D = len(kernel_size)
    stride, padding, dilation = integers("stride", stride, D, 1), paddings(padding, D), integers("dilation", dilation, D, 1)
    return Window(stride, resolved(padding, kernel_size, stride, dilation), dilation)


def resolved(
    padding: str | tuple[tuple[int, int], ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    """Checked padding in numbers."""
    if not isinstance(padding, str):
        return padding
    return same_padding(kernel_size, stride, dilation) if padding == "same" else ((0, 0),) * len(kernel_size)


def flat(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Pairs of padding one after the other, as PyTorch's schemas take them."""
    return [amount for pair in padding for amount in pair]


def pairs(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The pairs again."""
    return tuple(zip(padding[::2], padding[1::2], strict=True))


def positions_along(size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> int:
    """The number of positions of the window along one axis."""
    return (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1


def n_of(number: int, noun: str) -> str:
    """A number and its noun, as in "1 axis" or "2 axes"."""
    plural = {"axis": "axes", "entry": "entries", "query": "queries"}.get(noun, noun + "s")
    return f"{number} {noun if number == 1 else plural}"


def by(sizes: tuple[int, ...]) -> str:
    """Sizes, as in "3x3"."""
    return "x".join(map(str, sizes))


def axes(D: int) -> str:
    """The names of D spatial axes, as in "height, width"."""
    return ", ".join(AXES[3 - D :])


def axis_name(axis: int, D: int) -> str:
    """The name of one of D spatial axes."""
    return AXES[3 - D + axis]


def channels_last(name: str, other: str | None = None) -> str:
    """The hint for an array, and another one with it, whose last axis looks like its channels."""
    if other is not None:
        return f" `{name}` and `{other}` look channels-last: move their last axis to place 1, `numpy.moveaxis({name}, -1, 1)`."
    return f" `{name}` looks channels-last: move its last axis to place 1, `numpy.moveaxis({name}, -1, 1)`."


def _is_plain(value: Any, D: int) -> bool:
    """Whether `value` is a tuple of D plain integers, the usual case, which must be fast."""
    return type(value) is tuple and len(value) == D and set(map(type, value)) == {int}


def _integer(name: str, value: Any, whole: Any) -> int:
    if type(value) is int:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{name}` is {whole!r}, which holds {value!r} of type {type(value).__name__}; expected integers."
        ) from None


def _padding_forms(D: int) -> str:
    return f"one integer, {n_of(D, 'integer')} or {n_of(D, 'pair')} (before, after)"


def _pair_form(D: int) -> str:
    return "(" + "(before, after), " * (D - 1) + ("(before, after))" if D > 1 else "(before, after),)")
