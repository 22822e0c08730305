"""The suite as a backend inherits it that has one dtype and one rank, and never gives the same bits twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.ops.conv.suite import SMALL, ConvSuite

from deformconv.ops.conv import cpu
from deformconv.ops.conv.spec import Gradients

RANDOM = np.random.default_rng(0)


def noisy(array: Any) -> Any:
    """The array with an error of a few roundings, as sums in any order have it."""
    return None if array is None else (array * (1 + 1e-6 * RANDOM.uniform(-1, 1, array.shape))).astype(array.dtype)


class TestNoisy(ConvSuite):
    backend: Any = SimpleNamespace(
        forward=lambda spec, *arrays: noisy(cpu.forward(spec, *arrays)),
        backward=lambda spec, *arrays: Gradients(*map(noisy, cpu.backward(spec, *arrays))),
    )
    dtypes = ("float32",)
    ranks = (2,)
    exact = False
    deterministic = False


def test_noise_is_refused_of_a_backend_that_promises_bits() -> None:
    strict = TestNoisy()
    strict.exact = strict.deterministic = True
    for call in (
        strict.test_a_call_repeats_its_output,
        strict.test_a_call_repeats_its_gradients,
        lambda: strict.test_position("zeros", 1, 10, 90, 2, 0, "float32"),
    ):
        with pytest.raises(AssertionError, match="Arrays are not equal"):
            call()


def test_a_wrong_number_is_refused_of_every_backend() -> None:
    wrong = TestNoisy()
    wrong.backend = SimpleNamespace(forward=lambda spec, *arrays: 1.001 * cpu.forward(spec, *arrays))
    wrong.test_a_call_repeats_its_output()
    with pytest.raises(AssertionError, match=r"error 1\.0e-03 over 1e-05 for float32"):
        wrong.test_zero_offsets_give_the_plain_convolution(SMALL)
