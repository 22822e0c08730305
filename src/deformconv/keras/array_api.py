"""The array-API standard's functions, as far as portable forms of operators ask for them, on Keras' tensors of any backend."""

from __future__ import annotations

from typing import Any

from keras import ops

__all__ = [
    "abs", "arange", "astype", "broadcast_to", "concat", "floor", "isnan", "matmul", "multiply", "permute_dims", "reshape",
    "shape", "take", "where", "zeros",
]  # fmt: skip

abs, broadcast_to, floor, isnan, matmul = ops.absolute, ops.broadcast_to, ops.floor, ops.isnan, ops.matmul
multiply, permute_dims, reshape, shape, take, where = ops.multiply, ops.transpose, ops.reshape, ops.shape, ops.take, ops.where
concat, zeros = ops.concatenate, ops.zeros


def arange(stop: Any) -> Any:
    """Whole numbers of 64 bits, as positions out of reach need them."""
    return ops.arange(stop, dtype="int64")


def astype(array: Any, dtype: Any, copy: bool = True) -> Any:
    return ops.cast(array, dtype)
