"""An array on a GPU with two of its axes exchanged, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["transpose"]


@triton.jit
def transpose(
    from_ptr, to_ptr, A, B, INDEX: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr
):  # fmt: skip
    """(N, A, B) as (N, B, A)."""
    blocks = tl.cdiv(B, BB)
    image = (tl.program_id(0) // blocks).to(INDEX) * A * B
    b = tl.program_id(0) % blocks * BB + tl.arange(0, BB)
    a = tl.program_id(1) * BA + tl.arange(0, BA)
    there = (a < A)[:, None] & (b < B)[None, :]
    value = tl.load(from_ptr + image + a.to(INDEX)[:, None] * B + b[None, :], mask=there, other=0.0)
    tl.store(to_ptr + image + b.to(INDEX)[None, :] * A + a[:, None], value, mask=there)
