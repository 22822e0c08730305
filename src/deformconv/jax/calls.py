"""How a public function's call on JAX's arrays reaches an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deformconv import dispatch
from deformconv.jax.primitives import Registered
from deformconv.numpy import run
from deformconv.ops.operator import DTYPES, Operand, Operator, Spec, checked_spec

__all__ = ["call", "explain"]


def call(
    op: Registered,
    operands: Mapping[str, Any],
    parameters: Mapping[str, Any],
    backend: str | None,
    rank: int | None = None,
    channels_last: bool = False,
) -> jax.Array:
    """Check a call, of a function for `rank` axes, and compute it.

    Arrays are (N, C, ...), whatever `channels_last` says: that the caller has moved their channels from the end, and will move
    the output's back, which then costs nothing.
    """
    arrays = _arrays(op.operator, operands)
    spec = _spec(op.operator, arrays, parameters, rank)
    dispatch.check_name(op.operator, backend)
    given = [array for array in arrays.values() if array is not None]
    compute = partial(op.forward.bind, spec=spec, backend=backend, channels_last=channels_last)
    spread = _spread(given)
    if spread is not None:  # XLA, and no rule of ours, says how such a call is spread over devices
        compute = jax.sharding.auto_axes(compute, out_sharding=spread)
    output: jax.Array = compute(*_varying_alike(given))
    return output


def explain(op: Registered, operands: Mapping[str, Any], parameters: Mapping[str, Any], backend: str | None) -> str:
    """Say which backend would run a call, where its arrays are; for tracers, on the device that JAX prefers."""
    arrays = _arrays(op.operator, operands)
    spec = _spec(op.operator, arrays, parameters, None)
    return dispatch.explain(op.operator, spec, "jax", _platform(arrays.values()), backend)


def _platform(arrays: Any) -> str:
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            return next(iter(array.devices())).platform
    return jax.default_backend()


def _spec(operator: Operator, arrays: Mapping[str, Any], parameters: Mapping[str, Any], rank: int | None) -> Spec:
    described = {name: None if a is None else Operand(tuple(a.shape), a.dtype.name) for name, a in arrays.items()}
    return checked_spec(operator, described, parameters, rank, True)


def _arrays(operator: Operator, operands: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if value is None and name in operator.optional else _array(operator, name, value)
        for name, value in operands.items()
    }


def _array(operator: Operator, name: str, value: Any) -> Any:
    if isinstance(value, jax.Array):
        return value
    if hasattr(type(value), "__jax_array__"):
        return jnp.asarray(value)
    if isinstance(value, np.ndarray):
        array = run.plain(operator, name, value)
        # What JAX has no dtype for, the checks refuse by its name.
        return jnp.asarray(array) if array.dtype.name in DTYPES else array
    if value is None:
        raise TypeError(f"`{name}` is None; expected a JAX array.")
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    raise TypeError(f"`{name}` is a {kind}; expected a JAX array: pass `jax.numpy.asarray({name})`.")


def _spread(arrays: Sequence[jax.Array]) -> Any:
    """Where the types of arrays say that they are spread over the axes of a mesh: how the output is, along its first axis."""
    shardings: list[Any] = [getattr(jax.typeof(array), "sharding", None) for array in arrays]
    explicit = [sharding for sharding in shardings if any(getattr(sharding, "spec", None) or ())]
    if not explicit or not hasattr(jax.sharding, "auto_axes"):  # before JAX 0.7 such types were an experiment
        return None
    first = shardings[0]
    return NamedSharding(explicit[0].mesh, PartitionSpec(first.spec[0] if first in explicit else None))


def _varying_alike(arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Within `shard_map` all vary over the mesh's axes over which one of them does, so that gradients are summed over them."""
    together = frozenset().union(*map(_axes, arrays))
    return [_vary(array, tuple(missing)) if (missing := together - _axes(array)) else array for array in arrays]


def _axes(array: jax.Array) -> frozenset[Any]:
    """The mesh's axes over which `shard_map` knows an array to vary."""
    aval = jax.typeof(array)
    mesh_axes = getattr(aval, "mat", None)  # since JAX 0.9; before, the axes were the aval's own
    return frozenset(getattr(aval, "vma", ()) if mesh_axes is None else mesh_axes.varying)


def _vary(array: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, axes, to="varying")
    return jax.lax.pvary(array, axes)
