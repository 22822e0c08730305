"""The reference: finite differences, and what other libraries compute that have an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.ops.roi_pool.cases import CASES, Array, Call, Case, make, parameters
from tests.ops.roi_pool.suite import WANTED, by_convention, reference_gradients, reference_output
from tests.tolerances import assert_close

from deformconv.ops.roi_pool import reference

pytestmark = pytest.mark.slow  # plain loops; the fast tests rely on the reference


def total(call: Call) -> float:
    return float((reference.forward(call.spec, *call.arrays) * call.grad_output).sum())


@pytest.mark.parametrize("case", [case for case in CASES if case.channels < 100], ids=lambda case: case.name)
def test_gradients_are_finite_differences(case: Case) -> None:
    """Steps of 1e-7 pass no kink of these random numbers."""
    call, random = make(case), np.random.default_rng(1)
    gradients = reference_gradients(call)._asdict()
    for name in WANTED:
        array = getattr(call, name)
        if array is None:
            assert gradients[name] is None
            continue
        for _ in range(3):
            direction = random.normal(size=array.shape)
            step = 1e-7 * direction
            difference = total(call.but(**{name: array + step})) - total(call.but(**{name: array - step}))
            expected = float((gradients[name] * direction).sum())
            assert abs(difference / 2e-7 - expected) < 2e-5 * max(1, np.abs(gradients[name] * direction).sum()), name


def tensors(call: Call) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(call.input), torch.from_numpy(call.boxes)


@pytest.mark.parametrize("convention", ["aligned", "unaligned"])
@pytest.mark.parametrize("sampling", [0, 1, 2, 3])
def test_without_offsets_it_is_torchvision_s_roi_align(convention: str, sampling: int) -> None:
    ops = pytest.importorskip("torchvision.ops")
    case = Case("align", deformed=False, masked=False, boxes=20, size=(20, 25), convention=convention, sampling=sampling)
    call = make(case)
    expected = ops.roi_align(*tensors(call), case.output_size, case.scale, sampling or -1, aligned=convention == "aligned")
    np.testing.assert_allclose(reference_output(call), expected.numpy(), rtol=0, atol=1e-12)


def test_position_sensitive_pooling_is_torchvision_s() -> None:
    ops = pytest.importorskip("torchvision.ops")
    case = Case("align", channels=36, output_size=(3, 3), deformed=False, masked=False, boxes=20, position_sensitive=True)
    call = make(case)
    expected = ops.ps_roi_align(*tensors(call), case.output_size[0], case.scale, case.sampling)
    np.testing.assert_allclose(reference_output(call), expected.numpy(), rtol=0, atol=1e-12)


def by_grid_sample(case: Case, input: Any, boxes: Any, offset: Any, mask: Any) -> Any:
    """Pooling as PyTorch's grid_sample computes it, at places that are moved onto the map; those too far away count as 0."""
    import torch

    S = case.sampling
    places, inside = [], torch.ones(())
    for axis in range(2):  # x, y
        bins, size = case.output_size[1 - axis], case.size[1 - axis]
        low, high = boxes[:, 1 + axis, None, None] * case.scale, boxes[:, 3 + axis, None, None] * case.scale
        start = low - 0.5 if case.convention == "aligned" else low
        length = high - low if case.convention == "aligned" else (high - low).clamp(min=1)
        cells = (torch.arange(bins * S, dtype=input.dtype) + 0.5) / S
        cells = cells[None, None, :] if axis == 0 else cells[None, :, None]
        moved = offset[:, axis].repeat_interleave(S, 1).repeat_interleave(S, 2)  # (R, PH*S, PW*S)
        place = start + length * (case.gamma * moved + cells / bins)
        inside = inside * ((place >= -1) & (place <= size))
        places.append(place / (size - 1) * 2 - 1)
    images = input[boxes[:, 0].long()]
    grid = torch.stack(places, -1)
    found = torch.nn.functional.grid_sample(images, grid, "bilinear", "border", align_corners=True) * inside[:, None]
    return torch.nn.functional.avg_pool2d(found, S) * mask


@pytest.mark.parametrize("convention", ["aligned", "unaligned"])
@pytest.mark.parametrize("sampling", [1, 2, 3])
@pytest.mark.parametrize("spread", [0.5, 6.0])
def test_moved_bins_are_grid_samples(convention: str, sampling: int, spread: float) -> None:
    """Outputs and the three gradients, also where boxes reach over the map's border and offsets move bins beyond it."""
    torch = pytest.importorskip("torch")
    case = Case(f"grid {spread}", boxes=16, size=(11, 14), convention=convention, sampling=sampling, spread=spread)
    call = make(case)
    given = [torch.from_numpy(array).requires_grad_() for array in call.arrays]
    output = by_grid_sample(case, *given)
    np.testing.assert_allclose(reference_output(call), output.detach().numpy(), rtol=0, atol=1e-12)
    leaves = [given[number] for number in (0, 2, 3)]
    gradients = torch.autograd.grad(output, leaves, torch.from_numpy(call.grad_output))
    ours = reference_gradients(call)
    for name, gradient in zip(WANTED, gradients, strict=True):
        np.testing.assert_allclose(getattr(ours, name), gradient.numpy(), rtol=0, atol=1e-10, err_msg=name)


def test_mmcv_s_printed_numbers() -> None:
    """The numbers of mmcv's own test of its kernel, tests/test_ops/test_deform_roi_pool.py."""
    case = Case("mmcv", channels=1, size=(2, 2), batch=1, boxes=1, output_size=(2, 2), scale=1.0, deformed=False, masked=False)
    boxes = np.array([[0.0, 0.0, 0.0, 1.0, 1.0]])
    call = make(case).but(input=np.array([[[[1.0, 2.0], [3.0, 4.0]]]]), boxes=boxes, grad_output=np.ones((1, 1, 2, 2)))
    np.testing.assert_allclose(reference_output(call)[0, 0], [[1.0, 1.25], [1.5, 1.75]], rtol=0, atol=1e-12)
    gradient = reference_gradients(call).input[0, 0]
    np.testing.assert_allclose(gradient, [[3.0625, 0.4375], [0.4375, 0.0625]], rtol=0, atol=1e-12)


@by_convention
def test_modulation_is_a_product_after_pooling(convention: str) -> None:
    call = make(Case("modulation", convention=convention))
    plain = make(Case("modulation", convention=convention, masked=False)).but(
        offset=call.offset, input=call.input, boxes=call.boxes
    )
    np.testing.assert_allclose(reference_output(call), reference_output(plain) * call.mask, rtol=1e-13)


def test_how_far_the_conventions_are_apart() -> None:
    """The first bin of a box over a ramp of columns, in the words of the guide."""
    ramp = np.broadcast_to(np.arange(40.0), (1, 1, 40, 40)).copy()
    boxes = np.array([[0.0, 160, 160, 480, 480]])
    found: dict[Any, Array] = {}
    for convention, sampling in (("rounded", 1), ("rounded", 2), ("rounded", 4), ("aligned", 2), ("unaligned", 2)):
        case = Case(
            "ramp", channels=1, size=(40, 40), batch=1, boxes=1, output_size=(7, 7), scale=1 / 16, sampling=sampling,
            convention=convention, deformed=False, masked=False,
        )  # fmt: skip
        found[convention, sampling] = reference_output(make(case).but(input=ramp, boxes=boxes))[0, 0, 0, 0]
    rounded = [found["rounded", sampling] for sampling in (1, 2, 4)]
    np.testing.assert_allclose(rounded, [9.5, 10.22, 10.57], atol=0.01)
    np.testing.assert_allclose([found["aligned", 2], found["unaligned", 2]], [10.93, 11.43], atol=0.01)
    assert parameters(CASES[0])["convention"] == "aligned"
    assert_close(found["aligned", 2], 10.0 - 0.5 + 20 / 7 / 2, "float64")
