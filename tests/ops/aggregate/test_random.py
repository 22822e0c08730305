"""Random small calls: the compiled kernels beside the portable form, which PyTorch differentiates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.ops.aggregate.cases import ARGUMENTS, Call, call_of
from tests.tolerances import assert_close

from deformconv.ops.aggregate import cpu, portable

pytestmark = pytest.mark.slow


def random_call(random: np.random.Generator) -> Call:
    """Any rank, window, groups and channels; positions in the map, on pixels, over its edges, huge, or not finite."""
    D = int(random.integers(1, 4))
    most = {1: 90, 2: 12, 3: 5}[D]

    def each(least: int, beyond: int) -> tuple[int, ...]:
        return tuple(random.integers(least, beyond, D).tolist())

    size, kernel, stride, dilation = each(1, most), each(1, 4 if D < 3 else 3), each(1, 4), each(1, 3)
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = []
    for length, span in zip(size, extent, strict=True):
        before = int(random.integers(0, 4))
        padding.append((before, max(int(random.integers(0, 4)), span - length - before)))
    groups, images = int(random.integers(1, 4)), int(random.integers(0 if random.random() < 0.1 else 1, 4))
    channels = groups * int(random.choice([1, 2, 3, 4, 7, 8, 16, 20, 40]))
    output = [
        (length + sum(pair) - span) // step + 1 for length, pair, span, step in zip(size, padding, extent, stride, strict=True)
    ]
    taps = groups * int(np.prod(kernel))
    offset = random.normal(scale=random.choice([0.3, 1.5, 20]), size=(images, taps * D, *output))
    if random.random() < 0.3:
        offset = np.round(offset * 2) / 2
    if random.random() < 0.15:
        offset *= random.choice([1e3, 1e12, 1e38, 1e300])
    if offset.size and random.random() < 0.3:
        offset.flat[random.integers(offset.size, size=3)] = random.choice([np.nan, np.inf, -np.inf, 1e308], size=3)
    call = call_of(
        random.normal(size=(images, channels, *size)),
        offset,
        random.uniform(-1, 2, (images, taps, *output)) if random.random() < 0.7 else None,
        kernel_size=kernel, stride=stride, padding=tuple(padding), dilation=dilation, offset_groups=groups,
        boundary=str(random.choice(["zeros", "inside"])),
    )  # fmt: skip
    last = [random.random() < 0.5 for _ in range(4)]
    names = (*ARGUMENTS, "grad_output")
    call = call.but(grad_output=random.normal(size=call.spec.output_shape))
    return call.but(**{name: channels_last(getattr(call, name)) for name, is_last in zip(names, last, strict=True) if is_last})


def channels_last(array: Any) -> Any:
    return None if array is None else np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


@pytest.mark.parametrize("seed", range(2))
def test_kernels_and_portable_form_agree(seed: int) -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(seed)
    for number in range(40):
        call = random_call(random)
        what, names = f"call {number}: {call.spec}", tuple(call.spec.shapes)
        tensors: list[Any] = [None if a is None else torch.from_numpy(a.copy()).requires_grad_() for a in call.arrays]
        output = portable.forward(call.spec, *tensors)
        assert_close(cpu.forward(call.spec, *call.arrays), output.detach().numpy(), "float64", what)
        output.backward(torch.from_numpy(call.grad_output))
        found = cpu.backward(call.spec, call.grad_output, *call.arrays, wanted=names)
        for name, tensor in zip(ARGUMENTS, tensors, strict=True):
            if tensor is not None:
                assert_close(getattr(found, name), tensor.grad.numpy(), "float64", f"{name} of {what}")
