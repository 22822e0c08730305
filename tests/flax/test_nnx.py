"""Where nnx.Conv stood: arguments, random numbers, numbers, gradients and transformations are those of a convolution."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tests.flax.layers import FlaxLayerSuite, image, nearly, x64  # noqa: F401

import deformconv.flax.nnx as module
from deformconv import ShapeError
from deformconv.flax import DeformConv
from deformconv.jax.functional import deform_conv

RANKS = (1, 2, 3)
WORDS = ("SAME", "VALID", "SAME_LOWER", "CIRCULAR", "REFLECT")


@nnx.jit
def called(layer: nnx.Module, *arrays: jax.Array) -> jax.Array:
    """A call, compiled once as a whole instead of once for every operation."""
    return layer(*arrays)


@nnx.jit
def predicted(layer: DeformConv, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return layer.offsets_and_mask(x)


class TestLayers(FlaxLayerSuite):
    module = module
    examples = 7
    words = FlaxLayerSuite.words | {"out_channels": "out_features"}

    def layer(self, rank, *, modulated, **arguments):
        named = self.named(rank, arguments)
        return DeformConv(**named, modulated=modulated, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    def call(self, layer, input):
        return called(layer, input)

    def predict(self, layer, input):
        return predicted(layer, input)

    def weights(self, layer):
        predictor = layer.offset_conv
        return {
            "weight": self.turned(layer.kernel[...]),
            "bias": None if layer.bias is None else np.asarray(layer.bias[...]),
            "offset_weight": self.turned(predictor.kernel[...]),
            "offset_bias": np.asarray(predictor.bias[...]),
        }

    def set_predictor(self, layer, weight, bias):
        layer.offset_conv.kernel[...], layer.offset_conv.bias[...] = self.turned_back(weight), jnp.asarray(bias)


def varied(layer: DeformConv) -> DeformConv:
    """A predictor that moves taps by a pixel or two."""
    for number, parameter in enumerate((layer.offset_conv.kernel, layer.offset_conv.bias)):
        size = (0.3, 1.0)[number]
        parameter[...] = size * jax.random.normal(jax.random.key(number), parameter.shape, parameter.dtype)
    return layer


def test_the_first_arguments_are_those_of_a_convolution():
    theirs = {n: p for n, p in inspect.signature(nnx.Conv.__init__).parameters.items() if n != "rngs"}
    ours = inspect.signature(DeformConv.__init__).parameters
    own = ["modulated", "offset_groups", "predict_offsets", "mask_scale", "max_offset", "boundary", "unknown"]
    assert [name for name in ours if name != "rngs"][-len(own) :] == own
    for name, parameter in theirs.items():
        assert ours[name].kind is parameter.kind, name
        assert ours[name].default == parameter.default, name
    assert issubclass(DeformConv, nnx.Conv)


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"strides": 2}, {"kernel_dilation": 2}, {"feature_group_count": 2}, {"use_bias": False}, {"strides": None},
        {"padding": 1}, {"modulated": False}, {"mask_scale": 3.0, "offset_groups": 2},
        {"strides": 2, "kernel_dilation": 2, "feature_group_count": 4, "offset_groups": 2, "padding": 2},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("rank", RANKS)
def test_a_fresh_layer_is_the_convolution(rank, arguments):
    """Also with its parameters, for the same seed, and without disturbing the random numbers that follow."""
    own = {name: arguments[name] for name in ("modulated", "mask_scale", "offset_groups") if name in arguments}
    plain = {name: value for name, value in arguments.items() if name not in own}
    rngs, others = nnx.Rngs(3), nnx.Rngs(3)
    layer = DeformConv(4, 8, (3,) * rank, **arguments, rngs=rngs)
    convolution = nnx.Conv(4, 8, (3,) * rank, **plain, rngs=others)
    assert jnp.array_equal(jax.random.key_data(rngs.params()), jax.random.key_data(others.params()))
    assert jnp.array_equal(layer.kernel[...], convolution.kernel[...])
    x = image(2, *(7, 6, 5)[:rank], 4)
    if "mask_scale" not in own:
        assert nearly(called(layer, x), called(convolution, x))
    offset, mask = predicted(layer, x)
    assert not offset.any()
    assert mask is None if "modulated" in own else (mask == own.get("mask_scale", 2) / 2).all()


@pytest.mark.parametrize("padding", [*WORDS, "same", 0, 2, [2, 1], [(2, 0), (0, 1)], [[2, 0], [0, 1]]], ids=str)
@pytest.mark.parametrize(
    "window", [{}, {"strides": 2, "kernel_dilation": 2}, {"strides": (3, 2), "kernel_dilation": (1, 2)}], ids=str
)
def test_padding_is_that_of_the_convolution(padding, window):
    """An even kernel is padded by more after, or by more before; for strides and dilations, too."""
    x = image(2, 11, 12, 4)
    theirs = [tuple(pair) for pair in padding] if padding == [[2, 0], [0, 1]] else padding
    layer = DeformConv(4, 8, (4, 3), padding=padding, **window, rngs=nnx.Rngs(0))
    convolution = nnx.Conv(4, 8, (4, 3), padding=theirs, **window, rngs=nnx.Rngs(0))
    assert nearly(called(layer, x), called(convolution, x))


@pytest.mark.parametrize(("padding", "mode"), [("CIRCULAR", "wrap"), ("REFLECT", "reflect")])
def test_moved_taps_read_what_flax_pads(padding, mode):
    layer = varied(DeformConv(4, 8, (3, 3), padding=padding, rngs=nnx.Rngs(0)))
    x = image()
    offset, mask = layer.offsets_and_mask(x)
    padded = jnp.moveaxis(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=mode), -1, 1)
    weight = jnp.transpose(layer.kernel[...], (3, 2, 0, 1))
    expected = jnp.moveaxis(deform_conv(padded, offset, weight, layer.bias[...], mask=mask), 1, -1)
    assert nearly(layer(x), expected)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 2), (0,), (2, 0)], ids=str)
def test_any_axes_of_a_batch(batch, rank):
    layer = varied(DeformConv(4, 6, (3,) * rank, rngs=nnx.Rngs(0)))
    sizes = (5, 4, 3)[:rank]
    x = image(*batch, *sizes, 4)
    y = called(layer, x)
    offset, mask = predicted(layer, x)
    assert y.shape == (*batch, *sizes, 6)
    assert offset.shape == (*batch, rank * 3**rank, *sizes) and mask.shape == (*batch, 3**rank, *sizes)
    if 0 in batch:
        return
    assert nearly(called(layer, x, offset, mask), y)
    each = jnp.stack([called(layer, one) for one in x.reshape(-1, *sizes, 4)])
    assert nearly(y, each.reshape(y.shape))


def test_offsets_that_are_passed_are_used_as_they_are():
    layer = varied(DeformConv(4, 8, (3, 3), padding="VALID", max_offset=0.5, mask_scale=3.0, rngs=nnx.Rngs(0)))
    x = image()
    offset = 2 * image(2, 18, 7, 6)
    mask = image(2, 9, 7, 6)
    arrays = (jnp.moveaxis(x, -1, 1), offset, jnp.transpose(layer.kernel[...], (3, 2, 0, 1)), layer.bias[...])
    for given in ((), (mask,)):
        expected = jnp.moveaxis(deform_conv(*arrays, mask=given[0] if given else None), 1, -1)
        assert nearly(layer(x, offset, *given), expected)
    assert nearly(layer(np.asarray(x), np.asarray(offset, np.float16)), layer(x, offset.astype(jnp.float16)))
    predicted, masks = layer.offsets_and_mask(x)
    assert 0.4 < jnp.abs(predicted).max() <= 0.5
    assert 2 < masks.max() <= 3


def test_a_layer_without_a_predictor():
    layer = DeformConv(4, 8, (3, 3), predict_offsets=False, rngs=nnx.Rngs(0))
    assert layer.offset_conv is None
    assert set(nnx.to_flat_state(nnx.state(layer, nnx.Param)).paths) == {("kernel",), ("bias",)}
    x = image()
    assert nearly(layer(x, jnp.zeros((2, 18, 9, 8))), nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0))(x))
    for call in (layer, layer.offsets_and_mask):
        with pytest.raises(TypeError, match=r"`offset` is missing and this layer predicts none \(predict_offsets=False\)"):
            call(x)
    layer.offset_conv = nnx.Conv(4, 27, (3, 3), rngs=nnx.Rngs(1))  # one of your own
    assert layer(x).shape == (2, 9, 8, 8)


# Mistakes in a call. Those in arguments and inputs are in the suite.


def test_what_does_not_fit_in_a_call():
    layer, x = DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0)), image()
    offset, mask = layer.offsets_and_mask(x)
    v1 = DeformConv(4, 8, (3, 3), modulated=False, rngs=nnx.Rngs(0))
    for call, raises, text in [
        (lambda: layer(x, mask=mask), TypeError, "`mask` was passed without `offset`"),
        (lambda: v1(x, offset, mask), ValueError, "layer without modulation"),
        (lambda: layer(x, jnp.moveaxis(offset, 1, -1)), ShapeError, "`offset` looks channels-last|`offset` has"),
        (lambda: layer(x, jnp.zeros((2, 27, 9, 8))), ShapeError, "`offset` has 27 channels; .* pass the last 9 as `mask`"),
        (lambda: layer(x, offset[0]), ShapeError, r"`offset` has shape \(18, 9, 8\); expected \(2, channels, height, width\)"),
        (lambda: layer(x[None], offset), ShapeError, r"`offset` has shape .* expected \(1, 2, channels, height, width\)"),
        (lambda: layer(x[None], offset[None], mask), ShapeError, "`mask` has shape .*: the axes of a batch of `inputs`"),
        (lambda: layer(x, offset, out_sharding="x"), ValueError, "`out_sharding` is 'x'; expected None, since .*shard_map"),
        (lambda: layer([[1.0]]), TypeError, "`inputs` is a list; expected an array"),
        (lambda: layer(None), TypeError, "`inputs` is a NoneType; expected an array"),
    ]:
        with pytest.raises(raises, match=text):
            call()
        with pytest.raises(raises, match=text):
            jax.jit(call)()


@pytest.mark.parametrize(
    ("word", "here"),
    [("stride", "strides"), ("dilation", "kernel_dilation"), ("groups", "feature_group_count"), ("bias", "use_bias"),
     ("in_channels", "in_features"), ("filters", "out_features"), ("deform_groups", "offset_groups")],
)  # fmt: skip
def test_another_librarys_word(word, here):
    with pytest.raises(TypeError, match=rf"DeformConv\(\) got an unexpected keyword argument '{word}'; here: {here}\."):
        DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0), **{word: 1})


# Dtypes.


@pytest.mark.parametrize(
    ("half", "where"),
    [
        (jnp.bfloat16, "dtype"),
        (jnp.bfloat16, "param_dtype"),
        (jnp.bfloat16, "both"),
        (jnp.bfloat16, "input"),
        (jnp.float16, "both"),
    ],
)
def test_half_precision(half, where):
    """Predictor and operator compute in float32 from rounded inputs and kernels; the output's dtype is nnx.Conv's."""
    dtypes = {"dtype": {"dtype": half}, "param_dtype": {"param_dtype": half}, "input": {}}
    arguments = dtypes.get(where, {"dtype": half, "param_dtype": half})
    layer = varied(DeformConv(4, 8, (3, 3), **arguments, rngs=nnx.Rngs(0)))
    convolution = nnx.Conv(4, 8, (3, 3), **arguments, rngs=nnx.Rngs(0))
    x = image(dtype=half if where in ("input", "both") else np.float32)
    y = called(layer, x)
    assert y.dtype == called(convolution, x).dtype
    offset, mask = predicted(layer, x)
    assert offset.dtype == mask.dtype == jnp.float32
    rounded = x.astype(y.dtype).astype(jnp.float32)
    weight = jnp.transpose(layer.kernel[...].astype(y.dtype).astype(jnp.float32), (3, 2, 0, 1))
    expected = jnp.moveaxis(deform_conv(jnp.moveaxis(rounded, -1, 1), offset, weight, padding=1, mask=mask), 1, -1)
    assert nearly(y, expected.astype(y.dtype), 2e-6 if y.dtype == jnp.float32 else 1e-2)
    gradients = nnx.jit(nnx.grad(lambda layer: layer(x).astype(jnp.float32).var()))(layer)
    assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradients) if leaf.shape != (8,))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(arguments.get("param_dtype", np.float32))}


@pytest.mark.usefixtures("x64")
def test_dtypes_are_promoted_as_the_convolutions_are():
    for ours, theirs in product(("float32", "float64"), ("float32", "float64", "uint8", "bfloat16")):
        layer = DeformConv(4, 8, (3, 3), param_dtype=ours, rngs=nnx.Rngs(0))
        convolution = nnx.Conv(4, 8, (3, 3), param_dtype=ours, rngs=nnx.Rngs(0))
        x = jnp.abs(10 * image()).astype(theirs)
        found, expected = called(layer, x), called(convolution, x)
        assert found.dtype == expected.dtype
        assert nearly(found, expected, 2e-6 if found.dtype == np.float32 else 1e-14)


def test_a_function_for_promotion_is_called():
    calls = []

    def promote(arrays, *, dtype):
        calls.append(dtype)
        return tuple(None if array is None else jnp.asarray(array, dtype) for array in arrays)

    layer = DeformConv(4, 8, (3, 3), dtype=jnp.float32, promote_dtype=promote, rngs=nnx.Rngs(0))
    layer(image())
    assert calls == [jnp.float32, jnp.float32]  # the layer's and the predictor's


# What Flax can do with a convolution.


def test_the_kernels_mask_metadata_and_initialisers():
    mask = jnp.tril(jnp.ones((8, 4))).T.reshape(1, 1, 4, 8) * jnp.ones((3, 3, 1, 1))
    partition = nnx.with_partitioning(nnx.initializers.normal(), (None, None, None, "model"))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:  # newer Flax places what is annotated at once
        made = [
            cls(4, 8, (3, 3), mask=mask, kernel_init=partition, bias_init=nnx.initializers.ones_init(), rngs=nnx.Rngs(0))
            for cls in (DeformConv, nnx.Conv)
        ]
    assert nearly(made[0](image()), made[1](image()))
    assert made[0].kernel.get_metadata() == made[1].kernel.get_metadata()
    assert "model" in str(made[0].kernel.get_metadata())
    if "kernel_metadata" in inspect.signature(nnx.Conv.__init__).parameters:
        layer = DeformConv(4, 8, (3, 3), kernel_metadata={"note": 1}, bias_metadata={"note": 2}, rngs=nnx.Rngs(0))
        assert (layer.kernel.note, layer.bias.note) == (1, 2)


def test_names_of_parameters():
    layer = DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(layer))}
    assert shapes == {
        ("bias",): (8,),
        ("kernel",): (3, 3, 4, 8),
        ("offset_conv", "bias"): (27,),
        ("offset_conv", "kernel"): (3, 3, 4, 27),
    }


def test_what_it_looks_like():
    layer = DeformConv(4, 8, (3, 3), max_offset=2, rngs=nnx.Rngs(0))
    text = repr(layer)
    assert text.startswith("DeformConv(") and "max_offset=2.0" in text and "offset_conv=Conv(" in text
    nnx.display(layer)
    assert "offset_conv" in nnx.tabulate(layer, image())


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.deform = DeformConv(4, 8, (3, 3), offset_groups=2, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.deform(nnx.relu(self.stem(x))))
        return self.head(x.mean(axis=(1, 2)))


def optimizer_for(net: Any, transformation: Any) -> Any:
    return nnx.Optimizer(net, transformation, wrt=nnx.Param)


def step(net: Net, optimizer: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    def loss_of(net: Net) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(net)
    optimizer.update(*([net] if "model" in inspect.signature(optimizer.update).parameters else []), gradients)
    return loss


def test_training_moves_the_predictor():
    """Jitted and eager the same."""
    x, labels = image(8, 9, 9, 1), jnp.arange(8) % 2
    losses = []
    for train in (step, nnx.jit(step)):
        net = Net(nnx.Rngs(0))
        optimizer = optimizer_for(net, optax.adam(1e-2))
        losses.append([float(train(net, optimizer, x, labels)) for _ in range(10)])
        assert losses[-1][-1] < 0.9 * losses[-1][0]
        assert net.deform.offset_conv.kernel[...].any() and net.deform.offset_conv.bias[...].any()
    assert nearly(*losses, 1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("modulated", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize("rank", RANKS)
def test_every_gradient_is_that_of_the_portable_form(rank, modulated):
    """The kernels' backward pass, through the predictor, against derivatives that JAX takes of the definition."""
    layer = DeformConv(
        4, 6, (3,) * rank, strides=2, feature_group_count=2, offset_groups=2, modulated=modulated, max_offset=1.5,
        param_dtype=jnp.float64, rngs=nnx.Rngs(0),
    )  # fmt: skip
    varied(layer)
    x = image(2, *(7, 6, 5)[:rank], 4, dtype=np.float64)

    def portable(layer, x):
        offset, mask = layer.offsets_and_mask(x)
        weight = jnp.moveaxis(layer.kernel[...], (-1, -2), (0, 1))
        pairs = jax.lax.padtype_to_pads(x.shape[1:-1], (3,) * rank, (2,) * rank, "SAME")
        y = deform_conv(
            jnp.moveaxis(x, -1, 1), offset, weight, layer.bias[...], 2, tuple(pairs), mask=mask,
            groups=2, offset_groups=2, backend="portable",
        )  # fmt: skip
        return jnp.moveaxis(y, 1, -1)

    def gradients(call):
        return jax.tree.leaves(nnx.jit(nnx.grad(lambda layer, x: jnp.sin(call(layer, x)).sum(), argnums=(0, 1)))(layer, x))

    found, expected = gradients(lambda layer, x: layer(x)), gradients(portable)
    assert len(found) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.any() and nearly(ours, theirs, 1e-9)


def test_split_and_merge():
    layer = varied(DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(layer)
    again = nnx.merge(graph, state)
    assert isinstance(again, DeformConv) and jnp.array_equal(again(image()), layer(image()))
    assert isinstance(nnx.clone(layer), DeformConv)
    abstract = nnx.eval_shape(lambda: DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0)))
    nnx.update(abstract, state)
    assert jnp.array_equal(abstract(image()), layer(image()))


def test_a_mapped_call_is_the_call_of_a_batch():
    layer, x = varied(DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0))), image()
    assert nearly(jax.vmap(layer)(x), layer(x))
    assert nearly(nnx.vmap(lambda layer, one: layer(one), in_axes=(None, 0))(layer, x), layer(x))


def test_layers_are_mapped_and_scanned_over():
    """An ensemble of layers, and as many layers one after the other."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def made(rngs: nnx.Rngs) -> DeformConv:
        return DeformConv(4, 4, (3, 3), rngs=rngs)

    layers, x = made(nnx.Rngs(0)), image()
    assert layers.kernel[...].shape == (3, 3, 3, 4, 4) and layers.offset_conv.bias[...].shape == (3, 27)
    layers.offset_conv.bias[...] += 0.3 * image(3, 27)
    graph, state = nnx.split(layers)
    each = [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(3)]

    @nnx.vmap(in_axes=(0, None))
    def together(layer: DeformConv, x: jax.Array) -> jax.Array:
        return layer(x)

    assert nearly(together(layers, x), jnp.stack([layer(x) for layer in each]))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def one_by_one(x: jax.Array, layer: DeformConv) -> jax.Array:
        return jnp.tanh(layer(x))

    y = x
    for layer in each:
        y = jnp.tanh(layer(y))
    assert nearly(one_by_one(x, layers), y, 1e-5)
    assert nearly(nnx.jit(nnx.remat(lambda layer, x: layer(x)))(each[0], x), each[0](x))


def test_a_state_is_saved_and_loaded(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    layer = varied(DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0)))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(nnx.state(layer)))
        checkpointer.wait_until_finished()
        fresh = DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(1))
        graph, state = nnx.split(fresh)
        nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / "state", nnx.to_pure_dict(state)))
    assert jnp.array_equal(nnx.merge(graph, state)(image()), layer(image()))


def test_a_trained_convolutions_state_fits():
    convolution = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(7))
    layer = DeformConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.state(convolution))
    assert nearly(layer(image()), convolution(image()))
