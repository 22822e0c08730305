"""The toy operator of tests/ops/toy in JAX: what is described is all that an operator needs there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.arrays import assert_same, equations, x64  # noqa: F401
from tests.ops.toy.operator import SCALE

from deformconv import ShapeError
from deformconv.jax import calls
from deformconv.jax.primitives import Registered

OP = Registered(SCALE)
ALL = (0, 1, 2)


def scale(input: Any, mask: Any, bias: Any = None, power: int = 2, backend: str | None = None) -> Any:
    return calls.call(OP, {"input": input, "mask": mask, "bias": bias}, {"power": power}, backend)


def formula(input: Any, mask: Any, bias: Any) -> Any:
    return input * mask**2 + bias[:, None]


def arrays(*front: int, seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.uniform(0.5, 1.5, (*front, *shape))) for shape in ((3, 2, 5), (3, 1, 5), (2,))]


def loss_of(function: Any) -> Any:
    return lambda *given: (function(*given) ** 3).sum()


def test_the_output_and_its_gradients_run_kernels():
    given = arrays()
    step = jax.jit(jax.value_and_grad(loss_of(scale), ALL))
    text = step.lower(*given).as_text()
    assert text.count("@deformconv_forward") == text.count("@deformconv_backward") == 1
    assert_same(step(*given), jax.value_and_grad(loss_of(formula), ALL)(*given))
    np.testing.assert_array_equal(scale(*given[:2]), given[0] * given[1] ** 2)
    assert_same(scale(*given, backend="portable"), scale(*given))


def test_further_derivatives_are_the_portable_forms():
    given = arrays()

    def second(function: Any) -> Any:
        gradient = jax.grad(loss_of(function), ALL)
        return lambda *a: (jax.jvp(gradient, a, a), jax.jvp(function, a, a))

    assert_same(jax.jit(second(scale))(*given), jax.jit(second(formula))(*given))


@pytest.mark.parametrize(("dims", "several"), [((0, 0, None), 1), ((0, None, None), 1), ((0, 0, 0), 4), ((None, None, 0), 4)])
def test_mapped_images_are_a_larger_batch_and_all_else_is_a_loop(dims: tuple[int | None, ...], several: int):
    one, mapped = arrays(), arrays(4, seed=1)
    given = [several_ if dim == 0 else array for array, several_, dim in zip(one, mapped, dims, strict=True)]
    vmapped = jax.vmap(scale, dims)
    assert len(equations(jax.make_jaxpr(vmapped)(*given), "toy_scale")) == several
    assert_same(jax.jit(vmapped)(*given), jax.vmap(formula, dims)(*given))
    gradients = (jax.jit(jax.vmap(jax.grad(loss_of(function), ALL), dims))(*given) for function in (scale, formula))
    assert_same(*gradients)


def test_texts_are_the_operators():
    input, mask, bias = arrays()
    with pytest.raises(ShapeError, match=r"^`mask` has shape \(3, 2, 5\); expected \(N, 1, L\)"):
        jax.jit(scale)(input, input, bias)
    with pytest.raises(TypeError, match="`mask` is None; expected a JAX array"):
        scale(input, None)
    with pytest.raises(ValueError, match=r'`backend` is .cpu.; expected "numbers"'):
        scale(input, mask, backend="cpu")
