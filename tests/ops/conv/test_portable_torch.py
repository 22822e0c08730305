"""The portable backend on torch: values, automatic derivatives of every order, transforms, devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.ops.conv.cases import Array, Call, Case, make
from tests.ops.conv.suite import SMALL, ConvSuite, in_float64, named, reference_backward
from tests.ops.rules import by_boundary
from tests.tolerances import assert_close

from deformconv.ops.conv import portable, reference
from deformconv.ops.conv.operator import DEFORM_CONV
from deformconv.ops.conv.spec import GRADIENTS

torch = pytest.importorskip("torch")
native = pytest.importorskip("deformconv.torch.native")
pytestmark = pytest.mark.slow  # the other kind of array, in test_portable.py, takes a tenth of the time

# torch itself calls what it deprecates when it first loads its forward-mode rules.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")


class Differentiated:
    """The portable form, and PyTorch's derivative of it."""

    forward = staticmethod(portable.forward)

    @staticmethod
    def backward(spec: Any, grad_output: Any, *arguments: Any) -> Any:
        *operands, wanted = arguments
        return native.backward(DEFORM_CONV, spec, grad_output, operands, wanted)


class TestOnTorch(ConvSuite):
    backend = Differentiated

    def array(self, array: Array) -> Any:
        usable = array.flags.writeable and min(array.strides, default=0) >= 0
        return torch.from_numpy(array if usable else array.copy())

    def numpy(self, array: Any) -> Array:
        return array.detach().numpy()

    def tensors(self, call: Call) -> list[Any]:
        """Leaves for input, offset, weight, bias and mask."""
        return [None if array is None else self.array(array).requires_grad_() for array in call.arrays]

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_is_computed_in_float32(self, dtype: str) -> None:
        call = make(SMALL)
        half = getattr(torch, dtype)
        arrays = [tensor.detach().to(half).requires_grad_() for tensor in self.tensors(call)]
        grad_output = self.array(call.grad_output).to(half)
        output = portable.forward(half_spec(call, dtype), *arrays)
        gradients = torch.autograd.grad(output, arrays, grad_output)
        assert {result.dtype for result in (output, *gradients)} == {half}
        rounded = [tensor.detach().double().numpy() for tensor in (*arrays, grad_output)]
        call = call.but(**dict(zip(named(call), rounded, strict=True)))
        assert_close(output.detach().double(), in_float64(call, reference.forward), dtype)
        for name, gradient, expected in zip(GRADIENTS, gradients, in_float64(call, reference_backward), strict=True):
            assert_close(gradient.double(), expected, dtype, name)

    def test_autograd_is_deform_conv_backward(self) -> None:
        call = make(SMALL)
        leaves = self.tensors(call)
        output = portable.forward(call.spec, *leaves)
        gradients = torch.autograd.grad(output, leaves, self.array(call.grad_output))
        for name, gradient, expected in zip(GRADIENTS, gradients, self.gradients(call), strict=True):
            assert_close(gradient, expected, "float64", name)

    def test_gradients_can_be_differentiated(self) -> None:
        call = make(SMALL)
        _, offset, weight, _, mask = leaves = self.tensors(call)
        operands = (leaves[0], offset, weight, mask)
        gradients = native.backward(DEFORM_CONV, call.spec, self.array(call.grad_output), operands, GRADIENTS)
        assert torch.autograd.grad(gradients.weight.sum(), offset)[0].any()

    @by_boundary
    @pytest.mark.parametrize(
        "case",
        [
            Case("1-D", (4,), (2,), batch=1, in_channels=2, out_channels=2, padding=1, offset_groups=2),
            Case(
                "2-D",
                (3, 3),
                (2, 2),
                batch=1,
                in_channels=2,
                out_channels=2,
                stride=2,
                padding=((1, 0), (0, 1)),
                groups=2,
            ),
            Case("3-D", (2, 3, 2), (1, 2, 2), batch=1, in_channels=1, out_channels=1, stride=(1, 2, 1)),
        ],
        ids=lambda case: case.name,
    )
    def test_derivatives_of_first_and_second_order(self, case: Case, boundary: str) -> None:
        call = make(case.but(boundary=boundary), away_from_kinks=True)

        def output(*arrays: Any) -> Any:
            return portable.forward(call.spec, *arrays)

        assert torch.autograd.gradcheck(output, self.tensors(call))
        assert torch.autograd.gradgradcheck(output, self.tensors(call))

    @forward_mode
    def test_forward_mode_agrees_with_reverse_mode(self) -> None:
        call = make(SMALL)
        arrays = [tensor.detach() for tensor in self.tensors(call)]
        tangents = [torch.from_numpy(array) for array in make(SMALL, seed=1).arrays]
        _, tangent = torch.func.jvp(lambda *a: portable.forward(call.spec, *a), tuple(arrays), tuple(tangents))
        cotangents = self.gradients(call)
        expected = sum(float((t.numpy() * c).sum()) for t, c in zip(tangents, cotangents, strict=True))
        assert_close((tangent.numpy() * call.grad_output).sum(), expected, "float64")

    def test_vmap_is_a_loop(self) -> None:
        call = make(SMALL)
        arrays = [tensor.detach() for tensor in self.tensors(call)]
        batched = [torch.stack([array, 2 * array]) for array in arrays]
        outputs = torch.func.vmap(lambda *a: portable.forward(call.spec, *a))(*batched)
        for i in range(2):
            one = portable.forward(call.spec, *(array[i] for array in batched))
            assert_close(outputs[i], one, "float64")

    def test_shapes_without_memory(self) -> None:
        call = make(SMALL.but(batch=3))
        leaves = [tensor.detach().to("meta").requires_grad_() for tensor in self.tensors(call)]
        output = portable.forward(call.spec, *leaves)
        gradients = torch.autograd.grad(output, leaves, torch.empty_like(output))
        assert output.is_meta
        assert output.shape == call.spec.output_shape
        assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]

    @forward_mode
    def test_nan_in_higher_derivatives_stays_in_its_sample(self) -> None:
        """A Hessian's rows and columns of one tap are NaN; the rest is as if the tap were not there."""
        call = make(Case("", (4,), (2,), batch=1, in_channels=1, out_channels=1), away_from_kinks=True)
        input, offset, weight, bias, mask = (tensor.detach() for tensor in self.tensors(call))

        def hessian(offset: Any, mask: Any) -> Any:
            def total(offset: Any) -> Any:
                return (portable.forward(call.spec, input, offset, weight, bias, mask) ** 2).sum()

            return torch.func.hessian(total)(offset).reshape(offset.numel(), -1)

        expected = hessian(offset, mask)
        offset[0, 1, 2] = torch.nan
        found = hessian(offset, mask)
        at_position = torch.tensor([2, 3 + 2])  # both taps of output position 2 meet in its square
        other = torch.tensor([0, 1, 3, 4])
        assert_close(found[other][:, other], expected[other][:, other], "float64")
        assert found[at_position[1], at_position[1]].isnan()
        assert not found[other].isnan().any()


def half_spec(call: Call, dtype: str) -> Any:
    """The call's spec for a dtype that NumPy lacks."""
    return dataclasses.replace(call.spec, dtype=dtype)
