"""An operator as three primitives of JAX, from which every transformation of JAX follows.

- NAME is the operator: on the CPU its kernels, elsewhere its portable form.
- NAME_tangent is its derivative, linear in the tangents, in the portable form. Transposed, it is
- NAME_backward, which computes the wanted gradients and no others: on the CPU by kernels. Its own derivatives are those of the
  portable form, and so are all further ones.

A mapped axis becomes part of one call, by the operator's rules of folding. Each primitive takes the arrays of the arguments
that are given, in the operator's order; `spec` is the checked call, `backend` the one that was asked for, and `channels_last`
says that the caller moves the axis of channels to the end, where XLA then need not bring it back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from deformconv import dispatch
from deformconv.errors import BackendError
from deformconv.jax import kernels, native
from deformconv.ops import folding
from deformconv.ops.operator import Operator, Spec

__all__ = ["Registered"]

Array = Any


class Registered:
    """An operator as JAX knows it.

    Args:
        operator: what it takes and what can run it.
        fold_forward, fold_backward: how vmap's axis becomes part of one call, if it can be more than a larger batch or a loop.
    """

    def __init__(
        self,
        operator: Operator,
        *,
        fold_forward: Callable[..., Array] | None = None,
        fold_backward: Callable[..., Any] | None = None,
    ) -> None:
        self.operator = operator
        kernels.make_known(operator)
        self._fold_forward = fold_forward or partial(folding.fold_forward, operator)
        self._fold_backward = fold_backward or partial(folding.fold_backward, operator)
        name = operator.name
        self.forward = _primitive(name, self._forward_aval, self._forward_on, self._forward_jvp, self._forward_batch)
        self.tangent = _primitive(
            f"{name}_tangent", self._tangent_aval, self._tangent_on, self._tangent_jvp, self._tangent_batch
        )
        self.backward = _primitive(
            f"{name}_backward", self._backward_avals, self._backward_on, self._backward_jvp, self._backward_batch, several=True
        )
        ad.primitive_transposes[self.forward] = self._forward_transpose
        ad.primitive_transposes[self.tangent] = self._tangent_transpose

    # Arguments

    def _whole(self, spec: Spec, values: Sequence[Any]) -> list[Any]:
        """What is said of the arguments that were given, in the operator's order, with None for the others."""
        call = dict(zip(spec.shapes, values, strict=True))
        return [call.get(name) for name in self.operator.names]

    def _whole_in_backward(self, spec: Spec, values: Sequence[Any]) -> list[Any]:
        call = dict(zip(self.operator.given_in_backward(spec), values, strict=True))
        return [call.get(argument.name) for argument in self.operator.in_backward]

    # What is computed where

    def _module(self, spec: Spec, platform: str, backward: bool, backend: str | None) -> Any:
        if not _is_symbolic(spec):
            return dispatch.choose(self.operator, spec, "jax", platform, backward, backend)
        if backend not in (None, "portable"):
            raise BackendError(
                f'backend="{backend}" cannot run a call whose sizes are symbols ({self.operator.described(spec)}); expected '
                'None or "portable".'
            )
        return dispatch.load(self.operator, "portable")

    def _forward_on(self, platform: str, *arrays: Array, spec: Spec, backend: str | None, channels_last: bool) -> Array:
        module = self._module(spec, platform, False, backend)
        if module.TAKES == "native":
            return native.output(*arrays, operator=self.operator, spec=spec)
        inner = module.computes_in(spec.dtype, "jax")
        brought = [array.astype(inner) for array in arrays]
        return kernels.forward_call(self.operator, native.in_(inner, spec), brought, channels_last).astype(spec.dtype)

    def _tangent_on(
        self, platform: str, *arrays: Array, spec: Spec, backend: str | None, channels_last: bool, moved: tuple[str, ...]
    ) -> Array:
        return native.derivative(*arrays, operator=self.operator, spec=spec, moved=moved)

    def _backward_on(
        self, platform: str, grad_output: Array, *arrays: Array, spec: Spec, backend: str | None, channels_last: bool,
        wanted: tuple[str, ...],
    ) -> list[Array]:  # fmt: skip
        module = self._module(spec, platform, True, backend)
        if module.TAKES == "native":
            return native.gradients(grad_output, *arrays, operator=self.operator, spec=spec, wanted=wanted)
        inner = module.computes_in(spec.dtype, "jax")
        grad, *brought = (array.astype(inner) for array in (grad_output, *arrays))
        found = kernels.backward_call(self.operator, native.in_(inner, spec), grad, brought, wanted, channels_last)
        dtypes = dict(zip(self.operator.given_in_backward(spec), (array.dtype for array in arrays), strict=True))
        return [gradient.astype(dtypes.get(name, spec.dtype)) for name, gradient in zip(wanted, found, strict=True)]

    # Shapes and dtypes

    def _forward_aval(self, first: Any, *others: Any, spec: Spec, **_: Any) -> Any:
        return _aval(first, spec.output_shape, spec.dtype)

    _tangent_aval = _forward_aval

    def _backward_avals(self, grad_output: Any, *arrays: Any, spec: Spec, wanted: tuple[str, ...], **_: Any) -> list[Any]:
        given = dict(zip(self.operator.given_in_backward(spec), arrays, strict=True))
        shapes = spec.shapes
        return [_aval(grad_output, shapes[name], given.get(name, grad_output).dtype) for name in wanted]

    # Derivatives

    def _forward_jvp(self, primals: Sequence[Array], tangents: Sequence[Any], *, spec: Spec, **how: Any) -> tuple[Array, Any]:
        output = self.forward.bind(*primals, spec=spec, **how)
        pairs = zip(spec.shapes, tangents, strict=True)
        moving = {n: t for n, t in pairs if type(t) is not ad.Zero and n in self.operator.differentiable}
        if not moving:
            return output, ad.Zero.from_primal_value(output)
        return output, self.tangent.bind(*primals, *moving.values(), spec=spec, moved=tuple(moving), **how)

    def _forward_transpose(self, cotangent: Any, *operands: Any, spec: Spec, **how: Any) -> list[Any]:
        pairs = zip(spec.shapes, operands, strict=True)
        asked = tuple(name for name, operand in pairs if ad.is_undefined_primal(operand))
        if asked not in [tuple(name for name in together if name in spec.shapes) for together in self.operator.linear]:
            sets = ", of ".join(" and ".join(together) for together in self.operator.linear)
            raise NotImplementedError(
                f"{self.operator.name} is not linear in {' and '.join(asked)}, where the other arrays are fixed, so it has no "
                f"transpose there; it is linear as a function of {sets}, as far as these are given."
            )
        # No gradient by these depends on their own values.
        fixed = [jnp.zeros(a.aval.shape, a.aval.dtype) if ad.is_undefined_primal(a) else a for a in operands]
        found = self._gradients_by_name(cotangent, fixed, spec, asked, how)
        return [found.get(name) for name in spec.shapes]

    def _tangent_transpose(self, cotangent: Any, *arrays: Any, spec: Spec, moved: tuple[str, ...], **how: Any) -> list[Any]:
        number = len(spec.shapes)
        asked = tuple(n for n, t in zip(moved, arrays[number:], strict=True) if ad.is_undefined_primal(t))
        found = self._gradients_by_name(cotangent, arrays[:number], spec, asked, how)
        return [None] * number + [found.get(name) for name in moved]

    def _gradients_by_name(
        self, cotangent: Any, operands: Sequence[Array], spec: Spec, wanted: tuple[str, ...], how: dict[str, Any]
    ) -> dict[str, Array]:
        if type(cotangent) is ad.Zero:
            return {}
        call = dict(zip(spec.shapes, operands, strict=True))
        needed = [call[name] for name in self.operator.given_in_backward(spec)]
        return dict(zip(wanted, self.backward.bind(cotangent, *needed, spec=spec, wanted=wanted, **how), strict=True))

    def _tangent_jvp(
        self, primals: Sequence[Array], tangents: Sequence[Any], *, spec: Spec, moved: tuple[str, ...], **how: Any
    ) -> tuple[Array, Any]:
        output = self.tangent.bind(*primals, spec=spec, moved=moved, **how)
        return output, native.jvp(partial(native.derivative, operator=self.operator, spec=spec, moved=moved), primals, tangents)

    def _backward_jvp(
        self, primals: Sequence[Array], tangents: Sequence[Any], *, spec: Spec, wanted: tuple[str, ...], **how: Any
    ) -> tuple[list[Array], Any]:
        found = self.backward.bind(*primals, spec=spec, wanted=wanted, **how)
        return found, native.jvp(partial(native.gradients, operator=self.operator, spec=spec, wanted=wanted), primals, tangents)

    # vmap

    def _forward_batch(
        self, arrays: Sequence[Array], dims: Sequence[int | None], *, spec: Spec, **how: Any
    ) -> tuple[Array, int]:
        B = _mapped(arrays, dims)

        def one(spec: Spec, *operands: Array | None) -> Array:
            return self.forward.bind(*_but_none(operands), spec=spec, **how)

        if B == 0:
            return jnp.zeros((0, *spec.output_shape), spec.dtype), 0
        return self._fold_forward(one, spec, B, self._whole(spec, dims), self._whole(spec, arrays)), 0

    def _tangent_batch(
        self, arrays: Sequence[Array], dims: Sequence[int | None], *, spec: Spec, moved: tuple[str, ...], **_: Any
    ) -> tuple[Array, int]:
        one = partial(native.derivative, operator=self.operator, spec=spec, moved=moved)
        return jax.vmap(one, in_axes=tuple(dims))(*arrays), 0

    def _backward_batch(
        self, arrays: Sequence[Array], dims: Sequence[int | None], *, spec: Spec, wanted: tuple[str, ...], **how: Any
    ) -> tuple[list[Array], list[int]]:
        B = _mapped(arrays, dims)
        if B == 0:
            kinds = dict(zip(self.operator.given_in_backward(spec), (array.dtype for array in arrays[1:]), strict=True))
            empty = [jnp.zeros((0, *spec.shapes[name]), kinds.get(name, spec.dtype)) for name in wanted]
            return empty, [0] * len(wanted)

        def one(spec: Spec, grad_output: Array, operands: Sequence[Array | None], names: Sequence[str]) -> Any:
            found = self.backward.bind(grad_output, *_but_none(operands), spec=spec, wanted=tuple(names), **how)
            return self.operator.gradients(**dict(zip(names, found, strict=True)))

        (grad_output, *operands), (dim, *other_dims) = arrays, dims
        operands = [grad_output, *self._whole_in_backward(spec, operands)]
        gradients = self._fold_backward(one, spec, B, [dim, *self._whole_in_backward(spec, other_dims)], operands, wanted)
        return [getattr(gradients, name) for name in wanted], [0] * len(wanted)


def _primitive(name: str, avals: Any, on: Callable[..., Any], jvp: Any, batch: Any, several: bool = False) -> Primitive:
    """A primitive; `on` computes it on the platform that is its first argument."""
    primitive = Primitive(name)
    primitive.multiple_results = several
    primitive.def_abstract_eval(avals)

    def run(*arrays: Array, **static: Any) -> Any:
        return primitive.bind(*arrays, **static)

    run.__name__ = name
    compiled = jax.jit(run, static_argnames=("spec", "backend", "channels_last", "moved", "wanted"))

    def eagerly(*arrays: Array, **static: Any) -> Any:
        if not jax.config.jax_disable_jit:
            return compiled(*arrays, **static)
        with jax.disable_jit(False):  # else this would call itself
            return compiled(*arrays, **static)

    def lower(context: Any, *values: Any, **static: Any) -> Any:
        platform, *_ = context.platforms or context.module_context.platforms
        return mlir.lower_fun(partial(on, platform), multiple_results=several)(context, *values, **static)

    primitive.def_impl(eagerly)
    mlir.register_lowering(primitive, lower)
    mlir.register_lowering(primitive, lower, platform="cpu")  # by itself, where a program is for several platforms
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return primitive


def _aval(like: Any, shape: Sequence[int], dtype: Any) -> Any:
    """As `like`, so that what is known of it beside shape and dtype stays: over which devices it varies."""
    return like.update(shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False)


def _is_symbolic(spec: Spec) -> bool:
    return not all(isinstance(size, int) for shape in (*spec.shapes.values(), spec.output_shape) for size in shape)


def _mapped(arrays: Sequence[Array], dims: Sequence[int | None]) -> int:
    """The size of the mapped axis."""
    size: int = next(array.shape[dim] for array, dim in zip(arrays, dims, strict=True) if dim is not None)
    return size


def _but_none(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if value is not None]
