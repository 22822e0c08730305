"""Random small calls: the compiled kernels beside the portable form, which PyTorch differentiates."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from tests.ops.roi_pool.cases import Array
from tests.tolerances import assert_close

from deformconv.ops.operator import Operand
from deformconv.ops.roi_pool import cpu, portable
from deformconv.ops.roi_pool.spec import CONVENTIONS, RoiSpec, roi_spec

pytestmark = pytest.mark.slow


def random_call(random: np.random.Generator) -> tuple[RoiSpec, list[Array | None]]:
    """Any convention, groups, classes and parts; boxes in the map, over its border, inverted, huge, tiny or not finite."""

    def pair(most: int) -> tuple[int, int]:
        height, width = random.integers(1, most + 1, 2)
        return int(height), int(width)

    convention, bins = str(random.choice(CONVENTIONS)), pair(4)
    group = bins if random.random() < 0.3 else (1, 1)
    part = pair(6) if random.random() < 0.4 else bins
    classes, images, boxes, size = int(random.integers(1, 4)), int(random.integers(1, 4)), int(random.integers(0, 6)), pair(12)
    per_class = int(random.integers(1, 71 if random.random() < 0.2 else 5))
    scale = float(random.choice([1.0, 0.3, 1 / 16, 2.0]))
    corners = random.uniform(-0.5, 1.5, (boxes, 4)) * max(size) / scale
    kind = random.random()
    if kind < 0.6:
        corners = np.concatenate([np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1)
    elif kind < 0.75:
        corners *= random.choice([1e-320, 1e-3, 1e6, 1e38, 1e300])
    elif kind < 0.9 and boxes:
        corners[random.integers(boxes), random.integers(4)] = random.choice([np.nan, np.inf, -np.inf, 1e308, -1e308])
    offset = random.normal(scale=random.choice([0.1, 1.5, 30]), size=(boxes, 2 * classes, *part))
    if boxes and random.random() < 0.15:
        offset.flat[random.integers(offset.size)] = random.choice([np.nan, np.inf, -np.inf, 1e300])
    arrays: list[Array | None] = [
        random.normal(size=(images, per_class * classes * prod(group), *size)),
        np.concatenate([random.integers(0, images, (boxes, 1)), corners], axis=1),
        offset if classes > 1 or random.random() < 0.8 else None,
        random.uniform(-1, 2, (boxes, 1, *bins)) if random.random() < 0.6 else None,
    ]
    operands: Any = [None if array is None else Operand(array.shape, "float64") for array in arrays]
    sampling = int(random.integers(convention == "rounded", 5))
    gamma = float(random.choice([0.1, 1.0, 0.0, -0.7]))
    parameters = {"output_size": bins, "group_size": group, "part_size": part, "convention": convention, "gamma": gamma}
    return roi_spec(*operands, spatial_scale=scale, sampling_ratio=sampling, **parameters), arrays


@pytest.mark.parametrize("seed", range(4))
def test_kernels_and_portable_form_agree(seed: int) -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(seed)
    for number in range(75):
        spec, arrays = random_call(random)
        what, names = f"call {number}: {spec}", ("input", "boxes", "offset", "mask")
        grad_output = random.normal(size=spec.output_shape)
        wanted = [name for name, array in zip(names, arrays, strict=True) if array is not None and name != "boxes"]
        found = cpu.backward(spec, grad_output, *arrays, wanted)
        tensors = [None if array is None else torch.from_numpy(array.copy()) for array in arrays]
        for name, tensor in zip(names, tensors, strict=True):
            if name in wanted:
                tensor.requires_grad_()
        output = portable.forward(spec, *tensors)
        assert_close(cpu.forward(spec, *arrays), output.detach().numpy(), "float64", what)
        output.backward(torch.from_numpy(grad_output))
        for name, tensor in zip(names, tensors, strict=True):
            if name in wanted:
                expected = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
                assert_close(getattr(found, name), expected, "float64", f"{name} of {what}")
