"""The kernel of a layer that predicts its offsets, against the reference behind a convolution written in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.ops.conv.cases import CASES, PROBLEMS, Call, Case, make
from tests.ops.conv.suite import doubled, plain_convolution
from tests.ops.conv.test_cpu import TAILS, threads_afterwards
from tests.tolerances import assert_close

import deformconv
from deformconv.ops.conv import cpu, reference
from deformconv.ops.conv.layer import activated, predicted
from deformconv.runtime import work

__all__ = ["threads_afterwards"]

Activation = tuple[float, float | None]
ALL = [*CASES, *TAILS, *PROBLEMS]
by_case = pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)


class Layer:
    """A call of a layer: the arrays of the operator but offsets and masks, and a predictor's."""

    def __init__(self, case: Case, dtype: str, biased: bool = True) -> None:
        self.call = make(case, dtype)
        spec, rng = self.call.spec, np.random.default_rng(7)
        self.predicted = predicted(spec.kernel_size, spec.offset_groups, spec.masked)
        shape = (self.predicted.channels, spec.in_channels, *spec.kernel_size)
        depth = spec.in_channels * spec.taps
        self.weight = (rng.normal(size=shape) / np.sqrt(depth)).astype(dtype)
        self.bias = rng.normal(size=len(self.weight)).astype(dtype) if biased else None

    def output(self, activation: Activation = (2.0, None)) -> np.ndarray:
        c = self.call
        return cpu.forward_layer(c.spec, c.input, c.weight, c.bias, self.weight, self.bias, activation)

    def expected(self, activation: Activation = (2.0, None)) -> np.ndarray:
        """In float64, from a convolution, an activation and the operator, one after the other."""
        call = doubled(self.call)
        convolution = replace(call.spec, out_channels=len(self.weight), groups=1, biased=self.bias is not None)
        raw = plain_convolution(replace(call, spec=convolution, weight=self.weight, bias=self.bias))
        offset, mask = np.split(raw, [self.predicted.offsets], axis=1)
        offset, mask = activated(offset, mask if call.spec.masked else None, *activation, np.tanh, _sigmoid)
        return reference.forward(call.spec, call.input, offset, call.weight, call.bias, mask)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@by_case
def test_it_is_predictor_activation_and_operator(case: Case) -> None:
    layer = Layer(case, "float64")
    assert_close(layer.output(), layer.expected(), "float64")


@pytest.mark.parametrize("activation", [(0.5, None), (2.0, 0.75), (1.0, 30.0)])
@pytest.mark.parametrize("masked", [True, False])
def test_masks_are_scaled_and_offsets_bounded(masked: bool, activation: Activation) -> None:
    for case in (CASES[4].but(masked=masked), TAILS[0].but(masked=masked), TAILS[9].but(masked=masked)):
        layer = Layer(case, "float64")
        assert_close(layer.output(activation), layer.expected(activation), "float64", case.name)


@pytest.mark.parametrize("case", TAILS, ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    layer = Layer(case, "float32", biased=False)
    assert_close(layer.output(), layer.expected(), "float32")


@pytest.mark.parametrize("case", TAILS, ids=lambda case: case.name)
def test_the_same_bits_for_any_number_of_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    layer, results = Layer(case, "float32"), []
    for number in (1, 2, 3, 8):
        deformconv.set_num_threads(number)
        results.append(layer.output())
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("case", [TAILS[0], TAILS[3], TAILS[5]], ids=lambda case: case.name)
def test_the_same_bits_alone_and_in_a_batch(case: Case) -> None:
    layer = Layer(case.but(batch=4), "float32")
    together, image = layer.output(), layer.call.input
    for n in range(4):
        alone = Layer(case.but(batch=1), "float32")
        alone.call = replace(layer.call, spec=alone.call.spec, input=image[n : n + 1])
        alone.weight, alone.bias = layer.weight, layer.bias
        np.testing.assert_array_equal(alone.output(), together[n : n + 1])


def test_channels_may_lie_last() -> None:
    def last(array: Any) -> Any:
        return np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1)

    layer = Layer(TAILS[0], "float32")
    expected = layer.output()
    layer.call = layer.call.but(input=last(layer.call.input), weight=last(layer.call.weight))
    layer.weight = last(layer.weight)
    found = layer.output()
    assert np.moveaxis(found, 1, -1).flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_not_finite(number: float) -> None:
    """What it makes of offsets and masks is what NumPy makes of them."""
    layer = Layer(Case("", (7, 8), (3, 3), padding=1, batch=1), "float64")
    input = layer.call.input.copy()
    input[0, 1, 3, 4] = number
    layer.call = layer.call.but(input=input)
    with np.errstate(all="ignore"):
        expected = layer.expected()
    assert not np.isfinite(expected).all()
    assert_close(layer.output(), expected, "float64")


def test_a_predictor_of_zeros_computes_the_plain_convolution() -> None:
    layer = Layer(Case("", (9, 11), (3, 3), padding=1), "float64")
    layer.weight, layer.bias = np.zeros_like(layer.weight), None
    call: Call = layer.call
    assert_close(layer.output(), plain_convolution(call), "float64")
