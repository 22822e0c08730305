"""The reference: the suite, finite differences, deformable convolution with weights of ones, and torchvision's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tests.ops.aggregate.cases import ARGUMENTS, CASES, Array, Call, Case, as_convolution, make
from tests.ops.aggregate.suite import SMALL, GradientRules, expected_gradients, expected_output, reference_backward
from tests.ops.conv import suite as conv
from tests.ops.rules import by_boundary
from tests.tolerances import assert_close

from deformconv.ops.aggregate import reference
from deformconv.ops.aggregate.spec import GRADIENTS

pytestmark = pytest.mark.slow  # plain loops; the fast tests rely on the reference

DIFFERENCED = [
    Case("1-D", (7,), (3,), stride=2, padding=((2, 1),), dilation=2, offset_groups=2),
    Case("2-D", (4, 3), (3, 2), stride=(2, 1), padding=((1, 0), (0, 2)), dilation=(1, 2), offset_groups=2),
    Case("2-D, without a mask", (3, 4), (2, 3), channels=2, padding=1, masked=False),
    Case("3-D", (3, 2, 3), (2, 1, 2), batch=1, padding=(1, 0, 1), offset_groups=2),
]


def directions(call: Call, name: str) -> Iterator[Array]:
    """Directions, of elements up to 1, along which the output is linear as far as the next kink.

    It is linear in input and mask, and in the offset along each axis, since samples are independent.
    """
    random = np.random.default_rng(1)
    array = getattr(call, name)
    if name != "offset":
        yield from random.uniform(-1, 1, (3, *array.shape))
        return
    for axis in range(call.spec.rank):
        direction = np.zeros(array.shape)
        direction[:, axis :: call.spec.rank] = random.uniform(0, 1, array.shape)[:, axis :: call.spec.rank]
        yield direction


def total(call: Call) -> float:
    return float((reference.forward(call.spec, *call.arrays) * call.grad_output).sum())


class TestReference(GradientRules):
    backend = reference
    dtypes = ("float64",)  # it computes in no other

    @by_boundary
    @pytest.mark.parametrize("case", DIFFERENCED, ids=lambda case: case.name)
    def test_gradients_are_finite_differences(self, case: Case, boundary: str) -> None:
        call = make(case.but(boundary=boundary), away_from_kinks=True)
        gradients = reference_backward(call)._asdict()
        assert (gradients["mask"] is None) == (not case.masked)
        for name in GRADIENTS:
            array = getattr(call, name)
            for direction in () if array is None else directions(call, name):
                step = 0.05 * direction
                ahead, behind = (total(call.but(**{name: array + s})) for s in (step, -step))
                assert (ahead - behind) / 2 == pytest.approx((gradients[name] * step).sum(), rel=1e-9, abs=1e-11)

    @by_boundary
    def test_kinks_have_the_derivative_on_their_right(self, boundary: str) -> None:
        call = make(Case("", (4, 5), (2, 2), padding=1, boundary=boundary))
        call = call.but(offset=np.random.default_rng(0).integers(-2, 3, call.offset.shape).astype(float))
        gradient = reference_backward(call).offset
        for direction in directions(call, "offset"):
            ahead = total(call.but(offset=call.offset + direction / 2))
            assert ahead - total(call) == pytest.approx((gradient * direction / 2).sum(), rel=1e-9, abs=1e-11)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_result_is_rounded_to_the_dtype_of_the_input(self, dtype: str) -> None:
        output, gradients = self.output(make(SMALL, dtype)), self.gradients(make(SMALL, dtype))
        assert {array.dtype.name for array in (output, *gradients)} == {dtype}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_depthwise_convolution_with_weights_of_ones(case: Case) -> None:
    convolution = as_convolution(make(case))
    assert_close(expected_output(case, "float64"), conv.in_float64(convolution, conv.reference.forward), "float64")
    gradients = conv.reference_backward(convolution)
    for name in ARGUMENTS:
        if getattr(gradients, name) is not None:
            assert_close(getattr(expected_gradients(case, "float64"), name), getattr(gradients, name), "float64", name)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.size) == 2], ids=lambda case: case.name)
def test_parity_with_torchvision(case: Case) -> None:
    """Forward and backward in float64. torchvision has one padding per axis and the "zeros" rule alone."""
    torch = pytest.importorskip("torch")
    operators = pytest.importorskip("torchvision.ops")
    padding = case.padding if isinstance(case.padding, int) or np.ndim(case.padding) == 1 else (2, 1)
    call = make(case.but(boundary="zeros", padding=padding))
    spec = call.spec
    leaves = [None if array is None else torch.tensor(array, requires_grad=True) for array in call.arrays]
    input, offset, mask = leaves
    ones = torch.ones(spec.channels, 1, *spec.kernel_size, dtype=torch.float64)
    output = operators.deform_conv2d(
        input, offset, ones, None, spec.stride, [before for before, _ in spec.padding], spec.dilation, mask
    )
    assert_close(reference.forward(spec, *call.arrays), output.detach(), "float64")
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(output, given, torch.tensor(call.grad_output)))
    for name, leaf, gradient in zip(GRADIENTS, leaves, reference_backward(call), strict=True):
        if leaf is not None:
            assert_close(gradient, next(gradients), "float64", name)


def test_reasons() -> None:
    spec = make(SMALL).spec
    assert reference.reasons_against(spec, "numpy", "cpu", True) == []
    assert len(reference.reasons_against(spec, "torch", "cuda:0", False)) == 2
