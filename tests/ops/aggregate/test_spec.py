"""What aggregate_spec derives from a call that is right, and every error text of one that is wrong."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from tests.ops.aggregate.cases import CASES, Case, make
from tests.ops.texts import lines_run_in, missed

from deformconv.errors import ShapeError
from deformconv.ops import window
from deformconv.ops.aggregate import spec as checks
from deformconv.ops.aggregate.operator import DEFORM_AGGREGATE
from deformconv.ops.aggregate.spec import AggregateSpec, aggregate_spec, check_grad_output
from deformconv.ops.operator import Operand
from deformconv.ops.taps import spec as taps

GOOD = {"input": (2, 4, 8, 9), "offset": (2, 18, 8, 9)}
NAMES = ("input", "offset", "mask")


def call(*, dtypes: dict[str, str] | None = None, devices: dict[str, str] | None = None, **arguments: Any) -> AggregateSpec:
    """A 2-D call with padding 1 that is right, but for what is given."""
    arguments = {"padding": 1, **GOOD, **arguments}
    operands = {
        name: Operand(arguments.pop(name), (dtypes or {}).get(name, "float32"), (devices or {}).get(name, "cpu"))
        for name in NAMES
        if name in arguments
    }
    return aggregate_spec(**operands, **arguments)


# What is wrong, the error, and the parts of its text that say argument, given, expected and hint.
MISTAKES: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    # The kernel's size
    ({"kernel_size": 5, "padding": 2}, ShapeError, [
        "`offset` has 18 channels; a 5x5 kernel takes 2 axes x 25 taps = 50 per offset group.",
        "18 channels fit kernel_size=3."]),
    ({"offset": (2, 100, 8, 9), "offset_groups": 2}, ShapeError, [
        "`offset` has 100 channels; a 3x3 kernel takes", "so offset_groups=2 takes 36.", "100 channels fit kernel_size=5."]),
    ({"offset": (2, 20, 8, 9)}, ShapeError, ["`offset` has 20 channels; a 3x3 kernel takes 2 axes x 9 taps = 18 per "]),
    ({"kernel_size": 0}, ShapeError, ["`kernel_size` is 0; expected at least 1 along every axis."]),
    ({"kernel_size": (3, 3, 3)}, ShapeError, [
        "`kernel_size` has 3 entries, (3, 3, 3); a 2-D call takes one integer for all axes, or 2: (height, width)."]),
    ({"kernel_size": 3.0}, TypeError, ["`kernel_size` is 3.0, which holds 3.0 of type float; expected integers."]),
    ({"kernel_size": True}, TypeError, ["`kernel_size` is True, which holds True of type bool; expected integers."]),
    ({"kernel_size": None}, TypeError, ["`kernel_size` is None, which holds None of type NoneType; expected integers."]),
    ({"kernel_size": 2**40}, ShapeError, ["`kernel_size` is 1099511627776; expected less than 2**40"]),
    ({"dilation": (1, 9)}, ShapeError, [
        "`kernel_size` is 3x3; along width it spans 9*(3 - 1) + 1 = 19 pixels (dilation, kernel size); expected at most the "
        "padded input's 9 + 1 + 1 = 11, for `input` (2, 4, 8, 9)."]),
    # Offsets
    ({"offset": (2, 27, 8, 9)}, ShapeError, [
        "`offset` has 27 channels; a 3x3 kernel takes 2 axes x 9 taps = 18 per offset group.",
        "27 = 18 offsets + 9 masks: for v2 pass the last 9 as `mask`."]),
    ({"offset": (2, 54, 8, 9)}, ShapeError, [
        "so these are 3 offset groups; expected a divisor of C = 4.", "54 = 36 offsets + 18 masks"]),
    ({"offset": (2, 36, 8, 9), "offset_groups": 1}, ShapeError, [
        "so offset_groups=1 takes 18.", "36 channels fit offset_groups=2."]),
    ({"offset_groups": 3}, ShapeError, ["`offset_groups` is 3; expected a divisor of C = 4."]),
    ({"offset": (2, 9, 8, 9), "mask": (2, 18, 8, 9)}, ShapeError, ["`mask` has 18 channels: the two are exchanged."]),
    ({"offset": (2, 8, 9, 18)}, ShapeError, ["`offset` looks channels-last", "`numpy.moveaxis(offset, -1, 1)`"]),
    ({"input": (2, 8, 9, 4), "offset": (2, 8, 9, 18)}, ShapeError, [
        "`offset` has 8 channels;", "`offset` and `input` look channels-last: move their last axis to place 1,"]),
    ({"offset": (18, 8, 9)}, ShapeError, [
        "`offset` has 3 axes, shape (18, 8, 9); a 2-D call takes 4: (N, offset_groups*K*D, height, width).",
        "For one image without a batch axis pass `offset[None]`."]),
    ({"offset": (1, 18, 8, 9)}, ShapeError, [
        "`offset` has a batch of 1; expected the batch of `input`, 2.", "It is not broadcast"]),
    ({"stride": 2}, ShapeError, [
        "`offset` has spatial size 8x9; expected the output's, 4x5: along height",
        "(8 + 1 + 1 - 1*(3 - 1) - 1)//2 + 1 = 4.", "which stride 2x2 and padding ((1, 1), (1, 1)) do not keep"]),
    ({"input": (2, 8, 9, 4)}, ShapeError, [
        "`offset` has spatial size 8x9; expected the output's, 9x4", "`input` looks channels-last"]),
    # Masks
    ({"mask": (2, 18, 8, 9)}, ShapeError, [
        "`mask` has 18 channels; expected 9 taps x 1 offset group = 9, since `offset` has 18 channels.",
        "A mask is one number per tap, not one per axis."]),
    ({"mask": (2, 27, 8, 9)}, ShapeError, ["27 = 18 offsets + 9 masks: pass the last 9 alone."]),
    ({"mask": (2, 36, 8, 9)}, ShapeError, ["36 masks are 4 offset groups: `mask` and `offset` disagree."]),
    ({"mask": (2, 8, 9, 9)}, ShapeError, ["`mask` has 8 channels;", "`mask` looks channels-last"]),
    ({"mask": (9, 8, 9)}, ShapeError, ["`mask` has 3 axes", "(N, offset_groups*K, height, width)."]),
    ({"mask": (2, 9, 4, 5)}, ShapeError, ["`mask` has spatial size 4x5; expected the output's, 8x9"]),
    ({"mask": (4, 4, 3, 3)}, ShapeError, [
        "`mask` has shape (4, 4, 3, 3), which looks like a weight's; expected a factor for every sample, (2, 9, 8, 9).",
        "Nothing is multiplied by a weight here: deform_conv does that."]),
    # Inputs
    ({"input": (8, 9)}, ShapeError, [
        "`input` has 2 axes, shape (8, 9); expected 3, 4 or 5: (N, C) and 1, 2 or 3 spatial axes."]),
    ({"input": (1,) * 6}, ShapeError, ["`input` has 6 axes, shape (1, 1, 1, 1, 1, 1); expected 3, 4 or 5"]),
    ({"input": (4, 8, 9), "rank": 2}, ShapeError, [
        "`input` has 3 axes, shape (4, 8, 9); deform_aggregate2d takes 4: (N, C, height, width).",
        "For one image without a batch axis pass `input[None]`.", "3 axes are 1-D data, for deform_aggregate1d."]),
    ({"input": (2, 0, 8, 9)}, ShapeError, ["`input` has shape (2, 0, 8, 9), no channels; expected at least 1 (axis 1)."]),
    ({"input": (2, 4, 0, 9), "padding": 2}, ShapeError, [
        "`input` has shape (2, 4, 0, 9), no pixels along height; expected at least 1. Only a batch may be empty."]),
    # Other parameters
    ({"stride": 0}, ShapeError, ["`stride` is 0; expected at least 1 along every axis."]),
    ({"dilation": (2,)}, ShapeError, ["`dilation` has 1 entry, (2,); a 2-D call takes one integer"]),
    ({"offset_groups": 0}, ShapeError, ["`offset_groups` is 0; expected at least 1."]),
    ({"offset_groups": 1.0}, TypeError, ["`offset_groups` is 1.0, which holds 1.0 of type float; expected integers."]),
    ({"padding": -1}, ShapeError, ["`padding` is -1; expected at least 0 along every axis."]),
    ({"padding": (1, 1, 1, 1)}, ShapeError, ["`padding` has 4 entries, (1, 1, 1, 1);", "write pairs: "]),
    ({"padding": ((1, 1), 1)}, ShapeError, ["`padding` is ((1, 1), 1); a 2-D call takes 2 pairs"]),
    ({"padding": ((1, 1), (0, -1))}, ShapeError, ["`padding` is ((1, 1), (0, -1)); expected at least 0 on every side."]),
    ({"padding": ((0, 1), (1, 2**40))}, ShapeError, ["expected less than 2**40 = 1099511627776 on every side."]),
    ({"padding": "full"}, ShapeError, ["`padding` is 'full'; expected 'same', 'valid', one integer"]),
    ({"padding": "same", "stride": 2}, ShapeError, ["`padding` is 'same' with stride 2x2; expected stride 1x1"]),
    ({"boundary": "reflect"}, ValueError, ["`boundary` is 'reflect'; expected 'zeros' or 'inside'."]),
    # Dtypes and devices
    ({"dtypes": {"input": "int64"}}, TypeError, ["`input` is int64; expected floating point"]),
    ({"dtypes": {"offset": "float64"}}, TypeError, [
        "`offset` is float64 and `input` is float32; expected one dtype for all arrays"]),
    ({"mask": (2, 9, 8, 9), "devices": {"mask": "cuda:1"}}, ValueError, ["`mask` is on cuda:1 and `input` is on cpu"]),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "error", "parts"), MISTAKES, ids=[str(m) for m, _, _ in MISTAKES])
def test_text(mistake: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        call(**mistake)
    for part in parts:
        assert part in str(raised.value)
    assert raised.type is error
    assert raised.value.__context__ is None or raised.value.__suppress_context__


def test_text_of_grad_output() -> None:
    with pytest.raises(ShapeError) as raised:
        check_grad_output(call(), Operand((2, 4, 6, 7), "float32"))
    assert str(raised.value) == (
        "`grad_output` has shape (2, 4, 6, 7); expected the output's, (2, 4, 8, 9): (N, C, height, width)."
    )
    with pytest.raises(TypeError, match="`grad_output` is float64; expected the dtype of `input`, float32"):
        check_grad_output(call(), Operand((2, 4, 8, 9), "float64"))


def test_every_text_has_a_test() -> None:
    modules = (checks, taps, window)
    with lines_run_in(modules) as lines:
        for mistake, error, _ in MISTAKES:
            with pytest.raises(error):
                call(**mistake)
    assert not missed(modules, lines)


def test_what_a_spec_holds() -> None:
    arrays = (Operand(shape, "float32") for shape in ((2, 4, 8, 9), (2, 24, 3, 7), (2, 12, 3, 7)))
    spec = aggregate_spec(*arrays, kernel_size=(3, 2), stride=(3, 2), padding=((1, 0), (2, 4)), boundary="inside")
    assert spec == AggregateSpec(
        rank=2,
        batch=2,
        channels=4,
        offset_groups=2,
        input_size=(8, 9),
        kernel_size=(3, 2),
        stride=(3, 2),
        dilation=(1, 1),
        output_size=(3, 7),
        padding=((1, 0), (2, 4)),
        masked=True,
        boundary="inside",
        dtype="float32",
    )
    assert (spec.taps, spec.positions, spec.pixels, spec.group_channels) == (6, 21, 72, 2)
    assert spec.shapes == {"input": (2, 4, 8, 9), "offset": (2, 24, 3, 7), "mask": (2, 12, 3, 7)}
    assert spec.output_shape == (2, 4, 3, 7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shapes_are_those_of_the_arrays(case: Case) -> None:
    call = make(case)
    found = {name: array.shape for name, array in zip(NAMES, call.arrays, strict=True) if array is not None}
    assert call.spec.shapes == found
    assert call.spec.output_shape == call.grad_output.shape
    assert call.spec.offset_groups == case.offset_groups
    assert call.spec.with_given(["mask"]).masked and call.spec.with_given([]) == call.spec


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parameters_come_back_from_the_registry_s_form(case: Case) -> None:
    call = make(case)
    spec, operands = call.spec, {name: None for name in NAMES}
    shapes = [None if array is None else array.shape for array in call.arrays]
    operands |= {name: Operand(shape, "float64") for name, shape in zip(NAMES, shapes, strict=True) if shape is not None}
    packed = DEFORM_AGGREGATE.pack(spec)
    assert DEFORM_AGGREGATE.check(operands, DEFORM_AGGREGATE.unpack(*packed), None, True) == spec
    assert DEFORM_AGGREGATE.plain(DEFORM_AGGREGATE.unpack(*packed), shapes) == packed


@pytest.mark.parametrize(
    ("parameters", "same"),
    [
        ({"kernel_size": (3, 3)}, {}),
        ({"kernel_size": [3, 3]}, {}),
        ({"kernel_size": np.int64(3)}, {"kernel_size": 3}),
        ({"kernel_size": np.array([3, 3])}, {}),
        ({"padding": "same"}, {"padding": 1}),
        ({"padding": ((1, 1), (1, 1))}, {"padding": 1}),
        ({"stride": [1, 1]}, {"stride": 1}),
        ({"offset_groups": 1}, {"offset_groups": None}),
        ({"rank": 2}, {"rank": None}),
    ],
)
def test_forms_of_a_parameter(parameters: dict[str, Any], same: dict[str, Any]) -> None:
    spec = call(**parameters)
    assert spec == call(**same)
    assert all(type(number) is int for number in (*spec.kernel_size, *spec.stride, *spec.padding[0], spec.offset_groups))


@pytest.mark.parametrize(
    ("rank", "axes", "expected"), [(None, 3, True), (2, 4, True), (2, 3, False), (2, 5, None), (1, 2, False), (3, 5, True)]
)
def test_whether_there_is_a_batch(rank: int | None, axes: int, expected: bool | None) -> None:
    assert DEFORM_AGGREGATE.has_batch(rank, (axes, axes, None)) is expected


@pytest.mark.parametrize("wrong", [3.0, True, (3.0, 3)])
def test_a_call_seen_before_is_still_checked(wrong: Any) -> None:
    """3 == 3.0, and a spec is remembered."""
    call(kernel_size=3)
    with pytest.raises(TypeError, match="kernel_size"):
        call(kernel_size=wrong)


def test_sizes_without_a_hash() -> None:
    """Symbolic sizes compare and calculate, and cannot be the key of a dictionary."""

    class Symbol(int):
        __hash__ = None  # type: ignore[assignment]

    assert call(input=(Symbol(2), 4, 8, 9)).batch == 2
    with pytest.raises(TypeError, match="float32"):
        call(input=(Symbol(2), 4, 8, 9), dtypes={"offset": "float64"})


def test_a_spec_keeps_its_hash_for_itself() -> None:
    spec = call()
    again = pickle.loads(pickle.dumps(spec))
    hash(spec)
    assert again == spec and hash(again) == hash(spec)
    assert "_hash" not in pickle.loads(pickle.dumps(spec)).__dict__  # texts have another hash in another process
    assert hash(dataclasses.replace(spec, batch=7)) != hash(spec)
