"""Activations inside kernels, a vector of numbers at a time; the C library's exponential takes one number a call."""

from __future__ import annotations

from math import e, factorial, log2
from typing import Any, NamedTuple

from llvmlite import ir

from deformconv.runtime.cache import as_written
from deformconv.runtime.simd import Lanes, call_vector, emits, for_positions

__all__ = ["scale_sigmoid"]


class _Format(NamedTuple):
    """What an exponential needs to know of a floating-point format."""

    integer: Any  # of the same size
    mantissa: int  # bits
    bias: int  # of the exponent
    degree: int  # of the polynomial that is exact to the last bits within log(2)/2 of 0
    log2_high: float  # the first bits of log(2), few enough that their products with an exponent are exact
    log2_low: float  # and the rest
    limit: float  # e**limit and e**-limit are normal numbers


_SINGLE = _Format(ir.IntType(32), 23, 127, 7, 355 / 512, -2.12194440054690583e-4, 87.0)
_DOUBLE = _Format(ir.IntType(64), 52, 1023, 13, 0.693145751953125, 1.42860682030941723e-6, 708.0)


def _exp(do: Lanes, x: Any, form: _Format) -> Any:
    """e**x for numbers within the format's limit: 2**n * e**r with x = n*log(2) + r."""
    builder = do.builder
    add, times = builder.fadd, builder.fmul
    n = call_vector(builder, "llvm.floor", add(times(x, do.constant(log2(e))), do.constant(0.5)))
    r = add(add(x, times(n, do.constant(-form.log2_high))), times(n, do.constant(-form.log2_low)))
    total = do.constant(1 / factorial(form.degree))
    for k in range(form.degree - 1, -1, -1):
        total = add(times(total, r), do.constant(1 / factorial(k)))
    whole = Lanes(builder, form.integer, do.width)
    exponent = builder.add(builder.fptosi(n, whole.type), whole.constant(form.bias))
    power = builder.bitcast(builder.shl(exponent, whole.constant(form.mantissa)), do.type)
    return times(total, power)


@as_written
def scale_sigmoid(array, start, count, gain, slope, shift):
    """array[i] = gain * sigmoid(slope * array[i]) + shift for `count` numbers from `start` on; NaN stays NaN.

    2*a*sigmoid(2*x/a) - a is a*tanh(x/a).
    """
    real = array.dtype.type
    _scale_sigmoid(array, start, count, real(gain), real(slope), real(shift))


@emits
def _scale_sigmoid(builder, scalar, array, start, count, gain, slope, shift):
    form = _SINGLE if isinstance(scalar, ir.FloatType) else _DOUBLE

    def step(do, t):
        place = builder.add(start, t)
        given = do.load(array, place)
        x = builder.fmul(given, do.spread(slope))
        high, low = do.constant(form.limit), do.constant(-form.limit)
        above, below = builder.fcmp_ordered(">", x, high), builder.fcmp_ordered("<", x, low)
        none = builder.fcmp_unordered("uno", x, x)
        inside = builder.select(above, high, builder.select(below, low, builder.select(none, do.zero, x)))
        one = do.constant(1.0)
        sigmoid = builder.fdiv(one, builder.fadd(one, _exp(do, builder.fneg(inside), form)))
        sigmoid = builder.select(below, do.zero, sigmoid)
        result = builder.fadd(builder.fmul(do.spread(gain), sigmoid), do.spread(shift))
        do.store(builder.select(none, given, result), array, place)

    for_positions(builder, scalar, count, step)
