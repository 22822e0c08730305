"""Products of float32 matrices on a GPU that multiplies in TF32 many times faster than in float32.

Where PyTorch's products may be rounded to TF32 they are its own; where they may not, a kernel of ours makes three products of
TF32 of each, whose sum is as exact as float32's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from deformconv.runtime import toolchain

__all__ = ["multiply", "pays"]

Tensor = Any

# Compute capabilities on which it was measured to be faster. Many others do TF32 no more than twice as fast as float32.
_CAPABILITIES = ((9, 0),)
_TILE, _STAGES = {"BM": 64, "BN": 64, "BK": 32}, 3
_WIDE = 2**31  # from so many numbers on elements are counted in 64 bits
# Where tiles are few and sums long, several programs share out a tile's sums, and what they have is added up in their order.
_PROGRAMS, _SHARE = 264, 512  # so many programs are enough; the least numbers that one sums up


def pays(dtype: str, device: str, depth: int, across: int) -> bool:
    """Whether (M, G, depth) times (G, depth, across), group by group, is to be made here and not by PyTorch."""
    enough = across >= _TILE["BN"] and depth >= 2 * _TILE["BK"] and depth % _TILE["BK"] == 0
    return dtype == "float32" and enough and _is_fast(device) and not _allows_tf32()


@cache
def _is_fast(device: str) -> bool:
    import torch

    if toolchain.is_interpreted() or not device.startswith("cuda") or torch.version.hip is not None:
        return False
    # Asked first: beside fake tensors there may be no such GPU, and whatever asks for a capability starts CUDA.
    index = int(device.partition(":")[2] or 0)
    there = torch.cuda.is_available() and index < torch.cuda.device_count()
    return there and torch.cuda.get_device_capability(device) in _CAPABILITIES


def _allows_tf32() -> bool:
    """Whether PyTorch's products of float32 may be rounded to TF32 now."""
    import torch

    matmul = torch.backends.cuda.matmul
    # After the newer setting was used, PyTorch raises where the older one is read.
    allowed: bool = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return allowed


@cache
def _kernel() -> Any:
    """The kernel, which loads Triton: the first call does it."""
    from deformconv.runtime.triton_product import multiply

    return multiply


def multiply(left: Tensor, right: Tensor, bias: Tensor | None, to: Tensor) -> None:
    """Write left (M, G, K) times right (G, N, K) plus bias (G*N) into `to` (M, G, N), group by group; all of float32.

    Rows of `left` and `to` may lie apart, numbers of a row may not; `right` is contiguous.
    """
    import torch
    import triton.language as tl

    (M, G, K), N = left.shape, right.shape[1]
    parts = _parts((M, G, K, N))
    share = _share(K, parts)
    sums = to[None] if parts == 1 else to.new_empty(parts, M, G, N)
    index = tl.int32 if max(left.stride(0) * M, to.stride(0) * M, right.numel(), sums.numel()) < _WIDE else tl.int64
    _kernel()[-(-M // _TILE["BM"]) * -(-N // _TILE["BN"]), G, parts](
        left, right, left if bias is None else bias, sums, M, N, K, share, left.stride(1), left.stride(0), right.stride(0),
        sums.stride(2), sums.stride(1), BIASED=bias is not None, INDEX=index, **_TILE, num_warps=4, num_stages=_STAGES,
    )  # fmt: skip
    if parts > 1:
        torch.sum(sums, dim=0, out=to)


def _parts(shape: tuple[int, int, int, int]) -> int:
    """Among how many programs a tile's sums are shared out; `shape` is M, G, K, N."""
    rows, groups, depth, across = shape
    tiles = groups * -(-rows // _TILE["BM"]) * -(-across // _TILE["BN"])
    parts = max(1, min(_PROGRAMS // tiles, depth // _SHARE))
    return -(-depth // _share(depth, parts))  # without parts that would have nothing


def _share(depth: int, parts: int) -> int:
    """How many numbers of a sum a program adds up, of one that is shared out among so many."""
    return -(-depth // (parts * _TILE["BK"])) * _TILE["BK"]
