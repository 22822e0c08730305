"""Random small calls: the compiled kernels beside the portable form, which PyTorch differentiates."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from tests.ops.attention.cases import ARGUMENTS, Array, spec_of
from tests.tolerances import assert_close

from deformconv.ops.attention import cpu, portable
from deformconv.ops.attention.spec import AttentionSpec

pytestmark = pytest.mark.slow


def random_call(random: np.random.Generator) -> tuple[AttentionSpec, list[Array]]:
    """Any number of everything; locations in the levels, on pixels, over their edges, huge, or not finite."""
    levels = tuple((int(height), int(width)) for height, width in random.integers(1, 9, (random.integers(1, 5), 2)))
    heads, points, images = (int(random.integers(1, most)) for most in (5, 9, 4))
    queries = int(random.integers(0, 140 if random.random() < 0.2 else 6))
    channels = int(random.choice([1, 3, 8, 16, 20, 32, 64, 100]))
    shape = (images, queries, heads, len(levels), points)
    locations = random.uniform(*random.choice([(0.0, 1.0), (-0.3, 1.3), (-3.0, 4.0)]), (*shape, 2))
    if random.random() < 0.3:
        locations = np.round(locations * 16) / 16
    if random.random() < 0.2:
        locations *= random.choice([1e3, 1e12, 1e38, 1e300])
    if queries and random.random() < 0.3:
        locations.flat[random.integers(locations.size)] = random.choice([np.nan, np.inf, -np.inf, 1e308])
    value = random.normal(size=(images, sum(map(prod, levels)), heads, channels))
    arrays = [value, locations, random.uniform(-1, 1, shape)]
    return spec_of(levels, arrays), arrays


@pytest.mark.parametrize("seed", range(4))
def test_kernels_and_portable_form_agree(seed: int) -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(seed)
    for number in range(75):
        spec, arrays = random_call(random)
        what, grad_output = f"call {number}: {spec}", random.normal(size=spec.output_shape)
        tensors: list[Any] = [torch.from_numpy(array.copy()).requires_grad_() for array in arrays]
        output = portable.forward(spec, *tensors)
        assert_close(cpu.forward(spec, *arrays), output.detach().numpy(), "float64", what)
        output.backward(torch.from_numpy(grad_output))
        found = cpu.backward(spec, grad_output, *arrays, ARGUMENTS)
        for name, tensor in zip(ARGUMENTS, tensors, strict=True):
            assert_close(getattr(found, name), tensor.grad.numpy(), "float64", f"{name} of {what}")
