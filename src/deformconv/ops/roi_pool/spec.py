"""Deformable RoI pooling's shapes and parameters: every check and error text, from shapes and dtypes alone.

Only `check_boxes` sees values: which image a box lies in is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from deformconv.errors import ShapeError
from deformconv.ops.operator import Operand, check_dtypes_and_devices
from deformconv.ops.window import by, channels_last, integers, n_of

__all__ = ["CONVENTIONS", "Gradients", "RoiSpec", "check_boxes", "check_list", "check_order", "group_size_of", "roi_spec"]

CONVENTIONS = ("aligned", "unaligned", "rounded")
_WHOSE = ("mmcv, detectron2", "torchvision's detectors", "MXNet, the papers' code")
MOST_SAMPLES = 2**12  # of a bin along an axis


class Gradients(NamedTuple):
    """One gradient per differentiable argument; None where it was not wanted or the argument is absent. Boxes have none."""

    input: Any = None
    boxes: Any = None
    offset: Any = None
    mask: Any = None


@dataclass(frozen=True)
class RoiSpec:
    """A checked call: everything that shapes, dtypes and parameters determine."""

    batch: int
    channels: int  # of the input
    input_size: tuple[int, int]
    boxes: int
    output_size: tuple[int, int]  # bins of a box along its axes
    spatial_scale: float
    sampling_ratio: int  # samples of a bin along an axis; 0 where a box decides
    convention: str
    gamma: float
    group_size: tuple[int, int]  # groups of channels along the axes of a box, each read by some of its bins
    part_size: tuple[int, int]  # the offsets of a class along the axes of a box
    classes: int  # of offsets
    deformed: bool  # whether there are offsets
    masked: bool
    dtype: str

    @property
    def out_channels(self) -> int:
        return self.channels // prod(self.group_size)

    @property
    def class_channels(self) -> int:
        """The output channels that share their offsets."""
        return self.out_channels // self.classes

    @property
    def bins(self) -> int:
        """The number of bins of a box."""
        return prod(self.output_size)

    @property
    def pixels(self) -> int:
        """The number of pixels of one input channel."""
        return prod(self.input_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.input_size)

    @property
    def boxes_shape(self) -> tuple[int, ...]:
        return (self.boxes, 5)

    @property
    def offset_shape(self) -> tuple[int, ...]:
        return (self.boxes, 2 * self.classes, *self.part_size)

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (self.boxes, 1, *self.output_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.boxes, self.out_channels, *self.output_size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arguments that were given."""
        found = {"input": self.input_shape, "boxes": self.boxes_shape}
        if self.deformed:
            found["offset"] = self.offset_shape
        if self.masked:
            found["mask"] = self.mask_shape
        return found

    def with_given(self, names: Collection[str]) -> RoiSpec:
        """The same call with these optional arguments given as well."""
        return replace(self, deformed=self.deformed or "offset" in names, masked=self.masked or "mask" in names)


def roi_spec(
    input: Operand,
    boxes: Operand,
    offset: Operand | None = None,
    mask: Operand | None = None,
    *,
    output_size: Any = 7,
    spatial_scale: Any = 1.0,
    sampling_ratio: Any = 2,
    convention: Any = "aligned",
    gamma: Any = 0.1,
    group_size: Any = 1,
    part_size: Any = None,
    cached: bool = True,
) -> RoiSpec:
    """Check a call and derive everything that its shapes and parameters determine.

    Raises ShapeError, TypeError (dtypes, parameters of another type) or ValueError (devices, convention, factors).
    """
    # The parameters become plain numbers before the cache sees them: to a hash, 1.0 and True are 1.
    output_size = integers("output_size", output_size, 2, 1)
    group_size = integers("group_size", group_size, 2, 1)
    part_size = output_size if part_size is None else integers("part_size", part_size, 2, 1)
    spatial_scale, gamma = _real("spatial_scale", spatial_scale), _real("gamma", gamma)
    call = (
        input, boxes, offset, mask, output_size, spatial_scale, _samples(sampling_ratio), convention, gamma, group_size,
        part_size,
    )  # fmt: skip
    try:
        if cached:
            return _cached_spec(*call)
    except TypeError:
        pass  # symbolic sizes have no hash; a TypeError of the checks is raised again below
    return _spec(*call)


def group_size_of(position_sensitive: Any, output_size: Any) -> Any:
    """The `group_size` of a call that is position-sensitive or not."""
    if not isinstance(position_sensitive, (bool, np.bool_)):
        raise TypeError(
            f"`position_sensitive` is {position_sensitive!r}; expected True, where each bin has channels of its own, or False."
        )
    return output_size if position_sensitive else 1


def check_order(offset: Any) -> None:
    """Raise where `output_size` stands in the place of `offset`, as in a call of torchvision's roi_align."""
    sizes = offset if isinstance(offset, (tuple, list)) else (offset,)
    if sizes and all(isinstance(size, (int, np.integer)) for size in sizes):
        raise TypeError(
            f"`offset` is {offset!r}; expected an array or None. What is the third argument of roi_align is the fifth one "
            f"here: pass output_size={offset!r}, spatial_scale=... and sampling_ratio=... by name."
        )


def check_list(boxes: Any, kind: Any, name: str, images: int | None = None) -> None:
    """Raise unless this is a list of arrays of a type and its name, (r, 4) for each image; `images` is how many there are."""
    if not boxes:
        raise ShapeError("`boxes` is an empty list; expected an array (r, 4) for each image, or one array (R, 5).")
    for image, array in enumerate(boxes):
        if not isinstance(array, kind):
            found = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
            raise TypeError(f"`boxes[{image}]` is a {found}; expected a {name} (r, 4) for each image.")
        shape = tuple(array.shape)
        if len(shape) != 2 or shape[1] != 4:
            raise ShapeError(
                f"`boxes[{image}]` has shape {shape}; expected (r, 4): a row (x1, y1, x2, y2) for each box of an image."
            )
    if images is not None and len(boxes) != images:
        raise ShapeError(
            f"`boxes` is a list of {len(boxes)}; expected an array (r, 4) for each of the {n_of(images, 'image')} of `input`, "
            "with r = 0 where it has no box."
        )


def check_boxes(spec: RoiSpec, boxes: Any) -> None:
    """Raise unless the first column of `boxes`, a NumPy array, has numbers of images."""
    images = boxes[:, 0]
    wrong = ~((images >= 0) & (images < spec.batch) & (np.floor(images) == images))
    if not wrong.any():
        return
    row = int(wrong.argmax())
    expected = (
        f"0 to {spec.batch - 1}, as `input` has a batch of {spec.batch}" if spec.batch else "none, as `input` has no image"
    )
    text = f"`boxes` has {images[row]:g} in row {row}, column 0; expected the number of the box's image: {expected}."
    if (boxes[:, 4] == images).all() or wrong.mean() > 0.5:
        text += " The columns are (image, x1, y1, x2, y2)."
    raise ValueError(text)


def _spec(
    input: Operand,
    boxes: Operand,
    offset: Operand | None,
    mask: Operand | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    convention: str,
    gamma: float,
    group_size: tuple[int, int],
    part_size: tuple[int, int],
) -> RoiSpec:
    if convention not in CONVENTIONS:
        known = ", ".join(f"{name!r} ({who})" for name, who in zip(CONVENTIONS, _WHOSE, strict=True))
        raise ValueError(f"`convention` is {convention!r}; expected one of {known}.")
    if convention == "rounded" and sampling_ratio == 0:
        raise ShapeError(
            '`sampling_ratio` is 0, which lets a box decide, and convention="rounded" does not know that; expected at least 1.'
        )
    if not 0 < spatial_scale < math.inf:
        raise ValueError(
            f"`spatial_scale` is {spatial_scale}; expected a positive number: pixels of `input` for a pixel of the boxes."
        )
    if not abs(gamma) < math.inf:
        raise ValueError(f"`gamma` is {gamma}; expected a finite number, by which offsets are multiplied.")
    check_dtypes_and_devices(("input", input), {"boxes": boxes, "offset": offset, "mask": mask})
    if len(input.shape) != 4:
        text = f"`input` has {n_of(len(input.shape), 'axis')}, shape {_shape(input)}; expected 4: (N, C, height, width)."
        raise ShapeError(text + (" For one image pass `input[None]`." if len(input.shape) == 3 else ""))
    batch, channels, *size = input.shape
    if channels < 1 or min(size) < 1:
        raise ShapeError(f"`input` has shape {_shape(input)}; expected at least one channel and one pixel.")
    _check_boxes_shape(boxes)
    if channels % prod(group_size):
        text = (
            f"`input` has {n_of(channels, 'channel')}, shape {_shape(input)}; position-sensitive pooling takes a multiple of "
            f"{by(group_size)} = {prod(group_size)}."
        )
        raise ShapeError(text + (channels_last("input") if size[-1] % prod(group_size) == 0 else ""))
    spec = RoiSpec(
        batch=batch,
        channels=channels,
        input_size=(size[0], size[1]),
        boxes=boxes.shape[0],
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        convention=convention,
        gamma=gamma,
        group_size=group_size,
        part_size=part_size,
        classes=1,
        deformed=offset is not None,
        masked=mask is not None,
        dtype=input.dtype,
    )
    if offset is not None:
        spec = replace(spec, classes=_classes(spec, offset))
    if mask is not None:
        _check_mask(spec, mask)
    return spec


_cached_spec = lru_cache(maxsize=1024)(_spec)


def _check_boxes_shape(boxes: Operand) -> None:
    if len(boxes.shape) == 2 and boxes.shape[1] == 5:
        return
    text = f"`boxes` has shape {_shape(boxes)}; expected (R, 5): a row (image, x1, y1, x2, y2) for each of R boxes."
    if len(boxes.shape) == 2 and boxes.shape[1] == 4:
        text += " For boxes of one image put a column of zeros in front."
    if len(boxes.shape) == 3 and boxes.shape[2] == 4:
        text += " For boxes (N, r, 4) of N images pass `list(boxes)`."
    raise ShapeError(text)


def _classes(spec: RoiSpec, offset: Operand) -> int:
    """The classes of offsets, from the channels of `offset`."""
    _check_rows("offset", offset, spec, "(R, 2, *part_size)", spec.part_size, "part_size")
    classes, rest = offset.shape[1] // 2, offset.shape[1] % 2  # a compiler reads no divmod
    if rest or classes < 1 or spec.out_channels % classes:
        text = f"`offset` has {n_of(offset.shape[1], 'channel')}; expected 2, x before y"
        text += f", or 2 for each of several classes, which share the {n_of(spec.out_channels, 'channel')} of the output."
        if offset.shape[1] == 3:
            text += " 3 = 2 offsets + 1 mask: pass the last one as `mask`."
        if offset.shape[1] == 1:
            text += " One number for each bin is a mask."
        raise ShapeError(text)
    return classes


def _check_mask(spec: RoiSpec, mask: Operand) -> None:
    _check_rows("mask", mask, spec, "(R, 1, *output_size)", spec.output_size, "output_size")
    if mask.shape[1] != 1:
        text = f"`mask` has {n_of(mask.shape[1], 'channel')}; expected 1: one factor for each bin."
        if mask.shape[1] == 2:
            text += " Two numbers for each bin are offsets."
        raise ShapeError(text)


def _check_rows(name: str, operand: Operand, spec: RoiSpec, form: str, size: tuple[int, int], of: str) -> None:
    """Check the number of boxes and the bins of `offset` or `mask`."""
    if len(operand.shape) != 4:
        text = f"`{name}` has {n_of(len(operand.shape), 'axis')}, shape {_shape(operand)}; expected 4: {form}."
        if len(operand.shape) == 2 and operand.shape[1] % prod(size) == 0:
            planes = operand.shape[1] // prod(size)
            text += f" If these are planes one after the other, pass `{name}.reshape(-1, {planes}, {size[0]}, {size[1]})`."
        raise ShapeError(text)
    rows = operand.shape[0]
    if rows != spec.boxes:
        text = f"`{name}` has {n_of(rows, 'row')}; expected one for each box, {spec.boxes}."
        raise ShapeError(text + (" There is one for each image." if rows == spec.batch else ""))
    if tuple(operand.shape[2:]) != size:
        raise ShapeError(
            f"`{name}` has {by(tuple(operand.shape[2:]))} bins, shape {_shape(operand)}; expected {by(size)}, the {of}."
        )


def _samples(sampling_ratio: Any) -> int:
    if sampling_ratio == -1 and not isinstance(sampling_ratio, float):
        sampling_ratio = 0  # torchvision's
    if isinstance(sampling_ratio, (tuple, list)):
        raise ShapeError(f"`sampling_ratio` is {sampling_ratio!r}; expected one integer, for both axes of a bin.")
    number = integers("sampling_ratio", sampling_ratio, 1, 0)[0]
    if number > MOST_SAMPLES:
        raise ShapeError(f"`sampling_ratio` is {number}; expected at most {MOST_SAMPLES} samples along an axis of a bin.")
    return number


def _real(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, (bool, str)) or value is None:
        raise TypeError(f"`{name}` is {value!r}; expected a number.")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` is {value!r}; expected a number.") from None


def _shape(operand: Operand) -> tuple[int, ...]:
    return tuple(operand.shape)
