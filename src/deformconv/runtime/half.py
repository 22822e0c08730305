"""Half precision in memory and float32 in registers: what turns one into the other, as LLVM IR.

Numba compiles no float16 and NumPy has no bfloat16, so kernels get their bits: float16 as an array of int16, bfloat16 as one of
uint16. In the IR an address says which of both it is, that of a `half` or that of an i16. Both directions take a number or a
vector of them. Narrowing rounds to the nearest, a tie to the even one; a NaN stays one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

__all__ = ["address", "is_half", "narrowed", "widened"]

_HALF, _BITS, _WORD, _FLOAT = ir.HalfType(), ir.IntType(16), ir.IntType(32), ir.FloatType()


def is_half(kind: Any) -> bool:
    """Whether arrays of this type of Numba's hold half precision."""
    return kind in (types.int16, types.uint16)


def address(builder: Any, kind: Any, data: Any) -> Any:
    """The address of an array's numbers, which says what they are; `kind` is their type."""
    return builder.bitcast(data, _HALF.as_pointer()) if kind == types.int16 else data


def widened(builder: Any, value: Any, native: bool) -> Any:
    """Half precision in float32; `native` where the processor converts float16 itself."""
    floats, words = _as(_FLOAT, value), _as(_WORD, value)
    if _element(value) == _BITS:
        return builder.bitcast(builder.shl(builder.zext(value, words), _all(words, 16)), floats)
    if native:
        return builder.fpext(value, floats)
    bits = builder.zext(builder.bitcast(value, _as(_BITS, value)), words)
    sign = builder.shl(builder.and_(bits, _all(words, 0x8000)), _all(words, 16))
    rest = builder.and_(bits, _all(words, 0x7FFF))
    moved = builder.shl(rest, _all(words, 13))
    usual = builder.add(moved, _all(words, (127 - 15) << 23))
    odd = builder.or_(moved, _all(words, 0xFF << 23))  # infinity and NaN
    tiny = builder.bitcast(builder.fmul(builder.uitofp(rest, floats), _all(floats, 2.0**-24)), words)  # subnormal
    found = builder.select(builder.icmp_unsigned(">=", rest, _all(words, 0x7C00)), odd, usual)
    found = builder.select(builder.icmp_unsigned("<", rest, _all(words, 0x0400)), tiny, found)
    return builder.bitcast(builder.or_(found, sign), floats)


def narrowed(builder: Any, value: Any, kind: Any, native: bool) -> Any:
    """Float32 in the half precision `kind`, an address's; `native` where the processor converts float16 itself."""
    if kind == _BITS:
        return _to_bfloat16(builder, value)
    halves = _as(_HALF, value)
    return builder.fptrunc(value, halves) if native else builder.bitcast(_to_float16(builder, value), halves)


def _to_bfloat16(builder: Any, value: Any) -> Any:
    words, short = _as(_WORD, value), _as(_BITS, value)
    bits = builder.bitcast(value, words)
    odd = builder.and_(builder.lshr(bits, _all(words, 16)), _all(words, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, _all(words, 0x7FFF)), odd), _all(words, 16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, _all(words, 0x7FC0), rounded), short)


def _to_float16(builder: Any, value: Any) -> Any:
    """The bits of float16, where no instruction makes them."""
    words, floats = _as(_WORD, value), _as(_FLOAT, value)
    bits = builder.bitcast(value, words)
    size = builder.and_(bits, _all(words, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, _all(words, 13)), _all(words, 1))
    usual = builder.add(builder.add(size, _all(words, 0xFFF - ((127 - 15) << 23) & 0xFFFFFFFF)), odd)
    usual = builder.lshr(usual, _all(words, 13))
    # Beside 0.5, whose last bit is worth float16's smallest number, the processor's own addition rounds.
    sum_ = builder.fadd(builder.bitcast(size, floats), _all(floats, 0.5))
    tiny = builder.sub(builder.bitcast(sum_, words), _all(words, 126 << 23))
    large = builder.select(
        builder.icmp_unsigned(">", size, _all(words, 0xFF << 23)), _all(words, 0x7E00), _all(words, 0x7C00)
    )  # fmt: skip
    found = builder.select(builder.icmp_unsigned("<", size, _all(words, (127 - 14) << 23)), tiny, usual)
    found = builder.select(builder.icmp_unsigned(">=", size, _all(words, (127 + 16) << 23)), large, found)
    sign = builder.and_(builder.lshr(bits, _all(words, 16)), _all(words, 0x8000))
    return builder.trunc(builder.or_(found, sign), _as(_BITS, value))


def _element(value: Any) -> Any:
    return value.type.element if isinstance(value.type, ir.VectorType) else value.type


def _as(kind: Any, value: Any) -> Any:
    """The type of as many numbers of `kind` as `value` has."""
    return ir.VectorType(kind, value.type.count) if isinstance(value.type, ir.VectorType) else kind


def _all(kind: Any, number: float) -> Any:
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)
