"""What a layer is in every framework: its arguments, its predictor's channels, its offsets and masks."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deformconv.errors import ShapeError
from deformconv.ops.conv.layer import (
    MASK_SCALE,
    LayerPadding,
    activated,
    check_passed,
    check_predictor,
    checked_layer,
    describe,
    layer_padding,
    predicted,
)
from deformconv.ops.conv.spec import Operand, conv_spec

GIVEN: dict[str, Any] = {
    "rank": 2,
    "in_channels": 4,
    "out_channels": 8,
    "kernel_size": 3,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "offset_groups": 1,
    "predict_offsets": True,
    "mask_scale": 2.0,
    "max_offset": None,
    "boundary": "zeros",
}


def sigmoid(raw: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-raw))


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("offset_groups", [1, 3])
@pytest.mark.parametrize("kernel_size", [(5,), (3, 2), (2, 1, 3)])
def test_what_is_predicted_is_what_a_call_takes(kernel_size: tuple[int, ...], offset_groups: int, modulated: bool) -> None:
    D = len(kernel_size)
    offsets, masks = channels = predicted(kernel_size, offset_groups, modulated)
    assert channels.channels == offsets + masks == offset_groups * int(np.prod(kernel_size)) * (D + modulated)
    operands = [(1, 6, *kernel_size), (1, offsets, *[1] * D), (4, 6, *kernel_size), (4,), (1, masks, *[1] * D)]
    input, offset, weight, bias, mask = (Operand(shape, "float32") for shape in operands)
    spec = conv_spec(input, offset, weight, bias, mask if modulated else None)
    assert spec.offset_groups == offset_groups


def test_a_predictor_of_zeros_gives_offsets_0_and_masks_1() -> None:
    offset, mask = activated(np.zeros(18), np.zeros(9), MASK_SCALE, None, np.tanh, sigmoid)
    assert not offset.any()
    np.testing.assert_array_equal(mask, np.ones(9))


def test_offsets_are_bounded_and_masks_scaled() -> None:
    raw = np.linspace(-9, 9, 19)
    offset, mask = activated(raw, raw, 1.5, 3.0, np.tanh, sigmoid)
    np.testing.assert_array_equal(offset, 3 * np.tanh(raw / 3))
    np.testing.assert_array_equal(mask, 1.5 * sigmoid(raw))
    assert np.abs(offset).max() <= 3 and (offset[9], mask[9]) == (0, 0.75)


def test_without_a_bound_or_a_mask_nothing_is_computed() -> None:
    raw = np.ones(3)
    offset, mask = activated(raw, None, 2.0, None, pytest.fail, pytest.fail)
    assert offset is raw and mask is None


@pytest.mark.parametrize(
    ("padding", "shown", "pairs", "symmetric"),
    [
        (0, (0, 0), ((0, 0), (0, 0)), True),
        ((2, 1), (2, 1), ((2, 2), (1, 1)), True),
        (((2, 2), (1, 1)), (2, 1), ((2, 2), (1, 1)), True),
        (((0, 2), (1, 1)), ((0, 2), (1, 1)), ((0, 2), (1, 1)), False),
        ("valid", "valid", ((0, 0), (0, 0)), True),
        ("same", "same", ((1, 1), (1, 2)), False),  # 3x4 taps: the odd pixel goes after
    ],
)
def test_padding(padding: Any, shown: Any, pairs: Any, symmetric: bool) -> None:
    found = layer_padding(padding, (3, 4), (1, 1), (1, 1))
    assert found == LayerPadding(shown, pairs)
    assert found.symmetric == symmetric


def test_arguments_become_what_a_layer_keeps() -> None:
    given = {"kernel_size": (3, 2), "stride": [2, 1], "padding": ((0, 1), (2, 0)), "dilation": np.int64(2), "groups": 2}
    layer = checked_layer(**GIVEN | given | {"offset_groups": 4, "mask_scale": np.float32(1.5), "max_offset": 3})
    assert layer.weight_shape == (8, 2, 3, 2)
    assert (layer.kernel_size, layer.stride, layer.dilation, layer.groups) == ((3, 2), (2, 1), (2, 2), 2)
    assert layer.padding.pairs == ((0, 1), (2, 0))
    assert (layer.offset_groups, layer.mask_scale, layer.max_offset) == (4, 1.5, 3.0)
    assert type(layer.mask_scale) is type(layer.max_offset) is float
    assert checked_layer(**GIVEN | {"offset_groups": None, "predict_offsets": False}).offset_groups is None
    assert checked_layer(**GIVEN | {"rank": 3, "stride": 2}).stride == (2, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"in_channels": 0}, ShapeError, "`in_channels` is 0; expected at least 1."),
        ({"out_channels": 0}, ShapeError, "`out_channels` is 0; expected at least 1."),
        ({"kernel_size": 0}, ShapeError, "`kernel_size` is 0; expected at least 1 along every axis."),
        ({"stride": 0}, ShapeError, "`stride` is 0; expected at least 1 along every axis."),
        ({"dilation": 0}, ShapeError, "`dilation` is 0; expected at least 1 along every axis."),
        ({"groups": 3}, ShapeError, "`groups` is 3; expected a divisor of in_channels = 4."),
        ({"groups": 4, "out_channels": 6}, ShapeError, "`groups` is 4; expected a divisor of out_channels = 6."),
        ({"offset_groups": 3}, ShapeError, "`offset_groups` is 3; expected a divisor of in_channels = 4."),
        ({"offset_groups": None}, ValueError,
         "`offset_groups` is None; expected a number of groups, since this layer predicts their offsets."),
        ({"padding_mode": "reflect"}, ValueError, "`padding_mode` is 'reflect'; expected one of zeros."),
        ({"padding_mode": "wrap", "padding_modes": ("zeros", "reflect")}, ValueError,
         "`padding_mode` is 'wrap'; expected one of zeros, reflect."),
        ({"boundary": "clamp"}, ValueError, "`boundary` is 'clamp'; expected one of zeros, inside."),
        ({"mask_scale": 0}, ValueError, "`mask_scale` is 0; expected a number above 0."),
        ({"mask_scale": True}, ValueError, "`mask_scale` is True; expected a number above 0."),
        ({"max_offset": "3"}, ValueError, "`max_offset` is '3'; expected a number above 0."),
        ({"max_offset": float("inf")}, ValueError, "`max_offset` is inf; expected a number above 0."),
        ({"padding": "full"}, ShapeError,
         "`padding` is 'full'; expected 'same', 'valid', one integer, 2 integers or 2 pairs (before, after)."),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        checked_layer(**GIVEN | arguments)
    assert type(raised.value) is error and str(raised.value) == text


def test_what_is_passed_in_a_call() -> None:
    for offset, mask, modulated in ((None, None, True), ("o", None, True), ("o", "m", True), ("o", None, False)):
        check_passed(offset, mask, modulated)
    with pytest.raises(TypeError, match="`mask` was passed without `offset`; expected both, or neither to predict them"):
        check_passed(None, "m", True)
    with pytest.raises(ValueError, match=r"`mask` was passed to a layer without modulation \(v1\); expected `offset` alone"):
        check_passed("o", "m", False)


def test_a_layer_without_a_predictor_is_passed_offsets() -> None:
    assert check_predictor("predictor") == "predictor"
    with pytest.raises(TypeError, match=r"`offset` is missing and this layer predicts none \(predict_offsets=False\)"):
        check_predictor(None)


def test_a_repr_shows_what_is_not_the_default() -> None:
    layer = SimpleNamespace(
        in_channels=4, out_channels=8, kernel_size=(3,), stride=(2,), padding=(0,), dilation=(1,), groups=1,
        padding_mode="zeros", modulated=True, offset_groups=1, mask_scale=2.0, max_offset=None, boundary="zeros",
    )  # fmt: skip
    assert describe(layer, biased=True, predicts=True) == "4, 8, kernel_size=(3,), stride=(2,)"
    layer.dilation, layer.mask_scale, layer.boundary = (3,), 1.0, "inside"
    assert describe(layer, biased=False, predicts=False) == (
        "4, 8, kernel_size=(3,), stride=(2,), dilation=(3,), mask_scale=1.0, boundary='inside', bias=False, "
        "predict_offsets=False"
    )


def test_it_loads_no_framework() -> None:
    code = "import sys, deformconv.ops.conv.layer; print({'torch', 'mxnet', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
