"""A call in another library's words is told ours."""

from __future__ import annotations

import pytest

import deformconv
from deformconv.ops.words import SYNONYMS


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
