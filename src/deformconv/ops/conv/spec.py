"""Deformable convolution's shapes and parameters: every check and error text, from shapes and dtypes alone.

No array is seen here, so that NumPy arrays, framework tensors, tensors without memory and `explain` share
one text. The file is long because each known mistake has its own sentence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from deformconv.errors import ShapeError
from deformconv.ops.operator import Operand, check_dtypes_and_devices, same_shape
from deformconv.ops.taps.spec import (
    WindowSpec,
    Words,
    check_channels,
    check_input_axes,
    check_mask_channels,
    check_positions,
    offset_groups_of,
    output_size_of,
    shape_of,
)
from deformconv.ops.window import axes, by, channels_last, count, integers, n_of, paddings, resolved, window_of
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

_WORDS = Words("deform_conv", channels="C_in", kernel="`weight` has a kernel of size")
GRADIENTS = ("input", "offset", "weight", "bias", "mask")


class Gradients(NamedTuple):
    """One gradient per differentiable argument; None where it was not wanted or the argument is absent."""

    input: Any = None
    offset: Any = None
    weight: Any = None
    bias: Any = None
    mask: Any = None


@dataclass(frozen=True)
class ConvSpec(WindowSpec):
    """A checked call: everything that shapes, dtypes and parameters determine."""

    in_channels: int
    out_channels: int
    groups: int
    biased: bool

    __hash__ = WindowSpec.__hash__

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.in_channels, *self.input_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

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
    output_size = output_size_of(input, kernel_size, window.stride, window.padding, window.dilation, _WORDS)
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
    same_shape(spec, grad_output, f"(N, C_out, {axes(spec.rank)})")


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
            f"`weight` has shape {shape_of(weight)}, a kernel of size {by(kernel_size)}; "
            "expected at least one tap along every axis."
        )
    groups = _groups(input, weight, groups)
    padding = resolved(padding, kernel_size, stride, dilation)
    output_size = output_size_of(input, kernel_size, stride, padding, dilation, _WORDS)
    spec = ConvSpec(
        rank=len(stride),
        batch=batch,
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
        offset_groups=offset_groups_of(in_channels, kernel_size, output_size, offset, mask, offset_groups, _WORDS),
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
    check_positions(spec, "offset", offset, in_channels, weight.shape[1])
    if mask is not None:
        check_mask_channels(spec, mask)
        check_positions(spec, "mask", mask, in_channels, weight.shape[1])
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise ShapeError(
            f"`bias` has shape {shape_of(bias)}; expected ({out_channels},): one number per output channel, "
            f"axis 0 of `weight` {shape_of(weight)}."
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
        text = f"`input` has {n_of(channels, 'channel')}, shape {shape_of(input)}; this layer has in_channels={in_channels}."
        raise ShapeError(text + (channels_last("input") if input.shape[-1] == in_channels else ""))
    _groups(input, weight, groups)
    output_size_of(input, tuple(weight.shape[2:]), stride, padding, dilation, _WORDS)


_cached_check_input = lru_cache(maxsize=1024)(_check_input)
_cached_spec = lru_cache(maxsize=1024)(_spec)


def _rank(input: Operand, weight: Operand, rank: int | None) -> int:
    taker = None
    if rank is None:
        rank, taker = len(weight.shape) - 2, f"a weight with {n_of(len(weight.shape), 'axis')}"
        if not 1 <= rank <= 3:
            raise ShapeError(
                f"`weight` has {n_of(rank + 2, 'axis')}, shape {shape_of(weight)}; expected 3, 4 or 5: "
                "(C_out, C_in/groups) and 1, 2 or 3 spatial axes."
            )
    check_input_axes(input, rank, taker, _WORDS)
    if len(weight.shape) != rank + 2:
        raise ShapeError(
            f"`weight` has {n_of(len(weight.shape), 'axis')}, shape {shape_of(weight)}; deform_conv{rank}d takes "
            f"{rank + 2}: (C_out, C_in/groups, {axes(rank)})."
        )
    return rank


def _groups(input: Operand, weight: Operand, given: int | None) -> int:
    in_channels, (out_channels, group_channels) = input.shape[1], weight.shape[:2]
    check_channels(input)
    if min(out_channels, group_channels) < 1:
        raise ShapeError(f"`weight` has shape {shape_of(weight)}; expected (C_out, C_in/groups, *kernel), each at least 1.")
    groups = given or in_channels // group_channels
    if groups * group_channels != in_channels:
        text = f"`weight` has shape {shape_of(weight)}, so C_in/groups = {group_channels} (axis 1); expected "
        if given is None:
            text += f"a divisor of C_in = {in_channels}, the channels of `input` {shape_of(input)}."
        else:
            quotient = in_channels / groups if in_channels % groups else in_channels // groups
            text += (
                f"C_in/groups = {in_channels}/{groups} = {quotient}, for `input` "  # no `:g`, which a compiler cannot trace
                f"{shape_of(input)} and groups={groups}."
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
        text = f"`weight` has shape {shape_of(weight)}, so C_out = {out_channels} (axis 0); expected a multiple of "
        if given is None:
            text += f"groups = C_in / (C_in/groups) = {in_channels}/{group_channels} = {groups}."
            text += channels_last("input") if input.shape[-1] == group_channels else ""
        else:
            text += f"groups={groups}."
        raise ShapeError(text)
    return groups
