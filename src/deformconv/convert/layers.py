"""Deformable layers of torchvision, mmcv and kornia in a PyTorch model, replaced by ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["as_ours", "predictor_of", "replace_layers"]


def replace_layers(model: nn.Module) -> nn.Module:
    """Replace every deformable layer of torchvision, mmcv and kornia in a model by this library's.

    The layers keep their parameters (the very same objects, so that an optimizer goes on), names, hooks and
    training mode; outputs stay the same within rounding. Replaced are

    - torchvision.ops.DeformConv2d;
    - mmcv.ops.DeformConv2d, DeformConv2dPack, ModulatedDeformConv2d and ModulatedDeformConv2dPack;
    - kornia's DeformableConv2d, of ALIKED;
    - what `to_torchvision` makes of this library's layers;

    not their subclasses, whose `forward` may be another: for torchvision's subclasses there is
    `accelerate_torchvision`. Predictors of offsets are called `offset_conv` afterwards.

    Args:
        model: any module; it is changed in place.

    Returns:
        The model, or the new layer where `model` itself is one to replace.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: a layer to replace has a parametrization or is pruned; the model is left as it was.

    Example:
        >>> import torch, torchvision
        >>> from deformconv.convert import replace_layers
        >>> layer = torchvision.ops.DeformConv2d(4, 6, 3, padding=1)
        >>> x, offset = torch.rand(2, 4, 9, 9), torch.randn(2, 18, 9, 9)
        >>> expected = layer(x, offset)
        >>> ours = replace_layers(layer)
        >>> type(ours).__module__, torch.allclose(ours(x, offset), expected, atol=1e-4)
        ('deformconv.torch.conv.modules', True)
    """
    import deformconv.torch  # noqa: F401  (it says what to install where PyTorch is missing)

    # isort: split
    from deformconv.torch import surgery

    surgery.check_model(model)
    for name, module in model.named_modules():
        if _conversion(module) is not None:
            surgery.check_plain(name, module)

    def replacement(module: nn.Module) -> nn.Module | None:
        convert = _conversion(module)
        if convert is None:
            return None
        ours, predictor = convert(module), predictor_of(module)
        if predictor is not None and ours.offset_conv is not predictor:
            surgery.like(predictor, ours.offset_conv)
        return surgery.like(module, ours)

    return surgery.replace(model, replacement)


def as_ours(layer: nn.Module) -> nn.Module | None:
    """This library's layer with the parameters of another library's, or None for what is no such layer.

    For who looks at layers without replacing them, which nothing here changes: subclasses of torchvision's layer are taken as
    well, and a weight that is computed from other parameters becomes a parameter that holds it.
    """
    import sys

    convert = _conversion(layer)
    module: Any = sys.modules.get("torchvision.ops")
    if convert is None and module is not None and isinstance(layer, module.DeformConv2d):
        convert = _torchvision
    ours: nn.Module | None = None if convert is None else convert(layer)
    return ours


def predictor_of(layer: Any) -> nn.Module | None:
    """What predicts the offsets of a deformable layer of another library; None if they are passed to it."""
    found = getattr(layer, "conv_offset", None)
    predictor: nn.Module | None = getattr(layer, "offset_conv", None) if found is None else found
    return predictor if _conversion(layer) is not None else None


def _conversion(module: nn.Module) -> Callable[[Any], Any] | None:
    from torch.nn.utils import parametrize

    # A parametrization makes a subclass of the module's class.
    kind = type(module).__mro__[parametrize.is_parametrized(module)]
    return _CONVERSIONS.get((kind.__module__, kind.__qualname__))


def _layer(
    theirs: Any, weight: Any, bias: Any, offset_groups: int | None, offset_conv: Any = None, **keywords: Any
) -> nn.Module:
    """Our layer with these parameters; its sizes and its window are read from the other layer."""
    from deformconv.torch import DeformConv2d

    groups = theirs.groups
    ours: Any = keywords.pop("kind", DeformConv2d)(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        theirs.stride,
        keywords.pop("padding", theirs.padding),
        theirs.dilation,
        groups,
        bias is not None,
        device="meta",
        offset_groups=offset_groups,
        predict_offsets=offset_conv is not None,
        **keywords,
    )
    ours.weight, ours.bias = _parameter(weight), _parameter(bias)
    if offset_conv is not None and not _is_predictor(offset_conv, ours.offset_conv):
        ours.offset_conv = offset_conv
    elif offset_conv is not None:
        ours.offset_conv.weight, ours.offset_conv.bias = _parameter(offset_conv.weight), _parameter(offset_conv.bias)
    result: nn.Module = ours
    return result


def _parameter(value: Any) -> Any:
    """A parameter as it is; what a parametrization computed, which `as_ours` alone meets, as a parameter of that value."""
    from torch import nn

    return value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), requires_grad=False)


def _is_predictor(theirs: Any, ours: Any) -> bool:
    """Whether a module computes what our predictor does with its weights: a convolution over the layer's window."""
    from torch import nn

    if type(theirs) is not nn.Conv2d and type(theirs).__name__ != "HalfConv2d":
        return False
    return all(getattr(theirs, name) == getattr(ours, name) for name in ("kernel_size", "stride", "padding", "dilation"))


def _torchvision(theirs: Any) -> nn.Module:
    return _layer(theirs, theirs.weight, theirs.bias, None)


def _predicting(theirs: Any) -> nn.Module:
    layer, pad = theirs.deform_conv, theirs.pad
    window: dict[str, Any] = {}
    if pad is not None:
        left, right, top, bottom = pad.padding
        window = {"padding": ((top, bottom), (left, right)), "padding_mode": theirs.padding_mode}
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    offset_groups = None if theirs.offset_conv is None else theirs.offset_channels // (2 * taps)
    return _layer(
        layer, layer.weight, layer.bias, offset_groups, theirs.offset_conv,
        modulated=theirs.modulated, mask_scale=theirs.mask_scale, max_offset=theirs.max_offset, **window,
    )  # fmt: skip


def _mmcv(theirs: Any) -> nn.Module:
    modulated = type(theirs).__name__.startswith("Modulated")
    bias = getattr(theirs, "bias", None)
    return _layer(
        theirs, theirs.weight, bias if bias is not False else None, theirs.deform_groups, predictor_of(theirs),
        modulated=modulated, mask_scale=1.0,
    )  # fmt: skip


def _kornia(theirs: Any) -> nn.Module:
    from deformconv.convert.kornia import KorniaDeformConv2d

    convolution = theirs.regular_conv
    return _layer(
        convolution, convolution.weight, convolution.bias, 1, theirs.offset_conv,
        kind=KorniaDeformConv2d, modulated=theirs.mask, mask_scale=1.0,
    )  # fmt: skip


_CONVERSIONS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("torchvision.ops.deform_conv", "DeformConv2d"): _torchvision,
    ("deformconv.convert.torchvision_modules", "HalfDeformConv2d"): _torchvision,
    ("deformconv.convert.torchvision_modules", "PredictingDeformConv2d"): _predicting,
    ("mmcv.ops.deform_conv", "DeformConv2d"): _mmcv,
    ("mmcv.ops.deform_conv", "DeformConv2dPack"): _mmcv,
    ("mmcv.ops.modulated_deform_conv", "ModulatedDeformConv2d"): _mmcv,
    ("mmcv.ops.modulated_deform_conv", "ModulatedDeformConv2dPack"): _mmcv,
    ("kornia.feature.aliked.aliked", "DeformableConv2d"): _kornia,
}
