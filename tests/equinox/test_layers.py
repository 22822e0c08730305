"""The layers stand where Equinox's stood: constructor, random numbers, padding, transformations, files."""

from __future__ import annotations

import inspect
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.frontends.suite import MISFITS, LayerSuite
from tests.tolerances import assert_close

import deformconv
from deformconv.equinox import DeformConv, DeformConv1d, DeformConv2d, DeformConv3d, layers
from deformconv.jax import deform_conv

KEY = jax.random.key(7)
CLASSES = {1: DeformConv1d, 2: DeformConv2d, 3: DeformConv3d}
THEIRS = {1: eqx.nn.Conv1d, 2: eqx.nn.Conv2d, 3: eqx.nn.Conv3d}
ours_only = ("modulated", "offset_groups", "predict_offsets", "mask_scale", "max_offset", "boundary", "unknown")


@pytest.fixture(autouse=True)
def float64():
    kept = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", kept)


def images(rank=2, channels=4, count=2, dtype="float64"):
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, channels, *(9, 8, 7)[:rank])), dtype)


def varied(layer, seed=1):
    """The layer with a predictor whose offsets reach over the border."""
    random = np.random.default_rng(seed)
    weight, bias = layer.offset_conv.weight, layer.offset_conv.bias
    values = 0.3 * random.normal(size=weight.shape), random.normal(size=bias.shape)
    found = tuple(jnp.asarray(value, weight.dtype) for value in values)
    return eqx.tree_at(lambda layer: (layer.offset_conv.weight, layer.offset_conv.bias), layer, found)


def made(rank=2, **arguments):
    return varied(CLASSES[rank](4, 6, 3, **{"padding": 1, "key": KEY} | arguments))


def of_one_image(misfit):
    """What the layer says under vmap, where it sees one image."""
    shape, dtype, raises, text = misfit
    for batch, image in ((r"\(2, 5,", r"\(5,"), ("2 axes", "1 axis"), (r"\(9, 9\); .* takes 4", r"\(9,\); .* takes 3")):
        text = text.replace(batch, image)
    return shape, dtype, raises, text


class TestLayers(LayerSuite):
    module = layers
    examples = 15
    input = "x"
    words = {"bias": "use_bias"}  # noqa: RUF012
    misfits = [of_one_image(misfit) for misfit in MISFITS]  # noqa: RUF012

    def array(self, array):
        return jnp.array(array)

    def numpy(self, array):
        return np.asarray(array)

    def layer(self, rank, *, modulated, **arguments):
        return CLASSES[rank](**self.renamed(arguments), modulated=modulated, dtype=jnp.float64, key=KEY)

    def weights(self, layer):
        found = {"weight": layer.weight, "bias": layer.bias}
        found |= {"offset_weight": layer.offset_conv.weight, "offset_bias": layer.offset_conv.bias}
        one_axis = ("bias", "offset_bias")
        return {
            name: None if array is None else np.asarray(array.reshape(-1) if name in one_axis else array)
            for name, array in found.items()
        }

    def set_predictor(self, layer, weight, bias):
        values = jnp.asarray(weight), jnp.asarray(bias).reshape(layer.offset_conv.bias.shape)
        for name, value in zip(("weight", "bias"), values, strict=True):
            object.__setattr__(layer.offset_conv, name, value)  # what tree_at does in a copy, for tests that keep the layer

    def call(self, layer, input):
        return jax.vmap(layer)(input)

    def predict(self, layer, input):
        return jax.vmap(layer.offsets_and_mask)(input)


@pytest.mark.parametrize("rank", CLASSES)
def test_the_constructor_is_equinoxs(rank):
    for ours, theirs in ((CLASSES[rank], THEIRS[rank]), (DeformConv, eqx.nn.Conv)):
        mine, other = (inspect.signature(layer).parameters for layer in (ours, theirs))
        assert list(mine) == [*other, *ours_only] and issubclass(ours, theirs)
        for name in other:
            usual = name in ("stride", "padding", "dilation") and theirs is not eqx.nn.Conv  # Equinox writes (1, 1)
            assert usual or mine[name].default == other[name].default, name
            assert mine[name].kind == other[name].kind, name
        assert all(mine[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours_only[:-1])


def test_another_librarys_word():
    for make in (lambda **word: DeformConv2d(4, 6, 3, key=KEY, **word), lambda **word: DeformConv(2, 4, 6, 3, key=KEY, **word)):
        for word, here in (("strides", "stride"), ("bias", "use_bias"), ("deform_groups", "offset_groups")):
            with pytest.raises(TypeError, match=rf"^DeformConv(2d)?\(\) got .* argument '{word}'; here: {here}\."):
                make(**{word: 1})


@pytest.mark.parametrize("rank", CLASSES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"padding": 1, "groups": 2}, {"padding": "SAME", "stride": 2, "kernel_size": 4},
     {"padding": "same_lower", "kernel_size": 2}, {"padding": "VALID", "use_bias": False},
     {"padding": "SAME", "dilation": 2, "stride": 3}, {"padding": 2, "padding_mode": "REFLECT"},
     {"padding": "SAME", "padding_mode": "circular", "stride": 2}, {"padding": 1, "padding_mode": "REPLICATE", "dilation": 2}],
    ids=str,
)  # fmt: skip
def test_a_fresh_layer_is_equinoxs_of_the_same_key(arguments, rank):
    arguments = {"kernel_size": 3, **arguments, "key": KEY}
    ours, theirs = CLASSES[rank](4, 6, **arguments), THEIRS[rank](4, 6, **arguments)
    general = DeformConv(rank, 4, 6, **arguments)
    for layer in (ours, general):
        np.testing.assert_array_equal(layer.weight, theirs.weight)
        assert (layer.bias is None) == (theirs.bias is None)
        if theirs.bias is not None:
            np.testing.assert_array_equal(layer.bias, theirs.bias)
    x = images(rank)
    expected = jax.vmap(theirs)(x)
    assert_close(np.asarray(jax.vmap(ours)(x)), np.asarray(expected), "float64")
    assert_close(np.asarray(general(x[0])), np.asarray(expected[0]), "float64")
    assert ours.padding == theirs.padding and ours.padding_mode == theirs.padding_mode


@pytest.mark.parametrize("padding", [((0, 1), (2, 0)), [(0, 1), (2, 0)], (0, 1), [1, 0]], ids=str)
def test_numbers_and_pairs_of_padding(padding):
    x = images()
    theirs, ours = (layer(4, 6, 3, padding=padding, key=KEY) for layer in (eqx.nn.Conv2d, DeformConv2d))
    assert_close(np.asarray(ours(x[0])), np.asarray(theirs(x[0])), "float64")
    assert [tuple(pair) for pair in ours.padding] == [tuple(pair) for pair in theirs.padding]


@pytest.mark.parametrize("mode", layers.PADDING_MODES)
def test_the_input_is_padded_before_it_is_sampled(mode):
    """In another mode than zeros, offsets move the taps over what was padded."""
    layer, x = made(padding=((1, 2), (0, 3)), padding_mode=mode), images()[0]
    offset, mask = layer.offsets_and_mask(x)
    how = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}.get(mode, "constant")
    padded = np.pad(np.asarray(x), ((0, 0), (1, 2), (0, 3)), how)
    arrays = (np.asarray(array) for array in (offset[None], layer.weight, layer.bias.reshape(-1)))
    expected = deformconv.deform_conv(padded[None], *arrays, mask=np.asarray(mask)[None])[0]
    assert_close(np.asarray(layer(x)), expected, "float64")


def primitives(jaxpr):
    """The names of all operations, within calls as well."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def calls_of_kernels(function, *arguments):
    found = list(primitives(jax.make_jaxpr(function)(*arguments).jaxpr))
    return sum(name.startswith("deform_conv") for name in found), found.count("scan") + found.count("while")


def test_vmap_is_one_call():
    layer, x = made(groups=2, offset_groups=2), images(count=5)
    assert calls_of_kernels(jax.vmap(layer), x) == (1, 0)
    expected = np.stack([layer(image) for image in x])
    assert_close(np.asarray(jax.vmap(layer)(x)), expected, "float64")
    assert_close(np.asarray(jax.jit(jax.vmap(layer))(x)), expected, "float64")
    nested = jax.vmap(jax.vmap(layer))(x.reshape(1, 5, *x.shape[1:]))
    assert calls_of_kernels(jax.vmap(jax.vmap(layer)), x[None])[0] == 1
    assert_close(np.asarray(nested[0]), expected, "float64")


def test_an_ensemble_of_layers_is_one_call():
    make = lambda key: DeformConv2d(4, 6, 3, padding=1, key=key)  # noqa: E731
    keys = jax.random.split(KEY, 3)
    ensemble = eqx.filter_vmap(make)(keys)
    ensemble = eqx.tree_at(lambda layer: layer.offset_conv.bias, ensemble, jax.random.normal(KEY, (3, 27, 1, 1)))
    assert ensemble.weight.shape == (3, 6, 4, 3, 3)
    x = images(count=2)
    numbers, others = eqx.partition(ensemble, eqx.is_array)

    def each(numbers, x):
        return eqx.filter_vmap(lambda layer, x: jax.vmap(layer)(x), in_axes=(eqx.if_array(0), None))(
            eqx.combine(numbers, others), x
        )

    assert calls_of_kernels(each, numbers, x)[0] == 1
    found = each(numbers, x)
    for number, key in enumerate(keys):
        layer = eqx.tree_at(lambda layer: layer.offset_conv.bias, make(key), ensemble.offset_conv.bias[number])
        assert_close(np.asarray(found[number]), np.asarray(jax.vmap(layer)(x)), "float64")


def test_gradients_reach_every_parameter():
    """Those of filter_grad are the slopes of the loss."""
    layer, x = made(max_offset=2.0), images()

    @eqx.filter_jit
    def loss(layer):
        return jnp.sum(jax.vmap(layer)(x) ** 2)

    gradient = eqx.filter_jit(eqx.filter_grad(loss))(layer)
    numbers, others = eqx.partition(layer, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(numbers)
    assert len(leaves) == 4
    for place, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        direction = jnp.asarray(np.random.default_rng(place).normal(size=leaf.shape))
        values = []
        for step in (1e-6, -1e-6):
            moved = jax.tree.unflatten(tree, [*leaves[:place], leaf + step * direction, *leaves[place + 1 :]])
            values.append(float(loss(eqx.combine(moved, others))))
        assert float(jnp.sum(slope * direction)) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_per_image_gradients():
    layer, x = made(), images(count=3)
    gradient = eqx.filter_grad(lambda layer, image: jnp.sum(layer(image) ** 2))
    together = eqx.filter_vmap(gradient, in_axes=(None, 0))(layer, x)
    for number in range(3):
        for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(gradient(layer, x[number])), strict=True):
            assert_close(np.asarray(found[number]), np.asarray(expected), "float64")


def test_what_is_passed_is_what_is_computed():
    layer, x = made(offset_groups=2), images()[0]
    offset, mask = layer.offsets_and_mask(x)
    assert_close(np.asarray(layer(x, offset, mask)), np.asarray(layer(x)), "float64")
    moved = offset + 0.3
    expected = deform_conv(x[None], moved[None], layer.weight, layer.bias.reshape(-1), padding=1)[0]
    assert_close(np.asarray(layer(x, moved)), np.asarray(expected), "float64")
    together = jax.vmap(layer)(x[None], moved[None], mask[None])
    assert_close(np.asarray(together[0]), np.asarray(layer(x, moved, mask, key=None)), "float64")


def test_what_is_passed_and_does_not_fit():
    layer, x = made(), images()[0]
    offset, mask = layer.offsets_and_mask(x)
    for call, raises, text in (
        (lambda: layer(x, None, mask), TypeError, "`mask` was passed without `offset`"),
        (lambda: made(modulated=False)(x, offset, mask), ValueError, "`mask` was passed to a layer without modulation"),
        (lambda: layer(x, offset[None], mask), deformconv.ShapeError,
         "`offset` has 4 axes, shape (1, 18, 9, 8); expected 3, the channels and those of the output, height, width: "
         "without a batch axis, as the image has none."),
        (lambda: layer(x, offset, mask[0]), deformconv.ShapeError, "`mask` has 2 axes, shape (9, 8); expected 3"),
        (lambda: layer(x, offset[:17], mask), deformconv.ShapeError, "`offset` has 17 channels; a 3x3 kernel takes 2 axes x 9"),
        (lambda: layer(x, offset[:, 1:], mask), deformconv.ShapeError, "`offset` has spatial size 8x8; expected"),
        (lambda: layer(x, "here"), TypeError, "`offset` is a str; expected an array of JAX or NumPy."),
        (lambda: layer(x.tolist()), TypeError, "`x` is a list; expected an array of JAX or NumPy."),
        (lambda: layer(None), TypeError, "`x` is None; expected an array of JAX or NumPy."),
    ):  # fmt: skip
        with pytest.raises(raises) as raised:
            call()
        assert str(raised.value).startswith(text)
        assert "(1, " not in str(raised.value) or "4 axes" in text


def test_a_batch_without_vmap():
    for rank, layer in ((1, made(1)), (2, made()), (3, made(3))):
        with pytest.raises(deformconv.ShapeError) as raised:
            layer(images(rank))
        assert str(raised.value).endswith("one image. For a batch of images: jax.vmap(layer)(x).")
    grey = DeformConv2d(1, 2, 3, key=KEY)
    with pytest.raises(
        deformconv.ShapeError, match=r"takes 3, \(C_in, height, width\), one image\. For an image of one channel"
    ):
        grey(images()[0, 0])


def test_a_layer_without_a_predictor():
    layer = DeformConv2d(4, 6, 3, padding=1, predict_offsets=False, key=KEY)
    assert layer.offset_conv is None
    x, whole = images()[0], made()
    offset, mask = whole.offsets_and_mask(x)
    assert_close(np.asarray(layer(x, offset, mask)), np.asarray(whole(x)), "float64")
    for call in (layer, layer.offsets_and_mask):
        with pytest.raises(TypeError, match=r"`offset` is missing and this layer predicts none \(predict_offsets=False\)"):
            call(x)
    free = DeformConv2d(4, 6, 3, padding=1, predict_offsets=False, offset_groups=None, key=KEY)
    assert free(x, jnp.concatenate([offset, offset]), jnp.concatenate([mask, mask])).shape == (6, 9, 8)


def test_arguments_of_equinox_that_are_refused():
    for arguments, raises, text in (
        ({"padding": "FULL"}, deformconv.ShapeError, "`padding` is 'FULL'; expected one of 'SAME', 'SAME_LOWER', 'VALID'"),
        ({"padding_mode": "MIRROR"}, ValueError, "`padding_mode` is 'MIRROR'; expected one of ZEROS, REFLECT"),
        ({"max_offset": 0}, ValueError, "`max_offset` is 0; expected a number above 0"),
        ({"offset_groups": None}, ValueError, "`offset_groups` is None"),
    ):
        with pytest.raises(raises, match=re.escape(text)):
            DeformConv2d(4, 6, 3, key=KEY, **arguments)
    with pytest.raises(deformconv.ShapeError, match="`num_spatial_dims` is 4; expected 1, 2 or 3"):
        DeformConv(4, 4, 6, 3, key=KEY)


def test_max_offset_and_mask_scale():
    layer, x = made(max_offset=0.5, mask_scale=1.0), images()[0]
    bounded, mask = layer.offsets_and_mask(x)
    free, doubled = made().offsets_and_mask(x)
    assert_close(np.asarray(bounded), 0.5 * np.tanh(np.asarray(free) / 0.5), "float64")
    assert_close(np.asarray(mask), np.asarray(doubled) / 2, "float64")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    """Offsets are float32: a map that is wide is sampled where it should be."""
    layer, x = made(dtype=jnp.dtype(dtype)), images(dtype=dtype)
    assert layer.weight.dtype == layer.offset_conv.weight.dtype == dtype
    offset, mask = layer.offsets_and_mask(x[0])
    assert offset.dtype == mask.dtype == jnp.float32
    output = jax.vmap(layer)(x)
    assert output.dtype == dtype and layer(x[0], offset, mask).dtype == dtype
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf, layer)
    assert_close(np.asarray(output, "float64"), np.asarray(jax.vmap(exact)(x.astype("float64"))), dtype)
    gradient = eqx.filter_grad(lambda layer: jnp.sum(jax.vmap(layer)(x).astype(jnp.float32) ** 2))(layer)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {dtype}
    assert all(np.isfinite(np.asarray(leaf, "float32")).all() for leaf in jax.tree.leaves(gradient))


def test_float32_by_default():
    with jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(False):
        layer = DeformConv2d(4, 6, 3, key=KEY)
        assert layer.weight.dtype == layer.offset_conv.weight.dtype == jnp.float32
        assert layer(np.ones((4, 9, 8))).dtype == jnp.float32  # NumPy's float64 becomes what JAX has


def test_files(tmp_path):
    layer, x = made(), images()[0]
    eqx.tree_serialise_leaves(tmp_path / "layer.eqx", layer)
    other = eqx.tree_deserialise_leaves(tmp_path / "layer.eqx", DeformConv2d(4, 6, 3, padding=1, key=jax.random.key(0)))
    np.testing.assert_array_equal(other(x), layer(x))
    plan = eqx.filter_eval_shape(lambda: DeformConv2d(4, 6, 3, padding=1, key=KEY))
    np.testing.assert_array_equal(eqx.tree_deserialise_leaves(tmp_path / "layer.eqx", plan)(x), layer(x))


def test_in_a_sequential_net_that_is_trained():
    keys = jax.random.split(KEY, 2)
    net = eqx.nn.Sequential([
        DeformConv2d(4, 6, 3, padding=1, key=keys[0]), eqx.nn.Lambda(jax.nn.relu), DeformConv2d(6, 2, 3, stride=2, key=keys[1])
    ])  # fmt: skip
    x = images()
    target = jnp.roll(jax.vmap(net)(x), 1, 2)

    @eqx.filter_jit
    def step(net):
        loss, slope = eqx.filter_value_and_grad(lambda net: jnp.mean((jax.vmap(net)(x) - target) ** 2))(net)
        return loss, eqx.apply_updates(net, jax.tree.map(lambda slope: -0.1 * slope, slope))

    losses = []
    for _ in range(20):
        loss, net = step(net)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.abs(layer.offset_conv.weight).max() > 0 for layer in net.layers[::2])


def test_loops_over_a_nets_convolutions_pass_the_predictor_by():
    """As the one in Equinox's FAQ, which initialises weights anew."""
    is_convolution = lambda leaf: isinstance(leaf, eqx.nn.Conv)  # noqa: E731
    net = eqx.nn.Sequential([made(), eqx.nn.Conv2d(6, 2, 3, key=KEY)])
    found = [leaf for leaf in jax.tree.leaves(net, is_leaf=is_convolution) if is_convolution(leaf)]
    assert [type(layer) for layer in found] == [DeformConv2d, eqx.nn.Conv2d]


def test_a_predictor_of_your_own():
    layer = made()
    keys = jax.random.split(KEY, 2)
    deeper = eqx.nn.Sequential([eqx.nn.Conv2d(4, 5, 3, padding=1, key=keys[0]), eqx.nn.Conv2d(5, 27, 1, key=keys[1])])
    layer = eqx.tree_at(lambda layer: layer.offset_conv, layer, deeper)
    x = images()[0]
    raw = deeper(x)
    expected = deform_conv(
        x[None], raw[None, :18], layer.weight, layer.bias.reshape(-1), padding=1, mask=2 * jax.nn.sigmoid(raw[None, 18:])
    )
    assert_close(np.asarray(layer(x)), np.asarray(expected[0]), "float64")
