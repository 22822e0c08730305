"""Keras' own convolutions with taps that move: one text for 1, 2 and 3 spatial axes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import keras
from keras import layers, ops

from deformconv.errors import ShapeError
from deformconv.keras.call import Settings, described
from deformconv.keras.operator import deform_conv
from deformconv.ops.conv.layer import (
    MASK_SCALE,
    Layer,
    Predicted,
    activated,
    check_passed,
    check_predictor,
    checked_layer,
    predicted,
)
from deformconv.ops.conv.spec import check_input
from deformconv.ops.operator import DTYPES, HALF, Operand
from deformconv.ops.window import channels_last
from deformconv.ops.words import in_words, unexpected

__all__ = ["DeformConv1D", "DeformConv2D", "DeformConv3D"]

WORDS = {"input": "inputs", "stride": "strides", "dilation": "dilation_rate", "out_channels": "filters"}
OURS = ("modulated", "offset_groups", "predict_offsets", "mask_scale", "max_offset", "boundary")
_MISTAKES = (ShapeError, TypeError, ValueError)


class _DeformConv:
    """What the three layers add to Keras' class, which is the next base class and makes the parameters."""

    rank: ClassVar[int]
    # Keras' own.
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation_rate: tuple[int, ...]
    padding: str
    data_format: str
    filters: int
    groups: int
    use_bias: bool
    activation: Any
    compute_dtype: str
    kernel: Any
    _kernel: Any
    bias: Any
    name: str
    built: bool

    def __init__(
        self,
        filters: int,
        kernel_size: Any,
        strides: Any = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: Any = 1,
        groups: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        modulated: bool = True,
        offset_groups: int | None = 1,
        predict_offsets: bool = True,
        mask_scale: float = MASK_SCALE,
        max_offset: float | None = None,
        boundary: str = "zeros",
        **others: Any,
    ) -> None:
        _check_names(type(self), others)
        _check_padding(padding)
        own = {
            "offset_groups": offset_groups, "predict_offsets": predict_offsets, "mask_scale": mask_scale,
            "max_offset": max_offset, "boundary": boundary,
        }  # fmt: skip
        checked = _checked(self.rank, None, filters, kernel_size, strides, dilation_rate, groups, **own)
        super().__init__(
            filters, checked.kernel_size, checked.stride, padding, data_format, checked.dilation, checked.groups, activation,
            use_bias, kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer, activity_regularizer,
            kernel_constraint, bias_constraint, **others,
        )  # type: ignore[call-arg]  # fmt: skip
        self.modulated, self.predict_offsets, self.boundary = modulated, predict_offsets, boundary
        self.offset_groups, self.mask_scale, self.max_offset = checked.offset_groups, checked.mask_scale, checked.max_offset
        self.input_spec = None  # an input that does not fit is refused in our words
        # XLA's compiler of TensorFlow takes no function of Python: with jit_compile=True Keras warns, and goes on without.
        self.supports_jit = keras.backend.backend() != "tensorflow"
        self.offset_conv = self._predictor() if predict_offsets else None

    def _predictor(self) -> Any:
        # On a CPU TensorFlow has no gradient of a convolution with the channels first.
        layout = "channels_last" if keras.backend.backend() == "tensorflow" else self.data_format
        predictor = getattr(layers, f"Conv{self.rank}D")(
            self._predicted.channels, self.kernel_size, strides=self.strides, padding=self.padding, data_format=layout,
            dilation_rate=self.dilation_rate, kernel_initializer="zeros",
            dtype=self.input_dtype, name="offset_conv",
        )  # fmt: skip
        predictor.supports_masking = True  # of a mask of steps this layer warns itself
        return predictor

    @property
    def _predicted(self) -> Predicted:
        return predicted(self.kernel_size, self.offset_groups or 1, self.modulated)

    @property
    def input_dtype(self) -> str:
        """What inputs, offsets and masks are brought to: float32 in half precision, which is too coarse for positions."""
        return "float32" if self.compute_dtype in HALF else self.compute_dtype

    @property
    def _settings(self) -> Settings:
        return Settings(
            self.kernel_size, self.strides, self.padding, self.dilation_rate, self.groups, self.offset_groups, self.boundary,
            self.data_format == "channels_last",
        )  # fmt: skip

    def build(self, input_shape: Sequence[int | None]) -> None:
        given: tuple[Any, ...] = tuple(input_shape)
        if len(given) == self.rank + 2:
            channels = given[-1 if self._settings.channels_last else 1]
            if channels is None:
                raise ShapeError(f"`inputs` has shape {given}; expected a number of channels, which the kernel's shape needs.")
            _checked(
                self.rank, channels, self.filters, self.kernel_size, self.strides, self.dilation_rate, self.groups,
                **{name: getattr(self, name) for name in OURS if name != "modulated"},
            )  # fmt: skip
        self._check_input(Operand(given, self.input_dtype), None)
        if self.offset_conv is not None:
            last = self.offset_conv.data_format == "channels_last"
            self.offset_conv.build((given[0], *given[2:], given[1]) if last and not self._settings.channels_last else given)
        super().build(input_shape)  # type: ignore[misc]
        self.input_spec = None

    def call(self, inputs: Any, offset: Any = None, mask: Any = None) -> Any:
        """Convolve with predicted offsets and masks, or with exactly those passed: without mask, v1."""
        if offset is None and self._is_of_steps(mask):
            mask = None
        check_passed(offset, mask, self.modulated)
        outputs = self.convolution_op(inputs, self.kernel, offset, mask)
        if self.use_bias:
            shape = [1] * (self.rank + 2)
            shape[-1 if self._settings.channels_last else 1] = self.filters
            outputs = ops.add(outputs, ops.reshape(self.bias, shape))
        return outputs if self.activation is None else self.activation(outputs)

    def convolution_op(self, inputs: Any, kernel: Any, offset: Any = None, mask: Any = None) -> Any:
        """Keras' hook: the convolution of `inputs` with another kernel, if need be, without bias and activation."""
        inputs = self._whole(inputs)
        if offset is None:
            offset, mask = self._predict(inputs)
        else:
            offset, mask = (None if array is None else ops.cast(array, self.input_dtype) for array in (offset, mask))
        try:
            outputs = deform_conv(self._settings, inputs, offset, ops.cast(kernel, self.input_dtype), mask)
        except ShapeError as error:
            raise in_words(error, WORDS) from None
        return ops.cast(outputs, self.compute_dtype)

    def offsets_and_mask(self, inputs: Any) -> tuple[Any, Any]:
        """Return what the layer predicts for `inputs`: offsets in input pixels, and the mask or, in v1, None.

        Both have their channels first, whatever the data format: (N, offset_groups*K*D, *O) and (N, offset_groups*K, *O).
        `layer(inputs, *layer.offsets_and_mask(inputs))` computes what `layer(inputs)` computes.
        """
        inputs = ops.convert_to_tensor(inputs)
        if not self.built:
            self.build(inputs.shape)
        return self._predict(self._whole(inputs))

    def _predict(self, inputs: Any) -> tuple[Any, Any]:
        predictor = check_predictor(self.offset_conv)
        last = predictor.data_format == "channels_last"
        raw = predictor(ops.moveaxis(inputs, 1, -1) if last and not self._settings.channels_last else inputs)
        # Keras' NumPy has JAX convolve, which makes float32 of float64 unless it is told otherwise.
        raw = ops.cast(ops.moveaxis(raw, -1, 1) if last else raw, self.input_dtype)
        offsets = self._predicted.offsets
        mask = raw[:, offsets:] if self.modulated else None
        return activated(raw[:, :offsets], mask, self.mask_scale, self.max_offset, ops.tanh, ops.sigmoid)

    def _whole(self, inputs: Any) -> Any:
        """The inputs, checked, in the dtype that is computed in."""
        operand = described(inputs)
        if operand.dtype in DTYPES:
            operand = operand._replace(dtype=self.input_dtype)
        self._check_input(operand, self._kernel.shape[self.rank] * self.groups)
        return ops.cast(inputs, self.input_dtype)

    def _check_input(self, inputs: Operand, channels: int | None) -> None:
        """Raise unless inputs fit, for a layer that was built for so many channels."""
        settings = self._settings
        given: tuple[Any, ...] = inputs.shape
        shape, sizes = given, given[2:]
        if settings.channels_last and len(given) > 1:
            shape, sizes = (given[0], given[-1], *given[1:-1]), given[1:-1]
        if len(sizes) == self.rank:  # one that is not known yet is taken to fit
            spans = [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation_rate, strict=True)]
            sizes = tuple(span if size is None else size for size, span in zip(sizes, spans, strict=True))
            shape = (1 if shape[0] is None else shape[0], shape[1], *sizes)
        in_channels = channels or (shape[1] if len(shape) > 1 else 1)
        weight = Operand((self.filters, in_channels // self.groups, *self.kernel_size), self.input_dtype)
        try:
            check_input(
                inputs._replace(shape=shape), weight, stride=self.strides, dilation=self.dilation_rate, groups=self.groups,
                padding=settings.pairs(sizes) if len(sizes) == self.rank else ((0, 0),) * self.rank, rank=self.rank,
                in_channels=channels,
            )  # fmt: skip
        except _MISTAKES as error:
            raise _of_inputs(error, settings, given, channels) from None

    def _is_of_steps(self, mask: Any) -> bool:
        """Whether a mask is the one that Keras hands on from an Embedding or a Masking layer: which steps there are."""
        return mask is not None and len(mask.shape) < self.rank + 2

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """No mask is handed on, as Keras' convolutions hand none on."""
        if self._is_of_steps(previous_mask):
            warnings.warn(
                f"The inputs of layer {self.name!r} have a mask of steps, which a convolution does not look at: the layers "
                "after it will not see it.",
                stacklevel=2,
            )

    def compute_output_spec(self, inputs: Any, offset: Any = None, mask: Any = None) -> Any:
        """What a model's graph knows of the output; an offset that is missing is missed here."""
        if offset is None:
            check_predictor(self.offset_conv)
        return super().compute_output_spec(inputs, offset, mask)  # type: ignore[misc]

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        return config | {name: getattr(self, name) for name in OURS}


def _check_names(layer: type, others: dict[str, Any]) -> None:
    """Raise unless Keras' layers take these keywords."""
    known = {"input_shape", "input_dim"}
    for base in layer.__mro__:
        if "__init__" in vars(base):
            known |= set(inspect.signature(vars(base)["__init__"]).parameters)
    unknown = {name: value for name, value in others.items() if name not in known - {"rank", "self"}}
    if unknown:
        raise unexpected(_DeformConv.__init__, unknown, layer.__name__)


def _check_padding(padding: Any) -> None:
    if isinstance(padding, str) and padding.lower() == "causal":
        raise ValueError(
            "`padding` is 'causal'; expected 'valid' or 'same': taps that move read later steps, too, so nothing is causal."
        )
    if not isinstance(padding, str) or padding.lower() not in ("valid", "same"):
        raise ShapeError(
            f"`padding` is {padding!r}; expected 'valid' or 'same'. For other amounts put a `keras.layers.ZeroPadding` layer "
            "before this one."
        )


def _checked(
    rank: int, channels: int | None, filters: Any, kernel_size: Any, strides: Any, dilation_rate: Any, groups: Any, **ours: Any
) -> Layer:
    """A layer's checked arguments; an error calls them as Keras does."""
    try:
        return checked_layer(rank, channels, filters, kernel_size, strides, "valid", dilation_rate, groups, **ours)
    except _MISTAKES as error:
        raise in_words(error, WORDS) from None


def _of_inputs(error: Exception, settings: Settings, given: tuple[int | None, ...], channels: int | None) -> Exception:
    """The error for inputs, in Keras' words, which says where their channels are expected."""
    if not settings.channels_last:
        return in_words(error, WORDS)
    text = str(in_words(error, WORDS, {channels_last("input"): ""}))
    text += f" These are shapes with the channels first; `inputs` has shape {given}, and data_format='channels_last'."
    if channels and len(given) == settings.rank + 2 and given[1] == channels != given[-1]:
        text += " It looks channels-first: move its channels to the end, or build the layer with data_format='channels_first'."
    return type(error)(text)


@keras.saving.register_keras_serializable(package="deformconv")
class DeformConv1D(_DeformConv, layers.Conv1D):
    """Deformable convolution over steps, `keras.layers.Conv1D` with taps that move: see `DeformConv2D`.

    Shape:
        inputs (N, steps, channels), output (N, steps_out, filters); offset (N, offset_groups*K, steps_out), mask the same.

    Example:
        >>> import keras
        >>> from deformconv.keras import DeformConv1D
        >>> layer = DeformConv1D(8, 3, padding="same")
        >>> layer(keras.ops.ones((2, 100, 4))).shape == (2, 100, 8)
        True
    """

    rank = 1


@keras.saving.register_keras_serializable(package="deformconv")
class DeformConv2D(_DeformConv, layers.Conv2D):
    """Deformable convolution that predicts its own offsets and, in v2, masks: `keras.layers.Conv2D` with taps that move.

    It is a subclass of Keras' layer, with its arguments, weights and their names, and runs on every backend of Keras. A fresh
    layer computes what Conv2D computes. Offsets and masks are predicted by `layer.offset_conv`, a Conv2D over the same window
    whose weights begin as zeros: its first offset_groups*K*2 channels are offsets, for K taps, and the others raw masks. In
    half precision it computes in float32, as the operator does. On the CPU compiled kernels compute, forward and backward, with
    TensorFlow, JAX, PyTorch and NumPy; with OpenVINO its own operator does.

    Args:
        filters, kernel_size, strides, data_format, dilation_rate, groups, activation, use_bias, kernel_initializer,
            bias_initializer, kernel_regularizer, bias_regularizer, activity_regularizer, kernel_constraint, bias_constraint: as
            `keras.layers.Conv2D`, and so are name, dtype, trainable and lora_rank.
        padding: "valid" or "same".
        modulated: True for v2, which predicts a mask beside the offsets; False for v1.
        offset_groups: the number of groups of channels with offsets of their own.
        predict_offsets: False for a layer without `offset_conv`, which is called with offsets.
        mask_scale: masks are mask_scale*sigmoid of what is predicted, so that a fresh layer's are 1.
        max_offset: the largest offset in pixels, by max_offset*tanh(offset/max_offset); None for no bound.
        boundary: "zeros" or "inside", as in `deformconv.deform_conv`.

    Call:
        `layer(inputs)` predicts. `layer(inputs, offset)` and `layer(inputs, offset, mask)` compute with what is passed: offset
        (N, offset_groups*K*2, H_out, W_out) in input pixels, group-major, then tap (row-major), then dy before dx; mask
        (N, offset_groups*K, H_out, W_out). Both have their channels first in either data format.

    Shape:
        inputs (N, H, W, channels), output (N, H_out, W_out, filters); with data_format="channels_first" (N, channels, H, W) and
        (N, filters, H_out, W_out).

    Raises:
        ShapeError: a shape or an argument's value does not fit.
        TypeError: a number is no integer, inputs are no floating-point numbers, or an offset is missing.
        ValueError: a word is unknown, or `padding` is "causal".

    Example:
        >>> import keras
        >>> from deformconv.keras import DeformConv2D
        >>> layer = DeformConv2D(8, 3, padding="same")
        >>> x = keras.ops.ones((2, 10, 10, 3))
        >>> layer(x).shape == (2, 10, 10, 8)
        True
        >>> offset, mask = layer.offsets_and_mask(x)
        >>> offset.shape == (2, 18, 10, 10) and mask.shape == (2, 9, 10, 10)
        True
        >>> [weight.path.split("/", 1)[1] for weight in layer.weights]
        ['kernel', 'bias', 'offset_conv/kernel', 'offset_conv/bias']

    Papers: arXiv 1703.06211, equation 2 (v1); arXiv 1811.11168, equation 1 (v2).
    """

    rank = 2


@keras.saving.register_keras_serializable(package="deformconv")
class DeformConv3D(_DeformConv, layers.Conv3D):
    """Deformable convolution over volumes, `keras.layers.Conv3D` with taps that move: see `DeformConv2D`.

    Shape:
        inputs (N, D, H, W, channels), output (N, D_out, H_out, W_out, filters); offset (N, offset_groups*K*3, D_out, H_out,
        W_out), mask (N, offset_groups*K, D_out, H_out, W_out).

    Example:
        >>> import keras
        >>> from deformconv.keras import DeformConv3D
        >>> layer = DeformConv3D(8, 3, padding="same")
        >>> layer(keras.ops.ones((2, 5, 6, 7, 4))).shape == (2, 5, 6, 7, 8)
        True
    """

    rank = 3
