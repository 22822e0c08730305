"""Predictors of offsets have labels, and steps of their own."""

from __future__ import annotations

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deformconv.jax import labels, offset_labels

optax = pytest.importorskip("optax")


def test_doctests():
    result = doctest.testmod(labels)
    assert result.failed == 0 and result.attempted >= 6


def equinox_net():
    eqx = pytest.importorskip("equinox")
    from deformconv.equinox import DeformConv2d

    keys = jax.random.split(jax.random.key(0), 2)
    net = eqx.nn.Sequential([eqx.nn.Conv2d(3, 4, 3, key=keys[0]), DeformConv2d(4, 4, 3, padding=1, key=keys[1])])
    params, others = eqx.partition(net, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, others))(jnp.moveaxis(x, -1, 1))


def nnx_net():
    nnx = pytest.importorskip("flax.nnx")
    from deformconv.flax import DeformConv

    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=rngs), DeformConv(4, 4, (3, 3), rngs=rngs))
    graph, params = nnx.split(net)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def linen_net():
    nn = pytest.importorskip("flax.linen")
    from deformconv.flax.linen import DeformConv

    net = nn.Sequential([nn.Conv(4, (3, 3)), DeformConv(4, (3, 3))])
    params = net.init(jax.random.key(0), jnp.ones((1, 9, 9, 3)))["params"]
    return params, lambda params, x: net.apply({"params": params}, x)


NETS = {"equinox": equinox_net, "nnx": nnx_net, "linen": linen_net}
X = np.random.default_rng(0).normal(size=(2, 9, 9, 3)).astype("float32")


def named(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("net", NETS)
def test_the_predictors_parameters_are_labelled(net):
    params, _ = NETS[net]()
    found = named(offset_labels(params))
    assert list(found) == list(named(params)) and len(found) == 6
    assert {name for name, label in found.items() if label == "offset"} == {name for name in found if "offset_conv" in name}
    assert sorted(found.values()) == ["offset"] * 2 + ["rest"] * 4


def moved(net, optimizer):
    """By how much a step of an optimizer moves each parameter."""
    params, apply = NETS[net]()

    @jax.jit
    def step(params):
        slopes = jax.grad(lambda params: jnp.sum(apply(params, X) ** 3))(params)
        updates, _ = optimizer.update(slopes, optimizer.init(params), params)
        return updates

    return {name: np.asarray(update) for name, update in named(step(params)).items()}


@pytest.mark.parametrize("net", NETS)
def test_a_step_moves_the_predictor_by_a_tenth(net):
    plain = moved(net, optax.adam(1e-3))
    scales = {"offset": optax.scale(0.1), "rest": optax.identity()}
    scaled = moved(net, optax.chain(optax.adam(1e-3), optax.multi_transform(scales, offset_labels)))
    two = moved(net, optax.multi_transform({"offset": optax.adam(1e-4), "rest": optax.adam(1e-3)}, offset_labels))
    assert list(plain) == list(scaled) == list(two)
    for name, step in plain.items():
        assert np.abs(step).max() > 5e-4, name
        for slower in (scaled, two):
            np.testing.assert_allclose(slower[name], (0.1 if "offset_conv" in name else 1) * step, rtol=1e-4, err_msg=name)


def test_an_nnx_optimizer_takes_it():
    nnx = pytest.importorskip("flax.nnx")
    from deformconv.flax import DeformConv

    steps = []
    for scale in (1.0, 0.1):
        net = DeformConv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        rates = {"offset": optax.sgd(0.01 * scale), "rest": optax.sgd(0.01)}
        optimizer = nnx.Optimizer(net, optax.multi_transform(rates, offset_labels), wrt=nnx.Param)
        before = net.kernel[...]
        slopes = nnx.grad(lambda net: jnp.sum(net(X) ** 2))(net)
        optimizer.update(net, slopes)
        steps.append((np.asarray(net.offset_conv.kernel[...]), np.asarray(net.kernel[...] - before)))
    assert np.abs(steps[0][0]).max() > 0
    np.testing.assert_allclose(steps[1][0], 0.1 * steps[0][0], rtol=1e-4)
    np.testing.assert_array_equal(steps[1][1], steps[0][1])


def test_what_has_no_leaves_with_names():
    class Model:
        pass

    with pytest.raises(
        TypeError, match=r"^`params` is a Model, which JAX takes for one leaf; expected a tree of parameters: nnx"
    ):
        offset_labels(Model())
    assert offset_labels({}) == {}
    assert offset_labels(jnp.ones(3)) == "rest"
