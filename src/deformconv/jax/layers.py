"""What layers on JAX's arrays share beyond `ops.conv.layer`, in Flax and in Equinox: padding's words, and offsets and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deformconv.ops.conv.layer import Predicted, activated

__all__ = ["PADDING_WORDS", "offsets_and_mask", "padding_pairs", "whole"]

PADDING_WORDS = ("SAME", "SAME_LOWER", "VALID")  # as in jax.lax, in any case of letters


def whole(dtype: Any) -> Any:
    """The dtype of a layer's predictor and operator: float32 for half precision, whose pixels are too coarse for positions."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def offsets_and_mask(
    raw: jax.Array, predicted: Predicted, axis: int, mask_scale: float, max_offset: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """The offsets and the mask of what a predictor gave, whose channels are at `axis`; v1 has no mask."""
    offset, mask = raw, None
    if predicted.masks:
        offset, mask = jnp.split(raw, [predicted.offsets], axis=axis)
    found: tuple[jax.Array, jax.Array | None] = activated(offset, mask, mask_scale, max_offset, jnp.tanh, jax.nn.sigmoid)
    return found


def padding_pairs(
    word: str, sizes: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """What one of `PADDING_WORDS` means for an input of these sizes, as pairs (before, after)."""
    spans = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    return tuple((before, after) for before, after in lax.padtype_to_pads(tuple(sizes), spans, tuple(stride), word.upper()))
