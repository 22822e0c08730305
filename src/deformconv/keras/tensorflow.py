"""The operator on TensorFlow's tensors: compiled kernels within a function of Python, eagerly and in a graph.

TensorFlow's own operations stand in for it where no function of Python goes: in what XLA compiles, on a GPU or TPU, and in
derivatives of derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager.forwardprop_util import pack_tangents
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

import deformconv
from deformconv.keras.call import Settings, by_keras_operations, checked, described
from deformconv.ops.operator import Operand

__all__ = ["deform_conv", "takes_operations_only"]

NAMES = ("input", "offset", "weight", "mask")
# What TensorFlow's error says of a graph that another process loads: it names the node, and nothing else of ours.
NODE = "deformconv_runs_in_the_process_that_traced_it__save_by_model_export"


def takes_operations_only() -> bool:
    """Whether a call must be made of TensorFlow's own operations."""
    return _has_accelerator() or GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


@cache
def _has_accelerator() -> bool:
    return any(tf.config.list_logical_devices(kind) for kind in ("GPU", "TPU"))


@tf.autograph.experimental.do_not_convert
def deform_conv(settings: Settings, inputs: Any, offset: Any, kernel: Any, mask: Any) -> Any:
    """The output by compiled kernels, as `operator.deform_conv` describes it."""
    arrays = [tf.convert_to_tensor(array) for array in (inputs, offset, kernel, mask) if array is not None]
    if pack_tangents(arrays).tangents:  # a gradient of a function of Python says nothing of them, and wrong numbers came out
        raise NotImplementedError(
            "TensorFlow's forward mode, tf.autodiff.ForwardAccumulator, does not go through a deformable convolution; "
            "expected derivatives by tf.GradientTape."
        )
    input, offset_operand, weight, mask_operand = _first(settings, [described(array) for array in arrays], _transposed)
    spec = checked(settings, input, offset_operand, weight, mask_operand)
    shape = [inputs.shape[0], *offset.shape[2:]]
    shape.insert(len(shape) if settings.channels_last else 1, spec.out_channels)
    output: Any = _differentiable(settings, tuple(shape))(*arrays)
    return output


def _differentiable(settings: Settings, shape: tuple[int | None, ...]) -> Callable[..., Any]:
    """The operator as a function of its arrays; its gradients are kernels' too, and theirs are TensorFlow's own."""

    @tf.custom_gradient
    def forward(*arrays: Any) -> tuple[Any, Callable[..., Any]]:
        (output,) = _in_python(lambda *values: [_forward(settings, values)], arrays, [arrays[0].dtype], [shape])
        return output, lambda grad_output: backward(grad_output, *arrays)

    @tf.custom_gradient
    def backward(grad_output: Any, *arrays: Any) -> tuple[Any, Callable[..., Any]]:
        found = _in_python(
            lambda grad, *values: _backward(settings, grad, values),
            (grad_output, *arrays), [array.dtype for array in arrays], [array.shape for array in arrays],
        )  # fmt: skip
        return found, lambda *grads: _second_derivative(settings)(grad_output, list(arrays), list(grads))

    return forward


def _in_python(function: Callable[..., list[np.ndarray]], arrays: Any, dtypes: Any, shapes: Any) -> list[Any]:
    """Tensors of what a function of NumPy's arrays returns."""
    if tf.executing_eagerly():
        return [tf.convert_to_tensor(result) for result in function(*(array.numpy() for array in arrays))]
    results: list[Any] = tf.numpy_function(function, arrays, dtypes, stateful=False, name=NODE)
    for result, shape in zip(results, shapes, strict=True):
        result.set_shape(shape)
    return results


def _forward(settings: Settings, values: Sequence[np.ndarray]) -> np.ndarray:
    input, offset, weight, mask = _first(settings, values, np.transpose)
    output = deformconv.deform_conv(input, offset, weight, mask=mask, **settings.parameters(input.shape[2:]))
    return np.ascontiguousarray(_own(settings, output))


def _backward(settings: Settings, grad_output: np.ndarray, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    input, offset, weight, mask = _first(settings, values, np.transpose)
    if settings.channels_last:
        grad_output = np.moveaxis(grad_output, -1, 1)
    found = deformconv.deform_conv_backward(
        grad_output, input, offset, weight, mask=mask, **settings.parameters(input.shape[2:]), wanted=NAMES[: len(values)]
    )
    gradients = [_own(settings, found.input), found.offset, np.transpose(found.weight, settings.kernel_axes), found.mask]
    return [np.ascontiguousarray(gradient) for gradient in gradients[: len(values)]]


@cache
def _second_derivative(settings: Settings) -> Callable[..., list[Any]]:
    """The derivative of `grads` times the gradients, by `grad_output` and by the arrays.

    It is traced once, since so many operations one by one are slow.
    """

    def compute(grad_output: Any, arrays: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
        variables = [grad_output, *arrays]
        with tf.GradientTape() as outer:
            outer.watch(variables)
            with tf.GradientTape() as inner:
                inner.watch(arrays)
                output = by_keras_operations(settings, *_first(settings, arrays, tf.transpose))
                output = _own(settings, output, tf.transpose)
            gradients = inner.gradient(output, arrays, grad_output)
        found: list[Any] = outer.gradient(gradients, variables, list(grads), tf.UnconnectedGradients.ZERO)
        return found

    traced: Callable[..., list[Any]] = tf.function(compute, autograph=False, reduce_retracing=True)
    return traced


def _first(settings: Settings, arrays: Sequence[Any], transpose: Callable[[Any, Any], Any]) -> list[Any]:
    """Input, offset, weight and mask, channels first, of Keras' arrays."""
    inputs, offset, kernel, mask = (*arrays, None)[:4]
    if settings.channels_last:
        inputs = transpose(inputs, (0, settings.rank + 1, *range(1, settings.rank + 1)))
    return [inputs, offset, transpose(kernel, settings.weight_axes), mask]


def _own(settings: Settings, output: Any, transpose: Callable[[Any, Any], Any] = np.transpose) -> Any:
    """An array like the input or the output with its channels where the layer has them."""
    return transpose(output, (0, *range(2, settings.rank + 2), 1)) if settings.channels_last else output


def _transposed(operand: Operand, axes: Sequence[int]) -> Operand:
    return operand._replace(shape=tuple(operand.shape[axis] for axis in axes))
