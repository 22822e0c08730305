"""What the NumPy front end does for any backend."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from tests.ops.conv.cases import CASES, make

from deformconv.numpy import run
from deformconv.ops.conv import cpu, portable, reference
from deformconv.ops.conv.operator import DEFORM_CONV
from deformconv.ops.conv.spec import GRADIENTS


@pytest.mark.parametrize("module", [cpu, portable, reference])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_an_output_is_written_into_the_caller_s_array_whatever_the_backend(module: ModuleType, dtype: str) -> None:
    call = make(CASES[4], dtype)
    expected = run.forward_on(DEFORM_CONV, module, call.spec, call.arrays)
    out = np.full_like(expected, np.nan)
    assert run.forward_on(DEFORM_CONV, module, call.spec, call.arrays, out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("module", [cpu, reference])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_are_written_into_the_caller_s_arrays_whatever_the_backend(module: ModuleType, dtype: str) -> None:
    call = make(CASES[4], dtype)
    arrays = [call.input, call.offset, call.weight, call.mask]
    wanted = GRADIENTS if module is cpu else ("input", "weight", "mask")
    expected = run.backward_on(DEFORM_CONV, module, call.spec, call.grad_output, arrays, wanted)
    out = {name: np.full_like(getattr(expected, name), np.nan) for name in wanted if name != "mask"}
    found = run.backward_on(DEFORM_CONV, module, call.spec, call.grad_output, arrays, wanted, out)
    for name in wanted:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == dtype
        assert name == "mask" or getattr(found, name) is out[name]
