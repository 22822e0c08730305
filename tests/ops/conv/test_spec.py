"""What conv_spec derives from a call that is right. What it says of one that is wrong: test_errors.py."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.ops.conv.cases import CASES, Case, make, output_size

from deformconv.ops.conv.spec import ConvSpec, Operand, check_grad_output, conv_spec


def spec_of(
    input: tuple[int, ...] = (2, 4, 8, 9),
    offset: tuple[int, ...] = (2, 18, 6, 7),
    weight: tuple[int, ...] = (6, 4, 3, 3),
    mask: tuple[int, ...] | None = None,
    dtype: str = "float32",
    **parameters: Any,
) -> ConvSpec:
    operands = [None if shape is None else Operand(shape, dtype) for shape in (input, offset, weight, None, mask)]
    return conv_spec(*operands, **parameters)


def test_what_a_spec_holds() -> None:
    spec = conv_spec(
        Operand((2, 4, 8, 9), "float32"),
        Operand((2, 36, 3, 7), "float32"),
        Operand((6, 2, 3, 3), "float32"),
        Operand((6,), "float32"),
        Operand((2, 18, 3, 7), "float32"),
        stride=(3, 2),
        padding=((1, 0), (2, 4)),
        boundary="inside",
    )
    assert spec == ConvSpec(
        rank=2,
        batch=2,
        in_channels=4,
        out_channels=6,
        groups=2,
        offset_groups=2,
        input_size=(8, 9),
        kernel_size=(3, 3),
        stride=(3, 2),
        dilation=(1, 1),
        output_size=(3, 7),
        padding=((1, 0), (2, 4)),
        masked=True,
        biased=True,
        boundary="inside",
        dtype="float32",
    )
    assert (spec.taps, spec.positions, spec.pixels) == (9, 21, 72)
    assert spec.input_shape == (2, 4, 8, 9)
    assert spec.offset_shape == (2, 36, 3, 7)
    assert spec.weight_shape == (6, 2, 3, 3)
    assert spec.mask_shape == (2, 18, 3, 7)
    assert spec.output_shape == (2, 6, 3, 7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shapes_are_those_of_the_arrays(case: Case) -> None:
    call = make(case)
    assert call.spec.input_shape == call.input.shape
    assert call.spec.offset_shape == call.offset.shape
    assert call.spec.weight_shape == call.weight.shape
    assert call.spec.output_shape == call.grad_output.shape
    if call.mask is not None:
        assert call.spec.mask_shape == call.mask.shape
    assert (call.spec.groups, call.spec.offset_groups) == (case.groups, case.offset_groups)


@given(st.data())
def test_sizes_are_those_of_torch(data: st.DataObject) -> None:
    """Output sizes and what is refused, empty sizes too; "same", of which torch warns, is tried below."""
    torch = pytest.importorskip("torch")
    D = data.draw(st.integers(1, 3))

    def numbers(least: int, most: int) -> tuple[int, ...]:
        return data.draw(st.tuples(*[st.integers(least, most)] * D))

    case = Case(
        "",
        size=numbers(0, 6),
        kernel=numbers(1, 4),
        batch=data.draw(st.integers(0, 2)),
        stride=numbers(1, 3),
        padding=numbers(0, 2),
        dilation=numbers(1, 3),
    )
    parameters = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    input, weight = (case.batch, 4, *case.size), (6, 4, *case.kernel)
    offset = (case.batch, D * int(np.prod(case.kernel)), *output_size(case))
    try:
        convolve = getattr(torch.nn.functional, f"conv{D}d")
        expected = convolve(torch.zeros(input), torch.zeros(weight), **parameters).shape
    except RuntimeError:
        with pytest.raises(ValueError, match="pixel"):
            spec_of(input, offset, weight, **parameters)
    else:
        assert spec_of(input, offset, weight, **parameters).output_shape == expected


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=3))
def test_same_padding_keeps_the_size(axes: list[tuple[int, int, int]]) -> None:
    kernel, dilation, size = (tuple(numbers) for numbers in zip(*axes, strict=True))
    spec = make(Case("", size, kernel, padding="same", dilation=dilation)).spec
    assert spec.output_size == size
    for (before, after), k, d in zip(spec.padding, kernel, dilation, strict=True):
        assert before == d * (k - 1) // 2
        assert after - before in (0, 1)


@pytest.mark.parametrize(
    ("parameters", "same"),
    [
        ({"padding": "valid"}, {"padding": 0}),
        ({"stride": (1, 1)}, {"stride": 1}),
        ({"stride": [1, 1]}, {"stride": 1}),
        ({"stride": np.int64(1)}, {"stride": 1}),
        ({"stride": np.array([1, 1])}, {"stride": 1}),
        ({"dilation": (np.int32(1), 1)}, {"dilation": 1}),
        ({"padding": (0, 0)}, {"padding": 0}),
        ({"padding": np.array(0)}, {"padding": 0}),
        ({"padding": ((0, 0), (0, 0))}, {"padding": 0}),
        ({"padding": [[0, 0], [0, 0]]}, {"padding": 0}),
        ({"padding": np.zeros((2, 2), int)}, {"padding": 0}),
        ({"groups": np.int64(1)}, {"groups": None}),
        ({"offset_groups": 1}, {"offset_groups": None}),
        ({"rank": 2}, {"rank": None}),
    ],
)
def test_forms_of_a_parameter(parameters: dict[str, Any], same: dict[str, Any]) -> None:
    spec = spec_of(**parameters)
    assert spec == spec_of(**same)
    assert all(type(number) is int for number in (*spec.stride, *spec.dilation, *spec.padding[0], spec.groups))


def test_one_integer_of_padding_for_one_axis() -> None:
    """In 1-D a pair of numbers could be meant as before and after, and is refused; (n,) is the axis' one."""
    one = make(Case("", (9,), (3,), padding=(2,)))
    assert one.spec.padding == ((2, 2),)


def test_groups_follow_from_the_shapes() -> None:
    assert spec_of(weight=(6, 2, 3, 3)).groups == 2
    assert spec_of(offset=(2, 36, 6, 7)).offset_groups == 2
    assert spec_of(offset=(2, 36, 6, 7), mask=(2, 18, 6, 7)).offset_groups == 2


def test_54_channels_are_v1_with_3_groups_unless_groups_are_given() -> None:
    assert spec_of(input=(2, 6, 8, 9), weight=(6, 6, 3, 3), offset=(2, 54, 6, 7)).offset_groups == 3
    with pytest.raises(ValueError, match=r"54 = 36 offsets \+ 18 masks"):
        spec_of(input=(2, 6, 8, 9), weight=(6, 6, 3, 3), offset=(2, 54, 6, 7), offset_groups=2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_floating_point_dtypes(dtype: str) -> None:
    assert spec_of(dtype=dtype).dtype == dtype


@pytest.mark.parametrize("wrong", [1.0, True, (1.0, 1), (True, 1)])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_a_call_seen_before_is_still_checked(name: str, wrong: Any) -> None:
    """1 == 1.0 == True, and a spec is remembered."""
    spec_of(offset=(2, 18, 8, 9) if name == "padding" else (2, 18, 6, 7), **{name: 1})
    with pytest.raises(TypeError, match=name):
        spec_of(offset=(2, 18, 8, 9) if name == "padding" else (2, 18, 6, 7), **{name: wrong})


def test_sizes_without_a_hash() -> None:
    """Symbolic sizes compare and calculate, and cannot be the key of a dictionary."""

    class Symbol(int):
        __hash__ = None  # type: ignore[assignment]

    assert spec_of(input=(Symbol(2), 4, 8, 9)).batch == 2
    with pytest.raises(TypeError, match="float32"):
        spec_of(input=(Symbol(2), 4, 8, 9), dtype="int64")


def test_grad_output_of_the_output_s_shape() -> None:
    check_grad_output(spec_of(), Operand((2, 6, 6, 7), "float32"))


def test_a_spec_keeps_its_hash_for_itself() -> None:
    spec = make(Case("2-D", (4, 5), (2, 2))).spec
    again = pickle.loads(pickle.dumps(spec))
    hash(spec)
    assert again == spec and hash(again) == hash(spec)
    assert "_hash" not in pickle.loads(pickle.dumps(spec)).__dict__  # texts have another hash in another process
    assert hash(dataclasses.replace(spec, batch=7)) != hash(spec)
