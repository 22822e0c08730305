"""The portable form: on NumPy and on PyTorch, which differentiates it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.ops.roi_pool.cases import Array, Call
from tests.ops.roi_pool.suite import BackendSuite, ForwardSuite

from deformconv.ops.roi_pool import portable
from deformconv.ops.roi_pool.spec import Gradients


class TestPortableNumPy(ForwardSuite):
    backend = portable


class TestPortableTorch(BackendSuite):
    backend = portable

    def output(self, call: Call) -> Array:
        torch = pytest.importorskip("torch")
        tensors = [None if array is None else torch.from_numpy(np.ascontiguousarray(array)) for array in call.arrays]
        found: Array = portable.forward(call.spec, *tensors).numpy()
        return found

    def gradients(self, call: Call, wanted: Any = ("input", "offset", "mask")) -> Gradients:
        torch = pytest.importorskip("torch")
        names = ("input", "boxes", "offset", "mask")
        tensors = [
            None if array is None else torch.from_numpy(array.copy()).requires_grad_(name in wanted)
            for name, array in zip(names, call.arrays, strict=True)
        ]
        output = portable.forward(call.spec, *tensors)
        output.backward(torch.from_numpy(call.grad_output))
        found = {
            name: tensor.grad.numpy()
            for name, tensor in zip(names, tensors, strict=True)
            if tensor is not None and tensor.requires_grad
        }
        return Gradients(**found)
