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


def checked(settings: Settings, input: Operand, offset: Operand, weight: Operand, mask: Operand | None) -> ConvSpec:
    """The checked call, channels first. What is not known before the program runs has a size for which the call would fit."""
    batch = next((operand.shape[0] for operand in (input, offset, mask) if operand and operand.shape[0] is not None), 1)
    sizes, positions = list(input.shape[2:]), list(offset.shape[2:])
    if len(sizes) == len(positions) == settings.rank:
        spans = [d * (k - 1) + 1 for k, d in zip(settings.kernel_size, settings.dilation_rate, strict=True)]
        open_axes = [axis for axis in range(settings.rank) if None in (sizes[axis], positions[axis])]
        for axis in open_axes:
            sizes[axis] = spans[axis]
        pairs = settings.pairs(sizes)
        for axis in open_axes:
            window = (settings.kernel_size[axis], settings.strides[axis], pairs[axis], settings.dilation_rate[axis])
            positions[axis] = positions_along(sizes[axis], *window)

    def known(operand: Operand | None, sizes: Sequence[int | None]) -> Operand | None:
        if operand is None or len(operand.shape) != settings.rank + 2:
            return operand
        own = [here if there is None else there for there, here in zip(operand.shape[2:], sizes, strict=True)]
        own = [here if axis in open_axes else there for axis, (there, here) in enumerate(zip(own, sizes, strict=True))]
        first = batch if operand.shape[0] is None else operand.shape[0]
        return operand._replace(shape=(first, operand.shape[1], *own))

    open_axes = open_axes if len(sizes) == len(positions) == settings.rank else []
    given: Any = known(input, sizes), known(offset, positions), weight
    return conv_spec(*given, mask=known(mask, positions), **settings.parameters(given[0].shape[2:]), rank=settings.rank)


def by_keras_operations(settings: Settings, input: Any, offset: Any, weight: Any, mask: Any) -> Any:
    """The output by the backend's own operations, which can be compiled, exported and differentiated; all channels first."""
    spec = checked(settings, *map(described, (input, offset, weight)), None if mask is None else described(mask))
    if None in (*input.shape, *offset.shape):
        batch, _, *sizes = ops.shape(input)
        _, _, *positions = ops.shape(offset)
        padding: Any = settings.pairs(sizes, ops.maximum)
        spec = replace(spec, batch=batch, input_size=tuple(sizes), output_size=tuple(positions), padding=padding)
    return portable.forward(spec, input, offset, weight, None, mask, array_api)
