"""Layers that stand where eqx.nn.Conv stood: one text for 1, 2 and 3 spatial axes, of one image without a batch axis."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deformconv.errors import ShapeError
from deformconv.jax import deform_conv
from deformconv.jax.layers import PADDING_WORDS, offsets_and_mask, padding_pairs, whole
from deformconv.ops.conv.layer import (
    MASK_SCALE,
    check_passed,
    check_predictor,
    checked_layer,
    predicted,
)
from deformconv.ops.conv.spec import check_input
from deformconv.ops.operator import HALF, Operand
from deformconv.ops.window import axes, count, n_of
from deformconv.ops.words import in_words, unexpected

__all__ = ["DeformConv", "DeformConv1d", "DeformConv2d", "DeformConv3d"]

PADDING_MODES = ("ZEROS", "REFLECT", "REPLICATE", "CIRCULAR")


class DeformConv(eqx.nn.Conv):
    """Deformable convolution (v1 or v2) that stands where eqx.nn.Conv stood, and predicts its own offsets.

    Like every layer of Equinox it takes one image, without a batch axis; `jax.vmap(layer)(images)` takes a batch, in one call
    of the kernels. `layer(x)` predicts an offset for every tap at every output position and, in v2, a mask. A fresh layer
    predicts offsets 0 and masks 1, so it computes what the convolution with its weights computes: that of the same `key`.
    `layer(x, offset)` and `layer(x, offset, mask)` use exactly what is passed: without mask, v1.

    `weight` and `bias` have eqx.nn.Conv's names and shapes. The predictor is `layer.offset_conv`, an eqx.nn.Conv over the same
    window, of zeros: first D*K channels of offsets per offset group (for each of the K taps one per axis, dy before dx), then K
    of masks. It is usually trained at a tenth of the learning rate: see `deformconv.jax.offset_labels`. In half precision it
    computes in float32, since bfloat16 knows an offset of 20 pixels to 0.125 only.

    Args:
        num_spatial_dims: D, the number of spatial axes: 1, 2 or 3.
        in_channels, out_channels, kernel_size, stride, dilation, groups, use_bias, dtype, key: as eqx.nn.Conv.
        padding: as eqx.nn.Conv: a number, D numbers, D pairs (before, after), "SAME", "SAME_LOWER" or "VALID".
        padding_mode: as eqx.nn.Conv: "ZEROS", "REFLECT", "REPLICATE" or "CIRCULAR". In another mode than "ZEROS" the input is
            padded first, and samples beyond that are what `boundary` says.
        modulated: True is v2, False is v1 (no masks).
        offset_groups: the channels are split into that many groups with offsets of their own; None, without a predictor,
            takes the number from the offsets that are passed.
        predict_offsets: False leaves out the predictor; offsets are then passed in the call.
        mask_scale: masks are mask_scale*sigmoid(raw).
        max_offset: bounds predicted offsets smoothly, to max_offset*tanh(raw/max_offset) input pixels.
        boundary: "zeros" or "inside", as in `deformconv.deform_conv`.

    Shape:
        x (C_in, *S), output (C_out, *O); for the K taps of the kernel offset (offset_groups*K*D, *O) and mask
        (offset_groups*K, *O), of the dtype of x (in half precision float32 as well).

    Raises:
        ShapeError: a shape or an argument's value does not fit, a batch without jax.vmap above all.
        TypeError: no offset for a layer that predicts none, a mask without an offset, or mixed dtypes.

    Example:
        >>> import jax
        >>> from deformconv.equinox import DeformConv
        >>> layer = DeformConv(2, 3, 8, kernel_size=3, padding=1, key=jax.random.key(0))
        >>> image = jax.random.uniform(jax.random.key(1), (3, 32, 32))
        >>> layer(image).shape
        (8, 32, 32)
        >>> jax.vmap(layer)(jax.numpy.stack([image, image])).shape
        (2, 8, 32, 32)
        >>> offset, mask = layer.offsets_and_mask(image)
        >>> offset.shape, mask.shape
        ((18, 32, 32), (9, 32, 32))

    Papers: v1, arXiv 1703.06211, equation 2; v2, arXiv 1811.11168, equation 1.
    """

    offset_conv: eqx.nn.Conv | None
    modulated: bool = eqx.field(static=True)
    offset_groups: int | None = eqx.field(static=True)
    mask_scale: float = eqx.field(static=True)
    max_offset: float | None = eqx.field(static=True)
    boundary: str = eqx.field(static=True)

    def __init__(
        self,
        num_spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        use_bias: bool = True,
        padding_mode: str = "ZEROS",
        dtype: Any = None,
        *,
        key: Array,
        modulated: bool = True,
        offset_groups: int | None = 1,
        predict_offsets: bool = True,
        mask_scale: float = MASK_SCALE,
        max_offset: float | None = None,
        boundary: str = "zeros",
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise unexpected(DeformConv.__init__, unknown, type(self).__name__)
        rank, mode = _rank(num_spatial_dims), padding_mode.upper() if isinstance(padding_mode, str) else padding_mode
        word = _padding_word(padding)
        layer = checked_layer(
            rank, in_channels, out_channels, kernel_size, stride, 0 if word else padding, dilation, groups,
            offset_groups=offset_groups, predict_offsets=predict_offsets, mask_scale=mask_scale, max_offset=max_offset,
            boundary=boundary, padding_mode=mode, padding_modes=PADDING_MODES,
        )  # fmt: skip
        window: Any = (layer.kernel_size, layer.stride, word or layer.padding.pairs, layer.dilation)
        # By its name: in the classes of one rank, whose next base class is that of Equinox for the rank, super() is another.
        eqx.nn.Conv.__init__(
            self, rank, layer.in_channels, layer.out_channels, *window, layer.groups, use_bias, mode, dtype, key=key
        )
        self.modulated, self.boundary = bool(modulated), boundary
        self.offset_groups, self.mask_scale, self.max_offset = layer.offset_groups, layer.mask_scale, layer.max_offset
        self.offset_conv = None
        if predict_offsets:
            channels = predicted(layer.kernel_size, offset_groups or 1, self.modulated).channels
            shapes = eqx.filter_eval_shape(
                eqx.nn.Conv, rank, layer.in_channels, channels, *window, 1, True, mode, dtype, key=key
            )
            self.offset_conv = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    @jax.named_scope("deformconv.equinox.DeformConv")
    def __call__(self, x: Array, offset: Array | None = None, mask: Array | None = None, *, key: Array | None = None) -> Array:
        """Return the layer's output for one image.

        Args:
            x: the image (C_in, *S).
            offset: (offset_groups*K*D, *O), in input pixels; by default what is predicted.
            mask: (offset_groups*K, *O); without it, and with `offset`, the masks are 1.
            key: ignored, as eqx.nn.Conv does.
        """
        check_passed(offset, mask, self.modulated)
        x, rank = self._checked(x), self.num_spatial_dims
        if offset is None:
            offset, mask = self._predict(x)
        offsets, masks = _batch_of_one("offset", offset, rank), _batch_of_one("mask", mask, rank)
        padding = self._amounts(x.shape[1:])
        if self.padding_mode != "ZEROS":
            x, padding = self._nonzero_pad(x), ((0, 0),) * rank
        bias = None if self.bias is None else self.bias.reshape(-1)
        arrays = _cast((x[None], offsets, self.weight, bias), whole(x.dtype))
        call = *arrays, self.stride, padding, self.dilation, _cast(masks, whole(x.dtype))
        groups = {"groups": self.groups, "offset_groups": self.offset_groups}
        output: Array = _of_one_image(lambda: deform_conv(*call, **groups, boundary=self.boundary), rank)
        return output[0].astype(x.dtype)

    def offsets_and_mask(self, x: Array) -> tuple[Array, Array | None]:
        """Return what the layer predicts for the image `x`: offsets in input pixels, and the mask or, in v1, None.

        `layer(x, *layer.offsets_and_mask(x))` computes what `layer(x)` computes.
        """
        return self._predict(self._checked(x))

    def _checked(self, x: Any) -> Array:
        """The image, after what this layer, its operator or its predictor would refuse of it."""
        rank, takes = self.num_spatial_dims, f"(C_in, {axes(self.num_spatial_dims)})"
        x = _array("x", x)
        if x.ndim != rank + 1:
            text = f"`x` has {n_of(x.ndim, 'axis')}, shape {x.shape}; this layer takes {rank + 1}, {takes}, one image."
            batch, grey = " For a batch of images: jax.vmap(layer)(x).", " For an image of one channel pass `x[None]`."
            raise ShapeError(text + {rank + 2: batch, rank: grey}.get(x.ndim, ""))
        if x.shape[0] != self.in_channels:
            text = f"`x` has {n_of(x.shape[0], 'channel')}, shape {x.shape}; this layer has in_channels={self.in_channels}."
            last = " `x` looks channels-last: move its last axis to place 0, `jax.numpy.moveaxis(x, -1, 0)`."
            raise ShapeError(text + last * (x.shape[-1] == self.in_channels))
        sizes, padding = x.shape[1:], self._amounts(x.shape[1:])
        if self.padding_mode != "ZEROS":
            sizes, padding = tuple(size + sum(pair) for size, pair in zip(sizes, padding, strict=True)), ((0, 0),) * rank
        operands = Operand((1, x.shape[0], *sizes), str(x.dtype)), Operand(self.weight.shape, str(self.weight.dtype))
        window = {"stride": self.stride, "padding": padding, "dilation": self.dilation}
        _of_one_image(lambda: check_input(*operands, **window, groups=self.groups, rank=rank), rank)
        return x

    def _amounts(self, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """The padding in pairs; what a word means depends on the image's size."""
        if isinstance(self.padding, str):
            return padding_pairs(self.padding, sizes, self.kernel_size, self.stride, self.dilation)
        return self.padding

    def _predict(self, x: Array) -> tuple[Array, Array | None]:
        predictor: Any = check_predictor(self.offset_conv)
        if whole(x.dtype) != x.dtype:
            numbers, others = eqx.partition(predictor, eqx.is_inexact_array)
            predictor = eqx.combine(_cast(numbers, whole(x.dtype)), others)
        channels = predicted(self.kernel_size, self.offset_groups or 1, self.modulated)
        raw = predictor(_cast(x, whole(x.dtype)))  # (offsets + masks, *O)
        return offsets_and_mask(raw, channels, 0, self.mask_scale, self.max_offset)


class _OfOneRank(DeformConv):
    """The constructor without `num_spatial_dims`."""

    rank: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        use_bias: bool = True,
        padding_mode: str = "ZEROS",
        dtype: Any = None,
        *,
        key: Array,
        modulated: bool = True,
        offset_groups: int | None = 1,
        predict_offsets: bool = True,
        mask_scale: float = MASK_SCALE,
        max_offset: float | None = None,
        boundary: str = "zeros",
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise unexpected(_OfOneRank.__init__, unknown, type(self).__name__)
        super().__init__(
            self.rank, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, use_bias, padding_mode, dtype,
            key=key, modulated=modulated, offset_groups=offset_groups, predict_offsets=predict_offsets, mask_scale=mask_scale,
            max_offset=max_offset, boundary=boundary,
        )  # fmt: skip


class DeformConv1d(_OfOneRank, eqx.nn.Conv1d):
    """Where eqx.nn.Conv1d stood: x (C_in, W). The arguments are explained in `DeformConv`.

    Example:
        >>> import jax
        >>> from deformconv.equinox import DeformConv1d
        >>> layer = DeformConv1d(16, 8, kernel_size=5, padding="SAME", key=jax.random.key(0))
        >>> layer(jax.numpy.ones((16, 200))).shape
        (8, 200)
    """

    rank = 1


class DeformConv2d(_OfOneRank, eqx.nn.Conv2d):
    """Where eqx.nn.Conv2d stood: x (C_in, H, W). The arguments are explained in `DeformConv`.

    Example:
        >>> import jax
        >>> from deformconv.equinox import DeformConv2d
        >>> layer = DeformConv2d(3, 8, kernel_size=3, stride=2, padding=1, key=jax.random.key(0))
        >>> jax.vmap(layer)(jax.numpy.ones((10, 3, 32, 32))).shape
        (10, 8, 16, 16)
    """

    rank = 2


class DeformConv3d(_OfOneRank, eqx.nn.Conv3d):
    """Where eqx.nn.Conv3d stood: x (C_in, D, H, W). The arguments are explained in `DeformConv`.

    Example:
        >>> import jax
        >>> from deformconv.equinox import DeformConv3d
        >>> layer = DeformConv3d(4, 6, kernel_size=3, padding=1, key=jax.random.key(0))
        >>> layer(jax.numpy.ones((4, 8, 8, 8))).shape
        (6, 8, 8, 8)
    """

    rank = 3


def _rank(num_spatial_dims: Any) -> int:
    rank = count("num_spatial_dims", num_spatial_dims)
    if rank > 3:
        raise ShapeError(f"`num_spatial_dims` is {rank}; expected 1, 2 or 3.")
    return rank


def _padding_word(padding: Any) -> str | None:
    """Equinox's word for a padding in capitals; None for numbers."""
    if not isinstance(padding, str):
        return None
    if padding.upper() not in PADDING_WORDS:
        words = ", ".join(map(repr, PADDING_WORDS))
        raise ShapeError(f"`padding` is {padding!r}; expected one of {words}, a number, or one or two for every axis.")
    return padding.upper()


def _array(name: str, value: Any) -> Array:
    if not eqx.is_array(value) and not isinstance(value, np.ndarray):
        found = "None" if value is None else f"a {type(value).__name__}"
        raise TypeError(f"`{name}` is {found}; expected an array of JAX or NumPy.")
    return jnp.asarray(value)


def _cast(arrays: Any, dtype: Any) -> Any:
    """Arrays of half precision in another dtype; others as they are, so that the operator refuses what is mixed."""
    return jax.tree.map(lambda array: array.astype(dtype) if str(array.dtype) in HALF else array, arrays)


def _batch_of_one(name: str, array: Any, rank: int) -> Array | None:
    """What is passed beside an image, as the operator takes it."""
    if array is None:
        return None
    array = _array(name, array)
    if array.ndim != rank + 1:
        text = f"`{name}` has {n_of(array.ndim, 'axis')}, shape {array.shape}; expected {rank + 1}, the channels and those of "
        raise ShapeError(f"{text}the output, {axes(rank)}: without a batch axis, as the image has none.")
    return array[None]


def _of_one_image(call: Callable[[], Any], rank: int) -> Any:
    """The result of a call with a batch of one image; its errors speak of the image alone."""
    try:
        return call()
    except (ShapeError, TypeError) as error:
        text = str(in_words(error, {"input": "x"}, {"(N, ": "("}))
        raise type(error)(re.sub(rf"\(1((?:, \d+){{{rank + 1}}}\))", lambda found: "(" + found[1][2:], text)) from None
