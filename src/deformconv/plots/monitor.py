"""A watch on the offsets of a net that is being trained: statistics of every step, and a warning when they explode."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from time import monotonic
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deformconv.ops.window import count
from deformconv.plots.attending import attention_layers
from deformconv.plots.observe import Event, Observation, check_plain, deformable_layers, observe
from deformconv.plots.samples import HISTORY, Lattices, LayerStep, Taken, explosion, of_layers, take
from deformconv.torch import modes, surgery

__all__ = ["OffsetMonitor"]

Write = Callable[[int, dict[str, float]], Any]

# Seconds between two times of writing: code that ran a moment ago is several times faster, so that several quick steps are
# written at once.
PAUSE = 0.1

HELP = (
    "What helps: a tenth of the learning rate for the predictors, deformconv.torch.parameter_groups(model, lr); bounded "
    "offsets, `max_offset` of the layer; clipped gradients, torch.nn.utils.clip_grad_norm_."
)


class OffsetMonitor:
    """Statistics of a net's offsets and masks while it is trained, and one warning when offsets explode.

    It takes in each step, for every deformable layer (this library's and those that `deformconv.convert.replace_layers` knows),
    over the images, positions, taps and offset groups of all its calls, in the layer's input pixels:

    - `mean_height`, `mean_width`: the mean offset along each axis;
    - `deviation`: root mean square distance of the offsets from their mean;
    - `largest`: the largest absolute offset along any axis, which `max_offset` bounds;
    - `outside`: the share of the samples that read nothing of the map, from 0 to 1; some do so without offsets, in the padding;
    - `mask`: the mean of the masks, of layers that have some.

    They are named "offsets/LAYER/largest" and so on. The largest is exact. The others are those of a lattice of positions: 14
    to 27 along each of two axes, in at least 4 images, or all there are. It is shifted from step to step, so that each position
    has its turn.

    Offsets that grow without bounds are the best-known way in which the training of a deformable net fails. One warning in a
    monitor's life says so, with the layer, its numbers and what helps, when offsets are not finite; or their root mean square
    along an axis is above half of the map and the window's span; or their root mean square length is above the window's span
    and ten times its median over the last 100 steps. Such a layer reads little of its map, whatever the loss still does.

    A step is a forward pass of the model in training mode with gradients, unless `steps` says otherwise. Outputs and gradients
    stay the same bit for bit. Nothing waits for a GPU: numbers are written some steps later, as they arrive, and at most every
    tenth of a second; `flush` and `close` write what is left. Weights & Biases drops what comes late: with it alone each step
    is waited for and written at once. The monitor takes 2 to 3 % of a step of training of two layers of 64 channels on two
    images of 56x56 pixels, on two processors, and less in larger nets. A writer's own time comes on top (TensorBoard's: some
    30 microseconds a number, 6 numbers a layer), so that `every=10` is a good beginning for quick steps.

    Args:
        model: the module that is called in training.
        writers: where the numbers go, any of these, several at once; without one the monitor only warns. A TensorBoard
            SummaryWriter (or what has its `add_scalar`); a run of Weights & Biases or the module `wandb`, with `log`; a logger
            of Lightning or the module `mlflow`, with `log_metrics`; a callable `write(step, {name: value})`.
        every: only one step in so many is looked at, 0, `every`, 2*`every`, ...
        steps: what a step is. "forward": a forward pass. An optimizer: what lies between two of its steps, several passes
            where gradients are accumulated. "manual": what lies between two calls of `monitor.step()`.
        first: the number of the first step, for training that goes on.
        prefix: what the names begin with.

    Raises:
        TypeError: `model` is no torch.nn.Module, a writer is none of these, or `first` is no integer.
        ValueError: `model` has no deformable layers, or is compiled or a script; `every` or `steps` is not one of these.

    Example:
        >>> import torch
        >>> from deformconv.plots import OffsetMonitor
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), DeformConv2d(8, 8, 3, padding=1))
        >>> with OffsetMonitor(net, lambda step, values: print(step, values["offsets/1/mask"])):
        ...     for _ in range(2):
        ...         net(torch.rand(2, 3, 16, 16)).sum().backward()
        0 1.0
        1 1.0
    """

    def __init__(
        self,
        model: nn.Module,
        *writers: Any,
        every: int = 1,
        steps: str | torch.optim.Optimizer = "forward",
        first: int = 0,
        prefix: str = "offsets",
    ) -> None:
        _check(model, steps, first)
        self._model, self._writers = model, [_write_of(writer) for writer in writers]
        self._at_once = any(_in_order(writer) for writer in writers)
        self._every, self._prefix, self._number = count("every", every), prefix, first
        self._steps = steps if isinstance(steps, str) else "optimizer"
        self._open = self._steps != "forward"  # whether what layers compute now belongs to a step
        self._passed = False  # whether the model itself was ever called
        self._calls: list[Taken] = []
        self._sent: deque[_Sent] = deque()
        self._next = 0.0  # when to write again
        self._lengths: dict[str, deque[tuple[int, float]]] = {}
        self._said: set[str] = set()
        self._lattices = lru_cache(maxsize=64)(Lattices)
        self._observation: Observation | None = None
        self._attend(True)
        self._handles = _hooks(self, model)
        if isinstance(steps, torch.optim.Optimizer):
            self._handles.append(steps.register_step_post_hook(lambda *_: self._end()))

    def step(self, number: int | None = None) -> None:
        """End a step, where `steps` is "manual"; its number is the one after the last step's unless it is given."""
        if self._steps != "manual":
            raise RuntimeError('this monitor counts steps itself; expected OffsetMonitor(..., steps="manual") before `step()`.')
        if number is not None:
            self._number = number
        self._end()

    def callback(self) -> Any:
        """A callback for Lightning's Trainer, whose steps then are the monitor's, and whose loggers get the numbers as well.

        Example:
            >>> from deformconv.plots import OffsetMonitor
            >>> trainer = lightning.Trainer(callbacks=[OffsetMonitor(net).callback()])  # doctest: +SKIP
        """
        self._steps, self._open = "manual", True
        return _lightning_callback(self)

    def flush(self) -> None:
        """Write the numbers of all steps that have ended, for which a GPU is waited for."""
        while self._sent:
            self._write(self._sent.popleft())

    def close(self) -> None:
        """End the watch, and write what has not been written. Writers stay open. Doing it twice does nothing."""
        self._attend(False)
        while self._handles:
            self._handles.pop().remove()
        self._calls.clear()
        self.flush()

    def __enter__(self) -> OffsetMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _attend(self, wanted: bool) -> None:
        """Watch the layers or not: in evaluation, a layer that is watched would predict twice."""
        if wanted and self._observation is None:
            self._observation = observe(self._model, self._watch)
        elif not wanted and self._observation is not None:
            self._observation.remove()
            self._observation = None

    def _begin_pass(self) -> None:
        """The model is called."""
        self._passed = True
        training = self._model.training and torch.is_grad_enabled()
        self._attend(training)
        if self._steps == "forward":
            self._calls.clear()  # of a pass that an exception has ended
            self._open = training

    def _end_pass(self) -> None:
        if self._steps == "forward" and self._open:
            self._open = False
            self._end()

    def _watch(self, event: Event) -> None:
        """Take a call's numbers. Copies of the model have its watchers, and keep them."""
        if self._observation is None or not self._model.training or not event.offset.numel():
            return
        if not (self._open and (self._steps == "forward" or torch.is_grad_enabled())):
            # Parts of the model that are called without it, or a checkpoint that computes once more.
            if not self._passed and torch.is_grad_enabled():
                self._say(
                    "parts",
                    f"layer {event.name!r} runs, but in no forward pass of the monitor's model, so that no step is seen and "
                    "nothing written. Give OffsetMonitor the module that you call, or steps=OPTIMIZER.",
                )
            return
        number, late = divmod(self._number, self._every)
        if not late:
            layer, offset = event.layer, event.offset
            lattices = self._lattices(
                event.input.shape,
                offset.shape,
                layer.kernel_size,
                layer.stride,
                layer.dilation,
                layer._pairs,
                layer.padding_mode,
            )
            self._calls.append(take(event.name, lattices[number], offset, event.mask))

    def _end(self) -> None:
        """A step is over: send its numbers on their way, and write those that have arrived."""
        calls, self._calls, number = self._calls, [], self._number
        self._number += 1
        if calls:
            self._said.add("nothing")  # a later step without calls of layers is no fault
            self._sent.append(_send(number, calls))
        elif number % self._every == 0 and self._observation is not None:
            self._say(
                "nothing",
                f"OffsetMonitor saw no deformable layer in step {number}: it sees training with gradients alone, and no "
                "compiled layers.",
            )
        now = monotonic()
        if self._at_once:
            self.flush()
        elif now >= self._next:
            while self._sent and self._sent[0].arrived():
                self._write(self._sent.popleft())
            self._next = now + PAUSE

    def _write(self, sent: _Sent) -> None:
        layers = of_layers(sent.taken())
        values: dict[str, float] = {}
        for layer in layers:
            values |= layer.values(self._prefix)
        for write in self._writers:
            write(sent.step, values)
        if "exploded" not in self._said:
            for layer in layers:
                self._check_explosion(sent.step, layer)

    def _check_explosion(self, step: int, layer: LayerStep) -> None:
        lengths = self._lengths.setdefault(layer.layer, deque())
        while lengths and step - lengths[0][0] > HISTORY:
            lengths.popleft()
        reason = explosion(layer, [length for _, length in lengths])
        lengths.append((step, layer.length))
        if reason is not None:
            name = f"layer {layer.layer!r}" if layer.layer else "the layer"
            self._say("exploded", f"step {step}: the offsets of {name} {reason}: {layer}. {HELP}", RuntimeWarning)

    def _say(self, what: str, text: str, kind: type[Warning] = UserWarning) -> None:
        """Warn, once of each thing."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(text, kind, stacklevel=3)


def _check(model: Any, steps: Any, first: Any) -> None:
    """Raise unless a model can be watched, and steps counted."""
    surgery.check_model(model)
    check_plain(model)
    if not deformable_layers(model):
        text = "`model` has no deformable layers to watch."
        if attention_layers(model):
            text += (
                " It has deformable attention, whose locations are no offsets of a window: deformconv.plots.record has them "
                "and their weights."
            )
        raise ValueError(text)
    if not isinstance(steps, torch.optim.Optimizer) and steps not in ("forward", "manual"):
        raise ValueError(f"`steps` is {steps!r}; expected 'forward', 'manual' or the optimizer.")
    if isinstance(first, bool) or not isinstance(first, int):
        raise TypeError(f"`first` is {first!r}; expected the number of the first step.")


def _hooks(monitor: OffsetMonitor, model: nn.Module) -> list[Any]:
    """Say when the model is called: by functions, which a copy of the model shares instead of copying the monitor."""

    def begin(module: nn.Module, _: Any) -> None:
        if module is model and not modes.compiling():
            monitor._begin_pass()

    def end(module: nn.Module, _: Any, __: Any) -> None:
        if module is model and not modes.compiling():
            monitor._end_pass()

    return [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]


def _write_of(writer: Any) -> Write:
    """The function `write(step, values)` of anything that takes numbers."""
    if hasattr(writer, "add_scalar"):

        def write(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return write
    if not isinstance(writer, nn.Module):  # Lightning's has a `log`, of another kind
        for name in ("log_metrics", "log_dict", "log"):
            if hasattr(writer, name):
                return lambda step, values: getattr(writer, name)(values, step=step)
        if callable(writer):
            return lambda step, values: writer(step, values)
    raise TypeError(
        f"a writer of OffsetMonitor is a {type(writer).__module__}.{type(writer).__qualname__}; expected a SummaryWriter "
        "(add_scalar), a run of Weights & Biases (log), a logger (log_metrics), or a function write(step, {name: value}). "
        "With Lightning, hand `monitor.callback()` to the Trainer."
    )


def _in_order(writer: Any) -> bool:
    """Whether a writer drops the numbers of a step that come after those of a later one, as Weights & Biases does."""
    return hasattr(writer, "log") and not any(hasattr(writer, name) for name in ("add_scalar", "log_metrics", "log_dict"))


class _Sent(NamedTuple):
    """What was taken in a step, some of it on its way from devices: from each one array, and when it is there."""

    step: int
    calls: list[Taken]
    parts: list[tuple[list[int], Tensor, Any]]  # which calls, their numbers one after the other, an event

    def arrived(self) -> bool:
        return all(event is None or event.query() for _, _, event in self.parts)

    def taken(self) -> list[Taken]:
        """The calls with everything on the host, as soon as it is."""
        calls = list(self.calls)
        for places, flat, event in self.parts:
            if event is not None:
                event.synchronize()
            whole, begin = flat.numpy(), 0
            for place in places:
                arrays = []
                for tensor in calls[place][2:]:
                    end = begin if tensor is None else begin + tensor.numel()
                    arrays.append(None if tensor is None else whole[begin:end].reshape(tensor.shape))
                    begin = end
                calls[place] = Taken(*calls[place][:2], *arrays)
        return calls


def _send(step: int, calls: list[Taken]) -> _Sent:
    by_device: dict[torch.device, list[int]] = {}
    for place, call in enumerate(calls):
        if isinstance(call.offset, Tensor):
            by_device.setdefault(call.offset.device, []).append(place)
    parts = []
    for device, places in by_device.items():
        tensors = [tensor.reshape(-1) for place in places for tensor in calls[place][2:] if tensor is not None]
        flat, event = torch.cat(tensors), None
        if device.type == "cuda":
            here = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            flat, event = here.copy_(flat, non_blocking=True), torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
        parts.append((places, flat.cpu(), event))
    return _Sent(step, calls, parts)


def _lightning_callback(monitor: OffsetMonitor) -> Any:
    """A callback of the Lightning that is in use: there are two packages of it, whose classes differ."""
    import sys
    from importlib import import_module

    names = "pytorch_lightning", "lightning.pytorch"
    module = next((sys.modules[name] for name in names if name in sys.modules), None) or import_module(names[1])

    class OffsetCallback(module.Callback):  # type: ignore[name-defined]
        """Ends the monitor's steps where the Trainer's end."""

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self._loggers = trainer.loggers

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            monitor._attend(True)
            self._number = trainer.global_step

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step != self._number:  # not while gradients are accumulated
                monitor.step(self._number)

        def on_validation_start(self, *_: Any) -> None:
            monitor._attend(False)

        def on_fit_end(self, *_: Any) -> None:
            monitor.flush()

        def write(self, step: int, values: dict[str, float]) -> None:
            for logger in self._loggers:
                logger.log_metrics(values, step=step)

    callback = OffsetCallback()
    monitor._writers.append(callback.write)
    return callback
