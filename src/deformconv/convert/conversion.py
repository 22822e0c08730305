"""The conversion between a model's state_dict and a layout of another library: names first, then numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deformconv.convert.detectors import DIALECTS, Origin
from deformconv.convert.layouts import LAYOUTS
from deformconv.convert.layouts.layout import Change, Layout
from deformconv.convert.names import Names, layer_named
from deformconv.convert.pools import readers
from deformconv.convert.predictor_groups import dense, grouped
from deformconv.errors import ShapeError
from deformconv.torch import DeformConv2d
from deformconv.torch.loading import RECORD, noted

__all__ = ["back", "here"]


def here(state: Mapping[str, Tensor], layout: Layout, model: nn.Module, origin: Origin) -> OrderedDict[str, Tensor]:
    """Their state_dict as ours."""
    names = Names(model, layout, state)
    found = names.recognised(state)
    if not found:
        _check_source(state, layout, model)
    changes: dict[str, Change] = {}
    if names.detector is not None:
        _check_dialect(state, names, model)
        state, changes = names.detector.here(state, origin)
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in state.items():
        if (ours := names.here(key)) in renamed:
            raise ValueError(f"`state` has two tensors for {ours!r} of the model, one of them {key!r}; expected one.")
        renamed[ours] = tensor
    renamed.update((key, change.here(renamed[key])) for key, change in changes.items() if key in renamed)
    for name in found:
        _check_layer(name, names)
        _layer_here(renamed, name, names)
    for key, scale in readers(names, renamed).items():
        renamed[key] = _scaled(renamed[key], 1 / scale, key, names)
    if layout.transposed:
        _transpose(renamed, names, names.theirs)
    return noted(renamed, model)


def back(state: Mapping[str, Tensor], layout: Layout, model: nn.Module, origin: Origin) -> OrderedDict[str, Tensor]:
    """Our state_dict as theirs."""
    names = Names(model, layout)
    _check_ours(state, names)
    changes = names.detector.back(origin) if names.detector is not None else {}
    changed = OrderedDict(state)
    changed.update((key, change.back(changed[key])) for key, change in changes.items() if key in changed)
    for name, layer in names.layers.items():
        _check_layer(name, names)
        if layer.offset_conv is not None:
            _layer_back(changed, name, names)
    for key, scale in readers(names, changed).items():
        changed[key] = _scaled(changed[key], scale, key, names)
    if layout.transposed:
        _transpose(changed, names, names.theirs)
    renamed = ((names.back(key), tensor) for key, tensor in changed.items())
    return OrderedDict((key, tensor) for key, tensor in renamed if key is not None)


def _layer_here(state: dict[str, Tensor], name: str, names: Names) -> None:
    """Give a layer's parameters, by our names already, the numbers that compute the same here."""
    layer, layout = names.layers[name], names.layout
    weight, predictor, bias = _keys(name)
    found = state[predictor]
    if layout.grouped and found.shape[1] != layer.in_channels:
        found = torch.from_numpy(dense(found.numpy(), layer.in_channels, predictor, layer.groups))
    expected, rows = layer._predicted, len(found)
    is_masked = layer.modulated and rows == expected.channels
    if rows == expected.offsets and layer.modulated and layer.mask_scale == 2:
        found = torch.cat((found, found.new_zeros(expected.masks, *found.shape[1:])))  # masks of 2*sigmoid(0) = 1: v1
    elif rows != expected.channels:
        raise ShapeError(_wrong_channels(name, names, rows))
    state[predictor] = found
    biases = state[bias] if bias in state else found.new_zeros(rows)
    state[bias] = torch.cat((biases, biases.new_zeros(len(found) - rows))) if len(found) > rows else biases
    if is_masked and layout.mask_scale is not None:
        state[weight] = _scaled(state[weight], layout.mask_scale / layer.mask_scale, weight, names)


def _layer_back(state: dict[str, Tensor], name: str, names: Names) -> None:
    """Give a layer's parameters, by our names yet, the numbers that compute the same there."""
    layer, layout = names.layers[name], names.layout
    weight, predictor, _ = _keys(name)
    if weight not in state or predictor not in state:
        return
    if layout.grouped and layer.groups > 1:
        state[predictor] = torch.from_numpy(grouped(_numbers(state[predictor]), layer.groups))
    if layer.modulated and layout.mask_scale is not None:
        state[weight] = _scaled(state[weight], layer.mask_scale / layout.mask_scale, weight, names)


def _keys(name: str) -> tuple[str, str, str]:
    """Our keys of a layer's weight, of its predictor's and of the predictor's bias."""
    prefix = f"{name}." if name else ""
    return f"{prefix}weight", f"{prefix}offset_conv.weight", f"{prefix}offset_conv.bias"


def _numbers(tensor: Tensor) -> Any:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _scaled(tensor: Tensor, factor: float, key: str, names: Names) -> Tensor:
    """A weight that makes up for masks of another scale; the way back must give the very same numbers."""
    if factor == 1:
        return tensor
    made = tensor * factor
    if not torch.equal(torch.nan_to_num(made / factor, 0.0), torch.nan_to_num(tensor, 0.0)):
        raise ValueError(
            f"{key!r} times {factor:g}, which makes up for {names.layout.library}'s masks, is rounded in {tensor.dtype}: its "
            "numbers are too small, or too large. Build the model's layers with "
            f"mask_scale={names.layout.mask_scale or 1.0:g}, which needs no arithmetic."
        )
    return made


def _transpose(state: dict[str, Tensor], names: Names, keys: Iterable[str]) -> None:
    """Turn the matrices of fully connected layers, which the other library has the other way round."""
    for key in keys:
        module, _, parameter = key.rpartition(".")
        if parameter == "weight" and key in state and isinstance(names.modules[module], nn.Linear):
            state[key] = state[key].t().contiguous()


def _check_layer(name: str, names: Names) -> None:
    """Raise for a layer that cannot compute what the other library's does."""
    layer, layout = names.layers[name], names.layout
    named, library = layer_named(name), layout.library
    for parameter in ("weight", "bias"):
        for part in filter(None, (layer, layer.offset_conv)):
            if parametrize.is_parametrized(part, parameter) or (parameter not in part._parameters and hasattr(part, parameter)):
                raise ValueError(
                    f"{named} has a {parameter} that is computed from other parameters; expected a parameter. Remove that "
                    "first, by torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm."
                )
    if layout.mask_scale is None and layout.source == "deformconv":
        return
    if layer.rank != 2:
        raise ValueError(
            f"{named} is a {type(layer).__name__}; expected a DeformConv2d, since {library} has 2 spatial axes only."
        )
    boundary = layout.boundaries[layer.modulated]
    if layer.boundary != boundary:
        raise ValueError(
            f"{named} has boundary={layer.boundary!r}, and {library} computes v{1 + layer.modulated} with {boundary!r}: "
            f"outputs at the border would differ. Build it with boundary={boundary!r}."
        )
    if layout.mask_scale is None:  # torchvision's copy of our layers, which knows the rest
        return
    if layer.max_offset is not None and layer.offset_conv is not None:
        raise ValueError(
            f"{named} bounds its offsets, max_offset={layer.max_offset:g}, and {library} does not. Build it without max_offset."
        )
    if layer.padding_mode != "zeros":
        raise ValueError(f"{named} has padding_mode={layer.padding_mode!r}; expected 'zeros', which is all that {library} has.")
    _check_predictor(named, layer, layout)


def _check_predictor(named: str, layer: Any, layout: Layout) -> None:
    """Raise for a predictor that looks elsewhere than the other library's."""
    predictor = layer.offset_conv
    if predictor is None:
        return
    dilation = getattr(predictor, "dilation", (1,))
    if not layout.dilated and any(step != 1 for step in dilation):
        raise ValueError(
            f"{named} has dilation={layer.dilation}, and so has its predictor; that of {layout.library} has none, and looks at "
            "other pixels. Put such a convolution in its place first: `layer.offset_conv = torch.nn.Conv2d("
            f"{layer.in_channels}, {layer._predicted.channels}, {layer.kernel_size}, {layer.stride}, "
            f"{tuple((size - 1) // 2 for size in layer.kernel_size)})`."
        )
    if layout.guided and type(layer).forward is DeformConv2d.forward:
        raise ValueError(
            f"{named} predicts its offsets from its own input, and {layout.library}'s DCNv2Pack from another feature: the keys "
            "fit, and the outputs would not. Use a subclass whose forward(x, feature) returns "
            "super().forward(x, *self.offsets_and_mask(feature)); or, if yours is a ModulatedDeformConvPack, which has the "
            'same keys and predicts from its own input, pass "mmcv" for "basicsr".'
        )


def _check_source(state: Mapping[str, Tensor], layout: Layout, model: nn.Module) -> None:
    """Raise if a state_dict has predictors, and not by this layout's names."""
    others = {other.source: Names(model, other).recognised(state) for other in LAYOUTS.values() if other is not layout}
    found = {source: names[0] for source, names in others.items() if names}
    if not found:
        return
    where = next(f"layer {name!r}" if name else "its layer" for name in found.values())
    if "deformconv" in found:
        raise ValueError(
            f"`state` has {where} by the names of this library already, and nothing says whose numbers they are. Convert the "
            "file as it was; or, if this library wrote them, pass source='deformconv'."
        )
    libraries = " or ".join(LAYOUTS[source].library for source in found)
    raise ValueError(
        f"`state` has {where} by the names of {libraries}, and source is {layout.source!r}; expected "
        f"source={' or '.join(map(repr, found))}."
    )


def _check_dialect(state: Mapping[str, Tensor], names: Names, model: nn.Module) -> None:
    """Raise if a detector's state_dict has another library's names: some are the same, and mean something else."""
    known = names.known(state)
    others = ((LAYOUTS[source], Names(model, LAYOUTS[source], state).known(state)) for source in (*DIALECTS, "deformconv"))
    layout, most = max(others, key=lambda other: other[1])
    if most > known:
        has = f"`state` has {most} of the model's tensors by the names of {layout.library} and {known} by those of"
        raise ValueError(
            f"{has} {names.layout.library}; expected source={layout.source!r}"
            + (", or the file as it was before." if layout.source == "deformconv" else ".")
        )


def _check_ours(state: Mapping[str, Tensor], names: Names) -> None:
    """Raise if a state_dict is not the model's."""
    missing = [key for key in names.theirs if key not in state]
    if len(missing) == len(names.theirs):
        raise ValueError(
            f"`state` has none of the model's {len(missing)} tensors, as {missing[0]!r}; expected model.state_dict(). For a "
            "state_dict of another library pass `source`, not `to`."
        )
    metadata: Any = getattr(state, "_metadata", {})
    for name, layer in names.layers.items():
        recorded = metadata.get(name, {}).get(RECORD, layer.mask_scale)
        if layer.modulated and recorded != layer.mask_scale:
            raise ValueError(
                f"{layer_named(name)} has mask_scale={layer.mask_scale:g}, and `state` is of one with {recorded:g}; expected "
                "the state_dict of `model`."
            )


def _wrong_channels(name: str, names: Names, rows: int) -> str:
    layer = names.layers[name]
    expected, groups = layer._predicted, layer.offset_groups or 1
    taps = expected.offsets // (2 * groups)
    text = (
        f"the predictor of {layer_named(name)} has {rows} channels in `state`; expected {expected.channels}: "
        f"{3 if layer.modulated else 2} x {taps} taps x {groups} offset group{'s' if groups > 1 else ''}."
    )
    for modulated in (False, True):
        each = (2 + modulated) * taps
        if rows % each == 0:
            text += f" {rows} is v{1 + modulated} with {rows // each} offset group{'s' if rows > each else ''}:"
            text += f" modulated={modulated}, offset_groups={rows // each}."
    return text
