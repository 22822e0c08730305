"""What programs hold: the kernels' calls for CPUs alone, and the portable form where sizes are symbols."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import export
from tests.jax.arrays import SMALL, assert_same, call_of, loss_of, quickly_compiled, x64  # noqa: F401

import deformconv
from deformconv.jax import deform_conv

ALL = (0, 1, 2, 3, 4)


def program(function, arrays, *platforms):
    return export.export(jax.jit(function), platforms=platforms, disabled_checks=KERNELS)(*arrays)


KERNELS = [export.DisabledSafetyCheck.custom_call(f"deformconv_{name}") for name in ("forward", "backward")]


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_other_platforms_get_the_portable_form(platform):
    """The output, gradients, and a forward-mode derivative."""
    call = call_of(SMALL, "float32")
    for function in (call.ours, jax.grad(loss_of(call.ours), ALL), lambda *a: jax.jvp(call.ours, a, a)):
        text = program(function, call.arrays, platform).mlir_module()
        assert "custom_call" not in text and "gather" in text


def test_a_program_for_several_platforms_has_both():
    call = call_of(SMALL, "float32")
    text = program(jax.value_and_grad(loss_of(call.ours)), call.arrays, "cpu", "cuda").mlir_module()
    assert text.count("@deformconv_forward") == text.count("@deformconv_backward") == 1 and "gather" in text


def test_a_backend_of_the_cpu_for_another_platform():
    call = call_of(SMALL, "float32", backend="cpu")
    with pytest.raises(deformconv.BackendError, match="cpu: its kernels run on the CPU and the arrays are on cuda"):
        program(call.ours, call.arrays, "cuda")


def test_sizes_that_are_symbols():
    """A program for any number of images of any size, forward and backward."""
    call = call_of(SMALL)
    n, h, w = export.symbolic_shape("n, h, w", constraints=["n >= 1", "h >= 2", "w >= 1"])
    shapes = {"input": (n, 4, h, w), "offset": (n, 8, h + 1, w + 2), "mask": (n, 4, h + 1, w + 2)}
    operands = [
        jax.ShapeDtypeStruct(shapes.get(name, array.shape), array.dtype)
        for name, array in zip(call.names, call.arrays, strict=True)
    ]
    for function in (call.ours, jax.grad(loss_of(call.ours), ALL)):
        exported = program(function, operands, "cpu")
        assert "@deformconv" not in exported.mlir_module()
        for case in (SMALL, SMALL.but(batch=3, size=(6, 5))):
            arrays = call_of(case).arrays
            assert_same(exported.call(*arrays), jax.jit(function)(*arrays))
    with pytest.raises(
        deformconv.BackendError, match=r'backend="cpu" cannot run a call whose sizes are symbols \(input \(n, 4'
    ):
        program(call_of(SMALL, backend="cpu").ours, operands, "cpu")
    with pytest.raises(deformconv.ShapeError, match="`offset` has a batch of"):
        program(call.ours, [operands[0], jax.ShapeDtypeStruct((2, 8, h + 1, w + 2), "float64"), *operands[2:]], "cpu")


def test_shapes_without_numbers():
    call = call_of(SMALL)
    shape = jax.eval_shape(call.ours, *call.arrays)
    assert (shape.shape, shape.dtype) == (call.spec.output_shape, "float64")


def test_no_images():
    x, offset, weight = np.zeros((0, 2, 5, 5)), np.zeros((0, 18, 3, 3)), np.ones((3, 2, 3, 3))
    output, pull_back = jax.vjp(jax.jit(deform_conv), *map(jax.numpy.asarray, (x, offset, weight)))
    assert output.shape == (0, 3, 3, 3)
    gradients = pull_back(output)
    assert gradients[0].shape == x.shape and not np.any(gradients[2])
