"""Weights move between PyTorch and Flax, Equinox and Keras, and nets compute the same there."""

from __future__ import annotations

import doctest
import os

import numpy as np
import pytest

from deformconv.convert import from_torch, to_torch, weights
from deformconv.errors import ShapeError

RANDOM = np.random.default_rng(3)


def uniform(*shape):
    return RANDOM.uniform(0.1, 0.5, shape).astype(np.float32)


def tree():
    """Linen's variables, as a file may hold them."""
    predictor = {"kernel": uniform(3, 2, 4, 18), "bias": uniform(18)}
    return {
        "params": {
            "Conv_0": {"kernel": uniform(3, 3, 3, 4), "bias": uniform(4)},
            "BatchNorm_0": {"scale": uniform(4), "bias": uniform(4)},
            "DeformConv_0": {"kernel": uniform(3, 2, 2, 6), "offset_conv": predictor},
            "Dense_0": {"kernel": uniform(6, 5), "bias": uniform(5)},
            "Embed_0": {"embedding": uniform(7, 6)},
            "token": uniform(1, 6),
        },
        "batch_stats": {"BatchNorm_0": {"mean": uniform(4), "var": uniform(4)}},
    }


def test_doctests():
    result = doctest.testmod(weights)
    assert result.failed == 0 and result.attempted >= 6


def test_a_tree_of_arrays():
    """Neither JAX nor PyTorch is needed for it."""
    variables = tree()
    state = to_torch(variables, {"Conv_0": "stem", "DeformConv_0": "body.deform", "BatchNorm_0": "norm", "Embed_0": ""})
    params = variables["params"]
    expected = {
        "stem.weight": params["Conv_0"]["kernel"].transpose(3, 2, 0, 1),
        "stem.bias": params["Conv_0"]["bias"],
        "norm.weight": params["BatchNorm_0"]["scale"],
        "norm.bias": params["BatchNorm_0"]["bias"],
        "body.deform.weight": params["DeformConv_0"]["kernel"].transpose(3, 2, 0, 1),
        "body.deform.offset_conv.weight": params["DeformConv_0"]["offset_conv"]["kernel"].transpose(3, 2, 0, 1),
        "body.deform.offset_conv.bias": params["DeformConv_0"]["offset_conv"]["bias"],
        "Dense_0.weight": params["Dense_0"]["kernel"].T,
        "Dense_0.bias": params["Dense_0"]["bias"],
        "weight": params["Embed_0"]["embedding"],
        "token": params["token"],
        "norm.running_mean": variables["batch_stats"]["BatchNorm_0"]["mean"],
        "norm.running_var": variables["batch_stats"]["BatchNorm_0"]["var"],
    }
    assert list(state) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array, name)
        assert state[name].flags.c_contiguous
    assert state._metadata == {}  # a tree does not tell the scale of its masks


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_and_back(rank):
    size = (2, 3, 4)[:rank]
    variables = {"layer": {"kernel": uniform(*size, 3, 6)}, "other": {"kernel": uniform(6, 5).astype(np.float64)}}
    state = to_torch(variables)
    assert state["layer.weight"].shape == (6, 3, *size)
    zeros = {name: {"kernel": np.zeros_like(entry["kernel"])} for name, entry in variables.items()}
    back = from_torch(zeros, {**state, "layer.num_batches_tracked": np.array(3)})
    for name, entry in variables.items():
        np.testing.assert_array_equal(back[name]["kernel"], entry["kernel"])
        assert back[name]["kernel"].dtype == entry["kernel"].dtype and not zeros[name]["kernel"].any()


def refused(raises, text, call):
    with pytest.raises(raises) as raised:
        call()
    assert str(raised.value) == text


def test_what_does_not_fit():
    variables, state = {"conv": {"kernel": uniform(3, 3, 4, 8)}}, {"conv.weight": uniform(8, 4, 3, 3)}
    refused(
        ShapeError,
        "'conv.weight' has shape (3, 3, 4, 8) in `state`; expected (8, 4, 3, 3), for 'conv/kernel', (3, 3, 4, 8), of the "
        "model. It lies there as in the model already: from_torch takes arrays as PyTorch has them.",
        lambda: from_torch(variables, {"conv.weight": uniform(3, 3, 4, 8)}),
    )
    refused(
        ValueError,
        "`state` has no 'conv.weight', for 'conv/kernel' of the model, but has 'conv1.weight': see `names`.",
        lambda: from_torch(variables, {"conv1.weight": uniform(8, 4, 3, 3)}),
    )
    refused(
        ValueError,
        "`state` has 'conv.bias', and `model` no such parameter; expected the state_dict of the same net: see `names`, or pass "
        "strict=False.",
        lambda: from_torch(variables, {**state, "conv.bias": uniform(8)}),
    )
    refused(
        ValueError,
        "`state` has none of the model's 1 parameters, as 'conv.weight'; see `names`.",
        lambda: from_torch(variables, {"stem.weight": uniform(8, 4, 3, 3)}, strict=False),
    )
    refused(
        ValueError,
        "`names` has 'stem', and no module is called so; there are 'conv'.",
        lambda: to_torch(variables, {"stem": "conv"}),
    )
    refused(
        ValueError,
        "'a/kernel' and 'b/kernel' are both 'b.weight' in PyTorch; expected two names: say in `names` what their modules are "
        "called there.",
        lambda: to_torch({"a": variables["conv"], "b": variables["conv"]}, {"a": "b"}),
    )
    refused(
        TypeError,
        "`model` is a int; expected a model of Flax (NNX), Equinox or Keras, a state of NNX, or a tree of arrays as Linen's "
        "`variables`.",
        lambda: to_torch(3),
    )
    refused(
        TypeError,
        "`state` is a list; expected names and arrays, as net.state_dict() returns them.",
        lambda: from_torch(variables, []),
    )
    refused(
        ValueError,
        "`model`, a dict, has no parameters; expected a net whose layers have been built.",
        lambda: to_torch({"step": np.array(3)}),
    )
    refused(
        ValueError,
        "`model` has the collection 'cache'; expected Linen's 'params' and 'batch_stats' alone: "
        '{"params": variables["params"], ...}.',
        lambda: to_torch({"params": variables, "cache": {}}),
    )
    attention = {"heads": {name: {"kernel": uniform(6, 2, 3)} for name in ("query", "key", "value", "out")}}
    with pytest.raises(ValueError, match=r"^'heads/query/kernel' belongs to an attention, whose parameters lie otherwise"):
        to_torch(attention)


def test_weights_of_a_plain_net():
    variables = {"deform": {"kernel": uniform(3, 3, 4, 8), "offset_conv": {"kernel": uniform(3, 3, 4, 27)}}}
    state = {"deform.weight": uniform(8, 4, 3, 3), "head.weight": uniform(2, 2)}
    with pytest.raises(
        ValueError, match=r"no 'deform.offset_conv.weight', for .* For weights of a plain net pass strict=False\."
    ):
        from_torch(variables, state)
    found = from_torch(variables, state, strict=False)
    np.testing.assert_array_equal(found["deform"]["kernel"], state["deform.weight"].transpose(2, 3, 1, 0))
    assert found["deform"]["offset_conv"]["kernel"] is variables["deform"]["offset_conv"]["kernel"]


# Whole nets, beside PyTorch.

LAYER = {"offset_groups": 2, "max_offset": 3.0, "mask_scale": 1.5}
X = RANDOM.normal(size=(2, 3, 9, 8)).astype(np.float32)


def torch_net(norm="batch"):
    torch = pytest.importorskip("torch")
    from deformconv.torch import DeformConv2d

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 4, (3, 2), padding=1)
            self.norm = torch.nn.BatchNorm2d(4) if norm == "batch" else torch.nn.GroupNorm(2, 4)
            self.deform = DeformConv2d(4, 6, 3, stride=2, padding=1, groups=2, **LAYER)
            self.head = torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.deform(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))

    net = Net().eval()
    with torch.no_grad():
        for tensor in [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.from_numpy(uniform(*tensor.shape)))
    return net, net(torch.from_numpy(X)).detach().numpy()


def loads(net, state, x_expected):
    """PyTorch takes what was made of a net, without a warning, and computes the same."""
    import torch

    from deformconv.convert import convert_state_dict

    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    net.load_state_dict(convert_state_dict(state, source="deformconv", model=net))
    np.testing.assert_allclose(net(torch.from_numpy(X)).detach().numpy(), x_expected, rtol=1e-4, atol=1e-5)


def nnx_net():
    nnx = pytest.importorskip("flax.nnx")
    from deformconv.flax import DeformConv

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 4, (3, 2), padding=1, rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            window = {"strides": 2, "padding": 1, "feature_group_count": 2}
            self.deform = DeformConv(4, 6, (3, 3), **window, **LAYER, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.head = nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(self.drop(self.deform(nnx.relu(self.norm(self.stem(x)))).mean((1, 2))))

    return Net(nnx.Rngs(0))


def own_module(nnx, seed=0):
    """A module whose own parameters have names of Flax's."""

    class Own(nnx.Module):
        def __init__(self, rngs):
            self.kernel, self.scale = (nnx.Param(rngs.params.uniform(shape)) for shape in ((3, 5), (4,)))
            self.line = nnx.Linear(2, 3, rngs=rngs)

    return Own(nnx.Rngs(seed))


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")
    torch_one, expected = torch_net()
    net = nnx_net()
    assert from_torch(net, torch_one.state_dict()) is net
    np.testing.assert_allclose(net(X.transpose(0, 2, 3, 1)), expected, rtol=1e-4, atol=1e-5)
    assert to_torch(net)._metadata == {"deform": {"version": 1, "mask_scale": 1.5}}
    loads(torch_one, to_torch(net), expected)
    state = nnx.state(net)
    loads(torch_one, to_torch(state), expected)
    other = nnx_net()
    nnx.update(other, from_torch(nnx.state(other), torch_one.state_dict()))
    np.testing.assert_allclose(other(X.transpose(0, 2, 3, 1)), expected, rtol=1e-4, atol=1e-5)
    torch_one.deform.mask_scale = 2.0
    with pytest.raises(ValueError, match=r"^the masks of 'deform' are 2\*sigmoid in `state` and 1.5\*sigmoid in the model"):
        from_torch(net, torch_one.state_dict())
    sequential = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    assert list(to_torch(sequential)) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    own = own_module(nnx)
    assert {name: array.shape for name, array in to_torch(own).items()} == {
        "kernel": (3, 5), "line.bias": (3,), "line.weight": (3, 2), "scale": (4,),
    }  # fmt: skip
    np.testing.assert_array_equal(from_torch(own_module(nnx, 1), to_torch(own)).kernel[...], own.kernel[...])
    for layer in (nnx.ConvTranspose(3, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.LinearGeneral(3, (2, 2), rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match=rf"^'bias' belongs to a {type(layer).__name__}, whose parameters lie otherwise"):
            to_torch(layer)


def test_flax_linen():
    torch_one, expected = torch_net()
    nn = pytest.importorskip("flax.linen")
    jax = pytest.importorskip("jax")
    from deformconv.flax.linen import DeformConv

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 2), padding=1)(x)))
            x = DeformConv(6, (3, 3), strides=2, padding=1, feature_group_count=2, **LAYER)(x)
            return nn.Dense(5)(x.mean((1, 2)))

    names = {"Conv_0": "stem", "BatchNorm_0": "norm", "DeformConv_0": "deform", "Dense_0": "head"}
    x = X.transpose(0, 2, 3, 1)
    variables = from_torch(Net().init(jax.random.key(0), x), torch_one.state_dict(), names)
    np.testing.assert_allclose(Net().apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    state = to_torch(variables, names)
    loads(torch_one, state, expected)


def equinox_net():
    eqx = pytest.importorskip("equinox")
    import jax

    from deformconv.equinox import DeformConv2d

    class Net(eqx.Module):
        stem: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm
        deform: DeformConv2d
        head: eqx.nn.Linear

        def __init__(self):
            keys = jax.random.split(jax.random.key(0), 3)
            self.stem = eqx.nn.Conv2d(3, 4, (3, 2), padding=1, key=keys[0])
            self.norm = eqx.nn.GroupNorm(2, 4)
            self.deform = DeformConv2d(4, 6, 3, stride=2, padding=1, groups=2, **LAYER, key=keys[1])
            self.head = eqx.nn.Linear(6, 5, key=keys[2])

        def __call__(self, x):
            return self.head(self.deform(jax.nn.relu(self.norm(self.stem(x)))).mean((1, 2)))

    return Net()


def test_equinox():
    torch_one, expected = torch_net("group")
    net = equinox_net()
    import equinox as eqx
    import jax

    from deformconv.equinox import DeformConv3d

    made = from_torch(net, torch_one.state_dict())
    assert made is not net and made.stem.bias.shape == (4, 1, 1)
    np.testing.assert_allclose(jax.vmap(made)(X), expected, rtol=1e-4, atol=1e-5)
    loads(torch_one, to_torch(made), expected)
    key = jax.random.key(0)
    sequential = eqx.nn.Sequential([eqx.nn.Linear(3, 4, key=key), eqx.nn.Lambda(jax.nn.relu), DeformConv3d(4, 2, 3, key=key)])
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "2.offset_conv.weight", "2.offset_conv.bias"]
    assert list(to_torch(sequential)) == names
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16") if eqx.is_array(leaf) else leaf, sequential)
    assert {array.dtype.name for array in to_torch(half).values()} == {"float32"}
    assert from_torch(half, to_torch(sequential)).layers[0].weight.dtype == "bfloat16"
    for layer, more in ((eqx.nn.ConvTranspose2d(3, 4, 3, key=key), ""), (eqx.nn.MLP(3, 4, 5, 1, key=key).layers[0], None)):
        if more is None:
            assert list(to_torch(layer)) == ["weight", "bias"]
            continue
        with pytest.raises(
            ValueError, match=r"^'weight' belongs to a ConvTranspose2d, whose parameters lie otherwise in PyTorch"
        ):
            to_torch(layer)
    norm = eqx.nn.BatchNorm(4, "batch", **({"mode": "batch"} if "mode" in eqx.nn.BatchNorm.__init__.__annotations__ else {}))
    with pytest.raises(ValueError, match=r"BatchNorm, .* Its mean and variance lie in an eqx.nn.State, not in the model\."):
        to_torch(norm)


def test_keras():
    torch_one, expected = torch_net()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    layers = pytest.importorskip("deformconv.keras")

    deform = layers.DeformConv2D(6, 3, strides=2, padding="valid", groups=2, name="deform", **LAYER)
    net = keras.Sequential([
        keras.layers.Input((9, 8, 3)), keras.layers.ZeroPadding2D(1), keras.layers.Conv2D(4, (3, 2), name="stem"),
        keras.layers.BatchNormalization(epsilon=1e-5, name="norm"), keras.layers.ReLU(), keras.layers.ZeroPadding2D(1),
        deform, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5, name="head"),
    ])  # fmt: skip
    assert from_torch(net, torch_one.state_dict()) is net
    found = net.predict(X.transpose(0, 2, 3, 1), verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    loads(torch_one, to_torch(net), expected)

    class Own(keras.layers.Layer):
        def build(self, shape):
            self.matrix = self.add_weight(shape=(3, 5), name="kernel")
            self.factors = self.add_weight(shape=(4,), name="gamma")

    own = Own()
    own.build(None)
    assert {name: array.shape for name, array in to_torch(own).items()} == {"kernel": (3, 5), "gamma": (4,)}
    layer = keras.layers.Conv2DTranspose(4, 3, name="up")
    layer.build((1, 9, 8, 3))
    with pytest.raises(ValueError, match=r"^'kernel' belongs to a Conv2DTranspose, whose parameters lie otherwise in PyTorch"):
        to_torch(layer)
