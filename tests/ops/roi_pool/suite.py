"""What every backend of deformable RoI pooling must satisfy: the reference's results, and no harm by hostile input."""

from __future__ import annotations

import re
from functools import cache
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.ops.roi_pool.cases import ARGUMENTS, CASES, Array, Call, Case, make
from tests.tolerances import assert_close

from deformconv.ops.roi_pool import reference
from deformconv.ops.roi_pool.spec import CONVENTIONS, Gradients

by_convention = pytest.mark.parametrize("convention", CONVENTIONS)
SMALL = Case("small", channels=3, size=(6, 7), boxes=3, output_size=(2, 3), scale=1.0)
WANTED = ("input", "offset", "mask")


def doubled(call: Call) -> Call:
    """The call with the same numbers in float64."""
    return call.but(
        **{
            name: None if (array := getattr(call, name)) is None else array.astype(np.float64)
            for name in (*ARGUMENTS, "grad_output")
        }
    )


def reference_output(call: Call) -> Array:
    c = doubled(call)
    return reference.forward(c.spec, *c.arrays)


def reference_gradients(call: Call) -> Gradients:
    c = doubled(call)
    return reference.backward(c.spec, c.grad_output, *c.arrays, WANTED)


@cache
def expected_output(case: Case, dtype: str) -> Array:
    return reference_output(make(case, dtype))


@cache
def expected_gradients(case: Case, dtype: str) -> Gradients:
    return reference_gradients(make(case, dtype))


class ForwardSuite:
    """The output."""

    backend: Any
    dtypes: ClassVar[tuple[str, ...]] = ("float64", "float32")
    cases: ClassVar[list[Case]] = CASES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try each test with all that the backend takes, as far as its arguments do not say otherwise."""
        values = {"dtype": self.dtypes, "case": self.cases}
        said = [re.findall(r"\w+", str(mark.args[0])) for mark in metafunc.definition.iter_markers("parametrize")]
        for name in [name for name in values if name in metafunc.fixturenames and name not in chain(*said)]:
            metafunc.parametrize(name, values[name], ids=lambda value: getattr(value, "name", value))

    def output(self, call: Call) -> Array:
        found: Array = self.backend.forward(call.spec, *call.arrays)
        return found

    def test_output(self, case: Case, dtype: str) -> None:
        assert_close(self.output(make(case, dtype)), expected_output(case, dtype), dtype)

    def test_nan_and_infinite_offsets(self, dtype: str) -> None:
        call = hostile_offsets(make(SMALL, dtype))
        found = self.output(call)
        assert_close(found, reference_output(call), dtype)
        assert np.isnan(found[0, :, 0, 0]).all() and np.isnan(found).sum() == call.spec.channels
        assert (found[1, :, 0, 1] == 0).all()

    @pytest.mark.parametrize(
        ("convention", "sampling"), [("aligned", 0), ("unaligned", 0), ("aligned", 2), ("unaligned", 2), ("rounded", 2)]
    )
    def test_hostile_boxes(self, convention: str, sampling: int, dtype: str) -> None:
        call = make(SMALL.but(convention=convention, sampling=sampling, boxes=len(HOSTILE)), dtype)
        call = call.but(boxes=np.array(HOSTILE, dtype))
        assert_close(self.output(call), reference_output(call), dtype)

    @by_convention
    def test_a_box_with_an_infinite_corner_is_nan(self, convention: str, dtype: str) -> None:
        call = make(SMALL.but(convention=convention), dtype)
        boxes = np.array([(0, 1, 1, -np.inf, 4), (0, 1, np.inf, 4, 4), (0, 1, 1, 4, 4)], dtype)
        found = self.output(call.but(boxes=boxes))
        assert np.isnan(found[:2]).all() and np.isfinite(found[2]).all()

    def test_a_bin_without_samples_is_zero_whatever_its_offset(self, dtype: str) -> None:
        """Inverted boxes, which decide on their samples."""
        call = make(SMALL.but(sampling=0), dtype)
        boxes = np.array([(0, 4, 4, 1, 1), (0, 1, 4, 4, 1), (1, 4, 1, 1, 4)], dtype)
        offset = np.full_like(call.offset, np.nan)
        assert not self.output(call.but(boxes=boxes, offset=offset)).any()

    def test_infinite_and_nan_pixels(self, dtype: str) -> None:
        call = make(SMALL, dtype)
        pixels = call.input.copy()
        pixels[0, 0, 2, 3], pixels[1, 1, 3, 3], pixels[0, 2, 1, 1] = np.inf, np.nan, -np.inf
        call = call.but(input=pixels)
        assert_close(self.output(call), reference_output(call), dtype)

    @pytest.mark.parametrize("empty", ["boxes", "batch and boxes"])
    def test_nothing_to_pool(self, empty: str, dtype: str) -> None:
        call = make(SMALL.but(boxes=0, batch=2 if empty == "boxes" else 0), dtype) if empty == "boxes" else _empty(dtype)
        assert self.output(call).shape == (0, 3, 2, 3)


class BackendSuite(ForwardSuite):
    """And the gradients."""

    def gradients(self, call: Call, wanted: Any = WANTED) -> Gradients:
        found: Gradients = self.backend.backward(call.spec, call.grad_output, *call.arrays, wanted=wanted)
        return found

    def assert_gradients(self, found: Gradients, expected: Gradients, dtype: str) -> None:
        for name in WANTED:
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None), name
            if one is not None:
                assert_close(one, other, dtype, name)

    def test_gradients(self, case: Case, dtype: str) -> None:
        self.assert_gradients(self.gradients(make(case, dtype)), expected_gradients(case, dtype), dtype)

    def test_gradients_of_hostile_offsets(self, dtype: str) -> None:
        call = hostile_offsets(make(SMALL, dtype))
        found = self.gradients(call)
        self.assert_gradients(found, reference_gradients(call), dtype)
        assert np.isnan(found.offset[0, :, 0, 0]).all() and np.isnan(found.offset).sum() == 2
        assert np.isnan(found.mask).sum() == 1 and np.isfinite(found.input).all()

    @by_convention
    def test_gradients_of_hostile_boxes(self, convention: str, dtype: str) -> None:
        call = make(SMALL.but(convention=convention, boxes=len(HOSTILE)), dtype)
        call = call.but(boxes=np.array(HOSTILE, dtype))
        self.assert_gradients(self.gradients(call), reference_gradients(call), dtype)

    @pytest.mark.parametrize("name", WANTED)
    def test_what_is_not_wanted_is_none(self, name: str) -> None:
        call = make(SMALL, self.dtypes[0])
        found = self.gradients(call, (name,))
        others = [other for other in Gradients._fields if other != name]
        assert all(getattr(found, other) is None for other in others)
        assert_close(getattr(found, name), getattr(reference_gradients(call), name), self.dtypes[0])

    @by_convention
    def test_right_hand_derivatives_on_pixels(self, convention: str) -> None:
        """Samples on pixel centres, the first and the last among them."""
        case = SMALL.but(convention=convention, sampling=1, output_size=(3, 3), size=(6, 6), gamma=1.0)
        call = make(case, self.dtypes[0])
        low = {"aligned": 0.0, "unaligned": -0.5, "rounded": 0.5}[convention]
        corners = {"rounded": (0.0, 2.0)}.get(convention, (low, low + 3))
        call = call.but(boxes=np.array([[0, *corners[:1] * 2, *corners[1:] * 2]] * 3, self.dtypes[0]))
        if convention != "rounded":
            call = call.but(offset=np.zeros_like(call.offset))
        self.assert_gradients(self.gradients(call), reference_gradients(call), self.dtypes[0])

    def test_gradients_of_nothing(self, dtype: str) -> None:
        call = make(SMALL.but(boxes=0), dtype)
        found = self.gradients(call)
        assert found.input.shape == call.input.shape and not found.input.any()
        assert found.offset.shape == (0, 2, 2, 3) and found.mask.shape == (0, 1, 2, 3)


def _empty(dtype: str) -> Call:
    call = make(SMALL.but(boxes=0), dtype)
    from dataclasses import replace

    return call.but(spec=replace(call.spec, batch=0), input=call.input[:0])


def hostile_offsets(call: Call) -> Call:
    """A NaN in one bin, and in another an infinity along one axis."""
    offset = call.offset.copy()  # type: ignore[union-attr]
    offset[0, 1, 0, 0] = np.nan
    offset[1, 0, 0, 1] = np.inf
    offset[2, 0, 1, 1], offset[2, 1, 1, 2] = 1e30, -1e30
    return call.but(offset=offset)


HOSTILE = [
    (0, np.nan, 0, 3, 3), (0, 0, 0, np.inf, 3), (1, -np.inf, -np.inf, np.inf, np.inf), (0, 4, 4, 1, 1), (0, 2, 2, 2, 2),
    (1, 1e30, 1e30, 2e30, 2e30), (0, -1e6, -1e6, 1e6, 1e6), (1, 100, 100, 120, 110), (0, -1, -1, 7, 6),
    (0, 2.5, -2.5, 3.5, 0.5), (0, 0, 0, -np.inf, 3), (1, 1, np.inf, 4, 5),
]  # fmt: skip
