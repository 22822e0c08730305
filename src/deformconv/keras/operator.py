"""The operator on Keras' tensors: one function for each backend that Keras runs on."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import keras
from keras import ops

from deformconv.keras.call import Settings, by_keras_operations, checked, described

__all__ = ["deform_conv", "is_exported"]

# Modules that write programs for other processes, where no function of Python and no kernel of ours is.
_EXPORTERS = (
    "keras.src.export.",
    "jax.experimental.jax2tf.",
    "tensorflow.lite.",
    "tensorflow.python.saved_model.save",
    "tf2onnx.",
)


def deform_conv(settings: Settings, inputs: Any, offset: Any, kernel: Any, mask: Any) -> Any:
    """The output without a bias, with its channels where those of `inputs` are.

    `kernel` is (*kernel, C_in/groups, filters), `offset` and `mask` have their channels first; all are float32 or float64.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        from deformconv.keras import tensorflow

        if not tensorflow.takes_operations_only() and not is_exported():
            return tensorflow.deform_conv(settings, inputs, offset, kernel, mask)
    input = ops.moveaxis(inputs, -1, 1) if settings.channels_last else inputs
    weight = ops.transpose(kernel, settings.weight_axes)
    output = _BACKENDS.get(backend, by_keras_operations)(settings, input, offset, weight, mask)
    return ops.moveaxis(output, 1, -1) if settings.channels_last else output


def is_exported() -> bool:
    """Whether what is computed now becomes part of a file. No library says so, and its callers do."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_EXPORTERS):
            return True
        frame = frame.f_back
    return False


def _torch(settings: Settings, input: Any, offset: Any, weight: Any, mask: Any) -> Any:
    import deformconv

    return deformconv.deform_conv(input, offset, weight, mask=mask, **settings.parameters(input.shape[2:]))


def _jax(settings: Settings, input: Any, offset: Any, weight: Any, mask: Any) -> Any:
    from deformconv.jax import calls
    from deformconv.jax.functional import DEFORM_CONV

    operands = {"input": input, "offset": offset, "weight": weight, "bias": None, "mask": mask}
    backend = "portable" if is_exported() else None
    return calls.call(
        DEFORM_CONV, operands, settings.parameters(input.shape[2:]), backend, settings.rank, settings.channels_last
    )  # fmt: skip


def _numpy(settings: Settings, input: Any, offset: Any, weight: Any, mask: Any) -> Any:
    import deformconv

    # Some of Keras' functions for NumPy make float32 of float64, as JAX does, which is in them.
    offset, weight, mask = (
        None if array is None else array.astype(input.dtype, copy=False) for array in (offset, weight, mask)
    )
    return deformconv.deform_conv(input, offset, weight, mask=mask, **settings.parameters(input.shape[2:]))


def _openvino(settings: Settings, input: Any, offset: Any, weight: Any, mask: Any) -> Any:
    """OpenVINO's own operator, over 1 and 2 axes; what it does not have is made of its other operations."""
    if settings.rank == 3 or settings.boundary != "zeros":
        return by_keras_operations(settings, input, offset, weight, mask)
    import openvino.opset15 as opset
    from keras.src.backend.openvino.core import OpenVINOKerasTensor, get_ov_output

    from deformconv.ops.conv import openvino

    spec = checked(settings, *(described(tensor) for tensor in (input, offset, weight, mask) if tensor is not None))
    x, o, w = map(get_ov_output, (input, offset, weight))
    m = None if mask is None else get_ov_output(mask)
    before, after = zip(*spec.padding, strict=True)
    window = [list(numbers) for numbers in (settings.strides, before, after, settings.dilation_rate)]
    pad = "SAME_UPPER" if settings.padding == "same" else "VALID"
    (output,) = openvino.convolution(opset, x, o, w, None, m, window, (spec.groups, spec.offset_groups), pad)
    return OpenVINOKerasTensor(output)


_BACKENDS = {"torch": _torch, "jax": _jax, "numpy": _numpy, "openvino": _openvino}
