"""vmap becomes one call: of a larger batch, of more output channels or of more groups."""

from __future__ import annotations

from itertools import product

import jax
import jax.numpy as jnp
import pytest
from tests.jax.arrays import RANKS, SMALL, assert_same, call_of, counts, loss_of, quickly_compiled, x64  # noqa: F401

B = 3
ALL = (0, 1, 2, 3, 4)
MAPPED = [flags for flags in product([False, True], repeat=5) if any(flags)]
KINDS = [(True,) * 5, (True, True, False, False, True), (False, False, True, False, False), (True, False, True, False, False),
         (False, False, False, True, False)]  # fmt: skip


def names_of(flags):
    return "+".join(name for name, flag in zip(("input", "offset", "weight", "bias", "mask"), flags, strict=True) if flag)


def mapped(flags, case=SMALL, at=0):
    """The function, five arrays of which those of the flags are B times at an axis, and where that is."""
    several = [call_of(case, seed=seed) for seed in range(B)]
    arrays = [
        jnp.stack([call.arrays[i] for call in several], at) if flag else several[0].arrays[i] for i, flag in enumerate(flags)
    ]
    return several[0], arrays, tuple(at if flag else None for flag in flags)


def one_by_one(function, arrays, dims):
    """The same by a loop."""
    results = []
    for index in range(B):
        one = (array if dim is None else jnp.take(array, index, axis=dim) for array, dim in zip(arrays, dims, strict=True))
        results.append(function(*one))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


@pytest.mark.parametrize("flags", MAPPED, ids=names_of)
def test_vmap_is_one_call(flags):
    call, arrays, dims = mapped(flags)
    several = jax.vmap(call.ours, dims)
    assert counts(several, *arrays) == (1, 0, 0)
    assert_same(jax.jit(several)(*arrays), one_by_one(call.ours, arrays, dims))


@pytest.mark.parametrize("flags", MAPPED, ids=names_of)
def test_gradients_for_each_of_the_mapped_are_one_call(flags):
    """As for the gradients of each image of a batch, which vmap(grad) is for."""
    call, arrays, dims = mapped(flags)
    gradients = jax.grad(loss_of(call.ours), ALL)
    several = jax.vmap(gradients, dims)
    assert counts(several, *arrays) == (1, 0, 1)
    assert_same(jax.jit(several)(*arrays), one_by_one(gradients, arrays, dims))


@pytest.mark.parametrize("flags", KINDS, ids=names_of)
def test_the_gradient_of_all_of_the_mapped_is_one_call(flags):
    call, arrays, dims = mapped(flags)
    ours, loop = (
        jax.grad(lambda *a, run=run: (run(*a) ** 2).sum(), ALL)
        for run in (jax.vmap(call.ours, dims), lambda *a: one_by_one(call.ours, a, dims))
    )
    assert counts(ours, *arrays) == (1, 0, 1)
    assert_same(jax.jit(ours)(*arrays), jax.jit(loop)(*arrays))


@pytest.mark.parametrize("case", RANKS, ids=lambda case: case.name)
def test_other_ranks_against_the_portable_form(case):
    call, arrays, dims = mapped((True,) * 5, case)
    assert_same(jax.jit(jax.vmap(call.ours, dims))(*arrays), jax.jit(jax.vmap(call.alone, dims))(*arrays))


def test_forward_mode_and_second_derivatives_of_the_mapped():
    call, arrays, dims = mapped(KINDS[1])

    def transform(f):
        several = jax.vmap(f, dims)
        gradient = jax.vmap(jax.grad(loss_of(f), (1, 2)), dims)
        return lambda *a: (jax.jvp(several, a, a), jax.jvp(gradient, a, a), jax.vmap(jax.jacfwd(f, 4), dims)(*a))

    found, expected = (jax.jit(transform(f))(*arrays) for f in (call.ours, call.alone))
    assert_same(found, expected)


def test_any_axis_and_nested_maps():
    flags = (True, True, False, False, True)
    call, arrays, dims = mapped(flags, at=1)
    inner = jax.vmap(call.ours, dims, out_axes=2)
    assert_same(jax.jit(inner)(*arrays), jnp.moveaxis(one_by_one(call.ours, arrays, dims), 0, 2))
    weights = jnp.stack([arrays[2], 2 * arrays[2]])
    nested = jax.vmap(inner, (None, None, 0, None, None))
    assert counts(nested, *arrays[:2], weights, *arrays[3:]) == (1, 0, 0)
    found = jax.jit(nested)(*arrays[:2], weights, *arrays[3:])
    assert_same(found, jnp.stack([inner(*arrays[:2], weight, *arrays[3:]) for weight in weights]))


def test_a_map_over_nothing():
    call, arrays, dims = mapped(KINDS[0])
    none = [array[:0] for array in arrays]
    assert jax.vmap(call.ours, dims)(*none).shape == (0, *call.spec.output_shape)
    gradients = jax.vmap(jax.grad(loss_of(call.ours), ALL), dims)(*none)
    assert [gradient.shape for gradient in gradients] == [array.shape for array in none]


def test_mapped_without_a_bias_and_a_mask():
    _, arrays, dims = mapped((True,) * 5, SMALL)
    v1 = call_of(SMALL.but(masked=False, biased=False))
    gradients = jax.grad(loss_of(v1.ours), (0, 1, 2))
    several = jax.vmap(gradients, dims[:3])
    assert counts(several, *arrays[:3]) == (1, 0, 1)
    assert_same(jax.jit(several)(*arrays[:3]), one_by_one(gradients, arrays[:3], dims[:3]))
