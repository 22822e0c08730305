"""Exported models: what each backend writes runs where docs/keras.md says."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
from tests.keras.backends import BACKEND, images, move, numpy, served
from tests.tolerances import error

from deformconv.keras import DeformConv2D


def model() -> keras.Model:
    made = keras.Sequential([keras.Input((12, 12, 3)), DeformConv2D(4, 3, strides=2, padding="same")])
    move(made.layers[0])
    return made


def written(folder: Path, name: str, **how: object) -> tuple[np.ndarray, np.ndarray, str]:
    """An image, what the model makes of it, and the model's file."""
    net, x, path = model(), images(1, 12, 12, 3), str(folder / name)
    expected = numpy(net(x))
    net.export(path, verbose=False, **how)
    return x, expected, path


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="this is about JAX")
@pytest.mark.filterwarnings("ignore")  # of Keras, JAX and TensorFlow
def test_a_saved_model_of_jax_runs_in_the_next_process(tmp_path):
    x, expected, path = written(tmp_path, "saved")
    assert error(served(Path(path), x), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="this is about TensorFlow")
@pytest.mark.filterwarnings("ignore")
def test_openvino_runs_what_tensorflow_writes(tmp_path):
    openvino = pytest.importorskip("openvino")
    x, expected, path = written(tmp_path, "net.xml", format="openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert error(np.array(compiled(x)[0]), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="this is about PyTorch")
@pytest.mark.filterwarnings("ignore")
def test_what_pytorch_writes(tmp_path):
    import torch

    x, expected, path = written(tmp_path, "net.pt2", format="torch")
    assert error(torch.export.load(path).module()(torch.tensor(x)).detach().numpy(), expected) < 1e-5
    for name, kind in (("net.onnx", "onnx"), ("net.xml", "openvino")):
        with pytest.raises(Exception, match=r"dynamo=False\) cannot export deformconv's operators|converted to OpenVINO"):
            written(tmp_path, name, format=kind)
