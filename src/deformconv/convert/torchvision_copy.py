"""The way out by torchvision: a copy of a model with torchvision's deformable layers in the place of this library's."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

from deformconv.installation import import_for

__all__ = ["to_torchvision"]


def to_torchvision(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose deformable layers are torchvision's: the reverse of `replace_layers`.

    Every tool that knows `torchvision::deform_conv2d` takes the copy, as `torch.jit.script` does, whose files C++ programs
    load. Outputs are the same within rounding, for inputs with a batch axis. The model is left as it was, and shares nothing
    with the copy.

    A layer becomes a `PredictingDeformConv2d` of the plain modules `pad`, `offset_conv` and `deform_conv`, the last of which is
    torchvision.ops.DeformConv2d; a layer that needs nothing in front, as it predicts no offsets, becomes that layer itself.
    Names within the model, hooks, training mode and tied parameters are kept; parametrizations of these layers are computed,
    once, and the result is their parameter. Layers in half precision compute in float32 and round once.

    Args:
        model: any module.

    Returns:
        The copy, or the new layer where `model` itself is one of ours.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: a layer is none that torchvision has: one over 1 or 3 axes, with boundary="inside", prepacked, or of a
            subclass; or its weight is computed by a hook.
        ModuleNotFoundError: PyTorch or torchvision is not installed.

    Example:
        >>> import torch
        >>> from deformconv.convert import to_torchvision
        >>> from deformconv.torch import DeformConv2d
        >>> net, x = torch.nn.Sequential(DeformConv2d(3, 8, 3, padding=1), torch.nn.ReLU()), torch.rand(2, 3, 9, 9)
        >>> scripted = torch.jit.script(to_torchvision(net))        # scripted.save("net.pt") is for C++
        >>> torch.allclose(scripted(x), net(x), atol=1e-4)
        True
    """
    import deformconv.torch  # noqa: F401  (it says what to install where PyTorch is missing)

    # isort: split
    from deformconv.torch import PrepackedDeformConv, surgery

    import_for("to_torchvision", "torchvision", "torchvision")
    surgery.check_model(model)
    named = [(f"layer {name!r} of `model`" if name else "`model`", module) for name, module in model.named_modules()]
    layers = [(name, module) for name, module in named if isinstance(module, (*_kinds(), PrepackedDeformConv))]
    for name, layer in layers:
        _check(name, layer)
    # deepcopy looks here for what it has copied already, wherever in the model it is referred to.
    copies: dict[int, Any] = {}
    made = [pair for name, layer in layers for pair in _made(name, layer, copies)]
    copies.update((id(ours), theirs) for ours, theirs in made)
    for ours, theirs in made:  # now that there are all, since a hook may refer to the whole model
        _finish(ours, theirs, copies)
    return copy.deepcopy(model, copies)


def _kinds() -> tuple[Any, ...]:
    from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d

    return DeformConv1d, DeformConv2d, DeformConv3d


def _plain_type(module: nn.Module) -> type:
    """A module's class; a parametrization has made a subclass of it."""
    from torch.nn.utils import parametrize

    return type(module).__mro__[parametrize.is_parametrized(module)]


def _check(name: str, layer: Any) -> None:
    kind, (_, planar, _) = _plain_type(layer), _kinds()
    if layer.rank != 2:
        raise ValueError(f"{name} is a {kind.__name__}; expected a DeformConv2d, since torchvision has 2 spatial axes only.")
    if kind is not planar:
        raise ValueError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}; expected DeformConv2d itself, since a subclass may compute "
            "something else. Put a DeformConv2d or torchvision's layer in its place first."
        )
    if layer.boundary != "zeros":
        raise ValueError(f'{name} has boundary="{layer.boundary}"; expected "zeros", which is all that torchvision has.')


def _made(name: str, layer: Any, copies: dict[int, Any]) -> list[tuple[Any, Any]]:
    """A layer and its predictor with what stands for each."""
    from torch import nn
    from torchvision.ops import DeformConv2d

    from deformconv.convert.torchvision_modules import HalfConv2d, HalfDeformConv2d, PredictingDeformConv2d
    from deformconv.torch.tensors import HALF

    predictor, parameters = layer.offset_conv, _parameters(name, layer, copies)
    half = parameters["weight"].dtype in HALF
    pad, padding = _padding(layer)
    made = _filled(
        HalfDeformConv2d if half else DeformConv2d, parameters, layer.in_channels, layer.out_channels, layer.kernel_size,
        layer.stride, padding, layer.dilation, layer.groups,
    )  # fmt: skip
    if predictor is None and pad is None:
        return [(layer, made)]
    whole = PredictingDeformConv2d(
        pad, None, made.train(layer.training), padding_mode=layer.padding_mode, offset_channels=layer._predicted.offsets,
        modulated=layer.modulated, mask_scale=layer.mask_scale, max_offset=layer.max_offset,
    )  # fmt: skip
    if predictor is None or not _is_own(layer, predictor):
        return [(layer, whole)]
    whole.offset_conv = _filled(
        HalfConv2d if half else nn.Conv2d, _parameters(f"the offset_conv of {name}", predictor, copies),
        predictor.in_channels, predictor.out_channels, predictor.kernel_size, predictor.stride, predictor.padding,
        predictor.dilation,
    )  # fmt: skip
    return [(layer, whole), (predictor, whole.offset_conv)]


def _is_own(layer: Any, predictor: nn.Module) -> bool:
    """Whether a predictor is what the layer made, and not a module that somebody put in its place."""
    return _plain_type(predictor) is type(layer)._offset_convolution


def _padding(layer: Any) -> tuple[nn.Module | None, tuple[int, int]]:
    """What pads the input, if torchvision's layer cannot, and the padding of that layer."""
    from torch import nn

    (top, bottom), (left, right) = layer._pairs
    if (layer.padding_mode == "zeros" and (top, left) == (bottom, right)) or not any((top, bottom, left, right)):
        return None, (top, left)
    pads: dict[str, Any] = {
        "zeros": nn.ZeroPad2d, "reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "circular": nn.CircularPad2d,
    }  # fmt: skip
    return pads[layer.padding_mode]((left, right, top, bottom)), (0, 0)


def _parameters(name: str, module: Any, copies: dict[int, Any]) -> dict[str, Any]:
    """Copies of a module's weight and bias; of what a parametrization computes, the result."""
    from torch import Tensor, nn
    from torch.nn.utils import parametrize

    found: dict[str, Any] = {}
    for key in ("weight", "bias"):
        if key in module._parameters:
            found[key] = copy.deepcopy(module._parameters[key], copies)
        elif parametrize.is_parametrized(module, key):
            # In a copy, since a spectral norm changes its buffers whenever it is computed in training.
            value = getattr(copy.deepcopy(module), key)
            found[key] = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        elif isinstance(getattr(module, key, None), Tensor):
            raise ValueError(
                f"{name} has a {key} that a hook computes: weight_norm, spectral_norm or pruning of torch.nn.utils; expected a "
                "parameter or a parametrization. Remove that first (remove_weight_norm, remove_spectral_norm, prune.remove)."
            )
    return found


def _filled(kind: Any, parameters: dict[str, Any], *arguments: Any) -> Any:
    """A layer with these parameters, made without memory or random numbers for others."""
    import torch

    with torch.device("meta"):
        made = kind(*arguments, bias=parameters.get("bias") is not None)
    for key, parameter in parameters.items():
        setattr(made, key, parameter)
    return made


def _finish(ours: Any, theirs: Any, copies: dict[int, Any]) -> None:
    """Give theirs the mode of ours, and copies of its hooks and of a predictor that somebody made."""
    predictor = getattr(ours, "offset_conv", None)
    if predictor is not None and theirs.offset_conv is None:
        theirs.offset_conv = copy.deepcopy(predictor, copies)
    for name, value in vars(ours).items():
        if "_hooks" in name or name == "_is_full_backward_hook":
            setattr(theirs, name, copy.deepcopy(value, copies))
    theirs.training = ours.training
