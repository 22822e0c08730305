"""An array on a GPU with two of its axes exchanged, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["transpose"]


@triton.jit
def transpose(from_ptr, to_ptr, A, B, INDEX: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr):
    """(N, A, B) as (N, B, A)."""
    of_a, of_b = tl.cdiv(A, BA), tl.cdiv(B, BB)
    block = tl.program_id(0)  # all along one axis of the grid, since others end at 65,535
    a = block % of_a * BA + tl.arange(0, BA)
    b = block // of_a % of_b * BB + tl.arange(0, BB)
    image = (block // of_a // of_b).to(INDEX) * A * B
    there = (a < A)[:, None] & (b < B)[None, :]
    value = tl.load(from_ptr + image + a.to(INDEX)[:, None] * B + b[None, :], mask=there, other=0.0)
    tl.store(to_ptr + image + b.to(INDEX)[None, :] * A + a[:, None], value, mask=there)
