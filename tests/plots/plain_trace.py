"""A trace of calls made by hand: what `record` would have seen, with offsets and geometry that a test has set."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace

import numpy as np
import torch

from deformconv.ops.window import positions_along


@dataclass(frozen=True)
class Geometry:
    """A map's cell i lies at image pixel origin + step*i."""

    origin: tuple[float, ...]
    step: tuple[float, ...]

    def to_image(self, cells):
        return np.asarray(cells) * self.step + self.origin

    def to_cells(self, pixels):
        return (np.asarray(pixels) - self.origin) / self.step


def call(layer, input_size, kernel_size, stride, padding, dilation, offset_groups=1, batch=1, modulated=True, random=None):
    """A layer's call, with offsets of about a pixel, or 0 and masks 1 without random numbers."""
    D, K = len(kernel_size), prod(kernel_size)
    output_size = tuple(map(positions_along, input_size, kernel_size, stride, padding, dilation))
    shape = (batch, offset_groups * K * D, *output_size)
    mask_shape = (batch, offset_groups * K, *output_size)
    offset = torch.zeros(shape) if random is None else torch.from_numpy(random.normal(scale=0.9, size=shape))
    mask = torch.ones(mask_shape) if random is None else torch.from_numpy(random.uniform(0, 2, mask_shape))
    return SimpleNamespace(
        layer=layer, index=0, forward=0, kind="deformconv", input_size=input_size, output_size=output_size,
        kernel_size=kernel_size, stride=stride, dilation=dilation, padding=padding, offset_groups=offset_groups,
        offset=offset, mask=mask if modulated else None, D=D, K=K, padding_mode="zeros",
    )  # fmt: skip


@dataclass
class Trace:
    """Calls in the order of the net, each of which sees the ones before it; `geometries` are of their inputs."""

    calls: list
    geometries: list
    names: list = field(init=False)
    attentions: tuple = ()

    def __post_init__(self):
        self.names = [call.layer for call in self.calls]

    @property
    def layers(self):
        return self.names

    def __getitem__(self, key):
        return self.calls[self.names.index(key if isinstance(key, str) else key[0])]

    def before(self, layer, index=0):
        return [(name, 0) for name in reversed(self.names[: self.names.index(layer)])]

    def geometry(self, layer, index=0):
        return self.geometries[self.names.index(layer)]

    def output_geometry(self, layer, index=0):
        return output_geometry(self[layer], self.geometry(layer))

    def unit(self, layer, at=None, unit=None, index=0):
        size = self[layer].output_size
        if unit is None:
            unit = [(n - 1) / 2 for n in size] if at is None else self.output_geometry(layer).to_cells(at)
        return tuple(int(np.clip(round(float(u)), 0, n - 1)) for u, n in zip(unit, size, strict=True))


def output_geometry(call, geometry):
    """A unit is where the middle of its undeformed window is."""
    middle = [d * (k - 1) / 2 - before for d, k, (before, _) in zip(call.dilation, call.kernel_size, call.padding, strict=True)]
    return Geometry(tuple(geometry.to_image(middle).tolist()), tuple((np.array(geometry.step) * call.stride).tolist()))


def plain(size, *layers, modulated=True):
    """Layers of 3x3 taps with padding 1 on each other, named "0", "1", ..., with offsets 0 and masks 1."""
    D = len(size)
    made, geometries, geometry = [], [], Geometry((0.0,) * D, (1.0,) * D)
    for name, stride in enumerate(layers):
        geometries.append(geometry)
        made.append(call(str(name), size, (3,) * D, (stride,) * D, ((1, 1),) * D, (1,) * D, modulated=modulated))
        size, geometry = made[-1].output_size, output_geometry(made[-1], geometry)
    return Trace(made, geometries)
