"""Keras' layers on the backend of this process: numbers, errors, and what Keras promises of its convolutions."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as keras_layers
from tests.frontends.suite import LAYERS, MISFITS, REFUSED, LayerSuite
from tests.keras.backends import BACKEND, DTYPE, TRAINS, images, move, numpy
from tests.tolerances import assert_close, error

import deformconv
from deformconv.keras import DeformConv1D, DeformConv2D, DeformConv3D, layers
from deformconv.keras.operator import deform_conv
from deformconv.ops.window import same_size_padding

PAIRS = [(DeformConv1D, keras_layers.Conv1D), (DeformConv2D, keras_layers.Conv2D), (DeformConv3D, keras_layers.Conv3D)]
trains = pytest.mark.skipif(not TRAINS, reason=f"Keras does not train with {BACKEND}")


def weight_of(kernel: np.ndarray) -> np.ndarray:
    """Keras' kernel in the operator's order of axes."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


@pytest.mark.skipif(DTYPE != "float64", reason=f"Keras' own convolutions do not run in float64 with {BACKEND}")
class TestLayers(LayerSuite):
    module = layers
    examples = 12
    input = "inputs"
    words = {"out_channels": "filters", "stride": "strides", "dilation": "dilation_rate"}  # noqa: RUF012
    # Keras has words for padding, and no dilation with strides.
    layers = [  # noqa: RUF012
        {"padding": "same", "stride": 2} if "stride" in arguments else arguments | {"padding": "same"} if "padding" in arguments
        else arguments
        for arguments in [*LAYERS, {"dilation": 2}]
    ]  # fmt: skip
    refusals = [  # noqa: RUF012
        (arguments, raises, name, "is -1; expected 'valid' or 'same'" if name == "padding" else text)
        for arguments, raises, name, text in REFUSED
    ]
    # It casts what has another floating-point dtype.
    misfits = [misfit for misfit in MISFITS if misfit[1] != "float32"]  # noqa: RUF012

    def array(self, array):
        return keras.ops.convert_to_tensor(array, dtype=array.dtype.name)

    def numpy(self, array):
        return numpy(array)

    def layer(self, rank, *, modulated, in_channels, bias=True, padding="valid", **arguments):
        padding = {1: "same", 0: "valid"}.get(padding, padding)
        layer = PAIRS[rank - 1][0](
            **self.renamed(arguments), padding=padding, use_bias=bias, modulated=modulated,
            data_format="channels_first", dtype="float64",
        )  # fmt: skip
        layer.build((None, in_channels, *[9] * rank))
        return layer

    def window(self, arguments, sizes):
        found = super().window(arguments, sizes)
        if arguments.get("padding") == "same":
            stride, dilation = ((arguments.get(name, 1),) * len(sizes) for name in ("stride", "dilation"))
            found["padding"] = same_size_padding(sizes, (3,) * len(sizes), stride, dilation)
        return found

    def weights(self, layer):
        found = {
            "weight": layer.kernel, "bias": layer.bias, "offset_weight": layer.offset_conv.kernel,
            "offset_bias": layer.offset_conv.bias,
        }  # fmt: skip
        arrays = {name: None if value is None else numpy(value) for name, value in found.items()}
        return {name: weight_of(value) if name.endswith("weight") else value for name, value in arrays.items()}

    def set_predictor(self, layer, weight, bias):
        layer.offset_conv.set_weights([np.moveaxis(weight, (0, 1), (-1, -2)), bias])

    def test_another_floating_point_dtype_is_cast(self):
        layer = self.layer(2, modulated=True, in_channels=4, filters=8, kernel_size=3)
        x = images(2, 4, 9, 9)
        assert np.array_equal(numpy(layer(x)), numpy(layer(x.astype("float64"))))
        assert numpy(layer(x)).dtype == "float64"


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"padding": "same", "strides": 2}, {"dilation_rate": 2, "groups": 2}, {"padding": "SAME", "activation": "relu"}],
    ids=str,
)
def test_a_fresh_layer_is_kerass_convolution(arguments: dict[str, Any], rank: int, data_format: str):
    ours, theirs = PAIRS[rank - 1]
    x = images(2, *(9, 8, 7)[:rank], 4)
    made = x if data_format == "channels_last" else np.moveaxis(x, -1, 1)
    layer, plain = ours(6, 3, data_format=data_format, **arguments), theirs(6, 3, **arguments)
    found = numpy(layer(made))
    plain.build(x.shape)
    assert [(v.name, v.shape) for v in layer.weights[:2]] == [(v.name, v.shape) for v in plain.weights]
    plain.set_weights(layer.get_weights()[:2])
    expected = numpy(plain(x))
    assert layer.compute_output_shape(made.shape) == found.shape
    assert_close(found if data_format == "channels_last" else np.moveaxis(found, 1, -1), expected, "float32")


@pytest.mark.parametrize("boundary", ["zeros", "inside"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_moved_taps_are_the_operators(rank: int, boundary: str):
    """Also on OpenVINO, over three axes and with the boundary that its operator does not have."""
    layer = PAIRS[rank - 1][0](6, 3, strides=2, padding="same", groups=2, offset_groups=2, boundary=boundary, max_offset=2.5)
    x = images(2, *(7, 6, 5)[:rank], 4)
    layer(x)
    move(layer)
    offset, mask = map(numpy, layer.offsets_and_mask(x))
    assert 0.5 < np.abs(offset).max() <= 2.5
    expected = deformconv.deform_conv(
        np.moveaxis(x, -1, 1).astype("float64"), offset.astype("float64"), weight_of(numpy(layer.kernel).astype("float64")),
        mask=mask.astype("float64"), stride=2, groups=2, offset_groups=2, boundary=boundary,
        padding=same_size_padding(x.shape[1:-1], (3,) * rank, (2,) * rank, (1,) * rank),
    )  # fmt: skip
    assert_close(np.moveaxis(numpy(layer(x)), -1, 1), expected, "float32")
    assert_close(numpy(layer(x, offset, mask)), numpy(layer(x)), "float32")


def test_passed_offsets_are_used_as_they_are():
    layer = DeformConv2D(6, 3, predict_offsets=False, offset_groups=2)
    x, offset, mask = images(2, 7, 7, 4), images(2, 36, 5, 5, seed=1), images(2, 18, 5, 5, seed=2)
    found = numpy(layer(x, offset, mask=mask))
    assert len(layer.weights) == 2 and layer.offset_conv is None
    call = [np.moveaxis(x, -1, 1), offset, weight_of(numpy(layer.kernel))]
    assert_close(np.moveaxis(found, -1, 1), deformconv.deform_conv(*call, mask=mask), "float32")
    assert_close(np.moveaxis(numpy(layer(x, offset)), -1, 1), deformconv.deform_conv(*call), "float32")
    with pytest.raises(TypeError, match="`offset` is missing and this layer predicts none"):
        layer(x)
    with pytest.raises(TypeError, match="`offset` is missing and this layer predicts none"):
        layer(keras.Input((7, 7, 4)))
    with pytest.raises(TypeError, match="`mask` was passed without `offset`"):
        layer(x, mask=mask)
    with pytest.raises(deformconv.ShapeError, match="`offset` has 18 channels"):
        layer(x, offset[:, :18])
    with pytest.raises(ValueError, match=r"layer without modulation \(v1\)"):
        DeformConv2D(6, 3, modulated=False)(x, offset, mask)


@pytest.mark.parametrize(
    ("arguments", "raises", "text"),
    [
        (
            {"padding": "causal"},
            ValueError,
            "`padding` is 'causal'; expected 'valid' or 'same': taps that move read later steps",
        ),
        ({"padding": "full"}, deformconv.ShapeError, "`padding` is 'full'; expected 'valid' or 'same'. For other amounts put"),
        ({"stride": 2}, TypeError, r"DeformConv1D\(\) got an unexpected keyword argument 'stride'; here: strides\."),
        ({"deformable_groups": 2}, TypeError, r"'deformable_groups'; here: offset_groups\."),
        ({"max_offset": -1}, ValueError, "`max_offset` is -1; expected a number above 0"),
    ],
    ids=str,
)
def test_arguments_in_kerass_words(arguments: dict[str, Any], raises: type[Exception], text: str):
    with pytest.raises(raises, match=text):
        DeformConv1D(4, 3, **arguments)


def test_inputs_with_their_channels_elsewhere():
    layer = DeformConv2D(6, 3)
    layer.build((None, None, None, 4))
    with pytest.raises(deformconv.ShapeError) as raised:
        layer(images(2, 4, 9, 9))
    for text in ("`inputs` has 9 channels", "has shape (2, 4, 9, 9), and data_format='channels_last'", "looks channels-first"):
        assert text in str(raised.value)
    with pytest.raises(deformconv.ShapeError, match=r"`inputs` has shape \(None, 9, 9, None\); expected a number of channels"):
        DeformConv2D(6, 3).build((None, 9, 9, None))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_predicts_and_computes_in_float32(policy: str, monkeypatch: pytest.MonkeyPatch):
    x = images(2, 9, 9, 4)
    whole, half = DeformConv2D(6, 3, padding="same"), DeformConv2D(6, 3, padding="same", dtype=policy)
    whole(x), half(x)
    move(whole)
    half.set_weights(whole.get_weights())
    found = half(x)
    assert keras.utils.standardize_dtype(found.dtype) == policy.removeprefix("mixed_")
    offset, mask = half.offsets_and_mask(x)
    assert {keras.utils.standardize_dtype(array.dtype) for array in (offset, mask)} == {"float32"}
    assert error(numpy(offset), numpy(whole.offsets_and_mask(x)[0])) < 1e-6
    assert error(numpy(keras.ops.cast(found, "float32")), numpy(whole(x))) < 2e-2
    passed = np.full(offset.shape, 3.3, "float32")  # a number that half precision does not have
    operands = []
    monkeypatch.setattr(layers, "deform_conv", lambda *given: operands.extend(given) or deform_conv(*given))
    half(x, passed, mask)
    assert np.array_equal(numpy(operands[2]), passed) and np.array_equal(numpy(operands[1]), x)


def net(**arguments: Any) -> keras.Model:
    inputs = keras.Input((None, None, 3))
    x = DeformConv2D(8, 3, strides=2, padding="same", activation="relu", name="first", **arguments)(inputs)
    x = DeformConv2D(8, 3, padding="same", offset_groups=2, max_offset=2.0, name="second", kernel_regularizer="l2")(x)
    return keras.Model(inputs, keras_layers.Dense(2)(keras_layers.GlobalAveragePooling2D()(x)))


@trains
@pytest.mark.parametrize("run_eagerly", [False, True], ids=["graph", "eager"])
def test_fit_moves_the_taps(run_eagerly: bool):
    keras.utils.set_random_seed(0)
    model = net()
    x, y = images(16, 12, 11, 3), images(16, 2, seed=1)
    model.compile(keras.optimizers.Adam(1e-2), "mse", run_eagerly=run_eagerly)
    losses = model.fit(x, y, epochs=3, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for name in ("first", "second"):
        kernel, _ = model.get_layer(name).offset_conv.get_weights()
        assert np.abs(kernel).max() > 1e-3
    assert len(model.get_layer("second").losses) == 1  # the kernel's; its predictor has none
    assert model.predict(images(3, 9, 8, 3), verbose=0).shape == (3, 2)  # of another size


@trains
def test_masked_and_frozen_layers_and_lora():
    x = images(2, 9, 9, 4)
    layer = DeformConv2D(6, 3, padding="same")
    before = numpy(layer(x))
    layer.enable_lora(2)
    assert_close(numpy(layer(x)), before, "float32")
    assert [v.name for v in layer.trainable_variables] == ["bias", "lora_kernel_a", "lora_kernel_b", "kernel", "bias"]
    layer.lora_kernel_b.assign(images(2, 6, seed=3))
    assert error(numpy(layer(x)), before) > 1e-2
    layer.trainable = False
    assert not layer.trainable_variables


def test_a_mask_of_steps_is_not_the_operators():
    steps = keras.Sequential([keras_layers.Embedding(5, 4, mask_zero=True), DeformConv1D(6, 3, padding="same")])
    with pytest.warns(UserWarning, match="have a mask of steps, which a convolution does not look at"):
        found = steps(np.array([[1, 2, 0, 0, 3]]))
    assert found.shape == (1, 5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeformConv1D(6, 3)(images(1, 5, 4), images(1, 3, 3), mask=images(1, 3, 3))


def test_a_configuration_makes_the_same_layer_again():
    layer = DeformConv2D(
        6, (3, 2), strides=(1, 2), padding="same", modulated=False, offset_groups=2, mask_scale=1.5, max_offset=3,
        boundary="inside", kernel_regularizer="l2", bias_constraint="non_neg", name="named",
    )  # fmt: skip
    config = layer.get_config()
    again = DeformConv2D.from_config(config)
    assert again.get_config() == config
    assert {name: config[name] for name in layers.OURS} == {
        "modulated": False, "offset_groups": 2, "predict_offsets": True, "mask_scale": 1.5, "max_offset": 3.0,
        "boundary": "inside",
    }  # fmt: skip
    model = net()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x = images(2, 8, 8, 3)
    assert_close(numpy(clone(x)), numpy(model(x)), "float32")


def test_functional_models_take_offsets_as_inputs():
    inputs, offset, mask = keras.Input((9, 9, 4)), keras.Input((18, 7, 7)), keras.Input((9, 7, 7))
    model = keras.Model([inputs, offset, mask], DeformConv2D(6, 3, predict_offsets=False)(inputs, offset, mask))
    assert model.output_shape == (None, 7, 7, 6)
    found = model.predict([images(2, 9, 9, 4), images(2, 18, 7, 7), images(2, 9, 7, 7)], verbose=0)
    assert found.shape == (2, 7, 7, 6)


class Block(keras.Model):
    """A model written as a class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = DeformConv2D(4, 3, padding="same")

    def call(self, x: Any) -> Any:
        return x + self.conv(x)


def test_subclassed_models():
    model, x = Block(), images(2, 8, 8, 4)
    assert_close(model.predict(x, verbose=0), numpy(model(x)), "float32" if BACKEND != "openvino" else "float16")
