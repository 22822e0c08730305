"""What was recorded of a forward pass: the calls of its deformable layers, and where in the image their maps lie."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deformconv.ops.window import n_of
from deformconv.plots.geometry import Geometry, Survey, of_input, of_output, survey, through_window
from deformconv.plots.inputs import Inputs
from deformconv.plots.observe import Event

__all__ = ["Call", "Trace"]


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded call of a deformable layer. Axes go depth, height, width.

    Attributes:
        layer: the layer's name in the model, "" if it is the model.
        index: which of the layer's calls within one forward pass of the model, from 0; counted in each thread by itself.
        forward: which forward pass of the model within the `with` block, from 0.
        kind: whose layer it is: "deformconv", "torchvision", "kornia" or "mmcv".
        input_size, output_size: of the maps, in cells.
        kernel_size, stride, dilation: one number for each axis.
        padding: (before, after) for each axis, in input pixels.
        offset_groups: how many groups of channels have offsets of their own.
        offset: (N, offset_groups*K*D, *O), input pixels of the layer, a copy without a graph.
        mask: (N, offset_groups*K, *O), or None for v1.
        padding_mode: what the input is padded with: "zeros", "reflect", "replicate" or "circular".
    """

    layer: str
    index: int
    forward: int
    kind: str
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    offset_groups: int
    offset: Tensor = field(repr=False)
    mask: Tensor | None = field(repr=False)
    padding_mode: str = "zeros"

    @property
    def D(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel_size)

    @property
    def K(self) -> int:
        """The number of taps of the kernel."""
        return prod(self.kernel_size)


class Trace:
    """What `record` has recorded. `trace[name]` is a layer's last call, `trace[name, index]` the last with that index.

    Attributes:
        calls: every Call, in order.
        model: the model.

    Example:
        >>> import torch
        >>> from deformconv.plots import record
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(torch.nn.MaxPool2d(2), DeformConv2d(3, 8, 3, stride=2, padding=1))
        >>> with record(net) as trace:
        ...     y = net(torch.rand(1, 3, 32, 48))
        >>> trace
        Trace of 1 forward pass, 1 call
        layer  call  input  output  kernel  groups  largest offset  mean mask
        1      0     16x24  8x12    3x3     1       0 px            1.000
        >>> trace.output_geometry("1").to_image((0, 0)).tolist(), trace.unit("1", at=(9, 20))
        ([0.5, 0.5], (2, 5))
    """

    def __init__(self, model: nn.Module, kinds: dict[str, str]) -> None:
        self.model, self.calls, self._kinds = model, list[Call](), kinds
        self._inputs: Inputs | None = None
        self._survey: Survey | None = None
        self._lock = threading.Lock()
        self._passes = 0
        self._current = threading.local()

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def __getitem__(self, key: str | tuple[str, int]) -> Call:
        name, index = key if isinstance(key, tuple) else (key, None)
        found = [call for call in self.calls if call.layer == name]
        if not found:
            raise self._unknown(name)
        chosen = [call for call in found if index in (None, call.index)]
        if not chosen:
            times = n_of(max(call.index for call in found) + 1, "time")
            raise ValueError(f"layer {name!r} was called {times} in a forward pass; there is no call {index} (from 0).")
        return chosen[-1]

    def __repr__(self) -> str:
        if not self.calls:
            return "Trace: nothing was recorded yet"
        rows: list[tuple[str, ...]] = [("layer", "call", "input", "output", "kernel", "groups", "largest offset", "mean mask")]
        for call in {(call.layer, call.index): call for call in self.calls}.values():
            by = ["x".join(map(str, sizes)) for sizes in (call.input_size, call.output_size, call.kernel_size)]
            largest = float(call.offset.abs().max()) if call.offset.numel() else 0.0
            mean = "-" if call.mask is None else f"{float(call.mask.float().mean()):.3f}"
            rows.append((call.layer or "(model)", str(call.index), *by, str(call.offset_groups), f"{largest:.3g} px", mean))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        passes = 1 + max(call.forward for call in self.calls)
        return "\n".join([f"Trace of {passes} forward pass{'es' * (passes > 1)}, {n_of(len(self), 'call')}", *lines])

    @property
    def layers(self) -> list[str]:
        """The names of the layers that were called, in order of their first call."""
        return list(dict.fromkeys(call.layer for call in self.calls))

    @property
    def inputs(self) -> Inputs:
        """What the model was called with the last time."""
        rank = self._first().D
        if self._inputs is None:
            raise ValueError(
                "the model itself was not called while it was recorded, only layers of it; expected model(x) within "
                "`with deformconv.plots.record(model) as trace:`."
            )
        self._inputs.find(rank)
        return self._inputs

    @property
    def image(self) -> Tensor:
        """The picture that the model got in its last forward pass, (N, C, *S); of a list of pictures the first, N = 1."""
        return self.inputs.batch()

    @property
    def size(self) -> tuple[int, ...]:
        """The picture's size *S, in pixels."""
        return tuple(self.image.shape[2:])

    def geometry(self, layer: str, index: int = 0) -> Geometry:
        """Where the cells of a deformable layer's input map lie in the image.

        It is found at the first question, for all layers, by another forward pass in evaluation mode.
        """
        self[layer, index]
        return of_input(self._surveyed(), layer, index)

    def output_geometry(self, layer: str, index: int = 0) -> Geometry:
        """Where the units of a layer's output lie in the image; any module that gives one tensor (N, C, *O) is a layer here."""
        if layer in self.layers:
            return through_window(self.geometry(layer, index), self[layer, index])
        return of_output(self, self._surveyed(), layer, index)

    def output_size(self, layer: str, index: int = 0) -> tuple[int, ...]:
        """The size *O of a layer's output in cells; any module that gives one tensor (N, C, *O) is a layer here."""
        if layer in self.layers:
            return self[layer, index].output_size
        self.output_geometry(layer, index)
        return self._surveyed().outputs[layer, index][1][-self._first().D :]

    def unit(
        self, layer: str, at: Sequence[float] | None = None, unit: Sequence[int] | None = None, index: int = 0
    ) -> tuple[int, ...]:
        """The output unit of a layer that is meant: the nearest to an image pixel `at`, or the cell `unit` itself.

        Args:
            layer: a layer's name.
            at: a position in the image, pixels, (y, x); between units the one further down and right is the nearest.
            unit: an output cell, (row, column). One of the two is passed; or none, for the unit nearest to the image's middle.
            index: which call of the layer.

        Returns:
            The cell.

        Raises:
            ValueError: there is no such layer, the position is outside the image, the unit outside the map, or both are passed.
        """
        size = self.output_size(layer, index)
        if at is not None and unit is not None:
            raise ValueError("`at` and `unit` were both passed; expected one of them, or none for the image's middle.")
        if unit is not None:
            cell = _numbers("unit", unit, len(size))
            if any(number != int(number) for number in cell):
                raise ValueError(f"`unit` is {_shown(unit)}; expected whole numbers, the cell's. `at` takes image pixels.")
            if any(not 0 <= number < n for number, n in zip(cell, size, strict=True)):
                raise ValueError(f"`unit` is {_shown(unit)}; layer {layer!r} has an output of {_by(size)} units, from 0.")
            return tuple(int(number) for number in cell)
        if at is None:
            position = [(n - 1) / 2 for n in self.size]
        else:
            position = _numbers("at", at, len(size))
            if any(not -0.5 <= pixel <= n - 0.5 for pixel, n in zip(position, self.size, strict=True)):
                raise ValueError(
                    f"`at` is {_shown(at)}, outside the image of {_by(self.size)} pixels; its first pixel is at 0."
                )
        cells = np.floor(self.output_geometry(layer, index).to_cells(position) + 0.5)
        return tuple(int(min(max(cell, 0), n - 1)) for cell, n in zip(cells, size, strict=True))

    def before(self, layer: str, index: int = 0) -> list[tuple[str, int]]:
        """The deformable calls that a call depends on in its forward pass: the latest, the latest before that, and so on."""
        self.geometry(layer, index)
        return list(self._surveyed().before[layer, index])

    def _first(self) -> Call:
        if not self.calls:
            raise ValueError(
                "nothing was recorded: call the model, model(x), within `with deformconv.plots.record(model) as trace:`."
            )
        return self.calls[0]

    def _unknown(self, name: str) -> ValueError:
        self._first()
        names = ", ".join(map(repr, self.layers))
        return ValueError(f"no deformable layer {name!r} was recorded; the layers that were called are {names}.")

    def _surveyed(self) -> Survey:
        if self._survey is None:
            self._survey = survey(self.model, self.inputs, self._first().D)
        return self._survey

    def begin(self, args: Any, kwargs: Any) -> None:
        """Take note that a forward pass of the model begins. `record` calls it."""
        with self._lock:
            self._current.number = self._passes
            self._passes += 1
            self._inputs, self._survey = Inputs(args, kwargs), None

    def add(self, event: Event) -> None:
        """Take note of a call. `record` calls it."""
        layer, rank = event.layer, len(event.layer.kernel_size)
        with torch.inference_mode(False), torch.no_grad():
            offset, mask = (None if t is None else t.detach().clone() for t in (event.offset, event.mask))
        assert offset is not None
        with self._lock:
            forward = getattr(self._current, "number", max(self._passes - 1, 0))
            counts = vars(self._current).setdefault("counts", {})  # this thread's
            index = counts[forward, event.name] = counts.get((forward, event.name), -1) + 1
            self.calls.append(
                Call(
                    event.name, index, forward, self._kinds[event.name],
                    tuple(event.input.shape[-rank:]), tuple(event.output.shape[-rank:]),
                    tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation), tuple(layer._pairs),
                    offset.shape[1] // (prod(layer.kernel_size) * rank), offset, mask, layer.padding_mode,
                )
            )  # fmt: skip


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _numbers(name: str, value: Any, rank: int) -> list[float]:
    """A position as that many numbers."""
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != rank:
        order = ("(x,)", "(y, x)", "(z, y, x)")[rank - 1] if name == "at" else ("(x,)", "(row, column)", "(z, y, x)")[rank - 1]
        raise ValueError(f"`{name}` is {_shown(value)}; expected {rank} numbers, {order}.")
    return numbers


def _shown(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, (list, tuple)) else str(value)
