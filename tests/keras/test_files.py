"""Files of one backend load in the next one, and back, with the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from keras import layers
from tests.keras.backends import BACKEND, images, move
from tests.tolerances import error

from deformconv.keras import DeformConv1D, DeformConv2D

RING = ("jax", "tensorflow", "torch", "numpy", "openvino")
NEEDS = {"numpy": "jax"}  # Keras has JAX convolve NumPy's arrays
AGAIN = """
import sys
import keras, numpy
import deformconv.keras

model = keras.models.load_model(sys.argv[1])
numpy.save(sys.argv[2], model.predict(numpy.load(sys.argv[3]), verbose=0))
model.save(sys.argv[4])
"""


def net() -> keras.Model:
    inputs = keras.Input((9, 8, 3))
    x = DeformConv2D(6, 3, strides=2, padding="same", activation="relu", offset_groups=3)(inputs)
    x = DeformConv1D(4, 3, modulated=False, max_offset=2.0)(layers.Reshape((20, 6))(x))
    model = keras.Model(inputs, x)
    for layer in model.layers:
        if hasattr(layer, "offset_conv"):
            move(layer)
    return model


def test_weights_have_the_convolutions_names(tmp_path):
    """So that a file's weights are found, and a plain convolution's can be set."""
    model = net()
    names = [weight.path for weight in model.layers[1].weights]
    assert [name.split("/", 1)[1] for name in names] == ["kernel", "bias", "offset_conv/kernel", "offset_conv/bias"]
    model.save_weights(tmp_path / "net.weights.h5")
    other = net()
    other.set_weights([0 * weight for weight in other.get_weights()])
    other.load_weights(tmp_path / "net.weights.h5")
    for found, expected in zip(other.get_weights(), model.get_weights(), strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.slow
def test_a_file_loads_in_the_next_backend_and_back(tmp_path):
    next_ones = (*RING, *RING)[RING.index(BACKEND) + 1 : RING.index(BACKEND) + len(RING)]
    others = [name for name in next_ones if find_spec(NEEDS.get(name, name)) is not None]
    if not others:
        pytest.skip("no other backend of Keras is installed")
    model, x = net(), images(2, 9, 8, 3)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "ours.keras")
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / name) for name in ("ours.keras", "y.npy", "x.npy", "theirs.keras")]
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, *paths], env={**os.environ, "KERAS_BACKEND": others[0]}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # OpenVINO computes a model in bfloat16 where the processor has it, all layers alike.
    coarse = 3e-2 if "openvino" in (BACKEND, others[0]) else 1e-5
    assert error(np.load(tmp_path / "y.npy"), expected) < coarse
    back = keras.models.load_model(tmp_path / "theirs.keras")
    for found, first in zip(back.get_weights(), model.get_weights(), strict=True):
        assert np.array_equal(found, first)
    assert error(back.predict(x, verbose=0), expected) < 1e-6
