"""Every derivative, under `jax.jit` in float64, is the portable form's."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from tests.jax.arrays import (  # noqa: F401
    CASES,
    SMALL,
    TINY,
    assert_same,
    call_of,
    counts,
    equations,
    keywords,
    loss_of,
    quickly_compiled,
    x64,
)

import deformconv
from deformconv.jax import deform_conv

ALL = (0, 1, 2, 3, 4)


def both(transform, case=SMALL, arrays=None, **how):
    """A transformation of the operator, and of the portable form alone, each as one program."""
    call = call_of(case, **how)
    arrays = call.arrays if arrays is None else arrays
    return tuple(jax.jit(transform(function))(*arrays) for function in (call.ours, call.alone))


def directions(arrays, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=array.shape), array.dtype) for array in arrays)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_output_and_gradients_are_numpys_to_the_bit(case):
    call = call_of(case)
    arrays = dict(zip(call.names, map(np.asarray, call.arrays), strict=True))
    expected = deformconv.deform_conv(**arrays, **keywords(case))
    for function in (call.ours, jax.jit(call.ours)):
        np.testing.assert_array_equal(function(*call.arrays), expected)
    grad_output = np.random.default_rng(1).normal(size=expected.shape)
    gradients = deformconv.deform_conv_backward(grad_output, **arrays, **keywords(case))
    for name, found in zip(call.names, jax.vjp(call.ours, *call.arrays)[1](jnp.asarray(grad_output)), strict=True):
        np.testing.assert_array_equal(found, getattr(gradients, name), name)


@pytest.mark.parametrize("case", [*CASES[::2], SMALL.but(name="v1", masked=False, biased=False)], ids=lambda case: case.name)
def test_gradients_by_all(case):
    argnums = tuple(range(5 if case.masked else 3))
    assert_same(*both(lambda f: jax.grad(loss_of(f), argnums), case))


@pytest.mark.parametrize("argnums", [(0,), (1, 4), (2, 3)], ids=str)
def test_gradients_by_some_compute_no_others(argnums):
    gradient = partial(jax.grad, argnums=argnums)
    assert_same(*both(lambda f: gradient(loss_of(f))))
    call = call_of(SMALL)
    (backward,) = equations(jax.make_jaxpr(gradient(loss_of(call.ours)))(*call.arrays), "deform_conv_backward")
    assert backward.params["wanted"] == tuple(call.names[number] for number in argnums)
    assert len(backward.outvars) == len(argnums)


def test_a_gradient_by_nothing_of_ours_calls_no_backward_pass():
    call = call_of(SMALL)
    assert counts(jax.grad(lambda s: s * call.ours(*call.arrays).sum()), 2.0) == (1, 0, 0)


def test_the_output_and_its_gradients_are_two_calls():
    call = call_of(SMALL)
    assert counts(jax.value_and_grad(loss_of(call.ours), ALL), *call.arrays) == (1, 0, 1)


def test_forward_mode():
    assert_same(*both(lambda f: lambda *a: jax.jvp(f, a, directions(a))))
    assert_same(*both(lambda f: lambda *a: jax.jvp(partial(f, a[0]), a[1:], directions(a[1:]))))


def test_linearize():
    def transform(f):
        def both_ways(*arrays):
            output, push = jax.linearize(f, *arrays)
            pull = jax.linear_transpose(push, *arrays)
            return output, push(*directions(arrays)), pull(output)

        return both_ways

    assert_same(*both(transform))


@pytest.mark.parametrize("names", [("input",), ("weight",), ("mask",)], ids=str)
def test_transposed_as_a_linear_function(names):
    """Of each of those in which it is linear, without a bias."""
    call = call_of(SMALL.but(biased=False))
    number = call.names.index(*names)

    def transform(f):
        def transposed(*arrays):
            def linear(array):
                return f(*arrays[:number], array, *arrays[number + 1 :])

            return jax.linear_transpose(linear, arrays[number])(linear(arrays[number]))

        return transposed

    assert_same(*both(transform, SMALL.but(biased=False)))
    assert counts(transform(call.ours), *call.arrays) == (1, 0, 1)


def test_transposed_as_a_function_of_the_weight_and_the_bias():
    call = call_of(SMALL)
    x, offset, weight, bias, mask = call.arrays

    def linear(weight, bias):
        return call.ours(x, offset, weight, bias, mask)

    cotangent = linear(weight, bias)
    found = jax.linear_transpose(linear, weight, bias)(cotangent)
    assert_same(found, jax.vjp(linear, weight, bias)[1](cotangent))


@pytest.mark.parametrize("name", ["offset", "input"])
def test_what_is_not_linear_has_no_transpose(name):
    call = call_of(SMALL)
    number = call.names.index(name)

    def of_one(array):
        return call.ours(*call.arrays[:number], array, *call.arrays[number + 1 :])

    transposed = jax.linear_transpose(of_one, call.arrays[number])
    with pytest.raises(
        NotImplementedError, match=f"deform_conv is not linear in {name}, .* linear .* input and bias, of weight"
    ):
        transposed(of_one(call.arrays[number]))


SECOND = {
    "forward over reverse": lambda f: lambda *a: jax.jvp(jax.grad(loss_of(f), ALL), a, directions(a)),
    "reverse over reverse": lambda f: jax.grad(lambda *a: _squares(jax.grad(loss_of(f), ALL)(*a)), ALL),
    "reverse over forward": lambda f: jax.grad(lambda *a: _squares(jax.jvp(f, a, directions(a))), ALL),
    "forward over forward": lambda f: lambda *a: jax.jvp(lambda *b: jax.jvp(f, b, directions(b)), a, directions(a, 2)),
}


def _squares(arrays):
    return sum((array**2).sum() for array in arrays)


@pytest.mark.parametrize("transform", SECOND.values(), ids=SECOND)
def test_second_derivatives(transform):
    assert_same(*both(transform))


def test_third_derivatives():
    def transform(f):
        def second(*arrays):
            return _squares(jax.grad(loss_of(f), (1, 2))(*arrays))

        return jax.grad(lambda *arrays: _squares(jax.grad(second, (1, 2))(*arrays)), (1, 2))

    assert_same(*both(transform, TINY))


def test_jacobians_and_the_hessian():
    assert_same(*both(lambda f: jax.jacrev(f, ALL), TINY))
    assert_same(*both(lambda f: jax.jacfwd(f, ALL), TINY))
    assert_same(*both(lambda f: jax.hessian(loss_of(f), (1, 2)), TINY))


def test_a_jacobian_is_one_backward_pass():
    call = call_of(TINY)
    assert counts(jax.jacrev(call.ours, ALL), *call.arrays) == (1, 0, 1)


def test_numbers_agree_with_differences():
    call = call_of(TINY)
    check_grads(jax.jit(call.ours), call.arrays, order=2, modes=["fwd", "rev"], eps=1e-5)


def test_second_derivatives_without_jit():
    """They are a few programs, and not one for each of the portable form's operations."""
    call = call_of(TINY)
    gradient = jax.grad(lambda *a: _squares(jax.grad(loss_of(call.ours), (1,))(*a)), 1)
    assert_same(gradient(*call.arrays), jax.jit(gradient)(*call.arrays))


def test_checkpoint_and_scan():
    """Three layers, one after the other, of one weight each; and each layer computed again in the backward pass."""
    case = SMALL.but(padding=((1, 0), (0, 0)), biased=False)
    weights = jnp.stack([call_of(case, seed=seed).arrays[2] for seed in range(3)])

    def transform(f):
        def net(x, offset, weights, mask):
            def layer(x, weight):
                return jnp.tanh(jax.checkpoint(f)(x, offset, weight, mask)), None

            return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()

        return jax.grad(net, (0, 1, 2, 3))

    x, offset, _, mask = call_of(case).arrays
    assert_same(*both(transform, case, (x, offset, weights, mask)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    exact, half = call_of(SMALL, "float32"), jnp.dtype(dtype)
    arrays = tuple(array.astype(half) for array in exact.arrays)
    ours = jax.jit(jax.value_and_grad(lambda *a: exact.ours(*a).astype("float32").sum(), ALL))
    rounded = tuple(array.astype("float32") for array in arrays)
    loss, gradients = ours(*arrays)
    expected_loss, expected = jax.jit(jax.value_and_grad(lambda *a: exact.alone(*a).sum(), ALL))(*rounded)
    assert abs(loss - expected_loss) <= 10 * float(jnp.finfo(half).eps) * jnp.abs(exact.alone(*rounded)).sum()
    for found, right in zip(gradients, expected, strict=True):
        assert found.dtype == half
        assert jnp.abs(found.astype("float32") - right).max() <= jnp.finfo(half).eps * jnp.abs(right).max()


def test_positions_beside_half_precision_may_be_float32():
    call = call_of(SMALL, "float32")
    x, offset, weight, bias, mask = call.arrays
    half = [array.astype("bfloat16") for array in (x, weight, bias)]

    def loss(x, offset, weight, bias, mask):
        return call.ours(x, offset, weight, bias, mask).sum()

    arrays = (half[0], offset, half[1], half[2], mask)
    assert call.ours(*arrays).dtype == "bfloat16"
    dtypes = [gradient.dtype.name for gradient in jax.jit(jax.grad(loss, ALL))(*arrays)]
    assert dtypes == ["bfloat16", "float32", "bfloat16", "bfloat16", "float32"]


def test_weakly_typed_arrays():
    """Numbers of Python that became an array take the others' dtype elsewhere; here their own is what counts."""
    x = jax.lax.full((1, 1, 2, 2), 2.0)
    assert jax.typeof(x).weak_type
    gradient = jax.jit(jax.grad(lambda x: deform_conv(x, jnp.zeros((1, 2, 2, 2)), jnp.ones((1, 1, 1, 1))).sum()))(x)
    np.testing.assert_array_equal(gradient, np.ones((1, 1, 2, 2)))
