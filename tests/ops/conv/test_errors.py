"""Every error text of conv_spec: what it names, what it says was given, what was expected, and its hint."""

from __future__ import annotations

from typing import Any

import pytest
from tests.ops.texts import lines_run_in, missed

from deformconv.errors import BackendError, ShapeError
from deformconv.ops import window
from deformconv.ops.conv import spec
from deformconv.ops.conv.spec import Operand, check_grad_output, conv_spec
from deformconv.ops.taps import spec as taps

GOOD = {"input": (2, 4, 8, 9), "offset": (2, 18, 8, 9), "weight": (6, 4, 3, 3)}
NAMES = ("input", "offset", "weight", "bias", "mask")


def call(*, dtypes: dict[str, str] | None = None, devices: dict[str, str] | None = None, **arguments: Any) -> spec.ConvSpec:
    """A 2-D call with padding 1 that is right, but for what is given."""
    arguments = {"padding": 1, **GOOD, **arguments}
    operands = {
        name: Operand(arguments.pop(name), (dtypes or {}).get(name, "float32"), (devices or {}).get(name, "cpu"))
        for name in NAMES
        if name in arguments
    }
    return conv_spec(**operands, **arguments)


def grad_output(shape: tuple[int, ...], dtype: str = "float32") -> None:
    check_grad_output(call(), Operand(shape, dtype))


# What is wrong, the error, and the text (or the parts of it that say argument, given, expected and hint).
MISTAKES: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    # Offsets
    ({"offset": (2, 27, 8, 9)}, ShapeError, [
        "`offset` has 27 channels; a 3x3 kernel takes 2 axes x 9 taps = 18 per offset group.",
        "27 = 18 offsets + 9 masks: for v2 pass the last 9 as `mask`."]),
    ({"offset": (2, 27, 8, 9), "offset_groups": 1}, ShapeError, [
        "`offset` has 27 channels;", "so offset_groups=1 takes 18.", "27 = 18 offsets + 9 masks"]),
    ({"offset": (2, 54, 8, 9)}, ShapeError, [
        "`offset` has 54 channels;", "so these are 3 offset groups; expected a divisor of C_in = 4.",
        "54 = 36 offsets + 18 masks: for v2 pass the last 18 as `mask`."]),
    ({"offset": (2, 18, 8, 9), "offset_groups": 2}, ShapeError, [
        "`offset` has 18 channels;", "so offset_groups=2 takes 36.", "18 channels fit offset_groups=1."]),
    ({"offset": (2, 36, 8, 9), "offset_groups": 1}, ShapeError, [
        "`offset` has 36 channels;", "so offset_groups=1 takes 18.", "36 channels fit offset_groups=2."]),
    ({"offset": (2, 18, 8, 9), "offset_groups": 3}, ShapeError, [
        "`offset_groups` is 3; expected a divisor of C_in = 4."]),
    ({"offset": (2, 1, 8, 9)}, ShapeError, ["`offset` has 1 channel;", "= 18 per offset group."]),
    ({"offset": (2, 0, 8, 9)}, ShapeError, ["`offset` has 0 channels;", "= 18 per offset group."]),
    ({"offset": (2, 9, 8, 9), "mask": (2, 18, 8, 9)}, ShapeError, [
        "`offset` has 9 channels;", "= 18 per offset group.", "`mask` has 18 channels: the two are "
        "exchanged."]),
    ({"offset": (2, 18, 18, 18)}, ShapeError, ["`offset` has spatial size 18x18;"]),
    ({"offset": (2, 36, 9, 18), "offset_groups": 1}, ShapeError, ["36 channels fit offset_groups=2."]),
    ({"offset": (2, 8, 9, 18)}, ShapeError, [
        "`offset` has 8 channels;", "`offset` looks channels-last", "`numpy.moveaxis(offset, -1, 1)`"]),
    ({"input": (2, 8, 9, 8), "offset": (2, 8, 9, 18), "weight": (6, 8, 3, 3)}, ShapeError, [
        "`offset` has 8 channels;", "`offset` and `input` look channels-last: move their last axis to place 1,"]),
    ({"offset": (18, 8, 9)}, ShapeError, [
        "`offset` has 3 axes, shape (18, 8, 9); a 2-D call takes 4: (N, offset_groups*K*D, height, width).",
        "For one image without a batch axis pass `offset[None]`."]),
    ({"offset": (18,)}, ShapeError, ["`offset` has 1 axis, shape (18,);"]),
    ({"offset": (1, 18, 8, 9)}, ShapeError, [
        "`offset` has a batch of 1; expected the batch of `input`, 2.", "It is not broadcast"]),
    ({"offset": (3, 18, 8, 9)}, ShapeError, ["`offset` has a batch of 3; expected the batch of `input`, 2."]),
    ({"stride": 2}, ShapeError, [
        "`offset` has spatial size 8x9; expected the output's, 4x5: along height "
        "(size + padding before + after - dilation*(kernel - 1) - 1)//stride + 1 = "
        "(8 + 1 + 1 - 1*(3 - 1) - 1)//2 + 1 = 4.",
        "8x9 is the input's size, which stride 2x2 and padding ((1, 1), (1, 1)) do not keep"]),
    ({"padding": 0}, ShapeError, [
        "`offset` has spatial size 8x9; expected the output's, 6x7",
        "8x9 is the input's size, which stride 1x1 and padding ((0, 0), (0, 0)) do not keep"]),
    ({"padding": 3}, ShapeError, ["`offset` has spatial size 8x9; expected the output's, 12x13"]),
    ({"offset": (2, 18, 8, 8)}, ShapeError, [
        "`offset` has spatial size 8x8; expected the output's, 8x9: along width",
        "(9 + 1 + 1 - 1*(3 - 1) - 1)//1 + 1 = 9."]),
    # Masks
    ({"mask": (2, 18, 8, 9)}, ShapeError, [
        "`mask` has 18 channels; expected 9 taps x 1 offset group = 9, since `offset` has 18 channels.",
        "A mask is one number per tap, not one per axis."]),
    ({"mask": (2, 27, 8, 9)}, ShapeError, [
        "`mask` has 27 channels;", "27 = 18 offsets + 9 masks: pass the last 9 alone."]),
    ({"mask": (2, 9, 8, 9), "offset": (2, 36, 8, 9)}, ShapeError, [
        "`mask` has 9 channels; expected 9 taps x 2 offset groups = 18, since `offset` has 36 channels.",
        "9 masks are 1 offset group: `mask` and `offset` disagree."]),
    ({"mask": (2, 36, 8, 9)}, ShapeError, [
        "`mask` has 36 channels; expected 9 taps x 1 offset group = 9",
        "36 masks are 4 offset groups: `mask` and `offset` disagree."]),
    ({"mask": (2, 8, 9, 9)}, ShapeError, ["`mask` has 8 channels;", "`mask` looks channels-last"]),
    ({"mask": (2, 1, 8, 8)}, ShapeError, ["`mask` has 1 channel; expected 9 taps x 1 offset group = 9"]),
    ({"mask": (9, 8, 9)}, ShapeError, [
        "`mask` has 3 axes, shape (9, 8, 9); a 2-D call takes 4: (N, offset_groups*K, height, width).",
        "pass `mask[None]`"]),
    ({"mask": (1, 9, 8, 9)}, ShapeError, ["`mask` has a batch of 1; expected the batch of `input`, 2."]),
    ({"mask": (2, 9, 4, 5)}, ShapeError, ["`mask` has spatial size 4x5; expected the output's, 8x9"]),
    # Input and weight
    ({"input": (4, 8, 9)}, ShapeError, [
        "`input` has 3 axes, shape (4, 8, 9); a weight with 4 axes takes 4: (N, C_in, height, width).",
        "For one image without a batch axis pass `input[None]`."]),
    ({"input": (2, 4, 8), "rank": 2}, ShapeError, [
        "`input` has 3 axes, shape (2, 4, 8); deform_conv2d takes 4: (N, C_in, height, width).",
        "pass `input[None]`", "3 axes are 1-D data, for deform_conv1d."]),
    ({"rank": 1}, ShapeError, [
        "`input` has 4 axes, shape (2, 4, 8, 9); deform_conv1d takes 3: (N, C_in, width).",
        "4 axes are 2-D data, for deform_conv2d."]),
    ({"rank": 3}, ShapeError, [
        "`input` has 4 axes,", "deform_conv3d takes 5: (N, C_in, depth, height, width).", "for "
        "deform_conv2d."]),
    ({"input": (8,)}, ShapeError, ["`input` has 1 axis, shape (8,); a weight with 4 axes takes 4"]),
    ({"input": ()}, ShapeError, ["`input` has 0 axes, shape (); a weight with 4 axes takes 4"]),
    ({"input": (2, 0, 8, 9)}, ShapeError, ["`input` has shape (2, 0, 8, 9), no channels; expected at "
        "least 1"]),
    ({"input": (2, 4, 0, 9), "padding": 2}, ShapeError, [
        "`input` has shape (2, 4, 0, 9), no pixels along height; expected at least 1. Only a batch may be "
        "empty."]),
    ({"input": (2, 8, 9, 6), "weight": (6, 6, 3, 3)}, ShapeError, [
        "`weight` has shape (6, 6, 3, 3), so C_in/groups = 6 (axis 1); expected a divisor of C_in = 8, the "
        "channels of `input` (2, 8, 9, 6).", "`input` looks channels-last", "`numpy.moveaxis(input, "
        "-1, 1)`"]),
    ({"input": (2, 8, 9, 4), "weight": (5, 4, 3, 3)}, ShapeError, [
        "`weight` has shape (5, 4, 3, 3), so C_out = 5 (axis 0); expected a multiple of "
        "groups = C_in / (C_in/groups) = 8/4 = 2.", "`input` looks channels-last"]),
    ({"input": (2, 8, 9, 4)}, ShapeError, [
        "`offset` has spatial size 8x9; expected the output's, 9x4", "`input` looks channels-last"]),
    ({"weight": (6, 4)}, ShapeError, [
        "`weight` has 2 axes, shape (6, 4); expected 3, 4 or 5: (C_out, C_in/groups) and 1, 2 or 3 spatial "
        "axes."]),
    ({"weight": (6, 4, 3), "rank": 2}, ShapeError, [
        "`weight` has 3 axes, shape (6, 4, 3); deform_conv2d takes 4: (C_out, C_in/groups, height, width)."]),
    ({"weight": (6, 3, 3, 4)}, ShapeError, [
        "so C_in/groups = 3 (axis 1); expected a divisor of C_in = 4", "`weight` looks channels-last"]),
    ({"weight": (4, 6, 3, 3)}, ShapeError, [
        "so C_in/groups = 6 (axis 1); expected a divisor of C_in = 4",
        "If its axes are (C_in, C_out, *kernel), a transposed convolution's order",
        "`weight.swapaxes(0, 1)`"]),
    ({"weight": (6, 4, 3, 3), "groups": 2}, ShapeError, [
        "`weight` has shape (6, 4, 3, 3), so C_in/groups = 4 (axis 1); expected C_in/groups = 4/2 = 2, for "
        "`input` "
        "(2, 4, 8, 9) and groups=2.", "This weight fits groups=1."]),
    ({"weight": (6, 4, 3, 3), "groups": 3}, ShapeError, ["expected C_in/groups = 4/3 = 1.33333"]),
    ({"weight": (5, 2, 3, 3)}, ShapeError, [
        "`weight` has shape (5, 2, 3, 3), so C_out = 5 (axis 0); expected a multiple of groups", "4/2 = 2."]),
    ({"weight": (5, 2, 3, 3), "groups": 2}, ShapeError, [
        "so C_out = 5 (axis 0); expected a multiple of groups=2."]),
    ({"weight": (0, 4, 3, 3)}, ShapeError, [
        "`weight` has shape (0, 4, 3, 3); expected (C_out, C_in/groups, *kernel), each at least 1."]),
    ({"weight": (6, 0, 3, 3)}, ShapeError, ["`weight` has shape (6, 0, 3, 3); expected (C_out, "
        "C_in/groups,"]),
    ({"weight": (6, 4, 0, 3)}, ShapeError, [
        "`weight` has shape (6, 4, 0, 3), a kernel of size 0x3; expected at least one tap along every "
        "axis."]),
    ({"weight": (6, 4, 3, 3), "dilation": (1, 9)}, ShapeError, [
        "`weight` has a kernel of size 3x3; along width it spans 9*(3 - 1) + 1 = 19 pixels (dilation, "
        "kernel size); "
        "expected at most the padded input's 9 + 1 + 1 = 11, for `input` (2, 4, 8, 9)."]),
    ({"bias": (4,)}, ShapeError, [
        "`bias` has shape (4,); expected (6,): one number per output channel, axis 0 of `weight` (6, 4, 3, "
        "3)."]),
    ({"bias": (1, 6, 1, 1)}, ShapeError, ["`bias` has shape (1, 6, 1, 1); expected (6,)"]),
    # Parameters
    ({"stride": 0}, ShapeError, ["`stride` is 0; expected at least 1 along every axis."]),
    ({"stride": (1, -2)}, ShapeError, ["`stride` is (1, -2); expected at least 1 along every axis."]),
    ({"dilation": 0}, ShapeError, ["`dilation` is 0; expected at least 1 along every axis."]),
    ({"stride": (1, 1, 1)}, ShapeError, [
        "`stride` has 3 entries, (1, 1, 1); a 2-D call takes one integer for all axes, or 2: (height, "
        "width)."]),
    ({"dilation": (2,)}, ShapeError, ["`dilation` has 1 entry, (2,); a 2-D call takes one integer"]),
    ({"stride": ()}, ShapeError, ["`stride` has 0 entries, ();"]),
    ({"stride": 1.0}, TypeError, ["`stride` is 1.0, which holds 1.0 of type float; expected integers."]),
    ({"stride": (1, 2.5)}, TypeError, ["`stride` is (1, 2.5), which holds 2.5 of type float; expected "
        "integers."]),
    ({"stride": True}, TypeError, ["`stride` is True, which holds True of type bool; expected integers."]),
    ({"dilation": None}, TypeError, ["`dilation` is None, which holds None of type NoneType; expected "
        "integers."]),
    ({"dilation": "11"}, TypeError, ["`dilation` is '11', which holds '1' of type str; expected integers."]),
    ({"groups": 0}, ShapeError, ["`groups` is 0; expected at least 1."]),
    ({"groups": 1.0}, TypeError, ["`groups` is 1.0, which holds 1.0 of type float; expected integers."]),
    ({"offset_groups": -1}, ShapeError, ["`offset_groups` is -1; expected at least 1."]),
    ({"padding": -1}, ShapeError, ["`padding` is -1; expected at least 0 along every axis."]),
    ({"padding": (1, -1)}, ShapeError, ["`padding` is (1, -1); expected at least 0 along every axis."]),
    ({"padding": ((1, 1), (0, -1))}, ShapeError, ["`padding` is ((1, 1), (0, -1)); expected at least 0 on "
        "every"]),
    ({"padding": 1.5}, TypeError, ["`padding` is 1.5, which holds 1.5 of type float; expected integers."]),
    ({"padding": ((1, 1), (1, 1.0))}, TypeError, ["which holds 1.0 of type float; expected integers."]),
    ({"padding": (1, 1, 1, 1)}, ShapeError, [
        "`padding` has 4 entries, (1, 1, 1, 1); a 2-D call takes one integer, 2 integers or 2 pairs "
        "(before, after).",
        "For different amounts before and after write pairs: ((before, after), (before, after))."]),
    ({"padding": (1, 1, 1)}, ShapeError, ["`padding` has 3 entries, (1, 1, 1);"]),
    ({"padding": ((1, 1),)}, ShapeError, [
        "`padding` is ((1, 1),); a 2-D call takes 2 pairs, one per axis: ((before, after), (before, "
        "after))."]),
    ({"padding": ((1, 1), 1)}, ShapeError, ["`padding` is ((1, 1), 1); a 2-D call takes 2 pairs"]),
    ({"padding": ((1, 1), (1, 1, 1))}, ShapeError, ["a 2-D call takes 2 pairs, one per axis"]),
    ({"padding": "full"}, ShapeError, [
        "`padding` is 'full'; expected 'same', 'valid', one integer, 2 integers or 2 pairs (before, "
        "after)."]),
    ({"padding": "same", "stride": 2}, ShapeError, [
        "`padding` is 'same' with stride 2x2; expected stride 1x1, since 'same' keeps the input's size."]),
    ({"stride": 2**70}, ShapeError, [
        "`stride` is 1180591620717411303424; expected less than 2**40 = 1099511627776 along every axis."]),
    ({"stride": (1, 2**40)}, ShapeError, ["`stride` is (1, 1099511627776); expected less than 2**40"]),
    ({"dilation": 2**63}, ShapeError, ["`dilation` is 9223372036854775808; expected less than 2**40"]),
    ({"padding": 2**40}, ShapeError, ["`padding` is 1099511627776; expected less than 2**40"]),
    ({"padding": (0, 2**70)}, ShapeError, ["`padding` is (0, 1180591620717411303424); expected less than 2**40"]),
    ({"padding": ((0, 1), (1, 2**40))}, ShapeError, [
        "`padding` is ((0, 1), (1, 1099511627776)); expected less than 2**40 = 1099511627776 on every side."]),
    ({"boundary": "reflect"}, ValueError, ["`boundary` is 'reflect'; expected 'zeros' or 'inside'."]),
    ({"boundary": ["zeros"]}, ValueError, ["`boundary` is ['zeros']; expected 'zeros' or 'inside'."]),
    # Dtypes and devices
    ({"dtypes": {"input": "int64"}}, TypeError, [
        "`input` is int64; expected floating point: one of float16, bfloat16, float32, float64."]),
    ({"dtypes": {"offset": "uint8"}}, TypeError, ["`offset` is uint8; expected floating point"]),
    ({"dtypes": {"weight": "complex64"}}, TypeError, ["`weight` is complex64; expected floating point"]),
    ({"dtypes": {"weight": "float64"}}, TypeError, [
        "`weight` is float64 and `input` is float32; expected one dtype for all arrays: cast `weight` to "
        "float32, "
        "or the others to float64.", "NumPy makes float64 unless told otherwise."]),
    ({"dtypes": {"offset": "float16"}}, TypeError, ["`offset` is float16 and `input` is float32; expected "
        "one"]),
    ({"bias": (6,), "dtypes": {"bias": "float16"}}, TypeError, ["`bias` is float16 and `input` is float32"]),
    ({"mask": (2, 9, 8, 9), "devices": {"mask": "cuda:1"}}, ValueError, [
        "`mask` is on cuda:1 and `input` is on cpu; expected one device for all arrays."]),
]  # fmt: skip

# The same for 1-D, where the texts have their own forms.
ONE_AXIS = {"input": (2, 4, 8), "offset": (2, 3, 8), "weight": (6, 4, 3)}
MISTAKES += [
    ({**ONE_AXIS, "offset": (2, 6, 8), "mask": (2, 3, 8), "offset_groups": 1}, ShapeError, [
        "`offset` has 6 channels; a 3 kernel takes 1 axis x 3 taps = 3 per offset group, so offset_groups=1 "
        "takes 3.",
        "6 = 3 offsets + 3 masks"]),
    ({**ONE_AXIS, "padding": (1, 2)}, ShapeError, [
        "`padding` has 2 entries, (1, 2); a 1-D call takes one integer, 1 integer or 1 pair (before, after).",
        "write pairs: ((before, after),)."]),
    ({**ONE_AXIS, "padding": ((1, 2), (1, 2))}, ShapeError, ["a 1-D call takes 1 pair, one per axis: "
        "((before, after),)."]),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "error", "parts"), MISTAKES, ids=[str(m) for m, _, _ in MISTAKES])
def test_text(mistake: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        call(**mistake)
    text = str(raised.value)
    for part in parts:
        assert part in text
    assert raised.type is error
    assert raised.value.__context__ is None or raised.value.__suppress_context__


def test_text_of_grad_output() -> None:
    with pytest.raises(ShapeError) as raised:
        grad_output((2, 6, 6, 7))
    assert str(raised.value) == (
        "`grad_output` has shape (2, 6, 6, 7); expected the output's, (2, 6, 8, 9): (N, C_out, height, width)."
    )
    with pytest.raises(TypeError) as type_raised:
        grad_output((2, 6, 8, 9), "float64")
    assert str(type_raised.value) == "`grad_output` is float64; expected the dtype of `input`, float32."


def layer_input(shape: tuple[int, ...]) -> None:
    window: dict[str, Any] = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    weight = Operand((8, 4, 3, 3), "float32")
    spec.check_input(Operand(shape, "float32"), weight, **window, groups=1, rank=2, in_channels=4)


def test_texts_of_a_layer_s_input() -> None:
    layer_input((2, 4, 8, 9))
    with pytest.raises(ShapeError) as raised:
        layer_input((2, 5, 8, 9))
    assert str(raised.value) == "`input` has 5 channels, shape (2, 5, 8, 9); this layer has in_channels=4."
    with pytest.raises(ShapeError) as raised:
        layer_input((2, 8, 9, 4))
    assert str(raised.value) == (
        "`input` has 8 channels, shape (2, 8, 9, 4); this layer has in_channels=4. `input` looks channels-last: move its last "
        "axis to place 1, `numpy.moveaxis(input, -1, 1)`."
    )


def test_kinds_of_errors() -> None:
    assert issubclass(ShapeError, ValueError)
    assert issubclass(BackendError, RuntimeError)


def test_every_text_has_a_test() -> None:
    """Each `raise`, and each sentence added to a text, in these files is reached by a mistake above."""
    modules = (spec, taps, window)
    with lines_run_in(modules) as lines:
        for mistake, error, _ in MISTAKES:
            with pytest.raises(error):
                call(**mistake)
        test_text_of_grad_output()
        test_texts_of_a_layer_s_input()
    assert not missed(modules, lines)
