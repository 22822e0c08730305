"""What an argument is called elsewhere, so that a call in another library's words is told ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["in_words", "unexpected"]

# One line for each argument: the names that it has in PyTorch, torchvision, mmcv, detectron2, Paddle, MXNet, ONNX, Keras, Flax.
SYNONYMS = (
    ("offset_groups", "num_deformable_group", "deform_groups", "deformable_groups", "deformable_group", "offset_group"),
    ("groups", "num_group", "group", "feature_group_count"),
    ("stride", "strides"),
    ("padding", "pad", "pads", "paddings"),
    ("dilation", "dilate", "dilations", "dilation_rate", "kernel_dilation"),
    ("kernel_size", "kernel", "kernel_shape"),
    ("in_channels", "in_planes", "inplanes", "in_features"),
    ("out_channels", "channels", "num_filter", "filters", "planes", "out_features", "features"),
    ("bias", "use_bias"),
    ("mask", "masks", "modulation"),
    ("modulated", "modulation", "with_mask", "use_mask"),
    ("boxes", "rois", "bboxes"),
    ("offset", "trans"),
    ("output_size", "pooled_size", "out_size"),
    ("sampling_ratio", "sample_per_part", "sample_num"),
    ("gamma", "trans_std"),
    ("convention", "aligned"),
    ("hidden", "deform_fc_channels"),
    ("embed_dim", "d_model", "embed_dims", "hidden_size"),
    ("num_levels", "n_levels", "num_feature_levels"),
    ("num_heads", "n_heads", "nhead"),
    ("num_points", "n_points"),
    ("locations", "sampling_locations"),
    ("weights", "attention_weights"),
    ("spatial_shapes", "value_spatial_shapes", "spatial_shapes_list"),
)
# What has no counterpart, and why none is needed.
NEEDLESS = {
    "level_start_index": "leave it out, `spatial_shapes` says it",
    "im2col_step": "leave it out, a batch may have any size",
    "workspace": "leave it out, memory is taken as it is needed",
    "no_trans": "leave out `offset`",
    "output_dim": "leave it out, the channels of `input` say it",
    "group_size": "pass position_sensitive=True where it is the number of bins",
    "offset_scale": "fold it into `offset`, as deformconv.vision.DCNv3 does",
    "remove_center": "pass `mask` with 0 at the centre",
    "no_bias": "leave out `bias`, or pass bias=False to a layer",
}
# What a convolution has, for a call that has offset groups and no others: an aggregation.
OF_A_CONVOLUTION = {
    **dict.fromkeys(("weight", "bias"), "nothing is multiplied by a weight here: deform_conv does that"),
    **dict.fromkeys(("groups", "num_group", "group"), "here: offset_groups"),
}
OF_THE_WEIGHT = ("kernel_size", "in_channels", "out_channels")  # a layer's arguments that a function reads from its weight


def unexpected(function: Callable[..., Any], unknown: Mapping[str, Any], name: str | None = None) -> TypeError:
    """The error for keywords that a function does not have, which names those that it has in their place."""
    from difflib import get_close_matches
    from inspect import Parameter, signature

    known = [parameter.name for parameter in signature(function).parameters.values() if parameter.kind != Parameter.VAR_KEYWORD]
    word = next(iter(unknown))
    same = {ours for group in SYNONYMS if word in group for ours in group if ours in known}
    if same:
        rest = f"; here: {min(same)}."
    elif word in OF_A_CONVOLUTION and "offset_groups" in known and "groups" not in known:
        rest = f"; {OF_A_CONVOLUTION[word]}."
    elif word in NEEDLESS:
        rest = f"; {NEEDLESS[word]}."
    elif "weight" in known and any(word in group for group in SYNONYMS if group[0] in OF_THE_WEIGHT):
        rest = "; leave it out, the shape of `weight` says it."
    elif close := get_close_matches(word, known, 1):
        rest = f"; did you mean {close[0]!r}?"
    else:
        rest = "."
    return TypeError(f"{name or function.__name__}() got an unexpected keyword argument {word!r}{rest}")


def in_words(error: Exception, words: Mapping[str, str], sentences: Mapping[str, str] = {}) -> Exception:
    """The same error in a front end's words: its names of our arguments, and what it says for what we say."""
    text = str(error)
    for sentence, said in sentences.items():
        text = text.replace(sentence, said)
    for name, word in words.items():
        text = re.sub(rf"\b{name}(?=[`\[,]| ?= ?\d|\.\w)", word, text)
    return type(error)(text)
