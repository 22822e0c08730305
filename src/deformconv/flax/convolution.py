"""What a layer of NNX and one of Linen share: Flax's words for arguments, and a call on arrays whose channels are last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deformconv.errors import ShapeError
from deformconv.jax import calls
from deformconv.jax.functional import DEFORM_CONV
from deformconv.jax.layers import PADDING_WORDS, offsets_and_mask, padding_pairs, whole
from deformconv.ops.conv.layer import Layer, LayerPadding, check_predictor, checked_layer, predicted
from deformconv.ops.operator import Operand
from deformconv.ops.taps.spec import Words, output_size_of
from deformconv.ops.window import axes, by, n_of
from deformconv.ops.words import in_words

__all__ = [
    "Images", "check_inputs", "checked", "convolve", "images_of", "kernel_shape", "not_unused", "prediction",
    "predictor_window", "with_batch",
]  # fmt: skip

# Flax's names of our arguments; NNX says out_features, Linen features.
WORDS = {
    "in_channels": "in_features",
    "stride": "strides",
    "dilation": "kernel_dilation",
    "groups": "feature_group_count",
    "input": "inputs",
}
PADDING_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}  # words that Flax pads by before it convolves, as jnp.pad names them
UNUSED = {
    "input_dilation": "offsets are in pixels of the inputs as they are. Dilate these first, by jax.lax.pad.",
    "conv_general_dilated": "a deformable convolution is computed in its place.",
    "conv_general_dilated_cls": "a deformable convolution is computed in its place.",
    "preferred_element_type": "sums are at least in float32, and the output has `dtype`.",
    "out_sharding": "the operator keeps its inputs' devices. Divide the batch by jax.shard_map around the call.",
}


class Images:
    """A call's input as the operator and the predictor take it."""

    def __init__(self, pixels: jax.Array, batch: tuple[int, ...], dtype: Any) -> None:
        self.pixels = pixels  # (N, *S, C), at least float32
        self.batch = batch  # the axes of which N is the product
        self.dtype = dtype  # of the output


def checked(
    in_features: Any,
    out_features: Any,
    kernel_size: Any,
    strides: Any,
    padding: Any,
    kernel_dilation: Any,
    feature_group_count: Any,
    *,
    out: str,
    **ours: Any,
) -> Layer:
    """Check a layer's arguments, under Flax's names, and say in these what is wrong; `out` is its name of `out_features`."""
    size = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
    rank = len(size) if isinstance(size, (tuple, list)) else 1
    if not 1 <= rank <= 3:
        raise ShapeError(
            f"`kernel_size` has {n_of(rank, 'entry')}, {tuple(size)}; expected 1, 2 or 3: one for every axis of space."
        )
    word = _padding_word(padding, rank)
    try:
        layer = checked_layer(
            rank, in_features, out_features, kernel_size,
            1 if strides is None else strides,
            0 if word else padding,
            1 if kernel_dilation is None else kernel_dilation,
            feature_group_count, **ours,
        )  # fmt: skip
    except (ShapeError, TypeError, ValueError) as error:
        raise in_words(error, WORDS | {"out_channels": out}) from None
    return layer._replace(padding=LayerPadding(word, ())) if word else layer


def _padding_word(padding: Any, rank: int) -> str | None:
    """A word for padding as it is compared with; None for numbers."""
    if not isinstance(padding, str):
        return None
    if padding.upper() in PADDING_WORDS:
        return padding.upper()
    if padding in PADDING_MODES:
        return padding
    words = ", ".join(map(repr, (*PADDING_WORDS, *PADDING_MODES)))
    text = f"`padding` is {padding!r}; expected {words}, one integer, {n_of(rank, 'integer')} or {n_of(rank, 'pair')}"
    if padding == "CAUSAL":
        text += (
            ". Offsets move taps to later positions, too, so this layer cannot be causal. To pad on the left alone, pass "
            "the pair: ((kernel_dilation*(kernel_size - 1), 0),)"
        )
    raise ShapeError(f"{text}.")


def not_unused(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise for an argument of Flax's convolution that means nothing here, where it is not its default."""
    for name, default in defaults.items():
        value = given[name]
        ones = name == "input_dilation" and (value is None or set(np.atleast_1d(value).tolist()) == {1})
        if not ones and value is not default:
            expected = getattr(default, "__name__", default)
            raise ValueError(f"`{name}` is {value!r}; expected {expected}, since {UNUSED[name]}")


def kernel_shape(layer: Layer, mask: Any = None) -> tuple[int, ...]:
    """The kernel's shape, which is also that of the mask that it is multiplied with."""
    out_features, features, *size = layer.weight_shape
    shape = (*size, features, out_features)
    if mask is not None and tuple(mask.shape) != shape:
        raise ShapeError(
            f"`mask` has shape {tuple(mask.shape)}; expected the kernel's, {shape}, which it is multiplied with. Masks of v2 "
            "are passed in the call: layer(inputs, offset, mask)."
        )
    return shape


def predictor_window(layer: Layer) -> dict[str, Any]:
    """The window of a layer as the arguments of the convolution that is its predictor."""
    padding = layer.padding.shown if isinstance(layer.padding.shown, str) else layer.padding.pairs
    return {"strides": layer.stride, "padding": padding, "kernel_dilation": layer.dilation}


def images_of(layer: Layer, inputs: jax.Array) -> Images:
    """The images of `inputs` (*batch, *S, in_features), whose dtype has been promoted."""
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(f"`inputs`, with the kernel, is promoted to {inputs.dtype}; expected floating point.")
    batch = inputs.shape[: inputs.ndim - len(layer.kernel_size) - 1]
    pixels = inputs.astype(whole(inputs.dtype)).reshape(prod(batch), *inputs.shape[len(batch) :])
    return Images(pixels, batch, inputs.dtype)


def check_inputs(layer: Layer, inputs: Any) -> None:
    """Raise unless `inputs` is an array of a layer's features, large enough for its window."""
    if not hasattr(inputs, "shape") or not hasattr(inputs, "dtype"):
        raise TypeError(f"`inputs` is a {type(inputs).__qualname__}; expected an array: pass `jnp.asarray(inputs)`.")
    rank, shape, features = len(layer.kernel_size), tuple(inputs.shape), layer.in_channels
    if len(shape) <= rank:
        raise ShapeError(
            f"`inputs` has {n_of(len(shape), 'axis')}, shape {shape}; a {by(layer.kernel_size)} kernel takes at least "
            f"{rank + 1}: ({axes(rank)}, in_features), after the axes of a batch."
        )
    if shape[-1] != features:
        text = f"`inputs` has {n_of(shape[-1], 'feature')}, shape {shape}; this layer has in_features={features}."
        if shape[-1 - rank] == features:
            text += f" `inputs` looks channels-first: move that axis to the end, `jnp.moveaxis(inputs, {-1 - rank}, -1)`."
        raise ShapeError(text)
    sizes = shape[-1 - rank : -1]
    turned = (prod(shape[: -1 - rank]), features, *sizes)
    words = Words("deform_conv", channels="in_features", kernel="`kernel_size` is")
    try:
        output_size_of(Operand(turned, "float32"), layer.kernel_size, layer.stride, _pairs(layer, sizes), layer.dilation, words)
    except ShapeError as error:
        raise in_words(error, {"input": "inputs"}, {str(turned): str(shape)}) from None


def _pairs(layer: Layer, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The padding of an input of these sizes in numbers, whether Flax or the operator pads it."""
    word = layer.padding.shown
    if not isinstance(word, str):
        return layer.padding.pairs
    if word in PADDING_MODES:
        spans = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return tuple(((span - 1) // 2, span // 2) for span in spans)
    return padding_pairs(word, sizes, layer.kernel_size, layer.stride, layer.dilation)


def prediction(layer: Layer, modulated: bool, predictor: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The offsets and the mask, channels first, of what a layer's predictor gives for (N, *S, C); raise if it has none."""
    raw = jnp.moveaxis(check_predictor(predictor)(pixels), -1, 1)
    channels = predicted(layer.kernel_size, layer.offset_groups or 1, modulated)
    return offsets_and_mask(raw, channels, 1, layer.mask_scale, layer.max_offset)


def convolve(
    layer: Layer,
    boundary: str,
    images: Images,
    kernel: jax.Array,
    bias: jax.Array | None,
    predict: Callable[[jax.Array], tuple[jax.Array, jax.Array | None]],
    offset: Any = None,
    mask: Any = None,
) -> jax.Array:
    """The layer's output, (*batch, *O, out_features), with the offsets (*batch, channels, *O) passed or those predicted."""
    pixels, rank, dtype = images.pixels, len(layer.kernel_size), images.pixels.dtype
    if offset is None:
        offset, mask = predict(pixels)
    else:
        offset = without_batch("offset", offset, images, rank)
        mask = None if mask is None else without_batch("mask", mask, images, rank)
    padding = _pairs(layer, pixels.shape[1:-1])
    if layer.padding.shown in PADDING_MODES:
        pixels = jnp.pad(pixels, ((0, 0), *padding, (0, 0)), mode=PADDING_MODES[layer.padding.shown])
        padding = ((0, 0),) * rank
    weight = jnp.transpose(kernel, (rank + 1, rank, *range(rank)))  # (C_out, C_in/groups, *kernel)
    operands = {"input": jnp.moveaxis(pixels, -1, 1), "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    parameters = {
        "stride": layer.stride,
        "padding": padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "offset_groups": layer.offset_groups,
        "boundary": boundary,
    }
    arrays = {name: None if array is None else array.astype(dtype) for name, array in operands.items()}
    try:
        output = calls.call(DEFORM_CONV, arrays, parameters, None, rank=rank, channels_last=True)
    except (ShapeError, TypeError, ValueError) as error:
        if type(error) not in (ShapeError, TypeError, ValueError):
            raise  # JAX's own
        raise in_words(error, WORDS | {"weight": "kernel"}) from None
    return with_batch(jnp.moveaxis(output, 1, -1), images).astype(images.dtype)


def without_batch(name: str, array: Any, images: Images, rank: int) -> jax.Array:
    """An array that was passed for every image, (*batch, channels, *O), with one axis of a batch."""
    array, batch = jnp.asarray(array), images.batch
    if len(batch) == 1 and array.ndim == rank + 2:
        return array  # the operator looks at it
    if array.ndim != len(batch) + rank + 1 or array.shape[: len(batch)] != batch:
        expected = ", ".join([*map(str, batch), "channels", axes(rank)])
        raise ShapeError(
            f"`{name}` has shape {array.shape}; expected ({expected}): the axes of a batch of `inputs`, then channels first."
        )
    return array.reshape(prod(batch), *array.shape[len(batch) :])


def with_batch(array: jax.Array, images: Images) -> jax.Array:
    """The axes of a batch again, in the place of N."""
    return array if len(images.batch) == 1 else array.reshape(*images.batch, *array.shape[1:])
