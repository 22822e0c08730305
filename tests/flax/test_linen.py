"""Where linen.Conv stood: fields, random numbers, numbers and the tree of parameters."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from tests.flax.layers import FlaxLayerSuite, image, nearly, x64  # noqa: F401

import deformconv.flax.linen as module
from deformconv import ShapeError
from deformconv.flax import DeformConv as NNXDeformConv
from deformconv.flax.linen import DeformConv

KEY = jax.random.key(0)


class Bound(NamedTuple):
    """A module beside its variables, which the suite changes."""

    module: DeformConv
    params: dict[str, Any]


@partial(jax.jit, static_argnums=(0, 3))
def applied(layer: linen.Module, params: Any, x: jax.Array, method: str | None = None) -> Any:
    return layer.apply({"params": params}, x, method=method)


class TestLayers(FlaxLayerSuite):
    module = module
    examples = 9
    words = FlaxLayerSuite.words | {"out_channels": "features"}
    refusals = [*FlaxLayerSuite.refusals, ({"conv_general_dilated_cls": 1}, ValueError, "conv_general_dilated_cls", "is 1;")]  # noqa: RUF012

    def layer(self, rank, *, modulated, **arguments):
        named = self.named(rank, arguments)
        features = named.pop("in_features")
        layer = DeformConv(**named, modulated=modulated, param_dtype=jnp.float64)
        return Bound(layer, layer.init(KEY, jnp.zeros((1, *(9,) * rank, features)))["params"])

    def call(self, layer, input):
        return applied(layer.module, layer.params, input)

    def predict(self, layer, input):
        return applied(layer.module, layer.params, input, "offsets_and_mask")

    def weights(self, layer):
        predictor = layer.params["offset_conv"]
        return {
            "weight": self.turned(layer.params["kernel"]),
            "bias": np.asarray(layer.params["bias"]) if "bias" in layer.params else None,
            "offset_weight": self.turned(predictor["kernel"]),
            "offset_bias": np.asarray(predictor["bias"]),
        }

    def set_predictor(self, layer, weight, bias):
        layer.params["offset_conv"] = {"kernel": self.turned_back(weight), "bias": jnp.asarray(bias)}


def varied(params: dict[str, Any]) -> dict[str, Any]:
    """A predictor that moves taps by a pixel or two."""
    predictor = params["offset_conv"]
    kernel, bias = (jax.random.normal(KEY, predictor[name].shape) for name in ("kernel", "bias"))
    return params | {"offset_conv": {"kernel": 0.3 * kernel, "bias": bias}}


def test_the_first_fields_are_those_of_a_convolution():
    ours, theirs = (
        [(f.name, f.default) for f in fields(cls) if f.name not in ("parent", "name")] for cls in (DeformConv, linen.Conv)
    )
    assert ours[: len(theirs)] == theirs
    assert [name for name, _ in ours[len(theirs) :]] == [
        "modulated", "offset_groups", "predict_offsets", "mask_scale", "max_offset", "boundary",
    ]  # fmt: skip
    assert issubclass(DeformConv, linen.Conv)


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"strides": 2, "kernel_dilation": 2}, {"feature_group_count": 2, "padding": "SAME_LOWER"}, {"use_bias": False},
        {"padding": "CIRCULAR", "strides": None}, {"padding": "REFLECT"}, {"padding": [(2, 0)], "kernel_size": 4},
        {"dtype": jnp.bfloat16}, {"mask": np.tri(12, 8).reshape(3, 4, 8)},
    ],
    ids=str,
)  # fmt: skip
def test_a_fresh_layer_is_the_convolution(arguments):
    """Also with its parameters, for the same seed."""
    x = image(2, 11, 4)
    arguments = {"kernel_size": (3,)} | arguments
    layer, convolution = DeformConv(8, **arguments), linen.Conv(8, **arguments)
    params, plain = (one.init(KEY, x)["params"] for one in (layer, convolution))
    assert all(jnp.array_equal(params[name], plain[name]) for name in plain)
    found, expected = layer.apply({"params": params}, x), convolution.apply({"params": plain}, x)
    assert found.dtype == expected.dtype and nearly(found, expected, 1e-2 if "dtype" in arguments else 2e-6)


@pytest.mark.parametrize("arguments", [{}, {"modulated": False, "use_bias": False, "offset_groups": 2}], ids=str)
def test_parameters_and_numbers_are_those_of_nnx(arguments):
    x = image()
    params = varied(DeformConv(8, (3, 3), **arguments).init(KEY, x)["params"])
    layer = NNXDeformConv(4, 8, (3, 3), **arguments, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(state)) == jax.tree.map(jnp.shape, params)
    nnx.replace_by_pure_dict(state, params)
    assert nearly(nnx.merge(graph, state)(x), DeformConv(8, (3, 3), **arguments).apply({"params": params}, x))


def test_offsets_are_passed_or_predicted():
    layer, x = DeformConv(8, (3, 3)), image()
    params = {"params": varied(layer.init(KEY, x)["params"])}
    offset, mask = layer.apply(params, x, method="offsets_and_mask")
    assert nearly(layer.apply(params, x, offset, mask), layer.apply(params, x))
    both = layer.apply(params, jnp.stack([x, x]), jnp.stack([offset, offset]), jnp.stack([mask, mask]))
    assert nearly(both[1], layer.apply(params, x))
    whole = jax.tree.map(jnp.shape, layer.init(KEY, x))
    assert jax.tree.map(jnp.shape, layer.init(KEY, x, offset, mask)) == whole
    assert jax.tree.map(jnp.shape, layer.init(KEY, x, method="offsets_and_mask")) == whole
    alone = DeformConv(8, (3, 3), predict_offsets=False)
    variables = alone.init(KEY, x, offset)
    assert set(variables["params"]) == {"kernel", "bias"}
    with pytest.raises(TypeError, match=r"`offset` is missing and this layer predicts none \(predict_offsets=False\)"):
        alone.apply(variables, x)
    with pytest.raises(TypeError, match="`mask` was passed without `offset`"):
        layer.apply(params, x, mask=mask)
    with pytest.raises(ShapeError, match=r"`inputs` has 5 features, .* this layer has in_features=4"):
        layer.apply(params, image(2, 9, 8, 5))


def test_another_librarys_word():
    with pytest.raises(TypeError, match=r"DeformConv\(\) got an unexpected keyword argument 'stride'; here: strides\."):
        DeformConv(8, (3, 3), stride=2)


class Net(linen.Module):
    """A name keeps a layer's parameters, and its neighbours', where they were."""

    layer: Any = DeformConv

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Conv(4, (3, 3))(x))
        x = linen.relu(self.layer(8, (3, 3), name="Conv_1")(x))
        return linen.Dense(2)(x.mean(axis=(1, 2)))


def test_a_net_is_trained():
    x, labels = image(8, 9, 9, 1), jnp.arange(8) % 2
    params, plain = (Net(layer).init(KEY, x)["params"] for layer in (DeformConv, linen.Conv))
    assert set(params) == set(plain) == {"Conv_0", "Conv_1", "Dense_0"}
    assert jnp.array_equal(params["Conv_1"]["kernel"], plain["Conv_1"]["kernel"])
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss_of(params):
            return optax.softmax_cross_entropy_with_integer_labels(Net().apply({"params": params}, x), labels).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(10):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert params["Conv_1"]["offset_conv"]["kernel"].any()


def test_partitioned_parameters_keep_their_names():
    init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, None, None, "model"))
    layer = DeformConv(8, (3, 3), kernel_init=init)
    variables = layer.init(KEY, image())
    assert variables["params"]["kernel"].names == (None, None, None, "model")
    assert layer.apply(variables, image()).shape == (2, 9, 8, 8)
    assert "offset_conv" in linen.tabulate(layer, KEY)(image())
