"""The suite on the GPU kernels, and their calls in half precision: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.ops.attention.cases import ARGUMENTS, CASES, Array, Call, Case, make
from tests.ops.attention.suite import SMALL, BackendSuite, reference_gradients, reference_output
from tests.ops.conv.gpu_suite import tensor_of
from tests.tolerances import assert_close

from deformconv.ops.attention import gpu
from deformconv.ops.attention.spec import Gradients

torch = pytest.importorskip("torch")

from tests.half_calls import HalfCall, halved  # noqa: E402

PRECISE = ("locations", "weights")  # which may be float32 beside half precision
DETR = Case("DETR", batch=1, levels=((8, 12), (4, 6), (2, 3), (1, 2)), heads=8, channels=32, queries=40, points=4)


class GpuSuite(BackendSuite):
    """The suite on tensors of `device`. What the kernels do not write is NaN."""

    backend = gpu
    device: ClassVar[str] = "cpu"

    def tensors(self, call: Call) -> list[Any]:
        return [tensor_of(array, self.device) for array in call.arrays]

    def output(self, call: Call) -> Array:
        from tests.poison import Poisoned

        with Poisoned():
            found: Array = gpu.forward(call.spec, *self.tensors(call)).cpu().numpy()
        return found

    def gradients(self, call: Call, wanted: Any = ARGUMENTS) -> Gradients:
        from tests.poison import Poisoned

        with Poisoned():
            found = gpu.backward(call.spec, tensor_of(call.grad_output, self.device), *self.tensors(call), wanted=wanted)
        return Gradients(*(None if tensor is None else tensor.cpu().numpy() for tensor in found))

    @pytest.mark.parametrize("samples", [2 * 6 * 3 * 4, 50], ids=["one image", "two heads"])
    def test_parts_give_the_same_bits(self, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of images and of heads, where lists are too long for one."""
        call = make(SMALL, "float32")
        expected = self.gradients(call)
        monkeypatch.setattr(gpu, "_PIECE", samples)
        for one, other in zip(self.gradients(call), expected, strict=True):
            assert np.array_equal(one, other)

    def test_positions_are_exact_in_a_large_level(self) -> None:
        """A product with its size, rounded to float32, would be off by a thousandth of a pixel."""
        call = make(Case("long", batch=1, levels=((1, 30_000),), heads=1, channels=2, queries=40, points=1), "float32")
        assert_close(self.output(call), reference_output(call), "float32")
        expected, found = reference_gradients(call), self.gradients(call, PRECISE)
        for name in PRECISE:
            assert_close(getattr(found, name), getattr(expected, name), "float32", name)

    def test_views(self) -> None:
        """Arguments that are no contiguous tensors."""
        call = make(SMALL, "float32")
        given = [tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in self.tensors(call)]
        grad_output = tensor_of(call.grad_output, self.device).movedim(1, -1).contiguous().movedim(-1, 1)
        assert_close(gpu.forward(call.spec, *given).cpu(), reference_output(call), "float32")
        found, expected = gpu.backward(call.spec, grad_output, *given, wanted=ARGUMENTS), reference_gradients(call)
        for name in ARGUMENTS:
            assert_close(getattr(found, name).cpu(), getattr(expected, name), "float32", name)


def half_call(case: Case, half: str, mixed: bool, device: str = "cpu") -> HalfCall:
    """Arguments in half precision; `mixed`: locations and weights in float32, as positions should be."""
    return halved(make(case, "float32"), ARGUMENTS, PRECISE, half, mixed, device)


def half_results(call: HalfCall) -> Iterator[tuple[str, Any, Array]]:
    """The name of each result of the GPU kernels, the result, and what it is in float64."""
    from tests.poison import Poisoned

    operands = [call.tensors[name] for name in ARGUMENTS]
    with Poisoned():
        output = gpu.forward(call.spec, *operands)
        gradients = gpu.backward(call.spec, call.tensors["grad_output"], *operands, wanted=ARGUMENTS)
    yield "output", output, reference_output(call.exact)
    for name, expected in reference_gradients(call.exact)._asdict().items():
        found = getattr(gradients, name)
        assert found.dtype == call.tensors[name].dtype, name
        yield name, found, expected


HALF_CASES = [case for case in CASES if case.points < 10]
