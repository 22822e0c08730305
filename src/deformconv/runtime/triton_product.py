"""A product of float32 matrices by a GPU's TF32 units, as exact as float32: a kernel in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["multiply"]


@triton.jit(do_not_specialize=["M"])
def multiply(
    a_ptr, b_ptr, bias_ptr, c_ptr, M, N, K, share, a_group, a_row, b_group, c_group, c_row,
    BIASED: tl.constexpr, INDEX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """C[s, g, m, n] = bias[g, n] + sum of A[g, m, k] * B[g, n, k] over the `share` numbers k of part s; s = 0 has the bias.

    BK divides K and `share`, and k is each array's last axis in memory.

    Each number is split into one that TF32 holds and a rest, and three products of these are summed, so that what is lost is no
    more than float32 loses itself.
    """
    across = tl.cdiv(N, BN)
    group = tl.program_id(1).to(INDEX)
    m = tl.program_id(0) // across * BM + tl.arange(0, BM)
    n = tl.program_id(0) % across * BN + tl.arange(0, BN)
    is_m, is_n = m < M, n < N
    k = tl.arange(0, BK)
    a_at = a_ptr + group * a_group + m.to(INDEX)[:, None] * a_row + k[None, :]
    b_at = b_ptr + group * b_group + n.to(INDEX)[None, :] * K + k[:, None]
    sums = tl.zeros((BM, BN), tl.float32)
    part = tl.program_id(2)
    for start in range(part * share, tl.minimum(part * share + share, K), BK):
        a = tl.load(a_at + start, mask=is_m[:, None], other=0.0)
        b = tl.load(b_at + start, mask=is_n[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="tf32x3")
    if BIASED:
        sums += tl.load(bias_ptr + group * N + n, mask=n < tl.where(part == 0, N, 0), other=0.0)[None, :]
    c_at = c_ptr + group * c_group + (part.to(INDEX) * M + m)[:, None] * c_row + n[None, :]
    tl.store(c_at, sums, mask=is_m[:, None] & is_n[None, :])
