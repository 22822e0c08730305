"""The NumPy front end of any operator: arrays in, arrays out."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from inspect import signature
from typing import Any

import numpy as np

from deformconv import dispatch
from deformconv.ops.operator import Argument, Operand, Operator, Spec

__all__ = ["any_jax", "any_torch", "backward", "backward_on", "explain", "forward", "forward_on", "plain"]


def forward(operator: Operator, operands: dict[str, Any], parameters: dict[str, Any], backend: str | None) -> Any:
    """Check a call and compute its output."""
    arrays = _arrays(operator, operands)
    spec = _spec(operator, arrays, parameters)
    module = dispatch.choose(operator, spec, "numpy", "cpu", False, backend)
    return forward_on(operator, module, spec, list(arrays.values()))


def backward(
    operator: Operator,
    grad_output: Any,
    operands: dict[str, Any],
    parameters: dict[str, Any],
    backend: str | None,
    wanted: Collection[str] | None,
) -> Any:
    """Check a call and compute the wanted gradients; None means all."""
    arrays = _arrays(operator, operands)
    grad = _array(operator, "grad_output", grad_output)
    spec = _spec(operator, arrays, parameters)
    operator.check_grad_output(spec, _operand(grad))
    names = operator.wanted(spec, wanted)
    module = dispatch.choose(operator, spec, "numpy", "cpu", True, backend)
    return backward_on(operator, module, spec, grad, [arrays[argument.name] for argument in operator.in_backward], names)


def forward_on(operator: Operator, module: Any, spec: Spec, arrays: Sequence[Any], out: np.ndarray | None = None) -> Any:
    """A backend's output, in the arrays' dtype whatever the backend computes in; in `out`, if that is given."""
    if operator.has_values_to_check:
        _check_values(spec, operator.arguments, arrays)
    inner = module.computes_in(spec.dtype, "numpy")
    if inner == spec.dtype:
        if out is not None and _takes_out(module.forward):
            return module.forward(spec, *arrays, out=out)
        output = module.forward(spec, *arrays)
    else:
        output = module.forward(replace(spec, dtype=inner), *_in(inner, arrays)).astype(spec.dtype)
    return output if out is None else _copied(out, output)


def backward_on(
    operator: Operator, module: Any, spec: Spec, grad_output: Any, arrays: Sequence[Any], wanted: Collection[str],
    out: Mapping[str, np.ndarray] | None = None,
) -> Any:  # fmt: skip
    """A backend's gradients, in the arrays' dtype whatever the backend computes in; each in the array that `out` has for it."""
    if operator.has_values_to_check:
        _check_values(spec, operator.in_backward, arrays)
    inner = module.computes_in(spec.dtype, "numpy")
    if inner == spec.dtype:
        if out is not None and _takes_out(module.backward):
            return module.backward(spec, grad_output, *arrays, wanted=wanted, out=out)
        found = module.backward(spec, grad_output, *arrays, wanted=wanted)
    else:
        found = module.backward(replace(spec, dtype=inner), *_in(inner, [grad_output, *arrays]), wanted=wanted)
        found = operator.gradients(*(None if gradient is None else gradient.astype(spec.dtype) for gradient in found))
    if out is None:
        return found
    given = {name: _copied(array, getattr(found, name)) for name, array in out.items() if getattr(found, name) is not None}
    return found._replace(**given)


@cache
def _takes_out(function: Any) -> bool:
    """Whether a backend writes results into the caller's arrays."""
    return "out" in signature(function).parameters


def _copied(out: np.ndarray, values: np.ndarray) -> np.ndarray:
    out[...] = values
    return out


def _in(dtype: str, arrays: Sequence[Any]) -> list[Any]:
    return [None if array is None else array.astype(dtype) for array in arrays]


def explain(operator: Operator, operands: dict[str, Any], parameters: dict[str, Any], backend: str | None) -> str:
    """Say which backend would run a call."""
    spec = _spec(operator, _arrays(operator, operands), parameters)
    return dispatch.explain(operator, spec, "numpy", "cpu", backend)


def any_torch(*values: Any) -> bool:
    """Whether a value is a PyTorch tensor or acts as one; it does not import PyTorch to find out."""
    return any(hasattr(type(value), "__torch_function__") for value in values)


def any_jax(*values: Any) -> bool:
    """Whether a value is an array or a tracer of JAX, or acts as one; it does not import JAX to find out."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and any(
        isinstance(value, jax.Array) or hasattr(type(value), "__jax_array__")
        for value in values
        if type(value) is not np.ndarray
    )


def _spec(operator: Operator, arrays: dict[str, Any], parameters: dict[str, Any]) -> Spec:
    operands = {name: None if array is None else _operand(array) for name, array in arrays.items()}
    return operator.check(operands, parameters, None, True)


def _check_values(spec: Spec, arguments: Sequence[Argument], arrays: Sequence[Any]) -> None:
    for argument, array in zip(arguments, arrays, strict=True):
        if argument.check_values is not None and array is not None:
            argument.check_values(spec, array)


def _arrays(operator: Operator, operands: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if value is None and name in operator.optional else _array(operator, name, value)
        for name, value in operands.items()
    }


def _array(operator: Operator, name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        if value is None:
            raise TypeError(f"`{name}` is None; expected a NumPy array or a PyTorch tensor.")
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        if kind.startswith("mxnet."):
            advice = f"For MXNet's arrays and symbols there is `deformconv.gluon.{operator.name}`."
        else:
            advice = f"Pass `numpy.asarray({name}, dtype=...)`."
        raise TypeError(f"`{name}` is a {kind}; expected a NumPy array or a PyTorch tensor. {advice}")
    return plain(operator, name, value)


def plain(operator: Operator, name: str, value: np.ndarray) -> np.ndarray:
    """A NumPy array of the plain type, in the machine's order of bytes; a masked one is refused."""
    if isinstance(value, np.ma.MaskedArray):
        text = f"`{name}` is a masked array, whose own mask would be ignored; expected a plain array: pass `{name}.filled(0)`"
        factors = [argument.name for argument in operator.arguments if argument.leaves_out]
        raise TypeError(text + "".join(f", or leave samples out by the argument `{factor}`" for factor in factors) + ".")
    if not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value if type(value) is np.ndarray else np.asarray(value)


def _operand(array: np.ndarray) -> Operand:
    return Operand(array.shape, _dtype_name(array.dtype))


@lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype) -> str:
    return dtype.name  # NumPy works it out anew each time
