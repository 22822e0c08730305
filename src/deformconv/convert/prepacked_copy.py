"""A copy of a model for inference, whose deformable layers have packed their weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["prepack"]


def prepack(model: nn.Module) -> nn.Module:
    """Return a copy of a model for inference, whose deformable layers pack their weights once, and not at each call.

    Each `DeformConv1d`, `DeformConv2d` and `DeformConv3d` becomes a `deformconv.torch.PrepackedDeformConv`, as its `prepack()`
    makes one: outputs have the same bits, and state_dicts the same keys. Subclasses stay as they are. The model is left as it
    was, and shares nothing with the copy; train the model on, and prepack it again.

    Args:
        model: any module, in evaluation mode.

    Returns:
        The copy, or the new layer where `model` itself is one to replace.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: it is in training mode, has no such layer, or one whose weight is computed from other parameters.

    Example:
        >>> import torch
        >>> from deformconv.convert import prepack
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(DeformConv2d(3, 64, 3, padding=1), torch.nn.ReLU()).eval()
        >>> packed, x = prepack(net), torch.rand(1, 3, 56, 56)
        >>> with torch.inference_mode():
        ...     torch.equal(packed(x), net(x))
        True
    """
    import deformconv.torch

    # isort: split
    from deformconv.torch import surgery

    surgery.check_model(model)
    kinds = deformconv.torch.DeformConv1d, deformconv.torch.DeformConv2d, deformconv.torch.DeformConv3d
    if model.training:
        raise ValueError(
            "`model` is in training mode; expected evaluation mode, as prepacked layers do not train: model.eval()."
        )
    if not any(type(module) in kinds for module in model.modules()):
        raise ValueError(
            "`model` has no DeformConv1d, DeformConv2d or DeformConv3d to prepack; expected one at least. For layers of other "
            "libraries call deformconv.convert.replace_layers(model) first."
        )
    for name, module in model.named_modules():
        if isinstance(module, kinds):  # those with parametrizations are of subclasses
            surgery.check_plain(name, module)

    def replacement(module: nn.Module) -> nn.Module | None:
        if type(module) not in kinds:
            return None
        return surgery.like(module.eval(), deformconv.torch.PrepackedDeformConv(module))

    return surgery.replace(copy.deepcopy(model), replacement)
