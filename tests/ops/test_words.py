"""A call in another library's words is told ours."""

from __future__ import annotations

import pytest

import deformconv
from deformconv.errors import ShapeError
from deformconv.ops.words import SYNONYMS, in_words


def test_no_word_stands_for_two_arguments_of_one_function():
    """A layer of this library has these, a function those."""
    layer = {"in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "offset_groups"}
    function = {"bias", "stride", "padding", "dilation", "mask", "groups", "offset_groups"}
    for known in (layer | {"modulated"}, function):
        for word in {word for group in SYNONYMS for word in group} - known:
            assert len([ours for group in SYNONYMS if word in group for ours in group if ours in known]) <= 1, word


@pytest.mark.parametrize(
    ("word", "rest"),
    [
        ("deform_groups", "; here: offset_groups."),
        ("deformable_groups", "; here: offset_groups."),
        ("num_deformable_group", "; here: offset_groups."),
        ("offset_group", "; here: offset_groups."),
        ("num_group", "; here: groups."),
        ("dilate", "; here: dilation."),
        ("pads", "; here: padding."),
        ("num_filter", "; leave it out, the shape of `weight` says it."),
        ("kernel_size", "; leave it out, the shape of `weight` says it."),
        ("in_channels", "; leave it out, the shape of `weight` says it."),
        ("im2col_step", "; leave it out, a batch may have any size."),
        ("boundry", "; did you mean 'boundary'?"),
        ("colour", "."),
    ],
)
@pytest.mark.parametrize("function", [deformconv.deform_conv, deformconv.deform_conv_backward, deformconv.explain])
def test_functions(function, word, rest):
    with pytest.raises(TypeError) as raised:
        function(*[None] * (4 if function is deformconv.deform_conv_backward else 3), **{word: 1})
    assert str(raised.value) == f"{function.__name__}() got an unexpected keyword argument {word!r}{rest}"


def test_an_error_in_a_front_ends_words():
    error = ShapeError("`groups` is 3; expected a divisor of in_channels = 4, for stride 2, groups=3, a group.")
    words = {"groups": "feature_group_count", "in_channels": "in_features", "stride": "strides"}
    found = in_words(error, words, {"a group": "g"})
    assert type(found) is ShapeError
    assert str(found) == (
        "`feature_group_count` is 3; expected a divisor of in_features = 4, for stride 2, feature_group_count=3, g."
    )
