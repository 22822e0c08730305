"""The names of a model's parameters in its own state_dict and in another library's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from deformconv.convert.detectors import detector_of
from deformconv.convert.layouts.layout import Layout, Place
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d, DeformRoIPool

__all__ = ["Names", "bare", "keys_of", "layer_named"]

_LAYERS = (DeformConv1d, DeformConv2d, DeformConv3d)
_KINDS = ("arg:", "aux:")  # what MXNet puts before names


class Names:
    """A model's deformable layers, and the name of each parameter in a layout; `state` chooses among a detector's names."""

    def __init__(self, model: nn.Module, layout: Layout, state: Mapping[str, Any] | None = None) -> None:
        self.layout = layout
        self.detector = detector_of(model, layout, state)
        self.modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
        self.layers = {name: module for name, module in self.modules.items() if isinstance(module, _LAYERS)}
        self.pools = {name: module for name, module in self.modules.items() if isinstance(module, DeformRoIPool)}
        self.masked = {name: module for name, module in {**self.layers, **self.pools}.items() if module.modulated}
        self.predictors = {_within(name, "offset_conv"): name for name in self.layers}
        places = list(self._places())
        self.theirs = {place.key: self._their_key(place) for place in places}
        self._ours = {bare(theirs): ours for ours, theirs in self.theirs.items() if theirs is not None}
        for name, layer in self.layers.items():  # whatever computes its parameters, since one is told of that
            if layer.offset_conv is not None:
                keys = _within(name, "weight"), _within(name, "offset_conv.weight")
                self._ours.update(zip(map(bare, self.pair(name)), keys, strict=True))
        # A name without points, or with a word within, says nothing of the names beside it.
        same = ((theirs, ours) for theirs, ours in self._ours.items() if _parameter(theirs) == _parameter(ours))
        self._our_modules = {_module(theirs): _module(ours) for theirs, ours in same}
        self._their_modules = {ours: theirs for theirs, ours in self._our_modules.items()}

    def here(self, key: str) -> str:
        """Our name for theirs; a name that the model lacks follows its module, if that is known."""
        found = self._ours.get(bare(key))
        return _moved(key, self._our_modules) if found is None else found

    def module(self, name: str) -> str:
        """Our name for their module."""
        return self._our_modules.get(name, name)

    def back(self, key: str) -> str | None:
        """Their name for ours; None for what they do not keep."""
        return self.theirs[key] if key in self.theirs else _moved(key, self._their_modules)

    def pair(self, layer: str) -> tuple[str, str]:
        """Their keys of a layer's weight and of its predictor's, whatever stands for these in the model."""
        module = self.layers[layer]
        predictor = Place(_within(layer, "offset_conv"), module.offset_conv, "weight")
        return str(self._their_key(Place(layer, module, "weight"))), str(self._their_key(predictor))

    def recognised(self, state: Mapping[str, Any], change: Callable[[str], str] = str) -> list[str]:
        """Our names of the layers whose weight and predictor a state_dict has by the layout's names.

        `change` is done to both libraries' names before they are compared.
        """
        there = {change(bare(key)) for key in state}
        predicting = [name for name, layer in self.layers.items() if layer.offset_conv is not None]
        return [name for name in predicting if all(change(bare(key)) in there for key in self.pair(name))]

    def clash(self) -> tuple[str, str, str] | None:
        """Two of our names that are one of theirs, and that one."""
        seen: dict[str, str] = {}
        for ours, theirs in self.theirs.items():
            if theirs is not None and (first := seen.setdefault(bare(theirs), ours)) != ours:
                return first, ours, theirs
        return None

    def owners(self, parameter: Any) -> list[str]:
        """Our names of the modules that have this very parameter."""
        return [name for name, module in self.modules.items() if any(own is parameter for own in module._parameters.values())]

    def known(self, state: Mapping[str, Any]) -> int:
        """How many of a state_dict's keys are the layout's names of something in the model."""
        return sum(bare(key) in self._ours for key in state)

    def _places(self) -> Iterator[Place]:
        for name, module in self.modules.items():
            buffers = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
            for parameter in (*module._parameters, *buffers):
                if getattr(module, parameter, None) is not None:
                    yield Place(name, module, parameter)

    def _their_key(self, place: Place) -> str | None:
        layer = self.predictors.get(place.name, place.name)
        if layer not in self.layers:
            return self.layout.others(place._replace(name=self._there(place.name)))
        if place.name in self.predictors:
            template = self.layout.predictor
        else:
            template = self.layout.weight if self.layers[layer].offset_conv is not None else self.layout.alone
        owner = self._there(self._owner(layer))
        made = template.format(layer=owner, word=owner.replace(".", "_"), parameter=place.parameter)
        kind = next((kind for kind in _KINDS if made.startswith(kind)), "")
        return made if owner else kind + made.removeprefix(kind).lstrip("._")  # without a name, the model itself is the layer

    def _there(self, name: str) -> str:
        """The other library's name for a module, if it has another."""
        return self.detector.renamed.get(name, name) if self.detector is not None else name

    def _owner(self, layer: str) -> str:
        """Whose parameters the other library takes the layer's for: a block's own, where that is what predicts."""
        parent = layer.rpartition(".")[0]
        is_passed = layer and self.layers[layer].offset_conv is None
        return parent if self.layout.guided and is_passed and _within(parent, "conv_offset") in self.modules else layer


def keys_of(name: str) -> tuple[str, str, str]:
    """Our keys of a layer's weight, of its predictor's and of the predictor's bias."""
    prefix = f"{name}." if name else ""
    return f"{prefix}weight", f"{prefix}offset_conv.weight", f"{prefix}offset_conv.bias"


def layer_named(name: str) -> str:
    """A layer as a sentence names it."""
    return f"layer {name!r} of `model`" if name else "`model`"


def _within(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if name else parameter


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _parameter(key: str) -> str:
    return key.rpartition(".")[2]


def _moved(key: str, modules: Mapping[str, str]) -> str:
    module = _module(key)
    return _within(modules.get(module, module), _parameter(key))


def bare(key: str) -> str:
    """A name without what MXNet puts before it."""
    return next((key.removeprefix(kind) for kind in _KINDS if key.startswith(kind)), key)
