"""What was recorded of a forward pass: the calls of its deformable layers, and where in the image their maps lie."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deformconv.ops.window import n_of
from deformconv.plots.attending import AttentionEvent
from deformconv.plots.calls import AttentionCall, Call, attention_table, chosen, table
from deformconv.plots.geometry import Geometry, Survey, of_input, of_output, survey, through_window
from deformconv.plots.inputs import Inputs
from deformconv.plots.observe import Event

__all__ = ["AttentionCall", "Call", "Trace"]


class Trace:
    """What `record` has recorded. `trace[name]` is a layer's last call, `trace[name, index]` the last with that index.

    Of layers of deformable attention `trace.attention(name)` and `trace.attention(name, index)` are that.

    Attributes:
        calls: every Call, in order.
        attentions: every AttentionCall, in order.
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
        self.model, self.calls, self.attentions, self._kinds = model, list[Call](), list[AttentionCall](), kinds
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
        if name in self.attention_layers:
            raise self._attends(name)
        found = [call for call in self.calls if call.layer == name]
        if not found:
            raise self._unknown(name)
        return chosen(found, name, index)

    def attention(self, layer: str, index: int | None = None) -> AttentionCall:
        """A layer of attention's last call, or the last with that index."""
        found = [call for call in self.attentions if call.layer == layer]
        if not found:
            self._rank()
            names = ", ".join(map(repr, self.attention_layers)) or "none"
            hint = " It has offsets: trace[name] is its call." if layer in self.layers else ""
            raise ValueError(
                f"no attention {layer!r} was recorded; the layers of attention that were called are {names}.{hint}"
            )
        return chosen(found, layer, index)

    def __repr__(self) -> str:
        if not self.calls and not self.attentions:
            return "Trace: nothing was recorded yet"
        forwards = [call.forward for call in self.calls] + [call.forward for call in self.attentions]
        passes = 1 + max(forwards)
        lines = [f"Trace of {passes} forward pass{'es' * (passes > 1)}, {n_of(len(forwards), 'call')}"]
        return "\n".join([*lines, *table(self.calls), *attention_table(self.attentions)])

    @property
    def layers(self) -> list[str]:
        """The names of the layers that were called, in order of their first call; those of attention are not among them."""
        return list(dict.fromkeys(call.layer for call in self.calls))

    @property
    def attention_layers(self) -> list[str]:
        """The names of the layers of attention that were called, in order of their first call."""
        return list(dict.fromkeys(call.layer for call in self.attentions))

    @property
    def inputs(self) -> Inputs:
        """What the model was called with the last time."""
        rank = self._rank()
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
        if layer in self.attention_layers:
            raise self._attends(layer)
        if layer in self.layers:
            return through_window(self.geometry(layer, index), self[layer, index])
        return of_output(self, self._surveyed(), layer, index)

    def output_size(self, layer: str, index: int = 0) -> tuple[int, ...]:
        """The size *O of a layer's output in cells; any module that gives one tensor (N, C, *O) is a layer here."""
        if layer in self.layers:
            return self[layer, index].output_size
        self.output_geometry(layer, index)
        return self._surveyed().outputs[layer, index][1][-self._rank() :]

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

    def _rank(self) -> int:
        """The number of the picture's spatial axes."""
        if not self.calls and not self.attentions:
            raise ValueError(
                "nothing was recorded: call the model, model(x), within `with deformconv.plots.record(model) as trace:`."
            )
        return self.calls[0].D if self.calls else 2  # attention's levels are maps

    def _attends(self, name: str) -> ValueError:
        return ValueError(
            f"layer {name!r} is deformable attention: it samples for queries, at locations that no window has, so that it has "
            f"no units and no offsets to show. Expected query_points(trace, {name!r}), which has its points, or "
            f"trace.attention({name!r}), its locations and weights."
        )

    def _unknown(self, name: str) -> ValueError:
        self._rank()
        names = ", ".join(map(repr, self.layers)) or "none, but for attention"
        return ValueError(f"no deformable layer {name!r} was recorded; the layers that were called are {names}.")

    def _surveyed(self) -> Survey:
        if self._survey is None:
            self._survey = survey(self.model, self.inputs, self._rank())
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
        offset, mask = _copied(event.offset), _copied(event.mask)
        assert offset is not None
        with self._lock:
            index, forward = self._place(event.name)
            self.calls.append(
                Call(
                    event.name, index, forward, self._kinds[event.name],
                    tuple(event.input.shape[-rank:]), tuple(event.output.shape[-rank:]),
                    tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation), tuple(layer._pairs),
                    offset.shape[1] // (prod(layer.kernel_size) * rank), offset, mask, layer.padding_mode,
                )
            )  # fmt: skip

    def add_attention(self, event: AttentionEvent) -> None:
        """Take note of a call of attention. `record` calls it."""
        copies = [_copied(tensor) for tensor in (event.locations, event.weights, event.reference)]
        with self._lock:
            index, forward = self._place(event.name)
            kind, levels = self._kinds[event.name], event.levels
            self.attentions.append(AttentionCall(event.name, index, forward, kind, levels, *copies))  # type: ignore[arg-type]

    def _place(self, name: str) -> tuple[int, int]:
        """Which of a layer's calls this is within the forward pass, counted in this thread, and which pass it is."""
        forward = getattr(self._current, "number", max(self._passes - 1, 0))
        counts = vars(self._current).setdefault("counts", {})
        index = counts[forward, name] = counts.get((forward, name), -1) + 1
        return index, forward


def _copied(tensor: Tensor | None) -> Tensor | None:
    with torch.inference_mode(False), torch.no_grad():
        return None if tensor is None else tensor.detach().clone()


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
