"""What a conversion refuses: layers that compute something else there, and state_dicts that are not what was said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from deformconv.convert.detectors import DIALECTS
from deformconv.convert.layouts import LAYOUTS
from deformconv.convert.layouts.layout import Layout
from deformconv.convert.names import Names, bare, keys_of, layer_named
from deformconv.torch import DeformConv2d
from deformconv.torch.loading import RECORD

__all__ = [
    "check_bias",
    "check_both",
    "check_dialect",
    "check_distinct",
    "check_layer",
    "check_ours",
    "check_own",
    "check_records",
    "check_source",
    "check_wrapping",
    "wrong_channels",
]


def check_layer(name: str, names: Names, modulated: bool) -> None:
    """Raise for a layer that cannot compute what the other library's does, of v2 if `modulated`."""
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


def check_bias(name: str, names: Names) -> None:
    """Raise for a layer with a bias where the other library's has none, or without one where it has one."""
    layer, layout = names.layers[name], names.layout
    has_bias, expects_bias = getattr(layer, "bias", None) is not None, layout.biases[layer.modulated]
    if expects_bias not in (None, has_bias):
        raise ValueError(
            f"{layer_named(name)} has {'a' if has_bias else 'no'} bias, and v{1 + layer.modulated} of {layout.library} "
            f"{'always' if expects_bias else 'never'} has one. Build it with bias={expects_bias}."
        )


def check_own(key: str, names: Names) -> None:
    """Raise if a weight that makes up for masks is also one of a module that has no masks of the same scale."""
    name, _, parameter = key.rpartition(".")
    layer = names.modules[name]
    scale = getattr(layer, "mask_scale", None)
    for owner in names.owners(getattr(layer, parameter)):
        other = names.layers.get(owner)
        is_masked = other is not None and other.modulated and other.offset_conv is not None and other.mask_scale == scale
        if owner != name and not is_masked:
            raise ValueError(
                f"{layer_named(name)} shares its weight with {owner!r}, which has no masks of its scale; expected a weight of "
                f"its own, since it makes up for {names.layout.library}'s masks. Build the layer with "
                f"mask_scale={names.layout.mask_scale or 1.0:g}, which needs no arithmetic."
            )


def check_distinct(names: Names) -> None:
    """Raise if the other library has one name for two parameters of the model."""
    if (clash := names.clash()) is not None:
        first, second, theirs = clash
        raise ValueError(
            f"{first!r} and {second!r} of `model` are both {theirs!r} by the names of {names.layout.library}; expected two "
            "names. Call one of the two modules otherwise."
        )


def check_both(state: Mapping[str, Tensor], name: str, names: Names, *, plain: bool = True) -> None:
    """Raise if a state_dict, by our names, has a layer's predictor, and not the weight that makes up for its masks.

    `plain` allows a weight alone, which is a plain convolution's.
    """
    weight, predictor, _ = keys_of(name)
    there = [key for key in (weight, predictor) if key in state]
    if names.layout.mask_scale is None or len(there) != 1 or (plain and there == [weight]):
        return
    missing = predictor if there == [weight] else weight
    raise ValueError(
        f"`state` has {there[0]!r}, by this library's name, and not {missing!r}; expected both, since the weight makes up for "
        "what multiplies the masks."
    )


def check_wrapping(state: Mapping[str, Tensor], names: Names) -> None:
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


def check_source(state: Mapping[str, Tensor], layout: Layout, model: nn.Module, known: list[str]) -> None:
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


def check_dialect(state: Mapping[str, Tensor], names: Names, model: nn.Module) -> None:
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


def check_ours(state: Mapping[str, Tensor], names: Names) -> None:
    """Raise if a state_dict is not the model's."""
    missing = [key for key in names.theirs if key not in state]
    if missing and len(missing) == len(names.theirs):
        raise ValueError(
            f"`state` has none of the model's {len(missing)} tensors, as {missing[0]!r}; expected model.state_dict(). For a "
            "state_dict of another library pass `source`, not `to`."
        )
    check_records(state, names.masked)


def check_records(state: Mapping[str, Tensor], modules: Mapping[str, Any]) -> None:
    """Raise if a state_dict notes other masks than a module has."""
    metadata: Any = getattr(state, "_metadata", {})
    for name, module in modules.items():
        recorded = metadata.get(name, {}).get(RECORD, module.mask_scale)
        if recorded != module.mask_scale:
            raise ValueError(
                f"{layer_named(name)} has mask_scale={module.mask_scale:g}, and `state` is of one with {recorded:g}; expected "
                "the state_dict of `model`."
            )


def wrong_channels(name: str, names: Names, rows: int) -> str:
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
