"""The root's functions: arrays in, arrays out, and what they say of a call in other words."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from tests.ops.aggregate.cases import ARGUMENTS, CASES, Case, make, parameters
from tests.ops.aggregate.suite import SMALL, expected_gradients, expected_output
from tests.tolerances import assert_close

import deformconv
from deformconv.ops.aggregate.spec import GRADIENTS, Gradients

FUNCTIONS = (deformconv.deform_aggregate, deformconv.deform_aggregate_backward)


def keywords(case: Case, dtype: str = "float64") -> dict[str, Any]:
    """The call as keywords, for the public functions."""
    call = make(case, dtype)
    return {name: getattr(call, name) for name in ARGUMENTS} | parameters(case)


def test_signatures_are_the_public_ones() -> None:
    names = "input, offset, mask, kernel_size, stride, padding, dilation, offset_groups, boundary, backend"
    assert ", ".join(inspect.signature(deformconv.deform_aggregate).parameters) == f"{names}, unknown"
    backward = ", ".join(inspect.signature(deformconv.deform_aggregate_backward).parameters)
    assert backward == f"grad_output, {names}, wanted, unknown"


@pytest.mark.parametrize("backend", [None, "cpu", "portable", "reference"])
def test_output(backend: str | None) -> None:
    for case in (SMALL, *(case for case in CASES if case.name in ("1-D, all at once", "3-D, inside"))):
        found = deformconv.deform_aggregate(**keywords(case), backend=backend)
        assert_close(found, expected_output(case, "float64"), "float64", case.name)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("wanted", [("input",), ["mask", "offset"], (), "mask", None])
def test_gradients(wanted: Any, backend: str | None) -> None:
    given, grad_output = keywords(SMALL), make(SMALL).grad_output
    gradients = deformconv.deform_aggregate_backward(grad_output, **given, backend=backend, wanted=wanted)
    assert type(gradients) is Gradients
    names = set(GRADIENTS) if wanted is None else {wanted} if isinstance(wanted, str) else set(wanted)
    for name, expected in expected_gradients(SMALL, "float64")._asdict().items():
        found = getattr(gradients, name)
        assert (found is not None) == (name in names)
        if found is not None:
            assert_close(found, expected, "float64", name)


def test_a_window_is_3_wide_unless_it_is_said() -> None:
    x = np.random.default_rng(0).normal(size=(1, 2, 6))
    offset = np.zeros((1, 3, 4))
    expected = x[..., :4] + x[..., 1:5] + x[..., 2:]
    assert_close(deformconv.deform_aggregate(x, offset), expected, "float64")
    assert_close(deformconv.deform_aggregate(x, offset, None, 3, 1, 0, 1), expected, "float64")


def test_half_precision() -> None:
    found = deformconv.deform_aggregate(**keywords(SMALL, "float16"))
    assert found.dtype == "float16"
    assert_close(found, expected_output(SMALL, "float16"), "float16")


@pytest.mark.parametrize("cls", ["float64", "float32"])
def test_tensors_are_handed_on(cls: str) -> None:
    torch = pytest.importorskip("torch")
    given, grad_output = keywords(SMALL, cls), torch.from_numpy(make(SMALL, cls).grad_output)
    given |= {name: torch.from_numpy(given[name]) for name in ARGUMENTS}
    assert_close(deformconv.deform_aggregate(**given), expected_output(SMALL, cls), cls)
    gradients = deformconv.deform_aggregate_backward(grad_output, **given)
    for name, expected in expected_gradients(SMALL, cls)._asdict().items():
        assert type(getattr(gradients, name)) is torch.Tensor
        assert_close(getattr(gradients, name), expected, cls, name)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": [[0.0]]}, TypeError, "`input` is a list; expected a NumPy array or a PyTorch tensor"),
        ({"offset": None}, TypeError, "`offset` is None; expected a NumPy array or a PyTorch tensor"),
        ({"offset": np.ma.masked_array(np.zeros(3))}, TypeError, "or leave samples out by the argument `mask`"),
        ({"kernel_size": 3}, deformconv.ShapeError, "`offset` has 36 channels; a 3x3 kernel takes"),
        ({"boundary": "reflect"}, ValueError, "`boundary` is 'reflect'"),
        ({"backend": "cuda"}, ValueError, "`backend` is 'cuda'; expected \"cpu\""),
        ({"backend": "gpu"}, (deformconv.BackendError, ValueError), "gpu"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_mistakes(function: Any, change: dict[str, Any], error: Any, text: str) -> None:
    given = (make(SMALL).grad_output,) if function is deformconv.deform_aggregate_backward else ()
    with pytest.raises(error) as raised:
        function(*given, **keywords(SMALL) | change)
    assert text in str(raised.value)


def test_mistakes_of_a_backward_call() -> None:
    given, grad_output = keywords(SMALL), make(SMALL).grad_output
    with pytest.raises(deformconv.ShapeError, match=r"`grad_output` has shape .*: \(N, C, height, width\)\."):
        deformconv.deform_aggregate_backward(grad_output[:1], **given)
    with pytest.raises(ValueError, match="`wanted` names 'weight'; expected some of input, offset, mask"):
        deformconv.deform_aggregate_backward(grad_output, **given, wanted=["weight"])
    with pytest.raises(ValueError, match="`wanted` names 'mask', but no `mask` was passed"):
        deformconv.deform_aggregate_backward(grad_output, **given | {"mask": None}, wanted=["mask"])
    with pytest.raises(deformconv.BackendError, match="portable: NumPy has no automatic derivative"):
        deformconv.deform_aggregate_backward(grad_output, **given, backend="portable")


@pytest.mark.parametrize(
    ("word", "rest"),
    [
        ("deform_groups", "; here: offset_groups."),
        ("group", "; here: offset_groups."),
        ("groups", "; here: offset_groups."),
        ("kernel_shape", "; here: kernel_size."),
        ("pad", "; here: padding."),
        ("modulation", "; here: mask."),
        ("weight", "; nothing is multiplied by a weight here: deform_conv does that."),
        ("im2col_step", "; leave it out, a batch may have any size."),
        ("offset_scale", "; fold it into `offset`, as deformconv.vision.DCNv3 does."),
        ("remove_center", "; pass `mask` with 0 at the centre."),
        ("boundry", "; did you mean 'boundary'?"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_other_libraries_words(function: Any, word: str, rest: str) -> None:
    with pytest.raises(TypeError) as raised:
        function(*[None] * (3 if function is deformconv.deform_aggregate_backward else 2), **{word: 1})
    assert str(raised.value) == f"{function.__name__}() got an unexpected keyword argument {word!r}{rest}"
