"""The portable form: the suite, on NumPy's arrays and by PyTorch's derivative."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.ops.attention.cases import ARGUMENTS, Array, Call
from tests.ops.attention.suite import BackendSuite, ForwardSuite

from deformconv.ops.attention import portable
from deformconv.ops.attention.spec import Gradients


class TestNumPy(ForwardSuite):
    backend = portable


class TestTorch(BackendSuite):
    def tensors(self, call: Call, wanted: Any = ()) -> list[Any]:
        torch = pytest.importorskip("torch")
        given = [torch.from_numpy(array.copy()) for array in call.arrays]
        return [tensor.requires_grad_(name in wanted) for name, tensor in zip(ARGUMENTS, given, strict=True)]

    def output(self, call: Call) -> Array:
        found: Array = portable.forward(call.spec, *self.tensors(call)).numpy()
        return found

    def gradients(self, call: Call, wanted: Any = ARGUMENTS) -> Gradients:
        torch = pytest.importorskip("torch")

        given = self.tensors(call, wanted)
        output = portable.forward(call.spec, *given)
        leaves = [tensor for tensor in given if tensor.requires_grad]
        found = torch.autograd.grad(output, leaves, torch.from_numpy(call.grad_output)) if leaves else ()
        return Gradients(**dict(zip([name for name in ARGUMENTS if name in wanted], map(np.asarray, found), strict=True)))
