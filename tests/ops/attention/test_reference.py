"""The reference: finite differences, and what PyTorch's grid_sample and transformers compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.ops.attention.cases import ARGUMENTS, CASES, Call, Case, make
from tests.ops.attention.suite import expected_gradients, expected_output

from deformconv.ops.attention import reference


def total(call: Call) -> float:
    return float((reference.forward(call.spec, *call.arrays) * call.grad_output).sum())


@pytest.mark.parametrize("case", [case for case in CASES if case.channels < 9], ids=lambda case: case.name)
def test_gradients_are_finite_differences(case: Case) -> None:
    """Steps of 1e-7 pass no kink of these random numbers."""
    call, random = make(case), np.random.default_rng(1)
    gradients = expected_gradients(case, "float64")
    for name in ARGUMENTS:
        array, gradient = getattr(call, name), getattr(gradients, name)
        direction = random.normal(size=array.shape)
        step = 1e-7 * direction
        difference = total(call.but(**{name: array + step})) - total(call.but(**{name: array - step}))
        expected = float((gradient * direction).sum())
        assert abs(difference / 2e-7 - expected) < 2e-6 * max(1, np.abs(gradient * direction).sum()), name


def by_grid_sample(levels: Any, value: Any, locations: Any, weights: Any) -> Any:
    """Attention as PyTorch's grid_sample computes it, head by head and level by level."""
    import torch

    outputs = []
    for head in range(value.shape[2]):
        start, total = 0, 0
        for number, (height, width) in enumerate(levels):
            pixels = value[:, start : start + height * width, head].unflatten(1, (height, width)).permute(0, 3, 1, 2)
            grid = 2 * locations[:, :, head, number] - 1
            found = torch.nn.functional.grid_sample(pixels, grid, "bilinear", "zeros", align_corners=False)
            total = total + torch.einsum("ncqp,nqp->nqc", found, weights[:, :, head, number])
            start += height * width
        outputs.append(total)
    return torch.cat(outputs, -1)


def by_transformers(levels: Any, value: Any, locations: Any, weights: Any) -> Any:
    """Attention as transformers' eager layer computes it."""
    import torch

    name = "transformers.models.deformable_detr.modeling_deformable_detr"
    layer = pytest.importorskip(name).MultiScaleDeformableAttention()
    return layer(value, torch.tensor(levels), list(levels), None, locations, weights, 64)


@pytest.mark.parametrize("theirs", [by_grid_sample, by_transformers])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_are_theirs(case: Case, theirs: Any) -> None:
    torch = pytest.importorskip("torch")
    call = make(case)
    given = [torch.from_numpy(array.copy()).requires_grad_() for array in call.arrays]
    output = theirs(case.levels, *given)
    np.testing.assert_allclose(expected_output(case, "float64"), output.detach().numpy(), rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(output, given, torch.from_numpy(call.grad_output))
    ours = expected_gradients(case, "float64")
    for name, gradient in zip(ARGUMENTS, gradients, strict=True):
        np.testing.assert_allclose(getattr(ours, name), gradient.numpy(), rtol=0, atol=1e-11, err_msg=name)


def test_weights_are_factors_and_pixel_centres_are_values() -> None:
    """A location at the middle of a pixel gives its value; the sum over levels and points is linear in the weights."""
    case = Case("identity", batch=1, levels=((3, 4), (2, 2)), heads=1, channels=2, queries=12, points=1)
    call = make(case)
    rows, columns = np.divmod(np.arange(12), 4)
    locations = call.locations.copy()
    locations[0, :, 0, 0, 0] = np.stack([(columns + 0.5) / 4, (rows + 0.5) / 3], -1)
    weights = np.zeros_like(call.weights)
    weights[:, :, :, 0] = 3.0
    found = reference.forward(call.spec, call.value, locations, weights)
    np.testing.assert_allclose(found[0], 3 * call.value[0, :12, 0], rtol=0, atol=1e-14)
