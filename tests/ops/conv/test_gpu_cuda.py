"""On a GPU: everything a backend must satisfy, in every dtype, and what compiled code can get wrong and an interpreter cannot.

`make test-gpu` runs it; tests/torch/test_gpu_cuda.py has what PyTorch puts around the kernels. Before a release,

    compute-sanitizer --tool memcheck python -m pytest -m cuda -k "half_precision" tests/ops/conv/test_gpu_cuda.py

and the same with racecheck.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.conv.cases import Call, Case, make
from tests.ops.conv.gpu_suite import HALF_CASES, TAILS, GpuSuite, assert_near, by_half, by_mix, half_call, half_results
from tests.ops.conv.suite import configurations, in_float64, odd, reference_backward

from deformconv.ops.conv import gpu, reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.cuda


@pytest.mark.usefixtures("in_order")
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
@pytest.mark.parametrize("case", [*HALF_CASES, *TAILS], ids=lambda case: case.name)
def test_half_precision(case: Case, half: str, mixed: bool) -> None:
    for name, result, expected in half_results(half_call(case, half, mixed, "cuda")):
        assert_near(name, result, expected, half)


@by_half
@pytest.mark.parametrize("boundary", ["zeros", "inside"])
def test_odd_numbers_beside_half_precision(half: str, boundary: str) -> None:
    """In whole blocks of channels, and with a rest."""
    for channels in (32, 12):
        case = Case("", (9, 11), (3, 3), padding=1, in_channels=channels, out_channels=32, offset_groups=2, boundary=boundary)
        for name, result, expected in half_results(half_call(case, half, True, "cuda", odd)):
            assert_near(name, result, expected, half)


class TestLargeSums:
    """Float32 as exact as the suite asks for, where a sum is of thousands of numbers."""

    def error(self, call: Call, name: str) -> float:
        from tests.tolerances import error

        operands = [torch.from_numpy(getattr(call, n)).cuda() for n in ("grad_output", "input", "offset", "weight", "mask")]
        found = getattr(gpu.backward(call.spec, *operands, wanted=[name]), name)
        expected = getattr(in_float64(call, reference_backward), name)
        return error(found.cpu(), expected)

    @pytest.mark.parametrize("name", ["weight", "offset", "mask", "input"])
    def test_of_numbers_of_one_sign(self, name: str) -> None:
        """Of 10,000 positions, or of 512 channels; tests run with PyTorch's own choice, which is not TF32."""
        wide = Case("wide", (100, 100), (2, 2), padding=((1, 0), (1, 0)), batch=1, in_channels=3, out_channels=2)
        deep = Case("deep", (5, 6), (3, 3), padding=1, batch=1, in_channels=512, out_channels=64)
        for case in (wide, deep):
            call = make(case, "float32")
            call = call.but(**{n: np.abs(getattr(call, n)) for n in ("input", "grad_output", "mask", "weight")})
            assert self.error(call, name) <= 1e-5
