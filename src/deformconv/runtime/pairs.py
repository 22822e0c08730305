"""Pairs of bfloat16 in words of 32 bits, the first one low, and sums of their products in float32, as LLVM IR.

A pair are two numbers that are neighbours along the depth of a product. A processor with AVX512-BF16 multiplies both numbers of
a word with those of another one and adds the products to a sum in float32, for a whole vector of words in one instruction. That
takes what is subnormal for 0. Elsewhere the same is made of shifts and two multiply-adds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from deformconv.runtime import half

__all__ = ["WORD", "add_products", "are_in", "joined", "narrowed"]

WORD = ir.IntType(32)
_BITS = ir.IntType(16)
_LANES = 16  # of the instructions


def are_in(data: Any) -> bool:
    """Whether there are pairs at an address of an array's numbers."""
    return data.type.pointee == WORD


def add_products(builder: Any, a: Any, b: Any, total: Any, native: bool) -> Any:
    """`total` plus both products of the pairs of two vectors; `native` where the processor does that, for 16 lanes."""
    if native:
        # Newer LLVMs declare the pairs as numbers, and read this as well.
        return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, [total, a, b])
    for number in (_first, _second):
        product = builder.fmul(number(builder, a, total.type), number(builder, b, total.type), flags=("contract",))
        total = builder.fadd(product, total, flags=("contract",))
    return total


def _call(builder: Any, name: str, result: Any, values: list[Any]) -> Any:
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _first(builder: Any, words: Any, kind: Any) -> Any:
    return builder.bitcast(builder.shl(words, ir.Constant(words.type, [16] * words.type.count)), kind)


def _second(builder: Any, words: Any, kind: Any) -> Any:
    return builder.bitcast(builder.and_(words, ir.Constant(words.type, [0xFFFF0000] * words.type.count)), kind)


def narrowed(builder: Any, value: Any, native: bool) -> Any:
    """Float32 rounded to bfloat16 for a product, to the nearest, a tie to the even one; a NaN stays one.

    `native` where the processor rounds 16 lanes at once, and makes 0 of what is subnormal.
    """
    if not (native and isinstance(value.type, ir.VectorType) and value.type.count == _LANES):
        return half.narrowed(builder, value, _BITS, native)
    return _call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(_BITS, _LANES), [value])


def joined(builder: Any, numbers: Any, words: Any, second: Any) -> Any:
    """Words with the numbers as the second of pairs, whose first ones `words` have; or for a `second` of 0 as the first, and 0.

    The numbers are in bfloat16, one or a vector of them.
    """
    vector = isinstance(numbers.type, ir.VectorType)

    def all_(number: Any) -> Any:
        if not vector:
            return number
        one = builder.insert_element(ir.Constant(words.type, ir.Undefined), number, WORD(0))
        return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(WORD, words.type.count), None))

    shift = builder.shl(builder.trunc(second, WORD), WORD(4))
    kept = builder.sub(builder.shl(WORD(1), shift), WORD(1))
    moved = builder.shl(builder.zext(numbers, words.type), all_(shift))
    return builder.or_(builder.and_(words, all_(kept)), moved)
