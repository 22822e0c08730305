"""The GPU kernels in Triton's interpreter: everything a backend must satisfy, without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from tests.ops.conv.cases import Case
from tests.ops.conv.gpu_suite import HALF_CASES, GpuSuite, assert_near, by_half, by_mix, half_call, half_results
from tests.ops.conv.suite import by_boundary

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the NaN that the interpreter computes with
]


class TestGpu(GpuSuite):
    """In float64, in which identities are tried; what follows has the other dtypes.

    The interpreter takes some 50 microseconds for each operation of a program, however many numbers that is of, and the input's
    gradient has a program for each pixel: so some tests have fewer pixels here, or fewer values.
    """

    dtypes = ("float64",)

    def test_output_of_a_real_problem(self, problem: Case) -> None:
        super().test_output_of_a_real_problem(shrunk(problem))

    def test_gradients_of_a_real_problem(self, problem: Case) -> None:
        super().test_gradients_of_a_real_problem(shrunk(problem))

    @by_boundary
    @pytest.mark.parametrize("far", [np.inf, -1e30, 2.0**40, 1e4])
    def test_far_positions_have_no_gradient(self, far: float, dtype: str, boundary: str) -> None:
        super().test_far_positions_have_no_gradient(far, dtype, boundary)

    @by_boundary
    @pytest.mark.parametrize("value", [np.nan, -np.inf, 2.0**31])
    def test_gradients_of_nothing_but_odd_offsets(self, value: float, rank: int, boundary: str) -> None:
        super().test_gradients_of_nothing_but_odd_offsets(value, rank, boundary)


def shrunk(problem: Case) -> Case:
    return problem.but(batch=1, size=tuple(min(length, 8 - i) for i, length in enumerate(problem.size)))


@by_mix
@by_half
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    """The interpreter cuts a float32 off where it makes a bfloat16 of it, and a GPU rounds to the nearest."""
    for name, result, expected in half_results(half_call(case, half, mixed)):
        assert_near(name, result, expected, half)
