"""PyTorch's tensors with their channels last, and back: a kernel turns them, in a fraction of the time that PyTorch takes."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

__all__ = ["formed", "rows"]

Tensor = Any


@cache
def _kernels() -> Any:
    """The kernel's module, which loads Triton: the first call does it."""
    from deformconv.runtime import triton_turned

    return triton_turned


def rows(tensor: Tensor) -> Tensor:
    """The tensor with its second axis last, in memory too."""
    N, A, *others = tensor.shape
    if not tensor.is_contiguous() or min(tensor.shape) == 0 or 1 in (A, prod(others)):
        return tensor.movedim(1, -1).contiguous()
    found = tensor.new_empty(N, *others, A)
    _transpose(tensor, found, N, A, prod(others))
    return found


def formed(rows: Tensor, like: Tensor) -> Tensor:
    """The tensor with its last axis as the second, in the dtype of `like`; in memory it stays last if that of `like` is."""
    import torch
    from torch._prims_common import suggest_memory_format

    if suggest_memory_format(like) is not torch.contiguous_format:
        return rows.to(like.dtype).movedim(-1, 1)
    N, *others, A = rows.shape
    if not rows.is_contiguous() or min(rows.shape) == 0 or 1 in (A, prod(others)):
        return rows.to(like.dtype).movedim(-1, 1).contiguous()
    planes = rows.new_empty(N, A, *others, dtype=like.dtype)
    _transpose(rows, planes, N, prod(others), A)
    return planes


def _transpose(given: Tensor, to: Tensor, N: int, A: int, B: int) -> None:
    """Write (N, A, B) as (N, B, A)."""
    import triton.language as tl

    index = tl.int32 if given.numel() < 2**31 else tl.int64
    _kernels().transpose[(N * -(-A // 64) * -(-B // 64),)](given, to, A, B, INDEX=index, BA=64, BB=64, num_warps=4)
