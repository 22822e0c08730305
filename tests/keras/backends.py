"""Which backend Keras runs on in this process, `KERAS_BACKEND`, and what that backend can do."""

from __future__ import annotations

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
