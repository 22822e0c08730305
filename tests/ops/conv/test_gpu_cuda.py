"""On a GPU: everything a backend must satisfy, in every dtype, and what compiled code could get wrong that an interpreter cannot.

`make test-gpu` runs it; tests/torch/test_gpu_cuda.py has what PyTorch puts around the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.conv.cases import Case
from tests.ops.conv.gpu_suite import HALF_CASES, TAILS, GpuSuite, assert_near, by_half, by_mix, half_call, half_results
from tests.ops.conv.suite import configurations, in_float64, reference_backward

from deformconv.ops.conv import reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.cuda


class TestGpu(GpuSuite):
    device = "cuda"

    # Fewer than of other backends: each configuration is compiled anew.
    @settings(max_examples=12)
    @given(st.data())
    def test_output_of_any_configuration(self, data: st.DataObject) -> None:
        call = self.make(data.draw(configurations(self.ranks)))
        self.assert_close(self.output(call), in_float64(call, reference.forward))

    @settings(max_examples=12)
    @given(st.data())
    def test_gradients_of_any_configuration(self, data: st.DataObject) -> None:
        call = self.make(data.draw(configurations(self.ranks)))
        self.assert_gradients(call, in_float64(call, reference_backward), self.dtypes[0])


@by_mix
@by_half
@pytest.mark.parametrize("case", [*HALF_CASES, *TAILS], ids=lambda case: case.name)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    for name, result, expected in half_results(half_call(case, half, mixed, "cuda")):
        assert_near(name, result, expected, half)
