"""The conversion between a model's state_dict and a layout of another library: names first, then numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deformconv.convert.layouts import LAYOUTS
from deformconv.convert.layouts.layout import Layout
from deformconv.convert.names import Names, bare
from deformconv.convert.predictor_groups import dense, grouped
from deformconv.errors import ShapeError
from deformconv.torch import DeformConv2d
from deformconv.torch.loading import RECORD, noted

__all__ = ["back", "here"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def here(state: Mapping[str, Tensor], layout: Layout, model: nn.Module) -> OrderedDict[str, Tensor]:
    """Their state_dict as ours."""
    names = Names(model, layout)
    _check_distinct(names)
    found = names.recognised(state)
    _check_source(state, layout, model, found)
    if layout.source == "deformconv":
        _check_records(state, {name: module for name, module in names.masked.items() if name not in found})
    if not found:
        _check_wrapping(state, names)
    renamed: Any = OrderedDict()
    for key, tensor in state.items():
        if (ours := names.here(key)) in renamed:
            raise ValueError(f"`state` has two tensors for {ours!r} of the model, one of them {key!r}; expected one.")
        renamed[ours] = tensor
    for name, layer in names.layers.items():
        if name in found:
            _layer_here(renamed, name, names, _scale_there(state, name, names))
        elif layer.offset_conv is not None:
            _check_both(renamed, name, names)
        elif _keys(name)[0] in renamed:
            _check_layer(name, names, layer.modulated)
    for name in _pools(names, renamed):
        _check_pool(name, names)
    if layout.transposed:
        _transpose(renamed, names, names.theirs)
    metadata: Any = getattr(state, "_metadata", {})
    renamed._metadata = {names.module(name): entry for name, entry in metadata.items()}
    return noted(renamed, model)


def back(state: Mapping[str, Tensor], layout: Layout, model: nn.Module) -> OrderedDict[str, Tensor]:
    """Our state_dict as theirs."""
    names = Names(model, layout)
    _check_distinct(names)
    _check_ours(state, names)
    changed = OrderedDict(state)
    for name, layer in names.layers.items():
        _check_layer(name, names, layer.modulated)
        if layer.offset_conv is not None:
            _layer_back(changed, name, names)
    for name in _pools(names, changed):
        _check_pool(name, names)
    if layout.transposed:
        _transpose(changed, names, names.theirs)
    renamed = ((names.back(key), tensor) for key, tensor in changed.items())
    return OrderedDict((key, tensor) for key, tensor in renamed if key is not None)


def _layer_here(state: dict[str, Tensor], name: str, names: Names, scale: float | None) -> None:
    """Give a layer's parameters, by our names already, the numbers that compute the same here.

    `scale` is of the masks there, None for the layer's own.
    """
    layer, layout = names.layers[name], names.layout
    weight, predictor, bias = _keys(name)
    found, expected = state[predictor], layer._predicted
    rows = len(found) if found.ndim else 0
    is_masked = layer.modulated and rows == expected.channels
    # What a file of v1 was computed with is v1's, in a layer of v2 as well.
    _check_layer(name, names, layer.modulated and rows != expected.offsets)
    if found.ndim != layer.rank + 2:
        raise ShapeError(
            f"{predictor!r} has shape {tuple(found.shape)}; expected {layer.rank + 2} axes, a convolution's weight."
        )
    if layout.grouped and found.shape[1] != layer.in_channels:
        found = _by_numpy(found, lambda array: dense(array, layer.in_channels, predictor, layer.groups))
    widened = layer.modulated and layer.mask_scale == 2 and rows == expected.offsets
    if rows != expected.channels and not widened:
        raise ShapeError(_wrong_channels(name, names, rows))
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
        state[weight] = _scaled(state[weight], (scale, layer.mask_scale), name, names)


def _layer_back(state: dict[str, Tensor], name: str, names: Names) -> None:
    """Give a layer's parameters, by our names yet, the numbers that compute the same there."""
    layer, layout = names.layers[name], names.layout
    weight, predictor, _ = _keys(name)
    _check_both(state, name, names, plain=False)
    if weight not in state or predictor not in state:
        return
    has_bias, expects_bias = getattr(layer, "bias", None) is not None, layout.biases[layer.modulated]
    if expects_bias not in (None, has_bias):
        raise ValueError(
            f"{_named(name)} has {'a' if has_bias else 'no'} bias, and v{1 + layer.modulated} of {layout.library} "
            f"{'always' if expects_bias else 'never'} has one. Build it with bias={expects_bias}."
        )
    if layout.grouped and layer.groups > 1:
        state[predictor] = _by_numpy(state[predictor], lambda array: grouped(array, layer.groups))
    if layer.modulated and layout.mask_scale is not None:
        state[weight] = _scaled(state[weight], (layer.mask_scale, layout.mask_scale), name, names)


def _scale_there(state: Mapping[str, Tensor], name: str, names: Names) -> float | None:
    """The scale of a layer's masks in a state_dict; None for the model's."""
    if names.layout.source != "deformconv":
        return names.layout.mask_scale
    recorded: float | None = getattr(state, "_metadata", {}).get(name, {}).get(RECORD)
    return recorded


def _keys(name: str) -> tuple[str, str, str]:
    """Our keys of a layer's weight, of its predictor's and of the predictor's bias."""
    prefix = f"{name}." if name else ""
    return f"{prefix}weight", f"{prefix}offset_conv.weight", f"{prefix}offset_conv.bias"


def _by_numpy(tensor: Tensor, change: Callable[[Any], Any]) -> Tensor:
    """What a function of arrays makes of a tensor: of its dtype, and on its device."""
    values = tensor.detach().cpu()
    array = (values.float() if tensor.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    return torch.from_numpy(change(array)).to(tensor)


def _scaled(tensor: Tensor, scales: tuple[float, float], name: str, names: Names) -> Tensor:
    """A layer's weight with which masks of the second scale do what those of the first did, and from which it can come back."""
    first, second = scales
    if first == second:
        return tensor
    layer, key = names.layers[name], _keys(name)[0]
    if tensor.dtype not in _FLOATS:
        raise ValueError(
            f"{key!r} is {tensor.dtype}; expected a float type, since it makes up for the masks of other libraries."
        )
    for owner in names.owners(layer.weight):
        other = names.layers.get(owner)
        if other is None or not other.modulated or other.offset_conv is None or other.mask_scale != layer.mask_scale:
            raise ValueError(
                f"{_named(name)} shares its weight with {owner!r}, which has no masks of its scale; expected a weight of its "
                f"own, since it makes up for {names.layout.library}'s masks. Build the layer with "
                f"mask_scale={names.layout.mask_scale or 1.0:g}, which needs no arithmetic."
            )
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


def _pools(names: Names, state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in names.pools if any(key.startswith(f"{name}." if name else "") for key in state)]


def _check_pool(name: str, names: Names) -> None:
    """Raise for a pooling of boxes that computes something else there."""
    pool, layout = names.pools[name], names.layout
    if layout.mask_scale is None:
        return
    named = _named(name)
    if layout.pools is None:
        raise ValueError(f"{named} is a DeformRoIPool; {layout.library} has no pooling of boxes that predicts its offsets.")
    trunk, convention = layout.pools
    if pool.convention != convention:
        raise ValueError(
            f"{named} pools by convention={pool.convention!r} and {layout.library} by {convention!r}: other numbers. "
            f"Build it with convention={convention!r}."
        )
    if pool.modulated and pool.trunk != trunk:
        raise ValueError(
            f"{named} predicts with trunk={pool.trunk!r} and {layout.library} with {trunk!r}; neither gives the other. "
            f"Build it with trunk={trunk!r}."
        )
    if pool.modulated and pool.mask_scale != layout.mask_scale:
        raise ValueError(
            f"{named} has masks of {pool.mask_scale:g}*sigmoid and {layout.library} of {layout.mask_scale:g}*sigmoid, and no "
            f"weight that could make up for it: build it with mask_scale={layout.mask_scale!r}."
        )


def _check_layer(name: str, names: Names, modulated: bool) -> None:
    """Raise for a layer that cannot compute what the other library's does, of v2 if `modulated`."""
    layer, layout = names.layers[name], names.layout
    named, library = _named(name), layout.library
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
    boundary = layout.boundaries[modulated]
    if layer.boundary != boundary:
        raise ValueError(
            f"{named} has boundary={layer.boundary!r}, and {library} computes v{1 + modulated} with {boundary!r}: "
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
    if any(before != after for before, after in layer._pairs):
        raise ValueError(
            f"{named} has padding={layer.padding!r}, of two widths along an axis; {library} pads both sides of an axis alike."
        )
    if layer.offset_conv is not None:
        _check_predictor(named, layer, layout)


def _check_predictor(named: str, layer: Any, layout: Layout) -> None:
    """Raise for a predictor that looks elsewhere than the other library's."""
    predictor, ones = layer.offset_conv, (1,) * layer.rank
    if layout.dilated is None and layer.dilation != ones:
        raise ValueError(
            f"{named} has dilation={layer.dilation}; expected 1, since {layout.library}'s predictor has none: its offsets are "
            "of another size than such a layer's output."
        )
    padding = tuple(before for before, _ in layer._pairs)
    window = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": padding, "dilation": layer.dilation}
    if layout.dilated is False:
        window |= {"padding": tuple((size - 1) // 2 for size in layer.kernel_size), "dilation": ones}
    expected: dict[str, Any] = {**window, "groups": 1, "padding_mode": "zeros"}
    found = {word: getattr(predictor, word, None) for word in expected}
    if found != expected or not isinstance(getattr(predictor, "weight", None), Tensor):
        differing = ", ".join(f"{word}={value!r}" for word, value in found.items() if value != expected[word])
        given = ", ".join(map(str, window.values()))
        raise ValueError(
            f"{named} predicts by a {type(predictor).__name__} with {differing or 'no weight'}, and {layout.library} by "
            f"another convolution. Put that in its place first: `layer.offset_conv = torch.nn.Conv2d({layer.in_channels}, "
            f"{layer._predicted.channels}, {given})`."
        )
    if layout.guided and type(layer).forward is DeformConv2d.forward:
        raise ValueError(
            f"{named} predicts its offsets from its own input, and {layout.library}'s DCNv2Pack from another feature: the keys "
            "fit, and the outputs would not. Use a subclass whose forward(x, feature) returns "
            "super().forward(x, *self.offsets_and_mask(feature)); or, if yours is a ModulatedDeformConvPack, which has the "
            'same keys and predicts from its own input, pass "mmcv" for "basicsr".'
        )


def _check_distinct(names: Names) -> None:
    """Raise if the other library has one name for two parameters of the model."""
    if (clash := names.clash()) is not None:
        first, second, theirs = clash
        raise ValueError(
            f"{first!r} and {second!r} of `model` are both {theirs!r} by the names of {names.layout.library}; expected two "
            "names. Call one of the two modules otherwise."
        )


def _check_both(state: Mapping[str, Tensor], name: str, names: Names, *, plain: bool = True) -> None:
    """Raise if a state_dict, by our names, has a layer's predictor, and not the weight that makes up for its masks.

    `plain` allows a weight alone, which is a plain convolution's.
    """
    weight, predictor, _ = _keys(name)
    there = [key for key in (weight, predictor) if key in state]
    if names.layout.mask_scale is None or len(there) != 1 or (plain and there == [weight]):
        return
    missing = predictor if there == [weight] else weight
    raise ValueError(
        f"`state` has {there[0]!r}, by this library's name, and not {missing!r}; expected both, since the weight makes up for "
        "what multiplies the masks."
    )


def _check_wrapping(state: Mapping[str, Tensor], names: Names) -> None:
    """Raise if the names differ by what a wrapper of a whole model puts before them."""
    found = names.recognised(state, _unwrapped)
    if found:
        theirs = names.pair(found[0])[1]
        key = next(key for key in state if _unwrapped(bare(key)) == _unwrapped(bare(theirs)))
        raise ValueError(
            f"`state` has {key!r}, and for `model` that would be {theirs!r}: DataParallel, DistributedDataParallel and "
            "torch.compile put a word before names. Expected the same on both sides: remove it from the names, or pass the "
            "model within, `model.module` or `model._orig_mod`."
        )


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


def _check_source(state: Mapping[str, Tensor], layout: Layout, model: nn.Module, known: list[str]) -> None:
    """Raise if a state_dict has predictors, and not by this layout's names."""
    others = {
        other.source: [name for name in Names(model, other).recognised(state) if name not in known]
        for other in LAYOUTS.values()
        if other is not layout
    }
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


def _check_ours(state: Mapping[str, Tensor], names: Names) -> None:
    """Raise if a state_dict is not the model's."""
    missing = [key for key in names.theirs if key not in state]
    if missing and len(missing) == len(names.theirs):
        raise ValueError(
            f"`state` has none of the model's {len(missing)} tensors, as {missing[0]!r}; expected model.state_dict(). For a "
            "state_dict of another library pass `source`, not `to`."
        )
    _check_records(state, names.masked)


def _check_records(state: Mapping[str, Tensor], modules: Mapping[str, Any]) -> None:
    """Raise if a state_dict notes other masks than a module has."""
    metadata: Any = getattr(state, "_metadata", {})
    for name, module in modules.items():
        recorded = metadata.get(name, {}).get(RECORD, module.mask_scale)
        if recorded != module.mask_scale:
            raise ValueError(
                f"{_named(name)} has mask_scale={module.mask_scale:g}, and `state` is of one with {recorded:g}; expected the "
                "state_dict of `model`."
            )


def _wrong_channels(name: str, names: Names, rows: int) -> str:
    layer = names.layers[name]
    expected, groups = layer._predicted, layer.offset_groups or 1
    taps = expected.offsets // (2 * groups)
    text = (
        f"the predictor of {_named(name)} has {rows} channels in `state`; expected {expected.channels}: "
        f"{3 if layer.modulated else 2} x {taps} taps x {groups} offset group{'s' if groups > 1 else ''}."
    )
    for modulated in (False, True):
        each = (2 + modulated) * taps
        if rows % each == 0:
            text += f" {rows} is v{1 + modulated} with {rows // each} offset group{'s' if rows > each else ''}:"
            text += f" modulated={modulated}, offset_groups={rows // each}."
    return text


def _named(name: str) -> str:
    return f"layer {name!r} of `model`" if name else "`model`"
