"""The conversion between a model's state_dict and a layout of another library: names first, then numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deformconv.convert.checks import (
    check_bias,
    check_both,
    check_dialect,
    check_distinct,
    check_layer,
    check_ours,
    check_own,
    check_records,
    check_source,
    check_wrapping,
    wrong_channels,
)
from deformconv.convert.detectors import Origin
from deformconv.convert.layouts.layout import Change, Layout
from deformconv.convert.names import Names, keys_of
from deformconv.convert.pools import readers
from deformconv.convert.predictor_groups import dense, grouped
from deformconv.errors import ShapeError
from deformconv.torch.loading import RECORD, noted

__all__ = ["back", "here"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def here(state: Mapping[str, Tensor], layout: Layout, model: nn.Module, origin: Origin) -> OrderedDict[str, Tensor]:
    """Their state_dict as ours."""
    names = Names(model, layout, state)
    check_distinct(names)
    found = names.recognised(state)
    check_source(state, layout, model, found)
    if layout.source == "deformconv":
        check_records(state, {name: module for name, module in names.masked.items() if name not in found})
    if not found:
        check_wrapping(state, names)
    metadata: Any = getattr(state, "_metadata", {})
    scales = {name: _scale_there(metadata, name, names) for name in found}
    changes: dict[str, Change] = {}
    if names.detector is not None:
        check_dialect(state, names, model)
        state, changes = names.detector.here(state, origin)
    renamed = _renamed(state, names)
    renamed.update((key, change.here(renamed[key])) for key, change in changes.items() if key in renamed)
    for name, layer in names.layers.items():
        if name in found:
            _layer_here(renamed, name, names, scales[name])
        elif layer.offset_conv is not None:
            check_both(renamed, name, names)
        elif keys_of(name)[0] in renamed:
            check_layer(name, names, layer.modulated)
    for key, scale in readers(names, renamed).items():
        renamed[key] = _scaled(renamed[key], (1.0, scale), key, names)
    if layout.transposed:
        _transpose(renamed, names, names.theirs)
    entries = ((names.module(name), entry) for name, entry in metadata.items())
    renamed._metadata = {name: entry for name, entry in entries if not _is_frozen_norm(name, renamed)}
    return noted(renamed, model)


def back(state: Mapping[str, Tensor], layout: Layout, model: nn.Module, origin: Origin) -> OrderedDict[str, Tensor]:
    """Our state_dict as theirs."""
    names = Names(model, layout)
    check_distinct(names)
    check_ours(state, names)
    changes = names.detector.back(origin) if names.detector is not None else {}
    changed = OrderedDict(state)
    changed.update((key, change.back(changed[key])) for key, change in changes.items() if key in changed)
    for name, layer in names.layers.items():
        check_layer(name, names, layer.modulated)
        if layer.offset_conv is not None:
            _layer_back(changed, name, names)
    for key, scale in readers(names, changed).items():
        changed[key] = _scaled(changed[key], (scale, 1.0), key, names)
    if layout.transposed:
        _transpose(changed, names, names.theirs)
    renamed = ((names.back(key), tensor) for key, tensor in changed.items())
    return OrderedDict((key, tensor) for key, tensor in renamed if key is not None)


def _renamed(state: Mapping[str, Tensor], names: Names) -> Any:
    """Their tensors by our names."""
    found: Any = OrderedDict()
    for key, tensor in state.items():
        if (ours := names.here(key)) in found:
            raise ValueError(f"`state` has two tensors for {ours!r} of the model, one of them {key!r}; expected one.")
        found[ours] = tensor
    return found


def _is_frozen_norm(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a norm has counted no batches: its version is another class's, and PyTorch's own would miss the count."""
    return f"{name}.running_mean" in state and f"{name}.num_batches_tracked" not in state


def _layer_here(state: dict[str, Tensor], name: str, names: Names, scale: float | None) -> None:
    """Give a layer's parameters, by our names already, the numbers that compute the same here.

    `scale` is of the masks there, None for the layer's own.
    """
    layer, layout = names.layers[name], names.layout
    weight, predictor, bias = keys_of(name)
    found, expected = state[predictor], layer._predicted
    rows = len(found) if found.ndim else 0
    is_masked = layer.modulated and rows == expected.channels
    # What a file of v1 was computed with is v1's, in a layer of v2 as well.
    check_layer(name, names, layer.modulated and rows != expected.offsets)
    if found.ndim != layer.rank + 2:
        raise ShapeError(
            f"{predictor!r} has shape {tuple(found.shape)}; expected {layer.rank + 2} axes, a convolution's weight."
        )
    if layout.grouped and found.shape[1] != layer.in_channels:
        found = _by_numpy(found, lambda array: dense(array, layer.in_channels, predictor, layer.groups))
    widened = layer.modulated and layer.mask_scale == 2 and rows == expected.offsets
    if rows != expected.channels and not widened:
        raise ShapeError(wrong_channels(name, names, rows))
    biases = state[bias] if bias in state else found.new_zeros(rows)
    if biases.shape != (rows,):
        raise ShapeError(f"{bias!r} has shape {tuple(biases.shape)}; expected ({rows},), the predictor's channels.")
    if widened:  # masks of 2*sigmoid(0) = 1
        found = torch.cat((found, found.new_zeros(expected.masks, *found.shape[1:])))
        biases = torch.cat((biases, biases.new_zeros(expected.masks)))
    state[predictor] = found
    if bias in state or getattr(layer.offset_conv, "bias", None) is not None:
        state[bias] = biases
    if is_masked and scale is not None:
        state[weight] = _scaled(state[weight], (scale, layer.mask_scale), weight, names)


def _layer_back(state: dict[str, Tensor], name: str, names: Names) -> None:
    """Give a layer's parameters, by our names yet, the numbers that compute the same there."""
    layer, layout = names.layers[name], names.layout
    weight, predictor, _ = keys_of(name)
    check_both(state, name, names, plain=False)
    if weight not in state or predictor not in state:
        return
    check_bias(name, names)
    if layout.grouped and layer.groups > 1:
        state[predictor] = _by_numpy(state[predictor], lambda array: grouped(array, layer.groups))
    if layer.modulated and layout.mask_scale is not None:
        state[weight] = _scaled(state[weight], (layer.mask_scale, layout.mask_scale), weight, names)


def _scale_there(metadata: Any, name: str, names: Names) -> float | None:
    """The scale of a layer's masks in a state_dict with this metadata; None for the model's."""
    if names.layout.source != "deformconv":
        return names.layout.mask_scale
    recorded: float | None = metadata.get(name, {}).get(RECORD)
    return recorded


def _by_numpy(tensor: Tensor, change: Callable[[Any], Any]) -> Tensor:
    """What a function of arrays makes of a tensor: of its dtype, and on its device."""
    values = tensor.detach().cpu()
    array = (values.float() if tensor.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    return torch.from_numpy(change(array)).to(tensor)


def _scaled(tensor: Tensor, scales: tuple[float, float], key: str, names: Names) -> Tensor:
    """A weight with which masks of the second scale do what those of the first did, and from which it can come back."""
    first, second = scales
    if first == second:
        return tensor
    if tensor.dtype not in _FLOATS:
        raise ValueError(
            f"{key!r} is {tensor.dtype}; expected a float type, since it makes up for the masks of other libraries."
        )
    check_own(key, names)
    values = tensor.detach()
    # Divided, since two thirds are no number to multiply by.
    made = values * first / second
    back = made * second / first
    if not bool(((back == values) | values.isnan()).all()):
        raise ValueError(
            f"{key!r} times {first / second:g}, which makes up for {names.layout.library}'s masks, is rounded in "
            f"{tensor.dtype}, and would not come back as it was. Convert it in a wider float type, or build the model's layers "
            f"with mask_scale={names.layout.mask_scale or 1.0:g}, which needs no arithmetic."
        )
    return made


def _transpose(state: dict[str, Tensor], names: Names, keys: Iterable[str]) -> None:
    """Turn the matrices of fully connected layers, which the other library has the other way round."""
    for key in keys:
        module, _, parameter = key.rpartition(".")
        is_matrix = parameter == "weight" and key in state and state[key].ndim == 2
        if is_matrix and isinstance(names.modules[module], nn.Linear):
            state[key] = state[key].t().contiguous()
