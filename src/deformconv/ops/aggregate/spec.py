"""Deformable aggregation's shapes and parameters: every check and error text, from shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
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
from deformconv.ops.window import axes, count, integers, n_of, paddings, resolved
from deformconv.sampling.rule import check_boundary

__all__ = ["GRADIENTS", "AggregateSpec", "Gradients", "aggregate_spec", "check_grad_output"]

GRADIENTS = ("input", "offset", "mask")


def _fitting_kernel(channels: int, each: int, D: int) -> str:
    """The kernel of the same size along every axis that an offset's channels fit, as a sentence, if there is one."""
    fitting = next((size for size in range(1, 32) if each * size**D == channels), None)
    return "" if fitting is None else f" {channels} channels fit kernel_size={fitting}."


_WORDS = Words("deform_aggregate", channels="C", kernel="`kernel_size` is", hint=_fitting_kernel)


class Gradients(NamedTuple):
    """One gradient per argument; None where it was not wanted or the argument is absent."""

    input: Any = None
    offset: Any = None
    mask: Any = None


@dataclass(frozen=True)
class AggregateSpec(WindowSpec):
    """A checked call: everything that shapes, dtypes and parameters determine."""

    channels: int

    __hash__ = WindowSpec.__hash__

    @property
    def group_channels(self) -> int:
        """The number of channels of an offset group."""
        return self.channels // self.offset_groups

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.input_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.output_size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arguments that were given."""
        found = {"input": self.input_shape, "offset": self.offset_shape}
        if self.masked:
            found["mask"] = self.mask_shape
        return found

    def with_given(self, names: Collection[str]) -> AggregateSpec:
        """The same call with these optional arguments given as well."""
        return replace(self, masked=self.masked or "mask" in names)


def aggregate_spec(
    input: Operand,
    offset: Operand,
    mask: Operand | None = None,
    *,
    kernel_size: Any = 3,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    offset_groups: Any = None,
    boundary: str = "zeros",
    rank: int | None = None,
    cached: bool = True,
) -> AggregateSpec:
    """Check a call and derive everything that its shapes and parameters determine.

    `rank` is the rank of the function that was called (deform_aggregate2d: 2), or None where the input decides.
    `cached=False` is for torch.compile, which reads this function and warns of caches.
    Raises ShapeError, TypeError (dtypes, numbers that are no integers) or ValueError (devices, boundary).
    """
    D = _rank(input, rank)
    # The parameters become plain integers before the cache sees them: to a hash, 1.0 and True are 1.
    kernel_size = integers("kernel_size", kernel_size, D, 1)
    stride = integers("stride", stride, D, 1)
    padding = paddings(padding, D)
    dilation = integers("dilation", dilation, D, 1)
    offset_groups = None if offset_groups is None else count("offset_groups", offset_groups)
    call = (input, offset, mask, kernel_size, stride, padding, dilation, offset_groups, boundary)
    try:
        if cached:
            return _cached_spec(*call)
    except TypeError:
        pass  # symbolic sizes have no hash; a TypeError of the checks is raised again below
    return _spec(*call)


def check_grad_output(spec: AggregateSpec, grad_output: Operand) -> None:
    """Raise unless `grad_output` has the output's shape and the call's dtype."""
    same_shape(spec, grad_output, f"(N, C, {axes(spec.rank)})")


def _spec(
    input: Operand,
    offset: Operand,
    mask: Operand | None,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: str | tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    offset_groups: int | None,
    boundary: str,
) -> AggregateSpec:
    check_boundary(boundary)
    check_dtypes_and_devices(("input", input), {"offset": offset, "mask": mask})
    check_channels(input)
    batch, channels, *sizes = input.shape
    padding = resolved(padding, kernel_size, stride, dilation)
    output_size = output_size_of(input, kernel_size, stride, padding, dilation, _WORDS)
    spec = AggregateSpec(
        rank=len(stride),
        batch=batch,
        channels=channels,
        offset_groups=offset_groups_of(channels, kernel_size, output_size, offset, mask, offset_groups, _WORDS),
        input_size=tuple(sizes),
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        output_size=output_size,
        padding=padding,
        masked=mask is not None,
        boundary=boundary,
        dtype=input.dtype,
    )
    check_positions(spec, "offset", offset, channels)
    if mask is not None:
        if mask.shape[1] != spec.offset_groups * spec.taps:  # asked first: to compare sizes that are symbols fixes them
            _check_no_weight(spec, mask)
        check_mask_channels(spec, mask)
        check_positions(spec, "mask", mask, channels)
    return spec


_cached_spec = lru_cache(maxsize=1024)(_spec)


def _check_no_weight(spec: AggregateSpec, mask: Operand) -> None:
    """Raise for a weight in the place of the mask, where deformable convolutions take it."""
    if tuple(mask.shape[2:]) == spec.kernel_size != spec.output_size:
        raise ShapeError(
            f"`mask` has shape {shape_of(mask)}, which looks like a weight's; expected a factor for every sample, "
            f"{spec.mask_shape}. Nothing is multiplied by a weight here: deform_conv does that."
        )


def _rank(input: Operand, rank: int | None) -> int:
    if rank is not None:
        check_input_axes(input, rank, None, _WORDS)
        return rank
    given = len(input.shape)
    if not 3 <= given <= 5:
        raise ShapeError(
            f"`input` has {n_of(given, 'axis')}, shape {shape_of(input)}; expected 3, 4 or 5: (N, C) and 1, 2 or 3 spatial "
            "axes."
        )
    return given - 2
