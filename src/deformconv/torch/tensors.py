"""Tensors as the checks and backends see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from deformconv.ops.operator import Operand, Operator

__all__ = [
    "HALF", "PLAIN", "array_of", "check_tensor", "check_tensors", "described", "device_of", "dtype_name", "in_dtype",
    "memory_format", "memory_of", "operand", "requires_grad", "tensor_of", "with_batch",
]  # fmt: skip

PLAIN = frozenset((Tensor, torch.nn.Parameter))  # a subclass may have functions of its own, or no memory
HALF = (torch.float16, torch.bfloat16)
_DTYPES = {getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "float64")}


def operand(tensor: Tensor) -> Operand:
    """What the checks need to know of a tensor."""
    return Operand(tuple(tensor.shape), dtype_name(tensor.dtype), device_of(tensor))


def described(operator: Operator, operands: Sequence[Tensor | None]) -> dict[str, Operand | None]:
    """What the checks need to know of an operator's operands, by name."""
    return {name: None if t is None else operand(t) for name, t in zip(operator.names, operands, strict=True)}


def dtype_name(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def device_of(tensor: Any) -> str:
    return "cpu" if tensor.is_cpu else str(tensor.device)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The memory format of what is computed from a tensor: what PyTorch's convolutions choose."""
    return suggest_memory_format(tensor)


def with_batch(tensor: Any) -> Any:
    return None if tensor is None else tensor[None]


def requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_dtype(dtype: str, tensor: Tensor | None) -> Tensor | None:
    """The tensor's numbers in the dtype that is computed in, without a graph."""
    return None if tensor is None else tensor.detach().to(getattr(torch, dtype))


def array_of(dtype: str, tensor: Tensor | None) -> np.ndarray | None:
    """The tensor's memory, or its numbers in the dtype that is computed in."""
    brought = in_dtype(dtype, tensor)
    if brought is None:
        return None
    array: np.ndarray = brought.numpy(force=True)
    return array


def memory_of(tensor: Tensor | None) -> np.ndarray | None:
    """The tensor's memory; that of bfloat16, which NumPy does not have, as its bits in uint16."""
    if tensor is None:
        return None
    if tensor.dtype is torch.bfloat16:
        bits: np.ndarray = tensor.detach().view(torch.int16).numpy(force=True).view(np.uint16)
        return bits
    array: np.ndarray = tensor.numpy(force=True)
    return array


def tensor_of(array: np.ndarray) -> Tensor:
    """The tensor of an array's memory, as `memory_of` has it."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def check_tensors(operator: Operator, **operands: Any) -> None:
    """Raise unless these are dense tensors; only optional arguments may be None."""
    for name, value in operands.items():
        if isinstance(value, Tensor):
            if value.is_nested:
                raise TypeError(f"`{name}` is a nested tensor; expected a dense one: `{name}.to_padded_tensor(0)`.")
            if value.layout is not torch.strided:
                raise TypeError(f"`{name}` has the layout {value.layout}; expected a dense tensor: `{name}.to_dense()`.")
        elif value is not None or name not in operator.optional:
            _raise_no_tensor(name, value, operands)


def check_tensor(name: str, value: Any) -> None:
    """Raise unless this is a tensor."""
    if not isinstance(value, Tensor):
        _raise_no_tensor(name, value, {})


def _raise_no_tensor(name: str, value: Any, operands: dict[str, Any]) -> NoReturn:
    tensors = [f"`{other}`" for other, operand in operands.items() if isinstance(operand, Tensor)]
    expected = "a PyTorch tensor" + (f", as {' and '.join(tensors)} are." if tensors else ".")
    if value is None:
        raise TypeError(f"`{name}` is None; expected {expected}")
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    convert = "from_numpy" if kind == "numpy.ndarray" else "as_tensor"
    raise TypeError(f"`{name}` is a {kind}; expected {expected} Pass `torch.{convert}({name})`.")
