"""Where flax.nnx.Conv stood: a layer that predicts its own offsets and masks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from jax import lax

from deformconv.flax.convolution import (
    Images,
    check_inputs,
    checked,
    convolve,
    images_of,
    kernel_shape,
    not_unused,
    prediction,
    predictor_window,
    with_batch,
)
from deformconv.jax.layers import whole
from deformconv.ops.conv.layer import MASK_SCALE, Layer, check_passed, predicted
from deformconv.ops.words import unexpected

__all__ = ["DeformConv"]

_UNUSED = {"input_dilation": 1, "conv_general_dilated": lax.conv_general_dilated, "preferred_element_type": None}
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class DeformConv(nnx.Conv):
    """Deformable convolution (v1 or v2) that stands where flax.nnx.Conv stood, and predicts its own offsets.

    It is an nnx.Conv, with its arguments, its parameters and their first values: channels are last, and the kernel's size says
    over how many axes (1 to 3) it slides. `layer(x)` predicts an offset for every tap at every output position and, in v2,
    a mask. A fresh layer predicts offsets 0 and masks 1, so it computes what nnx.Conv with the same `rngs` computes.
    `layer(x, offset)` and `layer(x, offset, mask)` use exactly what is passed: without mask, v1.

    The predictor is `layer.offset_conv`, an nnx.Conv over the same window, all zeros at first: it takes nothing of `rngs`.
    Its first offset_groups*K*D features are offsets (dy before dx), the last offset_groups*K masks. In half precision
    (`dtype=jnp.bfloat16`) positions would be too coarse: predictor and operator then compute in float32, from inputs and a
    kernel that were rounded to `dtype`, and the output has `dtype`.

    Args:
        in_features, out_features, kernel_size, strides, kernel_dilation, feature_group_count, use_bias, mask, dtype,
            param_dtype, kernel_init, bias_init, promote_dtype, rngs, kernel_metadata, bias_metadata: as nnx.Conv. `mask` is
            multiplied with the kernel, and is none of v2's masks.
        padding: as nnx.Conv, in words or numbers; not "CAUSAL", since offsets move taps to later positions.
        precision: as nnx.Conv, for the predictor and wherever XLA multiplies; the CPU's kernels compute in full precision.
        input_dilation, conv_general_dilated, preferred_element_type: nnx.Conv's defaults; all else is refused.
        modulated: True is v2, False is v1 (no masks).
        offset_groups: the features are split into that many groups with offsets of their own.
        predict_offsets: False leaves out the predictor; offsets are then passed in the call.
        mask_scale: masks are mask_scale*sigmoid(raw).
        max_offset: bounds predicted offsets smoothly, to max_offset*tanh(raw/max_offset) input pixels.
        boundary: "zeros" or "inside", as in `deformconv.deform_conv`.

    Shape:
        inputs (*batch, *S, in_features), output (*batch, *O, out_features); for the K taps of the kernel offset
        (*batch, offset_groups*K*D, *O) and mask (*batch, offset_groups*K, *O), **channels first** as the operator takes them.
        There may be any number of axes of a batch, and none.

    Raises:
        ShapeError: a shape or an argument's value does not fit.
        TypeError: no offset for a layer that predicts none, or a mask without an offset.
        ValueError: an argument that this layer cannot honour.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from deformconv.flax import DeformConv
        >>> layer = DeformConv(3, 8, kernel_size=(3, 3), rngs=nnx.Rngs(0))
        >>> x = jnp.ones((10, 100, 100, 3))
        >>> layer(x).shape
        (10, 100, 100, 8)
        >>> offset, mask = layer.offsets_and_mask(x)
        >>> offset.shape, mask.shape
        ((10, 18, 100, 100), (10, 9, 100, 100))

    Papers: v1, arXiv 1703.06211, equation 2; v2, arXiv 1811.11168, equation 1.
    """

    offset_conv: nnx.Conv | None

    def __init__(
        self, in_features: int, out_features: int, kernel_size: Any, strides: Any = 1, *, padding: Any = "SAME",
        input_dilation: Any = 1, kernel_dilation: Any = 1, feature_group_count: int = 1, use_bias: bool = True,
        mask: Any = None, dtype: Any = None, param_dtype: Any = jnp.float32, precision: Any = None,
        kernel_init: Any = default_kernel_init, bias_init: Any = default_bias_init,
        conv_general_dilated: Any = lax.conv_general_dilated, promote_dtype: Any = dtypes.promote_dtype,
        preferred_element_type: Any = None, rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NOTHING, bias_metadata: Mapping[str, Any] = _NOTHING,
        modulated: bool = True, offset_groups: int = 1, predict_offsets: bool = True, mask_scale: float = MASK_SCALE,
        max_offset: float | None = None, boundary: str = "zeros", **unknown: NoReturn,
    ) -> None:  # fmt: skip
        if unknown:
            raise unexpected(DeformConv.__init__, unknown, type(self).__name__)
        not_unused(_UNUSED, locals())
        layer = checked(
            in_features, out_features, kernel_size, strides, padding, kernel_dilation, feature_group_count, out="out_features",
            offset_groups=offset_groups, predict_offsets=predict_offsets, mask_scale=mask_scale, max_offset=max_offset,
            boundary=boundary,
        )  # fmt: skip
        kernel_shape(layer, mask)
        metadata = {"kernel_metadata": kernel_metadata, "bias_metadata": bias_metadata}  # not in older Flax
        super().__init__(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, padding=predictor_window(layer)["padding"],
            kernel_dilation=layer.dilation, feature_group_count=layer.groups, use_bias=use_bias, mask=mask, dtype=dtype,
            param_dtype=param_dtype, precision=precision, kernel_init=kernel_init, bias_init=bias_init,
            promote_dtype=promote_dtype, rngs=rngs, **{name: value for name, value in metadata.items() if value},
        )  # fmt: skip
        self.modulated, self.offset_groups, self.boundary = modulated, layer.offset_groups, boundary
        self.mask_scale, self.max_offset = layer.mask_scale, layer.max_offset
        self.offset_conv = self._predictor(layer) if predict_offsets else _no_module()

    def _predictor(self, layer: Layer) -> nnx.Conv:
        zeros = nnx.initializers.zeros_init()
        return nnx.Conv(
            layer.in_channels, predicted(layer.kernel_size, layer.offset_groups or 1, self.modulated).channels,
            layer.kernel_size, **predictor_window(layer), dtype=None if self.dtype is None else whole(self.dtype),
            param_dtype=self.param_dtype, precision=self.precision, kernel_init=zeros, bias_init=zeros,
            promote_dtype=self.promote_dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip

    def __call__(self, inputs: Any, offset: Any = None, mask: Any = None, *, out_sharding: Any = None) -> jax.Array:
        """Convolve with predicted offsets and masks, or with exactly those passed: without mask, v1."""
        check_passed(offset, mask, self.modulated)
        not_unused({"out_sharding": None}, {"out_sharding": out_sharding})
        layer = self._layer
        images, kernel, bias = self._promoted(layer, inputs)
        predict = partial(prediction, layer, self.modulated, self.offset_conv)
        return convolve(layer, self.boundary, images, kernel, bias, predict, offset, mask)

    def offsets_and_mask(self, inputs: Any) -> tuple[jax.Array, jax.Array | None]:
        """Return what the layer predicts for `inputs`: offsets in input pixels, and the mask or, in v1, None; channels first.

        `layer(inputs, *layer.offsets_and_mask(inputs))` computes what `layer(inputs)` computes.
        """
        layer = self._layer
        images, *_ = self._promoted(layer, inputs)
        offset, mask = prediction(layer, self.modulated, self.offset_conv, images.pixels)
        return with_batch(offset, images), None if mask is None else with_batch(mask, images)

    @property
    def _layer(self) -> Layer:
        return checked(
            self.in_features, self.out_features, self.kernel_size, self.strides, self.padding, self.kernel_dilation,
            self.feature_group_count, out="out_features", offset_groups=self.offset_groups,
            predict_offsets=self.offset_conv is not None, mask_scale=self.mask_scale, max_offset=self.max_offset,
            boundary=self.boundary,
        )  # fmt: skip

    def _promoted(self, layer: Layer, inputs: Any) -> tuple[Images, jax.Array, jax.Array | None]:
        """The images, the kernel and the bias in one dtype, as nnx.Conv makes it."""
        check_inputs(layer, inputs)
        kernel = self.kernel[...] if self.mask is None else self.kernel[...] * self.mask
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        return images_of(layer, inputs), kernel, bias


def _no_module() -> Any:
    """None in the place of a module, which another may take later."""
    return nnx.data(None) if hasattr(nnx, "data") else None
