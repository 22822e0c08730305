"""A recorded forward pass that no model made, and the rule by which a page's points are checked."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np

__all__ = ["FakeTrace", "field", "picture", "points_by_recursion", "small_trace"]

SIZE = (96, 128)


class FakeTrace:
    """What a page asks of a trace."""

    def __init__(self, calls: list[SimpleNamespace], size: tuple[int, int]):
        self.calls, self.size = calls, size

    def geometry(self, layer: str, index: int = 0) -> SimpleNamespace:
        return self[layer, index].geometry

    def before(self, layer: str, index: int = 0) -> list[tuple[str, int]]:
        number = self.calls.index(self[layer, index])
        return [(call.layer, call.index) for call in reversed(self.calls[:number])]

    def __getitem__(self, key: tuple[str, int]) -> SimpleNamespace:
        return next(call for call in self.calls if (call.layer, call.index) == key)


def call(
    layer: str, random: np.random.Generator, *, input_size: tuple[int, int], output_size: tuple[int, int], step: float,
    origin: float = 0.5, stride: int = 1, dilation: int = 1, groups: int = 1, amount: float = 1.5, masked: bool = True,
    index: int = 0, kernel: tuple[int, int] = (3, 3),
) -> SimpleNamespace:  # fmt: skip
    """A call of a layer with random offsets, `amount` input pixels large."""
    K = kernel[0] * kernel[1]
    return SimpleNamespace(
        layer=layer, index=index, forward=0, kind="deformconv", input_size=input_size, output_size=output_size,
        kernel_size=kernel, stride=(stride, stride), dilation=(dilation, dilation),
        padding=tuple((dilation * (side // 2),) * 2 for side in kernel), offset_groups=groups, K=K, D=2,
        offset=random.normal(0, amount, (1, groups * K * 2, *output_size)).astype(np.float32),
        mask=random.uniform(0, 2, (1, groups * K, *output_size)).astype(np.float32) if masked else None,
        padding_mode="zeros",
        geometry=SimpleNamespace(origin=(origin, origin), step=(step, step), source="graph", difference=None),
    )  # fmt: skip


def small_trace(seed: int = 0) -> FakeTrace:
    """Three layers: a plain one, one with stride 2 and no mask, one with dilation 2; the last two have two offset groups."""
    random = np.random.default_rng(seed)
    calls = [
        call("stem", random, input_size=(48, 64), output_size=(48, 64), step=2.0),
        call("body.down", random, input_size=(48, 64), output_size=(24, 32), step=2.0, stride=2, groups=2, masked=False),
        call("body.wide", random, input_size=(24, 32), output_size=(24, 32), step=4.0, dilation=2, groups=2),
    ]
    return FakeTrace(calls, SIZE)


def picture(size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture in colour without a straight edge."""
    y, x = np.indices(size)
    return np.stack([np.sin(x / 9) * 0.4 + 0.5, np.cos(y / 7) * 0.4 + 0.5, np.sin((x + y) / 15) * 0.4 + 0.5], axis=-1)


def field(unit: tuple[int, int], at: tuple[float, float], size: tuple[int, int] = SIZE, width: float = 8.0) -> SimpleNamespace:
    """A receptive field like a Gaussian."""
    y, x = np.indices(size)
    values = np.exp(-((y - at[0]) ** 2 + (x - at[1]) ** 2) / (2 * width**2))
    return SimpleNamespace(unit=unit, field=values, radius=2.5 * width)


def points_by_recursion(
    trace: FakeTrace, layer: str, unit: tuple[float, ...], *, layers: int = 1, scale: float = 1.0, group: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Image positions (M, 2) and weights (M,) of all paths from a unit, one by one, offset groups and taps in their order."""
    found: list[tuple[float, float, float]] = []
    _follow(trace, trace[layer, 0], tuple(map(float, unit)), 1.0, layers, scale, group, found)
    table = np.array(found).reshape(-1, 3)
    return table[:, :2], table[:, 2]


def _follow(
    trace: FakeTrace, call: Any, cell: tuple[float, ...], weight: float, layers: int, scale: float, group: int | None,
    found: list[tuple[float, float, float]],
) -> None:  # fmt: skip
    near = _neighbours(cell, call.output_size)
    share = sum(part for _, part in near)
    if share == 0:
        return
    offset = call.offset[0].reshape(call.offset_groups, call.K, 2, *call.output_size).astype(float)
    mask = None if call.mask is None else call.mask[0].reshape(call.offset_groups, call.K, *call.output_size).astype(float)
    for g, k in product(range(call.offset_groups) if group is None else [group], range(call.K)):
        sample = []
        for axis in range(2):
            base = min(max(cell[axis], 0), call.output_size[axis] - 1) * call.stride[axis] - call.padding[axis][0]
            tap = np.unravel_index(k, call.kernel_size)[axis] * call.dilation[axis]
            moved = sum(part / share * offset[(g, k, axis, *place)] for place, part in near)
            sample.append(base + tap + scale * moved)
        amount = sum(part * (1 if mask is None else mask[(g, k, *place)]) for place, part in near)
        at = [origin + step * value for origin, step, value in zip(*_lies(call), sample, strict=True)]
        if layers == 1:
            inside = sum(part for _, part in _neighbours(*_read(call, sample)))
            found.append((at[0], at[1], weight * amount * inside))
            continue
        before = trace[trace.before(call.layer)[0]]
        origin, step = _lies(before)
        middle = [
            origin[axis] + step[axis] * (before.dilation[axis] * (before.kernel_size[axis] - 1) / 2 - before.padding[axis][0])
            for axis in range(2)
        ]
        unit = tuple((at[axis] - middle[axis]) / (step[axis] * before.stride[axis]) for axis in range(2))
        _follow(trace, before, unit, weight * amount, layers - 1, scale, None, found)


def _read(call: Any, sample: list[float]) -> tuple[list[float], list[int]]:
    """A sample's cell of what is read, and its size: the map, with its padding if that is not of zeros."""
    if call.padding_mode == "zeros":
        return sample, call.input_size
    cell = [value + before for value, (before, _) in zip(sample, call.padding, strict=True)]
    return cell, [size + sum(pair) for size, pair in zip(call.input_size, call.padding, strict=True)]


def _lies(call: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return call.geometry.origin, call.geometry.step


def _neighbours(cell: Any, size: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
    """The cells around a position that are on the map, and their weights."""
    near = []
    for corner in product((0, 1), repeat=2):
        place = tuple(int(np.floor(value)) + step for value, step in zip(cell, corner, strict=True))
        part = float(np.prod([1 - abs(value - where) for value, where in zip(cell, place, strict=True)]))
        if part > 0 and all(0 <= where < length for where, length in zip(place, size, strict=True)):
            near.append((place, part))
    return near
