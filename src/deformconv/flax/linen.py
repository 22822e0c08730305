"""Where flax.linen.Conv stood: a layer that predicts its own offsets and masks."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import linen

from deformconv.flax.convolution import (
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

_UNUSED = {"input_dilation": 1, "conv_general_dilated": None, "conv_general_dilated_cls": None}


class DeformConv(linen.Conv):
    """Deformable convolution (v1 or v2) that stands where flax.linen.Conv stood, and predicts its own offsets.

    It is a linen.Conv, with its fields, its parameters and their first values. The parameters are those of
    `deformconv.flax.DeformConv`, where all that follows is explained: `kernel` and `bias`, and `kernel` and `bias` of
    `offset_conv`. Arguments are checked where Linen knows the features of the input: in `init` and `apply`.

    Linen names a layer that has no name after its class: give one that takes a convolution's place the convolution's name
    (`name="Conv_1"`), and neither its parameters nor its neighbours' move.

    Args:
        features, kernel_size, strides, padding, kernel_dilation, feature_group_count, use_bias, mask, dtype, param_dtype,
            precision, kernel_init, bias_init, promote_dtype: as linen.Conv; padding not "CAUSAL".
        input_dilation, conv_general_dilated, conv_general_dilated_cls: linen.Conv's defaults; all else is refused.
        modulated, offset_groups, predict_offsets, mask_scale, max_offset, boundary: as `deformconv.flax.DeformConv`.

    Shape:
        inputs (*batch, *S, C), output (*batch, *O, features); offset (*batch, offset_groups*K*D, *O) and mask
        (*batch, offset_groups*K, *O), channels first.

    Raises:
        ShapeError, TypeError, ValueError: as `deformconv.flax.DeformConv`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from deformconv.flax.linen import DeformConv
        >>> layer = DeformConv(features=8, kernel_size=(3, 3))
        >>> x = jnp.ones((10, 100, 100, 3))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> layer.apply(variables, x).shape
        (10, 100, 100, 8)
        >>> jax.tree.map(jnp.shape, variables["params"])
        {'bias': (8,), 'kernel': (3, 3, 3, 8), 'offset_conv': {'bias': (27,), 'kernel': (3, 3, 3, 27)}}
        >>> offset, mask = layer.apply(variables, x, method="offsets_and_mask")
        >>> offset.shape, mask.shape
        ((10, 18, 100, 100), (10, 9, 100, 100))

    Papers: v1, arXiv 1703.06211, equation 2; v2, arXiv 1811.11168, equation 1.
    """

    modulated: bool = True
    offset_groups: int = 1
    predict_offsets: bool = True
    mask_scale: float = MASK_SCALE
    max_offset: float | None = None
    boundary: str = "zeros"

    def __new__(cls, *arguments: Any, **named: Any) -> DeformConv:
        """Say what another library's word for an argument is here; dataclasses would refuse it without a hint."""
        unknown = {name: value for name, value in named.items() if name not in cls.__dataclass_fields__}
        if unknown:
            raise unexpected(cls.__init__, unknown, cls.__name__)
        made: DeformConv = super().__new__(cls)
        return made

    def __call__(self, inputs: Any, offset: Any = None, mask: Any = None) -> jax.Array:
        """Convolve with predicted offsets and masks, or with exactly those passed: without mask, v1."""
        check_passed(offset, mask, self.modulated)
        output: jax.Array = self._run(inputs, offset, mask)
        return output

    def offsets_and_mask(self, inputs: Any) -> tuple[jax.Array, jax.Array | None]:
        """Return what the layer predicts for `inputs`, as `deformconv.flax.DeformConv` does: apply with this `method`."""
        found: tuple[jax.Array, jax.Array | None] = self._run(inputs, predict=True)
        return found

    @linen.compact
    def _run(self, inputs: Any, offset: Any = None, mask: Any = None, predict: bool = False) -> Any:
        layer = self._checked(inputs)
        kernel = self.param("kernel", self.kernel_init, kernel_shape(layer, self.mask), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        kernel = kernel if self.mask is None else kernel * self.mask
        predictor = self._predictor(layer) if self.predict_offsets else None
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        images = images_of(layer, inputs)
        predicting = partial(prediction, layer, self.modulated, predictor)
        if predict:
            return tuple(None if array is None else with_batch(array, images) for array in predicting(images.pixels))
        if offset is not None and predictor is not None and self.is_initializing():
            predictor(images.pixels)  # so that it has parameters
        return convolve(layer, self.boundary, images, kernel, bias, predicting, offset, mask)

    def _checked(self, inputs: Any) -> Layer:
        """The arguments, for the features of the parameters that there are, or else of the input."""
        not_unused(_UNUSED, vars(self))
        shape, groups = getattr(inputs, "shape", None) or (1,), self.feature_group_count
        features = shape[-1]
        if self.has_variable("params", "kernel"):
            features = linen.unbox(self.get_variable("params", "kernel")).shape[-2] * groups
        layer = checked(
            features, self.features, self.kernel_size, self.strides, self.padding, self.kernel_dilation, groups, out="features",
            offset_groups=self.offset_groups, predict_offsets=self.predict_offsets, mask_scale=self.mask_scale,
            max_offset=self.max_offset, boundary=self.boundary,
        )  # fmt: skip
        check_inputs(layer, inputs)
        return layer

    def _predictor(self, layer: Layer) -> linen.Conv:
        zeros = linen.initializers.zeros_init()
        return linen.Conv(
            predicted(layer.kernel_size, layer.offset_groups or 1, self.modulated).channels, layer.kernel_size,
            **predictor_window(layer), dtype=None if self.dtype is None else whole(self.dtype), param_dtype=self.param_dtype,
            precision=self.precision, kernel_init=zeros, bias_init=zeros, promote_dtype=self.promote_dtype, name="offset_conv",
        )  # fmt: skip
