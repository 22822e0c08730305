"""Deformable convolution's shapes and parameters: every check and error text, from shapes and dtypes alone.

No array is seen here, so that NumPy arrays, framework tensors, tensors without memory and `explain` share
one text. The file is long because each known mistake has its own sentence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, NoReturn

from deformconv.errors import ShapeError
from deformconv.ops.operator import Operand, check_dtypes_and_devices, check_grad_dtype
from deformconv.ops.record import record
from deformconv.ops.window import (
    axes,
    axis_name,
    by,
    channels_last,
    count,
    integers,
    n_of,
    paddings,
    positions_along,
    resolved,
    window_of,
)
from deformconv.sampling.rule import check_boundary

__all__ = [
    "GRADIENTS",
    "ConvSpec",
    "Gradients",
    "Operand",
    "check_grad_output",
    "check_input",
    "conv_spec",
    "layer_spec",
]

GRADIENTS = ("input", "offset", "weight", "bias", "mask")


class Gradients(NamedTuple):
    """One gradient per differentiable argument; None where it was not wanted or the argument is absent."""

    input: Any = None
    offset: Any = None
    weight: Any = None
    bias: Any = None
    mask: Any = None


@record(frozen=True, kw_only=True)
class ConvSpec:
    """A checked call: everything that shapes, dtypes and parameters determine."""

    rank: int
    batch: int
    in_channels: int
    out_channels: int
    groups: int
    offset_groups: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    output_size: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    masked: bool
    biased: bool
    boundary: str
    dtype: str

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
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.in_channels, *self.input_size)

    @property
    def offset_shape(self) -> tuple[int, ...]:
        return (self.batch, self.offset_groups * self.taps * self.rank, *self.output_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (self.batch, self.offset_groups * self.taps, *self.output_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.out_channels, *self.output_size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arguments that were given."""
        found = {"input": self.input_shape, "offset": self.offset_shape, "weight": self.weight_shape}
        if self.biased:
            found["bias"] = (self.out_channels,)
        if self.masked:
            found["mask"] = self.mask_shape
        return found

    def with_given(self, names: Collection[str]) -> ConvSpec:
        """The same call with these optional arguments given as well."""
        return replace(self, biased=self.biased or "bias" in names, masked=self.masked or "mask" in names)


def conv_spec(
    input: Operand,
    offset: Operand,
    weight: Operand,
    bias: Operand | None = None,
    mask: Operand | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = None,
    offset_groups: Any = None,
    boundary: str = "zeros",
    rank: int | None = None,
    cached: bool = True,
) -> ConvSpec:
    """Check a call and derive everything that its shapes and parameters determine.

    `rank` is the rank of the function that was called (deform_conv2d: 2), or None where the weight decides.
    `cached=False` is for torch.compile, which reads this function and warns of caches.
    Raises ShapeError, TypeError (dtypes, numbers that are no integers) or ValueError (devices, boundary).
    An input without channels is refused, though torch's conv2d returns an empty output for one: groups and
    offset groups cannot be inferred from it, and it is nearly always a mistake in slicing.
    """
    D = _rank(input, weight, rank)
    # The parameters become plain integers before the cache sees them: to a hash, 1.0 and True are 1.
    stride = integers("stride", stride, D, 1)
    padding = paddings(padding, D)
    dilation = integers("dilation", dilation, D, 1)
    groups = None if groups is None else count("groups", groups)
    offset_groups = None if offset_groups is None else count("offset_groups", offset_groups)
    call = (input, offset, weight, bias, mask, stride, padding, dilation, groups, offset_groups, boundary)
    try:
        if cached:
            return _cached_spec(*call)
    except TypeError:
        pass  # symbolic sizes have no hash; a TypeError of the checks is raised again below
    return _spec(*call)


def layer_spec(
    input: Operand, weight: Operand, bias: Operand | None, masked: bool,
    stride: Any, padding: Any, dilation: Any, groups: int, offset_groups: int, boundary: str,
) -> ConvSpec:  # fmt: skip
    """The checked call of a layer that predicts its offsets, whose arguments have been checked."""
    kernel_size = tuple(weight.shape[2:])
    window = window_of(stride, padding, dilation, kernel_size)
    output_size = _output_size(input, kernel_size, window.stride, window.padding, window.dilation)
    taps = offset_groups * prod(kernel_size)

    def made(channels: int) -> Operand:
        return input._replace(shape=(input.shape[0], channels, *output_size))

    return conv_spec(
        input, made(taps * len(kernel_size)), weight, bias, made(taps) if masked else None,
        stride=window.stride, padding=window.padding, dilation=window.dilation,
        groups=groups, offset_groups=offset_groups, boundary=boundary,
    )  # fmt: skip


def check_input(
    input: Operand,
    weight: Operand,
    *,
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
    rank: int | None,
    in_channels: int | None = None,
    cached: bool = True,
) -> None:
    """Raise what conv_spec would for these two: for a layer, made for `in_channels`, which predicts its offsets."""
    call = (input, weight, stride, padding, dilation, groups, rank, in_channels)
    try:
        if cached:
            return _cached_check_input(*call)
    except TypeError:
        pass  # as in conv_spec
    _check_input(*call)


def check_grad_output(spec: ConvSpec, grad_output: Operand) -> None:
    """Raise unless `grad_output` has the output's shape and the call's dtype."""
    if tuple(grad_output.shape) != spec.output_shape:
        raise ShapeError(
            f"`grad_output` has shape {_shape(grad_output)}; expected the output's, {spec.output_shape}: "
            f"(N, C_out, {axes(spec.rank)})."
        )
    check_grad_dtype(spec, grad_output)


def _spec(
    input: Operand,
    offset: Operand,
    weight: Operand,
    bias: Operand | None,
    mask: Operand | None,
    stride: tuple[int, ...],
    padding: str | tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int | None,
    offset_groups: int | None,
    boundary: str,
) -> ConvSpec:
    check_boundary(boundary)
    check_dtypes_and_devices(("input", input), {"offset": offset, "weight": weight, "bias": bias, "mask": mask})
    batch, in_channels, *sizes = input.shape
    out_channels, _, *kernel = weight.shape
    kernel_size = tuple(kernel)
    if min(kernel_size) < 1:
        raise ShapeError(
            f"`weight` has shape {_shape(weight)}, a kernel of size {by(kernel_size)}; "
            "expected at least one tap along every axis."
        )
    groups = _groups(input, weight, groups)
    padding = resolved(padding, kernel_size, stride, dilation)
    output_size = _output_size(input, kernel_size, stride, padding, dilation)
    spec = ConvSpec(
        rank=len(stride),
        batch=batch,
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
        offset_groups=_offset_groups(in_channels, kernel_size, output_size, offset, mask, offset_groups),
        input_size=tuple(sizes),
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        output_size=output_size,
        padding=padding,
        masked=mask is not None,
        biased=bias is not None,
        boundary=boundary,
        dtype=input.dtype,
    )
    _check_positions(spec, "offset", offset)
    if mask is not None:
        _check_mask_channels(spec, mask)
        _check_positions(spec, "mask", mask)
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise ShapeError(
            f"`bias` has shape {_shape(bias)}; expected ({out_channels},): one number per output channel, "
            f"axis 0 of `weight` {_shape(weight)}."
        )
    return spec


def _check_input(
    input: Operand,
    weight: Operand,
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
    rank: int | None,
    in_channels: int | None,
) -> None:
    _rank(input, weight, rank)
    check_dtypes_and_devices(("input", input), {"weight": weight})
    channels = input.shape[1]
    if in_channels is not None and channels != in_channels and channels != weight.shape[1] * groups:
        text = f"`input` has {n_of(channels, 'channel')}, shape {_shape(input)}; this layer has in_channels={in_channels}."
        raise ShapeError(text + (channels_last("input") if input.shape[-1] == in_channels else ""))
    _groups(input, weight, groups)
    _output_size(input, tuple(weight.shape[2:]), stride, padding, dilation)


_cached_check_input = lru_cache(maxsize=1024)(_check_input)
_cached_spec = lru_cache(maxsize=1024)(_spec)


def _rank(input: Operand, weight: Operand, rank: int | None) -> int:
    named = rank is not None
    if rank is None:
        rank, taker = len(weight.shape) - 2, f"a weight with {n_of(len(weight.shape), 'axis')}"
        if not 1 <= rank <= 3:
            raise ShapeError(
                f"`weight` has {n_of(rank + 2, 'axis')}, shape {_shape(weight)}; expected 3, 4 or 5: "
                "(C_out, C_in/groups) and 1, 2 or 3 spatial axes."
            )
    else:
        taker = f"deform_conv{rank}d"
    given = len(input.shape)
    if given != rank + 2:
        text = f"`input` has {n_of(given, 'axis')}, shape {_shape(input)}; {taker} takes {rank + 2}: (N, C_in, {axes(rank)})."
        if given == rank + 1:
            text += " For one image without a batch axis pass `input[None]`."
        if named and 3 <= given <= 5:
            text += f" {given} axes are {given - 2}-D data, for deform_conv{given - 2}d."
        raise ShapeError(text)
    if len(weight.shape) != rank + 2:
        raise ShapeError(
            f"`weight` has {n_of(len(weight.shape), 'axis')}, shape {_shape(weight)}; {taker} takes "
            f"{rank + 2}: (C_out, C_in/groups, {axes(rank)})."
        )
    return rank


def _groups(input: Operand, weight: Operand, given: int | None) -> int:
    in_channels, (out_channels, group_channels) = input.shape[1], weight.shape[:2]
    if in_channels < 1:
        raise ShapeError(f"`input` has shape {_shape(input)}, no channels; expected at least 1 (axis 1).")
    if min(out_channels, group_channels) < 1:
        raise ShapeError(f"`weight` has shape {_shape(weight)}; expected (C_out, C_in/groups, *kernel), each at least 1.")
    groups = given or in_channels // group_channels
    if groups * group_channels != in_channels:
        text = f"`weight` has shape {_shape(weight)}, so C_in/groups = {group_channels} (axis 1); expected "
        if given is None:
            text += f"a divisor of C_in = {in_channels}, the channels of `input` {_shape(input)}."
        else:
            quotient = in_channels / groups if in_channels % groups else in_channels // groups
            text += (
                f"C_in/groups = {in_channels}/{groups} = {quotient}, for `input` "  # no `:g`, which a compiler cannot trace
                f"{_shape(input)} and groups={groups}."
            )
        if in_channels % group_channels == 0:
            text += f" This weight fits groups={in_channels // group_channels}."
        elif input.shape[-1] == group_channels * (given or 1):
            text += channels_last("input")
        elif weight.shape[-1] * (given or 1) == in_channels:
            text += channels_last("weight")
        if out_channels == in_channels:
            text += (
                " If its axes are (C_in, C_out, *kernel), a transposed convolution's order, swap the first "
                "two: `weight.swapaxes(0, 1)`."
            )
        raise ShapeError(text)
    if out_channels % groups:
        text = f"`weight` has shape {_shape(weight)}, so C_out = {out_channels} (axis 0); expected a multiple of "
        if given is None:
            text += f"groups = C_in / (C_in/groups) = {in_channels}/{group_channels} = {groups}."
            text += channels_last("input") if input.shape[-1] == group_channels else ""
        else:
            text += f"groups={groups}."
        raise ShapeError(text)
    return groups


def _output_size(
    input: Operand,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """The positions per axis. Like torch, it takes an empty axis only in an empty batch."""
    D, batch, sizes = len(stride), input.shape[0], input.shape[2:]
    output_size = []
    for axis, (size, (before, after)) in enumerate(zip(sizes, padding, strict=True)):
        extent = dilation[axis] * (kernel_size[axis] - 1) + 1
        padded = size + before + after
        if padded < extent:
            raise ShapeError(
                f"`weight` has a kernel of size {by(kernel_size)}; along {axis_name(axis, D)} it spans "
                f"{dilation[axis]}*({kernel_size[axis]} - 1) + 1 = {n_of(extent, 'pixel')} (dilation, "
                "kernel size); "
                f"expected at most the padded input's {size} + {before} + {after} = {padded}, for `input` "
                f"{_shape(input)}."
            )
        if size < 1 and batch > 0:
            raise ShapeError(
                f"`input` has shape {_shape(input)}, no pixels along {axis_name(axis, D)}; expected at "
                "least 1. "
                "Only a batch may be empty."
            )
        output_size.append(positions_along(size, kernel_size[axis], stride[axis], (before, after), dilation[axis]))
    return tuple(output_size)


def _offset_groups(
    in_channels: int,
    kernel_size: tuple[int, ...],
    output_size: tuple[int, ...],
    offset: Operand,
    mask: Operand | None,
    given: int | None,
) -> int:
    D, K = len(kernel_size), prod(kernel_size)
    _check_axes("offset", offset, D)
    if given is not None and in_channels % given:
        raise ShapeError(f"`offset_groups` is {given}; expected a divisor of C_in = {in_channels}.")
    channels = offset.shape[1]
    groups = given or channels // (D * K)
    if groups < 1 or channels != groups * D * K or in_channels % groups:
        _raise_offset_channels(in_channels, kernel_size, output_size, offset, mask, given)
    return groups


def _raise_offset_channels(
    in_channels: int,
    kernel_size: tuple[int, ...],
    output_size: tuple[int, ...],
    offset: Operand,
    mask: Operand | None,
    given: int | None,
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
        text += f", so these are {n_of(channels // each, 'offset group')}; expected a divisor of C_in = {in_channels}."
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
    elif given is not None and whole:
        text += f" {channels} channels fit offset_groups={channels // each}."
    raise ShapeError(text)


def _check_mask_channels(spec: ConvSpec, mask: Operand) -> None:
    _check_axes("mask", mask, spec.rank)
    channels, masks = mask.shape[1], spec.offset_groups * spec.taps
    if channels == masks:
        return
    offsets = masks * spec.rank
    text = (
        f"`mask` has {n_of(channels, 'channel')}; expected {n_of(spec.taps, 'tap')} x "
        f"{n_of(spec.offset_groups, 'offset group')} = {masks}, since `offset` has "
        f"{n_of(offsets, 'channel')}."
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
        f"`{name}` has {n_of(len(operand.shape), 'axis')}, shape {_shape(operand)}; a {D}-D call takes "
        f"{D + 2}: "
        f"(N, {channels}, {axes(D)})."
    )
    if len(operand.shape) == D + 1:
        text += f" For one image without a batch axis pass `{name}[None]`."
    raise ShapeError(text)


def _check_positions(spec: ConvSpec, name: str, operand: Operand) -> None:
    """Check the batch and the spatial size of `offset` or `mask`."""
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
    if size == spec.input_size:
        text += (
            f" {by(size)} is the input's size, which stride {by(spec.stride)} and padding {spec.padding} do "
            "not "
            f"keep: predict `{name}` by a convolution with the same kernel size, stride, padding and "
            "dilation."
        )
    elif spec.input_size[-1] == spec.in_channels // spec.groups and size == tuple(
        map(
            positions_along,
            (spec.in_channels, *spec.input_size[:-1]),
            spec.kernel_size,
            spec.stride,
            spec.padding,
            spec.dilation,
        )
    ):
        text += channels_last("input")
    raise ShapeError(text)


def _shape(operand: Operand) -> tuple[int, ...]:
    return tuple(operand.shape)
