"""A small call that `deformconv doctor` tries: its arrays, what a backend makes of them, and whether that is right."""

from __future__ import annotations

from typing import Any

import numpy as np

import deformconv
from deformconv.accuracy import TOLERANCE, error
from deformconv.ops.conv.operator import DEFORM_CONV
from deformconv.ops.conv.spec import ConvSpec, Operand, conv_spec
from deformconv.ops.operator import HALF

__all__ = ["gpu_values", "tiny_call", "torch_values", "values", "verdict"]

WINDOW: dict[str, Any] = {"stride": (1, 2), "padding": ((0, 0), (1, 1))}


def tiny_call(inputs: int = 4, outputs: int = 6) -> tuple[ConvSpec, dict[str, Any]]:
    """A small v2 call of two groups with nothing symmetric about it, and its arrays, for numbers of channels."""
    random = np.random.default_rng(0)
    shapes = {"input": (2, inputs, 6, 7), "offset": (2, 24, 5, 4), "weight": (outputs, inputs // 2, 2, 3), "bias": (outputs,)}
    shapes["mask"] = (2, 12, 5, 4)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    operands = {name: Operand(array.shape, str(array.dtype)) for name, array in arrays.items()}
    x, offset, weight, bias, mask = operands.values()
    return conv_spec(x, offset, weight, bias, mask, **WINDOW), arrays


def values(backend: str, arrays: dict[str, Any], grad_output: Any, backward: bool | None = None) -> dict[str, Any]:
    """The output, or the gradients, or both, by name."""
    found: dict[str, Any] = {}
    if backward is not True:
        found["output"] = deformconv.deform_conv(**arrays, **WINDOW, backend=backend)
    if backward is not False:
        gradients = deformconv.deform_conv_backward(grad_output, **arrays, **WINDOW, backend=backend)
        found.update(gradients._asdict())
    return found


def torch_values(tensors: dict[str, Any], grad_output: Any, backend: str | None = None) -> dict[str, Any]:
    """The output and the gradients of PyTorch's tensors, by name."""
    from deformconv.torch import deform_conv2d

    given = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    output = deform_conv2d(**given, **WINDOW, backend=backend)
    output.backward(grad_output)
    found = {"output": output, **{name: tensor.grad for name, tensor in given.items()}}
    return {name: tensor.detach().float().numpy(force=True) for name, tensor in found.items()}


def gpu_values(device: str, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The output and the gradients of a call on a GPU, and the reference's for the same numbers; positions stay float32."""
    import torch

    spec, arrays = tiny_call(32, 32)
    arrays["grad_output"] = np.random.default_rng(1).normal(size=spec.output_shape).astype(np.float32)
    precise = {argument.name for argument in DEFORM_CONV.arguments if argument.precise and dtype in HALF}
    tensors: dict[str, Any] = {
        name: torch.from_numpy(array).to(device, torch.float32 if name in precise else getattr(torch, dtype))
        for name, array in arrays.items()
    }
    rounded = {name: tensor.float().numpy(force=True) for name, tensor in tensors.items()}
    grad_output, grad_array = tensors.pop("grad_output"), rounded.pop("grad_output")
    return torch_values(tensors, grad_output, "gpu"), values("reference", rounded, grad_array)


def verdict(found: dict[str, Any], expected: dict[str, Any], dtype: str = "float32") -> str:
    """The largest error of several arrays, and whether the dtype that they were computed in explains it."""
    errors = {name: error(value, expected[name]) for name, value in found.items()}
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    limit = TOLERANCE[dtype]
    if errors[worst] <= limit:
        return f"ok, error {errors[worst]:.0e}"
    return f"FAILED: error {errors[worst]:.1e} in {worst}; {limit:.0e} is the most that rounding explains"
