"""What operators share whose taps have offsets and masks: the common part of a checked call, and checks with their texts.

Like the specs that use it, it sees shapes, dtypes and numbers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod
from typing import Any, NamedTuple, NoReturn

from deformconv.errors import ShapeError
from deformconv.ops.operator import Operand
from deformconv.ops.window import axes, axis_name, by, channels_last, n_of, positions_along

__all__ = [
    "WindowSpec", "Words", "check_channels", "check_input_axes", "check_mask_channels", "check_positions", "offset_groups_of",
    "output_size_of", "shape_of",
]  # fmt: skip


class Words(NamedTuple):
    """How an operator's errors name what they speak of."""

    function: str  # "deform_conv", before the rank and the letter d
    channels: str  # the input's: "C_in"
    kernel: str  # the beginning of a sentence that its size ends
    # (channels of `offset` that do not fit, channels of a tap, D) -> what else there is to say of them
    hint: Callable[[int, int, int], str] | None = None


@dataclass(frozen=True)
class WindowSpec:
    """What a window over an input, and its taps' offsets and masks, determine of a checked call."""

    rank: int
    batch: int
    offset_groups: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    output_size: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    masked: bool
    boundary: str
    dtype: str

    def __hash__(self) -> int:
        """The hash of the fields, kept: each call asks for it, to find its plan."""
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            found = hash(tuple(getattr(self, field.name) for field in fields(self)))
            object.__setattr__(self, "_hash", found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash, which is another one in another process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def taps(self) -> int:
        """K, the number of taps of the kernel."""
        return prod(self.kernel_size)

    @property
    def positions(self) -> int:
        """The number of output positions of one image."""
        return prod(self.output_size)

    @property
    def pixels(self) -> int:
        """The number of pixels of one input channel."""
        return prod(self.input_size)

    @property
    def offset_shape(self) -> tuple[int, ...]:
        return (self.batch, self.offset_groups * self.taps * self.rank, *self.output_size)

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (self.batch, self.offset_groups * self.taps, *self.output_size)


def check_input_axes(input: Operand, rank: int, taker: str | None, words: Words) -> None:
    """Raise unless the input has the axes of a batch; `taker` is what says how many, where that is not the function's name."""
    given = len(input.shape)
    if given == rank + 2:
        return
    text = (
        f"`input` has {n_of(given, 'axis')}, shape {shape_of(input)}; {taker or f'{words.function}{rank}d'} takes {rank + 2}: "
        f"(N, {words.channels}, {axes(rank)})."
    )
    if given == rank + 1:
        text += " For one image without a batch axis pass `input[None]`."
    if taker is None and 3 <= given <= 5:
        text += f" {given} axes are {given - 2}-D data, for {words.function}{given - 2}d."
    raise ShapeError(text)


def check_channels(input: Operand) -> None:
    """Raise unless the input has channels."""
    if input.shape[1] < 1:
        raise ShapeError(f"`input` has shape {shape_of(input)}, no channels; expected at least 1 (axis 1).")


def output_size_of(
    input: Operand,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    words: Words,
) -> tuple[int, ...]:
    """The positions per axis. Like torch, it takes an empty axis only in an empty batch."""
    D, batch, sizes = len(stride), input.shape[0], input.shape[2:]
    output_size = []
    for axis, (size, (before, after)) in enumerate(zip(sizes, padding, strict=True)):
        extent = dilation[axis] * (kernel_size[axis] - 1) + 1
        padded = size + before + after
        if padded < extent:
            raise ShapeError(
                f"{words.kernel} {by(kernel_size)}; along {axis_name(axis, D)} it spans "
                f"{dilation[axis]}*({kernel_size[axis]} - 1) + 1 = {n_of(extent, 'pixel')} (dilation, kernel size); "
                f"expected at most the padded input's {size} + {before} + {after} = {padded}, for `input` {shape_of(input)}."
            )
        if size < 1 and batch > 0:
            raise ShapeError(
                f"`input` has shape {shape_of(input)}, no pixels along {axis_name(axis, D)}; expected at least 1. "
                "Only a batch may be empty."
            )
        output_size.append(positions_along(size, kernel_size[axis], stride[axis], (before, after), dilation[axis]))
    return tuple(output_size)


def offset_groups_of(
    in_channels: int,
    kernel_size: tuple[int, ...],
    output_size: tuple[int, ...],
    offset: Operand,
    mask: Operand | None,
    given: int | None,
    words: Words,
) -> int:
    """The number of offset groups, from the channels of `offset`; verified where it was given."""
    D, K = len(kernel_size), prod(kernel_size)
    _check_axes("offset", offset, D)
    if given is not None and in_channels % given:
        raise ShapeError(f"`offset_groups` is {given}; expected a divisor of {words.channels} = {in_channels}.")
    channels = offset.shape[1]
    groups = given or channels // (D * K)
    if groups < 1 or channels != groups * D * K or in_channels % groups:
        _raise_offset_channels(in_channels, kernel_size, output_size, offset, mask, given, words)
    return groups


def _raise_offset_channels(
    in_channels: int,
    kernel_size: tuple[int, ...],
    output_size: tuple[int, ...],
    offset: Operand,
    mask: Operand | None,
    given: int | None,
    words: Words,
) -> NoReturn:
    D, K, channels = len(kernel_size), prod(kernel_size), offset.shape[1]
    each = D * K
    text = (
        f"`offset` has {n_of(channels, 'channel')}; a {by(kernel_size)} kernel takes "
        f"{n_of(D, 'axis')} x {n_of(K, 'tap')} = {each} per offset group"
    )
    whole = channels > 0 and channels % each == 0
    if given is not None:
        text += f", so offset_groups={given} takes {given * each}."
    elif whole:
        groups = n_of(channels // each, "offset group")
        text += f", so these are {groups}; expected a divisor of {words.channels} = {in_channels}."
    else:
        text += "."
    packed, rest = divmod(channels, (D + 1) * K)  # offset groups, were offsets and masks in one array
    if packed and not rest and packed == (given or packed) and in_channels % packed == 0:
        masks = packed * K
        text += f" {channels} = {packed * each} offsets + {masks} masks: for v2 pass the last {masks} as `mask`."
    elif mask is not None and len(mask.shape) == D + 2 and mask.shape[1] == channels * D:
        text += f" `mask` has {n_of(mask.shape[1], 'channel')}: the two are exchanged."
    elif tuple(offset.shape[1:-1]) == output_size and offset.shape[-1] % each == 0:
        text += channels_last("offset")
    elif offset.shape[-1] % each == 0 and channels == in_channels:  # as many rows as the input, and rows are what was counted
        text += channels_last("offset", "input")
    elif given is not None and whole:
        text += f" {channels} channels fit offset_groups={channels // each}."
    else:
        text += words.hint(channels, (given or 1) * D, D) if words.hint is not None else ""
    raise ShapeError(text)


def check_mask_channels(spec: WindowSpec, mask: Operand) -> None:
    """Raise unless the mask has a channel for every tap of every offset group."""
    _check_axes("mask", mask, spec.rank)
    channels, masks = mask.shape[1], spec.offset_groups * spec.taps
    if channels == masks:
        return
    offsets = masks * spec.rank
    text = (
        f"`mask` has {n_of(channels, 'channel')}; expected {n_of(spec.taps, 'tap')} x "
        f"{n_of(spec.offset_groups, 'offset group')} = {masks}, since `offset` has {n_of(offsets, 'channel')}."
    )
    if channels == offsets:
        text += " A mask is one number per tap, not one per axis."
    elif channels == offsets + masks:
        text += f" {channels} = {offsets} offsets + {masks} masks: pass the last {masks} alone."
    elif tuple(mask.shape[1:]) == (*spec.output_size, masks):
        text += channels_last("mask")
    elif channels and channels % spec.taps == 0:
        text += f" {channels} masks are {n_of(channels // spec.taps, 'offset group')}: `mask` and `offset` disagree."
    raise ShapeError(text)


def _check_axes(name: str, operand: Operand, D: int) -> None:
    if len(operand.shape) == D + 2:
        return
    channels = "offset_groups*K*D" if name == "offset" else "offset_groups*K"
    text = (
        f"`{name}` has {n_of(len(operand.shape), 'axis')}, shape {shape_of(operand)}; a {D}-D call takes {D + 2}: "
        f"(N, {channels}, {axes(D)})."
    )
    if len(operand.shape) == D + 1:
        text += f" For one image without a batch axis pass `{name}[None]`."
    raise ShapeError(text)


def check_positions(spec: WindowSpec, name: str, operand: Operand, in_channels: int, taken: int | None = None) -> None:
    """Check the batch and the spatial size of `offset` or `mask`.

    `in_channels` are the input's, and `taken` as many of them as a weight takes: an input that has so many on its last axis
    looks like one with channels last. Without a weight any number does.
    """
    batch, size = operand.shape[0], tuple(operand.shape[2:])
    if batch != spec.batch:
        text = f"`{name}` has a batch of {batch}; expected the batch of `input`, {spec.batch}."
        raise ShapeError(text + (" It is not broadcast: repeat it for every image." if batch == 1 else ""))
    if size == spec.output_size:
        return
    D = spec.rank
    axis = next(axis for axis in range(D) if size[axis] != spec.output_size[axis])
    (before, after), dilation = spec.padding[axis], spec.dilation[axis]
    text = (
        f"`{name}` has spatial size {by(size)}; expected the output's, {by(spec.output_size)}: along "
        f"{axis_name(axis, D)} (size + padding before + after - dilation*(kernel - 1) - 1)//stride + 1 = "
        f"({spec.input_size[axis]} + {before} + {after} - {dilation}*({spec.kernel_size[axis]} - 1) - 1)"
        f"//{spec.stride[axis]} + 1 = {spec.output_size[axis]}."
    )
    turned = (in_channels, *spec.input_size[:-1])
    if size == spec.input_size:
        text += (
            f" {by(size)} is the input's size, which stride {by(spec.stride)} and padding {spec.padding} do not "
            f"keep: predict `{name}` by a convolution with the same kernel size, stride, padding and dilation."
        )
    elif spec.input_size[-1] == (taken or spec.input_size[-1]) and size == tuple(
        map(positions_along, turned, spec.kernel_size, spec.stride, spec.padding, spec.dilation)
    ):
        text += channels_last("input")
    raise ShapeError(text)


def shape_of(operand: Operand) -> tuple[int, ...]:
    """A shape as errors show it, whatever a library's own kind of shape is."""
    return tuple(operand.shape)
