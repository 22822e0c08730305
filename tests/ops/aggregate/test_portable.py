"""The portable form: the suite on NumPy's arrays and by PyTorch's derivative, half precision, derivatives of higher order."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from tests.ops.aggregate.cases import ARGUMENTS, CASES, Array, Call, Case, make
from tests.ops.aggregate.suite import (
    SMALL,
    AggregateSuite,
    ForwardSuite,
    in_float64,
    reference_backward,
    reference_forward,
)
from tests.ops.rules import by_boundary
from tests.tolerances import assert_close

from deformconv.ops.aggregate import portable
from deformconv.ops.aggregate.operator import DEFORM_AGGREGATE
from deformconv.ops.aggregate.spec import GRADIENTS, Gradients
from deformconv.ops.taps import portable as taps


class TestOnNumPy(ForwardSuite):
    backend = portable

    def test_half_precision_is_computed_in_float32(self) -> None:
        call = make(SMALL, "float16")
        output = self.output(call)
        assert output.dtype == "float16"
        assert_close(output, in_float64(call, reference_forward), "float16")


class Differentiated:
    """The portable form, and PyTorch's derivative of it."""

    forward = staticmethod(portable.forward)

    @staticmethod
    def backward(spec: Any, grad_output: Any, *arguments: Any) -> Any:
        native = pytest.importorskip("deformconv.torch.native")
        *operands, wanted = arguments
        return native.backward(DEFORM_AGGREGATE, spec, grad_output, operands, wanted)


class TestOnTorch(AggregateSuite):
    backend = Differentiated

    def array(self, array: Array) -> Any:
        torch = pytest.importorskip("torch")
        usable = array.flags.writeable and min(array.strides, default=0) >= 0
        return torch.from_numpy(array if usable else array.copy())

    def numpy(self, array: Any) -> Array:
        return array.detach().numpy()

    def tensors(self, call: Call) -> list[Any]:
        """Leaves for input, offset and mask."""
        return [None if array is None else self.array(array).requires_grad_() for array in call.arrays]

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_is_computed_in_float32(self, dtype: str) -> None:
        torch = pytest.importorskip("torch")
        call, half = make(SMALL), getattr(torch, dtype)
        arrays = [tensor.detach().to(half).requires_grad_() for tensor in self.tensors(call)]
        grad_output = self.array(call.grad_output).to(half)
        output = portable.forward(dataclasses.replace(call.spec, dtype=dtype), *arrays)
        gradients = torch.autograd.grad(output, arrays, grad_output)
        assert {result.dtype for result in (output, *gradients)} == {half}
        rounded = [tensor.detach().double().numpy() for tensor in (*arrays, grad_output)]
        call = call.but(**dict(zip((*ARGUMENTS, "grad_output"), rounded, strict=True)))
        assert_close(output.detach().double(), in_float64(call, reference_forward), dtype)
        for name, gradient, expected in zip(GRADIENTS, gradients, in_float64(call, reference_backward), strict=True):
            assert_close(gradient.double(), expected, dtype, name)

    @by_boundary
    @pytest.mark.parametrize(
        "case",
        [
            Case("1-D", (4,), (2,), batch=1, channels=2, padding=1, offset_groups=2),
            Case("2-D", (3, 3), (2, 2), batch=1, channels=2, stride=2, padding=((1, 0), (0, 1))),
            Case("3-D", (2, 3, 2), (1, 2, 2), batch=1, channels=1, stride=(1, 2, 1)),
        ],
        ids=lambda case: case.name,
    )
    def test_derivatives_of_first_and_second_order(self, case: Case, boundary: str) -> None:
        torch = pytest.importorskip("torch")
        call = make(case.but(boundary=boundary), away_from_kinks=True)

        def output(*arrays: Any) -> Any:
            return portable.forward(call.spec, *arrays)

        assert torch.autograd.gradcheck(output, self.tensors(call), fast_mode=True)
        assert torch.autograd.gradgradcheck(output, self.tensors(call), fast_mode=True)

    def test_shapes_without_memory(self) -> None:
        torch = pytest.importorskip("torch")
        call = make(SMALL)
        leaves = [tensor.detach().to("meta").requires_grad_() for tensor in self.tensors(call)]
        output = portable.forward(call.spec, *leaves)
        gradients = torch.autograd.grad(output, leaves, torch.empty_like(output))
        assert output.is_meta
        assert output.shape == call.spec.output_shape
        assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("case", [case for case in CASES if case.name.endswith("at once")], ids=lambda case: case.name)
def test_parts_make_the_whole(case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts as small as a row of one image, and some images."""
    native = pytest.importorskip("deformconv.torch.native")
    torch = pytest.importorskip("torch")
    call = make(case)
    spec = call.spec
    tensors = [None if array is None else torch.from_numpy(array) for array in call.arrays]
    grad_output = torch.from_numpy(call.grad_output)

    def results() -> tuple[Any, Gradients]:
        output = native.forward_in_parts(DEFORM_AGGREGATE, portable, spec, tensors)
        return output, native.backward_in_parts(DEFORM_AGGREGATE, portable, spec, grad_output, tensors, given(call))

    whole, gradients = results()
    monkeypatch.setattr(taps, "CHUNK", chunk)
    assert len(list(portable.parts(spec))) > 1
    found, theirs = results()
    assert_close(found, whole, "float64")
    for name in given(call):
        assert_close(getattr(theirs, name), getattr(gradients, name), "float64", name)


def given(call: Call) -> Collection[str]:
    return [name for name in ARGUMENTS if getattr(call, name) is not None]


@pytest.mark.parametrize(
    ("library", "backward", "reason"),
    [
        ("numpy", False, None),
        ("torch", True, None),
        ("numpy", True, "NumPy has no automatic derivative."),
        ("jax", True, None),
        ("cupy", True, "differentiate deform_aggregate with cupy itself"),
        ("mxnet", False, "mxnet has no array-API functions."),
    ],
)
def test_reasons(library: str, backward: bool, reason: str | None) -> None:
    reasons = portable.reasons_against(make(SMALL).spec, library, "cpu", backward)
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


def test_what_is_said_of_a_call() -> None:
    spec = make(SMALL).spec
    assert portable.how(spec, "numpy", "cpu", False) == []
    assert portable.how(spec, "torch", "cpu", False) == ["PyTorch's own operations compute the call at once"]
    large = dataclasses.replace(spec, batch=64, output_size=(512, 512), input_size=(512, 512))
    assert portable.how(large, "torch", "cpu", False) == [
        f"PyTorch's own operations compute the call in {len(list(portable.parts(large)))} parts, one after the other, so that "
        "memory stays bounded"
    ]
    assert np.prod([part.batch for _, _, part in portable.parts(large)]) == 1
