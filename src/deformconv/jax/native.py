"""JAX's own operations as a backend: the portable form of an operator, which JAX differentiates to any order.

Each function is one program where nobody compiles it as part of a larger one. Arrays are those of the arguments that were
given, in the operator's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.interpreters import ad

from deformconv import dispatch
from deformconv.ops.operator import Operator, Spec

__all__ = ["derivative", "gradients", "in_", "jvp", "output"]

Array = Any


@partial(jax.jit, static_argnames=("operator", "spec"))
def output(*arrays: Array, operator: Operator, spec: Spec) -> Array:
    """The output, in the dtype that the portable form computes in, then back."""
    return _output(operator, spec, dict(zip(spec.shapes, arrays, strict=True)))


@partial(jax.jit, static_argnames=("operator", "spec", "moved"))
def derivative(*arrays: Array, operator: Operator, spec: Spec, moved: tuple[str, ...]) -> Array:
    """The output's derivative in the direction of the tangents of what is moved, which stand behind the operands."""
    number = len(spec.shapes)
    function, operands = _as_function_of(moved, operator, spec, dict(zip(spec.shapes, arrays[:number], strict=True)))
    return jax.jvp(function, operands, arrays[number:])[1]


@partial(jax.jit, static_argnames=("operator", "spec", "wanted"))
def gradients(grad_output: Array, *arrays: Array, operator: Operator, spec: Spec, wanted: tuple[str, ...]) -> list[Array]:
    """The wanted gradients; `arrays` are those that gradients depend on."""
    found = {
        argument.name: argument.gradient(grad_output)
        for argument in operator.arguments
        if argument.gradient is not None and argument.name in wanted
    }
    others = [name for name in wanted if name not in found]
    if others:
        call = dict(zip(operator.given_in_backward(spec), arrays, strict=True))
        function, operands = _as_function_of(others, operator, spec, call)
        found |= zip(others, jax.vjp(function, *operands)[1](grad_output), strict=True)
    return [found[name] for name in wanted]


def jvp(function: Callable[..., Any], primals: Sequence[Array], tangents: Sequence[Any]) -> Any:
    """The derivative of a function in the direction of those tangents that are not 0."""
    moving = [index for index, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def moved(*arrays: Array) -> Any:
        call = list(primals)
        for index, array in zip(moving, arrays, strict=True):
            call[index] = array
        return function(*call)

    return jax.jvp(moved, tuple(primals[index] for index in moving), tuple(tangents[index] for index in moving))[1]


def in_(dtype: str, spec: Spec) -> Spec:
    """The call in another dtype."""
    return spec if spec.dtype == dtype else replace(spec, dtype=dtype)


def _output(operator: Operator, spec: Spec, call: dict[str, Array]) -> Array:
    portable = dispatch.load(operator, "portable")
    inner = portable.computes_in(spec.dtype, "jax")
    brought = []
    for argument in operator.arguments:
        array = call.get(argument.name)
        if array is not None:
            array = (array if argument.differentiable else jax.lax.stop_gradient(array)).astype(inner)
        brought.append(array)
    return portable.forward(in_(inner, spec), *brought).astype(spec.dtype)


def _as_function_of(
    names: Sequence[str], operator: Operator, spec: Spec, call: dict[str, Array]
) -> tuple[Callable[..., Array], tuple[Array, ...]]:
    """The output as a function of some operands of a call, and these."""

    def function(*operands: Array) -> Array:
        return _output(operator, spec, call | dict(zip(names, operands, strict=True)))

    return function, tuple(call[name] for name in names)
