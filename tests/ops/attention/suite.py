"""What every backend of deformable attention must satisfy: the reference's results, and no harm by hostile input."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.ops.attention.cases import ARGUMENTS, CASES, Array, Call, Case, make
from tests.tolerances import assert_close

from deformconv.ops.attention import reference
from deformconv.ops.attention.spec import Gradients

SMALL = Case("small", heads=3, channels=4, points=2)
EMPTY = {
    "queries": SMALL.but(queries=0), "points": SMALL.but(points=0), "images": SMALL.but(batch=0),
    "images and queries": SMALL.but(batch=0, queries=0),
}  # fmt: skip


def reference_output(call: Call) -> Array:
    c = call.but(**{name: getattr(call, name).astype(np.float64) for name in ARGUMENTS})
    return reference.forward(c.spec, *c.arrays)


def reference_gradients(call: Call) -> Gradients:
    c = call.but(**{name: getattr(call, name).astype(np.float64) for name in (*ARGUMENTS, "grad_output")})
    return reference.backward(c.spec, c.grad_output, *c.arrays, ARGUMENTS)


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
        values = {"dtype": self.dtypes, "case": self.cases, "empty": EMPTY.values()}
        said = [re.findall(r"\w+", str(mark.args[0])) for mark in metafunc.definition.iter_markers("parametrize")]
        for name in [name for name in values if name in metafunc.fixturenames and name not in chain(*said)]:
            metafunc.parametrize(name, values[name], ids=lambda value: getattr(value, "name", value))

    def output(self, call: Call) -> Array:
        found: Array = self.backend.forward(call.spec, *call.arrays)
        return found

    def test_output(self, case: Case, dtype: str) -> None:
        assert_close(self.output(make(case, dtype)), expected_output(case, dtype), dtype)

    def test_hostile_locations(self, dtype: str) -> None:
        call = hostile_locations(make(SMALL, dtype))
        found = self.output(call)
        assert_close(found, reference_output(call), dtype)
        heads = found.reshape(*found.shape[:2], call.spec.heads, -1)
        assert np.isnan(heads[0, 0, :2]).all() and np.isnan(found).sum() == 2 * call.spec.channels

    def test_pixels_that_are_not_finite(self, dtype: str) -> None:
        call = hostile_pixels(make(SMALL, dtype))
        assert_close(self.output(call), reference_output(call), dtype)

    def test_weights_that_are_not_finite(self, dtype: str) -> None:
        call = hostile_weights(make(SMALL, dtype))
        found = self.output(call)
        assert_close(found, reference_output(call), dtype)
        assert np.isinf(found).any() and np.isnan(found).any() and np.isfinite(found).any()

    def test_pixels_outside_are_not_read(self, dtype: str) -> None:
        """Neither those of another level, of another image or of another head, nor any when all of a level are bad."""
        call = only_first_level(make(SMALL, dtype))
        assert np.isfinite(self.output(call)).all()
        assert_close(self.output(call), reference_output(call), dtype)

    def test_locations_on_pixels_and_edges(self, dtype: str) -> None:
        call = on_pixels(make(PIXELS, dtype))
        assert_close(self.output(call), reference_output(call), dtype)

    def test_nothing_to_compute(self, empty: Case, dtype: str) -> None:
        call = make(empty, dtype)
        found = self.output(call)
        assert found.shape == call.spec.output_shape and not found.any()


class BackendSuite(ForwardSuite):
    """And the gradients."""

    def gradients(self, call: Call, wanted: Any = ARGUMENTS) -> Gradients:
        found: Gradients = self.backend.backward(call.spec, call.grad_output, *call.arrays, wanted=wanted)
        return found

    def check(self, call: Call, dtype: str, expected: Gradients | None = None) -> Gradients:
        found, expected = self.gradients(call), expected or reference_gradients(call)
        for name in ARGUMENTS:
            assert_close(getattr(found, name), getattr(expected, name), dtype, name)
        return found

    def test_gradients(self, case: Case, dtype: str) -> None:
        self.check(make(case, dtype), dtype, expected_gradients(case, dtype))

    def test_gradients_of_hostile_locations(self, dtype: str) -> None:
        found = self.check(hostile_locations(make(SMALL, dtype)), dtype)
        assert np.isnan(found.locations).sum() == 4 and np.isnan(found.weights).sum() == 2
        assert np.isfinite(found.value).all()

    def test_gradients_of_pixels_that_are_not_finite(self, dtype: str) -> None:
        found = self.check(hostile_pixels(make(SMALL, dtype)), dtype)
        assert np.isfinite(found.value).all()

    def test_gradients_of_weights_that_are_not_finite(self, dtype: str) -> None:
        """An infinite weight's share is infinite or NaN, which depends on the order of sums; all others are what they were."""
        call = hostile_weights(make(SMALL, dtype))
        found, expected = self.gradients(call), reference_gradients(call)
        for name in ARGUMENTS:
            one, other = (
                np.where(np.isfinite(array), array, np.nan) for array in (getattr(found, name), getattr(expected, name))
            )
            assert_close(one, other, dtype, name)
        assert np.isfinite(found.weights).all() and np.isfinite(found.value).any()

    def test_gradients_of_pixels_outside(self, dtype: str) -> None:
        found = self.check(only_first_level(make(SMALL, dtype)), dtype)
        height, width = SMALL.levels[0]
        assert not found.value[1].any() and not found.value[0, height * width :].any()

    def test_right_hand_derivatives_on_pixels(self, dtype: str) -> None:
        self.check(on_pixels(make(PIXELS, dtype)), dtype)

    @pytest.mark.parametrize("names", [("value",), ("locations",), ("weights",), ("value", "weights"), ()])
    def test_what_is_not_wanted_is_none(self, names: tuple[str, ...]) -> None:
        call, dtype = make(SMALL, self.dtypes[0]), self.dtypes[0]
        found, expected = self.gradients(call, names), reference_gradients(call)
        for name in ARGUMENTS:
            if name in names:
                assert_close(getattr(found, name), getattr(expected, name), dtype, name)
            else:
                assert getattr(found, name) is None

    def test_gradients_of_nothing(self, empty: Case, dtype: str) -> None:
        call = make(empty, dtype)
        found = self.gradients(call)
        for name in ARGUMENTS:
            gradient = getattr(found, name)
            assert gradient.shape == getattr(call, name).shape and not gradient.any()


def hostile_locations(call: Call) -> Call:
    """NaN in two heads of a query, beside an infinity once; infinite and huge numbers elsewhere."""
    locations = call.locations.copy()
    locations[0, 0, 0, 0, 0, 0] = np.nan
    locations[0, 0, 1, 1, 1] = np.inf, np.nan
    locations[0, 1, 0, 0, 0, 0], locations[0, 1, 1, 0, 0, 1] = np.inf, -np.inf
    locations[1, 0, 0, 0, 0], locations[1, 0, 0, 1, 0, 1] = 1e30, -1e30
    locations[1, 1, 0, 0] = [[2.0**31, 0.5], [0.5, -(2.0**31)]]
    locations[1, 2, 0, 0] = [[2.0**33, 0.5], [0.5, 2.0**62]]
    return call.but(locations=locations)


def hostile_pixels(call: Call) -> Call:
    value = call.value.copy()
    value[0, 3, 0, 0], value[1, 9, 1, 1], value[0, 36, 2, 2], value[0, 11, 0, 1] = np.inf, np.nan, -np.inf, -np.inf
    return call.but(value=value)


def hostile_weights(call: Call) -> Call:
    """Infinite weights: in a level, on a pixel, where a corner has the weight 0, and outside, where the value is 0; and NaN."""
    weights, locations = call.weights.copy(), call.locations.copy()
    weights[0, 0, 0, 0, 0], locations[0, 0, 0, 0, 0] = np.inf, 0.4
    weights[0, 1, 1, 0, 1], locations[0, 1, 1, 0, 1] = -np.inf, (0.5, 0.5)  # 7 columns and 5 rows: a pixel's centre
    weights[0, 2, 0, 1, 0], locations[0, 2, 0, 1, 0] = np.inf, 3.0
    weights[1, 0, 2, 1, 1] = np.nan
    weights[1, 1, 2, 1, 1], locations[1, 1, 2, 1, 1] = np.nan, -2.0
    return call.but(weights=weights, locations=locations)


def only_first_level(call: Call) -> Call:
    """Only the first level of the first image has finite values, and only there locations lie within the level."""
    value, locations = call.value.copy(), call.locations.copy()
    height, width = SMALL.levels[0]
    value[1], value[0, height * width :] = np.nan, np.inf
    locations[1], locations[:, :, :, 1] = 1.5, -0.6
    return call.but(value=value, locations=locations)


PIXELS = SMALL.but(name="on pixels", levels=((4, 8), (2, 2)), queries=9, points=4)


def on_pixels(call: Call) -> Call:
    """Locations on pixel centres, on edges, and half a pixel and a whole one beyond, in levels whose sizes are powers of 2."""
    locations = call.locations.copy()
    for level, (height, width) in enumerate(PIXELS.levels):
        columns = np.arange(-1, 2 * width + 3) / (2 * width)
        rows = np.arange(-1, 2 * height + 3) / (2 * height)
        places = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)
        into = locations[:, :, :, level]
        into[...] = np.resize(places, into.shape)
    return call.but(locations=locations)


def with_queries(call: Call, rows: slice) -> Call:
    """The call of some of its queries."""
    spec = replace(call.spec, queries=len(range(*rows.indices(call.spec.queries))))
    arrays = {name: getattr(call, name)[:, rows] for name in ("locations", "weights", "grad_output")}
    return call.but(spec=spec, **arrays)
