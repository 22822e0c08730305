"""The array-library form of sampling against the rule, position by position."""

from __future__ import annotations

import numpy as np
import pytest
from tests.tolerances import assert_close

from deformconv.sampling import gather, rule

SIZES = {1: (5,), 2: (3, 4), 3: (2, 3, 4)}
ODD = [np.nan, np.inf, -np.inf, 1e30, rule.REACH, -1.0, 0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("boundary", ["zeros", "inside"])
@pytest.mark.parametrize("D", [1, 2, 3])
def test_values_follow_the_rule(D: int, boundary: str, dtype: str) -> None:
    random = np.random.default_rng(0)
    pixels = random.normal(size=(2, 3, *SIZES[D])).astype(dtype)
    base = [random.integers(-2, size + 2, (4, 9)) for size in SIZES[D]]
    offset = [random.normal(size=(2, 4, 9)).astype(dtype) for _ in range(D)]
    for axis_offset in offset:
        chosen = random.random(axis_offset.shape) < 0.1
        axis_offset[chosen] = random.choice(ODD, size=int(chosen.sum()))
    samples = gather.interpolate(pixels, base, offset, boundary)
    assert samples.dtype == dtype
    expected = np.empty((2, 4, 9, 3))
    for image, *at in np.ndindex(2, 4, 9):
        position = [axis_base[tuple(at)] for axis_base in base], [o[(image, *at)] for o in offset]
        expected[(image, *at)], _ = rule.interpolate(pixels[image].astype(float), *position, boundary)
    assert_close(samples, expected, dtype)


def test_pixels_outside_are_not_read() -> None:
    """Where an index is moved into the map to be safe, the pixel found there must not count."""
    pixels = np.full((1, 1, 3), np.inf)
    offset = [np.array([[-5.0, -1.0, 2.0, 3.0, 7.0]])]
    with np.errstate(invalid="ignore"):  # inf * 0, for the second
        samples = gather.interpolate(pixels, [np.zeros(5, np.int64)], offset, "zeros")
    np.testing.assert_array_equal(samples.ravel(), [0, np.nan, np.inf, 0, 0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("boundary", rule.BOUNDARIES)
@pytest.mark.parametrize("D", [1, 2, 3])
def test_absolute_positions_follow_the_rule(D: int, boundary: str, dtype: str) -> None:
    random = np.random.default_rng(1)
    pixels = random.normal(size=(2, 3, *SIZES[D])).astype(dtype)
    position = [random.uniform(-2, size + 2, (2, 4, 9)).astype(dtype) for size in SIZES[D]]
    for coordinates in position:
        chosen = random.random(coordinates.shape) < 0.2
        coordinates[chosen] = random.choice(ODD, size=int(chosen.sum()))
    samples = gather.interpolate_at(pixels, position, boundary)
    assert samples.dtype == dtype
    expected = np.empty((2, 4, 9, 3))
    for image, *at in np.ndindex(2, 4, 9):
        here = [float(coordinates[(image, *at)]) for coordinates in position]
        expected[(image, *at)], _ = rule.interpolate_at(pixels[image].astype(float), here, boundary)
    assert_close(samples, expected, dtype)


@pytest.mark.parametrize("boundary", rule.BOUNDARIES)
def test_derivatives_at_absolute_positions_follow_the_rule(boundary: str) -> None:
    """PyTorch's own derivative of the gathers, NaN and what is out of reach among the positions."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(2)
    pixels = random.normal(size=(2, 3, 3, 4))
    position = random.uniform(-2, 6, (2, 2, 30))
    chosen = random.random(position.shape) < 0.3
    position[chosen] = random.choice(ODD, size=int(chosen.sum()))
    tensors = [torch.from_numpy(coordinates).requires_grad_() for coordinates in position]
    samples = gather.interpolate_at(torch.from_numpy(pixels), tensors, boundary)  # (B, Q, C)
    assert samples.dtype is torch.float64
    found = torch.autograd.grad(samples.sum(), tensors)
    for image, q in np.ndindex(2, 30):
        _, d_value = rule.interpolate_at(pixels[image], position[:, image, q].tolist(), boundary)
        expected = d_value.sum(axis=1)
        np.testing.assert_allclose([gradient[image, q] for gradient in found], expected, rtol=1e-12, atol=1e-12)
