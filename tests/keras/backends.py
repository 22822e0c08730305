"""Which backend Keras runs on in this process, `KERAS_BACKEND`, and what that backend can do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

BACKEND: str = keras.backend.backend()
TRAINS = BACKEND in ("tensorflow", "jax", "torch")
# The finest that Keras' own convolutions run in.
DTYPE = "float32" if BACKEND in ("numpy", "openvino") else "float64"


def numpy(tensor: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def images(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def move(layer: Any, seed: int = 1) -> None:
    """Give a layer's predictor random weights: offsets of a pixel or two, masks from 0 to 2."""
    random = np.random.default_rng(seed)
    kernel, bias = layer.offset_conv.get_weights()
    layer.offset_conv.set_weights([0.3 * random.normal(size=kernel.shape), random.normal(size=bias.shape)])


SERVE = """
import sys
import numpy, tensorflow as tf

x = tf.constant(numpy.load(sys.argv[2]))
loaded = tf.saved_model.load(sys.argv[1])
with tf.GradientTape() as tape:
    tape.watch(x)
    y = loaded.serve(x)
numpy.save(sys.argv[3], y)
assert tape.gradient(y, x).shape == x.shape
assert "deformconv" not in sys.modules
"""


def served(saved: Path, x: np.ndarray) -> np.ndarray:
    """What a SavedModel gives in a process of its own, which has TensorFlow and nothing of this library."""
    files = saved.with_name("x.npy"), saved.with_name("y.npy")
    np.save(files[0], x)
    command = [sys.executable, "-c", SERVE, *map(str, (saved, *files))]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(files[1])
