"""What TensorFlow asks beside: derivatives of every order, XLA, and files that another process runs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from tests.keras.backends import BACKEND, images, move, numpy, served
from tests.tolerances import error

from deformconv.keras import DeformConv2D
from deformconv.keras.call import Settings, by_keras_operations

if BACKEND != "tensorflow":
    pytest.skip("these are about TensorFlow", allow_module_level=True)

import tensorflow as tf

from deformconv.keras import tensorflow as room


def settings(last: bool, **changes: Any) -> Settings:
    return Settings((3, 2), (2, 1), "same", (1, 1), 1, 2, "zeros", last)._replace(**changes)


def arrays(last: bool) -> list[Any]:
    """Inputs, offsets away from kinks, a kernel and a mask, of 5 by 4 pixels and 3 by 4 positions."""
    random = np.random.default_rng(0)
    offset = np.floor(1.5 * random.normal(size=(2, 24, 3, 4))) + random.uniform(0.1, 0.9, (2, 24, 3, 4))
    made = [random.normal(size=(2, 5, 4, 4)), offset, random.normal(size=(3, 2, 4, 3)), random.uniform(size=(2, 12, 3, 4))]
    return (
        [tf.constant(array) for array in made]
        if last
        else [tf.constant(np.moveaxis(made[0], -1, 1)), *map(tf.constant, made[1:])]
    )


def by_operations(own: Settings, *given: Any) -> Any:
    return room._own(own, by_keras_operations(own, *room._first(own, given, tf.transpose)), tf.transpose)


def derivatives(function: Any, given: list[Any]) -> list[Any]:
    """The output, its first derivatives and derivatives of these."""
    with tf.GradientTape() as outer:
        outer.watch(given)
        with tf.GradientTape() as inner:
            inner.watch(given)
            output = function(*given)
            loss = tf.reduce_sum(output**2)
        first = inner.gradient(loss, given)
        total = tf.add_n([tf.reduce_sum(tf.sin(gradient)) for gradient in first])
    return [output, *first, *outer.gradient(total, given)]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_derivatives_of_the_kernels_are_those_of_tensorflows_operations(last: bool, graph: bool):
    own, given = settings(last), arrays(last)
    expected = derivatives(lambda *values: by_operations(own, *values), given)

    def function(*values: Any) -> list[Any]:
        return derivatives(lambda *inner: room.deform_conv(own, *inner), list(values))

    found = (tf.function(function) if graph else function)(*given)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and error(ours.numpy(), theirs.numpy()) < 1e-9
    v1 = derivatives(lambda *values: room.deform_conv(own, *values, None), given[:3])
    for ours, theirs in zip(v1, derivatives(lambda *values: by_operations(own, *values), given[:3]), strict=True):
        assert error(ours.numpy(), theirs.numpy()) < 1e-9


@pytest.mark.parametrize("moved", range(4), ids=["inputs", "offset", "kernel", "mask"])
def test_forward_mode_is_refused(moved):
    """Also where a second derivative was traced before."""
    own, given = settings(True), arrays(True)
    with tf.GradientTape() as outer:
        outer.watch(given)
        with tf.GradientTape() as inner:
            inner.watch(given)
            output = tf.reduce_sum(room.deform_conv(own, *given) ** 2)
        slope = tf.reduce_sum(inner.gradient(output, given[1]) ** 2)
    assert outer.gradient(slope, given[0]) is not None
    with (
        pytest.raises(
            NotImplementedError, match=r"tf\.autodiff\.ForwardAccumulator, does not go through a deformable convolution"
        ),
        tf.autodiff.ForwardAccumulator(given[moved], tf.ones_like(given[moved])),
    ):
        room.deform_conv(own, *given)


def test_a_mistake_is_found_while_a_graph_is_made():
    own, (inputs, offset, kernel, _) = settings(True), arrays(True)
    with pytest.raises(ValueError, match="`mask` has 24 channels"):
        tf.function(lambda: room.deform_conv(own, inputs, offset, kernel, offset), autograph=False)()


def moved(**arguments: Any) -> keras.Model:
    inputs = keras.Input((None, None, 3))
    x = DeformConv2D(4, 3, strides=2, padding="same", **arguments)(inputs)
    model = keras.Model(inputs, DeformConv2D(4, 3, padding="same", offset_groups=2)(x))
    for layer in model.layers[1:]:
        move(layer)
    return model


def test_xla_compiles_tensorflows_operations():
    model, x = moved(), images(2, 8, 7, 3)
    compiled = tf.function(lambda x: model(x), jit_compile=True)
    assert error(compiled(x).numpy(), numpy(model(x))) < 1e-5


def test_jit_compile_is_warned_of_and_goes_on_without():
    model = moved()
    with pytest.warns(UserWarning, match="Model doesn't support `jit_compile=True`"):
        model.compile("sgd", "mse", jit_compile=True)
    assert not model.jit_compile
    model.compile("sgd", "mse")
    assert not model.jit_compile  # "auto"
    model.fit(images(2, 8, 8, 3), images(2, 4, 4, 4), verbose=0)


@pytest.mark.slow
def test_an_exported_model_runs_in_the_next_process(tmp_path):
    """Of any batch and size, without this library; its gradients are TensorFlow's."""
    model, x = moved(), images(3, 9, 10, 3)
    model.predict(images(2, 8, 8, 3), verbose=0)  # by the kernels
    model.export(tmp_path / "saved", verbose=False)
    assert error(served(tmp_path / "saved", x), numpy(model(x))) < 1e-5


def test_what_else_writes_files_takes_no_function_of_python(tmp_path):
    model, x = moved(), images(1, 8, 8, 3)
    tf.saved_model.save(model, str(tmp_path / "saved"))
    graph = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"].graph.as_graph_def()
    assert not [node.name for function in graph.library.function for node in function.node_def if node.op.endswith("PyFunc")]

    traced = tf.function(lambda x: model(x)).get_concrete_function(tf.TensorSpec((None, 8, 8, 3)))
    names = [node.name for node in traced.graph.as_graph_def().node if "PyFunc" in node.op]
    names += [n.name for f in traced.graph.as_graph_def().library.function for n in f.node_def if "PyFunc" in n.op]
    # TensorFlow's error in the next process names the node.
    assert names and all("save_by_model_export" in name for name in names)
    assert error(traced(tf.constant(x)).numpy(), numpy(model(x))) < 1e-6
