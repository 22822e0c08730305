"""The portable backend on NumPy, and its reasons."""

from __future__ import annotations

import pytest
from tests.ops.conv.cases import make
from tests.ops.conv.suite import SMALL, ForwardSuite, in_float64
from tests.tolerances import assert_close

from deformconv import BackendError, deform_conv_backward
from deformconv.ops.conv import portable, reference


class TestOnNumPy(ForwardSuite):
    backend = portable

    def test_half_precision_is_computed_in_float32(self) -> None:
        call = make(SMALL, "float16")
        output = self.output(call)
        assert output.dtype == "float16"
        assert_close(output, in_float64(call, reference.forward), "float16")

    def test_backward_raises(self) -> None:
        c = make(SMALL)
        with pytest.raises(BackendError, match="portable: NumPy has no automatic derivative"):
            deform_conv_backward(c.grad_output, c.input, c.offset, c.weight, padding=1, mask=c.mask, backend="portable")


@pytest.mark.parametrize(
    ("library", "backward", "reason"),
    [
        ("numpy", False, None),
        ("torch", False, None),
        ("torch", True, None),
        ("numpy", True, "NumPy has no automatic derivative."),
        ("jax", True, None),
        ("cupy", True, "differentiate deform_conv with cupy itself"),
        ("mxnet", False, "mxnet has no array-API functions."),
    ],
)
def test_reasons(library: str, backward: bool, reason: str | None) -> None:
    reasons = portable.reasons_against(make(SMALL).spec, library, "cpu", backward)
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]
