"""What predictors of offsets and masks have in common: they begin as zeros, and want their layer's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from deformconv.torch import modes
from deformconv.torch.tensors import HALF, check_tensor, dtype_name

__all__ = ["Predictor", "VectorPredictor", "check_dtype", "project"]


class Predictor(nn.Module):
    """The last layer before offsets and masks."""

    is_slow = False  # whether `parameter_groups` gives it a smaller learning rate

    def reset_parameters(self) -> None:
        """Begin again with offsets 0 and masks halfway."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class VectorPredictor(Predictor):
    """An nn.Linear of zeros which is none, nor named so, as `conv.modules.OffsetPredictor` is no nn.ConvNd."""

    def __init__(self, in_features: int, out_features: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def project(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear in float32 or float64. For tracers that record calls of functions it is one, as `conv.modules` has it."""
    if has_torch_function((input, weight)):
        result: Tensor = handle_torch_function(project, (input, weight), input, weight, bias)
        return result
    if weight.dtype in HALF or input.dtype in HALF or modes.autocast(input.device.type):
        whole = (tensor.float() if tensor.dtype in HALF else tensor for tensor in (input, weight, bias))
        with modes.without_autocast(input.device.type):
            return F.linear(*whole)
    return F.linear(input, weight, bias)


def check_dtype(layer: nn.Module, name: str, input: Any) -> None:
    """Say in the operator's words what F.linear would say in its own."""
    if modes.compiling():  # PyTorch's compiler of 2.4 does not read what follows
        return
    if not has_torch_function((input,)):  # a tracer's stand-in for a tensor has one
        check_tensor(name, input)
    weight = next(layer.parameters(), None)
    if modes.any_autocast() or not isinstance(input, Tensor) or weight is None or input.dtype is weight.dtype:
        return
    dtypes = f"`{name}` is {dtype_name(input.dtype)} and this layer's parameters are {dtype_name(weight.dtype)}"
    if not input.dtype.is_floating_point:
        raise TypeError(f"{dtypes}; expected one floating-point dtype: cast `{name}` by `{name}.to({weight.dtype})`.")
    raise TypeError(f"{dtypes}; expected one dtype: cast `{name}`, or the layer by `layer.to({input.dtype})`.")
