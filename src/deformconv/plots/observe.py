"""Who wants to see what deformable layers compute with: every call's offsets and masks, of this library's and of others'.

Nothing is changed by looking: outputs and gradients are the same bit for bit. Layers of this library show their tensors
themselves; of others' layers the call's arguments are read or, where a layer predicts its own offsets, its predictor's output.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from math import prod
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deformconv.convert.kornia import KorniaDeformConv2d
from deformconv.convert.layers import as_ours, predictor_of
from deformconv.torch import modes, surgery
from deformconv.torch.aggregate.functional import deform_aggregate2d
from deformconv.torch.conv.modules import _DeformConvNd
from deformconv.torch.observed import Observed
from deformconv.vision.aggregates import Aggregate

__all__ = [
    "AggregateWindow", "Event", "Kept", "Observation", "check_plain", "deformable_layers", "kind_of", "look_at", "observe",
    "seen_from_here", "unseen",
]  # fmt: skip

_numbers = count()


class _Depth(threading.local):
    """How many `unseen` blocks a thread is within."""

    number = 0


_depth = _Depth()


@contextmanager
def unseen() -> Iterator[None]:
    """A block whose calls are seen by those alone who began to observe within it."""
    _depth.number += 1
    try:
        yield
    finally:
        _depth.number -= 1


class AggregateWindow(NamedTuple):
    """The window of DCNv3 or DCNv4, which have no weight, in the words of a deformable convolution."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, layer: Aggregate) -> AggregateWindow:
        kernel_size, stride, dilation, pad = layer.kernel_size, layer.stride, layer.dilation, layer.pad
        return cls((kernel_size,) * 2, (stride,) * 2, (dilation,) * 2, ((pad, pad),) * 2)

    @property
    def _pairs(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.padding

    def sampled(self, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        """What the window adds up of an input (N, C, H, W) with these offsets and masks."""
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return deform_aggregate2d(input, offset, mask, *window)


class Event(NamedTuple):
    """One call of a deformable layer.

    `layer` is this library's layer, or one that shares the parameters of another library's; of DCNv3 and DCNv4 an
    AggregateWindow. `offset` and `mask` are the tensors that were used, with a batch axis, in the graph if there is one;
    `input` and `output` are as the layer got and gave them, or the operator within DCNv3 and DCNv4, channels first.
    """

    name: str
    layer: Any
    input: Tensor
    offset: Tensor
    mask: Tensor | None
    output: Tensor


class Observation:
    """What `observe` returns: `remove()` ends it, and so does leaving its `with` block."""

    def __init__(self, ends: list[Callable[[], None]]) -> None:
        self._ends = ends

    def remove(self) -> None:
        """Look no longer. Doing it twice does nothing."""
        while self._ends:
            self._ends.pop()()

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.remove()


def seen_from_here() -> Callable[[], bool]:
    """A function that tells whether a call is to be seen by who observes from here on."""
    depth = _depth.number
    return lambda: _depth.number == depth


def kind_of(module: nn.Module) -> str | None:
    """Whose deformable layer a module is: "deformconv", "torchvision", "kornia" or "mmcv"; None if it is none."""
    if isinstance(module, (_DeformConvNd, Aggregate)):
        return "deformconv"
    if as_ours(module) is None:
        return None
    rooms = [kind.__module__.split(".")[0] for kind in type(module).__mro__]
    return next((room for room in rooms if room in ("mmcv", "kornia")), "torchvision")


def deformable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every deformable layer of a model by its name; what is a part of another library's layer is not one of its own."""
    found: dict[str, nn.Module] = {}
    parts: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in parts and (kind := kind_of(module)) is not None:
            found[name] = module
            if kind != "deformconv":
                parts.update(map(id, module.modules()))
    return found


def observe(model: nn.Module, watch: Callable[[Event], None]) -> Observation:
    """Call `watch` with an Event for every call of a deformable layer within a model, from now on.

    Watched are this library's layers and those that `deformconv.convert.replace_layers` knows, and subclasses of torchvision's
    that are called with their offsets. A replica that DataParallel makes is watched like what it was made from; `watch` is then
    called from its thread. Nothing is called while a model is compiled, traced or transformed by torch.func.

    Args:
        model: any module.
        watch: is called right after the layer has computed; what it raises ends the forward pass.

    Returns:
        A handle, whose `remove()` ends it; it may be used in `with`.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    surgery.check_model(model)
    ends: list[Callable[[], None]] = []
    is_seen = seen_from_here()
    handle = Observation(ends)

    def seen(event: Event) -> None:
        if ends and is_seen():  # a copy of a layer has its hooks, and keeps them after the end
            watch(event)

    for name, module in deformable_layers(model).items():
        if isinstance(module, (_DeformConvNd, Aggregate)):
            ends.append(_observe_ours(name, module, seen))
        else:
            ends += _observe_theirs(name, module, seen)
    return handle


class _Observers(dict[int, Callable[..., None]]):
    """Who looks at one layer. A copy of the layer, or one that is loaded from a file, is looked at by nobody."""

    def __deepcopy__(self, memory: Any) -> _Observers:
        return _Observers()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


def look_at(layer: Observed, show: Callable[..., None]) -> Callable[[], None]:
    """Call `show` with what a layer of this library shows of each call, until what is returned is called."""
    observers = layer._observers
    if observers is None:
        observers = layer._observers = _Observers()
    number = next(_numbers)
    observers[number] = show

    def end() -> None:
        observers.pop(number, None)
        if not observers and vars(layer).get("_observers") is observers:
            del layer._observers

    return end


def _observe_ours(name: str, layer: _DeformConvNd | Aggregate, watch: Callable[[Event], None]) -> Callable[[], None]:
    shown = AggregateWindow.of(layer) if isinstance(layer, Aggregate) else layer
    return look_at(layer, lambda input, offset, mask, output: watch(Event(name, shown, input, offset, mask, output)))


def _observe_theirs(name: str, theirs: Any, watch: Callable[[Event], None]) -> list[Callable[[], None]]:
    """Hooks on another library's layer; a replica has the same hooks, so what they keep is kept by thread."""
    layer: Any = as_ours(theirs)
    inner = getattr(theirs, "deform_conv", None)  # of what `to_torchvision` makes
    part = predictor_of(theirs) if inner is None else inner
    kept = Kept()

    def inside(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if inner is not None:
            kept.pair = _passed(args, kwargs)
            return None
        return _predicted(kept, layer, args[0], output) if isinstance(output, Tensor) else None

    def after(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        offset, mask = kept.take() or _passed(args, kwargs)
        if modes.compiling() or modes.traced() or modes.transformed():
            return
        if _fits(layer, offset, output):
            watch(Event(name, layer, args[0] if args else next(iter(kwargs.values())), offset, mask, output))
        else:
            warnings.warn(
                f"layer {name!r}, a {type(theirs).__name__}, was called without offsets and makes its own, which cannot be "
                "seen; expected layer(input, offset) or layer(input, offset, mask).",
                stacklevel=2,
            )

    handles = [] if part is None else [part.register_forward_hook(inside, with_kwargs=True)]
    handles.append(theirs.register_forward_hook(after, with_kwargs=True))
    return [handle.remove for handle in handles]


class Kept(threading.local):
    """What a part of a layer knows, offsets and masks, until another part runs, in one thread."""

    pair: tuple[Any, Any] | None = None

    def take(self) -> tuple[Any, Any] | None:
        pair, self.pair = self.pair, None
        return pair


def _passed(args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The offsets and masks in a call of torchvision's or mmcv's layer: the second argument and the third."""
    given = dict(zip(("input", "offset", "mask"), args, strict=False)) | kwargs
    return given.get("offset"), given.get("mask")


def _predicted(kept: Kept, layer: Any, input: Tensor, raw: Tensor) -> Tensor | None:
    """Keep the offsets and masks that another library's layer makes of its predictor's output.

    With gradients the layer goes on with an output put together from them, so that they have gradients: kornia's bounds are
    applied twice then, which is the same as once.
    """
    taps = prod(layer.kernel_size) * layer.offset_groups
    offset, mask = raw[:, : 2 * taps], raw[:, 2 * taps :]
    if isinstance(layer, KorniaDeformConv2d):
        limit = max(input.shape[-2:]) / 4
        offset = offset.clamp(-limit, limit)
    kept.pair = offset, torch.sigmoid(mask) if layer.modulated else None
    return torch.cat((offset, mask), 1) if offset.requires_grad else None


def _fits(layer: Any, offset: Any, output: Any) -> bool:
    """Whether a tensor can be the offsets of a call."""
    if not (isinstance(offset, Tensor) and isinstance(output, Tensor) and offset.ndim == output.ndim):
        return False
    channels = len(layer.kernel_size) * prod(layer.kernel_size)
    return offset.shape[2:] == output.shape[2:] and offset.shape[1] > 0 and offset.shape[1] % channels == 0


def check_plain(model: nn.Module) -> None:
    """Raise if a model is compiled or a script."""
    for name, module in model.named_modules():
        where = f"layer {name!r} of `model`" if name else "`model`"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{where} is compiled, and what its layers compute cannot be seen; expected the module from before "
                "torch.compile, which has the same parameters: `compiled._orig_mod`, or a model that has not been compiled."
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "`model` is a script or a trace of torch.jit, whose layers cannot be seen; expected the Python module that it was "
            "made from, with its parameters: model.load_state_dict(script.state_dict())."
        )
