"""MXNet's deformable layers and ours: names, the predictor's groups, the masks' scale, the boundary.

Two ways of naming are known. Gluon's blocks: `<name>.deformable_conv_weight` and `<name>.offset_weight` in the files of
`save_parameters`, with `_` for the point in the files of `export`. Symbols as in Deformable-ConvNets: `<name>_weight` and
`<name>_offset_weight`. Weights have the same layout in both libraries.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deformconv.convert.params_file import as_array, read_params
from deformconv.convert.predictor_groups import dense, grouped
from deformconv.errors import ShapeError
from deformconv.ops.conv.layer import layer_padding
from deformconv.ops.window import by, count
from deformconv.sampling.rule import check_boundary

if TYPE_CHECKING:
    from deformconv.torch import DeformConv2d

__all__ = ["layer_from_mxnet", "layer_to_mxnet", "load_mxnet", "mxnet_layers"]

Params = str | os.PathLike[str] | Mapping[str, Any]
BOUNDARY = {False: "inside", True: "zeros"}  # MXNet's rule, by whether the layer is modulated
GLUON_MASK_SCALE = 2.0  # its blocks' masks are 2*sigmoid
STYLES = ("gluon", "symbol")


class _Arrays(NamedTuple):
    """A layer's arrays; the predictor is dense, whatever its groups were."""

    weight: np.ndarray
    bias: np.ndarray | None
    offset_weight: np.ndarray
    offset_bias: np.ndarray | None
    modulated: bool
    offset_groups: int


def mxnet_layers(params: Params) -> list[str]:
    """List the names of the deformable layers in a .params file, or in a dict of arrays by name.

    Args:
        params: the file, or its arrays as `read_params` or `mx.nd.load` return them.

    Returns:
        The names, as `layer_from_mxnet` takes them, in the file's order; "" is a file of one block alone.

    Example:
        >>> import numpy as np
        >>> from deformconv.convert import mxnet_layers
        >>> mxnet_layers({"1.offset_weight": np.ones((18, 4, 3, 3)), "1.deformable_conv_weight": np.ones((8, 4, 3, 3))})
        ['1']
    """
    arrays = _read(params)
    names = [key[: -len("offset_weight")].rstrip("._") for key in arrays if key.endswith("offset_weight")]
    return [name for name in dict.fromkeys(names) if _keys(arrays, name)]


def layer_from_mxnet(
    params: Params,
    name: str = "",
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    modulated: bool | None = None,
    mask_scale: float = GLUON_MASK_SCALE,
    boundary: str | None = None,
) -> DeformConv2d:
    """Make a layer of `deformconv.torch` that computes what a deformable layer of MXNet computed.

    A .params file holds numbers alone: the window comes from the code that made the net. Channels, kernel and offset groups
    follow from the shapes. Where MXNet's predictor was a convolution with groups, the layer's is a dense one with zeros.

    Args:
        params: the file, or its arrays as `read_params` or `mx.nd.load` return them.
        name: the layer's name in it, one of `mxnet_layers(params)`.
        stride, padding, dilation, groups: as the MXNet layer's `strides`, `padding`, `dilation` and `groups`, or the symbol's
            `stride`, `pad`, `dilate` and `num_group`. The predictor must have had the same window.
        modulated: True is v2, False is v1; None decides by the number of predicted channels and raises if both are possible.
        mask_scale: masks were mask_scale*sigmoid: 2 in Gluon's block and in Deformable-ConvNets.
        boundary: the rule at the border; None is MXNet's own, "inside" for v1 and "zeros" for v2.

    Returns:
        A `deformconv.torch.DeformConv2d` of the arrays' dtype, on the CPU.

    Raises:
        ShapeError: the arrays do not fit each other or `groups`.
        ValueError: the file has no such layer, or is none of MXNet's; or v1 and v2 are both possible.

    Example:
        >>> import numpy as np
        >>> from deformconv.convert import layer_from_mxnet
        >>> shapes = {"offset_weight": (27, 4, 3, 3), "deformable_conv_weight": (8, 4, 3, 3)}
        >>> layer_from_mxnet({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, padding=1)
        DeformConv2d(
          4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False
          (offset_conv): OffsetPredictor(4, 27, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        )
    """
    from deformconv.torch import DeformConv2d  # which says what to install where PyTorch is missing

    # isort: split
    import torch

    found = _layer(_read(params), name, count("groups", groups), modulated, None)
    outputs, inputs, *kernel = found.weight.shape
    layer = DeformConv2d(
        inputs * groups, outputs, tuple(kernel), stride, padding, dilation, groups, found.bias is not None,
        dtype=torch.from_numpy(found.weight).dtype,
        modulated=found.modulated,
        offset_groups=found.offset_groups,
        mask_scale=mask_scale,
        boundary=_boundary(boundary, found.modulated),
    )  # fmt: skip
    _fill(layer, found, 1.0)
    return layer


def load_mxnet(
    layer: DeformConv2d,
    params: Params,
    name: str = "",
    *,
    mask_scale: float = GLUON_MASK_SCALE,
    boundary: str | None = None,
) -> None:
    """Load a deformable layer of MXNet into a layer of `deformconv.torch`, which then computes the same.

    Args:
        layer: a layer with the same window, groups and version; its `boundary` must be the MXNet layer's. If its
            `mask_scale` is another than MXNet's, its weight makes up for it.
        params, name, mask_scale, boundary: as for `layer_from_mxnet`.

    Raises:
        ShapeError: the arrays do not fit the layer.
        ValueError: the file has no such layer, or the two cannot compute the same.

    Example:
        >>> import numpy as np
        >>> from deformconv.convert import load_mxnet
        >>> from deformconv.torch import DeformConv2d
        >>> layer = DeformConv2d(4, 8, 3, padding=1, bias=False, modulated=False, boundary="inside")
        >>> old = {"res_offset_weight": np.zeros((18, 4, 3, 3)), "res_weight": np.ones((8, 4, 3, 3))}
        >>> load_mxnet(layer, old, "res")
        >>> bool((layer.weight == 1).all())
        True
    """
    _check_layer(layer)
    found = _layer(_read(params), name, layer.groups, layer.modulated, layer.offset_groups)
    _check_boundary(layer, boundary, "was computed")
    for kind, ours, theirs in (("weight", layer.weight, found.weight), ("bias", layer.bias, found.bias)):
        if theirs is not None and (ours is None or tuple(ours.shape) != theirs.shape):
            expected = "none, for a layer with bias=False" if ours is None else f"the layer's, {tuple(ours.shape)}"
            raise ShapeError(f"the {kind} of {name!r} has shape {theirs.shape}; expected {expected}.")
    _fill(layer, found, mask_scale / layer.mask_scale if layer.modulated else 1.0)


def layer_to_mxnet(
    layer: DeformConv2d,
    name: str = "",
    *,
    style: str = "gluon",
    mask_scale: float = GLUON_MASK_SCALE,
    boundary: str | None = None,
) -> dict[str, np.ndarray]:
    """Return a layer's arrays by the names that MXNet loads them by, for `write_params`.

    Args:
        layer: a `deformconv.torch.DeformConv2d` that predicts its offsets.
        name: the layer's name: in Gluon the place of the block, as "1" or "features.3"; with symbols the convolution's.
        style: "gluon" names them `<name>.deformable_conv_weight`, `<name>.offset_weight`, for `net.load_parameters`; the
            predictor has as many groups as the convolution, as in MXNet's block. "symbol" names them `<name>_weight`,
            `<name>_offset_weight`, as in Deformable-ConvNets; the predictor has one group.
        mask_scale: what MXNet multiplies the masks' sigmoid by: 2 in Gluon's block; the weight makes up for the difference.
        boundary: the rule of the MXNet layer: None is MXNet's own, "inside" for v1 and "zeros" for v2. It must be the layer's.

    Returns:
        The arrays by name, NumPy, of the layer's dtype; bfloat16, which NumPy has not, becomes float32.

    Raises:
        ValueError: MXNet's layer cannot compute what this one does.

    Example:
        >>> from deformconv.convert import layer_to_mxnet
        >>> from deformconv.torch import DeformConv2d
        >>> list(layer_to_mxnet(DeformConv2d(4, 8, 3), "1"))
        ['1.deformable_conv_weight', '1.deformable_conv_bias', '1.offset_weight', '1.offset_bias']
    """
    if style not in STYLES:
        raise ValueError(f"`style` is {style!r}; expected 'gluon' or 'symbol'.")
    predictor = _check_layer(layer)
    _check_boundary(layer, boundary, "will compute")
    groups = layer.groups if style == "gluon" else 1
    scale = layer.mask_scale / mask_scale if layer.modulated else 1.0
    arrays = {
        "deformable_conv_weight" if style == "gluon" else "weight": _numpy(layer.weight) * scale,
        "deformable_conv_bias" if style == "gluon" else "bias": None if layer.bias is None else _numpy(layer.bias),
        "offset_weight": grouped(_numpy(predictor.weight), groups),
        "offset_bias": None if predictor.bias is None else _numpy(predictor.bias),
    }
    separator = "" if not name else "." if style == "gluon" else "_"
    return {f"{name}{separator}{kind}": array for kind, array in arrays.items() if array is not None}


def _read(params: Params) -> dict[str, np.ndarray]:
    """The arrays by name, without the "arg:" that `export` and Module put before it."""
    arrays = params if isinstance(params, Mapping) else read_params(params)
    return {key.removeprefix("arg:"): as_array(value) for key, value in arrays.items()}


def _keys(arrays: dict[str, np.ndarray], name: str) -> dict[str, str]:
    """The names in the file of a layer's arrays, by what they are; empty if the file has no such layer."""
    for separator in (".", "_") if name else ("",):
        for main in ("deformable_conv_", ""):
            keys = {
                "weight": f"{name}{separator}{main}weight",
                "bias": f"{name}{separator}{main}bias",
                "offset_weight": f"{name}{separator}offset_weight",
                "offset_bias": f"{name}{separator}offset_bias",
            }
            if keys["weight"] in arrays and keys["offset_weight"] in arrays:
                return {kind: key for kind, key in keys.items() if key in arrays}
    return {}


def _layer(arrays: dict[str, np.ndarray], name: str, groups: int, modulated: bool | None, offset_groups: int | None) -> _Arrays:
    """Find a layer's arrays and check that they fit each other."""
    keys = _keys(arrays, name)
    if not keys:
        there = ", ".join(map(repr, mxnet_layers(arrays))) or "none"
        raise ValueError(f"`name` is {name!r}; expected one of the deformable layers in `params`: {there}.")
    found = {kind: arrays[key] for kind, key in keys.items()}
    weight, offset_weight = found["weight"], found["offset_weight"]
    for kind in ("weight", "offset_weight"):
        if found[kind].ndim != 4:
            raise ShapeError(f"{keys[kind]!r} has shape {found[kind].shape}; expected 4 axes: a 2-D layer's.")
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    if outputs % groups:
        raise ShapeError(f"`groups` is {groups}; expected a divisor of {outputs}, axis 0 of {keys['weight']!r} {weight.shape}.")
    if offset_weight.shape[2:] != weight.shape[2:]:
        raise ShapeError(
            f"{keys['offset_weight']!r} has a kernel of size {by(offset_weight.shape[2:])}; expected that "
            f"of {keys['weight']!r}, {by(weight.shape[2:])}: a layer of deformconv predicts its offsets over its own window."
        )
    taps = weight.shape[2] * weight.shape[3]
    version = _version(keys["offset_weight"], offset_weight.shape[0], taps, inputs, modulated, offset_groups)
    predictor = dense(offset_weight, inputs, keys["offset_weight"], groups)
    for kind, array in (("bias", weight), ("offset_bias", offset_weight)):
        if kind in found and found[kind].shape != (len(array),):
            expected = f"({len(array)},), one for each output channel"
            raise ShapeError(f"{keys[kind]!r} has shape {found[kind].shape}; expected {expected}.")
    return _Arrays(weight, found.get("bias"), predictor, found.get("offset_bias"), *version)


def _version(
    key: str, channels: int, taps: int, inputs: int, modulated: bool | None, offset_groups: int | None
) -> tuple[bool, int]:
    """Whether there are masks, and how many offset groups, from the number of predicted channels."""
    possible = [
        (masked, channels // ((2 + masked) * taps))
        for masked in (False, True)
        if channels and channels % ((2 + masked) * taps) == 0 and inputs % (channels // ((2 + masked) * taps)) == 0
    ]
    fitting = [(m, g) for m, g in possible if modulated in (None, m) and offset_groups in (None, g)]
    if len(fitting) == 1:
        return fitting[0]
    read = " or ".join(f"v{1 + m} with {g} offset group{'s' if g > 1 else ''}" for m, g in possible)
    if fitting:
        raise ValueError(f"{key!r} predicts {channels} channels, which is {read}: pass modulated=True for v2, False for v1.")
    wanted = "" if modulated is None else f"v{1 + modulated}"
    wanted += "" if offset_groups is None else f" with {offset_groups} offset group{'s' if offset_groups > 1 else ''}"
    raise ShapeError(
        f"{key!r} predicts {channels} channels{f', which is {read}' if read else ''}; expected "
        f"{wanted or 'v1 or v2'}: 2 (v1) or 3 (v2) x {taps} taps for each offset group, of which there are a divisor of "
        f"C_in = {inputs}."
    )


def _check_layer(layer: Any) -> Any:
    """Check that MXNet has such a layer, and return its predictor."""
    from deformconv.torch import DeformConv2d

    if not isinstance(layer, DeformConv2d):
        raise TypeError(f"`layer` is a {type(layer).__name__}; expected a deformconv.torch.DeformConv2d.")
    if layer.offset_conv is None:
        raise ValueError("`layer` predicts no offsets (predict_offsets=False); MXNet's deformable layers do.")
    if layer.max_offset is not None:
        raise ValueError(f"`layer` bounds its offsets (max_offset={layer.max_offset:g}); MXNet's deformable layers do not.")
    if layer.padding_mode != "zeros":
        raise ValueError(f"`layer` has padding_mode={layer.padding_mode!r}; MXNet's deformable layers have 'zeros'.")
    padding = layer_padding(layer.padding, layer.kernel_size, layer.stride, layer.dilation)
    if not padding.symmetric:
        amounts = ", ".join(f"{before} before and {after} after" for before, after in padding.pairs)
        raise ValueError(
            f"`layer` has padding={layer.padding!r}, which is {amounts}; MXNet's deformable layers pad by the same number "
            "on both sides of an axis."
        )
    for prefix, module in (("", layer), ("offset_conv.", layer.offset_conv)):
        for name in ("weight", "bias"):
            _check_is_parameter(module, name, prefix)
    return layer.offset_conv


def _check_is_parameter(module: Any, name: str, prefix: str) -> None:
    """Refuse a parameter that a hook computes before each call: reading it gives an old copy, and what is written is lost."""
    from torch.nn.utils import parametrize

    if name not in module._parameters and not parametrize.is_parametrized(module, name):
        raise ValueError(
            f"`layer` has a {prefix}{name} that is computed from other parameters, as the older weight_norm, spectral_norm and "
            "pruning do; expected a parameter. Make it one first: torch.nn.utils.remove_weight_norm, remove_spectral_norm, "
            "or torch.nn.utils.prune.remove."
        )


def _boundary(given: str | None, modulated: bool) -> str:
    if given is None:
        return BOUNDARY[modulated]
    check_boundary(given, ", or None for MXNet's own")
    return given


def _check_boundary(layer: DeformConv2d, given: str | None, verb: str) -> None:
    theirs = _boundary(given, layer.modulated)
    if layer.boundary != theirs:
        version = f"v{1 + layer.modulated}"
        raise ValueError(
            f"`layer` has boundary={layer.boundary!r} and MXNet's {version} {verb} with {theirs!r}; outputs at the border "
            f"would differ. Make the layer with boundary={theirs!r}, or pass boundary={layer.boundary!r} for a block of "
            "deformconv.gluon with that rule."
        )


def _fill(layer: Any, found: _Arrays, weight_scale: float) -> None:
    import torch

    weight = found.weight * found.weight.dtype.type(weight_scale)
    predictor = layer.offset_conv
    before = [(parameter, parameter.detach().clone()) for parameter in layer.parameters()]
    with torch.no_grad():
        for what, module, name, array in (
            ("weight", layer, "weight", weight),
            ("bias", layer, "bias", found.bias),
            ("offset_conv.weight", predictor, "weight", found.offset_weight),
            ("offset_conv.bias", predictor, "bias", found.offset_bias),
        ):
            try:
                _assign(module, name, array, what)
            except ValueError:
                for parameter, value in before:
                    parameter.copy_(value)
                raise


def _assign(module: Any, name: str, array: np.ndarray | None, what: str) -> None:
    """Write numbers, or zeros for None; where a parametrization computes the parameter, into what it computes it from."""
    import torch
    from torch.nn.utils import parametrize

    old = getattr(module, name)
    if old is None:
        return
    value = torch.zeros_like(old) if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(old, copy=True)
    if not parametrize.is_parametrized(module, name):
        old.copy_(value)
        return
    try:
        setattr(module, name, value)
        kept = torch.allclose(getattr(module, name), value, rtol=8 * torch.finfo(old.dtype).eps, atol=1e-7)
        error: Exception | None = None
    except (NotImplementedError, RuntimeError, ValueError) as raised:  # a parametrization without an inverse, or its own check
        kept, error = False, raised
    if not kept:
        kinds = " and ".join(type(step).__name__.lstrip("_") for step in module.parametrizations[name])
        raise ValueError(
            f"`layer` has a parametrization of {what}, {kinds}, that cannot hold MXNet's numbers, and is left as it was. "
            "Remove it first: torch.nn.utils.parametrize.remove_parametrizations."
        ) from error


def _numpy(parameter: Any) -> np.ndarray:
    return as_array(parameter).copy()
