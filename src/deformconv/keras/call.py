"""A layer's call in Keras' terms, and what it is in the operator's: sizes, padding and the order of axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import keras
from keras import ops

from deformconv.keras import array_api
from deformconv.ops.conv import portable
from deformconv.ops.conv.spec import ConvSpec, conv_spec
from deformconv.ops.operator import Operand
from deformconv.ops.window import positions_along, same_size_padding

__all__ = ["Settings", "by_keras_operations", "checked", "described"]


class Settings(NamedTuple):
    """A layer's settings, and where its tensors have their channels; offsets and masks have theirs first in any case."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str  # "same" or "valid"
    dilation_rate: tuple[int, ...]
    groups: int
    offset_groups: int | None
    boundary: str
    channels_last: bool

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    def pairs(self, sizes: Sequence[Any], maximum: Callable[[Any, int], Any] = max) -> tuple[tuple[Any, Any], ...]:
        """The padding of an input of these sizes, as pairs (before, after)."""
        if self.padding == "valid":
            return ((0, 0),) * self.rank
        return same_size_padding(sizes, self.kernel_size, self.strides, self.dilation_rate, maximum)

    def parameters(self, sizes: Sequence[int]) -> dict[str, Any]:
        """The parameters of `deformconv.deform_conv` for an input of these sizes."""
        return {
            "stride": self.strides,
            "padding": self.pairs(sizes),
            "dilation": self.dilation_rate,
            "groups": self.groups,
            "offset_groups": self.offset_groups,
            "boundary": self.boundary,
        }

    @property
    def weight_axes(self) -> tuple[int, ...]:
        """A kernel's axes in the order of a weight's: (C_out, C_in/groups, *kernel)."""
        return (self.rank + 1, self.rank, *range(self.rank))

    @property
    def kernel_axes(self) -> tuple[int, ...]:
        """A weight's axes in the order of a kernel's: (*kernel, C_in/groups, C_out)."""
        return (*range(2, self.rank + 2), 1, 0)


def described(array: Any) -> Operand:
    """What the checks need to know of a tensor, whose sizes may be None."""
    return Operand(tuple(array.shape), keras.utils.standardize_dtype(array.dtype))


def checked(settings: Settings, input: Operand, offset: Operand, weight: Operand, mask: Operand | None = None) -> ConvSpec:
    """The checked call, channels first. What is not known before the program runs has a size for which the call would fit."""
    operands = [input, offset, *([] if mask is None else [mask])]
    batch = next((operand.shape[0] for operand in operands if operand.shape[0] is not None), 1)
    if all(len(operand.shape) == settings.rank + 2 for operand in operands):
        sizes, positions = _sizes(settings, input.shape[2:], offset.shape[2:])
        for place, operand in enumerate(operands):
            own = sizes if place == 0 else [p if o is None else o for o, p in zip(operand.shape[2:], positions, strict=True)]
            first = batch if operand.shape[0] is None else operand.shape[0]
            operands[place] = operand._replace(shape=(first, operand.shape[1], *own))
    input, offset, *masks = operands
    return conv_spec(
        input, offset, weight, None, masks[0] if masks else None,
        **settings.parameters(input.shape[2:]), rank=settings.rank,
    )  # fmt: skip


def _sizes(
    settings: Settings, sizes: Sequence[int | None], positions: Sequence[int | None]
) -> tuple[list[int | None], list[int | None]]:
    """Sizes of an input and of its offsets; along an axis where one is not known, the least for which there is a position."""
    spans = [d * (k - 1) + 1 for k, d in zip(settings.kernel_size, settings.dilation_rate, strict=True)]
    is_open = [None in pair for pair in zip(sizes, positions, strict=True)]
    known: list[Any] = [span if open_ else size for size, span, open_ in zip(sizes, spans, is_open, strict=True)]
    made = map(positions_along, known, settings.kernel_size, settings.strides, settings.pairs(known), settings.dilation_rate)
    return known, [own if open_ else given for given, own, open_ in zip(positions, made, is_open, strict=True)]


def by_keras_operations(settings: Settings, input: Any, offset: Any, weight: Any, mask: Any) -> Any:
    """The output by the backend's own operations, which can be compiled, exported and differentiated; all channels first."""
    spec = checked(settings, *(described(tensor) for tensor in (input, offset, weight, mask) if tensor is not None))
    if None in (*input.shape, *offset.shape):
        batch, _, *sizes = map(_whole_number, ops.shape(input))
        _, _, *positions = map(_whole_number, ops.shape(offset))
        padding: Any = settings.pairs(sizes, _maximum)
        spec = replace(spec, batch=batch, input_size=tuple(sizes), output_size=tuple(positions), padding=padding)
    return portable.forward(spec, input, offset, weight, None, mask, array_api)


def _maximum(size: Any, least: int) -> Any:
    """The larger number; that of numbers is one, and no tensor of another dtype than positions have."""
    return max(size, least) if isinstance(size, int) else ops.maximum(size, least)


def _whole_number(size: Any) -> Any:
    """A size that the program computes is a tensor, of 64 bits as positions are."""
    return size if isinstance(size, int) else ops.cast(size, "int64")
