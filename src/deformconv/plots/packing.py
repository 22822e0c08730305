"""Offsets, masks and receptive fields of one recorded call as a page holds them: integers, packed into text."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from deformconv.plots.fields import outside
from deformconv.plots.stack import sampled_map

__all__ = ["TOLERANCE", "Packing", "quantised"]

Numbers = npt.NDArray[Any]

TOLERANCE = 0.05
"""The most that an offset in the page may be away from the layer's, in image pixels."""
_FIELD_CELLS = 64  # a side, of the part of the image that matters
_FEWEST_POSITIONS = 4


def quantised(offset: npt.ArrayLike, tolerance: float) -> tuple[Numbers, float]:
    """The smallest integers that, times the scale returned with them, are at most `tolerance` away from the offsets.

    Args:
        offset: any shape; a NaN becomes the smallest integer of the dtype, and infinity the largest of 32 bits.
        tolerance: in the offsets' unit.

    Returns:
        int8, int16 or int32, and the scale.

    Example:
        >>> import numpy as np
        >>> integers, scale = quantised(np.array([0.0, 1.3, -40.0]), 0.1)
        >>> integers.dtype.name, abs(integers * scale - [0.0, 1.3, -40.0]).max() <= 0.1
        ('int16', np.True_)
    """
    offset = np.asarray(offset, np.float64)
    scale = 2 * tolerance * (1 - 1e-9)
    most = np.iinfo(np.int32).max
    levels = np.clip(np.round(np.nan_to_num(offset / scale, nan=0.0, posinf=most, neginf=-most)), -most, most)
    largest = np.abs(levels).max(initial=0)
    dtype = next(dtype for dtype in (np.int8, np.int16, np.int32) if largest <= np.iinfo(dtype).max)
    integers = levels.astype(dtype)
    integers[np.isnan(offset)] = np.iinfo(dtype).min
    return integers, scale


@dataclass(frozen=True)
class Packing:
    """One call, and how much of it the page gets."""

    call: Any
    geometry: Any
    fields: list[Any]
    coarse: int = 1
    every: int = 1
    tolerance: float = TOLERANCE

    def entry(self) -> dict[str, Any]:
        """Its part of the document, but for the layers before it."""
        call, K = self.call, int(np.prod(self.call.kernel_size))
        shape = (call.offset_groups, K, 2, *call.output_size)
        before, size = sampled_map(call)
        thin = (..., slice(None, None, self.every), slice(None, None, self.every))
        offset = _array(call.offset)[0].reshape(shape)
        mask = None if call.mask is None else _array(call.mask)[0].reshape(shape[:2] + shape[3:])
        step = [float(value) for value in self.geometry.step]
        return {
            "name": call.layer, "index": call.index, "kernel": _integers(call.kernel_size), "stride": _integers(call.stride),
            "padding": _integers(pair[0] for pair in call.padding), "dilation": _integers(call.dilation),
            "groups": int(call.offset_groups), "input": _integers(call.input_size), "output": _integers(call.output_size),
            "reads": {"before": _integers(before), "size": _integers(size)},
            "origin": [float(value) for value in self.geometry.origin], "step": step,
            "before": [], "every": self.every,
            "offset": _stored(*quantised(offset[thin], self.tolerance / max(map(abs, step)))),
            "mask": None if mask is None else _stored(*_levels(mask[thin])),
            "fields": self._packed_fields(), "statistics": _statistics(call, offset, mask, step),
        }  # fmt: skip

    def _packed_fields(self) -> dict[str, Any] | None:
        """The receptive fields, each cut to where it matters, averaged over squares and relative to its maximum."""
        if not self.fields:
            return None
        whole = [np.nan_to_num(_array(field.field)) for field in self.fields]
        parts = [_part(field) for field in whole]
        side = np.max([[part.stop - part.start for part in pair] for pair in parts], axis=0)  # of the largest part
        step = ceil(max(side) / _FIELD_CELLS) * self.coarse
        first = [[min(part.start, max(size - length, 0)) for part, size, length in zip(pair, field.shape, side, strict=True)]
                 for pair, field in zip(parts, whole, strict=True)]  # fmt: skip
        stack = np.stack(
            [_pooled(field[y : y + side[0], x : x + side[1]], step) for field, (y, x) in zip(whole, first, strict=True)]
        )
        stack /= np.maximum(stack.max(axis=(1, 2), keepdims=True), np.finfo(np.float64).tiny)
        return {
            "units": [_integers(field.unit) for field in self.fields],
            "radius": _finite([float(field.radius) for field in self.fields]),
            "origin": [[y + (step - 1) / 2, x + (step - 1) / 2] for y, x in first], "step": [step] * 2,
            **_stored(np.round(stack * 255).astype(np.uint8), 1.0),
        }  # fmt: skip

    def coarser(self, entry: Mapping[str, Any]) -> Packing | None:
        """The same with half as many rows and columns of what takes more room; None if too few would be left."""
        fields = entry["fields"]
        if fields is not None and len(fields["data"]) > len(entry["offset"]["data"]) / 2 and min(fields["shape"][1:]) > 16:
            return replace(self, coarse=2 * self.coarse)
        if min(entry["offset"]["shape"][3:]) >= 2 * _FEWEST_POSITIONS:
            return replace(self, every=2 * self.every)
        return None


def _array(values: Any) -> Numbers:
    """A tensor or array on any device as float64."""
    if hasattr(values, "detach"):
        values = values.detach().to(device="cpu").double().numpy()
    return np.asarray(values, np.float64)


def _integers(values: Any) -> list[int]:
    return [int(value) for value in values]


def _levels(mask: Numbers) -> tuple[Numbers, float]:
    """Bytes for a mask, signed only where it is: a fraction of its largest value, and 0 where it is no number."""
    finite = np.nan_to_num(mask, nan=0.0, posinf=0.0, neginf=0.0)
    dtype = np.int8 if finite.min(initial=0) < 0 else np.uint8
    scale = float(np.abs(finite).max(initial=0) or 1) / np.iinfo(dtype).max
    return np.round(finite / scale).astype(dtype), scale


def _stored(integers: Numbers, scale: float) -> dict[str, Any]:
    """Integers as the page reads them."""
    little = np.ascontiguousarray(integers).astype(integers.dtype.newbyteorder("<"))
    columns = little.reshape(-1, 1).view(np.uint8).T  # (bytes of an integer, integers)
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(np.ascontiguousarray(columns).tobytes()) + packer.flush()
    text = base64.b64encode(packed).decode()
    return {"data": text, "dtype": integers.dtype.name, "scale": scale, "shape": list(integers.shape)}


def _part(field: Numbers) -> tuple[slice, slice]:
    """The rows and columns in which a field is more than a byte's smallest step."""
    seen = field > field.max(initial=0) / 510
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not rows.size:
        return slice(0, field.shape[0]), slice(0, field.shape[1])
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _pooled(field: Numbers, step: int) -> Numbers:
    """Means over squares; what hangs over the edges counts as 0."""
    field = np.pad(field, [(0, -size % step) for size in field.shape])
    rows, columns = (size // step for size in field.shape)
    return field.reshape(rows, step, columns, step).mean(axis=(1, 3))


def _statistics(call: Any, offset: Numbers, mask: Numbers | None, step: Sequence[float]) -> dict[str, Any]:
    """A layer's numbers in a line: offsets in image pixels."""
    pixels = offset * np.reshape(step, (2, 1, 1))  # (G, K, 2, H, W)
    mean = pixels.mean(axis=(0, 1, 3, 4))
    deviation = np.sqrt(pixels.var(axis=(0, 1, 3, 4)).sum())
    found = {
        "mean": mean.tolist(), "deviation": float(deviation), "largest": float(np.abs(pixels).max(initial=0)),
        "outside": float(outside(call, offset).mean()), "mask_mean": None if mask is None else float(mask.mean()),
    }  # fmt: skip
    return {name: _finite(value) for name, value in found.items()}


def _finite(value: Any) -> Any:
    """None for what JSON cannot say."""
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value if value is None or np.isfinite(value) else None
